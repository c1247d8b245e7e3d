//! One connection between a port of the guest and the host: its far end, its phase, its credits.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd;

use super::super::ring::Segments;
use super::packet::{Header, NO_RECEIVE, NO_SEND, NOTHING};
use super::wire::Wire;

/// Bytes from the guest that are kept for a client that does not read: the credit every guest socket is given.
pub(super) const BUF_ALLOC: u32 = 128 << 10;

pub(super) struct Connection {
    pub(super) far: Far,
    pub(super) phase: Phase,
    pub(super) guest_port: u32,
    /// When it came, to evict the oldest.
    pub(super) serial: u64,
    /// What the epoll instance was last told; nothing when the far end is not in it.
    pub(super) watched: EpollFlags,
    /// The client has sent its last byte.
    pub(super) client_done: bool,
    /// Which directions the guest has shut.
    pub(super) guest_shut: u32,
    to_client: VecDeque<u8>,
    received: u32,
    told: u32,
    sent: u32,
    peer_alloc: u32,
    peer_fwd: u32,
    asked: bool,
    write_shut: bool,
}

/// The end that is not the guest's.
pub(super) enum Far {
    /// A local client, who connected to the guest.
    Client(OwnedFd),
    /// Who answers on a port that the guest connected to.
    Wire(Wire),
}

pub(super) enum Phase {
    /// The client's line, as far as it has come.
    Greeting(Vec<u8>),
    /// The guest has been asked.
    Requested,
    /// The guest has accepted.
    Open,
}

/// What became of a client's line.
pub(super) enum Greeting {
    Unfinished,
    Port(u32),
    Rubbish,
}

/// The guest sent more than it had credit for, or more than it wrote.
pub(super) struct Overrun;

impl Connection {
    /// A local client's, who has not said yet where to.
    pub(super) fn new(stream: OwnedFd, serial: u64) -> Connection {
        Self::between(Far::Client(stream), Phase::Greeting(Vec::new()), 0, serial)
    }

    /// The guest's to a wired port, open from the start.
    pub(super) fn wired(wire: Wire, request: &Header, serial: u64) -> Connection {
        let mut wired = Self::between(Far::Wire(wire), Phase::Open, request.src_port, serial);
        wired.learn_credit(request);
        wired
    }

    fn between(far: Far, phase: Phase, guest_port: u32, serial: u64) -> Connection {
        Connection {
            far,
            phase,
            guest_port,
            serial,
            watched: EpollFlags::empty(),
            client_done: false,
            guest_shut: 0,
            to_client: VecDeque::new(),
            received: 0,
            told: 0,
            sent: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            asked: false,
            write_shut: false,
        }
    }

    /// The wire, if it goes to one.
    pub(super) fn wire(&mut self) -> Option<&mut Wire> {
        match &mut self.far {
            Far::Client(_) => None,
            Far::Wire(wire) => Some(wire),
        }
    }

    /// Reads the client's line, and not a byte beyond: what follows is for the guest.
    pub(super) fn greet(&mut self) -> Greeting {
        let Phase::Greeting(line) = &mut self.phase else {
            return Greeting::Rubbish;
        };
        loop {
            let mut byte = [0];
            match unistd::read(&self.far, &mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if line.len() < LINE_MAX => line.extend(byte),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Greeting::Unfinished,
                _ => return Greeting::Rubbish,
            }
        }
        let port = std::str::from_utf8(line)
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT ")?.trim_end().parse().ok());
        port.map_or(Greeting::Rubbish, Greeting::Port)
    }

    /// The guest has accepted: says so to the client.
    pub(super) fn open(&mut self, host_port: u32) -> io::Result<()> {
        self.phase = Phase::Open;
        let line = format!("OK {host_port}\n");
        // The first bytes on this socket; a socket that has no room for them is no use.
        if unistd::write(&self.far, line.as_bytes())? != line.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    /// Learns from any packet of the guest how much more it can take.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_fwd = header.fwd_cnt;
        self.asked = false;
    }

    /// Bytes the guest can take.
    pub(super) fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd);
        self.peer_alloc.saturating_sub(in_flight) as usize
    }

    /// True once when the credit has run out: the guest should be asked for more.
    pub(super) fn should_ask(&mut self) -> bool {
        self.credit() == 0 && !std::mem::replace(&mut self.asked, true)
    }

    /// `count` bytes have gone to the guest.
    pub(super) fn count_sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// Bytes of the guest that the client has taken; the guest is told with the packet this goes into.
    pub(super) fn tell_forwarded(&mut self) -> u32 {
        self.told = self.forwarded();
        self.told
    }

    /// Whether the guest may be waiting for room that it does not know of.
    pub(super) fn should_tell(&self) -> bool {
        let believed_free = BUF_ALLOC.saturating_sub(self.received.wrapping_sub(self.told));
        believed_free < BUF_ALLOC / 2 && self.forwarded() != self.told
    }

    /// Takes `len` bytes of the guest, behind `offset` in its buffers.
    pub(super) fn take(
        &mut self,
        from: &Segments<'_>,
        offset: usize,
        len: u32,
    ) -> Result<(), Overrun> {
        let count = len as usize;
        if self.to_client.len() + count > BUF_ALLOC as usize {
            return Err(Overrun);
        }
        let mut bytes = vec![0; count];
        if from.read_at(offset, &mut bytes) != count {
            return Err(Overrun);
        }
        // A client that is gone takes nothing; the guest will learn that from the next write.
        self.to_client.extend(bytes);
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Gives the client what it takes, and its end of file when the guest has sent everything.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if let Far::Wire(wire) = &mut self.far {
            return Ok(wire.take(&mut self.to_client)?);
        }
        while !self.to_client.is_empty() {
            let (bytes, _) = self.to_client.as_slices();
            match unistd::write(&self.far, bytes) {
                Ok(count) => drop(self.to_client.drain(..count)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        if self.guest_shut & NO_SEND != 0 && !std::mem::replace(&mut self.write_shut, true) {
            shutdown(self.far.as_fd().as_raw_fd(), Shutdown::Write)?;
        }
        Ok(())
    }

    /// Bytes for the guest; none at the client's end.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> Result<usize, Errno> {
        match &mut self.far {
            Far::Client(stream) => unistd::read(stream, bytes),
            Far::Wire(wire) => wire.read(bytes),
        }
    }

    /// The guest has closed its socket and the client has everything it sent; or no reply can follow.
    pub(super) fn finished(&self) -> bool {
        match &self.far {
            Far::Client(_) => self.guest_shut & NOTHING == NOTHING && self.to_client.is_empty(),
            Far::Wire(wire) => {
                self.guest_shut & NO_RECEIVE != 0 || self.guest_shut & NO_SEND != 0 && wire.idle()
            }
        }
    }

    /// Whether nobody would miss it: the client has not been connected yet, or has left.
    pub(super) fn expendable(&self) -> bool {
        !matches!(self.phase, Phase::Open) || self.client_done
    }

    /// What to wait for at the far end. Nothing means: not even a hang-up, which would be reported without end.
    pub(super) fn wants(&self, guest_has_buffers: bool) -> EpollFlags {
        if let Far::Wire(wire) = &self.far {
            return wire.wants();
        }
        let mut wants = EpollFlags::empty();
        match self.phase {
            Phase::Greeting(_) => wants |= EpollFlags::EPOLLIN,
            Phase::Requested => {}
            Phase::Open => {
                let guest_reads =
                    self.guest_shut & NO_RECEIVE == 0 && self.credit() > 0 && guest_has_buffers;
                wants.set(EpollFlags::EPOLLIN, guest_reads && !self.client_done);
                wants.set(EpollFlags::EPOLLOUT, !self.to_client.is_empty());
            }
        }
        wants
    }

    fn forwarded(&self) -> u32 {
        self.received.wrapping_sub(self.to_client.len() as u32)
    }
}

impl AsFd for Far {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Client(stream) => stream.as_fd(),
            Self::Wire(wire) => wire.as_fd(),
        }
    }
}

/// `CONNECT` and a port.
const LINE_MAX: usize = 32;
