//! Two clones of one Linux at once: each takes new random numbers, has a card, a context id and a disk of its own. The
//! kernel is the lab's own, 6.12: Debian's 6.1 for clouds has no driver for the VM generation id.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_e2e::guest_watch::{GuestWatch, ask, verify};
use casemate_e2e::owner::text;
use casemate_e2e::world::{Extent, World};
use common::*;
use serde::Deserialize;

#[test]
fn two_clones_of_linux_run_at_once_and_know_that_they_are_clones() {
    let world = world("clone", Extent::Direct);
    let description = describe(&world);
    let vault: Guest = world
        .site_a
        .ask(&["run", text(&description).unwrap()])
        .unwrap();
    let mut watch = GuestWatch::new(&vault.console);
    watch
        .wait("the guest's `ready`", BOOT, |w| w.ready)
        .unwrap();
    watch.wait_ticks(10, BOOT).unwrap();
    let seen = fork_of(&vault);
    assert_eq!(
        (seen.reseeds, seen.cid, &seen.mac),
        (0, vault.vsock_cid, &vault.nets[0].mac)
    );
    let file = world.folder.join("vault.snap").display().to_string();
    world
        .site_a
        .done(&["snapshot", "vault", &file, "--stop", "--template"])
        .unwrap();
    let disk = world.folder.join("data.raw");
    let before = std::fs::metadata(&disk).unwrap().modified().unwrap();

    let clones = ["at-once", "on-demand"].map(|memory| {
        let order = ["vm", "clone", &file, memory, "--memory", memory];
        world.site_a.ask::<Guest>(&order).unwrap()
    });
    let mut forks = vec![(vault.vsock_cid, vault.nets[0].mac.clone(), seen.random)];
    for clone in &clones {
        let mut watch = GuestWatch::new(&clone.console);
        watch.wait_ticks(10, BOOT).unwrap();
        let seen = wait_for(clone, |fork| fork.reseeds == 1);
        // It has heard of its context id; its driver still has the card's old address, from which it can send nothing.
        assert_eq!((seen.cid, &seen.mac), (clone.vsock_cid, &vault.nets[0].mac));
        let renewed: Done = ask(socket(clone), "renew-card").unwrap();
        assert!(renewed.ok);
        let seen = wait_for(clone, |fork| fork.mac == clone.nets[0].mac);
        for (cid, mac, random) in &forks {
            assert!(*cid != seen.cid && *mac != seen.mac && *random != seen.random);
        }
        forks.push((seen.cid, seen.mac, seen.random));
        watch.wait_ticks(20, BOOT).unwrap();
        assert_eq!(watch.problems, Vec::<String>::new());
    }
    for clone in &clones {
        let verified = verify(socket(clone)).unwrap();
        assert!(
            verified.ok && verified.pages_checked > 0 && verified.blocks_checked > 0,
            "{verified:?}"
        );
    }
    // What they wrote is in their own images, not the template's.
    assert_eq!(
        std::fs::metadata(&disk).unwrap().modified().unwrap(),
        before
    );
    for clone in &clones {
        world.site_a.done(&["stop", &clone.name]).unwrap();
    }
    let images = clones.each_ref().map(|clone| {
        let image = format!("{}-data.img", clone.name);
        std::fs::read(clone.console.with_file_name(image)).unwrap()
    });
    assert!(images[0] != images[1] && images.iter().all(|i| *i != std::fs::read(&disk).unwrap()));
    assert_ends_clean(world);
}

fn describe(world: &World) -> PathBuf {
    let described = std::fs::read_to_string(world.describe("vault").unwrap()).unwrap();
    let shipped = |name: &str| std::env::var(name).unwrap();
    let described = described
        .replace(
            "technology = \"sev\"\nsecret = true",
            "technology = \"none\"",
        )
        .replace(
            &world.product.kernel.display().to_string(),
            &shipped("LAB_GUEST_NEWER_KERNEL"),
        )
        .replace(
            &world.product.initrd.display().to_string(),
            &shipped("LAB_GUEST_NEWER_INITRD"),
        );
    let description = world.folder.join("plain.toml");
    std::fs::write(&description, described).unwrap();
    description
}

fn wait_for(guest: &Guest, done: impl Fn(&Fork) -> bool) -> Fork {
    let begun = Instant::now();
    loop {
        let fork = fork_of(guest);
        if done(&fork) {
            return fork;
        }
        assert!(begun.elapsed() < BOOT, "{fork:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn fork_of(guest: &Guest) -> Fork {
    let fork: Fork = ask(socket(guest), "fork").unwrap();
    assert!(fork.ok);
    fork
}

fn socket(guest: &Guest) -> &Path {
    guest.vsock.as_deref().unwrap()
}

/// `casemate run`, `casemate vm clone`.
#[derive(Deserialize)]
struct Guest {
    name: String,
    console: PathBuf,
    vsock: Option<PathBuf>,
    vsock_cid: u32,
    nets: Vec<Card>,
}

#[derive(Deserialize)]
struct Card {
    mac: String,
}

/// What the guest knows.
#[derive(Debug, Deserialize)]
struct Fork {
    ok: bool,
    reseeds: u32,
    random: String,
    mac: String,
    cid: u32,
}

#[derive(Deserialize)]
struct Done {
    ok: bool,
}

/// The lab is slow.
const BOOT: Duration = Duration::from_secs(90);
