//! AES-256-GCM with counter nonces that never travel.

use zeroize::Zeroizing;

use super::{CryptoError, Provider};

/// Size of an AES-256-GCM tag in bytes.
pub const TAG_SIZE: usize = 16;
/// Seals one key may make; a session ends long before AES-GCM's own bounds.
pub const MAX_SEALS: u64 = 1 << 32;

/// A key for one direction of one stream.
pub(crate) struct AeadKey(Key);

enum Key {
    #[cfg(feature = "aws-lc")]
    AwsLc(aws_lc_rs::aead::LessSafeKey),
    Ring(Box<ring::aead::LessSafeKey>),
}

/// The two crates share their interface, but no types.
macro_rules! with {
    ($key:expr, $provider:ident, $bound:ident => $body:expr) => {
        match $key {
            #[cfg(feature = "aws-lc")]
            Key::AwsLc($bound) => {
                use aws_lc_rs::aead as $provider;
                $body
            }
            Key::Ring($bound) => {
                use ring::aead as $provider;
                $body
            }
        }
    };
}

impl AeadKey {
    pub(super) fn new(provider: Provider, key: &Zeroizing<[u8; 32]>) -> Result<Self, CryptoError> {
        let refused = CryptoError::Agreement;
        Ok(Self(match provider {
            #[cfg(feature = "aws-lc")]
            Provider::AwsLc => {
                use aws_lc_rs::aead;
                let key = aead::UnboundKey::new(&aead::AES_256_GCM, key.as_ref());
                Key::AwsLc(aead::LessSafeKey::new(key.map_err(|_| refused)?))
            }
            Provider::Ring => {
                use ring::aead;
                let key = aead::UnboundKey::new(&aead::AES_256_GCM, key.as_ref());
                Key::Ring(Box::new(aead::LessSafeKey::new(key.map_err(|_| refused)?)))
            }
        }))
    }

    /// Encrypts in place; the counter must never repeat under this key.
    pub(crate) fn seal(
        &self,
        counter: u64,
        aad: &[u8],
        data: &mut [u8],
    ) -> Result<[u8; TAG_SIZE], CryptoError> {
        if counter >= MAX_SEALS {
            return Err(CryptoError::SealLimit);
        }
        with!(&self.0, aead, key => {
            let nonce = aead::Nonce::assume_unique_for_key(nonce(counter));
            let tag = key
                .seal_in_place_separate_tag(nonce, aead::Aad::from(aad), data)
                .map_err(|_| CryptoError::SealLimit)?;
            tag.as_ref()
                .try_into()
                .map_err(|_| CryptoError::Authentication)
        })
    }

    /// Decrypts `data` (ciphertext and tag) in place and returns the plaintext.
    pub(crate) fn open<'a>(
        &self,
        counter: u64,
        aad: &[u8],
        data: &'a mut [u8],
    ) -> Result<&'a mut [u8], CryptoError> {
        with!(&self.0, aead, key => {
            let nonce = aead::Nonce::assume_unique_for_key(nonce(counter));
            key.open_in_place(nonce, aead::Aad::from(aad), data)
                .map_err(|_| CryptoError::Authentication)
        })
    }
}

fn nonce(counter: u64) -> [u8; 12] {
    let [a, b, c, d, e, f, g, h] = counter.to_be_bytes();
    [0, 0, 0, 0, a, b, c, d, e, f, g, h]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::KeySchedule;

    fn key(provider: Provider) -> AeadKey {
        let schedule = KeySchedule::extract(b"salt", b"secret");
        schedule.aead(provider, b"info").unwrap()
    }

    #[test]
    fn seal_limit_is_hard() {
        for &provider in Provider::ALL {
            let key = key(provider);
            assert!(key.seal(MAX_SEALS - 1, b"", &mut [0; 8]).is_ok());
            assert_eq!(
                key.seal(MAX_SEALS, b"", &mut [0; 8]),
                Err(CryptoError::SealLimit)
            );
        }
    }

    #[test]
    fn what_one_provider_seals_the_other_opens_and_neither_believes_a_change() {
        for (&from, &to) in Provider::ALL.iter().zip(Provider::ALL.iter().rev()) {
            let mut sealed = *b"a page";
            let tag = key(from).seal(7, b"aad", &mut sealed).unwrap();
            let whole = [sealed.as_slice(), &tag].concat();
            let open = |counter, aad: &[u8], flip: usize| {
                let mut whole = whole.clone();
                if let Some(byte) = whole.get_mut(flip) {
                    *byte ^= 1;
                }
                key(to)
                    .open(counter, aad, &mut whole)
                    .map(|plain| plain.to_vec())
            };
            assert_eq!(open(7, b"aad", usize::MAX).unwrap(), b"a page");
            assert_eq!(
                open(8, b"aad", usize::MAX),
                Err(CryptoError::Authentication)
            );
            assert_eq!(
                open(7, b"aae", usize::MAX),
                Err(CryptoError::Authentication)
            );
            for flip in 0..whole.len() {
                assert_eq!(open(7, b"aad", flip), Err(CryptoError::Authentication));
            }
        }
    }
}
