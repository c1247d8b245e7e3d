//! AES-256-GCM with counter nonces that never travel.
//!
//! Where the provider can, a copy and the cipher are one pass: [`AeadKey::seal_from`], [`AeadKey::open_into`].

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

    /// Encrypts `from` into `out`, which is as long; the counter must never repeat under this key.
    pub(crate) fn seal_from(
        &self,
        counter: u64,
        aad: &[u8],
        from: &[u8],
        out: &mut [u8],
    ) -> Result<[u8; TAG_SIZE], CryptoError> {
        #[cfg(feature = "aws-lc")]
        if let Key::AwsLc(key) = &self.0 {
            use aws_lc_rs::aead;
            if counter >= MAX_SEALS {
                return Err(CryptoError::SealLimit);
            }
            let nonce = aead::Nonce::assume_unique_for_key(nonce(counter));
            let mut tag = [0; TAG_SIZE];
            key.seal_out_of_place_scatter(nonce, aead::Aad::from(aad), from, out, &[], &mut tag)
                .map_err(|_| CryptoError::SealLimit)?;
            return Ok(tag);
        }
        if from.len() != out.len() {
            return Err(CryptoError::Authentication);
        }
        out.copy_from_slice(from);
        self.seal(counter, aad, out)
    }

    /// Decrypts `data` (ciphertext and tag) in place and returns the plaintext.
    pub(crate) fn open<'a>(
        &self,
        counter: u64,
        aad: &[u8],
        data: &'a mut [u8],
    ) -> Result<&'a mut [u8], CryptoError> {
        self.open_with(nonce(counter), aad, data)
    }

    /// The same under a nonce of the caller's.
    pub(super) fn open_with<'a>(
        &self,
        nonce: [u8; NONCE_SIZE],
        aad: &[u8],
        data: &'a mut [u8],
    ) -> Result<&'a mut [u8], CryptoError> {
        with!(&self.0, aead, key => {
            let nonce = aead::Nonce::assume_unique_for_key(nonce);
            key.open_in_place(nonce, aead::Aad::from(aad), data)
                .map_err(|_| CryptoError::Authentication)
        })
    }

    /// Decrypts `data` (ciphertext and tag) into `out`, which is as long as the ciphertext. On an error `out` may
    /// hold bytes that nobody has authenticated, and `data` is of no further use.
    pub(super) fn open_into(
        &self,
        nonce: [u8; NONCE_SIZE],
        aad: &[u8],
        data: &mut [u8],
        out: &mut [u8],
    ) -> Result<(), CryptoError> {
        let refused = CryptoError::Authentication;
        #[cfg(feature = "aws-lc")]
        if let Key::AwsLc(key) = &self.0 {
            use aws_lc_rs::aead;
            let (sealed, tag) = data.split_last_chunk::<TAG_SIZE>().ok_or(refused)?;
            let nonce = aead::Nonce::assume_unique_for_key(nonce);
            return key
                .open_separate_gather(nonce, aead::Aad::from(aad), sealed, tag, out)
                .map_err(|_| refused);
        }
        let plain = self.open_with(nonce, aad, data)?;
        if plain.len() != out.len() {
            return Err(refused);
        }
        out.copy_from_slice(plain);
        Ok(())
    }

    /// Encrypts all but the last byte of `data` in place and, as if it stood in the place of that byte, `last`;
    /// returns it and the tag. The last byte of `data` is what it was.
    pub(super) fn seal_with_last(
        &self,
        nonce: [u8; NONCE_SIZE],
        aad: &[u8],
        data: &mut [u8],
        last: u8,
    ) -> Result<[u8; 1 + TAG_SIZE], CryptoError> {
        let refused = CryptoError::SealLimit;
        let mut out = [0; 1 + TAG_SIZE];
        match &self.0 {
            #[cfg(feature = "aws-lc")]
            Key::AwsLc(key) => {
                use aws_lc_rs::aead;
                let (_, data) = data.split_last_mut().ok_or(refused)?;
                let nonce = aead::Nonce::assume_unique_for_key(nonce);
                key.seal_in_place_scatter(nonce, aead::Aad::from(aad), data, &[last], &mut out)
                    .map_err(|_| refused)?;
            }
            Key::Ring(key) => {
                use ring::aead;
                let kept = std::mem::replace(data.last_mut().ok_or(refused)?, last);
                let nonce = aead::Nonce::assume_unique_for_key(nonce);
                let tag = key
                    .seal_in_place_separate_tag(nonce, aead::Aad::from(aad), data)
                    .map_err(|_| refused)?;
                let sealed = std::mem::replace(data.last_mut().ok_or(refused)?, kept);
                let both = std::iter::once(&sealed).chain(tag.as_ref());
                out.iter_mut().zip(both).for_each(|(o, b)| *o = *b);
            }
        }
        Ok(out)
    }
}

/// Size of a nonce in bytes.
pub(super) const NONCE_SIZE: usize = 12;

fn nonce(counter: u64) -> [u8; NONCE_SIZE] {
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
    fn in_one_pass_or_in_place_the_seal_is_the_same() {
        for &provider in Provider::ALL {
            let (key, page) = (key(provider), [0x5a; 4096]);
            let (mut placed, mut copied) = (page, [0; 4096]);
            let tag = key.seal(3, b"aad", &mut placed).unwrap();
            assert_eq!(key.seal_from(3, b"aad", &page, &mut copied), Ok(tag));
            assert_eq!(placed, copied);
            assert!(key.seal_from(3, b"aad", &page, &mut [0; 4095]).is_err());
            assert_eq!(
                key.seal_from(MAX_SEALS, b"", &page, &mut copied),
                Err(CryptoError::SealLimit)
            );
            let mut sealed = [placed.as_slice(), &tag].concat();
            let mut out = [0; 4096];
            assert_eq!(
                key.open_into(nonce(3), b"aad", &mut sealed.clone(), &mut [0; 4095]),
                Err(CryptoError::Authentication)
            );
            key.open_into(nonce(3), b"aad", &mut sealed.clone(), &mut out)
                .unwrap();
            assert_eq!(out, page);
            sealed[4096] ^= 1;
            assert_eq!(
                key.open_into(nonce(3), b"aad", &mut sealed, &mut out),
                Err(CryptoError::Authentication)
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
