//! A relay with a valid certificate, on the direct path and as the gateway that the policies name.

mod common;

use std::time::Duration;

use casemate_e2e::plaintext::{PATTERN, Search, look_through_guest};
use casemate_e2e::relay::Mode;
use casemate_e2e::world::{Extent, Host};
use common::*;

#[test]
fn every_attack_is_told_apart_and_the_guest_stays_until_the_relay_behaves() {
    let world = world("attack", Extent::WithGateway);
    let (info, mut watch) = world.running_guest("vault").unwrap();

    let direct = world
        .site_a
        .migrate("vault", "site-b-relayed", &mut |_| {})
        .unwrap();
    assert_eq!(direct.code(), "PEER_NOT_ALLOWED");
    let sitting = world.intruder().unwrap().sitting().unwrap();
    assert!(sitting.passed.is_err(), "{sitting:?}");

    for (mode, code) in Mode::ATTACKS {
        world.gateway().unwrap().arm(mode, Search::default());
        let moved = world
            .site_a
            .migrate("vault", "site-b-gw", &mut |_| {})
            .unwrap();
        let sitting = world.gateway().unwrap().sitting().unwrap();
        assert_eq!(
            (moved.code(), sitting.struck),
            (code, true),
            "{mode:?}: {moved:?} {:?}",
            sitting.passed
        );
        assert_logged(world.site(Host::BGw).unwrap(), code);
        watch.wait_ticks(2, Duration::from_secs(10)).unwrap();
    }
    assert_intact(&world, Host::A, "vault");

    let secret = world.owner.secret().as_bytes().to_vec();
    let search = Search::new(vec![
        ("Linux", b"Linux version ".to_vec()),
        ("secret", secret),
        ("name", b"vault".to_vec()),
    ]);
    let mut inside = search.clone();
    look_through_guest(info.pid, &mut inside).unwrap();
    assert!(
        ["Linux", "secret", PATTERN]
            .iter()
            .all(|n| inside.found().contains(n)),
        "{:?}",
        inside.found()
    );
    world.gateway().unwrap().arm(Mode::Forward, search);
    let report = world
        .site_a
        .migrate("vault", "site-b-gw", &mut |_| {})
        .unwrap()
        .report()
        .unwrap();
    assert_eq!(report.path, "gateway");
    let sitting = world.gateway().unwrap().sitting().unwrap();
    assert_eq!(
        sitting.search.found(),
        ["name"],
        "only the offer is for gateways to read"
    );
    assert!(
        sitting.search.bytes() > 50 << 20,
        "{}",
        sitting.search.bytes()
    );

    watch
        .moved_to(&world.status(Host::BGw, "vault").unwrap().console)
        .unwrap();
    watch.wait_ticks(10, Duration::from_secs(20)).unwrap();
    assert_eq!(watch.problems, Vec::<String>::new());
    assert_intact(&world, Host::BGw, "vault");
    assert_ends_clean(world);
}
