//! Linux in a sealed file and out of it again, at once and on demand: its work, its disk and its clock go on. Then its
//! balloon takes memory, and its power button shuts it down.

mod common;

use std::time::{Duration, Instant};

use casemate_e2e::answers::GuestInfo;
use casemate_e2e::error::Result;
use casemate_e2e::guest_watch::GuestWatch;
use casemate_e2e::world::{Extent, Host, World};
use common::*;
use serde::Deserialize;

#[test]
fn linux_goes_on_after_a_snapshot_in_either_way() {
    let world = world("snapshot", Extent::Direct);
    let described = std::fs::read_to_string(world.describe("vault").unwrap()).unwrap();
    let described = described
        .replace(
            "technology = \"sev\"\nsecret = true",
            "technology = \"none\"",
        )
        .replace(
            "\n[boot]",
            "\n[balloon]\n[cpu]\nmodel = \"baseline\"\ncores = 1\nthreads = 2\n\n[boot]",
        );
    let description = world.folder.join("plain.toml");
    std::fs::write(&description, described).unwrap();
    let info: GuestInfo = world
        .site_a
        .ask(&["run", &description.display().to_string()])
        .unwrap();
    let mut watch = GuestWatch::new(&info.console);
    watch
        .wait("the guest's `ready`", BOOT, |w| w.ready)
        .unwrap();
    watch.wait_ticks(10, BOOT).unwrap();

    for memory in ["at-once", "on-demand"] {
        let file = world.folder.join(format!("{memory}.snap"));
        let file = file.display().to_string();
        world
            .site_a
            .done(&["snapshot", "vault", &file, "--stop"])
            .unwrap();
        std::thread::sleep(AWAY);
        let restored = world
            .site_a
            .done(&["restore", &file, "--memory", memory])
            .unwrap();
        eprintln!("{memory}: {restored:?}");
        watch.wait_ticks(20, BOOT).unwrap();
        assert_eq!(watch.problems, Vec::<String>::new());
        assert_intact(&world, Host::A, "vault");
    }
    let console = std::fs::read_to_string(&info.console).unwrap();
    let ticks: Vec<u64> = console
        .lines()
        .filter_map(|line| line.split_once("guest: tick ")?.1.split(' ').nth(1))
        .filter_map(|ms| ms.trim().parse().ok())
        .collect();
    assert!(ticks.len() > 50, "{}", ticks.len());
    for pair in ticks.windows(2) {
        let step = pair[1].checked_sub(pair[0]).map(Duration::from_millis);
        assert!(
            step.is_some_and(|step| step < AWAY),
            "the guest's clock went from {} to {} ms",
            pair[0],
            pair[1]
        );
    }
    let begun = Instant::now();
    while !balloon_is_full(&world).unwrap() {
        assert!(begun.elapsed() < BOOT, "64 MiB are not given back");
        std::thread::sleep(Duration::from_millis(200));
    }
    // The guest hears its button, and is gone before anybody would have to force it.
    world
        .site_a
        .done(&["vm", "stop", "vault", "--timeout", "60"])
        .unwrap();
    let console = std::fs::read_to_string(&info.console).unwrap();
    assert!(console.contains("guest: power button"), "{console}");
    assert_ends_clean(world);
}

/// Whether the guest has given 64 MiB back.
fn balloon_is_full(world: &World) -> Result<bool> {
    let order = ["vm", "resize", "vault", "--balloon", "64 MiB"];
    let status: Balloon = world.site_a.ask(&order)?;
    assert_eq!(status.size, 64 << 20);
    Ok(status.held == status.size)
}

/// `casemate vm resize`.
#[derive(Deserialize)]
struct Balloon {
    size: u64,
    held: u64,
}

/// The lab is slow.
const BOOT: Duration = Duration::from_secs(90);
/// How long the guest is no more than a file; its clock shall not show it.
const AWAY: Duration = Duration::from_secs(6);
