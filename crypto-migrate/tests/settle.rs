//! After a commit that was not answered: the destination is asked, and nobody but it can answer.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::sync::{Arc, Mutex};

use casemate_crypto_migrate::destination::{DestinationConfig, DestinationError, Received, serve};
use casemate_crypto_migrate::gateway::{Action, Direction};
use casemate_crypto_migrate::guest::{Refusal, SourceGuest};
use casemate_crypto_migrate::identity::Path;
use casemate_crypto_migrate::settlement::{Settlement, question, settle};
use casemate_crypto_migrate::source::{SourceConfig, SourceError};
use casemate_crypto_migrate::wire::{Frame, FrameKind};
use common::*;

type Asked = (
    Result<Settlement, SourceError>,
    Result<Received, DestinationError>,
    ToyDestination,
);

#[test]
fn what_became_of_a_lost_answer_is_found_out_and_acted_upon() {
    let site = Site::new();
    for (lost, settlement) in [
        (FrameKind::Running, Settlement::Held),
        (FrameKind::Commit, Settlement::Never),
    ] {
        let mut cut = |_, frame: Frame| match frame.kind == lost {
            true => Action::Cut,
            false => frame.into(),
        };
        let (source, destination) = (site.source(site.via()), site.destination(site.via()));
        let run = through(
            &site.relay(),
            &source,
            &destination,
            ToySource::new(),
            ToyDestination::default(),
            &mut cut,
        );
        assert_eq!(run.codes().0, "IN_DOUBT");
        let mut guest = run.source;
        let (answer, _, there) = ask(
            &source,
            &destination,
            run.destination,
            &mut pass,
            Some(&site),
        );
        assert_eq!(answer.unwrap(), settlement);
        match settlement {
            Settlement::Held => guest.destroy().unwrap(),
            Settlement::Never => guest.resume().unwrap(),
        }
        assert_ne!(guest.running, there.active.is_some());
    }
}

#[test]
fn a_question_brings_nothing_and_builds_nothing() {
    let site = Site::new();
    let (source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    let (answer, received, there) = ask(
        &source,
        &destination,
        ToyDestination::default(),
        &mut pass,
        None,
    );
    assert_eq!(answer.unwrap(), Settlement::Never);
    assert_eq!(received.unwrap(), Received::Settled(Settlement::Never));
    assert!(!there.admitted && !there.begun && !there.abandoned && there.session.is_some());
}

#[test]
fn a_host_that_cannot_say_yet_says_so_and_nothing_is_settled() {
    let site = Site::new();
    let (source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    let later = ToyDestination {
        refuse: true,
        ..Default::default()
    };
    let (answer, received, _) = ask(&source, &destination, later, &mut pass, None);
    assert_eq!(answer.unwrap_err().code(), "SETTLE_LATER");
    assert_eq!(received.unwrap_err().code(), "SETTLE_LATER");
    let strict = ToyDestination {
        refuse_session: true,
        ..Default::default()
    };
    let (answer, ..) = ask(&source, &destination, strict, &mut pass, None);
    assert_eq!(answer.unwrap_err().code(), "POLICY_SESSION");
}

#[test]
fn a_relay_can_neither_change_nor_replay_nor_invent_an_answer() {
    let site = Site::new();
    let (source, destination) = (site.source(site.via()), site.destination(site.via()));
    let held = || ToyDestination {
        active: Some(42),
        ..Default::default()
    };
    let kept = Arc::new(Mutex::new(None));
    let keep = kept.clone();
    let mut watch = move |_, frame: Frame| {
        if frame.kind == FrameKind::Accept {
            *keep.lock().unwrap() = Some(frame.clone());
        }
        frame.into()
    };
    let (answer, ..) = ask(
        &source,
        &destination,
        ToyDestination::default(),
        &mut watch,
        Some(&site),
    );
    assert_eq!(answer.unwrap(), Settlement::Never);
    let never = kept.lock().unwrap().take().unwrap();

    let other = never.clone();
    let mut replay = move |_, frame: Frame| match frame.kind {
        FrameKind::Accept => other.clone().into(),
        _ => frame.into(),
    };
    let (answer, ..) = ask(&source, &destination, held(), &mut replay, Some(&site));
    assert_eq!(answer.unwrap_err().code(), "SIGNATURE_INVALID");

    // The answer is the last byte of the signed body; behind it stand the signature and its length.
    let mut change = |_, mut frame: Frame| {
        if frame.kind == FrameKind::Accept {
            let length = frame.payload.len();
            let answer = (length - 80..length - 60)
                .find(|at| frame.payload[at - 1..=*at] == [1, 1])
                .unwrap();
            frame.payload[answer] = 2;
        }
        frame.into()
    };
    let (answer, ..) = ask(&source, &destination, held(), &mut change, Some(&site));
    assert_eq!(answer.unwrap_err().code(), "SIGNATURE_INVALID");
    let (answer, ..) = ask(&source, &destination, held(), &mut pass, Some(&site));
    assert_eq!(answer.unwrap(), Settlement::Held);
}

fn pass(_: Direction, frame: Frame) -> Action {
    frame.into()
}

fn agree(_: &casemate_crypto_migrate::session::SessionFacts) -> Result<(), Refusal> {
    Ok(())
}

fn ask(
    source: &SourceConfig,
    destination: &DestinationConfig,
    mut to: ToyDestination,
    hook: Hook<'_>,
    relayed: Option<&Site>,
) -> Asked {
    let question = question(*b"the-guest's-uuid", "toy-1", 41);
    std::thread::scope(|scope| {
        let (a, b) = match relayed {
            None => tcp_pair(),
            Some(site) => {
                let ((a, near), (far, b)) = (tcp_pair(), tcp_pair());
                scope.spawn(move || site.relay().run(near, far, hook));
                (a, b)
            }
        };
        let there = scope.spawn(move || (serve(b, destination, &mut to, &mut |_| {}), to));
        let answer = settle(a, source, &question, &mut agree, &mut |_| {});
        let (received, to) = there.join().unwrap();
        (answer, received, to)
    })
}
