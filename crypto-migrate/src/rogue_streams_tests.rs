//! A source with a valid identity that lies on one of two connections.

use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::time::Instant;

use crate::channel::{Channel, ChannelError};
use crate::destination::{Received, serve_over};
use crate::guest::{Gpn, PAGE_SIZE, PageContent};
use crate::identity::Local;
use crate::page::PageSealer;
use crate::rogue_tests::{Strict, TIME, ends, offer};
use crate::session::{self, Times, Wanted};
use crate::tls;
use crate::transcript::{PageTable, SealLog, StreamEnd};
use crate::wire::batch::BatchBuilder;
use crate::wire::messages::{Begin, Commit, Purpose, RoundAck, RoundEnd, State, Verified};

/// What is said on one of the two connections.
#[derive(Clone, Copy)]
enum Say {
    /// A page, as of that round.
    Page(u64, u32),
    /// The end of that round, after so many pages; whether it is the last.
    End(u32, u64, bool),
    /// The acknowledgement is waited for.
    Ack,
}

use Say::{Ack, End, Page};

const HONEST: &[(usize, Say)] = &[
    (0, Page(0, 1)),
    (1, Page(1, 1)),
    (1, End(1, 1, false)),
    (0, End(1, 1, false)),
    (0, Ack),
    (1, Page(0, 2)),
    (0, End(2, 0, true)),
    (1, End(2, 1, true)),
];

#[test]
fn an_honest_source_moves_a_page_from_one_connection_to_the_other() {
    assert_eq!(play(HONEST), "OK");
}

#[test]
fn a_page_comes_once_a_round_over_one_connection_alone() {
    let twice = [
        (0, Page(3, 1)),
        (1, Page(3, 1)),
        (0, End(1, 1, true)),
        (1, End(1, 1, true)),
    ];
    assert_eq!(play(&twice), "PAGE_DUPLICATED");
}

/// The older version waits on the slower connection while the newer one has come over the other.
#[test]
fn an_older_version_cannot_come_later_over_another_connection() {
    let late = [
        (0, End(1, 0, false)),
        (1, End(1, 0, false)),
        (0, Ack),
        (0, Page(0, 2)),
        (1, Page(0, 1)),
        (0, End(2, 1, true)),
        (1, End(2, 1, true)),
    ];
    assert_eq!(play(&late), "PAGE_ROLLED_BACK");
    // One connection goes on before the other has ended its round.
    let early = [
        (0, End(1, 0, false)),
        (1, Page(0, 2)),
        (1, End(1, 1, false)),
    ];
    assert_eq!(play(&early), "ROUND_MISMATCH");
}

#[test]
fn a_round_does_not_end_before_it_has_on_every_connection() {
    assert_eq!(play(&HONEST[..3]), "PEER_TIMEOUT");
    let lost = [(1, Page(1, 1)), (0, End(1, 0, true)), (1, End(1, 0, true))];
    assert_eq!(play(&lost), "PAGE_MISSING");
    let more = [(1, Page(1, 1)), (0, End(1, 0, true)), (1, End(1, 2, true))];
    assert_eq!(play(&more), "PAGE_MISSING");
    let differ = [(0, End(1, 0, true)), (1, End(1, 0, false))];
    assert_eq!(play(&differ), "FRAME_MALFORMED");
    let other = [(0, End(1, 0, true)), (1, End(2, 0, true))];
    assert_eq!(play(&other), "ROUND_MISMATCH");
}

/// Plays it against a real destination; its code.
fn play(script: &[(usize, Say)]) -> String {
    let (source, mut destination) = ends();
    destination.deadlines.frame = TIME / 4;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connect = || {
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    };
    let ((near, far), (further, arriving)) = (connect(), connect());
    let (send, arrivals) = channel();
    send.send(arriving).unwrap();
    let mut guest = Strict::default();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || {
            let tls = tls::connect(near, &source, TIME).unwrap();
            let mut first = Channel::new(tls, TIME, Box::new(|| false));
            // The destination may refuse at any point; that is what is tested.
            let _further = speak(&mut first, further, &source, script);
            let _ = first.receive(Instant::now() + TIME);
            first.close(TIME);
        });
        let mut arrive = |wait| Ok(arrivals.recv_timeout(wait).ok());
        serve_over(far, &mut arrive, &destination, &mut guest, &mut |_| {})
    });
    assert_eq!(guest.active, result.is_ok());
    assert_eq!(guest.abandoned, result.is_err());
    match result {
        Ok(Received::Moved(_)) => "OK".to_owned(),
        Ok(other) => panic!("{other:?}"),
        Err(error) => error.code().to_owned(),
    }
}

/// Says it all; the further connection, which is to stay open.
fn speak(
    first: &mut Channel<TcpStream>,
    further: TcpStream,
    local: &Local,
    script: &[(usize, Say)],
) -> Option<Channel<TcpStream>> {
    let offer = offer();
    let deadline = Instant::now() + TIME;
    let wanted = Wanted {
        purpose: Purpose::Move,
        streams: 2,
    };
    let session = session::offer(first, local, "b", None, &offer, wanted, deadline).ok()?;
    let times = Times {
        connect: TIME,
        frame: TIME,
        agree: TIME,
    };
    let membership = &session.membership;
    let joined = session::join(further, local, membership, 1, times, Box::new(|| false)).unwrap();
    let mut further = joined.channel;
    first.send(&Begin { start: vec![] }).ok()?;
    let mut sealers = [
        PageSealer::new(session.page_keys, session.binding),
        PageSealer::new(joined.page_keys, joined.binding),
    ];
    let mut logs = [SealLog::default(), SealLog::default()];
    let mut table = PageTable::new(&offer.memory).unwrap();
    let mut rounds = 0;
    let mut batch = BatchBuilder::new();
    for (lane, say) in script.iter().copied() {
        let channel = [&mut *first, &mut further].into_iter().nth(lane).unwrap();
        let said = match say {
            Page(page, round) => {
                let content = PageContent::Data(&[9; PAGE_SIZE]);
                let sealed = sealers[lane].seal(&mut batch, round, Gpn(page), 1, content);
                let (header, tag) = sealed.unwrap();
                let _ = table.record(&header);
                logs[lane].add(&header, &tag);
                channel.send_batch(&mut batch)
            }
            End(round, pages, last) => {
                rounds = round;
                let next_sequence = sealers[lane].next_sequence();
                channel.send(&RoundEnd {
                    round,
                    pages,
                    next_sequence,
                    last,
                })
            }
            Ack => acknowledged(channel, deadline),
        };
        if said.is_err() {
            return Some(further);
        }
    }
    let state = State {
        total: 8,
        offset: 0,
        bytes: b"registry".to_vec(),
    };
    if !matches!(script.last(), Some((_, End(_, _, true)))) || first.send(&state).is_err() {
        return Some(further);
    }
    let end = StreamEnd {
        content_sha256: None,
        rounds,
        epoch: 1,
    };
    let manifest = table.manifest(&logs, end, b"registry", session.offer_hash);
    let sent = first.send(&manifest);
    let verified = sent.and_then(|()| first.receive_message::<Verified>("Verified", deadline));
    if verified.is_ok() {
        let _ = first.send(&Commit { epoch: 2 });
    }
    Some(further)
}

fn acknowledged(channel: &mut Channel<TcpStream>, deadline: Instant) -> Result<(), ChannelError> {
    channel
        .receive_message::<RoundAck>("RoundAck", deadline)
        .map(drop)
}
