//! The virtio network card (specification section 5.1) on a tap: one pair of a receive and a transmit queue, or several
//! (`VIRTIO_NET_F_MQ`), each on a queue of the tap of its own, as many in use as the driver asks for.
//!
//! Neither side is believed. The guest may send only from its own address, also in ARP; the header it puts before a
//! frame reaches the host's kernel only as far as it asks for what was agreed and points into the frame; what arrives
//! from the tap goes into guest memory only as far as it fits.

mod control;
mod frame;
mod offload;
mod packet;
mod tap;

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::Queue;

use self::frame::{FRAME_MAX, HEADER, Mac};
use self::offload::Offloads;
use super::limit::Limiter;
use super::ring::{Active, RING_FEATURES};
use super::{Activation, RestoreError, VirtioDevice, saved};
use crate::machine::plan::MAX_PAIRS;
use crate::machine::plan::devices::{DeviceChange, Limits};

/// A virtio network card.
///
/// Frames flow only between [`VirtioDevice::acquire`] and [`VirtioDevice::release`]; otherwise they wait in the queue
/// and in the tap.
pub struct Net {
    /// At least one.
    pairs: Vec<Pair>,
    /// How many of them carry frames, from the first on: what the driver asked for last.
    in_use: usize,
    sizes: Vec<u16>,
    mac: Mac,
    announce: Vec<Ipv4Addr>,
    /// What of a frame's work the tap can leave to others: nothing if it is no tap.
    offered: u64,
    offloads: Offloads,
    /// One for each direction, so that a guest that sends without end can still be reached.
    limiters: [Limiter; 2],
    active: Option<Active>,
    /// Where the driver's commands come: behind the pairs it knows of. Of a card with one pair there is none.
    control: Option<usize>,
    held: bool,
    /// The state to come was another guest's.
    copy: bool,
    buffer: Box<[u8]>,
    counters: Counters,
}

/// A queue of the tap.
struct Pair {
    tap: OwnedFd,
    /// The guest has no receive buffers: the tap is not polled until it offers some.
    starved: bool,
    /// The tap is gone.
    dead: bool,
}

/// What happened to frames since the card was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames delivered to the guest.
    pub received: u64,
    /// Frames the guest sent.
    pub sent: u64,
    /// Frames dropped because their source address is not the guest's.
    pub spoofed: u64,
    /// Frames dropped because they were too long or too short, or the other side had no room.
    pub dropped: u64,
}

impl Net {
    /// A card on the queues of one tap, which was opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and with
    /// `IFF_MULTI_QUEUE` if it has several.
    ///
    /// After a move the card announces `mac`, and each address of `announce`, to the network behind the tap.
    ///
    /// # Errors
    ///
    /// If one of the descriptors is not such a tap, there are none or more than [`MAX_PAIRS`], or `mac` is a multicast
    /// address.
    pub fn new(taps: Vec<OwnedFd>, mac: [u8; 6], announce: Vec<Ipv4Addr>) -> io::Result<Net> {
        taps.iter()
            .try_for_each(|tap| tap::configure(tap, HEADER))?;
        let mut card = Net::over(taps, mac, announce)?;
        card.offered |= offload::OFFERED;
        card.use_pairs(1);
        Ok(card)
    }

    /// A card on any descriptors that keep frames apart, each behind a virtio header of 12 bytes.
    ///
    /// # Errors
    ///
    /// If a descriptor cannot be made non-blocking, there are none or more than [`MAX_PAIRS`], or `mac` is a multicast
    /// address.
    pub fn over(taps: Vec<OwnedFd>, mac: [u8; 6], announce: Vec<Ipv4Addr>) -> io::Result<Net> {
        let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text);
        let mac = Mac::unicast(mac).ok_or_else(|| {
            invalid(
                "a network card needs a unicast address: clear the lowest bit of the first byte",
            )
        })?;
        if !(1..=usize::from(MAX_PAIRS)).contains(&taps.len()) {
            return Err(invalid("a network card has 1 to 8 pairs of queues"));
        }
        for tap in &taps {
            let flags = OFlag::from_bits_retain(fcntl(tap, FcntlArg::F_GETFL)?);
            fcntl(tap, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        let several = taps.len() > 1;
        let mut sizes = vec![QUEUE_SIZE; 2 * taps.len()];
        sizes.extend(several.then_some(control::QUEUE_SIZE));
        let pairs = taps.into_iter().map(|tap| Pair {
            tap,
            starved: false,
            dead: false,
        });
        Ok(Net {
            pairs: pairs.collect(),
            in_use: 1,
            sizes,
            mac,
            announce,
            offered: if several { SEVERAL } else { 0 },
            offloads: Offloads::default(),
            limiters: [
                Limiter::new(Limits::default())?,
                Limiter::new(Limits::default())?,
            ],
            active: None,
            control: None,
            held: false,
            copy: false,
            buffer: vec![0; HEADER + FRAME_MAX].into_boxed_slice(),
            counters: Counters::default(),
        })
    }

    /// How much it may send, and as much receive; to be said before the guest runs.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Net {
        self.limiters
            .iter_mut()
            .for_each(|limiter| limiter.set(limits));
        self
    }

    /// What happened to frames so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Pair `number`: from the tap to the guest, until one of them has nothing more (or it is somebody else's turn).
    fn receive(&mut self, number: usize) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let ram = active.ram.clone();
        let pairs = self.pairs.iter_mut().take(self.in_use);
        let rings = active.rings.iter_mut().step_by(2);
        let Some((pair, ring)) = pairs.zip(rings).nth(number).filter(|(pair, _)| !pair.dead) else {
            return;
        };
        let [limiter, _] = &mut self.limiters;
        for _ in 0..BURST {
            if !limiter.admits() {
                break;
            }
            let Some(chain) = ring.pop(&ram, CHAIN_MAX) else {
                pair.starved = !ring.listen(&ram);
                if pair.starved {
                    break;
                }
                continue;
            };
            pair.starved = false;
            if chain.broken {
                ring.push(&ram, &chain, 0);
                continue;
            }
            match unistd::read(&pair.tap, &mut self.buffer) {
                Ok(count @ 1..) => {
                    match packet::deliver(&chain, self.buffer.get_mut(..count), self.offloads) {
                        Some(written) => {
                            self.counters.received += 1;
                            limiter.charge(u64::from(written));
                            ring.push(&ram, &chain, written);
                        }
                        None => {
                            self.counters.dropped += 1;
                            ring.unpop();
                        }
                    }
                }
                Err(Errno::EINTR) => ring.unpop(),
                Err(Errno::EAGAIN) => {
                    ring.unpop();
                    break;
                }
                result => {
                    ring.unpop();
                    pair.dead = true;
                    tracing::warn!(
                        ?result,
                        "the tap is gone: the guest's network card is cut off"
                    );
                    break;
                }
            }
        }
        ring.signal(&ram, active.interrupt.as_ref());
    }

    /// Pair `number`: from the guest to the tap, until the guest has nothing more.
    fn transmit(&mut self, number: usize) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let ram = active.ram.clone();
        let pairs = self.pairs.iter().take(self.in_use);
        let rings = active.rings.iter_mut().skip(1).step_by(2);
        let Some((pair, ring)) = pairs.zip(rings).nth(number) else {
            return;
        };
        let [_, limiter] = &mut self.limiters;
        loop {
            while limiter.admits() {
                let Some(chain) = ring.pop(&ram, CHAIN_MAX) else {
                    break;
                };
                limiter.charge(chain.readable.len() as u64);
                match packet::collect(&chain, &mut self.buffer, self.offloads) {
                    // Counted by the queue.
                    _ if chain.broken => {}
                    Some(packet) => {
                        packet::forward(&pair.tap, self.mac, packet, &mut self.counters)
                    }
                    None => {
                        self.counters.dropped += 1;
                        ring.fault();
                    }
                }
                ring.push(&ram, &chain, 0);
            }
            ring.signal(&ram, active.interrupt.as_ref());
            if limiter.poll_fd().is_some() || !ring.listen(&ram) {
                break;
            }
        }
    }

    /// What the driver has to say beside frames: how many pairs it uses.
    fn command(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let ram = active.ram.clone();
        let Some(ring) = self.control.and_then(|index| active.rings.get_mut(index)) else {
            return;
        };
        let mut asked = None;
        loop {
            while let Some(chain) = ring.pop(&ram, control::CHAIN_MAX) {
                let wanted = control::pairs_wanted(&chain, self.pairs.len());
                if wanted.is_none() {
                    ring.fault();
                }
                asked = wanted.or(asked);
                ring.push(&ram, &chain, control::answer(&chain, wanted.is_some()));
            }
            if !ring.listen(&ram) {
                break;
            }
        }
        ring.signal(&ram, active.interrupt.as_ref());
        if let Some(count) = asked {
            self.use_pairs(count);
            self.all(Net::transmit);
            self.all(Net::receive);
        }
    }

    /// From now on the first `count` pairs carry frames, and the kernel spreads what arrives over these alone.
    fn use_pairs(&mut self, count: usize) {
        self.in_use = count;
        if self.offered & offload::OFFERED == 0 {
            return;
        }
        for (number, pair) in self.pairs.iter_mut().enumerate().skip(1) {
            if let Err(error) = tap::take_part(&pair.tap, number < count) {
                // It takes part, or not, already.
                tracing::debug!(%error, number, "a queue of the tap");
            }
        }
    }

    /// Each pair in turn.
    fn all(&mut self, work: fn(&mut Net, usize)) {
        (0..self.in_use).for_each(|number| work(self, number));
    }

    /// Tells the tap what the driver can do itself. A tap that refuses finishes frames, which any driver takes.
    fn tell_tap(&self) {
        if self.offered & offload::OFFERED != 0
            && let Some(pair) = self.pairs.first()
            && let Err(error) = tap::leave_undone(&pair.tap, self.offloads.for_tap())
        {
            tracing::warn!(%error, "the tap refuses offloads");
        }
    }

    /// Address, link, and how many pairs there are where there are several.
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.bytes().to_vec();
        config.extend((VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        if let Ok(several @ 2..) = u16::try_from(self.pairs.len()) {
            config.extend(several.to_le_bytes());
        }
        config
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        RING_FEATURES | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | self.offered
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_from(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.offloads = Offloads::agreed(activation.features, self.offered);
        self.tell_tap();
        self.control = control::queue(activation.features & self.offered, self.pairs.len());
        self.active = Some(Active::new(activation));
        self.pairs.iter_mut().for_each(|pair| pair.starved = false);
    }

    fn reset(&mut self) {
        self.active = None;
        self.offloads = Offloads::default();
        self.tell_tap();
        self.use_pairs(1);
    }

    fn poll_fds(&self) -> Vec<(RawFd, u32)> {
        let [inward, outward] = self.limiters.each_ref().map(Limiter::poll_fd);
        let ready = self.active.is_some() && self.held && inward.is_none();
        let pairs = self.pairs.iter().zip(TAPS..);
        let taps = pairs
            .take(if ready { self.in_use } else { 0 })
            .filter(|(pair, _)| !pair.starved && !pair.dead)
            .map(|(pair, token)| (pair.tap.as_raw_fd(), token));
        let timers = [(inward, INWARD), (outward, OUTWARD)];
        taps.chain(
            timers
                .into_iter()
                .filter_map(|(fd, token)| Some((fd?, token))),
        )
        .collect()
    }

    fn queue_event(&mut self, index: u16) {
        let index = usize::from(index);
        match index {
            _ if self.control == Some(index) => self.command(),
            _ if index.is_multiple_of(2) => self.receive(index / 2),
            _ => self.transmit(index / 2),
        }
    }

    fn fd_event(&mut self, token: u32) {
        let [inward, outward] = &mut self.limiters;
        match token {
            OUTWARD => {
                outward.expired();
                self.all(Net::transmit);
            }
            INWARD => {
                inward.expired();
                self.all(Net::receive);
            }
            tap => self.receive(tap.saturating_sub(TAPS) as usize),
        }
    }

    fn queues(&self) -> Vec<Queue> {
        self.active.as_ref().map(Active::queues).unwrap_or_default()
    }

    fn save(&self) -> Vec<u8> {
        saved::encode(
            STATE_VERSION,
            &State {
                mac: self.mac.bytes(),
                in_use: self.in_use as u8,
            },
        )
    }

    fn expect_copy(&mut self) {
        self.copy = true;
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let State { mac, in_use } = saved::decode("net", STATE_VERSION, state)?;
        let refuse = |reason| RestoreError {
            device: "net",
            reason,
        };
        let own = self.mac.bytes();
        if mac != own && !self.copy {
            let reason = format!("the guest's address is {mac:x?}, the card here has {own:x?}");
            return Err(refuse(reason));
        }
        let (in_use, pairs) = (usize::from(in_use), self.pairs.len());
        if !(1..=pairs).contains(&in_use) {
            let reason =
                format!("the guest uses {in_use} pairs of queues, the card here has {pairs}");
            return Err(refuse(reason));
        }
        self.use_pairs(in_use);
        Ok(())
    }

    fn release(&mut self) -> io::Result<()> {
        self.held = false;
        Ok(())
    }

    fn kept(&mut self) {
        self.tell_tap();
        self.use_pairs(self.in_use);
    }

    fn acquire(&mut self) -> io::Result<()> {
        self.held = true;
        self.command();
        self.all(Net::transmit);
        self.all(Net::receive);
        Ok(())
    }

    fn announce(&mut self) {
        let frames = std::iter::once(frame::rarp(self.mac))
            .chain(self.announce.iter().map(|ip| frame::arp(self.mac, *ip)));
        for frame in frames {
            let mut packet = [0; HEADER + frame::ANNOUNCEMENT];
            packet
                .iter_mut()
                .skip(HEADER)
                .zip(frame)
                .for_each(|(to, from)| *to = from);
            let sent = self
                .pairs
                .first()
                .map(|pair| unistd::write(&pair.tap, &packet));
            if let Some(Err(error)) = sent {
                self.counters.dropped += 1;
                tracing::warn!(%error, "the guest's new place could not be announced");
            }
        }
    }

    fn faults(&self) -> u64 {
        self.active.as_ref().map_or(0, Active::faults)
    }

    fn change(&mut self, change: &DeviceChange) -> Result<(), String> {
        match change {
            DeviceChange::Limits(limits) if limits.are_usable() => {
                self.limiters
                    .iter_mut()
                    .for_each(|limiter| limiter.set(*limits));
                Ok(())
            }
            other => Err(super::not_for("network card", other)),
        }
    }
}

/// What must be the same at both ends of a move, and how many pairs the driver uses. Version 2.
#[derive(Serialize, Deserialize)]
struct State {
    mac: [u8; 6],
    in_use: u8,
}

const STATE_VERSION: u8 = 2;
/// What a card with several pairs offers.
const SEVERAL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
// what is polled
const INWARD: u32 = 0;
const OUTWARD: u32 = 1;
/// The first pair's tap; the others follow.
const TAPS: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// A frame in pages, its header, and some to spare.
const CHAIN_MAX: usize = 32;
/// Frames delivered before other devices get their turn; the tap is polled again for the rest.
const BURST: usize = 256;

#[cfg(test)]
mod several_tests;
#[cfg(test)]
mod tests;
