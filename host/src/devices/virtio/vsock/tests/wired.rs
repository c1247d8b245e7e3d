//! The guest's connections to a wired port, with the other end of its channel in the test.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use super::*;

const WIRED: u32 = 0x53_4e50;
const REQUEST_LEN: usize = 4104;
const REPLY_MAX: usize = 70_000;

/// Who answers.
struct Peer(OwnedFd);

impl Peer {
    fn request(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 2 * REQUEST_LEN];
        let taken = recv(self.0.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT);
        taken.ok().map(|len| packet[..len].to_vec())
    }

    #[track_caller]
    fn expect(&self, mark: u8) {
        assert!(self.request() == Some(vec![mark; REQUEST_LEN]));
    }

    fn reply(&self, packet: &[u8]) {
        let sent = send(self.0.as_raw_fd(), packet, MsgFlags::MSG_DONTWAIT);
        assert_eq!(sent, Ok(packet.len()));
    }
}

fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).expect("a pair")
}

fn wired(port: u32, channel: OwnedFd) -> WiredPort {
    WiredPort {
        port,
        channel,
        request_len: REQUEST_LEN,
        reply_max: REPLY_MAX,
    }
}

/// A device whose port [`WIRED`] leads to the peer; 24 buffers for the guest to receive in.
fn wired_rig() -> (Rig, Peer) {
    let mut rig = rig();
    let (ours, theirs) = pair(SockType::SeqPacket);
    let fresh = device(&rig.directory);
    let mut vsock = fresh.with_wired(wired(WIRED, ours)).expect("free");
    vsock.activate(rig.driver.activation(vsock.features()));
    vsock.acquire().expect("always");
    rig.vsock = vsock;
    rig.offer(24);
    (rig, Peer(theirs))
}

impl Rig {
    /// Opens a connection from [`PORT`].
    fn connect(&mut self) {
        self.forwarded = 0;
        self.send(WIRED, REQUEST, b"");
        let accepted = self.receive_op(RESPONSE);
        let ports = (accepted.src_port, accepted.dst_port, accepted.buf_alloc);
        assert_eq!(ports, (WIRED, PORT, BUF_ALLOC));
    }

    /// What the guest has got, with new buffers as it goes; anything but data ends it.
    fn gather(&mut self) -> Vec<u8> {
        let mut data = Vec::new();
        self.turn();
        while let Some((header, bytes)) = self.receive() {
            assert_eq!((header.op, header.src_port), (RW, WIRED), "{header:?}");
            self.forwarded = self.forwarded.wrapping_add(header.len);
            data.extend(bytes);
            self.offer(1);
            self.turn();
        }
        data
    }

    fn exchanges(&mut self, peer: &Peer, mark: u8) {
        self.send(WIRED, RW, &[mark; REQUEST_LEN]);
        self.turn();
        peer.expect(mark);
        let reply = numbered(20_000, mark);
        peer.reply(&reply);
        assert!(self.gather() == reply, "the reply is another");
    }
}

fn numbered(len: usize, mark: u8) -> Vec<u8> {
    let number = |at: usize| (at / 7) as u8 ^ mark;
    (0..len).map(number).collect()
}

#[test]
fn a_request_goes_out_whole_and_its_reply_comes_back_whole() {
    let (mut rig, peer) = wired_rig();
    rig.connect();
    rig.exchanges(&peer, 1);
    rig.exchanges(&peer, 2);
    // In pieces.
    let request = numbered(REQUEST_LEN, 3);
    for piece in [&request[..1], &request[1..8], &request[8..4103]] {
        rig.send(WIRED, RW, piece);
        rig.turn();
        assert!(peer.request().is_none());
    }
    rig.send(WIRED, RW, &request[4103..]);
    assert!(peer.request() == Some(request));
    let longest = numbered(REPLY_MAX, 4);
    peer.reply(&longest);
    assert!(rig.gather() == longest);
    assert_eq!(rig.vsock.faults(), 0);
    rig.shut(WIRED, NOTHING);
    assert_eq!(rig.receive_op(RST).src_port, WIRED);
    rig.connect();
    rig.exchanges(&peer, 5);
}

#[test]
fn only_one_request_is_under_way() {
    let (mut rig, peer) = wired_rig();
    rig.connect();
    let both = [numbered(REQUEST_LEN, 1), numbered(REQUEST_LEN, 2)].concat();
    rig.send(WIRED, RW, &both[..5000]);
    rig.send(WIRED, RW, &both[5000..]);
    rig.turn();
    assert!(peer.request().as_deref() == Some(&both[..REQUEST_LEN]));
    rig.turn();
    assert!(peer.request().is_none());
    peer.reply(b"first");
    rig.vsock.fd_event(0);
    assert!(peer.request().as_deref() == Some(&both[REQUEST_LEN..]));
    assert_eq!(rig.gather(), b"first");
    peer.reply(b"second");
    assert_eq!(rig.gather(), b"second");
}

#[test]
fn more_than_the_credit_ends_the_connection_and_no_other() {
    let (mut rig, peer) = wired_rig();
    rig.connect();
    // One request is taken; what follows it waits, up to the credit.
    let waiting = BUF_ALLOC as usize / 0x8000;
    rig.send(WIRED, RW, &[1; REQUEST_LEN]);
    for _ in 0..waiting {
        rig.send(WIRED, RW, &[2; 0x8000]);
    }
    assert_eq!(rig.vsock.faults(), 0);
    rig.send(WIRED, RW, &[2; 1]);
    assert_eq!(rig.vsock.faults(), 1);
    rig.receive_op(CREDIT_UPDATE);
    assert_eq!(rig.receive_op(RST).src_port, WIRED);
    peer.expect(1);
    peer.reply(b"late");
    rig.connect();
    rig.exchanges(&peer, 3);
}

#[test]
fn other_ports_and_second_connections_are_reset() {
    let (mut rig, peer) = wired_rig();
    rig.send(WIRED + 1, REQUEST, b"");
    assert_eq!(rig.receive_op(RST).src_port, WIRED + 1);
    rig.send(WIRED, RW, b"nobody has connected");
    rig.receive_op(RST);
    let datagram = Header {
        kind: 3,
        ..rig.header(WIRED, REQUEST, 0)
    };
    rig.send_raw(datagram, &[]);
    rig.receive_op(RST);
    rig.connect();
    let second = Header {
        src_port: PORT + 1,
        ..rig.header(WIRED, REQUEST, 0)
    };
    rig.send_raw(second, &[]);
    let reset = rig.receive_op(RST);
    assert_eq!((reset.src_port, reset.dst_port), (WIRED, PORT + 1));
    let intruder = Header {
        src_port: PORT + 1,
        ..rig.header(WIRED, RW, 4)
    };
    rig.send_raw(intruder, b"mine");
    rig.receive_op(RST);
    while rig.driver.used(1).is_some() {}
    rig.exchanges(&peer, 1);
    // A client of the host is no business of the wire.
    let (mut client, port) = rig.connected();
    rig.send(port, RW, b"HELLO");
    assert_eq!(read(&mut client, 5), b"HELLO");
    rig.exchanges(&peer, 2);
}

#[test]
fn a_guest_that_stops_half_way_loses_its_connection_only() {
    let leave: [fn(&mut Rig); 4] = [
        |rig| rig.send(WIRED, RST, b""),
        |rig| rig.shut(WIRED, NOTHING),
        |rig| rig.shut(WIRED, NO_SEND),
        |rig| rig.send(WIRED, 99, b""),
    ];
    for (case, leave) in leave.into_iter().enumerate() {
        let (mut rig, peer) = wired_rig();
        rig.connect();
        rig.send(WIRED, RW, &[1; REQUEST_LEN - 1]);
        leave(&mut rig);
        if case > 0 {
            assert_eq!(rig.receive_op(RST).src_port, WIRED, "case {case}");
        }
        rig.turn();
        assert!(peer.request().is_none(), "case {case}");
        rig.connect();
        rig.exchanges(&peer, 2);
    }
}

#[test]
fn a_reply_to_a_connection_that_is_gone_is_nobodys() {
    let leave: [fn(&mut Rig); 3] = [
        |rig| rig.send(WIRED, RST, b""),
        |rig| {
            rig.shut(WIRED, NO_RECEIVE);
            rig.receive_op(RST);
        },
        |rig| {
            // The driver starts anew.
            assert_eq!(rig.vsock.faults(), 0);
            rig.vsock.reset();
            rig.driver = Driver::new(3);
            rig.buffers.clear();
            rig.vsock.activate(rig.driver.activation(0));
            rig.offered = 0;
            rig.offer(24);
        },
    ];
    for leave in leave {
        let (mut rig, peer) = wired_rig();
        rig.connect();
        rig.send(WIRED, RW, &[1; REQUEST_LEN]);
        peer.expect(1);
        leave(&mut rig);
        rig.connect();
        rig.send(WIRED, RW, &[2; REQUEST_LEN]);
        rig.turn();
        assert!(peer.request().is_none(), "two requests are under way");
        // The next to leave does not make it two either.
        rig.send(WIRED, RST, b"");
        rig.connect();
        rig.send(WIRED, RW, &[3; REQUEST_LEN]);
        peer.reply(b"for the first");
        assert_eq!(rig.gather(), b"");
        peer.expect(3);
        peer.reply(b"for the third");
        assert_eq!(rig.gather(), b"for the third");
    }
}

#[test]
fn a_guest_that_has_sent_its_last_still_gets_its_reply() {
    let (mut rig, peer) = wired_rig();
    rig.connect();
    rig.send(WIRED, RW, &[1; REQUEST_LEN]);
    rig.shut(WIRED, NO_SEND);
    rig.turn();
    assert!(rig.receive().is_none());
    assert!(peer.request().is_some());
    peer.reply(b"here");
    rig.turn();
    assert_eq!(rig.receive().map(|(_, data)| data), Some(b"here".to_vec()));
    assert_eq!(rig.receive_op(RST).src_port, WIRED);
    rig.connect();
    rig.exchanges(&peer, 2);
}

#[test]
fn nobody_at_the_other_end_closes_the_port() {
    for under_way in [false, true] {
        let (mut rig, peer) = wired_rig();
        rig.connect();
        if under_way {
            rig.send(WIRED, RW, &[1; REQUEST_LEN]);
            peer.expect(1);
        }
        drop(peer);
        rig.turn();
        assert_eq!(rig.receive_op(RST).src_port, WIRED);
        rig.send(WIRED, REQUEST, b"");
        assert_eq!(rig.receive_op(RST).src_port, WIRED);
        assert!(rig.vsock.wires.is_empty());
    }
    // Gone while there was no connection.
    let (mut rig, peer) = wired_rig();
    drop(peer);
    rig.connect();
    rig.send(WIRED, RW, &[1; REQUEST_LEN]);
    rig.turn();
    assert_eq!(rig.receive_op(RST).src_port, WIRED);
    assert!(rig.vsock.wires.is_empty() && rig.vsock.connections.is_empty());
    assert_eq!(rig.vsock.faults(), 0);
}

#[test]
fn an_end_that_breaks_the_rules_is_cut_off() {
    let (mut rig, peer) = wired_rig();
    rig.connect();
    rig.send(WIRED, RW, &[1; REQUEST_LEN]);
    peer.reply(&vec![1; REPLY_MAX + 1]);
    rig.turn();
    assert_eq!(rig.receive_op(RST).src_port, WIRED);
    assert!(rig.vsock.wires.is_empty());

    let (mut rig, peer) = wired_rig();
    rig.connect();
    peer.reply(b"nobody asked");
    rig.turn();
    assert_eq!(rig.receive_op(RST).src_port, WIRED);
    assert!(rig.vsock.wires.is_empty());
}

#[test]
fn a_reply_waits_for_room_and_buffers() {
    let (mut rig, peer) = wired_rig();
    rig.alloc = 3000;
    rig.connect();
    rig.send(WIRED, RW, &[1; REQUEST_LEN]);
    let reply = numbered(10_000, 1);
    peer.reply(&reply);
    rig.turn();
    let mut got = Vec::new();
    loop {
        while let Some((header, bytes)) = rig.receive() {
            if header.op == RW {
                got.extend(bytes);
            } else {
                assert_eq!(header.op, CREDIT_REQUEST, "{header:?}");
            }
        }
        assert!(
            got.len() as u32 - rig.forwarded <= 3000,
            "beyond the credit"
        );
        if got.len() == reply.len() {
            break;
        }
        rig.forwarded = got.len() as u32;
        rig.send(WIRED, CREDIT_UPDATE, b"");
    }
    assert!(got == reply);
    assert_eq!(rig.vsock.faults(), 0);

    // Without buffers it waits, and nothing spins.
    let (mut rig, peer) = wired_rig();
    rig.connect();
    rig.send(WIRED, RW, &[1; REQUEST_LEN]);
    let reply = numbered(REPLY_MAX, 2);
    peer.reply(&reply);
    rig.vsock.fd_event(0);
    let mut got = Vec::new();
    while let Some((_, bytes)) = rig.receive() {
        got.extend(bytes);
    }
    assert_eq!(got.len(), 23 * 2986);
    let waiting = nix::poll::PollFd::new(
        std::os::fd::AsFd::as_fd(&rig.vsock.epoll.0),
        nix::poll::PollFlags::POLLIN,
    );
    assert_eq!(nix::poll::poll(&mut [waiting], 0u8), Ok(0), "it spins");
    rig.vsock.release().expect("always");
    rig.offer(4);
    assert!(rig.receive().is_none(), "the guest is being moved");
    rig.vsock.acquire().expect("always");
    while let Some((_, bytes)) = rig.receive() {
        got.extend(bytes);
    }
    assert!(got == reply);

    // A guest that had no room before the reply came is asked for it.
    let (mut rig, peer) = wired_rig();
    rig.alloc = 0;
    rig.connect();
    rig.send(WIRED, RW, &[1; REQUEST_LEN]);
    peer.reply(b"reply");
    rig.turn();
    rig.receive_op(CREDIT_REQUEST);
    assert!(rig.receive().is_none(), "asks once");
    rig.alloc = 1 << 20;
    rig.send(WIRED, CREDIT_UPDATE, b"");
    assert_eq!(rig.gather(), b"reply");
}

#[test]
fn a_paused_device_moves_nothing() {
    let (mut rig, peer) = wired_rig();
    rig.connect();
    rig.vsock.release().expect("always");
    rig.send(WIRED, RW, &[1; REQUEST_LEN]);
    rig.turn();
    assert!(peer.request().is_none());
    rig.vsock.acquire().expect("always");
    peer.expect(1);
    peer.reply(b"here");
    rig.vsock.release().expect("always");
    rig.turn();
    assert!(rig.receive().is_none());
    rig.vsock.acquire().expect("always");
    assert_eq!(rig.gather(), b"here");
}

#[test]
fn a_guest_that_has_moved_connects_when_it_knows() {
    let (mut rig, _peer) = wired_rig();
    rig.connect();
    rig.vsock.release().expect("always");
    let (ours, peer) = pair(SockType::SeqPacket);
    let fresh = device(&rig.directory);
    let mut arrived = fresh.with_wired(wired(WIRED, ours)).expect("free");
    arrived.restore(&rig.vsock.save()).expect("the same device");
    arrived.activate(Activation {
        queues: rig.vsock.queues(),
        ..rig.driver.activation(0)
    });
    rig.vsock = arrived;
    rig.vsock.acquire().expect("always");
    rig.send(WIRED, RW, b"on the connection of before");
    rig.receive_op(RST);
    rig.send(WIRED, REQUEST, b"");
    rig.receive_op(RST);
    rig.driver.offer(2, &[Buffer::write(0x2f_0000, 4)]);
    rig.vsock.announce();
    rig.send(WIRED, REQUEST, b"");
    rig.receive_op(RST);
    rig.driver.offer(2, &[Buffer::write(0x2f_0000, 4)]);
    rig.vsock.queue_event(2);
    assert_eq!(rig.vsock.arrival, Arrival::Settled);
    rig.connect();
    rig.exchanges(&Peer(peer), 1);
}

#[test]
fn only_free_ports_and_packets_are_wired() {
    let directory = tempfile::tempdir().expect("a directory");
    let channel = || pair(SockType::SeqPacket).0;
    for port in [PORT_MIN, PORT_MAX, u32::MAX] {
        assert!(
            device(&directory)
                .with_wired(wired(port, channel()))
                .is_err()
        );
    }
    let stream = pair(SockType::Stream).0;
    assert!(device(&directory).with_wired(wired(WIRED, stream)).is_err());
    let once = device(&directory).with_wired(wired(WIRED, channel()));
    let once = once.expect("free");
    assert!(once.with_wired(wired(WIRED, channel())).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever the guest does with the port: the device stands, and the other end has at most one request to answer.
    #[test]
    fn no_guest_makes_a_wire_fall(
        packets in prop::collection::vec((0u16..9, 0u32..3, 0u32..4, 0usize..4, 0usize..0x3000, any::<bool>()), 1..40),
    ) {
        let (mut rig, peer) = wired_rig();
        let mut open = 0;
        for (op, from, flags, len, data, answers) in packets {
            let len = [data as u32, data as u32, u32::MAX, 0][len];
            let header = Header { src_port: PORT + from / 2, flags, ..rig.header(WIRED, op, len) };
            rig.send_raw(header, &vec![1; data]);
            while rig.driver.used(1).is_some() {}
            rig.turn();
            while let Some(request) = peer.request() {
                prop_assert_eq!(request.len(), REQUEST_LEN);
                open += 1;
            }
            prop_assert!(open <= 1);
            if answers && open == 1 {
                peer.reply(&numbered(5000, 1));
                open = 0;
                rig.turn();
            }
            while let Some((header, _)) = rig.receive() {
                if header.op == RW {
                    rig.forwarded = rig.forwarded.wrapping_add(header.len);
                }
                rig.offer(1);
            }
            prop_assert_eq!(rig.vsock.connections.len() + rig.vsock.wires.len(), 1);
        }
        if peer.request().is_some() || open == 1 {
            peer.reply(b"the last");
        }
        rig.send(WIRED, RST, b"");
        let second = Header { src_port: PORT + 1, ..rig.header(WIRED, RST, 0) };
        rig.send_raw(second, &[]);
        while rig.driver.used(1).is_some() {}
        while rig.receive().is_some() {
            rig.offer(1);
        }
        rig.alloc = 1 << 20;
        rig.connect();
        rig.exchanges(&peer, 7);
    }
}
