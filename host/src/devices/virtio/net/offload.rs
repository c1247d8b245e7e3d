//! What of a frame's work the other side of the tap does: checksums and segments, as the driver has agreed.
//!
//! The header before a frame is the guest's word to the host's kernel. It passes only if it asks for what was offered
//! and points into the frame; the kernel checks it again.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::frame::{HEADER, RECEIVED};

/// What a card on a tap offers. UFO is not among it: Linux has given it up.
pub(super) const OFFERED: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN;

/// What the driver has agreed to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offloads(u64);

impl Offloads {
    /// From the features of an activation; a card that offered nothing gets nothing.
    pub(super) fn agreed(features: u64, offered: u64) -> Offloads {
        Offloads(features & offered & OFFERED)
    }

    fn has(self, feature: u32) -> bool {
        self.0 & (1 << feature) != 0
    }

    /// What the kernel may leave undone in frames for the guest (`TUN_F_*`). Segments need checksums.
    pub(super) fn for_tap(self) -> u64 {
        if !self.has(VIRTIO_NET_F_GUEST_CSUM) {
            return 0;
        }
        let segments = [
            (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
            (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
        ];
        let flags = segments.iter().filter(|(feature, _)| self.has(*feature));
        flags.fold(TUN_F_CSUM, |sum, (_, flag)| sum | flag)
    }

    /// The header of a frame the guest sends, as it goes to the kernel; nothing if it asks for what it may not.
    pub(super) fn outward(self, header: [u8; HEADER], frame: usize) -> Option<[u8; HEADER]> {
        let parsed = Header::parse(header);
        let Header {
            flags,
            gso,
            start,
            offset,
            ..
        } = parsed;
        let checksum = flags == NEEDS_CHECKSUM;
        if (flags != 0 && !checksum) || (checksum && !self.has(VIRTIO_NET_F_CSUM)) {
            return None;
        }
        // The checksum lies in the frame, behind the addresses.
        if checksum && (start < 14 || start + offset + 2 > frame) {
            return None;
        }
        let segments = match gso & !GSO_ECN {
            GSO_NONE => return (gso == GSO_NONE).then(|| parsed.without_segments(checksum)),
            GSO_TCP_4 => self.has(VIRTIO_NET_F_HOST_TSO4),
            GSO_TCP_6 => self.has(VIRTIO_NET_F_HOST_TSO6),
            _ => false,
        };
        let congestion = gso & GSO_ECN == 0 || self.has(VIRTIO_NET_F_HOST_ECN);
        let inside = parsed.header_len <= frame && parsed.size >= SEGMENT_MIN;
        (segments && congestion && inside && checksum).then(|| parsed.bytes())
    }

    /// The header of a frame the kernel hands over, as the guest sees it. The tap was told what it may leave undone.
    pub(super) fn inward(self, header: [u8; HEADER]) -> [u8; HEADER] {
        if !self.has(VIRTIO_NET_F_GUEST_CSUM) {
            return RECEIVED;
        }
        let mut shown = header;
        // One buffer a frame.
        let [.., low, high] = &mut shown;
        (*low, *high) = (1, 0);
        shown
    }
}

/// `struct virtio_net_hdr_v1`, little-endian.
struct Header {
    flags: u8,
    gso: u8,
    header_len: usize,
    size: u16,
    start: usize,
    offset: usize,
}

impl Header {
    fn parse(header: [u8; HEADER]) -> Header {
        let [flags, gso, h0, h1, g0, g1, s0, s1, o0, o1, _, _] = header;
        Header {
            flags,
            gso,
            header_len: u16::from_le_bytes([h0, h1]).into(),
            size: u16::from_le_bytes([g0, g1]),
            start: u16::from_le_bytes([s0, s1]).into(),
            offset: u16::from_le_bytes([o0, o1]).into(),
        }
    }

    fn without_segments(mut self, checksum: bool) -> [u8; HEADER] {
        (self.size, self.header_len) = (0, 0);
        if !checksum {
            (self.start, self.offset) = (0, 0);
        }
        self.bytes()
    }

    fn bytes(&self) -> [u8; HEADER] {
        let [h0, h1] = (self.header_len as u16).to_le_bytes();
        let [g0, g1] = self.size.to_le_bytes();
        let [s0, s1] = (self.start as u16).to_le_bytes();
        let [o0, o1] = (self.offset as u16).to_le_bytes();
        [self.flags, self.gso, h0, h1, g0, g1, s0, s1, o0, o1, 0, 0]
    }
}

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP_4: u8 = 1;
const GSO_TCP_6: u8 = 4;
const GSO_ECN: u8 = 0x80;
/// What Linux takes as the least segment of TCP: smaller ones would make the host work for the guest.
const SEGMENT_MIN: u16 = 88;
// linux/if_tun.h
const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;
const TUN_F_TSO6: u64 = 4;
const TUN_F_TSO_ECN: u64 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u8, gso: u8, header_len: u8, size: u8, start: u8, offset: u8) -> [u8; HEADER] {
        [
            flags, gso, header_len, 0, size, 0, start, 0, offset, 0, 0, 0,
        ]
    }

    #[test]
    fn only_what_was_agreed_and_lies_in_the_frame_passes() {
        let all = Offloads::agreed(u64::MAX, OFFERED);
        let none = Offloads::agreed(u64::MAX, 0);
        for (what, header, wanted) in [
            ("nothing", header(0, 0, 0, 0, 0, 0), true),
            ("checksum", header(1, 0, 0, 0, 34, 16), true),
            ("segments", header(1, 1, 54, 100, 34, 16), true),
            ("segments of IPv6", header(1, 4, 74, 100, 54, 16), true),
            ("segments, ECN", header(1, 0x81, 54, 100, 34, 16), true),
            ("unknown flag", header(2, 0, 0, 0, 0, 0), false),
            ("two flags", header(3, 0, 0, 0, 34, 16), false),
            ("checksum outside", header(1, 0, 0, 0, 90, 9), false),
            ("checksum in the addresses", header(1, 0, 0, 0, 6, 0), false),
            (
                "segments without checksum",
                header(0, 1, 54, 100, 0, 0),
                false,
            ),
            ("segments of nothing", header(1, 1, 54, 0, 34, 16), false),
            ("segments too small", header(1, 1, 54, 87, 34, 16), false),
            ("headers outside", header(1, 1, 101, 100, 34, 16), false),
            ("UDP fragments", header(1, 3, 42, 100, 34, 6), false),
            ("ECN alone", header(1, 0x80, 54, 100, 34, 16), false),
            ("unknown segments", header(1, 9, 54, 100, 34, 16), false),
        ] {
            assert_eq!(all.outward(header, 100).is_some(), wanted, "{what}");
            let plain = header[0] == 0 && header[1] == 0;
            assert_eq!(
                none.outward(header, 100).is_some(),
                plain,
                "{what}, none agreed"
            );
        }
        let noise = [0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7];
        assert_eq!(all.outward(noise, 100), Some([0; HEADER]));
        let four = Offloads::agreed(
            1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4,
            OFFERED,
        );
        assert!(four.outward(header(1, 1, 54, 100, 34, 16), 100).is_some());
        assert!(four.outward(header(1, 4, 54, 100, 34, 16), 100).is_none());
        assert!(
            four.outward(header(1, 0x81, 54, 100, 34, 16), 100)
                .is_none()
        );
    }

    #[test]
    fn the_tap_leaves_undone_what_the_driver_can_do() {
        assert_eq!(Offloads::agreed(u64::MAX, OFFERED).for_tap(), 0xf);
        assert_eq!(
            Offloads::agreed(1 << VIRTIO_NET_F_GUEST_CSUM, OFFERED).for_tap(),
            1
        );
        assert_eq!(
            Offloads::agreed(1 << VIRTIO_NET_F_GUEST_TSO4, OFFERED).for_tap(),
            0
        );
        assert_eq!(Offloads::agreed(u64::MAX, 0).for_tap(), 0);
        let partial = header(1, 1, 54, 100, 34, 16);
        assert_eq!(Offloads::default().inward(partial), RECEIVED);
        let shown = Offloads::agreed(u64::MAX, OFFERED).inward(partial);
        assert_eq!(shown[..10], partial[..10]);
        assert_eq!(shown[10..], [1, 0]);
    }
}
