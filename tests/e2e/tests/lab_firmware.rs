//! A disk with its own boot loader starts Linux through Debian's OVMF, 12's and 13's; the guest goes on after a snapshot.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use casemate_e2e::answers::GuestInfo;
use casemate_e2e::guest_watch::GuestWatch;
use casemate_e2e::world::{Extent, Host, World};
use common::*;

#[test]
fn a_disk_boots_through_ovmf_and_goes_on_after_a_snapshot() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let world = world("firmware", Extent::Direct);
    let mut watch = booted(&world, "LAB_FIRMWARE");

    let file = world.folder.join("firmware.snap").display().to_string();
    world
        .site_a
        .done(&["snapshot", "firmware", &file, "--stop"])
        .unwrap();
    world.site_a.done(&["restore", &file]).unwrap();
    watch.wait_ticks(20, BOOT).unwrap();
    assert_eq!(watch.problems, Vec::<String>::new());
    assert_intact(&world, Host::A, "firmware");
    world.site_a.done(&["stop", "firmware"]).unwrap();
    assert_ends_clean(world);
}

#[test]
fn the_same_disk_boots_through_debian_13s_ovmf() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let world = world("trixie", Extent::Direct);
    let watch = booted(&world, "LAB_FIRMWARE_TRIXIE");
    assert_eq!(watch.problems, Vec::<String>::new());
    world.site_a.done(&["stop", "firmware"]).unwrap();
    assert_ends_clean(world);
}

/// A guest that this firmware started from the disk, at work.
fn booted(world: &World, firmware: &str) -> GuestWatch {
    let description = describe(world, firmware);
    let info: GuestInfo = world
        .site_a
        .ask(&["run", &description.display().to_string()])
        .unwrap();
    let mut watch = GuestWatch::new(&info.console);
    watch
        .wait("the guest's `ready`", BOOT, |w| w.ready)
        .unwrap();
    watch.wait_ticks(10, BOOT).unwrap();
    let console = std::fs::read_to_string(&info.console).unwrap();
    let started = console.contains("BdsDxe: starting Boot");
    assert!(started, "firmware starts no boot loader:\n{console}");
    assert_intact(world, Host::A, "firmware");
    watch
}

/// The guest's work is on the first disk; firmware has to find the second, at which nothing can be written.
fn describe(world: &World, firmware: &str) -> PathBuf {
    let described = format!(
        "name = \"firmware\"\nvcpus = 2\nmemory = \"512 MiB\"\n\n[boot]\nfirmware = \"{}\"\n\n\
         [[disk]]\nid = \"data\"\npath = \"{}\"\n\n[[disk]]\nid = \"system\"\npath = \"{}\"\nread_only = true\n\n\
         [vsock]\ncid = 31\n[rng]\n",
        shipped(firmware).display(),
        world.folder.join("data.raw").display(),
        shipped("LAB_BOOT_DISK").display(),
    );
    let path = world.folder.join("firmware.toml");
    std::fs::write(&path, described).unwrap();
    path
}

/// Each counts what its world leaves behind, and two guests would be slower than one.
static TURN: Mutex<()> = Mutex::new(());
/// Firmware and kernel; the lab is slow.
const BOOT: Duration = Duration::from_secs(150);
