//! An insider relay with a valid certificate, on a gateway path: what it can do to each frame of a move, and the codes
//! that this comes to at the source and at the destination. What it does to single pages is in `gateway.rs`.
//!
//! Whatever it does: the guest runs at one end at most; a refused move leaves it running where it was; and only where the
//! commit was on its way does it stay paused, with a source that says `IN_DOUBT`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use casemate_crypto_migrate::gateway::{Action, Direction};
use casemate_crypto_migrate::wire::{Frame, FrameKind};
use common::*;

/// What the relay does to one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Flips a bit in the middle of the payload.
    Change,
    /// Takes the payload's last byte away.
    Shorten,
    /// Adds a byte to the payload.
    Lengthen,
    /// Puts the payload of the same frame of another move of this guest in its place.
    Foreign,
    /// Says that it is of another type.
    Retype,
    /// Says that it is of another stream.
    Stream,
    /// Says that it is the next but one.
    Skip,
    /// Sends it twice.
    Twice,
    /// Lets the sender's next one overtake it.
    Overtake,
    /// Keeps it.
    Drop,
    /// Says instead that the sender gave up.
    Abort,
    /// Sends the receiver's own last frame back instead.
    Reflect,
    /// Cuts both connections.
    Cut,
}

/// One frame of a move: its way, its type, and the how-manieth of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    way: Direction,
    kind: FrameKind,
    number: usize,
}

/// The codes at the source and at the destination.
type Codes = (&'static str, &'static str);

#[test]
fn whatever_a_relay_does_to_the_agreement_is_refused() {
    attack(&[
        onward(FrameKind::Offer, 1),
        back(FrameKind::Accept, 1),
        onward(FrameKind::Confirm, 1),
        back(FrameKind::Confirm, 1),
    ]);
}

#[test]
fn whatever_a_relay_does_to_the_first_round_is_refused() {
    attack(&[
        onward(FrameKind::Begin, 1),
        onward(FrameKind::PageBatch, 1),
        onward(FrameKind::RoundEnd, 1),
        back(FrameKind::RoundAck, 1),
    ]);
}

#[test]
fn whatever_a_relay_does_to_later_rounds_is_refused() {
    attack(&[
        onward(FrameKind::PageBatch, 16),
        back(FrameKind::RoundAck, 2),
        onward(FrameKind::RoundEnd, 4),
    ]);
}

#[test]
fn whatever_a_relay_does_to_the_state_is_refused() {
    attack(&[
        onward(FrameKind::State, 1),
        onward(FrameKind::State, 2),
        onward(FrameKind::Manifest, 1),
    ]);
}

#[test]
fn whatever_a_relay_does_to_the_switch_nobody_runs_the_guest_twice() {
    attack(&[
        back(FrameKind::Verified, 1),
        onward(FrameKind::Commit, 1),
        back(FrameKind::Running, 1),
    ]);
}

/// What must come of it.
fn expected(target: Target, act: Act) -> Codes {
    use FrameKind::{Accept, Commit, Confirm, Offer, PageBatch, Running, Verified};
    match target.kind {
        Offer | Accept => in_clear(target, act),
        Confirm => of_confirmation(target, act),
        PageBatch => of_pages(act),
        Verified | Commit | Running => of_the_switch(target, act),
        _ => sealed(target, act),
    }
}

/// Offer and accept: signed, not sealed. Who has no key yet believes a refusal; it costs the move, as a cut would.
fn in_clear(target: Target, act: Act) -> Codes {
    match (act, target.way) {
        (Act::Change, _) => both("CERTIFICATE_INVALID"),
        (Act::Foreign, _) => both("SIGNATURE_INVALID"),
        (Act::Shorten | Act::Lengthen, _) => both("FRAME_MALFORMED"),
        (Act::Retype | Act::Reflect, _) => both("FRAME_UNEXPECTED"),
        (Act::Abort, Direction::ToDestination) => ("STREAM_TRUNCATED", "NOT_TRUE"),
        (Act::Abort, Direction::ToSource) => ("NOT_TRUE", "STREAM_TRUNCATED"),
        // The source's own confirmation was on its way when it refused the second one.
        (Act::Twice, Direction::ToSource) => ("FRAME_REPLAYED", "CONTROL_AUTHENTICATION"),
        _ => numbered(target, act),
    }
}

/// The destination that has confirmed reads nothing in clear any more, not even why the source refuses.
fn of_confirmation(target: Target, act: Act) -> Codes {
    let code = match (act, target.way) {
        (Act::Abort, Direction::ToDestination) => return ("STREAM_TRUNCATED", "NOT_TRUE"),
        (Act::Abort, Direction::ToSource) => return ("NOT_TRUE", "STREAM_TRUNCATED"),
        (Act::Drop | Act::Overtake, Direction::ToSource) => "PEER_TIMEOUT",
        (Act::Twice | Act::Drop | Act::Overtake | Act::Cut, _) => return numbered(target, act),
        (Act::Change | Act::Foreign, _) | (Act::Reflect, Direction::ToSource) => "KEY_CONFIRMATION",
        (Act::Shorten | Act::Lengthen, _) => "FRAME_MALFORMED",
        (Act::Retype | Act::Reflect, _) => "FRAME_UNEXPECTED",
        (Act::Stream | Act::Skip, _) => numbered(target, act).0,
    };
    match target.way {
        Direction::ToDestination => both(code),
        Direction::ToSource => (code, "CONTROL_AUTHENTICATION"),
    }
}

fn of_pages(act: Act) -> Codes {
    both(match act {
        Act::Change => "PAGE_AUTHENTICATION",
        Act::Shorten | Act::Cut => "STREAM_TRUNCATED",
        Act::Lengthen => "FRAME_MALFORMED",
        Act::Foreign | Act::Stream => "SESSION_MISMATCH",
        Act::Twice => "PAGE_REPLAYED",
        Act::Skip | Act::Drop | Act::Overtake => "SEQUENCE_GAP",
        Act::Retype | Act::Abort | Act::Reflect => "CONTROL_AUTHENTICATION",
    })
}

/// From the commit on, the source believes nothing but a sealed answer, and never guesses.
fn of_the_switch(target: Target, act: Act) -> Codes {
    match (target.kind, act) {
        // The second one comes in place of the answer to the commit.
        (FrameKind::Verified, Act::Twice) => ("IN_DOUBT", "OK"),
        (FrameKind::Commit, Act::Cut) => ("IN_DOUBT", "STREAM_TRUNCATED"),
        // The second one comes when all is said.
        (FrameKind::Commit | FrameKind::Running, Act::Twice) => both("OK"),
        (FrameKind::Running, _) => ("IN_DOUBT", "OK"),
        _ => sealed(target, act),
    }
}

/// Every frame after the agreement but the pages.
fn sealed(target: Target, act: Act) -> Codes {
    match act {
        Act::Change
        | Act::Shorten
        | Act::Lengthen
        | Act::Foreign
        | Act::Retype
        | Act::Abort
        | Act::Reflect => both("CONTROL_AUTHENTICATION"),
        _ => numbered(target, act),
    }
}

/// What the header alone gives away.
fn numbered(target: Target, act: Act) -> Codes {
    both(match act {
        Act::Stream => "SESSION_MISMATCH",
        Act::Twice => "FRAME_REPLAYED",
        Act::Cut => "STREAM_TRUNCATED",
        // Whoever sent it goes on, or waits for the answer to it.
        Act::Drop | Act::Overtake if !is_followed(target.kind) => "PEER_TIMEOUT",
        _ => "SEQUENCE_GAP",
    })
}

fn is_followed(kind: FrameKind) -> bool {
    matches!(kind, FrameKind::Begin | FrameKind::State)
}

fn both(code: &'static str) -> Codes {
    (code, code)
}

const ACTS: [Act; 13] = [
    Act::Change,
    Act::Shorten,
    Act::Lengthen,
    Act::Foreign,
    Act::Retype,
    Act::Stream,
    Act::Skip,
    Act::Twice,
    Act::Overtake,
    Act::Drop,
    Act::Abort,
    Act::Reflect,
    Act::Cut,
];

/// Every act on every target; then the same guest moves, through the same relay left alone.
fn attack(targets: &[Target]) {
    let site = Site::new();
    let other = recorded(&site);
    for &target in targets {
        for act in ACTS {
            if (target.kind, act) == (FrameKind::Offer, Act::Reflect) {
                continue; // The receiver has sent nothing yet.
            }
            let run = play(&site, &other, target, act);
            let said = format!("{act:?} of {target:?}: {:?} {:?}", run.left, run.right);
            assert_eq!(run.codes(), expected(target, act), "{said}");
            match run.codes() {
                ("OK", "OK") => run.assert_moved(),
                ("IN_DOUBT", there) => {
                    assert!(!run.source.running && !run.source.destroyed, "{said}");
                    assert_eq!(run.destination.active.is_some(), there == "OK", "{said}");
                    assert_eq!(run.destination.abandoned, there != "OK", "{said}");
                }
                _ => {
                    run.assert_stayed();
                    again(&site, run.source);
                }
            }
        }
    }
}

/// How long the source and the destination wait for a frame that does not come. Each may wait for the other: the one that
/// the frame was for shall be the first to give up.
fn patience(way: Direction) -> (Duration, Duration) {
    match way {
        Direction::ToDestination => (3 * SHORT, SHORT),
        Direction::ToSource => (SHORT, 3 * SHORT),
    }
}

/// One move in which the relay does that.
fn play(site: &Site, other: &[(Direction, Frame)], target: Target, act: Act) -> Run {
    let (mut source, mut destination) = (site.source(site.via()), site.destination(site.via()));
    if matches!(act, Act::Drop | Act::Overtake) {
        let (at_source, at_destination) = patience(target.way);
        for (deadlines, time) in [
            (&mut source.deadlines, at_source),
            (&mut destination.deadlines, at_destination),
        ] {
            (deadlines.agree, deadlines.frame, deadlines.finish) = (time, time, time);
        }
    }
    let foreign = target.among(other);
    let (mut count, mut done) = (0, false);
    let (mut held, mut answer): (Option<Frame>, Option<Frame>) = (None, None);
    let mut hook = move |way: Direction, frame: Frame| {
        if way != target.way {
            answer = Some(frame.clone());
        }
        if way == target.way
            && let Some(late) = held.take()
        {
            return Action::Forward(vec![frame, late]);
        }
        count += usize::from((way, frame.kind) == (target.way, target.kind));
        if done || (way, frame.kind, count) != (target.way, target.kind, target.number) {
            return frame.into();
        }
        done = true;
        match act {
            Act::Twice => Action::Forward(vec![frame.clone(), frame]),
            Act::Drop => Action::Forward(vec![]),
            Act::Cut => Action::Cut,
            Act::Overtake => {
                held = Some(frame);
                Action::Forward(vec![])
            }
            Act::Reflect => Frame {
                sequence: frame.sequence,
                ..answer.clone().unwrap()
            }
            .into(),
            _ => changed(frame, act, &foreign).into(),
        }
    };
    let to = ToyDestination::default();
    through(
        &site.relay(),
        &source,
        &destination,
        ToySource::new(),
        to,
        &mut hook,
    )
}

fn changed(mut frame: Frame, act: Act, foreign: &Frame) -> Frame {
    match act {
        Act::Change => {
            let middle = frame.payload.len() / 2;
            frame.payload[middle] ^= 1;
        }
        Act::Shorten => drop(frame.payload.pop()),
        Act::Lengthen => frame.payload.push(0),
        Act::Foreign => frame.payload.clone_from(&foreign.payload),
        Act::Retype => {
            frame.kind = match frame.kind {
                FrameKind::RoundEnd => FrameKind::State,
                _ => FrameKind::RoundEnd,
            };
            frame.payload.truncate(frame.kind.max_length());
        }
        Act::Stream => frame.stream = 1,
        Act::Skip => frame.sequence += 1,
        Act::Abort => {
            frame.kind = FrameKind::Abort;
            frame.payload = b"\x08NOT_TRUE\x04text".to_vec();
        }
        Act::Twice | Act::Overtake | Act::Drop | Act::Reflect | Act::Cut => {}
    }
    frame
}

/// The frames of a move that nobody disturbed.
fn recorded(site: &Site) -> Vec<(Direction, Frame)> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let keep = seen.clone();
    let mut hook = move |way, frame: Frame| {
        keep.lock().unwrap().push((way, frame.clone()));
        frame.into()
    };
    moved(site, ToySource::new(), &mut hook);
    std::mem::take(&mut *seen.lock().unwrap())
}

fn again(site: &Site, guest: ToySource) {
    moved(site, guest, &mut |_, frame: Frame| frame.into());
}

fn moved(site: &Site, guest: ToySource, hook: Hook<'_>) {
    let (source, destination) = (site.source(site.via()), site.destination(site.via()));
    let to = ToyDestination::default();
    through(&site.relay(), &source, &destination, guest, to, hook).assert_moved();
}

const fn onward(kind: FrameKind, number: usize) -> Target {
    Target {
        way: Direction::ToDestination,
        kind,
        number,
    }
}

const fn back(kind: FrameKind, number: usize) -> Target {
    Target {
        way: Direction::ToSource,
        kind,
        number,
    }
}

impl Target {
    fn among(self, frames: &[(Direction, Frame)]) -> Frame {
        let mut same = frames
            .iter()
            .filter(|(way, frame)| (*way, frame.kind) == (self.way, self.kind));
        same.nth(self.number - 1).unwrap().1.clone()
    }
}

/// Where the relay's act is to say nothing: long enough for an honest end on a busy machine.
const SHORT: Duration = Duration::from_secs(2);
