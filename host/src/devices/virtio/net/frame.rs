//! Ethernet frames, as far as a card looks into them, and the announcements after a move.

use std::net::Ipv4Addr;

/// The header before each frame, on the queues and on the tap (specification 5.1.6).
pub(super) const HEADER: usize = 12;
/// The header of a received frame: no offloads, one buffer.
pub(super) const RECEIVED: [u8; HEADER] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// Two addresses and a type.
pub(super) const FRAME_MIN: usize = 14;
/// The largest packet of IP in a frame with a VLAN tag.
pub(super) const FRAME_MAX: usize = 65_535 + FRAME_MIN + 4;
/// The shortest frame on a wire, without its checksum.
pub(super) const ANNOUNCEMENT: usize = 60;

/// A unicast hardware address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Mac([u8; 6]);

impl Mac {
    pub(super) fn unicast(bytes: [u8; 6]) -> Option<Mac> {
        let [first, ..] = bytes;
        (first & 1 == 0 && bytes != [0; 6]).then_some(Mac(bytes))
    }

    pub(super) fn bytes(self) -> [u8; 6] {
        self.0
    }
}

/// Whether the source address of the frame behind this header is `mac`.
pub(super) fn is_from(packet: &[u8], mac: Mac) -> bool {
    packet.get(HEADER + 6..HEADER + 12) == Some(mac.0.as_slice())
}

/// A RARP request "who am I", which makes switches learn where the address now is (what QEMU's `announce-self` sends).
pub(super) fn rarp(mac: Mac) -> [u8; ANNOUNCEMENT] {
    announcement(mac, 0x8035, 3, mac.0, Ipv4Addr::UNSPECIFIED)
}

/// An ARP announcement (RFC 5227), which makes neighbours renew what they know of the address.
pub(super) fn arp(mac: Mac, address: Ipv4Addr) -> [u8; ANNOUNCEMENT] {
    announcement(mac, 0x0806, 1, [0; 6], address)
}

fn announcement(
    mac: Mac,
    ethertype: u16,
    operation: u16,
    target: [u8; 6],
    address: Ipv4Addr,
) -> [u8; ANNOUNCEMENT] {
    let parts: [&[u8]; 11] = [
        &[0xff; 6],
        &mac.0,
        &ethertype.to_be_bytes(),
        &1u16.to_be_bytes(),      // Ethernet
        &0x0800u16.to_be_bytes(), // IPv4
        &[6, 4],
        &operation.to_be_bytes(),
        &mac.0,
        &address.octets(),
        &target,
        &address.octets(),
    ];
    let mut frame = [0; ANNOUNCEMENT];
    frame
        .iter_mut()
        .zip(parts.into_iter().flatten())
        .for_each(|(to, from)| *to = *from);
    frame
}
