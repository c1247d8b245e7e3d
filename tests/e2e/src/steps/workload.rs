//! Step 4: the guest at work: memory, counter, disk, network.

use std::time::Duration;

use crate::connection::Connection;
use crate::demo::Demo;
use crate::error::{E2eError, Result};
use crate::guest_watch::verify;
use crate::network::GUEST;
use crate::steps::GUEST_NAME;

pub(crate) fn run(demo: &mut Demo) -> Result<()> {
    let guest = demo.guest()?;
    guest.watch.wait_ticks(10, Duration::from_secs(20))?;
    let (ticks, problems) = (guest.watch.ticks, guest.watch.problems.clone());
    demo.table.check(
        4,
        "it counts on the console",
        problems.is_empty(),
        format!("{ticks} ticks {}", problems.join("; ")),
    );
    let connection = Connection::open(&demo.world.network.outside, GUEST)?;
    connection.wait_lines(5, Duration::from_secs(20))?;
    let longest = connection.held().longest.as_millis();
    demo.table.check(
        4,
        "it answers over TCP from outside",
        true,
        format!("slowest of 5 echoes {longest} ms"),
    );
    demo.connection = Some(connection);
    check_inside(demo, 4)
}

/// Has the guest check its memory and its disk.
pub(crate) fn check_inside(demo: &mut Demo, step: u8) -> Result<()> {
    let host = demo.guest()?.host;
    let vsock = demo.world.status(host, GUEST_NAME)?.vsock;
    let vsock = vsock.ok_or_else(|| E2eError::Answer("the guest has no vsock".into()))?;
    let verified = verify(&vsock)?;
    let held = verified.ok && verified.pages_checked > 0 && verified.blocks_checked > 0;
    let found = format!(
        "{} pages, {} blocks",
        verified.pages_checked, verified.blocks_checked
    );
    demo.table
        .check(step, "memory pattern and disk intact", held, found);
    Ok(())
}
