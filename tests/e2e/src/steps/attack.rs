//! Step 6: a relay that holds a valid certificate of the site's authority.

use std::thread;

use crate::answers::Probe;
use crate::demo::Demo;
use crate::error::{E2eError, Result};
use crate::plaintext::{PATTERN, Search, look_through_guest};
use crate::relay::Mode;
use crate::steps::GUEST_NAME;
use crate::steps::migrate::{Rounds, arrived, code, unharmed};
use crate::world::Host;

pub(crate) fn run(demo: &mut Demo) -> Result<()> {
    direct_path(demo)?;
    for (mode, expected) in Mode::ATTACKS {
        attack(demo, mode, expected)?;
    }
    unharmed(demo, 6, "after six attacks the guest counts on at site-a")?;
    left_alone(demo)
}

/// Where the policy says that nobody stands between, a certificate of the site is not enough.
fn direct_path(demo: &mut Demo) -> Result<()> {
    let relay = demo.world.intruder()?;
    relay.arm(Mode::Forward, Search::default());
    let moved = demo
        .world
        .site_a
        .migrate(GUEST_NAME, "site-b-relayed", &mut |_| {})?;
    let sitting = relay.sitting()?;
    let nothing_passed = match &sitting.passed {
        Ok(report) => report.frames_to_destination == 0,
        Err(_) => true,
    };
    let found = code(&moved);
    let held = found == "PEER_NOT_ALLOWED" && nothing_passed;
    demo.table.check(
        6,
        "on a direct path the relay is refused at once",
        held,
        found,
    );
    unharmed(demo, 6, "the guest counts on at site-a")
}

/// Named as gateway, the relay attacks; the destination refuses and the guest stays.
fn attack(demo: &mut Demo, mode: Mode, expected: &str) -> Result<()> {
    let relay = demo.world.gateway()?;
    relay.arm(mode, Search::default());
    let moved = demo
        .world
        .site_a
        .migrate(GUEST_NAME, "site-b-gw", &mut |_| {})?;
    let sitting = relay.sitting()?;
    let found = code(&moved);
    let struck = if sitting.struck {
        ""
    } else {
        "; the relay found nothing to attack"
    };
    demo.table.check(
        6,
        &format!("the gateway {}", mode.words()),
        sitting.struck && found == expected,
        found + struck,
    );
    let guest = demo.guest()?;
    guest
        .watch
        .wait_ticks(2, std::time::Duration::from_secs(20))?;
    let problems = guest.watch.problems.clone();
    if !problems.is_empty() {
        demo.table
            .check(6, "the guest is unharmed", false, problems.join("; "));
    }
    Ok(())
}

/// The same gateway, left alone: the guest moves, and the relay has learned nothing.
fn left_alone(demo: &mut Demo) -> Result<()> {
    let secret = demo.world.owner.secret().as_bytes().to_vec();
    let search = Search::new(vec![
        ("Linux version", b"Linux version ".to_vec()),
        ("guest program", b"PATTERN ERROR".to_vec()),
        ("secret", secret),
        (CONTROL, GUEST_NAME.as_bytes().to_vec()),
    ]);
    let mut inside = search.clone();
    let info = demo.world.status(Host::A, GUEST_NAME)?;
    if info.emulated {
        look_through_guest(info.pid, &mut inside)?;
        let found = inside.found();
        let there = ["Linux version", "guest program", PATTERN]
            .iter()
            .all(|name| found.contains(name));
        demo.table.check(
            6,
            "the plaintext looked for is in the guest's memory",
            there,
            found.join(", "),
        );
    }
    let relay = demo.world.gateway()?;
    relay.arm(Mode::Forward, search);
    let (moved, probe) = migrate_and_probe(demo)?;
    demo.probe_in_move = probe;
    let sitting = demo.world.gateway()?.sitting()?;
    let passed = matches!(&sitting.passed, Ok(report) if report.frames_to_destination > 0);
    let report = moved.report()?;
    demo.table.figure(
        "migration through the gateway",
        report.total_ms as f64,
        "ms",
        demo.emulated(),
    );
    let found = format!("path {}, {} ms", report.path, report.total_ms);
    demo.table.check(
        6,
        "left alone, the gateway's migration succeeds",
        passed && report.path == "gateway",
        found,
    );
    // The guest's name in the offer is for gateways to read: that it was found proves that the search works.
    let seen = sitting.search.found();
    let found = format!(
        "{:.1} MiB searched, seen: {}",
        sitting.search.bytes() as f64 / f64::from(1 << 20),
        seen.join(", ")
    );
    demo.table
        .check(6, "and it has seen no plaintext", seen == [CONTROL], found);
    arrived(demo, Host::BGw, 6)
}

/// Migrates through the gateway; with the first progress event the processes are probed from inside.
fn migrate_and_probe(demo: &Demo) -> Result<(crate::site::Moved, Option<Result<Probe>>)> {
    let site = &demo.world.site_a;
    let mut rounds = Rounds::new(demo.screen);
    thread::scope(|scope| {
        let mut prober = None;
        let moved = site.migrate(GUEST_NAME, "site-b-gw", &mut |event| {
            rounds.see(event);
            prober.get_or_insert_with(|| {
                scope.spawn(|| site.ask::<Probe>(&["sandbox", "probe", GUEST_NAME]))
            });
        })?;
        rounds.end();
        let lost = |_| E2eError::Answer("the probing thread panicked".into());
        let probe = prober
            .map(|thread| thread.join().map_err(lost))
            .transpose()?;
        Ok((moved, probe))
    })
}

const CONTROL: &str = "guest name in the offer";
