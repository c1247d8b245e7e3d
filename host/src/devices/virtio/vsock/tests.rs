//! Clients on one side, a small driver on the other.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;

use super::super::driver::{Buffer, Driver};
use super::super::{Activation, VirtioDevice};
use super::packet::NO_RECEIVE;
use super::*;

mod wired;

const CID: u64 = 42;
const PORT: u32 = 1234;
const TX_BUFFER: u64 = 0x20_0000;
const RX_BUFFERS: u64 = 0x10_0000;

struct Rig {
    driver: Driver,
    vsock: Vsock,
    directory: tempfile::TempDir,
    buffers: HashMap<u16, u64>,
    offered: u64,
    alloc: u32,
    forwarded: u32,
}

fn device(directory: &tempfile::TempDir) -> Vsock {
    let path = directory.path().join("socket");
    let _stale = std::fs::remove_file(&path);
    Vsock::new(CID as u32, UnixListener::bind(path).expect("a socket")).expect("a device")
}

fn rig() -> Rig {
    let directory = tempfile::tempdir().expect("a directory");
    let mut vsock = device(&directory);
    let driver = Driver::new(3);
    vsock.activate(driver.activation(vsock.features()));
    vsock.acquire().expect("always");
    Rig {
        driver,
        vsock,
        directory,
        buffers: HashMap::new(),
        offered: 0,
        alloc: 1 << 20,
        forwarded: 0,
    }
}

impl Rig {
    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.directory.path().join("socket")).expect("listening");
        client
            .set_read_timeout(Some(Duration::from_millis(200)))
            .expect("a timeout");
        client
    }

    /// The device thread: polls what the device wants polled, as long as something happens.
    fn turn(&mut self) {
        for _ in 0..64 {
            if !self.vsock.poll_fds().is_empty() {
                self.vsock.fd_event(0);
            }
        }
    }

    fn offer(&mut self, count: u64) {
        for _ in 0..count {
            let addr = RX_BUFFERS + 0x2000 * (self.offered % 32);
            self.offered += 1;
            let head = self.driver.offer(
                0,
                &[Buffer::write(addr, 30), Buffer::write(addr + 0x1000, 3000)],
            );
            self.buffers.insert(head, addr);
        }
        self.vsock.queue_event(0);
    }

    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.driver.used(0)?;
        let addr = self.buffers[&head];
        let bytes = [
            self.driver.bytes(addr, 30),
            self.driver.bytes(addr + 0x1000, 3000),
        ]
        .concat();
        let header = Header::parse(bytes[..HEADER].try_into().expect("long enough"));
        assert_eq!(len, HEADER as u32 + header.len);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        Some((header, bytes[HEADER..len as usize].to_vec()))
    }

    fn receive_op(&mut self, op: u16) -> Header {
        let (header, _) = self
            .receive()
            .unwrap_or_else(|| panic!("no packet, {op} expected"));
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn header(&self, host_port: u32, op: u16, len: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: PORT,
            dst_port: host_port,
            len,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: self.alloc,
            fwd_cnt: self.forwarded,
        }
    }

    fn send_raw(&mut self, header: Header, data: &[u8]) {
        let mut chain = vec![Buffer::read(TX_BUFFER, &header.bytes())];
        chain.extend((!data.is_empty()).then(|| Buffer::read(TX_BUFFER + 0x1000, data)));
        self.driver.offer(1, &chain);
        self.vsock.queue_event(1);
    }

    fn send(&mut self, host_port: u32, op: u16, data: &[u8]) {
        let header = self.header(host_port, op, data.len() as u32);
        self.send_raw(header, data);
        while self.driver.used(1).is_some() {}
    }

    fn shut(&mut self, host_port: u32, flags: u32) {
        let header = Header {
            flags,
            ..self.header(host_port, SHUTDOWN, 0)
        };
        self.send_raw(header, &[]);
        while self.driver.used(1).is_some() {}
    }

    /// A client whose connection the guest has accepted, and the host's port.
    fn connected(&mut self) -> (UnixStream, u32) {
        let mut client = self.client();
        client.write_all(b"CONNECT 1234\n").expect("listening");
        self.offer(1);
        self.turn();
        let request = self.receive_op(REQUEST);
        assert_eq!(
            (request.dst_port, request.kind, request.buf_alloc),
            (PORT, STREAM, BUF_ALLOC)
        );
        self.send(request.src_port, RESPONSE, b"");
        let line = format!("OK {}\n", request.src_port);
        assert_eq!(read(&mut client, line.len()), line.as_bytes());
        (client, request.src_port)
    }
}

fn read(client: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    client.read_exact(&mut bytes).expect("data");
    bytes
}

fn at_end(client: &mut UnixStream) -> bool {
    match client.read(&mut [0; 16]) {
        Ok(0) => true,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => true,
        Ok(_) | Err(_) => false,
    }
}

#[test]
fn connects_and_echoes() {
    let mut rig = rig();
    let (mut client, port) = rig.connected();
    client.write_all(b"hello").expect("open");
    rig.offer(2);
    rig.driver.clear_dirty();
    rig.turn();
    let (header, data) = rig.receive().expect("data");
    assert_eq!(
        (header.op, header.len, header.src_port, header.dst_port),
        (RW, 5, port, PORT)
    );
    assert_eq!(data, b"hello");
    assert!(
        rig.driver.dirty().contains(&(RX_BUFFERS + 0x2000)),
        "written, not marked"
    );
    assert!(rig.driver.interrupts.take().contains(&0));
    rig.send(port, RW, b"HELLO");
    assert_eq!(read(&mut client, 5), b"HELLO");
    assert_eq!(rig.vsock.faults(), 0);
}

#[test]
fn bytes_behind_the_line_are_for_the_guest() {
    let mut rig = rig();
    let mut client = rig.client();
    client.write_all(b"CONNECT 1234\nearly").expect("listening");
    rig.offer(2);
    rig.turn();
    let port = rig.receive_op(REQUEST).src_port;
    rig.send(port, RESPONSE, b"");
    rig.turn();
    assert_eq!(rig.receive().map(|(_, data)| data), Some(b"early".to_vec()));
}

#[test]
fn a_guest_that_refuses_closes_the_client() {
    let mut rig = rig();
    let mut client = rig.client();
    client.write_all(b"CONNECT 1234\n").expect("listening");
    rig.offer(1);
    rig.turn();
    let port = rig.receive_op(REQUEST).src_port;
    rig.send(port, RST, b"");
    assert!(at_end(&mut client));
    assert!(rig.vsock.connections.is_empty());
}

#[test]
fn rubbish_lines_are_hung_up_on() {
    for line in [
        "HELLO\n",
        "CONNECT\n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "CONNECT 0000000000000000000000000000000001\n",
        "\n",
    ] {
        let mut rig = rig();
        let mut client = rig.client();
        client.write_all(line.as_bytes()).expect("listening");
        rig.offer(1);
        rig.turn();
        assert!(at_end(&mut client), "{line}");
        assert!(rig.receive().is_none(), "{line}");
    }
}

#[test]
fn the_guest_cannot_connect_and_nonsense_is_reset() {
    let mut rig = rig();
    rig.offer(8);
    rig.send(7, REQUEST, b"");
    assert_eq!(rig.receive_op(RST).src_port, 7);
    rig.send(7, RW, b"who?");
    rig.receive_op(RST);
    rig.send(7, RST, b"");
    assert!(rig.receive().is_none(), "a reset is not answered");
    assert_eq!(rig.vsock.faults(), 0);
    let datagram = Header {
        kind: 3,
        ..rig.header(7, RW, 0)
    };
    rig.send_raw(datagram, &[]);
    assert_eq!(rig.receive_op(RST).kind, 3);
    let stranger = Header {
        src_cid: 43,
        ..rig.header(7, RW, 0)
    };
    rig.send_raw(stranger, &[]);
    let elsewhere = Header {
        dst_cid: 3,
        ..rig.header(7, RW, 0)
    };
    rig.send_raw(elsewhere, &[]);
    assert!(rig.receive().is_none());
    assert_eq!(rig.vsock.faults(), 3);
}

#[test]
fn packets_out_of_place_end_the_connection() {
    let refused: [fn(&mut Rig, u32); 5] = [
        |rig, port| rig.send(port, RESPONSE, b""),
        |rig, port| rig.send(port, 99, b""),
        |rig, port| {
            let longer = rig.header(port, RW, 500);
            rig.send_raw(longer, b"short");
        },
        |rig, port| {
            let huge = rig.header(port, RW, u32::MAX);
            rig.send_raw(huge, b"short");
        },
        |rig, port| {
            rig.shut(port, NO_SEND);
            rig.send(port, RW, b"after the end");
        },
    ];
    for (case, wrong) in refused.into_iter().enumerate() {
        let mut rig = rig();
        let (mut client, port) = rig.connected();
        rig.offer(2);
        wrong(&mut rig, port);
        assert_eq!(rig.receive_op(RST).src_port, port, "case {case}");
        assert!(at_end(&mut client), "case {case}");
        assert_eq!(rig.vsock.faults(), 1, "case {case}");
    }
}

#[test]
fn never_sends_more_than_the_guest_has_room_for() {
    let mut rig = rig();
    rig.alloc = 1000;
    let (mut client, port) = rig.connected();
    client.write_all(&[7; 2500]).expect("room");
    rig.offer(8);
    rig.turn();
    assert_eq!(
        rig.receive().map(|(header, _)| (header.op, header.len)),
        Some((RW, 1000))
    );
    rig.receive_op(CREDIT_REQUEST);
    assert!(rig.receive().is_none(), "asks once");
    rig.forwarded = 600;
    rig.send(port, CREDIT_UPDATE, b"");
    rig.turn();
    assert_eq!(
        rig.receive().map(|(header, _)| (header.op, header.len)),
        Some((RW, 600))
    );
    rig.forwarded = 1600;
    rig.alloc = 4000;
    rig.receive_op(CREDIT_REQUEST);
    rig.send(port, CREDIT_UPDATE, b"");
    rig.turn();
    assert_eq!(
        rig.receive().map(|(header, _)| (header.op, header.len)),
        Some((RW, 900))
    );
    assert_eq!(rig.vsock.faults(), 0);
}

#[test]
fn holds_the_guest_to_its_credit() {
    let mut rig = rig();
    let (mut client, port) = rig.connected();
    rig.offer(16);
    // The client does not read: its socket takes some, the device keeps at most its buffer, then the guest is out of line.
    let (mut sent, mut told) = (0u32, 0u32);
    let chunk = [5; 0x8000];
    while sent - told + chunk.len() as u32 <= BUF_ALLOC {
        rig.send(port, RW, &chunk);
        sent += chunk.len() as u32;
        while let Some((header, _)) = rig.receive() {
            assert_eq!(header.op, CREDIT_UPDATE);
            told = header.fwd_cnt;
            rig.offer(1);
        }
        assert!(sent < 64 << 20, "the socket has no end");
    }
    assert_eq!(rig.vsock.faults(), 0);
    // The client reads: everything arrives, and the guest hears of the room.
    let reader = std::thread::spawn(move || {
        let bytes = read(&mut client, sent as usize);
        (client, bytes.iter().all(|byte| *byte == 5))
    });
    while !reader.is_finished() {
        rig.turn();
    }
    let (client, intact) = reader.join().expect("no panic");
    assert!(intact);
    rig.turn();
    let mut update = None;
    while let Some((header, _)) = rig.receive() {
        update = Some(header);
    }
    let update = update.expect("a credit update");
    assert_eq!(update.op, CREDIT_UPDATE);
    assert!(
        sent - update.fwd_cnt < BUF_ALLOC / 2,
        "{sent} {}",
        update.fwd_cnt
    );
    // Now too much: without a reader, one buffer more than there is credit.
    let mut port_gone = false;
    for _ in 0..4096 {
        rig.send(port, RW, &chunk);
        if rig.vsock.connections.is_empty() {
            port_gone = true;
            break;
        }
    }
    assert!(port_gone, "nobody stopped the guest");
    assert_eq!(rig.vsock.faults(), 1);
    drop(client);
}

#[test]
fn half_closes_in_both_directions() {
    let mut rig = rig();
    let (mut client, port) = rig.connected();
    rig.offer(4);
    client.write_all(b"question").expect("open");
    client.shutdown(std::net::Shutdown::Write).expect("open");
    rig.turn();
    assert_eq!(
        rig.receive().map(|(_, data)| data),
        Some(b"question".to_vec())
    );
    assert_eq!(rig.receive_op(SHUTDOWN).flags, NO_SEND);
    assert!(rig.receive().is_none(), "says so once");
    rig.send(port, RW, b"answer");
    rig.shut(port, NOTHING);
    assert_eq!(read(&mut client, 6), b"answer");
    assert!(at_end(&mut client));
    assert_eq!(rig.receive_op(RST).src_port, port);
    assert!(rig.vsock.connections.is_empty());
    assert_eq!(rig.vsock.faults(), 0);
}

#[test]
fn a_client_that_leaves_ends_the_connection() {
    let mut rig = rig();
    let (client, port) = rig.connected();
    rig.offer(4);
    drop(client);
    rig.turn();
    assert_eq!(rig.receive_op(SHUTDOWN).flags, NOTHING);
    rig.send(port, RW, b"nobody reads this");
    assert_eq!(rig.receive_op(RST).src_port, port);
    assert!(rig.vsock.connections.is_empty());
}

#[test]
fn waits_for_buffers_without_spinning() {
    let mut rig = rig();
    let mut client = rig.client();
    client.write_all(b"CONNECT 1234\nearly").expect("listening");
    rig.turn();
    assert_eq!(rig.vsock.replies.len(), 1);
    let pollable = nix::poll::poll(
        &mut [nix::poll::PollFd::new(
            std::os::fd::AsFd::as_fd(&rig.vsock.epoll.0),
            nix::poll::PollFlags::POLLIN,
        )],
        0u8,
    );
    assert_eq!(pollable, Ok(0), "the device thread would spin");
    rig.offer(1);
    rig.receive_op(REQUEST);
}

#[test]
fn replies_are_bounded_and_none_is_lost() {
    let mut rig = rig();
    for number in 0..REPLIES_MAX as u32 + 20 {
        let header = rig.header(number, RW, 0);
        rig.driver.offer(
            1,
            &[Buffer::read(
                TX_BUFFER + 64 * u64::from(number),
                &header.bytes(),
            )],
        );
        rig.vsock.queue_event(1);
        while rig.driver.used(1).is_some() {}
    }
    assert_eq!(rig.vsock.replies.len(), REPLIES_MAX);
    let mut ports = Vec::new();
    while ports.len() < REPLIES_MAX + 20 {
        rig.offer(8);
        while let Some((header, _)) = rig.receive() {
            assert_eq!(header.op, RST);
            ports.push(header.src_port);
        }
    }
    assert!(ports.iter().copied().eq(0..REPLIES_MAX as u32 + 20));
}

#[test]
fn connections_are_bounded_and_the_idle_go_first() {
    let mut rig = rig();
    let (_kept, _) = rig.connected();
    let mut idle: Vec<_> = (0..CONNECTIONS_MAX + 3).map(|_| rig.client()).collect();
    rig.turn();
    assert_eq!(rig.vsock.connections.len(), CONNECTIONS_MAX);
    assert!(at_end(&mut idle[0]), "the oldest idle client is evicted");
    assert_eq!(
        rig.vsock
            .connections
            .values()
            .filter(|one| matches!(one.phase, Phase::Open))
            .count(),
        1
    );
}

#[test]
fn a_move_resets_the_guests_connections_once() {
    let mut rig = rig();
    let (mut client, port) = rig.connected();
    rig.vsock.release().expect("always");
    let mut arrived = device(&rig.directory);
    arrived.restore(&rig.vsock.save()).expect("the same device");
    arrived.activate(Activation {
        queues: rig.vsock.queues(),
        ..rig.driver.activation(0)
    });
    rig.vsock = arrived;
    assert!(at_end(&mut client), "the source's connections end with it");
    (0..3).for_each(|queue| rig.vsock.queue_event(queue));
    rig.vsock.acquire().expect("always");
    rig.offer(4);

    // Clients wait until the guest knows.
    let mut next = rig.client();
    next.write_all(b"CONNECT 1234\n").expect("listening");
    rig.turn();
    assert!(rig.receive().is_none());
    rig.vsock.announce();
    assert_eq!(rig.vsock.arrival, Arrival::Due, "no buffer yet");
    let event = 0x2f_0000;
    rig.driver.offer(2, &[Buffer::write(event, 4)]);
    rig.driver.put(event, &[0xff; 4]);
    rig.vsock.queue_event(2);
    assert_eq!(rig.driver.used(2), Some((0, 4)));
    assert_eq!(rig.driver.bytes(event, 4), [0; 4]);
    rig.turn();
    assert!(rig.receive().is_none());
    rig.driver.offer(2, &[Buffer::write(event, 4)]);
    rig.vsock.queue_event(2);
    rig.turn();
    let request = rig.receive_op(REQUEST);
    assert_eq!(
        request.src_port,
        port_after(port),
        "the port of the lost connection is not used again"
    );
    for _ in 0..4 {
        rig.vsock.announce();
    }
    assert_eq!(rig.driver.used(2), None, "told once");
    assert_eq!(
        rig.vsock.connections.len(),
        1,
        "later announcements reset nothing"
    );
}

#[test]
fn a_guest_that_never_looks_does_not_keep_clients_waiting() {
    let mut rig = rig();
    let state = rig.vsock.save();
    rig.vsock.restore(&state).expect("its own");
    rig.driver.offer(2, &[Buffer::write(0x2f_0000, 4)]);
    rig.vsock.announce();
    assert_eq!(rig.vsock.arrival, Arrival::Told);
    rig.vsock.announce();
    rig.connected();
}

#[test]
fn a_failed_move_keeps_connections() {
    let mut rig = rig();
    let (mut client, port) = rig.connected();
    rig.vsock.release().expect("always");
    assert!(rig.vsock.poll_fds().is_empty());
    client.write_all(b"meanwhile").expect("open");
    rig.send(port, RW, b"nothing moves");
    rig.vsock.acquire().expect("always");
    assert_eq!(read(&mut client, 13), b"nothing moves");
    rig.offer(1);
    rig.turn();
    assert_eq!(
        rig.receive().map(|(_, data)| data),
        Some(b"meanwhile".to_vec())
    );
}

#[test]
fn restores_only_the_same_device() {
    let mut rig = rig();
    assert_eq!(
        rig.vsock.save(),
        [1, 42, 0x80, 0x80, 0x80, 0x80, 4],
        "the released format of version 1"
    );
    for (state, right) in [
        (&[1, 42, 0x80, 0x80, 0x80, 0x80, 4][..], true),
        (&[1, 43, 0x80, 0x80, 0x80, 0x80, 4], false),
        (&[1, 42, 1], false),
        (&[1, 42], false),
        (&[2, 42, 0x80, 0x80, 0x80, 0x80, 4], false),
    ] {
        assert_eq!(rig.vsock.restore(state).is_ok(), right, "{state:?}");
    }
}

#[test]
fn a_reset_by_the_driver_drops_everything() {
    let mut rig = rig();
    let (mut client, _) = rig.connected();
    rig.vsock.reset();
    assert!(at_end(&mut client));
    assert!(rig.vsock.poll_fds().is_empty() && rig.vsock.queues().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_packet_makes_the_device_fall(
        packets in prop::collection::vec((0u16..9, 0u16..3, any::<u32>(), any::<bool>(), 0usize..300, 0u32..400, any::<u32>()), 1..12),
    ) {
        let mut rig = rig();
        let (mut client, port) = rig.connected();
        let _may_fail = client.write_all(b"data");
        rig.offer(4);
        for (op, kind, flags, known, data, len, credit) in packets {
            let header = Header { op, kind, flags, len, buf_alloc: credit, fwd_cnt: credit.rotate_left(7), ..rig.header(if known { port } else { flags }, op, len) };
            rig.send_raw(header, &vec![1; data]);
            while rig.driver.used(1).is_some() {}
            rig.turn();
        }
        prop_assert!(rig.vsock.connections.len() <= 1);
    }

    #[test]
    fn no_chain_makes_the_device_fall(
        queue in 0usize..3,
        buffers in prop::collection::vec((prop_oneof![0..Driver::RAM, any::<u64>()], prop_oneof![0..200u32, any::<u32>()], 0..8u16, 0..70u16), 1..10),
    ) {
        let mut rig = rig();
        let (mut client, _) = rig.connected();
        client.write_all(b"data").expect("open");
        let buffers: Vec<_> = buffers.into_iter().map(|(addr, len, flags, next)| Buffer::raw(addr, len, flags, next)).collect();
        rig.driver.offer_as_is(queue, &buffers);
        rig.vsock.queue_event(queue as u16);
        rig.turn();
        prop_assert!(rig.vsock.connections.len() <= 1);
    }
}
