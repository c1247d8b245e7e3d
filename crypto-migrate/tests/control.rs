//! What an operator sees and may do: assess, limit, throttle, switch now, compare; and that a failure leaves nothing behind.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_crypto_migrate::control::Controls;
use casemate_crypto_migrate::destination::{self, Received};
use casemate_crypto_migrate::identity::Path;
use casemate_crypto_migrate::precopy::{Convergence, Limits};
use casemate_crypto_migrate::source::{self, Assessment, SourceConfig, SourceError};
use common::*;

/// Limits by which only the operator, or time, ends the rounds.
const ENDLESS: Limits = Limits {
    downtime: Duration::ZERO,
    max_rounds: u32::MAX,
    patience: u32::MAX,
    throttle: 0,
    total: None,
};

fn assess(
    site: &Site,
    from: &mut ToySource,
    to: ToyDestination,
) -> (Result<Assessment, SourceError>, ToyDestination, String) {
    let (a, b) = tcp_pair();
    let (source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    std::thread::scope(|scope| {
        let there = scope.spawn(move || {
            let mut to = to;
            let received = destination::serve(b, &destination, &mut to, &mut |_| {});
            let said = match received {
                Ok(Received::Assessed) => "assessed".to_owned(),
                Ok(Received::Moved(_)) => "moved".to_owned(),
                Ok(Received::Settled(_)) => "settled".to_owned(),
                Err(error) => error.code().to_owned(),
            };
            (to, said)
        });
        let offer = from.offer(41);
        let here = source::assess(a, &source, &offer, from, &mut |_| {});
        let (to, said) = there.join().unwrap();
        (here, to, said)
    })
}

#[test]
fn an_assessment_measures_and_moves_nothing_and_the_move_follows() {
    let site = Site::new();
    let mut from = ToySource::new();
    let before = from.memory.clone();
    let (plan, to, said) = assess(&site, &mut from, ToyDestination::default());
    let plan = plan.unwrap();
    assert_eq!(said, "assessed");
    assert!(to.admitted && to.abandoned && !to.begun && to.memory.is_empty());
    assert!(from.running && !from.destroyed && from.throttles.is_empty());
    assert_eq!((plan.memory_pages, plan.measured.pages), (1400, 1400));
    // The toy writes a hundred pages each time it is looked at; here, once, after a second.
    let rate = plan.measured.dirty_rate;
    assert!(rate > 60.0 && rate < 101.0, "{rate}");
    assert!(plan.measured.throughput > 1e6 && plan.measured.round_trip < Duration::from_secs(1));
    assert_eq!(plan.forecast.convergence, Convergence::Converged);
    assert!(before.len() == from.memory.len());
    direct(
        &site.source(Path::Direct),
        &site.destination(Path::Direct),
        from,
        ToyDestination::default(),
    )
    .assert_moved();
}

#[test]
fn an_assessment_is_refused_by_whom_a_move_would_be_and_with_the_same_codes() {
    let site = Site::new();
    let refusing = |refuse, refuse_session| ToyDestination {
        refuse,
        refuse_session,
        ..Default::default()
    };
    for (to, code) in [
        (refusing(true, false), "POLICY_REFUSED"),
        (refusing(false, true), "POLICY_SESSION"),
    ] {
        let mut from = ToySource::new();
        let (plan, to, said) = assess(&site, &mut from, to);
        assert_eq!((plan.unwrap_err().code(), said.as_str()), (code, code));
        assert!(from.running && to.active.is_none() && (to.abandoned || !to.admitted));
    }
    for (step, code) in [
        ("judge", "TARGET_REFUSED"),
        ("start_tracking", "GUEST_FAILED"),
        ("take_dirty", "GUEST_FAILED"),
    ] {
        let mut from = ToySource::new();
        from.fail_at = Some(step);
        let (plan, to, _) = assess(&site, &mut from, ToyDestination::default());
        assert_eq!(plan.unwrap_err().code(), code, "{step}");
        assert!(from.running && to.abandoned, "{step}");
    }
}

#[test]
fn who_expects_a_guest_takes_no_assessment_for_one() {
    let site = Site::new();
    let (a, b) = tcp_pair();
    let destination = site.destination(Path::Direct);
    std::thread::scope(|scope| {
        let there = scope.spawn(move || {
            let mut to = ToyDestination::default();
            let received = destination::receive(b, &destination, &mut to, &mut |_| {});
            (received.unwrap_err().code().to_owned(), to)
        });
        let mut from = ToySource::new();
        let offer = from.offer(41);
        let config = site.source(Path::Direct);
        source::assess(a, &config, &offer, &mut from, &mut |_| {}).unwrap();
        let (code, to) = there.join().unwrap();
        assert_eq!(code, "OFFER_INVALID");
        assert!(to.active.is_none());
    });
}

#[test]
fn a_guest_that_writes_too_much_is_throttled_step_by_step() {
    let site = Site::new();
    let mut source = site.source(Path::Direct);
    source.limits = Limits {
        throttle: 45,
        patience: 2,
        max_rounds: 50,
        ..ENDLESS
    };
    let destination = site.destination(Path::Direct);
    let run = direct(
        &source,
        &destination,
        ToySource::new(),
        ToyDestination::default(),
    );
    run.assert_moved();
    let outcome = run.left.as_ref().unwrap();
    assert_eq!(run.source.throttles, [20, 30, 40, 45]);
    assert_eq!(
        (outcome.convergence, outcome.throttle_percent),
        (Convergence::NoProgress, 45)
    );
    assert!(
        run.source_progress
            .iter()
            .any(|event| event.throttle_percent == 45)
    );
    let mut fails = ToySource::new();
    fails.fail_at = Some("throttle");
    direct(&source, &destination, fails, ToyDestination::default()).assert_stayed();
}

/// Runs a move whose rounds never end, and does something when its round `at` is over.
fn interfere(
    site: &Site,
    mut source: SourceConfig,
    at: u32,
    mut act: impl FnMut(&Controls) + Send,
) -> (
    Result<source::SourceOutcome, SourceError>,
    ToySource,
    ToyDestination,
) {
    source.limits = Limits {
        total: source.limits.total,
        ..ENDLESS
    };
    let controls = Arc::clone(&source.controls);
    let destination = site.destination(Path::Direct);
    let (a, b) = tcp_pair();
    std::thread::scope(|scope| {
        let there = scope.spawn(move || {
            let mut to = ToyDestination::default();
            let _ = destination::receive(b, &destination, &mut to, &mut |_| {});
            to
        });
        let mut from = ToySource::new();
        let offer = from.offer(41);
        let mut acted = false;
        let outcome = source::migrate(a, &source, &offer, &mut from, &mut |event| {
            if event.round >= at && !std::mem::replace(&mut acted, true) {
                act(&controls);
            }
        });
        (outcome, from, there.join().unwrap())
    })
}

#[test]
fn the_operator_may_switch_at_any_time_and_nothing_is_lost() {
    let site = Site::new();
    for round in [0, 1, 3] {
        let source = site.source(Path::Direct);
        let (outcome, from, to) = interfere(&site, source, round, Controls::proceed);
        let outcome = outcome.unwrap();
        assert_eq!(outcome.convergence, Convergence::Proceeded);
        assert!(
            outcome.rounds > round && outcome.rounds <= round + 3,
            "{outcome:?}"
        );
        assert_eq!(to.memory, from.memory);
        assert_eq!(to.active, Some(42));
        let error = outcome.downtime_ms - outcome.estimated_downtime_ms;
        assert!((outcome.forecast_error_ms - error).abs() < 1e-9);
    }
}

#[test]
fn the_bandwidth_holds_and_may_be_changed_while_it_runs() {
    let site = Site::new();
    let source = site.source(Path::Direct);
    // About 4 MB are to be sent in the first round: two seconds.
    source.controls.set_bandwidth(2_000_000);
    let begun = Instant::now();
    let (outcome, ..) = interfere(&site, source, 2, Controls::proceed);
    let held = begun.elapsed();
    assert!(outcome.unwrap().rounds >= 2);
    assert!(held > Duration::from_millis(1500), "{held:?}");

    let source = site.source(Path::Direct);
    source.controls.set_bandwidth(100_000); // forty seconds
    let controls = Arc::clone(&source.controls);
    let lifted = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        controls.set_bandwidth(0);
    });
    let begun = Instant::now();
    let (outcome, ..) = interfere(&site, source, 2, Controls::proceed);
    lifted.join().unwrap();
    outcome.unwrap();
    let took = begun.elapsed();
    assert!(
        took > Duration::from_millis(300) && took < Duration::from_secs(5),
        "{took:?}"
    );
}

#[test]
fn a_move_that_takes_too_long_is_given_up_and_the_next_one_succeeds() {
    let site = Site::new();
    let mut source = site.source(Path::Direct);
    source.limits.total = Some(Duration::from_millis(500));
    source.controls.set_bandwidth(500_000);
    let begun = Instant::now();
    let (outcome, from, to) = interfere(&site, source, 9, |_| {});
    assert_eq!(outcome.unwrap_err().code(), "TIME_LIMIT");
    assert!(begun.elapsed() < Duration::from_secs(4));
    assert!(from.running && to.active.is_none() && to.abandoned);
    direct(
        &site.source(Path::Direct),
        &site.destination(Path::Direct),
        from,
        ToyDestination::default(),
    )
    .assert_moved();
}

#[test]
fn both_ends_say_what_they_compared() {
    let site = Site::new();
    let (mut source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    for read_back in [false, true] {
        source.read_back = read_back;
        let run = direct(
            &source,
            &destination,
            ToySource::new(),
            ToyDestination::default(),
        );
        run.assert_moved();
        let (here, there) = (
            &run.left.as_ref().unwrap().verified,
            &run.right.as_ref().unwrap().verified,
        );
        assert_eq!(here, there);
        assert_eq!((here.pages, here.announced), (1400, 3));
        assert_eq!((here.seals_sha256.len(), here.state_sha256.len()), (64, 64));
        assert_eq!(here.content_sha256.is_some(), read_back);
    }
}

/// The seals have verified, and yet memory does not hold what was sent: only reading it anew shows that.
#[test]
fn memory_that_changes_behind_the_seals_is_found_when_it_is_read_back() {
    let site = Site::new();
    let (mut source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    source.read_back = true;
    let to = ToyDestination {
        corrupt: Some(10_003),
        ..Default::default()
    };
    let run = direct(&source, &destination, ToySource::new(), to);
    run.assert_stayed();
    assert_eq!(run.codes(), ("MANIFEST_MISMATCH", "MANIFEST_MISMATCH"));
    direct(&source, &destination, run.source, ToyDestination::default()).assert_moved();
}
