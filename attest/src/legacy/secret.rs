//! Secret packets: what the owner releases to a guest that proved itself (LAUNCH_SECRET).

use super::packet::{Context, PacketCipher, PacketError, PacketHeader, TransportKeys};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// A secret, sealed for one launch of one guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretPacket {
    /// The header that LAUNCH_SECRET takes.
    pub header: PacketHeader,
    /// The sealed secret, as long as the secret.
    #[serde(with = "serde_bytes")]
    pub ciphertext: Vec<u8>,
}

/// Why a secret cannot be sealed or opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Firmware takes whole blocks only.
    #[error(
        "a secret of {0} bytes cannot be injected; fill it to a multiple of 16, at most {SECRET_MAX}"
    )]
    Length(usize),
    /// The packet does not open.
    #[error(transparent)]
    Packet(#[from] PacketError),
}

impl SecretPacket {
    /// Seals `secret`, a multiple of 16 bytes, for the launch that gave `measure`.
    pub(crate) fn build(
        keys: &TransportKeys,
        measure: &[u8; 32],
        secret: &[u8],
    ) -> Result<Self, SecretError> {
        check_len(secret.len())?;
        let mut ciphertext = vec![0; secret.len()];
        let header =
            PacketCipher::new(keys).seal(&Context::Secret { measure }, secret, &mut ciphertext)?;
        Ok(Self { header, ciphertext })
    }

    /// Opens a packet: the platform's side.
    pub(crate) fn open(
        cipher: &PacketCipher,
        measure: &[u8; 32],
        header: &PacketHeader,
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SecretError> {
        check_len(ciphertext.len())?;
        let mut secret = Zeroizing::new(vec![0; ciphertext.len()]);
        cipher.open(
            &Context::Secret { measure },
            header,
            ciphertext,
            &mut secret,
        )?;
        Ok(secret)
    }
}

fn check_len(len: usize) -> Result<(), SecretError> {
    if len == 0 || len > SECRET_MAX || !len.is_multiple_of(16) {
        return Err(SecretError::Length(len));
    }
    Ok(())
}

/// The longest secret that firmware takes in one packet.
pub const SECRET_MAX: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_opens_only_for_its_launch() {
        let keys = TransportKeys::random().unwrap();
        let packet = SecretPacket::build(&keys, &[3; 32], &[9; 48]).unwrap();
        let cipher = PacketCipher::new(&keys);
        let open =
            |measure| SecretPacket::open(&cipher, measure, &packet.header, &packet.ciphertext);
        assert_eq!(**open(&[3; 32]).unwrap(), [9; 48]);
        assert_eq!(
            open(&[4; 32]).unwrap_err(),
            SecretError::Packet(PacketError::BadMac)
        );
    }

    #[test]
    fn odd_lengths_are_refused() {
        let keys = TransportKeys::random().unwrap();
        for len in [0, 1, 15, 17, SECRET_MAX + 16] {
            assert_eq!(
                SecretPacket::build(&keys, &[0; 32], &vec![0; len]),
                Err(SecretError::Length(len))
            );
        }
        SecretPacket::build(&keys, &[0; 32], &[0; SECRET_MAX]).unwrap();
    }
}
