//! Linux with its disk to another host and back, no storage shared, while it writes to that disk.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use casemate_e2e::guest_watch::GuestWatch;
use casemate_e2e::world::{Extent, Host, World};
use common::*;

#[test]
fn linux_and_its_disk_move_there_and_back() {
    let world = world("disk", Extent::OwnDisks);
    let (_, mut watch) = world.running_guest("vault").unwrap();
    watch.wait_ticks(20, Duration::from_secs(60)).unwrap();
    travel(&world, Host::A, Host::B, "site-b", &mut watch);
    travel(&world, Host::B, Host::A, "site-a", &mut watch);
    // Each host has the image that came to it, and the one that the guest left is another file.
    for image in ["data.raw", "site-a.raw", "site-b.raw"] {
        assert!(world.folder.join(image).exists(), "{image}");
    }
    assert_ends_clean(world);
}

/// The guest checks every page of its memory and every block of its disk afterwards.
fn travel(world: &World, from: Host, to: Host, peer: &str, watch: &mut GuestWatch) {
    let more = ["--copy-disk", "data"];
    let source = world.site(from).unwrap();
    let moved = source.migrate_with("vault", peer, &more, &mut |_| {});
    let report = moved.unwrap().report().unwrap();
    eprintln!("{report:?}");
    watch
        .moved_to(&world.status(to, "vault").unwrap().console)
        .unwrap();
    watch.wait_ticks(20, Duration::from_secs(60)).unwrap();
    assert_eq!(watch.problems, Vec::<String>::new());
    assert_intact(world, to, "vault");
}
