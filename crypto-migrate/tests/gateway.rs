//! A relay with a valid certificate: refused on a direct path, blind on a gateway path, and what it can do there to single
//! pages. What it can do to whole frames is in `relay.rs`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use casemate_crypto_migrate::gateway::{Action, Direction, Gateway};
use casemate_crypto_migrate::identity::Path;
use casemate_crypto_migrate::wire::batch::{EntryHeader, join, split};
use casemate_crypto_migrate::wire::{Frame, FrameKind};
use common::*;

fn forward(_: Direction, frame: Frame) -> Action {
    frame.into()
}

#[test]
fn gateway_forwards_and_sees_no_plaintext() {
    let site = Site::new();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (source, destination) = (site.source(site.via()), site.destination(site.via()));
    let mut hook = recorder(&seen);
    let from = ToySource::new();
    let run = through(
        &site.relay(),
        &source,
        &destination,
        from,
        ToyDestination::default(),
        &mut hook,
    );
    run.assert_moved();
    let report = run.gateway.as_ref().unwrap().as_ref().unwrap();
    assert!(report.frames_to_destination > 10 && report.frames_to_source >= 7 && !report.cut);
    let seen = seen.lock().unwrap();
    assert!(seen.len() as u64 >= run.left.as_ref().unwrap().wire_bytes);
    let contains = |needle: &[u8]| seen.windows(needle.len()).any(|window| window == needle);
    assert!(
        contains(b"toy-1"),
        "the offer is visible, so the search works"
    );
    assert!(!contains(MARKER));
    let firmware: Vec<u8> = MARKER.iter().map(|b| b ^ 0xa5).collect();
    assert!(
        !contains(&firmware)
            && !contains(&[0x11; 20])
            && !contains(&[7; 20])
            && !contains(&[0; 200])
    );
}

#[test]
fn relay_on_a_direct_path_is_not_allowed() {
    let site = Site::new();
    let (source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    let to = ToyDestination::default();
    let run = through(
        &site.relay(),
        &source,
        &destination,
        ToySource::new(),
        to,
        &mut forward,
    );
    run.assert_stayed();
    assert_eq!(run.codes().0, "PEER_NOT_ALLOWED");
    assert!(!run.destination.admitted);
    direct(&source, &destination, run.source, ToyDestination::default()).assert_moved();
}

/// On the allow-list as a host in its own right, the relay passes TLS, but is not the peer.
#[test]
fn allowed_host_that_terminates_a_direct_path_is_told_apart() {
    let site = Site::new();
    let (mut source, mut destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    let relay = || peer("site-c", &site.gateway, Path::Direct);
    source.local = site.local(
        &site.a,
        vec![peer("site-b", &site.b, Path::Direct), relay()],
    );
    destination.local = site.local(
        &site.b,
        vec![peer("site-a", &site.a, Path::Direct), relay()],
    );
    let to = ToyDestination::default();
    let run = through(
        &site.relay(),
        &source,
        &destination,
        ToySource::new(),
        to,
        &mut forward,
    );
    run.assert_stayed();
    assert_eq!(run.codes().0, "CHANNEL_BINDING_MISMATCH");
    assert!(!run.destination.admitted);
}

/// Even with the stolen keys of both hosts, posing as each to the other: the exporters differ.
#[test]
fn relay_with_stolen_keys_is_caught_by_the_exporter() {
    let site = Site::new();
    let (source, destination) = (site.source(Path::Direct), site.destination(Path::Direct));
    let to_source = site.local(&site.b, vec![peer("site-a", &site.a, Path::Direct)]);
    let to_destination = site.local(&site.a, vec![peer("site-b", &site.b, Path::Direct)]);
    let mut thief = Gateway::new(to_source, Duration::from_secs(5));
    thief.towards_destination = to_destination;
    let to = ToyDestination::default();
    let run = through(
        &thief,
        &source,
        &destination,
        ToySource::new(),
        to,
        &mut forward,
    );
    run.assert_stayed();
    assert_eq!(
        run.codes(),
        ("CHANNEL_BINDING_MISMATCH", "CHANNEL_BINDING_MISMATCH")
    );
    assert!(!run.destination.admitted);
    direct(&source, &destination, run.source, ToyDestination::default()).assert_moved();
}

/// Applies `change` to the entries of the `number`-th page batch.
fn on_batch(
    number: usize,
    mut change: impl FnMut(&mut Vec<Vec<u8>>) + Send,
) -> impl FnMut(Direction, Frame) -> Action + Send {
    let mut batches = 0;
    move |_, mut frame| {
        if frame.kind == FrameKind::PageBatch {
            batches += 1;
            if batches == number {
                let mut entries = split(&frame.payload).unwrap();
                assert!(entries.len() > 4);
                change(&mut entries);
                frame.payload = join(&entries);
            }
        }
        frame.into()
    }
}

/// Runs the attack, expects the code at both ends and an unharmed guest, then a retry that succeeds through
/// the same gateway left alone.
fn attack(code: &str, mut hook: impl FnMut(Direction, Frame) -> Action + Send) {
    let site = Site::new();
    let (source, destination) = (site.source(site.via()), site.destination(site.via()));
    let relay = site.relay();
    let run = through(
        &relay,
        &source,
        &destination,
        ToySource::new(),
        ToyDestination::default(),
        &mut hook,
    );
    run.assert_stayed();
    assert_eq!(run.codes(), (code, code), "{:?} {:?}", run.left, run.right);
    let to = ToyDestination::default();
    through(&relay, &source, &destination, run.source, to, &mut forward).assert_moved();
}

fn data_entry(entries: &[Vec<u8>], from: usize) -> usize {
    (from..entries.len())
        .find(|i| entries[*i].len() > 4096)
        .unwrap()
}

#[test]
fn flipped_bit_is_page_authentication() {
    attack(
        "PAGE_AUTHENTICATION",
        on_batch(2, |entries| {
            let target = data_entry(entries, 0);
            entries[target][2000] ^= 0x10;
        }),
    );
}

#[test]
fn flipped_bit_in_a_tag_of_a_zero_run_is_page_authentication() {
    attack(
        "PAGE_AUTHENTICATION",
        on_batch(2, |entries| {
            let target = entries.iter().position(|entry| entry.len() == 48).unwrap();
            entries[target][47] ^= 1;
        }),
    );
}

#[test]
fn longer_zero_run_is_page_authentication() {
    attack(
        "PAGE_AUTHENTICATION",
        on_batch(2, |entries| {
            let target = entries.iter().position(|entry| entry.len() == 48).unwrap();
            entries[target][16] += 1;
        }),
    );
}

#[test]
fn moved_page_is_page_authentication() {
    attack(
        "PAGE_AUTHENTICATION",
        on_batch(2, |entries| {
            let target = data_entry(entries, 0);
            entries[target][8] ^= 1;
        }),
    );
}

#[test]
fn replayed_page_is_page_replayed() {
    attack(
        "PAGE_REPLAYED",
        on_batch(2, |entries| {
            let again = entries[0].clone();
            entries.insert(2, again);
        }),
    );
}

#[test]
fn dropped_page_is_page_missing() {
    attack(
        "PAGE_MISSING",
        on_batch(2, |entries| drop(entries.remove(1))),
    );
}

#[test]
fn dropped_last_page_of_a_batch_is_page_missing() {
    attack("PAGE_MISSING", on_batch(2, |entries| drop(entries.pop())));
}

#[test]
fn dropped_last_page_of_a_round_is_page_missing() {
    attack("PAGE_MISSING", |_, mut frame| {
        if frame.kind == FrameKind::PageBatch {
            let mut entries = split(&frame.payload).unwrap();
            if EntryHeader::parse(entries[0].first_chunk().unwrap())
                .unwrap()
                .round
                == 2
            {
                entries.pop();
            }
            frame.payload = join(&entries);
        }
        frame.into()
    });
}

#[test]
fn dropped_batch_with_renumbered_frames_is_page_missing() {
    let mut batches = 0;
    attack("PAGE_MISSING", move |direction, mut frame| {
        if direction == Direction::ToDestination {
            batches += usize::from(frame.kind == FrameKind::PageBatch);
            if frame.kind == FrameKind::PageBatch && batches == 2 {
                return Action::Forward(vec![]);
            }
            frame.sequence -= u64::from(batches >= 2);
        }
        frame.into()
    });
}

#[test]
fn swapped_pages_are_page_reordered() {
    attack("PAGE_REORDERED", on_batch(2, |entries| entries.swap(1, 3)));
}

#[test]
fn older_version_is_page_rolled_back() {
    let mut old: Option<Vec<u8>> = None;
    attack("PAGE_ROLLED_BACK", move |_, mut frame| {
        if frame.kind == FrameKind::PageBatch {
            let mut entries = split(&frame.payload).unwrap();
            let round = |entry: &Vec<u8>| {
                EntryHeader::parse(entry.first_chunk().unwrap())
                    .unwrap()
                    .round
            };
            if round(&entries[0]) == 1 && old.is_none() {
                old = Some(entries[data_entry(&entries, 0)].clone());
            } else if round(&entries[0]) == 2 {
                entries[0] = old.clone().unwrap();
            }
            frame.payload = join(&entries);
        }
        frame.into()
    });
}

#[test]
fn older_content_under_the_new_header_is_page_authentication() {
    let mut old: Option<Vec<u8>> = None;
    let mut done = false;
    attack("PAGE_AUTHENTICATION", move |_, mut frame| {
        if frame.kind == FrameKind::PageBatch && !done {
            let mut entries = split(&frame.payload).unwrap();
            let target = data_entry(&entries, 0);
            match &old {
                None => old = Some(entries[target].clone()),
                Some(old) if old.len() == entries[target].len() => {
                    entries[target][32..].copy_from_slice(&old[32..]);
                    done = true;
                }
                Some(_) => {}
            }
            frame.payload = join(&entries);
        }
        frame.into()
    });
}

#[test]
fn page_of_another_stream_or_session_is_session_mismatch() {
    attack(
        "SESSION_MISMATCH",
        on_batch(2, |entries| entries[2][28] = 1),
    );
    // A whole page recorded in another migration of the same guest.
    let recorded = Arc::new(Mutex::new(None));
    let site = Site::new();
    let (source, destination) = (site.source(site.via()), site.destination(site.via()));
    let keep = recorded.clone();
    let mut hook = on_batch(1, move |entries| {
        *keep.lock().unwrap() = Some(entries[0].clone())
    });
    let to = ToyDestination::default();
    through(
        &site.relay(),
        &source,
        &destination,
        ToySource::new(),
        to,
        &mut hook,
    )
    .assert_moved();
    let foreign = recorded.lock().unwrap().take().unwrap();
    attack(
        "SESSION_MISMATCH",
        on_batch(1, move |entries| entries[0] = foreign.clone()),
    );
}

#[test]
fn changed_offer_or_accept_is_refused() {
    for (target, code) in [
        (FrameKind::Offer, "SIGNATURE_INVALID"),
        (FrameKind::Accept, "SIGNATURE_INVALID"),
    ] {
        let mut hook = move |_, mut frame: Frame| {
            if frame.kind == target {
                // The last byte of description or evidence, just before the signature.
                let needle: &[u8] = if target == FrameKind::Offer {
                    b"description"
                } else {
                    b"evidence"
                };
                let position = frame
                    .payload
                    .windows(needle.len())
                    .position(|w| w == needle)
                    .unwrap();
                frame.payload[position] ^= 1;
            }
            frame.into()
        };
        let site = Site::new();
        let (source, destination) = (site.source(site.via()), site.destination(site.via()));
        let to = ToyDestination::default();
        let run = through(
            &site.relay(),
            &source,
            &destination,
            ToySource::new(),
            to,
            &mut hook,
        );
        run.assert_stayed();
        assert_eq!(run.codes(), (code, code));
    }
}
