//! A source with a valid identity and valid keys that lies: what no relay can do, the peer itself might.

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::channel::Channel;
use crate::crypto::Provider;
use crate::destination::{DestinationConfig, receive};
use crate::dev_ca::DevCa;
use crate::guest::*;
use crate::identity::Local;
use crate::identity::{AllowList, AllowedPeer, Path, PeerIdentity, TrustAnchors};
use crate::page::PageSealer;
use crate::pages::PageSet;
use crate::session::{self, SessionFacts};
use crate::settlement::Settlement;
use crate::tls;
use crate::transcript::{Manifest, PageTable, SealLog, StreamCount, StreamEnd};
use crate::wire::batch::BatchBuilder;
use crate::wire::messages::{Begin, Commit, Purpose, RoundEnd, State, Verified};

pub(crate) const TIME: Duration = Duration::from_secs(5);

/// What the rogue does; the default is honest.
#[derive(Clone, Copy)]
struct Script {
    pages: &'static [(u64, u32, u32)], // page, count (0: data), round
    end: RoundEnd,
    offsets: [u32; 2],
    total: u32,
    manifest: fn(&mut Manifest),
    after_end: bool,
    commit: u64,
}

const HONEST: Script = Script {
    pages: &[(0, 0, 1), (4, 3, 1)],
    end: RoundEnd {
        round: 1,
        pages: 4,
        next_sequence: 2,
        last: true,
    },
    offsets: [0, 4],
    total: 8,
    manifest: |_| {},
    after_end: false,
    commit: 2,
};

#[test]
fn an_honest_script_succeeds() {
    assert_eq!(play(HONEST), "OK");
}

#[test]
fn every_line_of_the_manifest_counts() {
    let lies: [fn(&mut Manifest); 11] = [
        |m| m.pages += 1,
        |m| m.seals_sha256[31] ^= 1,
        |m| m.streams[0].seals += 1,
        |m| m.streams[0].pages -= 1,
        |m| m.streams.clear(),
        |m| m.streams.push(StreamCount::default()),
        |m| m.rounds += 1,
        |m| m.epoch += 1,
        |m| m.state_length += 1,
        |m| m.state_sha256[0] ^= 1,
        |m| m.offer_sha256[0] ^= 1,
    ];
    for manifest in lies {
        assert_eq!(play(Script { manifest, ..HONEST }), "MANIFEST_MISMATCH");
    }
}

#[test]
fn pages_must_fit_memory_and_come_once_a_round() {
    let end = |pages| RoundEnd {
        pages,
        ..HONEST.end
    };
    assert_eq!(
        play(Script {
            pages: &[(0, 0, 1), (0, 0, 1)],
            end: end(2),
            ..HONEST
        }),
        "PAGE_DUPLICATED"
    );
    assert_eq!(
        play(Script {
            pages: &[(0, 4, 1), (3, 0, 1)],
            end: end(5),
            ..HONEST
        }),
        "PAGE_DUPLICATED"
    );
    assert_eq!(
        play(Script {
            pages: &[(16, 0, 1)],
            end: end(1),
            ..HONEST
        }),
        "PAGE_OUT_OF_RANGE"
    );
    assert_eq!(
        play(Script {
            pages: &[(15, 2, 1)],
            end: end(2),
            ..HONEST
        }),
        "PAGE_OUT_OF_RANGE"
    );
    assert_eq!(
        play(Script {
            pages: &[(u64::MAX, 2, 1)],
            end: end(2),
            ..HONEST
        }),
        "PAGE_OUT_OF_RANGE"
    );
    assert_eq!(
        play(Script {
            pages: &[(0, 0, 2)],
            end: end(1),
            ..HONEST
        }),
        "ROUND_MISMATCH"
    );
}

#[test]
fn the_end_of_a_round_must_be_true() {
    let end = |end| play(Script { end, ..HONEST });
    assert_eq!(
        end(RoundEnd {
            pages: 5,
            ..HONEST.end
        }),
        "PAGE_MISSING"
    );
    assert_eq!(
        end(RoundEnd {
            next_sequence: 3,
            ..HONEST.end
        }),
        "PAGE_MISSING"
    );
    assert_eq!(
        end(RoundEnd {
            round: 2,
            ..HONEST.end
        }),
        "ROUND_MISMATCH"
    );
    assert_eq!(
        play(Script {
            after_end: true,
            ..HONEST
        }),
        "FRAME_UNEXPECTED"
    );
}

#[test]
fn state_must_join_and_be_bounded() {
    for (offsets, total) in [
        ([0, 5], 8),
        ([0, 0], 8),
        ([4, 8], 8),
        ([0, 4], 7),
        ([0, 4], 9),
        ([0, 4], u32::MAX),
    ] {
        assert_eq!(
            play(Script {
                offsets,
                total,
                ..HONEST
            }),
            "STATE_TOO_LARGE",
            "{offsets:?} {total}"
        );
    }
}

#[test]
fn commit_must_name_the_next_epoch() {
    for commit in [0, 1, 3, u64::MAX] {
        assert_eq!(play(Script { commit, ..HONEST }), "SESSION_MISMATCH");
    }
}

/// A rogue source's identity, and a destination that allows it.
pub(crate) fn ends() -> (Local, DestinationConfig) {
    let ca = DevCa::new("rogue").unwrap();
    let (a, b) = (ca.issue("a.test").unwrap(), ca.issue("b.test").unwrap());
    let local =
        |own: &crate::dev_ca::HostMaterial, name: &str, peer: &crate::dev_ca::HostMaterial| {
            let allowed = AllowedPeer {
                name: name.into(),
                identity: peer.pinned().unwrap(),
                path: Path::Direct,
            };
            let anchors = TrustAnchors::from_pem(ca.certificate_pem()).unwrap();
            Local {
                identity: own.identity().unwrap(),
                anchors,
                allow: AllowList::new(vec![allowed]),
                provider: Provider::default(),
            }
        };
    (
        local(&a, "b", &b),
        DestinationConfig::new(local(&b, "a", &a)),
    )
}

/// Plays the script against a real destination and returns its code.
fn play(script: Script) -> String {
    let (source, destination) = ends();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    let rogue = std::thread::spawn(move || {
        let tls = tls::connect(near, &source, TIME).unwrap();
        let mut channel = Channel::new(tls, TIME, Box::new(|| false));
        // The destination may refuse at any point; that is what is tested.
        if speak(&mut channel, &source, script).is_none() {
            channel.last_words();
        }
        channel.close(TIME);
    });
    let mut guest = Strict::default();
    let result = receive(far, &destination, &mut guest, &mut |_| {});
    rogue.join().unwrap();
    assert_eq!(guest.active, result.is_ok());
    assert_eq!(guest.abandoned, result.is_err());
    result.map_or_else(|error| error.code().to_owned(), |_| "OK".to_owned())
}

/// A guest of sixteen pages.
pub fn offer() -> GuestOffer {
    GuestOffer {
        vm_id: [1; 16],
        name: "rogue".into(),
        epoch: 1,
        memory: vec![PageRange {
            start: Gpn(0),
            count: 16,
        }],
        description: vec![],
    }
}

fn speak(channel: &mut Channel<TcpStream>, local: &Local, script: Script) -> Option<()> {
    let offer = offer();
    let deadline = Instant::now() + TIME;
    let session =
        session::offer(channel, local, "b", None, &offer, Purpose::Move, deadline).ok()?;
    channel.send(&Begin { start: vec![] }).ok()?;
    let mut sealer = PageSealer::new(session.page_keys, session.binding);
    let mut table = PageTable::new(&offer.memory).unwrap();
    let mut log = SealLog::default();
    let mut batch = BatchBuilder::new();
    for (page, count, round) in script.pages.iter().copied() {
        let content = if count == 0 {
            PageContent::Data(&[9; PAGE_SIZE])
        } else {
            PageContent::Zero
        };
        let (header, tag) = sealer
            .seal(&mut batch, round, Gpn(page), count.max(1), content)
            .unwrap();
        let _ = table.record(&header);
        log.add(&header, &tag);
    }
    channel.send_batch(&mut batch).ok()?;
    channel.send(&script.end).ok()?;
    if script.after_end {
        sealer
            .seal(&mut batch, 1, Gpn(9), 1, PageContent::Zero)
            .unwrap();
        channel.send_batch(&mut batch).ok()?;
    }
    let state = *b"registry";
    for (offset, bytes) in script.offsets.into_iter().zip(state.chunks(4)) {
        channel
            .send(&State {
                total: script.total,
                offset,
                bytes: bytes.to_vec(),
            })
            .ok()?;
    }
    let end = StreamEnd {
        content_sha256: None,
        rounds: 1,
        epoch: 1,
    };
    let mut manifest = table.manifest([&log], end, &state, session.offer_hash);
    (script.manifest)(&mut manifest);
    channel.send(&manifest).ok()?;
    let _: Verified = channel.receive_message("Verified", deadline).ok()?;
    channel
        .send(&Commit {
            epoch: script.commit,
        })
        .ok()
}

/// A guest of sixteen pages.
#[derive(Default)]
pub(crate) struct Strict {
    restored: bool,
    pub(crate) active: bool,
    pub(crate) abandoned: bool,
}

impl DestinationGuest for Strict {
    fn agreed(&mut self, _: &SessionFacts) -> Result<(), Refusal> {
        Ok(())
    }
    fn admit(&mut self, _: &GuestOffer, _: &PeerIdentity) -> Result<Admission, Refusal> {
        Ok(Admission { evidence: vec![] })
    }
    fn settle(&mut self, _: &GuestOffer, _: &PeerIdentity) -> Result<Settlement, Refusal> {
        Ok(Settlement::Never)
    }
    fn begin(&mut self, _: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }
    fn write_pages(&mut self, page: Gpn, _: PageContent<'_>) -> Result<(), GuestError> {
        assert!(page.0 < 16, "an unchecked page reached the guest");
        Ok(())
    }
    fn flush(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError> {
        assert_eq!(state, b"registry");
        self.restored = true;
        Ok(())
    }
    fn content_digest(&mut self, _: &PageSet) -> Result<[u8; 32], GuestError> {
        Ok([0; 32])
    }
    fn activate(&mut self, epoch: u64) -> Result<u32, GuestError> {
        assert!(self.restored && epoch == 2);
        self.active = true;
        Ok(0)
    }
    fn abandon(&mut self) {
        self.abandoned = true;
    }
}
