//! The attestation result that a guest gets for its evidence: a JWT, signed ES384.

use super::key::TeePublicKey;
use crate::verify::Verdict;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};

/// What a token is about.
pub struct TokenSubject<'a> {
    /// The verdict over the evidence.
    pub verdict: &'a Verdict,
    /// The guest's key.
    pub key: &'a TeePublicKey,
    /// When it was accepted.
    pub at: SystemTime,
    /// How long the token is good.
    pub lifetime: Duration,
}

/// Makes tokens.
pub trait TokenIssuer: Send + Sync {
    /// A JWT for `subject`; `None` where it cannot be signed.
    fn issue(&self, subject: &TokenSubject<'_>) -> Option<String>;
}

/// Signs with a key that lives as long as the process: the token is for this broker's own guests,
/// which need none to get a resource, and says to others no more than they can check.
pub struct EphemeralIssuer {
    key: EcdsaKeyPair,
    random: SystemRandom,
}

impl EphemeralIssuer {
    /// With a new key; `None` where the operating system gives no randomness.
    pub fn generate() -> Option<Self> {
        let random = SystemRandom::new();
        let algorithm = &ECDSA_P384_SHA384_FIXED_SIGNING;
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random).ok()?;
        let key = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random).ok()?;
        Some(Self { key, random })
    }

    /// The public key, an uncompressed P-384 point.
    pub fn public_key(&self) -> &[u8] {
        self.key.public_key().as_ref()
    }
}

impl TokenIssuer for EphemeralIssuer {
    fn issue(&self, subject: &TokenSubject<'_>) -> Option<String> {
        let header = URL_SAFE_NO_PAD.encode(json!({ "typ": "JWT", "alg": "ES384" }).to_string());
        let claims = URL_SAFE_NO_PAD.encode(claims(subject)?.to_string());
        let signed = format!("{header}.{claims}");
        let signature = self.key.sign(&self.random, signed.as_bytes()).ok()?;
        Some(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}

fn claims(subject: &TokenSubject<'_>) -> Option<Value> {
    let issued = subject.at.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(json!({
        "iss": "casemate-broker",
        "iat": issued.as_secs(),
        "nbf": issued.as_secs(),
        "exp": issued.checked_add(subject.lifetime)?.as_secs(),
        "tee": "snp",
        "tee-pubkey": subject.key,
        "emulated": subject.verdict.emulated,
        "overall": subject.verdict.overall,
    }))
}
