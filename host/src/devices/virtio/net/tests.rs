//! The card between a small driver and a socket pair that stands for the tap.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use proptest::prelude::*;

use super::super::driver::{Buffer, Driver};
use super::frame::FRAME_MIN;
use super::*;
use crate::machine::plan::devices::Rate;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const PEER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
const BUFFERS: u64 = 0x10_0000;

struct Rig {
    driver: Driver,
    net: Net,
    wire: OwnedFd,
}

fn card(announce: Vec<Ipv4Addr>) -> (Net, OwnedFd) {
    let (tap, wire) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .expect("sockets");
    (Net::over(vec![tap], MAC, announce).expect("a card"), wire)
}

fn rig() -> Rig {
    let driver = Driver::new(2);
    let (mut net, wire) = card(vec![Ipv4Addr::new(10, 1, 2, 3)]);
    net.activate(driver.activation(!RING_FEATURES));
    net.acquire().expect("always");
    Rig { driver, net, wire }
}

fn frame_from(source: [u8; 6], payload: &[u8]) -> Vec<u8> {
    [&PEER[..], &source, &[0x08, 0x00], payload].concat()
}

impl Rig {
    fn send(&mut self, header: &[u8], frame: &[u8]) {
        self.driver.offer(
            1,
            &[
                Buffer::read(BUFFERS, header),
                Buffer::read(BUFFERS + 0x1000, frame),
            ],
        );
        self.net.queue_event(1);
        assert!(self.driver.used(1).is_some(), "the buffer comes back");
    }

    fn on_wire(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 70_000];
        let count = recv(self.wire.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT).ok()?;
        packet.truncate(count);
        Some(packet)
    }

    fn arrive(&self, frame: &[u8]) {
        // The kernel's header says "checksum valid", which this guest must not be told.
        unistd::write(
            &self.wire,
            &[&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], frame].concat(),
        )
        .expect("room");
    }
}

#[test]
fn sends_a_frame_behind_an_empty_header() {
    let mut rig = rig();
    let frame = frame_from(MAC, b"payload");
    rig.send(&[0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7], &frame);
    assert_eq!(rig.on_wire(), Some([&[0; 12][..], &frame].concat()));
    assert_eq!(
        rig.net.counters(),
        Counters {
            sent: 1,
            ..Counters::default()
        }
    );
    assert_eq!(rig.driver.interrupts.take(), [1]);
}

#[test]
fn drops_what_the_guest_may_not_send() {
    let mut rig = rig();
    rig.send(&[0; 12], &frame_from(PEER, b"not me"));
    assert_eq!(
        rig.net.counters(),
        Counters {
            spoofed: 1,
            ..Counters::default()
        }
    );
    assert_eq!(rig.net.faults(), 0);
    rig.send(&[0; 12], &frame_from(MAC, b"")[..13]);
    rig.send(
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &frame_from(MAC, b"checksum please"),
    );
    rig.send(
        &[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &frame_from(MAC, b"segment please"),
    );
    rig.send(&[0; 12], &frame_from(MAC, &[0; FRAME_MAX]));
    assert_eq!(
        rig.net.counters(),
        Counters {
            spoofed: 1,
            dropped: 4,
            ..Counters::default()
        }
    );
    assert_eq!(rig.net.faults(), 4);
    assert_eq!(rig.on_wire(), None);
    rig.send(&[0; 12], &frame_from(MAC, &[5; FRAME_MAX - FRAME_MIN]));
    assert_eq!(
        rig.on_wire().map(|packet| packet.len()),
        Some(HEADER + FRAME_MAX)
    );
}

#[test]
fn nobody_elses_address_leaves_in_arp_either() {
    let mut rig = rig();
    let arp = |sender: [u8; 6], tags: &[u8], kind: u8| {
        let kind = if kind == 6 { [8, 6] } else { [0x80, 0x35] };
        let body = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &sender, &[0; 20]].concat();
        [&PEER[..], &MAC, tags, &kind, &body].concat()
    };
    let vlan = [0x81, 0, 0, 5];
    let double = [0x88, 0xa8, 0, 5, 0x81, 0, 0, 5];
    let triple = [&double[..], &vlan].concat();
    for tags in [&[][..], &vlan, &double] {
        for kind in [6, 35] {
            rig.send(&[0; 12], &arp(PEER, tags, kind));
            assert_eq!(rig.on_wire(), None, "{tags:x?} {kind}");
            rig.send(&[0; 12], &arp(MAC, tags, kind));
            assert!(rig.on_wire().is_some(), "{tags:x?} {kind}");
        }
    }
    rig.send(&[0; 12], &arp(MAC, &triple, 6));
    rig.send(&[0; 12], &arp(MAC, &[], 6)[..27]);
    let mut other_shape = arp(MAC, &[], 6);
    other_shape[18] = 8;
    rig.send(&[0; 12], &other_shape);
    assert_eq!(rig.on_wire(), None);
    let counters = rig.net.counters();
    assert_eq!((counters.spoofed, counters.sent), (9, 6));
}

#[test]
fn limits_hold_frames_back_in_each_direction_for_itself() {
    let mut rig = rig();
    let operations = Some(Rate {
        per_second: 10,
        burst: 1,
    });
    let slow = Limits {
        bytes: None,
        operations,
    };
    rig.net.change(&DeviceChange::Limits(slow)).expect("usable");
    let frame = frame_from(MAC, b"payload");
    for n in 0..2 {
        let at = BUFFERS + n * 0x2000;
        rig.driver.offer(
            1,
            &[Buffer::read(at, &[0; 12]), Buffer::read(at + 64, &frame)],
        );
        rig.driver
            .offer(0, &[Buffer::write(BUFFERS + 0x8000 + n * 0x2000, 2000)]);
        rig.arrive(&frame_from(PEER, b"answer"));
    }
    rig.net.queue_event(1);
    rig.net.queue_event(0);
    rig.net.fd_event(TAPS);
    assert!(rig.on_wire().is_some() && rig.on_wire().is_none());
    assert!(rig.driver.used(0).is_some() && rig.driver.used(0).is_none());
    let tokens: Vec<_> = rig.net.poll_fds().iter().map(|(_, token)| *token).collect();
    assert_eq!(tokens, [INWARD, OUTWARD], "the timers, not the tap");
    std::thread::sleep(std::time::Duration::from_millis(110));
    rig.net.fd_event(OUTWARD);
    assert!(rig.on_wire().is_some());
    rig.net.fd_event(INWARD);
    assert!(rig.driver.used(0).is_some());
    rig.net
        .change(&DeviceChange::Limits(Limits::default()))
        .expect("none");
    rig.net.queue_event(0);
    assert_eq!(rig.net.poll_fds().len(), 0, "starved, and no timer");
    assert!(rig.net.change(&DeviceChange::Resized).is_err());
}

#[test]
fn delivers_and_marks_the_pages() {
    let mut rig = rig();
    let frame = frame_from(PEER, &[7; 3000]);
    rig.driver.offer(
        0,
        &[
            Buffer::write(BUFFERS, 2000),
            Buffer::write(BUFFERS + 0x4000, 2000),
        ],
    );
    rig.net.queue_event(0);
    rig.driver.clear_dirty();
    assert_eq!(rig.net.poll_fds().len(), 1);
    rig.arrive(&frame);
    rig.net.fd_event(TAPS);
    assert_eq!(rig.driver.used(0), Some((0, 12 + 3014)));
    assert_eq!(
        rig.driver.bytes(BUFFERS, 12),
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    );
    let delivered = [
        rig.driver.bytes(BUFFERS + 12, 1988),
        rig.driver.bytes(BUFFERS + 0x4000, 1026),
    ]
    .concat();
    assert_eq!(delivered, frame);
    let dirty = rig.driver.dirty();
    assert!(
        dirty.contains(&BUFFERS) && dirty.contains(&(BUFFERS + 0x4000)),
        "{dirty:x?}"
    );
    assert_eq!(
        rig.net.counters(),
        Counters {
            received: 1,
            ..Counters::default()
        }
    );
    assert_eq!(rig.driver.interrupts.take(), [0]);
}

#[test]
fn stops_polling_until_there_are_buffers() {
    let mut rig = rig();
    rig.net.fd_event(TAPS);
    assert_eq!(rig.net.poll_fds(), [], "no buffers, no polling");
    rig.arrive(&frame_from(PEER, b"one"));
    rig.arrive(&frame_from(PEER, b"two"));
    rig.driver.offer(0, &[Buffer::write(BUFFERS, 1600)]);
    rig.net.queue_event(0);
    assert_eq!(
        rig.driver.used(0).map(|(_, written)| written),
        Some(12 + 14 + 3)
    );
    assert_eq!(rig.driver.used(0), None);
    assert_eq!(rig.net.poll_fds(), []);
    rig.driver.offer(0, &[Buffer::write(BUFFERS, 1600)]);
    rig.driver
        .offer(0, &[Buffer::write(BUFFERS + 0x1000, 1600)]);
    rig.net.queue_event(0);
    assert!(rig.driver.used(0).is_some());
    assert_eq!(rig.driver.bytes(BUFFERS + 12 + 14, 3), b"two");
    assert_eq!(rig.driver.used(0), None, "an empty tap takes no buffer");
    assert_eq!(rig.net.poll_fds().len(), 1);
    assert_eq!(
        rig.net.counters(),
        Counters {
            received: 2,
            ..Counters::default()
        }
    );
}

#[test]
fn a_frame_that_does_not_fit_keeps_no_buffer() {
    let mut rig = rig();
    rig.driver.offer(0, &[Buffer::write(BUFFERS, 100)]);
    rig.arrive(&frame_from(PEER, &[0; 100]));
    rig.arrive(&frame_from(PEER, &[0; 10]));
    rig.net.fd_event(TAPS);
    assert_eq!(rig.driver.used(0), Some((0, 12 + 24)));
    assert_eq!(
        rig.net.counters(),
        Counters {
            received: 1,
            dropped: 1,
            ..Counters::default()
        }
    );
}

#[test]
fn a_tap_that_is_gone_is_not_polled() {
    let mut rig = rig();
    rig.driver.offer(0, &[Buffer::write(BUFFERS, 1600)]);
    drop(rig.wire);
    rig.net.fd_event(TAPS);
    assert_eq!(rig.net.poll_fds(), []);
    assert_eq!(rig.driver.used(0), None);
}

#[test]
fn announces_its_addresses_byte_for_byte() {
    let mut rig = rig();
    rig.net.announce();
    let rarp = hex::decode(concat!(
        "000000000000000000000000",
        "ffffffffffff",
        "525400010203",
        "8035",
        "0001",
        "0800",
        "06",
        "04",
        "0003",
        "525400010203",
        "00000000",
        "525400010203",
        "00000000",
        "000000000000000000000000000000000000"
    ));
    let arp = hex::decode(concat!(
        "000000000000000000000000",
        "ffffffffffff",
        "525400010203",
        "0806",
        "0001",
        "0800",
        "06",
        "04",
        "0001",
        "525400010203",
        "0a010203",
        "000000000000",
        "0a010203",
        "000000000000000000000000000000000000"
    ));
    assert_eq!(rig.on_wire(), rarp.ok());
    assert_eq!(rig.on_wire(), arp.ok());
    assert_eq!(rig.on_wire(), None);
}

#[test]
fn frames_wait_while_the_guest_moves() {
    let mut rig = rig();
    rig.net.release().expect("always");
    rig.driver.offer(
        1,
        &[
            Buffer::read(BUFFERS, &[0; 12]),
            Buffer::read(BUFFERS + 0x1000, &frame_from(MAC, b"later")),
        ],
    );
    rig.net.queue_event(1);
    assert_eq!((rig.on_wire(), rig.net.poll_fds()), (None, vec![]));
    let (mut arrived, wire) = card(vec![]);
    arrived.restore(&rig.net.save()).expect("the same card");
    arrived.activate(Activation {
        queues: rig.net.queues(),
        ..rig.driver.activation(0)
    });
    arrived.acquire().expect("always");
    assert!(rig.driver.used(1).is_some());
    rig.wire = wire;
    assert_eq!(
        rig.on_wire(),
        Some([&[0; 12][..], &frame_from(MAC, b"later")].concat())
    );
}

#[test]
fn restores_only_the_same_card() {
    let (mut net, _wire) = card(vec![]);
    assert_eq!(
        net.save(),
        [2, 0x52, 0x54, 0, 1, 2, 3, 1],
        "the format of version 2"
    );
    assert!(net.restore(&[2, 0x52, 0x54, 0, 1, 2, 3, 1]).is_ok());
    assert!(net.restore(&[2, 0x52, 0x54, 0, 1, 2, 4, 1]).is_err());
    assert!(net.restore(&[2, 0x52]).is_err());
    let (tap, _wire) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::empty(),
    )
    .expect("sockets");
    assert!(
        Net::over(vec![tap], [1, 0, 0, 0, 0, 1], vec![]).is_err(),
        "a multicast address"
    );
    let mut config = [0xff; 10];
    net.read_config(0, &mut config);
    assert_eq!(config, [0x52, 0x54, 0, 1, 2, 3, 1, 0, 0, 0]);
}

#[test]
fn only_a_tap_is_a_tap() {
    let (pipe, _other) = unistd::pipe().expect("a pipe");
    assert!(Net::new(vec![pipe], MAC, vec![]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_chain_makes_the_card_fall(
        queue in 0usize..2,
        buffers in prop::collection::vec((prop_oneof![0..Driver::RAM, any::<u64>()], prop_oneof![0..2000u32, any::<u32>()], 0..8u16, 0..70u16), 1..10),
    ) {
        let mut rig = rig();
        rig.arrive(&frame_from(PEER, b"something"));
        let buffers: Vec<_> = buffers.into_iter().map(|(addr, len, flags, next)| Buffer::raw(addr, len, flags, next)).collect();
        rig.driver.offer_as_is(queue, &buffers);
        rig.net.queue_event(queue as u16);
        prop_assert!(rig.net.counters().sent + rig.net.counters().received <= 1);
    }
}
