//! The virtio network card (specification section 5.1) on a tap: one receive and one transmit queue.
//!
//! Neither side is believed. The guest may send only from its own address, also in ARP; the header it puts before a
//! frame reaches the host's kernel only as far as it asks for what was agreed and points into the frame; what arrives
//! from the tap goes into guest memory only as far as it fits.

mod frame;
mod offload;
mod tap;

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP};
use virtio_queue::Queue;

use self::frame::{FRAME_MAX, FRAME_MIN, HEADER, Mac};
use self::offload::Offloads;
use super::limit::Limiter;
use super::ring::{Active, Chain, RING_FEATURES};
use super::{Activation, RestoreError, VirtioDevice, saved};
use crate::machine::plan::devices::{DeviceChange, Limits};

/// A virtio network card.
///
/// Frames flow only between [`VirtioDevice::acquire`] and [`VirtioDevice::release`]; otherwise they wait in the queue
/// and in the tap.
pub struct Net {
    tap: OwnedFd,
    mac: Mac,
    announce: Vec<Ipv4Addr>,
    /// What of a frame's work the tap can leave to others: nothing if it is no tap.
    offered: u64,
    offloads: Offloads,
    /// One for each direction, so that a guest that sends without end can still be reached.
    limiters: [Limiter; 2],
    active: Option<Active>,
    held: bool,
    /// The guest has no receive buffers: the tap is not polled until it offers some.
    starved: bool,
    /// The tap is gone.
    dead: bool,
    /// The state to come was another guest's.
    copy: bool,
    buffer: Box<[u8]>,
    counters: Counters,
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
    /// A card on `tap`, which was opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    ///
    /// After a move the card announces `mac`, and each address of `announce`, to the network behind the tap.
    ///
    /// # Errors
    ///
    /// If the descriptor is not such a tap, or `mac` is a multicast address.
    pub fn new(tap: OwnedFd, mac: [u8; 6], announce: Vec<Ipv4Addr>) -> io::Result<Net> {
        tap::configure(&tap, HEADER)?;
        let card = Net::over(tap, mac, announce)?;
        Ok(Net {
            offered: offload::OFFERED,
            ..card
        })
    }

    /// A card on any descriptor that keeps frames apart, each behind a virtio header of 12 bytes.
    ///
    /// # Errors
    ///
    /// If the descriptor cannot be made non-blocking, or `mac` is a multicast address.
    pub fn over(tap: OwnedFd, mac: [u8; 6], announce: Vec<Ipv4Addr>) -> io::Result<Net> {
        let mac = Mac::unicast(mac).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "a network card needs a unicast address: clear the lowest bit of the first byte",
            )
        })?;
        let flags = OFlag::from_bits_retain(fcntl(&tap, FcntlArg::F_GETFL)?);
        fcntl(&tap, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Net {
            tap,
            mac,
            announce,
            offered: 0,
            offloads: Offloads::default(),
            limiters: [
                Limiter::new(Limits::default())?,
                Limiter::new(Limits::default())?,
            ],
            active: None,
            held: false,
            starved: false,
            dead: false,
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

    /// From the tap to the guest, until one of them has nothing more (or it is somebody else's turn).
    fn receive(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| self.held && !self.dead) else {
            return;
        };
        let ram = active.ram.clone();
        let Some(ring) = active.rings.get_mut(RX) else {
            return;
        };
        let [limiter, _] = &mut self.limiters;
        for _ in 0..BURST {
            if !limiter.admits() {
                break;
            }
            let Some(chain) = ring.pop(&ram, CHAIN_MAX) else {
                self.starved = !ring.listen(&ram);
                if self.starved {
                    break;
                }
                continue;
            };
            self.starved = false;
            if chain.broken {
                ring.push(&ram, &chain, 0);
                continue;
            }
            match unistd::read(&self.tap, &mut self.buffer) {
                Ok(count @ 1..) => {
                    match deliver(&chain, self.buffer.get_mut(..count), self.offloads) {
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
                    self.dead = true;
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

    /// From the guest to the tap, until the guest has nothing more.
    fn transmit(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let ram = active.ram.clone();
        let Some(ring) = active.rings.get_mut(TX) else {
            return;
        };
        let [_, limiter] = &mut self.limiters;
        loop {
            while limiter.admits() {
                let Some(chain) = ring.pop(&ram, CHAIN_MAX) else {
                    break;
                };
                limiter.charge(chain.readable.len() as u64);
                match collect(&chain, &mut self.buffer, self.offloads) {
                    // Counted by the queue.
                    _ if chain.broken => {}
                    Some(packet) => forward(&self.tap, self.mac, packet, &mut self.counters),
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

    /// Tells the tap what the driver can do itself. A tap that refuses finishes frames, which any driver takes.
    fn tell_tap(&self) {
        if self.offered != 0
            && let Err(error) = tap::leave_undone(&self.tap, self.offloads.for_tap())
        {
            tracing::warn!(%error, "the tap refuses offloads");
        }
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let [a, b, c, d, e, f] = self.mac.bytes();
        [a, b, c, d, e, f, VIRTIO_NET_S_LINK_UP as u8, 0]
    }
}

/// Gives a frame of the guest to the tap, if it is the guest's.
fn forward(tap: &OwnedFd, mac: Mac, packet: &[u8], counters: &mut Counters) {
    if !frame::is_from(packet, mac) {
        counters.spoofed += 1;
        return;
    }
    match unistd::write(tap, packet) {
        Ok(_) => counters.sent += 1,
        // A network may lose frames; this one did.
        Err(_) => counters.dropped += 1,
    }
}

/// Puts header and frame into the guest's buffers; nothing if they do not fit.
fn deliver(chain: &Chain<'_>, read: Option<&mut [u8]>, offloads: Offloads) -> Option<u32> {
    let packet = read.filter(|packet| packet.len() >= HEADER + FRAME_MIN)?;
    if chain.writable.len() < packet.len() {
        return None;
    }
    let header = packet.first_chunk_mut::<HEADER>()?;
    *header = offloads.inward(*header);
    let written = chain.writable.write_at(0, packet);
    u32::try_from(written)
        .ok()
        .filter(|_| written == packet.len())
}

/// Copies a frame out of guest memory, where the guest could still change it, behind a header that was looked at.
fn collect<'b>(chain: &Chain<'_>, buffer: &'b mut [u8], offloads: Offloads) -> Option<&'b [u8]> {
    let len = chain.readable.len();
    if !(HEADER + FRAME_MIN..=HEADER + FRAME_MAX).contains(&len) {
        return None;
    }
    let packet = buffer.get_mut(..len)?;
    if chain.readable.read_at(0, packet) != len {
        return None;
    }
    let header = packet.first_chunk_mut::<HEADER>()?;
    *header = offloads.outward(*header, len - HEADER)?;
    Some(packet)
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        RING_FEATURES | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | self.offered
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_from(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.offloads = Offloads::agreed(activation.features, self.offered);
        self.tell_tap();
        self.active = Some(Active::new(activation));
        self.starved = false;
    }

    fn reset(&mut self) {
        self.active = None;
        self.offloads = Offloads::default();
        self.tell_tap();
    }

    fn poll_fds(&self) -> Vec<(RawFd, u32)> {
        let [inward, outward] = self.limiters.each_ref().map(Limiter::poll_fd);
        let ready = self.active.is_some() && self.held && !self.starved && !self.dead;
        let tap = (ready && inward.is_none()).then(|| self.tap.as_raw_fd());
        [(tap, TAP), (inward, INWARD), (outward, OUTWARD)]
            .into_iter()
            .filter_map(|(fd, token)| Some((fd?, token)))
            .collect()
    }

    fn queue_event(&mut self, index: u16) {
        match usize::from(index) {
            RX => self.receive(),
            TX => self.transmit(),
            _ => {}
        }
    }

    fn fd_event(&mut self, token: u32) {
        let [inward, outward] = &mut self.limiters;
        match token {
            OUTWARD => {
                outward.expired();
                self.transmit();
            }
            INWARD => {
                inward.expired();
                self.receive();
            }
            _ => self.receive(),
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
            },
        )
    }

    fn expect_copy(&mut self) {
        self.copy = true;
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let State { mac } = saved::decode("net", STATE_VERSION, state)?;
        if mac != self.mac.bytes() && !self.copy {
            let reason = format!(
                "the guest's address is {mac:x?}, the card here has {:x?}",
                self.mac.bytes()
            );
            return Err(RestoreError {
                device: "net",
                reason,
            });
        }
        Ok(())
    }

    fn release(&mut self) -> io::Result<()> {
        self.held = false;
        Ok(())
    }

    fn acquire(&mut self) -> io::Result<()> {
        self.held = true;
        self.transmit();
        self.receive();
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
            if let Err(error) = unistd::write(&self.tap, &packet) {
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

/// What must be the same at both ends of a move. Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    mac: [u8; 6],
}

const STATE_VERSION: u8 = 1;
// what is polled
const TAP: u32 = 0;
const INWARD: u32 = 1;
const OUTWARD: u32 = 2;
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// A frame in pages, its header, and some to spare.
const CHAIN_MAX: usize = 32;
/// Frames delivered before other devices get their turn; the tap is polled again for the rest.
const BURST: usize = 256;
const CONFIG_LEN: usize = 8;

#[cfg(test)]
mod tests;
