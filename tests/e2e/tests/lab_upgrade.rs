//! Linux changes its VMM under its work: disk, console, a TCP connection from outside go on.

mod common;

use std::time::Duration;

use casemate_e2e::answers::GuestInfo;
use casemate_e2e::connection::Connection;
use casemate_e2e::guest_watch::GuestWatch;
use casemate_e2e::network::GUEST;
use casemate_e2e::owner::text;
use casemate_e2e::world::{BOOT, Extent, Host};
use common::*;
use serde::Deserialize;

#[test]
fn linux_goes_on_in_another_vmm_with_disk_console_and_connection() {
    let world = world("upgrade", Extent::Direct);
    let described = std::fs::read_to_string(world.describe("vault").unwrap()).unwrap();
    let sev = "technology = \"sev\"\nsecret = true";
    assert!(described.contains(sev));
    let description = world.folder.join("plain.toml");
    let plain = described.replace(sev, "technology = \"none\"");
    std::fs::write(&description, plain).unwrap();
    let run = ["run", text(&description).unwrap()];
    let info: GuestInfo = world.site_a.ask(&run).unwrap();
    let mut watch = GuestWatch::new(&info.console);
    watch
        .wait("the guest's `ready`", BOOT, |w| w.ready)
        .unwrap();
    watch.wait_ticks(10, BOOT).unwrap();
    let connection = Connection::open(&world.network.outside, GUEST).unwrap();
    connection.wait_lines(5, Duration::from_secs(20)).unwrap();

    let mut pauses = Vec::new();
    for _ in 0..5 {
        connection.measure_anew();
        let upgraded: Upgraded = world.site_a.ask(&["vm", "upgrade", "vault"]).unwrap();
        watch.wait_ticks(10, Duration::from_secs(30)).unwrap();
        assert_eq!(watch.problems, Vec::<String>::new());
        connection.wait_lines(5, Duration::from_secs(20)).unwrap();
        assert_intact(&world, Host::A, "vault");
        pauses.push((upgraded.pause_us, connection.held().longest));
    }
    eprintln!("stood still (us), longest echo: {pauses:?}");
    assert_eq!(world.status(Host::A, "vault").unwrap().epoch, 1);

    // What else can be done to a guest can be done to this one: a snapshot, and back.
    drop(connection);
    let file = world.folder.join("after.snap");
    let file = text(&file).unwrap();
    let snapshot = ["snapshot", "vault", file, "--stop"];
    world.site_a.done(&snapshot).unwrap();
    world.site_a.done(&["restore", file]).unwrap();
    world.site_a.done(&["vm", "upgrade", "vault"]).unwrap();
    watch.wait_ticks(10, BOOT).unwrap();
    assert_eq!(watch.problems, Vec::<String>::new());
    assert_intact(&world, Host::A, "vault");
    world.site_a.done(&["stop", "vault"]).unwrap();
    assert_ends_clean(world);
}

/// `casemate vm upgrade`.
#[derive(Deserialize)]
struct Upgraded {
    pause_us: u64,
}
