//! Linux that panics, resets or switches itself off is told apart, in its state and in the ledger.

mod common;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use casemate_e2e::guest_watch::{GuestWatch, ask};
use casemate_e2e::owner::text;
use casemate_e2e::world::Extent;
use common::*;
use serde::Deserialize;

#[test]
fn panic_reset_and_power_off_of_linux_are_told_apart() {
    let world = world("stops", Extent::Direct);
    let described = std::fs::read_to_string(world.describe("vault").unwrap()).unwrap();
    let described = described.replace(
        "technology = \"sev\"\nsecret = true",
        "technology = \"none\"",
    );
    let description = world.folder.join("plain.toml");
    std::fs::write(&description, described).unwrap();
    let orders = [
        ("panic", "panic"),
        ("reset", "reset"),
        ("poweroff", "shutdown"),
    ];
    for (order, reason) in orders {
        let guest: Guest = world
            .site_a
            .ask(&["run", text(&description).unwrap()])
            .unwrap();
        let mut watch = GuestWatch::new(&guest.console);
        watch
            .wait("the guest's `ready`", BOOT, |w| w.ready)
            .unwrap();
        let told: Done = ask(guest.vsock.as_deref().unwrap(), order).unwrap();
        assert!(told.ok);
        let begun = Instant::now();
        let stopped = loop {
            let now: Guest = world.site_a.ask(&["status", "vault"]).unwrap();
            if now.state == "stopped" {
                break now.stopped;
            }
            assert!(begun.elapsed() < BOOT, "{order}: it is {}", now.state);
            std::thread::sleep(Duration::from_millis(100));
        };
        assert_eq!(stopped.as_deref(), Some(reason), "{order}");
        let ledger = std::fs::read_to_string(world.site_a.folder().join("state/ledger")).unwrap();
        let mut records = ledger.lines().rev();
        let last = records.find(|line| line.contains("\"guest-stopped\""));
        let last = last.unwrap_or_default();
        assert!(last.contains(&format!("\"reason\":\"{reason}\"")), "{last}");
        world.site_a.done(&["stop", "vault"]).unwrap();
        std::fs::remove_file(&guest.console).unwrap();
    }
    assert_ends_clean(world);
}

#[derive(Deserialize)]
struct Guest {
    state: String,
    stopped: Option<String>,
    console: PathBuf,
    vsock: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Done {
    ok: bool,
}

/// The lab is slow.
const BOOT: Duration = Duration::from_secs(90);
