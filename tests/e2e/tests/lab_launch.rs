//! Descriptions good and bad, the owner's secret, rubbish at the migration port, and the end of an agent, however it
//! comes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use casemate_e2e::answers::GuestInfo;
use casemate_e2e::cleanup::Traces;
use casemate_e2e::kernel::tamper;
use casemate_e2e::network::SITE_A;
use casemate_e2e::world::{DIRECT, Extent, Host, World};
use common::*;

#[test]
fn one_guest_from_its_description_to_the_death_of_its_agent() {
    let mut world = world("launch", Extent::WithGateway);
    bad_descriptions_say_what_is_wrong_and_where(&world);
    a_changed_kernel_gets_no_secret(&world);

    let (info, mut watch) = world.running_guest("vault").unwrap();
    assert_eq!((info.technology.as_str(), info.epoch), ("sev", 1));
    assert_eq!(watch.secret_sha256, Some(world.owner.secret_sha256()));
    let again = world
        .site_a
        .casemate(&[
            "run",
            &world.describe("vault").unwrap().display().to_string(),
        ])
        .unwrap();
    assert_ne!(again.status, 0, "the name is taken, and the secret is due");

    rubbish_is_refused_in_time(&world);
    watch.wait_ticks(10, Duration::from_secs(10)).unwrap();
    assert_eq!(watch.problems, Vec::<String>::new());
    assert_intact(&world, Host::A, "vault");

    an_agent_that_is_killed_leaves_no_process(&mut world);
}

fn bad_descriptions_say_what_is_wrong_and_where(world: &World) {
    let good = std::fs::read_to_string(world.describe("vault").unwrap()).unwrap();
    let path = world.folder.join("bad.toml");
    let cases = [
        ("vcpus = 2", "vcpus = 2\nvcups = 2", 3, "vcups"),
        ("vcpus = 2", "vcpus = 0", 2, "1 to 64"),
        ("\"512 MiB\"", "\"513 MB\"", 3, "512 MiB"),
        ("\"sev\"", "\"sevv\"", 11, "want \"none\", \"sev\""),
        ("data.raw", "date.raw", 16, "date.raw"),
        ("secret = true", "secret = true\npolicy = 0", 13, "NODBG"),
    ];
    for (from, to, line, words) in cases {
        std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let said = world
            .site_a
            .casemate(&["run", &path.display().to_string()])
            .unwrap();
        let place = format!("bad.toml:{line}:");
        assert!(
            said.status == 1 && said.code() == "DESCRIPTION",
            "{to}: {said:?}"
        );
        assert!(
            said.stderr.contains(&place) && said.stderr.contains(words),
            "{to}: {}",
            said.stderr
        );
    }
    let said = world.site_a.casemate(&["run", "/nowhere.toml"]).unwrap();
    assert!(said.stderr.contains("/nowhere.toml"), "{}", said.stderr);
    let info = world.site_a.casemate(&["status", "vault"]).unwrap();
    assert_eq!(info.code(), "NO_SUCH_GUEST", "nothing was launched");
}

fn a_changed_kernel_gets_no_secret(world: &World) {
    let other = world.folder.join("vmlinuz");
    tamper(&world.product.kernel, &other).unwrap();
    let theirs = world
        .describe_bare("theirs.toml", "tampered", &other)
        .unwrap();
    let ours = world
        .describe_bare("ours.toml", "tampered", &world.product.kernel)
        .unwrap();
    let session = world
        .owner
        .session(&world.site_a, "tampered", &ours)
        .unwrap();
    world.launch(&theirs, &session).unwrap();
    let (status, release) = world
        .owner
        .release(&world.site_a, &session, "tampered", &ours)
        .unwrap();
    assert_eq!((status, release.released), (1, false));
    assert_eq!(release.verdict.failed(), ["launch_measurement"]);
    let info: GuestInfo = world.site_a.ask(&["status", "tampered"]).unwrap();
    assert_eq!(info.state, "measured");
    world.site_a.done(&["stop", "tampered"]).unwrap();
}

/// Bytes that are no TLS, a length that nobody means, and silence.
fn rubbish_is_refused_in_time(world: &World) {
    let port = (SITE_A, DIRECT);
    let from = &world.site_b;
    throw(from, port, &[0xa5; 300]);
    throw(
        from,
        port,
        &[&[0x16, 3, 1, 0xff, 0xff][..], &[0; 200]].concat(),
    );
    // A frame header of the protocol: version, type Offer, stream 0, the largest length there is, sequence 0.
    let header = [&[0xc1, 1, 0, 0][..], &[0xff; 4], &[0; 8]].concat();
    throw_inside_tls(world, port, &header);
    assert_logged(&world.site_a, "FRAME_TOO_LARGE");
    let waited = throw(from, port, &[]);
    assert!(
        waited > Duration::from_secs(1),
        "silence is given some time: {waited:?}"
    );
    assert_logged(&world.site_a, "a connection was closed");
}

fn an_agent_that_is_killed_leaves_no_process(world: &mut World) {
    world.site_b.stop().unwrap();
    world.site_b_gw.as_mut().unwrap().stop().unwrap();
    world.site_a.kill().unwrap();
    let left = Traces::settle(
        &world.product.casemate,
        &world.before,
        Duration::from_secs(5),
    );
    let processes: Vec<_> = left
        .iter()
        .filter(|trace| trace.starts_with("process"))
        .collect();
    assert!(processes.is_empty(), "{processes:?}");
    // It starts again over what the dead one left, and does not run the guest a second time.
    world.site_a.start_agent().unwrap();
    world.site_a.wait_ready().unwrap();
    assert_eq!(
        world.site_a.casemate(&["status", "vault"]).unwrap().code(),
        "NO_SUCH_GUEST"
    );
    world.site_a.stop().unwrap();
}
