//! A move over several connections: what goes over them, what a slow, stalled or cut one does, and who may join.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use casemate_crypto_migrate::destination::{self, DestinationConfig, Received};
use casemate_crypto_migrate::gateway::{self, Action, Direction, Gateway};
use casemate_crypto_migrate::identity::Path;
use casemate_crypto_migrate::preamble::Ticket;
use casemate_crypto_migrate::source::{self, SourceConfig};
use casemate_crypto_migrate::tls;
use casemate_crypto_migrate::wire::messages::{Abort, Join, Message};
use casemate_crypto_migrate::wire::{Frame, FrameKind};
use common::*;

const TICKET: Ticket = Ticket([0x42; 16]);

#[test]
fn a_guest_moves_over_one_to_sixteen_connections_and_each_has_its_count() {
    let site = Site::new();
    for streams in [1, 2, 4, 16] {
        for firmware in [true, false] {
            let (mut source, destination) = ends(&site, Path::Direct, streams);
            source.read_back = true;
            let mut guest = ToySource::new();
            guest.firmware = firmware;
            let run = over(&source, &destination, guest, &mut plain);
            run.assert_moved();
            let outcome = run.left.unwrap();
            assert_eq!(outcome.rounds, 5, "written to in every round");
            let counts = &outcome.verified.streams;
            assert_eq!(counts.len(), usize::from(streams));
            let pages: u64 = counts.iter().map(|count| count.pages).sum();
            assert_eq!(pages, outcome.pages);
            assert!(counts.iter().all(|count| count.seals <= count.pages));
            assert!(
                counts.iter().filter(|count| count.pages > 0).count() > usize::from(streams > 1)
            );
            assert_eq!(run.right.unwrap().verified.streams, *counts);
            assert!(outcome.verified.content_sha256.is_some());
        }
    }
}

#[test]
fn the_destination_grants_fewer_and_no_number_beyond_the_bound_is_offered() {
    let site = Site::new();
    let (source, mut destination) = ends(&site, Path::Direct, 4);
    destination.max_streams = 2;
    let run = over(&source, &destination, ToySource::new(), &mut plain);
    run.assert_moved();
    assert_eq!(run.left.unwrap().verified.streams.len(), 2);
    for streams in [0, 17] {
        let (source, destination) = ends(&site, Path::Direct, streams);
        let run = over(&source, &destination, ToySource::new(), &mut plain);
        run.assert_stayed();
        assert_eq!(run.codes(), ("OFFER_INVALID", "OFFER_INVALID"));
    }
}

#[test]
fn a_slow_connection_takes_less_and_holds_nobody_up() {
    let site = Site::new();
    let (mut source, destination) = ends(&site, Path::Direct, 3);
    source.limits.max_rounds = 1;
    let run = over(&source, &destination, big(), &mut |number, far| {
        Ok(match number {
            1 => valve(far, |_| Duration::from_millis(200)),
            _ => valve(far, |_| FEW),
        })
    });
    run.assert_moved();
    let counts = run.left.unwrap().verified.streams;
    // The same share for each would be a third, and would take ten times as long.
    let all: u64 = counts.iter().map(|count| count.pages).sum();
    assert!(
        counts[1].pages > 0 && counts[1].pages * 5 < all,
        "{counts:?}"
    );
}

#[test]
fn a_connection_that_stalls_ends_the_move_and_the_guest_runs_on() {
    let site = Site::new();
    let (mut source, mut destination) = ends(&site, Path::Direct, 3);
    source.deadlines.frame = Duration::from_secs(1);
    destination.deadlines.frame = Duration::from_secs(1);
    let begun = Instant::now();
    let run = over(&source, &destination, big(), &mut |number, far| {
        let stalls_after = if number == 2 { 200_000 } else { usize::MAX };
        Ok(valve(far, move |seen| match seen > stalls_after {
            true => Duration::from_secs(8),
            false => FEW,
        }))
    });
    run.assert_stayed();
    assert_eq!(run.codes(), ("PEER_TIMEOUT", "PEER_TIMEOUT"));
    assert!(
        begun.elapsed() < Duration::from_secs(6),
        "{:?}",
        begun.elapsed()
    );
    let (source, destination) = ends(&site, Path::Direct, 3);
    over(&source, &destination, run.source, &mut plain).assert_moved();
}

#[test]
fn a_connection_that_breaks_at_any_step_ends_the_move_and_the_guest_runs_on() {
    use FrameKind::{Join, Joined, PageBatch, RoundEnd};
    let site = Site::new();
    for (kind, number) in [
        (Join, 1),
        (Joined, 1),
        (PageBatch, 1),
        (PageBatch, 3),
        (RoundEnd, 1),
        (RoundEnd, 3),
        (RoundEnd, 5),
    ] {
        let (run, _) = relayed(&site, 1, move |count, frame| match (frame.kind, count) {
            at if at == (kind, number) => Action::Cut,
            _ => frame.into(),
        });
        run.assert_stayed();
        let codes = ("STREAM_TRUNCATED", "STREAM_TRUNCATED");
        assert_eq!(
            run.codes(),
            codes,
            "{kind:?} {number} {:?} {:?}",
            run.left,
            run.right
        );
        let (source, destination) = ends(&site, Path::Direct, 3);
        over(&source, &destination, run.source, &mut plain).assert_moved();
    }
}

#[test]
fn what_a_relay_does_to_pages_and_rounds_of_one_connection_is_refused() {
    use FrameKind::{PageBatch, RoundEnd};
    let site = Site::new();
    type Act = fn(Frame) -> Vec<Frame>;
    let flip: Act = |mut frame| {
        *frame.payload.last_mut().unwrap() ^= 1;
        vec![frame]
    };
    let twice: Act = |frame| vec![frame.clone(), frame];
    let drop: Act = |_| vec![];
    let first: Act = |mut frame| {
        frame.stream = 0;
        vec![frame]
    };
    // Every entry of it says that it is of another stream.
    let entries: Act = |mut frame| {
        frame.payload[4 + 28] ^= 3;
        vec![frame]
    };
    for (kind, act, code) in [
        (PageBatch, flip, "PAGE_AUTHENTICATION"),
        (PageBatch, twice, "PAGE_REPLAYED"),
        (PageBatch, drop, "SEQUENCE_GAP"),
        (PageBatch, first, "SESSION_MISMATCH"),
        (PageBatch, entries, "SESSION_MISMATCH"),
        (RoundEnd, flip, "CONTROL_AUTHENTICATION"),
        (RoundEnd, twice, "FRAME_REPLAYED"),
        (RoundEnd, drop, "PEER_TIMEOUT"),
        (RoundEnd, first, "SESSION_MISMATCH"),
    ] {
        let (run, _) = relayed(&site, 2, move |count, frame| match (frame.kind, count) {
            at if at == (kind, 1) => Action::Forward(act(frame)),
            _ => frame.into(),
        });
        run.assert_stayed();
        assert_eq!(
            run.codes(),
            (code, code),
            "{kind:?} {:?} {:?}",
            run.left,
            run.right
        );
    }
}

#[test]
fn whatever_a_relay_does_to_a_join_is_refused_with_its_code() {
    let site = Site::new();
    type Change = fn(&mut Join);
    let cases: [(Change, &str); 8] = [
        (|join| join.session_id[0] ^= 1, "JOIN_SESSION"),
        (|join| join.stream = 0, "JOIN_OUT_OF_RANGE"),
        (|join| join.stream = 3, "JOIN_OUT_OF_RANGE"),
        (|join| join.stream = u16::MAX, "JOIN_OUT_OF_RANGE"),
        (|join| join.stream = 1, "JOIN_DOUBLED"),
        (|join| join.nonce[5] ^= 1, "JOIN_AUTHENTICATION"),
        (|join| join.mac[31] ^= 1, "JOIN_AUTHENTICATION"),
        (
            |join| join.channel_binding = Some([1; 32]),
            "CHANNEL_BINDING_MISMATCH",
        ),
    ];
    for (change, code) in cases {
        let (run, refused) = relayed(&site, 2, move |_, mut frame| {
            if frame.kind == FrameKind::Join {
                let mut join = Join::decode(&frame.payload).unwrap();
                change(&mut join);
                frame.stream = join.stream;
                frame.payload = join.encode().unwrap();
            }
            frame.into()
        });
        run.assert_stayed();
        assert_eq!(refused, [code]);
        // Who refuses answers under the number that it was told.
        let honest = matches!(code, "JOIN_OUT_OF_RANGE" | "JOIN_DOUBLED");
        let code = if honest { "SESSION_MISMATCH" } else { code };
        assert_eq!(run.codes(), (code, code), "{:?} {:?}", run.left, run.right);
    }
    // The number of its frame is another than its own.
    let (run, refused) = relayed(&site, 2, |_, mut frame| {
        frame.stream = 1;
        frame.into()
    });
    run.assert_stayed();
    assert_eq!(refused, ["JOIN_OUT_OF_RANGE"]);
    // The destination's answer is changed.
    let (run, _) = relayed(&site, 1, |_, mut frame| {
        if frame.kind == FrameKind::Joined {
            frame.payload[0] ^= 1;
        }
        frame.into()
    });
    run.assert_stayed();
    assert_eq!(run.codes(), ("JOIN_AUTHENTICATION", "JOIN_AUTHENTICATION"));
}

#[test]
fn a_join_that_is_sent_again_is_refused_and_so_is_that_of_an_earlier_session() {
    let site = Site::new();
    let seen: Arc<Mutex<Option<Frame>>> = Arc::default();
    let keep = seen.clone();
    let (run, _) = relayed(&site, 1, move |_, frame| {
        if frame.kind == FrameKind::Join {
            *keep.lock().unwrap() = Some(frame.clone());
        }
        frame.into()
    });
    run.assert_moved();
    let old = seen.lock().unwrap().clone().unwrap();
    let (run, refused) = relayed(&site, 1, move |_, frame| match frame.kind {
        FrameKind::Join => old.clone().into(),
        _ => frame.into(),
    });
    run.assert_stayed();
    assert_eq!(refused, ["JOIN_SESSION"]);

    // The first one's in place of the second one's.
    let first: Arc<Mutex<Option<Frame>>> = Arc::default();
    let refused: Arc<Mutex<Vec<String>>> = Arc::default();
    let (source, destination) = ends(&site, site.via(), 3);
    let run = over(&source, &destination, ToySource::new(), &mut |_, far| {
        let (first, refused) = (first.clone(), refused.clone());
        Ok(via(&site.relay(), far, move |frame: Frame| {
            match frame.kind {
                FrameKind::Join => first.lock().unwrap().get_or_insert(frame).clone().into(),
                _ => note(&refused, frame).into(),
            }
        }))
    });
    run.assert_stayed();
    assert_eq!(*refused.lock().unwrap(), ["JOIN_REPLAYED"]);
}

#[test]
fn a_relay_with_both_hosts_keys_cannot_join_a_direct_session() {
    let site = Site::new();
    let stolen = Gateway {
        towards_source: site.local(&site.b, vec![peer("site-a", &site.a, Path::Direct)]),
        towards_destination: site.local(&site.a, vec![peer("site-b", &site.b, Path::Direct)]),
        timeout: Duration::from_secs(5),
    };
    let (source, destination) = ends(&site, Path::Direct, 2);
    let run = over(
        &source,
        &destination,
        ToySource::new(),
        &mut |number, far| {
            Ok(match number {
                0 => return plain(number, far),
                _ => via(&stolen, far, Action::from),
            })
        },
    );
    run.assert_stayed();
    let code = "CHANNEL_BINDING_MISMATCH";
    assert_eq!(run.codes(), (code, code), "{:?} {:?}", run.left, run.right);
}

#[test]
fn strangers_and_other_hosts_cannot_join_and_disturb_nobody() {
    let site = Site::new();
    let (source, mut destination) = ends(&site, Path::Direct, 2);
    // Another host of the site, that may move guests here, too.
    let other = site.ca.issue("site-c.test").unwrap();
    destination.local = site.local(
        &site.b,
        vec![
            peer("site-a", &site.a, Path::Direct),
            peer("site-c", &other, Path::Direct),
        ],
    );
    let local = site.local(&other, vec![peer("site-b", &site.b, Path::Direct)]);
    let told = Arc::new(Mutex::new(String::new()));
    let keep = told.clone();
    let run = over(
        &source,
        &destination,
        ToySource::new(),
        &mut |number, far| {
            if number == 0 {
                return plain(number, far);
            }
            for opening in [&TICKET.encode()[..], &[0x16; 64], &[0; 9], b""] {
                let (mut rubbish, end) = UnixStream::pair()?;
                rubbish.write_all(opening)?;
                far.send(end).unwrap();
            }
            let (mut near, end) = UnixStream::pair()?;
            TICKET.write(&mut near)?;
            far.send(end).unwrap();
            let (local, keep) = (local.clone(), keep.clone());
            std::thread::spawn(move || {
                let deadline = Instant::now() + Duration::from_secs(5);
                let mut tls = tls::connect(near, &local, Duration::from_secs(5)).unwrap();
                let join = Join {
                    session_id: [0; 16],
                    stream: 1,
                    nonce: [0; 16],
                    channel_binding: None,
                    mac: [0; 32],
                };
                let frame = Frame {
                    kind: FrameKind::Join,
                    stream: 1,
                    sequence: 0,
                    payload: join.encode().unwrap(),
                };
                tls.write_all(&mut frame.encode().unwrap(), deadline)
                    .unwrap();
                let answer = gateway::read_frame(&mut tls, deadline).unwrap();
                *keep.lock().unwrap() = Abort::decode(&answer.payload).unwrap().code;
            });
            plain(number, far)
        },
    );
    run.assert_moved();
    assert_eq!(*told.lock().unwrap(), "JOIN_PEER");
}

#[test]
fn connections_that_do_not_come_are_waited_for_until_the_deadline() {
    let site = Site::new();
    let (source, mut destination) = ends(&site, Path::Direct, 3);
    destination.deadlines.agree = Duration::from_secs(1);
    let mut lost = Vec::new();
    let run = over(
        &source,
        &destination,
        ToySource::new(),
        &mut |number, far| {
            if number < 2 {
                return plain(number, far);
            }
            let (near, held) = UnixStream::pair()?;
            lost.push(held);
            Ok(near)
        },
    );
    run.assert_stayed();
    assert_eq!(run.codes(), ("JOIN_LATE", "JOIN_LATE"));
    let (source, destination) = ends(&site, Path::Direct, 3);
    let run = over(
        &source,
        &destination,
        ToySource::new(),
        &mut |number, far| match number {
            0 => plain(number, far),
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        },
    );
    run.assert_stayed();
    assert_eq!(run.codes(), ("JOIN_LATE", "JOIN_LATE"));
}

#[test]
fn a_failure_of_either_guest_in_a_round_ends_all_connections() {
    let site = Site::new();
    let (source, destination) = ends(&site, Path::Direct, 4);
    let mut guest = ToySource::new();
    guest.fail_at = Some("read_pages");
    let run = over(&source, &destination, guest, &mut plain);
    run.assert_stayed();
    assert_eq!(run.codes(), ("GUEST_FAILED", "GUEST_FAILED"));
    let to = ToyDestination {
        fail_at: Some("write_pages"),
        ..Default::default()
    };
    let run = between(&source, &destination, ToySource::new(), to, &mut plain);
    run.assert_stayed();
    assert_eq!(run.codes(), ("GUEST_FAILED", "GUEST_FAILED"));
}

#[test]
fn a_move_is_cancelled_while_its_connections_are_busy() {
    let site = Site::new();
    let (source, destination) = ends(&site, Path::Direct, 3);
    let cancel = source.cancel.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        cancel.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let run = over(&source, &destination, big(), &mut |number, far| {
        let pause = if number == 0 { 1 } else { 10 } * FEW;
        Ok(valve(far, move |_| pause))
    });
    run.assert_stayed();
    assert_eq!(run.codes(), ("CANCELLED", "CANCELLED"));
}

/// Every page holds something.
fn big() -> ToySource {
    let mut guest = ToySource::new();
    guest.firmware = false;
    for page in guest.memory.values_mut() {
        page.fill(0x5a);
    }
    guest
}

fn ends(site: &Site, path: Path, streams: u16) -> (SourceConfig, DestinationConfig) {
    let (mut source, mut destination) = (site.source(path.clone()), site.destination(path));
    source.streams = streams;
    destination.ticket = TICKET;
    (source, destination)
}

/// Makes the near end of the connection of that number, 0 for the first; the far end is sent to the destination.
type Dial<'a> = &'a mut dyn FnMut(u16, &Sender<UnixStream>) -> io::Result<UnixStream>;

fn plain(_: u16, far: &Sender<UnixStream>) -> io::Result<UnixStream> {
    let (near, end) = UnixStream::pair()?;
    far.send(end).unwrap();
    Ok(near)
}

fn over(
    source: &SourceConfig,
    destination: &DestinationConfig,
    from: ToySource,
    dial: Dial<'_>,
) -> Run {
    between(source, destination, from, ToyDestination::default(), dial)
}

/// One move; unix sockets hold less than a batch, so that a slow reader is felt at once.
fn between(
    source: &SourceConfig,
    destination: &DestinationConfig,
    mut from: ToySource,
    mut to: ToyDestination,
    dial: Dial<'_>,
) -> Run {
    let (far, arrivals) = channel::<UnixStream>();
    let first = dial(0, &far).unwrap();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let first = arrivals.recv().unwrap();
            // As an agent does: who knows no ticket comes no further.
            let mut arrive = |wait| {
                let arrived = arrivals.recv_timeout(wait).ok();
                let known = |stream: &mut UnixStream| Ticket::read(stream).ok() == Some(TICKET);
                Ok(arrived.and_then(|mut stream| known(&mut stream).then_some(stream)))
            };
            let received =
                destination::serve_over(first, &mut arrive, destination, &mut to, &mut |_| {});
            let right = received.map(|received| {
                let Received::Moved(outcome) = received else {
                    unreachable!("only a move was offered");
                };
                *outcome
            });
            (right, to)
        });
        let mut number = 0;
        let mut dial = |ticket: &Ticket| {
            assert_eq!(*ticket, TICKET);
            number += 1;
            let mut near = dial(number, &far)?;
            ticket.write(&mut near)?;
            Ok(near)
        };
        let offer = from.offer(41);
        let left = source::migrate_over(first, &mut dial, source, &offer, &mut from, &mut |_| {});
        let (right, to) = receiver.join().unwrap();
        Run {
            source: from,
            destination: to,
            left,
            right,
            gateway: None,
            source_progress: Vec::new(),
        }
    })
}

/// A move over three connections and a gateway; the hook sees the frames of one of them, and how many of that type it has seen,
/// this one included. Also the codes that the destination refused connections with.
fn relayed(
    site: &Site,
    number: u16,
    hook: impl FnMut(usize, Frame) -> Action + Send + 'static,
) -> (Run, Vec<String>) {
    let (mut source, mut destination) = ends(site, site.via(), 3);
    for deadlines in [&mut source.deadlines, &mut destination.deadlines] {
        deadlines.frame = Duration::from_secs(3);
    }
    let mut relay = site.relay();
    relay.timeout = Duration::from_secs(20);
    let refused: Arc<Mutex<Vec<String>>> = Arc::default();
    let mut hook = Some(hook);
    let run = over(&source, &destination, ToySource::new(), &mut |this, far| {
        if this != number {
            return Ok(via(&relay, far, Action::from));
        }
        let (mut hook, refused) = (hook.take().unwrap(), refused.clone());
        let mut seen = Vec::new();
        Ok(via(&relay, far, move |frame| {
            seen.push(frame.kind);
            let count = seen.iter().filter(|kind| **kind == frame.kind).count();
            hook(count, note(&refused, frame))
        }))
    });
    let refused = std::mem::take(&mut *refused.lock().unwrap());
    (run, refused)
}

/// Keeps the code of a refusal.
fn note(refused: &Mutex<Vec<String>>, frame: Frame) -> Frame {
    if frame.kind == FrameKind::Refuse {
        let code = Abort::decode(&frame.payload).unwrap().code;
        refused.lock().unwrap().push(code);
    }
    frame
}

/// A connection through a gateway.
fn via(
    gateway: &Gateway,
    far: &Sender<UnixStream>,
    mut hook: impl FnMut(Frame) -> Action + Send + 'static,
) -> UnixStream {
    let ((near, source), (destination, end)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    far.send(end).unwrap();
    let gateway = gateway.clone();
    std::thread::spawn(move || {
        // How the connection ends is the ends' to say.
        let _ = gateway.run(source, destination, &mut |_: Direction, frame| hook(frame));
    });
    near
}

/// A connection that pauses before it passes a piece on, for as long as `pause` says of the bytes that have passed.
fn valve(
    far: &Sender<UnixStream>,
    mut pause: impl FnMut(usize) -> Duration + Send + 'static,
) -> UnixStream {
    let ((near, source), (destination, end)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    far.send(end).unwrap();
    let back = (
        destination.try_clone().unwrap(),
        source.try_clone().unwrap(),
    );
    std::thread::spawn(move || pass(back, |_| Duration::ZERO));
    std::thread::spawn(move || pass((source, destination), &mut pause));
    near
}

fn pass((mut from, mut to): (UnixStream, UnixStream), mut pause: impl FnMut(usize) -> Duration) {
    let (mut buffer, mut seen) = (vec![0; 64 << 10], 0);
    while let Ok(count) = from.read(&mut buffer)
        && count > 0
    {
        seen += count;
        std::thread::sleep(pause(seen));
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// For 64 KiB: enough that every connection has its turn.
const FEW: Duration = Duration::from_millis(10);
