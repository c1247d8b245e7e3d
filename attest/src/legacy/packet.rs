//! Transport keys and the packets sealed with them: what LAUNCH_SECRET, SEND_UPDATE_DATA and
//! RECEIVE_UPDATE_DATA carry.
//!
//! A packet is believed only after its MAC; nothing is decrypted before that. A MAC does not say
//! *where* in the guest or *when* a packet belongs: whoever moves packets has to bind address and
//! order around them.

use crate::bytes;
use aes::Aes128;
use aes::cipher::{InnerIvInit, KeyInit, StreamCipher, StreamCipherCoreWrapper};
use ring::hmac;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// The 52-byte header before a packet's ciphertext.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketHeader {
    /// Bit 0 says compressed, which is not supported; the others are reserved.
    pub flags: u32,
    /// AES-CTR initial counter block, fresh for each packet.
    pub iv: [u8; 16],
    /// HMAC-SHA256 over the context, the header, the lengths and the ciphertext.
    pub mac: [u8; 32],
}

/// Why a packet is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// A header of another length.
    #[error("a packet header has {PACKET_HEADER_LEN} bytes, this one has {0}")]
    HeaderLength(usize),
    /// Compression or a reserved flag.
    #[error("packet flags {0:#x} are not supported; send the packet uncompressed, with flags 0")]
    Flags(u32),
    /// Data and room for it differ, or a length does not fit the format.
    #[error("packet of {packet} bytes for {room} bytes of guest memory; both must be the same")]
    Length {
        /// Bytes in the packet.
        packet: usize,
        /// Bytes of guest memory.
        room: usize,
    },
    /// The MAC is wrong: another key, another context, or changed bytes.
    #[error("the packet's MAC does not fit: it was changed, or sealed for another guest or use")]
    BadMac,
    /// No randomness for the IV.
    #[error("the operating system gave no randomness for the packet's IV")]
    Random,
}

impl PacketHeader {
    /// Parses exactly [`PACKET_HEADER_LEN`] bytes.
    pub fn from_bytes(raw: &[u8]) -> Result<Self, PacketError> {
        let wrong = PacketError::HeaderLength(raw.len());
        if raw.len() != PACKET_HEADER_LEN {
            return Err(wrong);
        }
        Ok(Self {
            flags: bytes::le32(raw, 0).ok_or(wrong)?,
            iv: bytes::array(raw, 4).ok_or(wrong)?,
            mac: bytes::array(raw, 20).ok_or(wrong)?,
        })
    }

    /// The 52 bytes that stand before the ciphertext.
    pub fn to_bytes(&self) -> [u8; PACKET_HEADER_LEN] {
        let mut raw = [0; PACKET_HEADER_LEN];
        let parts = self
            .flags
            .to_le_bytes()
            .into_iter()
            .chain(self.iv)
            .chain(self.mac);
        for (to, from) in raw.iter_mut().zip(parts) {
            *to = from;
        }
        raw
    }
}

/// Transport encryption key and transport integrity key of one guest's session.
#[derive(Zeroize, ZeroizeOnDrop)]
pub(crate) struct TransportKeys {
    pub(crate) tek: [u8; 16],
    pub(crate) tik: [u8; 16],
}

impl TransportKeys {
    /// Fresh keys.
    pub(crate) fn random() -> Result<Self, PacketError> {
        let mut keys = Self {
            tek: [0; 16],
            tik: [0; 16],
        };
        random(&mut keys.tek)?;
        random(&mut keys.tik)?;
        Ok(keys)
    }

    /// HMAC-SHA256 under the TIK.
    pub(crate) fn integrity(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.tik)
    }
}

/// What a packet's MAC says it is for, so that a secret cannot pass as a page.
pub(crate) enum Context<'a> {
    /// LAUNCH_SECRET, bound to the launch it was made for.
    Secret {
        /// The launch measure that the owner accepted.
        measure: &'a [u8; 32],
    },
    /// SEND_UPDATE_DATA.
    Data,
}

/// Transport keys made ready once, so that a page costs no key schedule and no allocation.
pub(crate) struct PacketCipher {
    cipher: Aes128,
    integrity: hmac::Key,
}

impl PacketCipher {
    pub(crate) fn new(keys: &TransportKeys) -> Self {
        Self {
            cipher: Aes128::new(&keys.tek.into()),
            integrity: keys.integrity(),
        }
    }

    /// The TIK, for the launch measure.
    pub(crate) fn integrity(&self) -> &hmac::Key {
        &self.integrity
    }

    /// Encrypts `plain` into `out`, which has the same length.
    pub(crate) fn seal(
        &self,
        context: &Context<'_>,
        plain: &[u8],
        out: &mut [u8],
    ) -> Result<PacketHeader, PacketError> {
        let mut header = PacketHeader {
            flags: 0,
            iv: [0; 16],
            mac: [0; 32],
        };
        random(&mut header.iv)?;
        self.crypt(&header.iv, plain, out)?;
        let tag = self.mac(context, &header, out)?.sign();
        header.mac.copy_from_slice(tag.as_ref());
        Ok(header)
    }

    /// Checks `ciphertext`, then decrypts it into `out`, which has the same length.
    pub(crate) fn open(
        &self,
        context: &Context<'_>,
        header: &PacketHeader,
        ciphertext: &[u8],
        out: &mut [u8],
    ) -> Result<(), PacketError> {
        if header.flags != 0 {
            return Err(PacketError::Flags(header.flags));
        }
        if ciphertext.len() != out.len() {
            return Err(PacketError::Length {
                packet: ciphertext.len(),
                room: out.len(),
            });
        }
        let tag = self.mac(context, header, ciphertext)?.sign();
        if !equal(tag.as_ref(), &header.mac) {
            return Err(PacketError::BadMac);
        }
        self.crypt(&header.iv, ciphertext, out)
    }

    fn mac(
        &self,
        context: &Context<'_>,
        header: &PacketHeader,
        ciphertext: &[u8],
    ) -> Result<hmac::Context, PacketError> {
        let len = u32::try_from(ciphertext.len()).map_err(|_| PacketError::Length {
            packet: ciphertext.len(),
            room: u32::MAX as usize,
        })?;
        // Uncompressed, so the length in the guest is the length on the wire.
        let len = len.to_le_bytes();
        let mut mac = hmac::Context::with_key(&self.integrity);
        mac.update(match context {
            Context::Secret { .. } => &[0x01],
            Context::Data => &[0x02],
        });
        mac.update(&header.flags.to_le_bytes());
        mac.update(&header.iv);
        mac.update(&len);
        mac.update(&len);
        mac.update(ciphertext);
        if let Context::Secret { measure } = context {
            mac.update(*measure);
        }
        Ok(mac)
    }

    fn crypt(&self, iv: &[u8; 16], from: &[u8], to: &mut [u8]) -> Result<(), PacketError> {
        let length = PacketError::Length {
            packet: from.len(),
            room: to.len(),
        };
        let core =
            ctr::CtrCore::<_, ctr::flavors::Ctr128BE>::inner_iv_init(&self.cipher, iv.into());
        StreamCipherCoreWrapper::from_core(core)
            .apply_keystream_b2b(from, to)
            .map_err(|_| length)
    }
}

/// Fills `out` from the operating system.
pub(crate) fn random(out: &mut [u8]) -> Result<(), PacketError> {
    use ring::rand::SecureRandom;
    ring::rand::SystemRandom::new()
        .fill(out)
        .map_err(|_| PacketError::Random)
}

/// Compares MACs in constant time.
pub(crate) fn equal(a: &[u8], b: &[u8]) -> bool {
    subtle::ConstantTimeEq::ct_eq(a, b).into()
}

/// Length of a packet header.
pub const PACKET_HEADER_LEN: usize = 52;

#[cfg(test)]
mod tests {
    use super::*;

    fn cipher(byte: u8) -> PacketCipher {
        PacketCipher::new(&TransportKeys {
            tek: [byte; 16],
            tik: [byte; 16],
        })
    }

    #[test]
    fn a_page_comes_back() {
        let page: Vec<u8> = (0..4096u32).map(|i| i as u8).collect();
        let mut sealed = vec![0; 4096];
        let header = cipher(1).seal(&Context::Data, &page, &mut sealed).unwrap();
        assert_ne!(sealed, page);
        let mut opened = vec![0; 4096];
        cipher(1)
            .open(&Context::Data, &header, &sealed, &mut opened)
            .unwrap();
        assert_eq!(opened, page);
        let again = cipher(1).seal(&Context::Data, &page, &mut sealed).unwrap();
        assert_ne!(again.iv, header.iv);
    }

    #[test]
    fn changes_are_refused_before_anything_is_decrypted() {
        let mut sealed = vec![0; 64];
        let header = cipher(1)
            .seal(&Context::Data, &[7; 64], &mut sealed)
            .unwrap();
        let mut room = vec![0xaa; 64];
        let mut flipped = sealed.clone();
        flipped[63] ^= 0x80;
        let mut other_iv = header;
        other_iv.iv[0] ^= 1;
        let mut other_mac = header;
        other_mac.mac[31] ^= 1;
        let secret = Context::Secret { measure: &[0; 32] };
        let refused = [
            cipher(1).open(&Context::Data, &header, &flipped, &mut room),
            cipher(1).open(&Context::Data, &other_iv, &sealed, &mut room),
            cipher(1).open(&Context::Data, &other_mac, &sealed, &mut room),
            cipher(2).open(&Context::Data, &header, &sealed, &mut room),
            cipher(1).open(&secret, &header, &sealed, &mut room),
        ];
        assert_eq!(refused, [Err(PacketError::BadMac); 5]);
        assert_eq!(room, [0xaa; 64]);
    }

    #[test]
    fn a_secret_belongs_to_one_launch() {
        let mut sealed = vec![0; 32];
        let here = Context::Secret { measure: &[1; 32] };
        let elsewhere = Context::Secret { measure: &[2; 32] };
        let header = cipher(1).seal(&here, &[7; 32], &mut sealed).unwrap();
        let mut room = vec![0; 32];
        let refused = cipher(1).open(&elsewhere, &header, &sealed, &mut room);
        assert_eq!(refused, Err(PacketError::BadMac));
        cipher(1).open(&here, &header, &sealed, &mut room).unwrap();
        assert_eq!(room, [7; 32]);
    }

    #[test]
    fn lengths_and_flags_are_checked() {
        let mut sealed = vec![0; 32];
        let mut header = cipher(1)
            .seal(&Context::Data, &[7; 32], &mut sealed)
            .unwrap();
        let mut room = vec![0; 31];
        assert!(matches!(
            cipher(1).open(&Context::Data, &header, &sealed, &mut room),
            Err(PacketError::Length { .. })
        ));
        header.flags = 1;
        let compressed = cipher(1).open(&Context::Data, &header, &sealed, &mut [0; 32]);
        assert_eq!(compressed, Err(PacketError::Flags(1)));
    }

    #[test]
    fn headers_keep_amds_layout() {
        let header = PacketHeader {
            flags: 0x0403_0201,
            iv: [5; 16],
            mac: [6; 32],
        };
        let raw = header.to_bytes();
        assert_eq!(raw[..5], [1, 2, 3, 4, 5]);
        assert_eq!(raw[19..21], [5, 6]);
        assert_eq!(PacketHeader::from_bytes(&raw), Ok(header));
        assert_eq!(
            PacketHeader::from_bytes(&raw[..51]),
            Err(PacketError::HeaderLength(51))
        );
    }
}
