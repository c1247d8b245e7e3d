//! Both ends in one process: success, failures at every boundary, silence, rubbish.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use casemate_crypto_migrate::code::Code;
use casemate_crypto_migrate::destination;
use casemate_crypto_migrate::identity::Path;
use casemate_crypto_migrate::precopy::{Convergence, Limits};
use casemate_crypto_migrate::progress::Phase;
use casemate_crypto_migrate::session::OwnerKey;
use casemate_crypto_migrate::source::{self, SourceError};
use casemate_crypto_migrate::tls;
use casemate_crypto_migrate::wire::{FrameKind, Header};
use common::*;

#[test]
fn a_guest_moves_and_comes_back() {
    let site = Site::new();
    let (source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    let run = direct(
        &source,
        &destination,
        ToySource::new(),
        ToyDestination::default(),
    );
    run.assert_moved();
    let outcome = run.left.as_ref().unwrap();
    assert_eq!(
        (outcome.rounds, outcome.epoch, outcome.convergence),
        (5, 42, Convergence::MaxRounds)
    );
    assert!(outcome.zero_pages > 300 && outcome.firmware_pages > 300 && outcome.downtime_ms > 0.0);
    assert_eq!(outcome.tls_suite, "TLS13_AES_256_GCM_SHA384");
    let phases: Vec<_> = run
        .source_progress
        .iter()
        .map(|event| event.phase)
        .collect();
    assert!(
        phases.is_sorted()
            && phases.first() == Some(&Phase::Connect)
            && phases.last() == Some(&Phase::Done)
    );

    let expected = run.source.memory.clone();
    let mut back = run.destination.into_source();
    assert_eq!(back.memory, expected);
    back.steps = 100;
    let run = direct(&source, &destination, back, ToyDestination::default());
    run.assert_moved();
}

#[test]
fn an_idle_guest_needs_one_round_and_a_last_one() {
    let site = Site::new();
    let mut source = site.source(Path::Direct);
    source.limits = Limits::default();
    let run = direct(
        &source,
        &site.destination(Path::Direct),
        ToySource::new(),
        ToyDestination::default(),
    );
    run.assert_moved();
    let outcome = run.left.unwrap();
    assert_eq!(
        (outcome.rounds, outcome.convergence),
        (2, Convergence::Converged)
    );
    assert!(outcome.estimated_downtime_ms > 0.0);
}

#[test]
fn owner_keys_must_be_equal() {
    let site = Site::new();
    let (mut source, mut destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    source.owner_key = Some(OwnerKey::new([1; 32]));
    destination.owner_key = Some(OwnerKey::new([1; 32]));
    direct(
        &source,
        &destination,
        ToySource::new(),
        ToyDestination::default(),
    )
    .assert_moved();
    for wrong in [Some(OwnerKey::new([2; 32])), None] {
        destination.owner_key = wrong;
        let run = direct(
            &source,
            &destination,
            ToySource::new(),
            ToyDestination::default(),
        );
        run.assert_stayed();
        assert_eq!(run.codes(), ("KEY_CONFIRMATION", "KEY_CONFIRMATION"));
    }
}

#[test]
fn policy_refusal_reaches_the_source() {
    let site = Site::new();
    let to = ToyDestination {
        refuse: true,
        ..Default::default()
    };
    let run = direct(
        &site.source(Path::Direct),
        &site.destination(Path::Direct),
        ToySource::new(),
        to,
    );
    run.assert_stayed();
    assert_eq!(run.codes(), ("POLICY_REFUSED", "POLICY_REFUSED"));
}

/// Either end's policy may refuse what was agreed on; not a page has travelled then, and the guest runs on.
#[test]
fn a_session_that_either_policy_refuses_moves_nothing() {
    for at_source in [true, false] {
        let site = Site::new();
        let mut from = ToySource::new();
        from.refuse_session = at_source;
        let to = ToyDestination {
            refuse_session: !at_source,
            ..Default::default()
        };
        let run = direct(
            &site.source(Path::Direct),
            &site.destination(Path::Direct),
            from,
            to,
        );
        run.assert_stayed();
        assert_eq!(run.codes(), ("POLICY_SESSION", "POLICY_SESSION"));
        assert!(!run.destination.begun && run.destination.memory.is_empty());
    }
}

#[test]
fn both_ends_know_the_same_of_their_session() {
    let site = Site::new();
    let run = direct(
        &site.source(Path::Direct),
        &site.destination(Path::Direct),
        ToySource::new(),
        ToyDestination::default(),
    );
    let here = run.source.session.unwrap();
    let there = run.destination.session.unwrap();
    assert_eq!(
        (&here.suite, &here.group, here.path, here.exporter_sha256),
        (
            &there.suite,
            &there.group,
            there.path,
            there.exporter_sha256
        )
    );
    assert_eq!(here.suite, "TLS13_AES_256_GCM_SHA384");
    assert!(here.group.starts_with("X25519"), "{}", here.group);
    assert_ne!(here.exporter_sha256, [0; 32]);
    assert_eq!(
        (&here.peer.san, &there.peer.san),
        (
            &vec!["site-b.test".to_owned()],
            &vec!["site-a.test".to_owned()]
        )
    );
    assert_eq!((&here.peer, &there.peer), (&here.tls_peer, &there.tls_peer));
}

#[test]
fn paths_must_agree() {
    let site = Site::new();
    let mut hook = |_, frame: casemate_crypto_migrate::wire::Frame| frame.into();
    // The source believes in a gateway; the destination does not know it as a peer.
    let (source, destination) = (site.source(site.via()), site.destination(Path::Direct));
    let run = through(
        &site.relay(),
        &source,
        &destination,
        ToySource::new(),
        ToyDestination::default(),
        &mut hook,
    );
    run.assert_stayed();
    assert_eq!(run.codes().1, "PEER_NOT_ALLOWED");
    // TLS passes at both ends, but they do not call the path the same.
    let destination = site.destination(Path::Gateway(site.a.pinned().unwrap()));
    let run = direct(
        &site.source(Path::Direct),
        &destination,
        run.source,
        ToyDestination::default(),
    );
    run.assert_stayed();
    assert_eq!(run.codes(), ("PATH_MISMATCH", "PATH_MISMATCH"));
}

#[test]
fn a_failure_at_any_step_of_the_source_leaves_it_running() {
    let site = Site::new();
    let (source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    for step in [
        "begin",
        "start_tracking",
        "take_dirty",
        "read_pages",
        "pause",
        "state",
        "release",
    ] {
        let mut from = ToySource::new();
        from.fail_at = Some(step);
        let run = direct(&source, &destination, from, ToyDestination::default());
        run.assert_stayed();
        assert_eq!(run.codes(), ("GUEST_FAILED", "GUEST_FAILED"), "{step}");
        let mut retry = run.source;
        retry.fail_at = None;
        direct(&source, &destination, retry, ToyDestination::default()).assert_moved();
    }
}

#[test]
fn a_failure_at_any_step_of_the_destination_leaves_the_source_running() {
    let site = Site::new();
    let (source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    for step in ["begin", "write_pages", "flush", "restore", "activate"] {
        let to = ToyDestination {
            fail_at: Some(step),
            ..Default::default()
        };
        let run = direct(&source, &destination, ToySource::new(), to);
        run.assert_stayed();
        let code = if step == "activate" {
            "ACTIVATION_FAILED"
        } else {
            "GUEST_FAILED"
        };
        assert_eq!(run.codes(), (code, code), "{step}");
        direct(&source, &destination, run.source, ToyDestination::default()).assert_moved();
    }
}

#[test]
fn a_failed_destroy_never_resumes() {
    let site = Site::new();
    let mut from = ToySource::new();
    from.fail_at = Some("destroy");
    let run = direct(
        &site.source(Path::Direct),
        &site.destination(Path::Direct),
        from,
        ToyDestination::default(),
    );
    assert!(matches!(run.left, Err(SourceError::Destroy(_))));
    assert!(!run.source.running && run.destination.active == Some(42));
}

#[test]
fn cancel_is_honoured() {
    let site = Site::new();
    let (source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    source.cancel.store(true, Ordering::Relaxed);
    let run = direct(
        &source,
        &destination,
        ToySource::new(),
        ToyDestination::default(),
    );
    run.assert_stayed();
    assert_eq!(run.codes(), ("CANCELLED", "CANCELLED"));
    source.cancel.store(false, Ordering::Relaxed);
    direct(&source, &destination, run.source, ToyDestination::default()).assert_moved();
}

#[test]
fn rubbish_is_refused_at_once() {
    let site = Site::new();
    let (mut a, b) = UnixStream::pair().unwrap();
    let rubbish = std::thread::spawn(move || {
        let _ = a.write_all(&[0x42; 5000]);
        let _ = a.read_to_end(&mut Vec::new());
    });
    let mut to = ToyDestination::default();
    let begun = Instant::now();
    let error =
        destination::receive(b, &site.destination(Path::Direct), &mut to, &mut |_| {}).unwrap_err();
    assert_eq!(error.code(), Code::TlsFailed.as_str());
    assert!(begun.elapsed() < Duration::from_secs(2) && !to.admitted);
    rubbish.join().unwrap();
}

#[test]
fn silence_ends_at_the_deadline_at_either_end() {
    let site = Site::new();
    let (mut source, mut destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    source.deadlines.connect = Duration::from_millis(400);
    destination.deadlines.connect = Duration::from_millis(400);
    let begun = Instant::now();
    let (a, _silent) = UnixStream::pair().unwrap();
    let mut from = ToySource::new();
    let offer = from.offer(1);
    let error = source::migrate(a, &source, &offer, &mut from, &mut |_| {}).unwrap_err();
    assert_eq!(error.code(), "PEER_TIMEOUT");
    assert!(from.running);
    let (b, _silent) = UnixStream::pair().unwrap();
    let error = destination::receive(b, &destination, &mut ToyDestination::default(), &mut |_| {})
        .unwrap_err();
    assert_eq!(error.code(), "PEER_TIMEOUT");
    assert!(begun.elapsed() < Duration::from_secs(2));
}

/// A peer with a valid identity that sends these bytes instead of an offer, then nothing.
fn bad_peer(mut bytes: Vec<u8>) -> String {
    let site = Site::new();
    let (a, b) = UnixStream::pair().unwrap();
    let local = site.source(Path::Direct).local;
    let bad = std::thread::spawn(move || {
        let time = Duration::from_secs(5);
        let mut tls = tls::connect(a, &local, time).unwrap();
        tls.write_all(&mut bytes, Instant::now() + time).unwrap();
        tls.linger(Instant::now() + time);
    });
    let mut destination = site.destination(Path::Direct);
    destination.deadlines.agree = Duration::from_millis(500);
    let mut to = ToyDestination::default();
    let begun = Instant::now();
    let error = destination::receive(b, &destination, &mut to, &mut |_| {}).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(4) && !to.admitted);
    bad.join().unwrap();
    error.code().to_owned()
}

#[test]
fn authenticated_rubbish_gets_its_code() {
    let offer = Header::new(FrameKind::Offer, 0, 0, 100).unwrap().encode();
    let with = |position: usize, value: u8| {
        let mut header = offer;
        header[position] = value;
        header.to_vec()
    };
    assert_eq!(bad_peer(with(7, 0xff)), "FRAME_TOO_LARGE");
    assert_eq!(bad_peer(with(1, 0x77)), "FRAME_UNKNOWN");
    assert_eq!(bad_peer(with(0, 0x00)), "VERSION_UNSUPPORTED");
    assert_eq!(bad_peer(with(2, 0x01)), "SESSION_MISMATCH");
    assert_eq!(bad_peer(with(8, 0x01)), "SEQUENCE_GAP");
    assert_eq!(
        bad_peer([offer.to_vec(), vec![0xee; 100]].concat()),
        "FRAME_MALFORMED"
    );
    assert_eq!(bad_peer(offer.to_vec()), "PEER_TIMEOUT");
    let batch = Header::new(FrameKind::PageBatch, 0, 0, 4).unwrap().encode();
    assert_eq!(
        bad_peer([batch.to_vec(), vec![1, 0, 0, 0]].concat()),
        "FRAME_UNEXPECTED"
    );
}
