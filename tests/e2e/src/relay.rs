//! The relay between the sites: it holds a valid certificate, terminates the TLS of both, and does as it is told.
//!
//! It is the attacker of the drill and, left alone, the gateway that a policy may name.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use casemate_crypto_migrate::gateway::{Action, Direction, Gateway, GatewayReport};
use casemate_crypto_migrate::identity::Local;
use casemate_crypto_migrate::wire::batch::{
    ENTRY_HEADER_SIZE, EntryHeader, MAX_ENTRIES, PageKind, join, split,
};
use casemate_crypto_migrate::wire::{Frame, FrameKind};

use crate::error::{E2eError, Result, io};
use crate::network::Namespace;
use crate::plaintext::Search;

/// What the relay does with the next connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forwards everything as it is.
    Forward,
    /// Flips one bit of a page.
    FlipBit,
    /// Sends a page a second time.
    ReplayPage,
    /// Leaves a page out.
    DropPage,
    /// Lets two pages change places.
    SwapPages,
    /// Cuts a batch of pages short.
    Truncate,
    /// Puts a page's sealed version of an older round in place of its newer one.
    RollBack,
}

impl Mode {
    /// The attacks, with the code by which the destination must refuse each.
    pub const ATTACKS: [(Mode, &'static str); 6] = [
        (Mode::FlipBit, "PAGE_AUTHENTICATION"),
        (Mode::ReplayPage, "PAGE_REPLAYED"),
        (Mode::DropPage, "PAGE_MISSING"),
        (Mode::SwapPages, "PAGE_REORDERED"),
        (Mode::Truncate, "STREAM_TRUNCATED"),
        (Mode::RollBack, "PAGE_ROLLED_BACK"),
    ];

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Mode::Forward => "forwards",
            Mode::FlipBit => "flips one bit",
            Mode::ReplayPage => "replays a page",
            Mode::DropPage => "drops a page",
            Mode::SwapPages => "swaps two pages",
            Mode::Truncate => "truncates a batch",
            Mode::RollBack => "rolls a page back to an older round",
        }
    }
}

/// What came of one connection through the relay.
#[derive(Debug)]
pub struct Sitting {
    /// What it did.
    pub mode: Mode,
    /// Whether it found something to attack.
    pub struck: bool,
    /// What passed, or why the relay itself was refused (the stable code).
    pub passed: std::result::Result<GatewayReport, String>,
    /// What it saw of what it looked for.
    pub search: Search,
}

/// A relay that listens.
pub struct Relay {
    mode: Arc<Mutex<(Mode, Search)>>,
    sittings: Receiver<Sitting>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Listens at `listen` in the namespace and connects on to `target`; `local` is its certificate and both hosts.
    pub fn start(
        namespace: &Arc<Namespace>,
        listen: SocketAddr,
        target: SocketAddr,
        local: Local,
    ) -> Result<Self> {
        let listener = namespace
            .run(|| TcpListener::bind(listen))?
            .map_err(io("let the relay listen"))?;
        listener
            .set_nonblocking(true)
            .map_err(io("let the relay listen"))?;
        let mode = Arc::new(Mutex::new((Mode::Forward, Search::default())));
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, sittings) = channel();
        let post = Post {
            listener,
            target,
            gateway: Gateway::new(local, SILENCE),
            mode: Arc::clone(&mode),
            stop: Arc::clone(&stop),
            sender,
        };
        let inside = Arc::clone(namespace);
        let serve = move || match inside.enter() {
            Ok(()) => post.serve(),
            Err(error) => eprintln!("relay: {error}"),
        };
        let thread = thread::Builder::new()
            .name("relay".into())
            .spawn(serve)
            .map_err(io("start the relay"))?;
        Ok(Self {
            mode,
            sittings,
            stop,
            thread: Some(thread),
        })
    }

    /// What to do with the next connection, and what to look for in it.
    pub fn arm(&self, mode: Mode, search: Search) {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = (mode, search);
    }

    /// What came of the connection.
    pub fn sitting(&self) -> Result<Sitting> {
        self.sittings
            .recv_timeout(SILENCE + SILENCE)
            .map_err(|_| E2eError::TimedOut {
                what: "the end of the relay's connections".into(),
                seconds: 2 * SILENCE.as_secs(),
                more: String::new(),
            })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

struct Post {
    listener: TcpListener,
    target: SocketAddr,
    gateway: Gateway,
    mode: Arc<Mutex<(Mode, Search)>>,
    stop: Arc<AtomicBool>,
    sender: Sender<Sitting>,
}

impl Post {
    fn serve(self) {
        while !self.stop.load(Ordering::Relaxed) {
            match self.listener.accept() {
                // Nobody waits for the last one when the demo is over.
                Ok((source, _)) => drop(self.sender.send(self.sit(source))),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn sit(&self, source: TcpStream) -> Sitting {
        let (mode, search) = self
            .mode
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut attack = Attack {
            mode,
            struck: false,
            older: HashMap::new(),
            search,
        };
        let passed = self.pass(source, &mut attack);
        Sitting {
            mode,
            struck: attack.struck,
            passed,
            search: attack.search,
        }
    }

    fn pass(
        &self,
        source: TcpStream,
        attack: &mut Attack,
    ) -> std::result::Result<GatewayReport, String> {
        let lost = |e: std::io::Error| e.to_string();
        source
            .set_nonblocking(false)
            .and_then(|()| source.set_nodelay(true))
            .map_err(lost)?;
        let onward = TcpStream::connect_timeout(&self.target, SILENCE).map_err(lost)?;
        onward.set_nodelay(true).map_err(lost)?;
        let mut hook = |direction, frame| attack.see(direction, frame);
        self.gateway
            .run(source, onward, &mut hook)
            .map_err(|e| e.code().as_str().to_owned())
    }
}

/// One connection's attack.
struct Attack {
    mode: Mode,
    struck: bool,
    /// Sealed pages of the first round, by page number.
    older: HashMap<u64, Vec<u8>>,
    search: Search,
}

impl Attack {
    fn see(&mut self, direction: Direction, mut frame: Frame) -> Action {
        self.search.look(&frame.payload);
        let pages = direction == Direction::ToDestination && frame.kind == FrameKind::PageBatch;
        if pages {
            let entries = split(&frame.payload).unwrap_or_default();
            entries
                .iter()
                .for_each(|entry| self.search.look_for_pattern(entry.get(ENTRY_HEADER_SIZE..)));
            if self.mode != Mode::Forward && !self.struck {
                frame.payload = self.strike(entries, frame.payload);
            }
        }
        frame.into()
    }

    /// The payload as it goes on: changed, once there is something to change.
    fn strike(&mut self, mut entries: Vec<Vec<u8>>, payload: Vec<u8>) -> Vec<u8> {
        if self.mode == Mode::RollBack {
            return if self.roll_back(&mut entries) {
                join(&entries)
            } else {
                payload
            };
        }
        if entries.len() <= MIN_ENTRIES {
            return payload;
        }
        self.struck = true;
        match self.mode {
            Mode::FlipBit => match entries.iter_mut().find_map(|e| e.get_mut(DEEP)) {
                Some(byte) => *byte ^= 0x10,
                None => self.struck = false,
            },
            Mode::ReplayPage => {
                let again = entries.first().cloned().unwrap_or_default();
                entries.insert(2, again);
                entries.truncate(MAX_ENTRIES);
            }
            Mode::DropPage => drop(entries.remove(1)),
            Mode::SwapPages => entries.swap(1, 3),
            Mode::Truncate => {
                let half = payload.len() / 2;
                return payload.into_iter().take(half).collect();
            }
            Mode::Forward | Mode::RollBack => {}
        }
        join(&entries)
    }

    fn roll_back(&mut self, entries: &mut [Vec<u8>]) -> bool {
        for entry in entries {
            let header = entry
                .first_chunk::<ENTRY_HEADER_SIZE>()
                .and_then(|h| EntryHeader::parse(h).ok());
            let Some(header) = header.filter(|h| h.kind != PageKind::Zero) else {
                continue;
            };
            if header.round == 1 {
                self.older.insert(header.page, entry.clone());
            } else if let Some(older) = self.older.get(&header.page) {
                entry.clone_from(older);
                self.struck = true;
                self.older.clear();
                return true;
            }
        }
        false
    }
}

const SILENCE: Duration = Duration::from_secs(30);
/// Fewer entries than this leave too little to replay, drop or swap.
const MIN_ENTRIES: usize = 4;
/// A byte this deep in an entry belongs to a page's ciphertext.
const DEEP: usize = 2000;

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(page: u64, round: u32, fill: u8) -> Vec<u8> {
        let header = EntryHeader {
            sequence: page,
            page,
            count: 1,
            round,
            session: [1; 4],
            stream: 0,
            kind: PageKind::Data,
        };
        [header.encode().to_vec(), vec![fill; 4096 + 16]].concat()
    }

    fn batch(round: u32, fill: u8) -> Frame {
        let entries: Vec<_> = (0..6).map(|page| entry(page, round, fill)).collect();
        Frame {
            kind: FrameKind::PageBatch,
            stream: 0,
            sequence: 0,
            payload: join(&entries),
        }
    }

    fn forwarded(attack: &mut Attack, frame: Frame) -> Vec<u8> {
        match attack.see(Direction::ToDestination, frame) {
            Action::Forward(frames) => frames[0].payload.clone(),
            Action::Cut => panic!("cut"),
        }
    }

    fn attack(mode: Mode) -> Attack {
        Attack {
            mode,
            struck: false,
            older: HashMap::new(),
            search: Search::default(),
        }
    }

    #[test]
    fn each_attack_changes_one_batch_and_then_no_more() {
        for (mode, _) in Mode::ATTACKS {
            let mut attack = attack(mode);
            let first = forwarded(&mut attack, batch(1, 1));
            let second = forwarded(&mut attack, batch(2, 2));
            let changed = [first != batch(1, 1).payload, second != batch(2, 2).payload];
            assert_eq!(
                changed,
                if mode == Mode::RollBack {
                    [false, true]
                } else {
                    [true, false]
                },
                "{mode:?}"
            );
            assert!(attack.struck);
        }
    }

    #[test]
    fn a_page_is_rolled_back_to_its_own_older_version() {
        let mut attack = attack(Mode::RollBack);
        forwarded(&mut attack, batch(1, 1));
        let entries = split(&forwarded(&mut attack, batch(2, 2))).unwrap();
        assert_eq!(entries[0], entry(0, 1, 1));
        assert_eq!(entries[1], entry(1, 2, 2));
    }

    #[test]
    fn left_alone_it_changes_nothing_and_reports_what_it_looked_for() {
        let mut attack = attack(Mode::Forward);
        attack.search = Search::new(vec![("sevens", vec![7; 20]), ("eights", vec![8; 20])]);
        assert_eq!(forwarded(&mut attack, batch(1, 7)), batch(1, 7).payload);
        assert_eq!(attack.search.found(), ["sevens"]);
    }
}
