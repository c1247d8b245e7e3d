//! The one place that names a crypto provider.
//!
//! [`Provider`] says who does the bulk: TLS and the seals. The rest is ring's.
//! Everything else speaks of seals, MACs, digests and agreements. Keys have neither `Debug` output nor
//! `Clone`; intermediate secrets are wiped. ring does not wipe its own expanded keys on drop: they live as
//! long as one session, in the mover process, which ends with it.

mod aead;
mod chain;
mod provider;
mod record;

use ring::{agreement, digest, hkdf, hmac, rand::SecureRandom, rand::SystemRandom, signature};
use zeroize::Zeroizing;

pub(crate) use aead::{AeadKey, TAG_SIZE};
pub(crate) use chain::KeyChain;
pub use chain::SEALS_PER_KEY;
pub use provider::Provider;
#[cfg(test)]
pub(crate) use record::MAX_RECORDS;
pub(crate) use record::{RecordKey, TrafficSecret};

/// A primitive refused its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CryptoError {
    /// The system's random source failed.
    #[error("the system's random number generator failed; check that getrandom(2) is permitted")]
    Random,
    /// The peer's public key gives no usable secret.
    #[error("the key agreement failed: the peer's ephemeral public key is not valid")]
    Agreement,
    /// A seal, MAC or signature does not match.
    #[error("authentication failed")]
    Authentication,
    /// The key has made as many seals as it may.
    #[error("the key has reached its limit of 2^32 seals; start a new session")]
    SealLimit,
    /// A signing key could not be read or used.
    #[error("the private key is not a usable ECDSA P-256 key in PKCS#8")]
    SigningKey,
}

/// `N` bytes from the system's generator.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], CryptoError> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| CryptoError::Random)?;
    Ok(bytes)
}

/// SHA-256 over the concatenation of `parts`.
pub(crate) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    hash(&digest::SHA256, parts)
}

/// SHA-384 over the concatenation of `parts`.
pub(crate) fn sha384(parts: &[&[u8]]) -> [u8; 48] {
    hash(&digest::SHA384, parts)
}

/// SHA-256 over what comes, piece by piece.
pub(crate) struct RunningSha256(digest::Context);

impl Default for RunningSha256 {
    fn default() -> Self {
        Self(digest::Context::new(&digest::SHA256))
    }
}

impl RunningSha256 {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of what came so far.
    pub(crate) fn digest(&self) -> [u8; 32] {
        finish(self.0.clone())
    }
}

/// An ephemeral X25519 key, used once.
pub(crate) struct EphemeralKey {
    private: agreement::EphemeralPrivateKey,
    public: [u8; 32],
}

impl EphemeralKey {
    pub(crate) fn generate() -> Result<Self, CryptoError> {
        let private =
            agreement::EphemeralPrivateKey::generate(&agreement::X25519, &SystemRandom::new())
                .map_err(|_| CryptoError::Random)?;
        let public = private
            .compute_public_key()
            .map_err(|_| CryptoError::Random)?;
        let public = public
            .as_ref()
            .try_into()
            .map_err(|_| CryptoError::Agreement)?;
        Ok(Self { private, public })
    }

    pub(crate) fn public(&self) -> &[u8; 32] {
        &self.public
    }

    /// The shared secret; refuses points of low order (ring checks for the all-zero result).
    pub(crate) fn agree(self, peer: &[u8; 32]) -> Result<Zeroizing<[u8; 32]>, CryptoError> {
        let peer = agreement::UnparsedPublicKey::new(&agreement::X25519, peer);
        agreement::agree_ephemeral(self.private, &peer, |secret| {
            let mut out = Zeroizing::new([0; 32]);
            out.iter_mut().zip(secret).for_each(|(o, s)| *o = *s);
            out
        })
        .map_err(|_| CryptoError::Agreement)
    }
}

/// HKDF-SHA-384 after the extract step.
pub(crate) struct KeySchedule(hkdf::Prk);

impl KeySchedule {
    pub(crate) fn extract(salt: &[u8], secret: &[u8]) -> Self {
        Self(hkdf::Salt::new(hkdf::HKDF_SHA384, salt).extract(secret))
    }

    pub(crate) fn aead(&self, provider: Provider, info: &[u8]) -> Result<AeadKey, CryptoError> {
        AeadKey::new(provider, &self.expand(info)?)
    }

    pub(crate) fn mac(&self, info: &[u8]) -> Result<MacKey, CryptoError> {
        let key: Zeroizing<[u8; 32]> = self.expand(info)?;
        Ok(MacKey(hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())))
    }

    /// The first of a chain of keys.
    pub(crate) fn chain(&self, provider: Provider, info: &[u8]) -> Result<KeyChain, CryptoError> {
        KeyChain::new(provider, self.expand(info)?)
    }

    /// A secret that other keys come of.
    pub(crate) fn secret(&self, info: &[u8]) -> Result<Zeroizing<[u8; 48]>, CryptoError> {
        self.expand(info)
    }

    fn expand<const N: usize>(&self, info: &[u8]) -> Result<Zeroizing<[u8; N]>, CryptoError> {
        let mut out = Zeroizing::new([0; N]);
        self.0
            .expand(&[info], Length(N))
            .and_then(|okm| okm.fill(out.as_mut()))
            .map_err(|_| CryptoError::Agreement)?;
        Ok(out)
    }
}

/// An output of so many bytes.
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// HMAC-SHA-256.
pub(crate) struct MacKey(hmac::Key);

impl MacKey {
    pub(crate) fn mac(&self, data: &[u8]) -> [u8; 32] {
        let tag = hmac::sign(&self.0, data);
        let mut out = [0; 32];
        out.iter_mut().zip(tag.as_ref()).for_each(|(o, t)| *o = *t);
        out
    }

    /// Compares in constant time.
    pub(crate) fn verify(&self, data: &[u8], mac: &[u8]) -> Result<(), CryptoError> {
        hmac::verify(&self.0, data, mac).map_err(|_| CryptoError::Authentication)
    }
}

/// A local ECDSA P-256 key.
pub(crate) struct P256Key(signature::EcdsaKeyPair);

impl P256Key {
    pub(crate) fn from_pkcs8(der: &[u8]) -> Result<Self, CryptoError> {
        let algorithm = &signature::ECDSA_P256_SHA256_ASN1_SIGNING;
        signature::EcdsaKeyPair::from_pkcs8(algorithm, der, &SystemRandom::new())
            .map(Self)
            .map_err(|_| CryptoError::SigningKey)
    }

    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, CryptoError> {
        let signature = self
            .0
            .sign(&SystemRandom::new(), message)
            .map_err(|_| CryptoError::SigningKey)?;
        Ok(signature.as_ref().to_vec())
    }
}

/// Verifies an ECDSA P-256 SHA-256 signature (ASN.1) against an uncompressed public point.
pub(crate) fn verify_p256(
    point: &[u8],
    message: &[u8],
    signature: &[u8],
) -> Result<(), CryptoError> {
    signature::UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_ASN1, point)
        .verify(message, signature)
        .map_err(|_| CryptoError::Authentication)
}

fn hash<const N: usize>(algorithm: &'static digest::Algorithm, parts: &[&[u8]]) -> [u8; N] {
    let mut context = digest::Context::new(algorithm);
    parts.iter().for_each(|part| context.update(part));
    finish(context)
}

fn finish<const N: usize>(context: digest::Context) -> [u8; N] {
    let mut out = [0; N];
    out.iter_mut()
        .zip(context.finish().as_ref())
        .for_each(|(o, d)| *o = *d);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_refuses_low_order_points() {
        let key = EphemeralKey::generate().unwrap();
        assert_eq!(key.agree(&[0; 32]).err(), Some(CryptoError::Agreement));
    }

    #[test]
    fn different_info_different_keys() {
        let schedule = KeySchedule::extract(b"salt", b"secret");
        assert_ne!(
            schedule.mac(b"a").unwrap().mac(b"x"),
            schedule.mac(b"b").unwrap().mac(b"x")
        );
    }
}
