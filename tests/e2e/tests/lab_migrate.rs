//! One guest to another host and back, while it works; a host it was never meant for; nothing left at the end.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use casemate_e2e::announcement::{Announcements, Heard};
use casemate_e2e::connection::Connection;
use casemate_e2e::guest_watch::GuestWatch;
use casemate_e2e::network::GUEST;
use casemate_e2e::world::{Extent, GUEST_MAC, Host, World};
use common::*;

#[test]
fn there_and_back() {
    let world = world("migrate", Extent::Direct);
    let (_, mut watch) = world.running_guest("vault").unwrap();
    let connection = Connection::open(&world.network.outside, GUEST).unwrap();
    connection.wait_lines(3, Duration::from_secs(10)).unwrap();

    let unknown = world
        .site_a
        .migrate("vault", "site-c", &mut |_| {})
        .unwrap();
    assert!(unknown.code().starts_with("POLICY"), "{unknown:?}");

    travel(&world, Host::A, Host::B, "site-b", &mut watch, &connection);
    let gone = world.site_a.casemate(&["status", "vault"]).unwrap();
    assert_eq!(gone.code(), "NO_SUCH_GUEST");
    travel(&world, Host::B, Host::A, "site-a", &mut watch, &connection);
    assert_eq!(world.status(Host::A, "vault").unwrap().epoch, 3);

    drop(connection);
    assert_ends_clean(world);
}

fn travel(
    world: &World,
    from: Host,
    to: Host,
    peer: &str,
    watch: &mut GuestWatch,
    connection: &Connection,
) {
    let mut announcements = Announcements::listen(world.site(to).unwrap().namespace()).unwrap();
    let mut rounds = 0;
    let mut count =
        |event: &serde_json::Value| rounds = rounds.max(event["round"].as_u64().unwrap_or(0));
    let report = world
        .site(from)
        .unwrap()
        .migrate("vault", peer, &mut count)
        .unwrap()
        .report()
        .unwrap();
    assert_eq!(
        (report.path.as_str(), report.tls_suite.as_str()),
        ("direct", "TLS13_AES_256_GCM_SHA384")
    );
    assert!(
        report.firmware_pages > 0,
        "private pages go through the firmware"
    );
    assert!(rounds > 0 && u64::from(report.rounds) >= rounds);
    let heard = announcements.heard(GUEST_MAC, GUEST, Duration::from_secs(5));
    assert_eq!(
        heard,
        Heard {
            gratuitous_arp: true,
            rarp: true
        }
    );
    watch
        .moved_to(&world.status(to, "vault").unwrap().console)
        .unwrap();
    watch.wait_ticks(10, Duration::from_secs(20)).unwrap();
    assert_eq!(watch.problems, Vec::<String>::new());
    connection.wait_lines(3, Duration::from_secs(10)).unwrap();
    assert_intact(world, to, "vault");
}
