//! Frames between the guest's buffers and the tap, each behind a header that was looked at.

use std::os::fd::OwnedFd;

use nix::unistd;

use super::super::ring::Chain;
use super::Counters;
use super::frame::{self, FRAME_MAX, FRAME_MIN, HEADER, Mac};
use super::offload::Offloads;

/// Gives a frame of the guest to the tap, if it is the guest's.
pub(super) fn forward(tap: &OwnedFd, mac: Mac, packet: &[u8], counters: &mut Counters) {
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
pub(super) fn deliver(
    chain: &Chain<'_>,
    read: Option<&mut [u8]>,
    offloads: Offloads,
) -> Option<u32> {
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
pub(super) fn collect<'b>(
    chain: &Chain<'_>,
    buffer: &'b mut [u8],
    offloads: Offloads,
) -> Option<&'b [u8]> {
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
