//! The virtio socket device (specification section 5.10), all of it in this process: local clients reach ports of
//! the guest through a Unix socket.
//!
//! A client connects, writes `CONNECT <port>\n`, reads `OK <port>\n` when the guest has accepted (Firecracker's
//! protocol), and then has a byte stream. The guest can connect to the ports of the host that were wired when the
//! device was made ([`WiredPort`]), and to no other. Neither clients nor the guest are believed: connections, buffers
//! and pending replies are bounded, and what makes no sense is reset.

mod connection;
mod device;
mod packet;
mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{SockFlag, accept4};

use self::connection::{BUF_ALLOC, Connection, Greeting, Overrun, Phase};
use self::packet::{
    CREDIT_REQUEST, CREDIT_UPDATE, HEADER, HOST_CID, Header, NO_SEND, NOTHING, REQUEST, RESPONSE,
    RST, RW, SHUTDOWN, STREAM, TRANSPORT_RESET,
};
use self::wire::Wire;
use super::ring::{Active, Chain};

pub use self::wire::WiredPort;

/// A virtio socket device for connections that the host starts, and for those of the guest to wired ports.
///
/// Connections do not survive a move: the guest is told so by [`super::VirtioDevice::announce`], and until it has
/// heard it, new clients wait. Nothing moves between [`super::VirtioDevice::release`] and
/// [`super::VirtioDevice::acquire`].
pub struct Vsock {
    cid: u64,
    listener: UnixListener,
    epoll: Epoll,
    listening: bool,
    /// No descriptor was left for the last client; none is accepted before a connection ends.
    full: bool,
    active: Option<Active>,
    held: bool,
    arrival: Arrival,
    /// By the port at the host's end, which is never the same for two.
    connections: BTreeMap<u32, Connection>,
    /// The wired ports that no connection uses, all below [`PORT_MIN`].
    wires: BTreeMap<u32, Wire>,
    next_port: u32,
    next_serial: u64,
    /// Packets without data that wait for a buffer of the guest.
    replies: VecDeque<Header>,
    /// The guest has no receive buffers.
    starved: bool,
    /// The state to come was another guest's.
    copy: bool,
    /// Packets of the guest wait until it takes replies.
    held_back: bool,
    scratch: Box<[u8]>,
}

/// After a move: whether the guest knows that its connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    /// There is nothing to tell.
    Settled,
    /// Restored, but not yet announced.
    Arrived,
    /// The guest must be told, and has no buffer for it.
    Due,
    /// The guest has been told, and has not looked yet.
    Told,
}

impl Vsock {
    /// A device for the guest with context id `cid`, reached through `listener`.
    ///
    /// # Errors
    ///
    /// If the listener cannot be made non-blocking, or no epoll instance can be had.
    pub fn new(cid: u32, listener: UnixListener) -> io::Result<Vsock> {
        listener.set_nonblocking(true)?;
        Ok(Vsock {
            cid: u64::from(cid),
            listener,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            listening: false,
            full: false,
            active: None,
            held: false,
            arrival: Arrival::Settled,
            connections: BTreeMap::new(),
            wires: BTreeMap::new(),
            next_port: PORT_MIN,
            next_serial: 0,
            replies: VecDeque::new(),
            starved: false,
            copy: false,
            held_back: false,
            scratch: vec![0; PACKET_MAX].into_boxed_slice(),
        })
    }

    /// Ends every event: sends what can be sent, goes on with the guest's packets, and watches the right descriptors.
    fn settle(&mut self) {
        loop {
            self.send_replies();
            self.turn_wires();
            self.send_replies();
            if !self.held_back || self.replies.len() >= REPLIES_MAX {
                break;
            }
            self.take_packets();
        }
        self.watch();
    }

    /// Takes packets from the guest until there are none, or too many replies to them wait.
    fn take_packets(&mut self) {
        let Some(mut active) = self.active.take() else {
            return;
        };
        if let Some(ring) = active.rings.get_mut(TX).filter(|_| self.held) {
            loop {
                self.held_back = self.replies.len() >= REPLIES_MAX;
                if self.held_back {
                    break;
                }
                match ring.pop(&active.ram, CHAIN_MAX) {
                    Some(chain) => {
                        if !chain.broken && self.take_packet(&chain).is_err() {
                            ring.fault();
                        }
                        ring.push(&active.ram, &chain, 0);
                    }
                    None if ring.listen(&active.ram) => {}
                    None => break,
                }
            }
            ring.signal(&active.ram, active.interrupt.as_ref());
        }
        self.active = Some(active);
    }

    /// One packet of the guest. An error is a packet that no correct driver sends.
    fn take_packet(&mut self, chain: &Chain<'_>) -> Result<(), Nonsense> {
        let mut bytes = [0; HEADER];
        if chain.readable.read_at(0, &mut bytes) != HEADER {
            return Err(Nonsense);
        }
        let header = Header::parse(&bytes);
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return Err(Nonsense);
        }
        let connection = self.connections.get_mut(&header.dst_port);
        let Some(connection) =
            connection.filter(|known| known.guest_port == header.src_port && header.kind == STREAM)
        else {
            if self.connect_wire(&header) {
                return Ok(());
            }
            if header.op != RST {
                self.reply_to(&header, RST);
            }
            return if header.kind == STREAM {
                Ok(())
            } else {
                Err(Nonsense)
            };
        };
        connection.learn_credit(&header);
        let result = match (header.op, &connection.phase) {
            (_, Phase::Greeting(_)) => Err(Nonsense),
            (RESPONSE, Phase::Requested) => {
                if connection.open(header.dst_port).is_err() {
                    self.abort(header.dst_port);
                }
                return Ok(());
            }
            (RST, _) => {
                // What the client has not read yet it still gets, as far as its socket has room.
                let _gone = connection.flush();
                self.forget(header.dst_port);
                return Ok(());
            }
            (RW, Phase::Open) if connection.guest_shut & NO_SEND == 0 => connection
                .take(&chain.readable, HEADER, header.len)
                .map_err(Nonsense::from),
            (SHUTDOWN, Phase::Open) => {
                connection.guest_shut |= header.flags & NOTHING;
                Ok(())
            }
            (CREDIT_UPDATE, Phase::Open) => Ok(()),
            (CREDIT_REQUEST, Phase::Open) => {
                self.reply_to(&header, CREDIT_UPDATE);
                Ok(())
            }
            _ => Err(Nonsense),
        };
        match result {
            Ok(()) => self.forward(header.dst_port),
            Err(Nonsense) => self.abort(header.dst_port),
        }
        result
    }

    /// Gives the far end what waits for it, and draws the consequences.
    fn forward(&mut self, port: u32) {
        let Some(connection) = self.connections.get_mut(&port) else {
            return;
        };
        if connection.flush().is_err() || connection.finished() {
            self.abort(port);
        } else if connection.should_tell() {
            let guest_port = connection.guest_port;
            // Once: the reply is made up to date when it is sent, and until then this stays true.
            if !self
                .replies
                .iter()
                .any(|reply| reply.op == CREDIT_UPDATE && reply.src_port == port)
            {
                self.reply(port, guest_port, CREDIT_UPDATE, 0);
            }
        }
    }

    /// From the far end to the guest.
    fn deliver(&mut self, port: u32, hung_up: bool) {
        let Some(mut active) = self.active.take() else {
            return;
        };
        if let Some(ring) = active.rings.get_mut(RX) {
            for _ in 0..BURST {
                let Some(connection) = self.connections.get_mut(&port) else {
                    break;
                };
                let guest_port = connection.guest_port;
                if connection.credit() == 0 {
                    if connection.should_ask() {
                        self.reply(port, guest_port, CREDIT_REQUEST, 0);
                    }
                    break;
                }
                let Some(chain) = ring.pop(&active.ram, CHAIN_MAX) else {
                    self.starved = !ring.listen(&active.ram);
                    break;
                };
                let header = packet_to(self.cid, port, guest_port, RW, 0, 0);
                match fill(&chain, header, connection, &mut self.scratch) {
                    Err(Errno::ENOBUFS) => {
                        ring.fault();
                        ring.push(&active.ram, &chain, 0);
                    }
                    Err(Errno::EAGAIN) => {
                        ring.unpop();
                        break;
                    }
                    Err(_) => {
                        ring.unpop();
                        self.abort(port);
                    }
                    Ok(0) => {
                        ring.unpop();
                        connection.client_done = true;
                        self.reply(
                            port,
                            guest_port,
                            SHUTDOWN,
                            if hung_up { NOTHING } else { NO_SEND },
                        );
                        break;
                    }
                    Ok(count) => ring.push(&active.ram, &chain, HEADER as u32 + count),
                }
            }
            ring.signal(&active.ram, active.interrupt.as_ref());
        }
        self.active = Some(active);
    }

    /// Sends the packets that wait, as long as the guest has buffers.
    fn send_replies(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let Some(ring) = active.rings.get_mut(RX) else {
            return;
        };
        while let Some(reply) = self.replies.front() {
            let Some(chain) = ring.pop(&active.ram, CHAIN_MAX) else {
                self.starved = !ring.listen(&active.ram);
                if self.starved {
                    break;
                }
                continue;
            };
            if chain.broken || chain.writable.len() < HEADER {
                if !chain.broken {
                    ring.fault();
                }
                ring.push(&active.ram, &chain, 0);
                continue;
            }
            let header = match self.connections.get_mut(&reply.src_port) {
                Some(connection) if connection.guest_port == reply.dst_port => {
                    stamp(*reply, connection)
                }
                _ => *reply,
            };
            chain.writable.write_at(0, &header.bytes());
            ring.push(&active.ram, &chain, HEADER as u32);
            self.replies.pop_front();
        }
        ring.signal(&active.ram, active.interrupt.as_ref());
    }

    /// A new client, if there is one.
    fn accept(&mut self) {
        for _ in 0..BURST {
            match accept4(
                self.listener.as_raw_fd(),
                SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            ) {
                Ok(fd) => self.admit(own(fd)),
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(Errno::EAGAIN) => break,
                Err(error) => {
                    tracing::warn!(%error, "a client of the guest's sockets was not accepted");
                    self.full = true;
                    break;
                }
            }
        }
    }

    /// Makes room for the client if nobody misses what is in its way; otherwise hangs up.
    fn admit(&mut self, stream: OwnedFd) {
        if self.connections.len() >= CONNECTIONS_MAX {
            let idle = self
                .connections
                .iter()
                .filter(|(_, connection)| connection.expendable());
            match idle
                .min_by_key(|(_, connection)| connection.serial)
                .map(|(port, _)| *port)
            {
                Some(oldest) => self.abort(oldest),
                None => return,
            }
        }
        while self.connections.contains_key(&self.next_port) {
            self.next_port = port_after(self.next_port);
        }
        self.connections
            .insert(self.next_port, Connection::new(stream, self.next_serial));
        self.next_port = port_after(self.next_port);
        self.next_serial += 1;
    }

    /// A client has written its line, or part of it.
    fn greet(&mut self, port: u32) {
        let Some(connection) = self.connections.get_mut(&port) else {
            return;
        };
        match connection.greet() {
            Greeting::Unfinished => {}
            Greeting::Rubbish => self.forget(port),
            Greeting::Port(guest_port) => {
                connection.guest_port = guest_port;
                connection.phase = Phase::Requested;
                self.reply(port, guest_port, REQUEST, 0);
            }
        }
    }

    /// Ends a connection at both ends.
    fn abort(&mut self, port: u32) {
        if let Some(connection) = self.connections.get(&port)
            && !matches!(connection.phase, Phase::Greeting(_))
        {
            self.reply(port, connection.guest_port, RST, 0);
        }
        self.forget(port);
    }

    /// Hangs up on the far end.
    fn forget(&mut self, port: u32) {
        if let Some(connection) = self.connections.remove(&port) {
            self.retire(port, connection);
        }
        self.full = false;
    }

    fn reply(&mut self, port: u32, guest_port: u32, op: u16, flags: u32) {
        self.replies
            .push_back(packet_to(self.cid, port, guest_port, op, flags, 0));
    }

    fn reply_to(&mut self, header: &Header, op: u16) {
        // The type is the sender's, so that it recognises what was refused.
        let reply = packet_to(self.cid, header.dst_port, header.src_port, op, 0, 0);
        self.replies.push_back(Header {
            kind: header.kind,
            ..reply
        });
    }

    /// Tells the guest that its connections are gone, if it must be told and has a buffer for it.
    fn tell_arrival(&mut self) {
        let Some(active) = self
            .active
            .as_mut()
            .filter(|_| self.held && self.arrival == Arrival::Due)
        else {
            return;
        };
        let Some(ring) = active.rings.get_mut(EVENT) else {
            return;
        };
        while let Some(chain) = ring.pop(&active.ram, CHAIN_MAX) {
            let written = if chain.broken {
                0
            } else {
                chain.writable.write_at(0, &TRANSPORT_RESET.to_le_bytes())
            };
            ring.push(&active.ram, &chain, written as u32);
            if written == size_of_val(&TRANSPORT_RESET) {
                self.arrival = Arrival::Told;
                break;
            }
        }
        // Notified of the buffer's return, we know that the guest has looked.
        ring.listen(&active.ram);
        ring.signal(&active.ram, active.interrupt.as_ref());
    }

    /// Tells the epoll instance what to wait for.
    fn watch(&mut self) {
        let accepting =
            self.arrival == Arrival::Settled && !self.full && self.replies.len() < REPLIES_MAX;
        if accepting != self.listening {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, LISTENER);
            let changed = match accepting {
                true => self.epoll.add(&self.listener, event),
                false => self.epoll.delete(&self.listener),
            };
            self.listening = accepting == changed.is_ok();
        }
        let mut lost = Vec::new();
        for (port, connection) in &mut self.connections {
            let wants = connection.wants(!self.starved);
            if wants == connection.watched {
                continue;
            }
            let mut event = EpollEvent::new(wants, u64::from(*port));
            let changed = if wants.is_empty() {
                self.epoll.delete(&connection.far)
            } else if connection.watched.is_empty() {
                self.epoll.add(&connection.far, event)
            } else {
                self.epoll.modify(&connection.far, &mut event)
            };
            connection.watched = wants;
            if changed.is_err() {
                lost.push(*port);
            }
        }
        lost.into_iter().for_each(|port| self.abort(port));
    }

    /// What has happened on the descriptors.
    fn poll(&mut self) {
        let mut events = [EpollEvent::empty(); BURST];
        let count = self.epoll.wait(&mut events, 0u8).unwrap_or(0);
        for event in events.iter().take(count) {
            if event.data() == LISTENER {
                self.accept();
                continue;
            }
            let Ok(port) = u32::try_from(event.data()) else {
                continue;
            };
            match self
                .connections
                .get(&port)
                .map(|connection| &connection.phase)
            {
                Some(Phase::Greeting(_)) => self.greet(port),
                Some(Phase::Open) if port < PORT_MIN => self.hear(port),
                Some(Phase::Open) => {
                    self.forward(port);
                    let hung_up = event
                        .events()
                        .intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
                    let readable = self
                        .connections
                        .get(&port)
                        .map(|connection| connection.wants(!self.starved));
                    if readable.is_some_and(|wants| wants.contains(EpollFlags::EPOLLIN)) {
                        self.deliver(port, hung_up);
                    }
                }
                Some(Phase::Requested) | None => {}
            }
        }
    }
}

/// A packet that no correct driver sends.
#[derive(Clone, Copy)]
struct Nonsense;

impl From<Overrun> for Nonsense {
    fn from(_: Overrun) -> Nonsense {
        Nonsense
    }
}

fn packet_to(cid: u64, port: u32, guest_port: u32, op: u16, flags: u32, len: u32) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: cid,
        src_port: port,
        dst_port: guest_port,
        len,
        kind: STREAM,
        op,
        flags,
        buf_alloc: BUF_ALLOC,
        fwd_cnt: 0,
    }
}

/// Fills a buffer of the guest with what the client sends next; how many bytes of data, none at the client's end.
///
/// ENOBUFS is a buffer that cannot hold a packet.
fn fill(
    chain: &Chain<'_>,
    header: Header,
    connection: &mut Connection,
    scratch: &mut [u8],
) -> Result<u32, Errno> {
    let room = chain.writable.len().saturating_sub(HEADER);
    if chain.broken || room == 0 {
        return Err(Errno::ENOBUFS);
    }
    let take = room.min(connection.credit()).min(scratch.len());
    let space = scratch.get_mut(..take).unwrap_or_default();
    let count = loop {
        match connection.read(space) {
            Err(Errno::EINTR) => {}
            result => break result?,
        }
    };
    let len = count as u32;
    if len > 0 {
        connection.count_sent(len);
        let header = stamp(Header { len, ..header }, connection);
        chain.writable.write_at(0, &header.bytes());
        chain
            .writable
            .write_at(HEADER, space.get(..count).unwrap_or_default());
    }
    Ok(len)
}

/// Puts the connection's credit into a packet that is about to leave.
fn stamp(header: Header, connection: &mut Connection) -> Header {
    Header {
        fwd_cnt: connection.tell_forwarded(),
        ..header
    }
}

fn port_after(port: u32) -> u32 {
    if port >= PORT_MAX { PORT_MIN } else { port + 1 }
}

#[expect(unsafe_code, reason = "accept4 of nix returns a bare number")]
fn own(fd: i32) -> OwnedFd {
    // SAFETY: accept4 has just returned this descriptor, and nothing else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const CONNECTIONS_MAX: usize = 64;
/// Replies that may wait before the guest's packets do.
const REPLIES_MAX: usize = 256;
/// Data in one packet to the guest.
const PACKET_MAX: usize = 64 << 10;
/// A packet of Linux: a header and up to 17 pages.
const CHAIN_MAX: usize = 32;
/// Packets to the guest, or new clients, before others get their turn.
const BURST: usize = 16;
/// Ports at the host's end: where the guest has no services, and no well-known numbers are.
const PORT_MIN: u32 = 1 << 30;
const PORT_MAX: u32 = (1 << 31) - 1;
const LISTENER: u64 = u64::MAX;

#[cfg(test)]
mod tests;
