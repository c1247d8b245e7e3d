//! Step 2: from a description to a measured guest that does not run yet.

use crate::answers::Platform;
use crate::demo::{Demo, Guest};
use crate::error::Result;
use crate::guest_watch::GuestWatch;
use crate::steps::GUEST_NAME;
use crate::world::Host;

pub(crate) fn run(demo: &mut Demo) -> Result<()> {
    let platform: Platform = demo.world.site_a.ask(&["platform", "show"])?;
    demo.machine.secure_processor = platform.emulated;
    let description = demo.world.describe(GUEST_NAME)?;
    let session = demo
        .world
        .owner
        .session(&demo.world.site_a, GUEST_NAME, &description)?;
    let info = demo.world.launch(&description, &session)?;
    let ms = info.launch_us.map_or(0.0, |us| us as f64 / 1000.0);
    demo.table
        .figure("launch, request to measurement", ms, "ms", demo.emulated());
    let technology = format!(
        "{}{}",
        info.technology,
        if info.emulated { ", emulated" } else { "" }
    );
    let measured = info.state == "measured" && info.technology == "sev" && ms > 0.0;
    demo.table.check(
        2,
        "launched and measured",
        measured,
        format!("{technology}, {ms:.0} ms"),
    );
    let mut watch = GuestWatch::new(&info.console);
    watch.update()?;
    let silent = watch.last_tick.is_none() && !watch.ready;
    demo.table.check(
        2,
        "it waits for its owner",
        silent,
        "not an instruction has run",
    );
    demo.guest = Some(Guest {
        session,
        watch,
        description,
        host: Host::A,
    });
    Ok(())
}
