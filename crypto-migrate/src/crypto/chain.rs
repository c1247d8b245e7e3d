//! The keys of a stream's pages: each serves a bounded number of seals, then the next one of the chain does.
//!
//! Which key seals follows from the number of the seal alone, so nothing travels that could be forged: the first seal
//! after the step opens under the next key or not at all. A key's successor does not lead back to it.

use ring::hkdf;
use zeroize::Zeroizing;

use super::{AeadKey, CryptoError, Provider};

/// Seals one key makes, then the next does: 1 TiB in extents of 64 KiB, 2^8 times less than the bound of one key.
pub const SEALS_PER_KEY: u64 = 1 << 24;

/// The keys of one direction of one stream.
pub(crate) struct KeyChain {
    provider: Provider,
    secret: Zeroizing<[u8; SECRET_SIZE]>,
    key: AeadKey,
    generation: u64,
    seals_per_key: u64,
}

impl KeyChain {
    pub(super) fn new(
        provider: Provider,
        secret: Zeroizing<[u8; SECRET_SIZE]>,
    ) -> Result<Self, CryptoError> {
        Ok(Self {
            provider,
            key: key(provider, &secret)?,
            secret,
            generation: 0,
            seals_per_key: SEALS_PER_KEY,
        })
    }

    /// The key of a seal. Seals come in order: a number of another generation than this one or the next is refused.
    pub(crate) fn of(&mut self, sequence: u64) -> Result<&AeadKey, CryptoError> {
        let due = sequence / self.seals_per_key;
        if due == self.generation.saturating_add(1) {
            self.secret = expand(&self.secret, b"casemate-migrate/1 next key")?;
            self.key = key(self.provider, &self.secret)?;
            self.generation = due;
        } else if due != self.generation {
            return Err(CryptoError::SealLimit);
        }
        Ok(&self.key)
    }

    #[cfg(test)]
    pub(crate) fn with_seals_per_key(self, seals_per_key: u64) -> Self {
        Self {
            seals_per_key,
            ..self
        }
    }
}

fn key(provider: Provider, secret: &Zeroizing<[u8; SECRET_SIZE]>) -> Result<AeadKey, CryptoError> {
    AeadKey::new(provider, &expand(secret, b"casemate-migrate/1 page key")?)
}

fn expand<const N: usize>(
    secret: &Zeroizing<[u8; SECRET_SIZE]>,
    label: &[u8],
) -> Result<Zeroizing<[u8; N]>, CryptoError> {
    let mut out = Zeroizing::new([0; N]);
    hkdf::Prk::new_less_safe(hkdf::HKDF_SHA384, secret.as_slice())
        .expand(&[label], super::Length(N))
        .and_then(|okm| okm.fill(out.as_mut()))
        .map_err(|_| CryptoError::Agreement)?;
    Ok(out)
}

/// Size of a secret of the chain.
pub(super) const SECRET_SIZE: usize = 48;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::KeySchedule;

    fn chain() -> KeyChain {
        KeySchedule::extract(b"salt", b"secret")
            .chain(Provider::default(), b"info")
            .unwrap()
            .with_seals_per_key(4)
    }

    #[test]
    fn every_generation_has_a_key_of_its_own() {
        let mut chain = chain();
        let tags: Vec<_> = (0..16)
            .map(|number| {
                let key = chain.of(number).unwrap();
                // The same nonce under all of them: equal tags would be equal keys.
                key.seal(0, b"", &mut [0; 8]).unwrap()
            })
            .collect();
        for (at, tag) in tags.iter().enumerate() {
            for (other_at, other) in tags.iter().enumerate() {
                assert_eq!(tag == other, at / 4 == other_at / 4, "{at} {other_at}");
            }
        }
    }

    #[test]
    fn the_chain_neither_goes_back_nor_skips() {
        let mut chain = chain();
        assert_eq!(chain.of(8).err(), Some(CryptoError::SealLimit));
        assert!(chain.of(7).is_ok());
        assert_eq!(chain.of(3).err(), Some(CryptoError::SealLimit));
    }
}
