//! Further connections of moves that come in: which mover one belongs to, by the ticket that it names.
//!
//! The ticket only routes, and is believed nothing else: whoever knows it gets as far as the mover's TLS. What is read here of a
//! connection is bounded, by a deadline, and never a byte of its TLS.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use casemate_crypto_migrate::preamble::{PREAMBLE_BYTE, PREAMBLE_SIZE, Ticket};
use casemate_crypto_migrate::session::MAX_STREAMS;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use crate::agent::api::Failure;
use crate::agent::mover_process::MoverProcess;
use crate::agent::vmm_process::lock;

/// What a connection is by its first bytes.
pub enum Opened {
    /// Of a move that begins, or of nobody: not a byte of it is taken.
    First(TcpStream),
    /// Of a move under way; what comes next is its TLS.
    Further(Ticket, TcpStream),
}

/// Looks at the first byte, and reads a preamble if it is one's.
///
/// # Errors
///
/// If it says nothing in time, hangs up, or begins like a preamble and is none.
pub async fn open(mut stream: tokio::net::TcpStream) -> io::Result<Opened> {
    let mut first = [0];
    match timeout(FIRST_BYTE, stream.peek(&mut first)).await?? {
        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        _ if first != [PREAMBLE_BYTE] => return Ok(Opened::First(stream.into_std()?)),
        _ => {}
    }
    let mut bytes = [0; PREAMBLE_SIZE];
    timeout(OPENING, stream.read_exact(&mut bytes)).await??;
    let ticket = Ticket::parse(&bytes).ok_or_else(|| {
        let text = "neither a TLS connection nor a further one of a move";
        io::Error::new(io::ErrorKind::InvalidData, text)
    })?;
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    Ok(Opened::Further(ticket, stream))
}

/// The tickets of all moves that come in.
#[derive(Default)]
pub struct Routes(Mutex<Known>);

#[derive(Default)]
struct Known {
    open: BTreeMap<Ticket, Open>,
    /// The latest that have ended, the oldest first.
    ended: VecDeque<Ticket>,
}

struct Open {
    mover: Arc<MoverProcess>,
    /// Connections that may still come.
    left: u16,
}

/// A ticket; it ends with this value.
pub struct Route<'a> {
    routes: &'a Routes,
    ticket: Ticket,
}

impl Routes {
    /// A new ticket for the move that this mover serves.
    pub fn open(&self, mover: &Arc<MoverProcess>) -> Result<Route<'_>, Failure> {
        let ticket = Ticket::random().map_err(|e| Failure::new("INTERNAL", e.to_string()))?;
        let open = Open {
            mover: Arc::clone(mover),
            left: MAX_CONNECTIONS,
        };
        lock(&self.0).open.insert(ticket, open);
        let routes = self;
        Ok(Route { routes, ticket })
    }

    /// Hands a connection to the mover whose ticket it names.
    pub fn hand_over(&self, ticket: &Ticket, stream: &TcpStream) -> Result<(), Failure> {
        let mover = self.mover_of(ticket)?;
        mover.further(stream.as_fd())
    }

    fn mover_of(&self, ticket: &Ticket) -> Result<Arc<MoverProcess>, Failure> {
        let mut known = lock(&self.0);
        let ended = known.ended.contains(ticket);
        match known.open.get_mut(ticket) {
            Some(open) => match open.left.checked_sub(1) {
                Some(left) => {
                    open.left = left;
                    Ok(Arc::clone(&open.mover))
                }
                None => Err(Failure::new(
                    "JOIN_OUT_OF_RANGE",
                    "more connections came than a move may have",
                )),
            },
            None if ended => Err(Failure::new(
                "JOIN_LATE",
                "the move that it is of has ended",
            )),
            None => Err(Failure::new("JOIN_UNKNOWN", "no move here has its ticket")),
        }
    }
}

impl Route<'_> {
    /// What further connections name.
    pub fn ticket(&self) -> Ticket {
        self.ticket
    }
}

impl Drop for Route<'_> {
    fn drop(&mut self) {
        let mut known = lock(&self.routes.0);
        known.open.remove(&self.ticket);
        known.ended.push_back(self.ticket);
        if known.ended.len() > MAX_ENDED {
            known.ended.pop_front();
        }
    }
}

/// How long the first byte may take: the other host starts a mover meanwhile.
const FIRST_BYTE: Duration = Duration::from_secs(10);
/// How long the rest of a preamble may take.
const OPENING: Duration = Duration::from_secs(2);
/// Twice what a move may have: one that is refused may come again.
const MAX_CONNECTIONS: u16 = 2 * MAX_STREAMS;
/// Only so that the log names the right cause.
const MAX_ENDED: usize = 64;
