//! Step 3: the owner's verdict, the secret, and the refusal of a kernel with one byte changed.

use std::time::Instant;

use crate::demo::Demo;
use crate::error::Result;
use crate::kernel::tamper;
use crate::owner::text;
use crate::steps::GUEST_NAME;
use crate::world::BOOT;

pub(crate) fn run(demo: &mut Demo) -> Result<()> {
    release(demo)?;
    refuse(demo)
}

fn release(demo: &mut Demo) -> Result<()> {
    let (session, description) = {
        let guest = demo
            .guest
            .as_ref()
            .ok_or_else(|| crate::error::E2eError::Answer("no guest was launched".into()))?;
        (&guest.session, guest.description.as_path())
    };
    let (status, release) =
        demo.world
            .owner
            .release(&demo.world.site_a, session, GUEST_NAME, description)?;
    let booting = Instant::now();
    for check in &release.verdict.checks {
        demo.screen.say(&format!(
            "  {:<12} {:<20} {}",
            check.result, check.name, check.found
        ));
    }
    let accepted = status == 0 && release.released && release.verdict.failed().is_empty();
    demo.table.check(
        3,
        "the owner accepts the launch and releases the secret",
        accepted,
        emulated(release.verdict.emulated),
    );
    let expected = demo.world.owner.secret_sha256();
    let guest = demo.guest()?;
    guest.watch.wait("the guest's `ready`", BOOT, |w| w.ready)?;
    let seconds = booting.elapsed().as_secs_f64();
    let printed = guest.watch.secret_sha256.clone().unwrap_or_default();
    demo.table.figure(
        "boot, secret to ready guest",
        seconds * 1000.0,
        "ms",
        demo.machine.machine,
    );
    demo.table.check(
        3,
        "the guest prints the secret's SHA-256",
        printed == expected,
        short(&printed),
    );
    Ok(())
}

fn refuse(demo: &mut Demo) -> Result<()> {
    let world = &demo.world;
    let other = world.folder.join("tampered-vmlinuz");
    let offset = tamper(&world.product.kernel, &other)?;
    let name = "tampered";
    let theirs = world.describe_bare("tampered.toml", name, &other)?;
    let ours = world.describe_bare("tampered-as-owned.toml", name, &world.product.kernel)?;
    let session = world.owner.session(&world.site_a, name, &ours)?;
    world.launch(&theirs, &session)?;
    let (status, release) = world.owner.release(&world.site_a, &session, name, &ours)?;
    let failed = release.verdict.failed();
    let refused = status == 1 && !release.released && failed == ["launch_measurement"];
    let found = format!(
        "byte {offset} of {}; failed check: {}",
        text(&world.product.kernel)?,
        failed.join(", ")
    );
    demo.table.check(
        3,
        "one byte of the kernel changed: the owner refuses",
        refused,
        found,
    );
    let info = world
        .site_a
        .ask::<crate::answers::GuestInfo>(&["status", name])?;
    demo.table.check(
        3,
        "the refused guest has not run",
        info.state == "measured",
        info.state,
    );
    world.site_a.done(&["stop", name])?;
    std::fs::remove_file(&other).map_err(crate::error::io("remove the changed kernel"))
}

fn emulated(emulated: bool) -> &'static str {
    if emulated { "emulated, NOT AMD" } else { "AMD" }
}

fn short(digest: &str) -> String {
    format!("{}…", digest.chars().take(16).collect::<String>())
}
