//! Ports of the host that the guest may connect to: behind each is one end of a packet socket, and whoever holds the
//! other end answers there.
//!
//! The guest's bytes are a row of requests of one length. Each goes out as one packet, its reply comes back as one
//! packet, and the guest gets that packet's bytes; nobody here looks into either. The guest may send anything, stop
//! anywhere and leave at any time: it has one connection and one request at a time, and a reply that comes too late
//! is nobody's.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, SockType, getsockopt, recv, send, sockopt};

use super::connection::{Connection, Far};
use super::packet::{CREDIT_REQUEST, Header, REQUEST, RESPONSE, STREAM};
use super::{Arrival, PORT_MIN, Vsock};

/// A port of the host, and who answers there.
#[derive(Debug)]
pub struct WiredPort {
    /// Below 2^30, where the ports of connections that the host starts begin.
    pub port: u32,
    /// One end of a `SOCK_SEQPACKET` pair. Every packet sent is answered by one packet; a closed other end closes the
    /// port.
    pub channel: OwnedFd,
    /// Bytes of every request.
    pub request_len: usize,
    /// Bytes of the longest reply.
    pub reply_max: usize,
}

/// The way to who answers.
pub(super) struct Wire {
    port: WiredPort,
    turn: Turn,
    /// The reply to come is to a connection that is gone.
    stale: bool,
    /// The other end is gone, or breaks the rules.
    dead: bool,
}

/// Whose turn it is.
enum Turn {
    /// The guest's: its request, as far as it has come.
    Request(Vec<u8>),
    /// The other end's.
    Asked,
    /// What the guest has not got yet of the reply.
    Reply(VecDeque<u8>),
}

impl Vsock {
    /// The same device with a port of the host that the guest may connect to.
    ///
    /// # Errors
    ///
    /// If the port is one of the host's own or has a wire already, or the channel is no `SOCK_SEQPACKET`.
    pub fn with_wired(mut self, wired: WiredPort) -> io::Result<Vsock> {
        let port = wired.port;
        let packets = getsockopt(&wired.channel, sockopt::SockType)? == SockType::SeqPacket;
        if port >= PORT_MIN || !packets || self.wires.contains_key(&port) {
            let text = format!("port {port} cannot be wired: it is not free, or not to packets");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        self.wires.insert(port, Wire::new(wired));
        Ok(self)
    }

    /// Whether the packet opens a connection to a wired port, which then is in use. While the guest has yet to hear
    /// that its connections are gone, it would lose this one too.
    pub(super) fn connect_wire(&mut self, header: &Header) -> bool {
        let opens = header.op == REQUEST && header.kind == STREAM;
        if !opens || self.arrival != Arrival::Settled {
            return false;
        }
        // The wire of a connection is not here.
        let Some(wire) = self.wires.remove(&header.dst_port) else {
            return false;
        };
        let connection = Connection::wired(wire, header, self.next_serial);
        self.connections.insert(header.dst_port, connection);
        self.next_serial += 1;
        self.reply(header.dst_port, header.src_port, RESPONSE, 0);
        true
    }

    /// Goes on with requests and replies, as far as the guest and its buffers let it.
    pub(super) fn turn_wires(&mut self) {
        if self.active.is_none() || !self.held {
            return;
        }
        let wired = self.connections.range(..PORT_MIN);
        let wired: Vec<_> = wired.map(|(port, _)| *port).collect();
        for port in wired {
            self.forward(port);
            while self.can_reply(port) && !self.starved {
                self.deliver(port, false);
            }
            // The guest may have sent the next request, or its last.
            self.forward(port);
        }
    }

    /// A packet has come for a connection, or the other end has gone.
    pub(super) fn hear(&mut self, port: u32) {
        let wire = self.connections.get_mut(&port).and_then(Connection::wire);
        if wire.is_some_and(|wire| wire.receive().is_err()) {
            self.abort(port);
        }
    }

    /// What is left of a connection that is over: its wire waits for the next.
    pub(super) fn retire(&mut self, port: u32, connection: Connection) {
        let watched = !connection.watched.is_empty();
        let Far::Wire(wire) = connection.far else {
            return;
        };
        if watched && let Err(error) = self.epoll.delete(&wire) {
            tracing::warn!(port, %error, "a wired port of the guest's sockets stays watched");
        }
        if wire.dead {
            tracing::warn!(
                port,
                "a wired port of the guest's sockets has nobody behind it"
            );
        } else {
            self.wires.insert(port, wire.hung_up());
        }
    }

    /// Whether there is a reply, and the guest has room for some of it; if not, it is asked for room.
    fn can_reply(&mut self, port: u32) -> bool {
        let Some(connection) = self.connections.get_mut(&port) else {
            return false;
        };
        if !connection.wire().is_some_and(|wire| wire.replies()) {
            return false;
        }
        if connection.should_ask() {
            let guest_port = connection.guest_port;
            self.reply(port, guest_port, CREDIT_REQUEST, 0);
            return false;
        }
        connection.credit() > 0
    }
}

impl Wire {
    fn new(port: WiredPort) -> Wire {
        Wire {
            port,
            turn: Turn::Request(Vec::new()),
            stale: false,
            dead: false,
        }
    }

    /// Takes what belongs to the next request, and sends it when it is whole and nothing is under way.
    pub(super) fn take(&mut self, from: &mut VecDeque<u8>) -> Result<(), Errno> {
        let Turn::Request(request) = &mut self.turn else {
            return Ok(());
        };
        let missing = self.port.request_len.saturating_sub(request.len());
        request.extend(from.drain(..missing.min(from.len())));
        if request.len() < self.port.request_len || self.stale {
            return Ok(());
        }
        let channel = self.port.channel.as_raw_fd();
        match send(channel, request, NOT_WAITING | MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => self.turn = Turn::Asked,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return Err(self.die(error)),
        }
        Ok(())
    }

    /// Bytes of the reply for the guest; EAGAIN when there are none now.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> Result<usize, Errno> {
        let Turn::Reply(reply) = &mut self.turn else {
            return Err(Errno::EAGAIN);
        };
        let count = bytes.len().min(reply.len());
        for (to, from) in bytes.iter_mut().zip(reply.drain(..count)) {
            *to = from;
        }
        if reply.is_empty() {
            self.turn = Turn::Request(Vec::new());
        }
        Ok(count)
    }

    /// What to wait for on the channel: also that the other end goes.
    pub(super) fn wants(&self) -> EpollFlags {
        match &self.turn {
            Turn::Reply(_) => EpollFlags::empty(),
            Turn::Request(request) if !self.stale && request.len() >= self.port.request_len => {
                EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT
            }
            Turn::Request(_) | Turn::Asked => EpollFlags::EPOLLIN,
        }
    }

    /// Nothing is under way but part of a request.
    pub(super) fn idle(&self) -> bool {
        matches!(&self.turn, Turn::Request(request) if request.len() < self.port.request_len)
    }

    fn receive(&mut self) -> Result<(), Errno> {
        let mut packet = vec![0; self.port.reply_max];
        let channel = self.port.channel.as_raw_fd();
        // With MSG_TRUNC the count is the packet's own length.
        let len = match recv(channel, &mut packet, NOT_WAITING | MsgFlags::MSG_TRUNC) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            Err(error) => return Err(self.die(error)),
            Ok(0) => return Err(self.die(Errno::EPIPE)),
            Ok(len) if len > packet.len() => return Err(self.die(Errno::EMSGSIZE)),
            Ok(len) => len,
        };
        if std::mem::take(&mut self.stale) {
            return Ok(());
        }
        if !matches!(self.turn, Turn::Asked) {
            return Err(self.die(Errno::EPROTO));
        }
        packet.truncate(len);
        self.turn = Turn::Reply(packet.into());
        Ok(())
    }

    fn replies(&self) -> bool {
        matches!(self.turn, Turn::Reply(_))
    }

    /// For the next connection. Only one request is under way even then.
    fn hung_up(mut self) -> Wire {
        self.stale |= matches!(self.turn, Turn::Asked);
        self.turn = Turn::Request(Vec::new());
        self
    }

    fn die(&mut self, error: Errno) -> Errno {
        self.dead = true;
        error
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.channel.as_fd()
    }
}

const NOT_WAITING: MsgFlags = MsgFlags::MSG_DONTWAIT;
