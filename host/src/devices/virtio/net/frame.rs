//! Ethernet frames, as far as a card looks into them, and the announcements after a move.

use std::net::Ipv4Addr;

/// The header before each frame, on the queues and on the tap (specification 5.1.6).
pub(super) const HEADER: usize = 12;
/// The header of a received frame that is finished: no offloads, one buffer.
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

/// Whether the frame behind this header says in every place that it is from `mac`: its source address and, where it
/// speaks ARP or RARP, the sender in it. What is said of IPv6 neighbours is not looked at.
pub(super) fn is_from(packet: &[u8], mac: Mac) -> bool {
    let Some(frame) = packet.get(HEADER..) else {
        return false;
    };
    if frame.get(6..12) != Some(mac.0.as_slice()) {
        return false;
    }
    let mut at = 12;
    // A tag or two before the type proper.
    for _ in 0..TAGS_MAX {
        match type_at(frame, at) {
            Some(VLAN | SERVICE_VLAN) => at += 4,
            _ => break,
        }
    }
    match type_at(frame, at) {
        Some(ARP | RARP) => {
            let shape = [0, 1, 8, 0, 6, 4];
            frame.get(at + 2..at + 8) == Some(shape.as_slice())
                && frame.get(at + 10..at + 16) == Some(mac.0.as_slice())
        }
        // More tags than anyone needs: what is behind them nobody has looked at.
        Some(VLAN | SERVICE_VLAN) => false,
        _ => true,
    }
}

fn type_at(frame: &[u8], at: usize) -> Option<u16> {
    let bytes = frame.get(at..at + 2)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

const TAGS_MAX: usize = 2;
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
const VLAN: u16 = 0x8100;
const SERVICE_VLAN: u16 = 0x88a8;

/// A RARP request "who am I", which makes switches learn where the address now is (what QEMU's `announce-self` sends).
pub(super) fn rarp(mac: Mac) -> [u8; ANNOUNCEMENT] {
    announcement(mac, RARP, 3, mac.0, Ipv4Addr::UNSPECIFIED)
}

/// An ARP announcement (RFC 5227), which makes neighbours renew what they know of the address.
pub(super) fn arp(mac: Mac, address: Ipv4Addr) -> [u8; ANNOUNCEMENT] {
    announcement(mac, ARP, 1, [0; 6], address)
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
