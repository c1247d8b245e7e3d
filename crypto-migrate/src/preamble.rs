//! What a further connection says in clear before its TLS: to which move it wants to go, and nothing else.
//!
//! It only routes. Whoever accepts connections reads it, bounded and by a deadline, finds the process that serves that move,
//! and hands the connection on; that it belongs there is proven afterwards, by the TLS and by [`crate::session`]'s join. A
//! first connection has none: it begins with a TLS record, whose first byte is another one.

use std::io::{self, Read, Write};

use crate::crypto::{self, CryptoError};

/// Bytes of a preamble.
pub const PREAMBLE_SIZE: usize = 24;
/// First byte of a preamble; a TLS connection begins with 0x16.
pub const PREAMBLE_BYTE: u8 = b'C';

/// Names a move to whoever accepts connections: random, and known to both ends of the move (and to a gateway between them).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Ticket(pub [u8; 16]);

impl Ticket {
    /// A new one.
    pub fn random() -> Result<Self, CryptoError> {
        Ok(Self(crypto::random()?))
    }

    /// The preamble.
    pub fn encode(&self) -> [u8; PREAMBLE_SIZE] {
        let mut out = [0; PREAMBLE_SIZE];
        let bytes = MAGIC.iter().chain(&self.0);
        out.iter_mut().zip(bytes).for_each(|(o, b)| *o = *b);
        out
    }

    /// Parses a preamble; `None` if it is none.
    pub fn parse(bytes: &[u8; PREAMBLE_SIZE]) -> Option<Self> {
        let (magic, ticket) = bytes.split_first_chunk::<8>()?;
        let ticket = ticket.first_chunk::<16>()?;
        (magic == MAGIC).then_some(Self(*ticket))
    }

    /// Writes the preamble, as the first bytes of a further connection.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        to.write_all(&self.encode())
    }

    /// Reads a preamble and not a byte more. The caller has set a deadline on its reads.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut bytes = [0; PREAMBLE_SIZE];
        from.read_exact(&mut bytes)?;
        Self::parse(&bytes).ok_or_else(|| {
            let text = "neither a TLS connection nor a further one of a move";
            io::Error::new(io::ErrorKind::InvalidData, text)
        })
    }
}

pub(crate) const MAGIC: &[u8; 8] = b"CMJOIN/1";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_preamble_is_its_magic_and_a_ticket(bytes: [u8; PREAMBLE_SIZE]) {
            prop_assert_eq!(Ticket::parse(&bytes), None);
            let mut right = bytes;
            right[..8].copy_from_slice(MAGIC);
            let ticket = Ticket::parse(&right).unwrap();
            prop_assert_eq!(ticket.encode(), right);
            prop_assert_eq!(&ticket.0, &right[8..]);
        }
    }

    #[test]
    fn no_byte_behind_it_is_read_and_a_cut_or_other_one_is_refused() {
        let bytes = [Ticket([7; 16]).encode().as_slice(), b"\x16\x03"].concat();
        let mut rest = bytes.as_slice();
        assert_eq!(Ticket::read(&mut rest).unwrap(), Ticket([7; 16]));
        assert_eq!(rest, b"\x16\x03");
        assert!(Ticket::read(&mut &bytes[..23]).is_err());
        assert!(Ticket::read(&mut [0x16; 64].as_slice()).is_err());
        assert_eq!(bytes[0], PREAMBLE_BYTE);
    }
}
