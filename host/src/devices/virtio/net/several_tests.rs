//! A card with several pairs of queues, each on a socket pair that stands for a queue of the tap.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};

use super::super::driver::{Buffer, Driver};
use super::*;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const PEER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
const PAIRS: usize = 3;
const CONTROL: usize = 2 * PAIRS;
const BUFFERS: u64 = 0x10_0000;
const KNOWS: u64 = SEVERAL;

struct Rig {
    driver: Driver,
    net: Net,
    wires: Vec<OwnedFd>,
}

fn card(pairs: usize) -> (Net, Vec<OwnedFd>) {
    let ends = (0..pairs).map(|_| {
        let kind = (AddressFamily::Unix, SockType::SeqPacket);
        socketpair(kind.0, kind.1, None, SockFlag::SOCK_CLOEXEC).expect("sockets")
    });
    let (taps, wires) = ends.unzip();
    (Net::over(taps, MAC, vec![]).expect("a card"), wires)
}

fn rig_of(features: u64) -> Rig {
    let driver = Driver::new(CONTROL + 1);
    let (mut net, wires) = card(PAIRS);
    net.activate(driver.activation(features));
    net.acquire().expect("always");
    Rig { driver, net, wires }
}

impl Rig {
    /// The answer to a command that comes by queue `queue`.
    fn command(&mut self, queue: usize, bytes: &[u8]) -> u8 {
        let (kind, argument) = bytes.split_at(2);
        self.driver.put(BUFFERS + 0x2000, &[0xff]);
        self.driver.offer(
            queue,
            &[
                Buffer::read(BUFFERS, kind),
                Buffer::read(BUFFERS + 0x1000, argument),
                Buffer::write(BUFFERS + 0x2000, 1),
            ],
        );
        self.net.queue_event(queue as u16);
        assert!(
            self.driver.used(queue).is_some(),
            "every command is answered"
        );
        self.driver.bytes(BUFFERS + 0x2000, 1)[0]
    }

    fn send(&mut self, pair: usize, payload: &[u8]) -> bool {
        let queue = 2 * pair + 1;
        let frame = [&PEER[..], &MAC, &[8, 0], payload].concat();
        let buffers = [
            Buffer::read(BUFFERS + 0x3000, &[0; 12]),
            Buffer::read(BUFFERS + 0x4000, &frame),
        ];
        self.driver.offer(queue, &buffers);
        self.net.queue_event(queue as u16);
        self.driver.used(queue).is_some()
    }

    fn on_wire(&self, pair: usize) -> Option<Vec<u8>> {
        let mut packet = vec![0; 2000];
        let wire = self.wires[pair].as_raw_fd();
        let count = recv(wire, &mut packet, MsgFlags::MSG_DONTWAIT).ok()?;
        Some(packet[12 + 14..count].to_vec())
    }

    fn polled(&self) -> Vec<u32> {
        self.net
            .poll_fds()
            .iter()
            .map(|(_, token)| *token)
            .collect()
    }
}

#[test]
fn offers_as_many_pairs_as_it_has_and_a_queue_for_commands() {
    let (net, _wires) = card(PAIRS);
    assert_eq!(net.queue_sizes(), [256, 256, 256, 256, 256, 256, 64]);
    assert_eq!(net.features() & SEVERAL, SEVERAL);
    let mut config = [0xff; 12];
    net.read_config(0, &mut config);
    assert_eq!(config, [0x52, 0x54, 0, 1, 2, 3, 1, 0, 3, 0, 0, 0]);
    let (one, _wire) = card(1);
    assert_eq!((one.queue_sizes().len(), one.features() & SEVERAL), (2, 0));
    for wrong in [0, 9] {
        let taps = (0..wrong).map(|_| unistd::pipe().expect("a pipe").0);
        assert!(Net::over(taps.collect(), MAC, vec![]).is_err());
    }
}

#[test]
fn frames_flow_in_the_pairs_that_the_driver_asked_for() {
    let mut rig = rig_of(KNOWS);
    for pair in 0..PAIRS {
        let at = BUFFERS + 0x8000 + 0x1000 * pair as u64;
        rig.driver.offer(2 * pair, &[Buffer::write(at, 2000)]);
        rig.net.queue_event(2 * pair as u16);
    }
    assert_eq!(rig.polled(), [TAPS], "one, until it asks for more");
    assert!(!rig.send(1, b"too early") && rig.on_wire(1).is_none());
    assert_eq!(rig.command(CONTROL, &[4, 0, 3, 0]), 0);
    assert_eq!(rig.polled(), [TAPS, TAPS + 1, TAPS + 2]);
    assert_eq!(
        rig.on_wire(1),
        Some(b"too early".to_vec()),
        "what waited goes"
    );
    assert!(rig.send(2, b"third") && rig.on_wire(2) == Some(b"third".to_vec()));
    let frame = [&[0; 12][..], &MAC, &PEER, &[8, 0], b"hello"].concat();
    unistd::write(&rig.wires[2], &frame).expect("room");
    rig.net.fd_event(TAPS + 2);
    assert_eq!(rig.driver.used(4), Some((0, 31)));
    assert_eq!(rig.driver.used(0), None);
    assert!(rig.driver.interrupts.take().contains(&4));
    // Fewer again.
    assert_eq!(rig.command(CONTROL, &[4, 0, 1, 0]), 0);
    assert_eq!(rig.polled(), [TAPS]);
    assert!(!rig.send(2, b"no more"));
    rig.net.reset();
    assert_eq!(rig.net.save(), [2, 0x52, 0x54, 0, 1, 2, 3, 1]);
}

#[test]
fn other_commands_and_other_numbers_are_refused_and_change_nothing() {
    let mut rig = rig_of(KNOWS);
    assert_eq!(rig.command(CONTROL, &[4, 0, 2, 0]), 0);
    let refused: [&[u8]; 9] = [
        &[4, 0, 0, 0],
        &[4, 0, 4, 0],
        &[4, 0, 2, 1],
        &[4, 1, 1, 0],
        &[0, 0, 1, 0],
        &[1, 0, 1, 0],
        &[4, 0],
        &[4, 0, 1],
        &[4, 0, 1, 0, 0],
    ];
    for command in refused {
        assert_eq!(rig.command(CONTROL, command), 1, "{command:?}");
    }
    assert_eq!(rig.net.faults(), 9);
    assert_eq!(rig.net.save().last(), Some(&2));
    // No room for an answer: done all the same, by the rules of the queue.
    let buffers = [Buffer::read(BUFFERS, &[4, 0, 3, 0])];
    rig.driver.offer(CONTROL, &buffers);
    rig.net.queue_event(CONTROL as u16);
    assert_eq!(
        rig.driver.used(CONTROL).map(|(_, written)| written),
        Some(0)
    );
}

#[test]
fn the_control_queue_is_where_the_driver_looks_for_it() {
    // It knows of commands, not of pairs: they come behind the first.
    let mut rig = rig_of(1 << VIRTIO_NET_F_CTRL_VQ);
    assert_eq!(rig.command(2, &[0, 0, 1, 0]), 1);
    // And without commands, that queue is nothing.
    let mut rig = rig_of(0);
    rig.driver.offer(2, &[Buffer::read(BUFFERS, &[4, 0, 2, 0])]);
    rig.net.queue_event(2);
    assert_eq!(rig.driver.used(2), None);
    rig.driver
        .offer(CONTROL, &[Buffer::read(BUFFERS, &[4, 0, 2, 0])]);
    rig.net.queue_event(CONTROL as u16);
    assert_eq!(rig.driver.used(CONTROL), None);
}

#[test]
fn a_move_takes_the_number_of_pairs_along() {
    let mut rig = rig_of(KNOWS);
    assert_eq!(rig.command(CONTROL, &[4, 0, 3, 0]), 0);
    rig.net.release().expect("always");
    let state = rig.net.save();
    let (mut arrived, wires) = card(PAIRS);
    arrived.restore(&state).expect("the same card");
    arrived.activate(Activation {
        queues: rig.net.queues(),
        ..rig.driver.activation(KNOWS)
    });
    arrived.acquire().expect("always");
    let mut rig = Rig {
        net: arrived,
        wires,
        ..rig
    };
    assert!(rig.send(2, b"from afar") && rig.on_wire(2) == Some(b"from afar".to_vec()));
    for (pairs, in_use) in [(2, 3), (3, 0), (3, 4)] {
        let (mut other, _wires) = card(pairs);
        assert!(other.restore(&[2, 0x52, 0x54, 0, 1, 2, 3, in_use]).is_err());
    }
}
