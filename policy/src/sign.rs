//! Who signs policies: Ed25519 keys, and the detached file of their signatures.
//!
//! A signature is over the bytes `casemate policy v1`, a zero byte, and the document's bytes as they are in its file. The
//! file of signatures is TOML:
//!
//! ```toml
//! version = 1
//! [[signature]]
//! key = "ed25519:…"        # the public key, 64 hex digits: it is its own identifier
//! signature = "…"          # 128 hex digits (RFC 8032)
//! ```

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::types::{TypeError, shorten};

/// A signer's private key.
pub struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// A new key as PKCS#8 DER.
    pub fn generate() -> Result<Zeroizing<Vec<u8>>, SignError> {
        Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map(|key| Zeroizing::new(key.as_ref().to_vec()))
            .map_err(|_| SignError::Randomness)
    }

    /// Reads PKCS#8, PEM or DER, with or without the public half.
    pub fn read(bytes: &[u8]) -> Result<Self, SignError> {
        let pem = PrivatePkcs8KeyDer::from_pem_slice(bytes);
        let der = pem.as_ref().map_or(bytes, |der| der.secret_pkcs8_der());
        Ed25519KeyPair::from_pkcs8_maybe_unchecked(der)
            .map(Self)
            .map_err(|_| SignError::PrivateKey)
    }

    /// The public half.
    pub fn public(&self) -> SignerKey {
        let mut key = [0; 32];
        key.copy_from_slice(self.0.public_key().as_ref());
        SignerKey(key)
    }

    /// Signs a document's bytes.
    pub fn sign(&self, document: &[u8]) -> Signature {
        let mut signature = [0; 64];
        signature.copy_from_slice(self.0.sign(&message(document)).as_ref());
        Signature {
            key: self.public(),
            signature,
        }
    }
}

/// A signer's public key, written `ed25519:` and 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SignerKey([u8; 32]);

impl FromStr for SignerKey {
    type Err = TypeError;

    fn from_str(text: &str) -> Result<Self, TypeError> {
        let mut key = [0; 32];
        text.strip_prefix(PREFIX)
            .filter(|digits| !digits.bytes().any(|b| b.is_ascii_uppercase()))
            .and_then(|digits| hex::decode_to_slice(digits, &mut key).ok())
            .ok_or_else(|| TypeError::SignerKey {
                found: shorten(text),
            })?;
        Ok(Self(key))
    }
}

impl fmt::Display for SignerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", hex::encode(self.0))
    }
}

impl fmt::Debug for SignerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One signer's signature over a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// Who.
    pub key: SignerKey,
    signature: [u8; 64],
}

impl Signature {
    /// Whether it is of these very bytes.
    pub fn is_of(&self, document: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.key.0)
            .verify(&message(document), &self.signature)
            .is_ok()
    }
}

/// A file of signatures over one document; each signer once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signatures(Vec<Signature>);

impl Signatures {
    /// Reads a file of signatures. What they are of shows later.
    pub fn parse(bytes: &[u8]) -> Result<Self, SignError> {
        if bytes.len() > MAX_SIGNATURES_LEN {
            return Err(SignError::Length(bytes.len()));
        }
        let syntax = |error: &dyn fmt::Display| SignError::Syntax(error.to_string());
        let text = std::str::from_utf8(bytes).map_err(|e| syntax(&e))?;
        let file: File = toml::from_str(text).map_err(|e| syntax(&e))?;
        if file.version != VERSION {
            return Err(SignError::Version(file.version));
        }
        let mut all = Self::default();
        for entry in file.signature {
            let mut signature = [0; 64];
            hex::decode_to_slice(&entry.signature, &mut signature)
                .map_err(|_| SignError::Signature(entry.key))?;
            if all.0.iter().any(|earlier| earlier.key == entry.key) {
                return Err(SignError::Twice(entry.key));
            }
            all.add(Signature {
                key: entry.key,
                signature,
            })?;
        }
        Ok(all)
    }

    /// The file's text.
    pub fn to_toml(&self) -> Result<String, SignError> {
        let entry = |signature: &Signature| Entry {
            key: signature.key,
            signature: hex::encode(signature.signature),
        };
        let file = File {
            version: VERSION,
            signature: self.0.iter().map(entry).collect(),
        };
        toml::to_string(&file).map_err(|error| SignError::Syntax(error.to_string()))
    }

    /// Adds a signature in place of the same signer's earlier one.
    pub fn add(&mut self, signature: Signature) -> Result<(), SignError> {
        self.0.retain(|earlier| earlier.key != signature.key);
        if self.0.len() >= MAX_SIGNATURES {
            return Err(SignError::Count);
        }
        self.0.push(signature);
        Ok(())
    }

    /// Drops signatures that are not of `document`, as those of an earlier state of it.
    pub fn retain_of(&mut self, document: &[u8]) {
        self.0.retain(|signature| signature.is_of(document));
    }

    /// The signatures.
    pub fn iter(&self) -> impl Iterator<Item = &Signature> {
        self.0.iter()
    }
}

/// Whose signatures a host wants to see, and how many of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawTrust")]
pub struct Trust {
    keys: BTreeSet<SignerKey>,
    threshold: usize,
}

impl Trust {
    /// At least `threshold` of these keys, which is 1 to their number.
    pub fn new(
        keys: impl IntoIterator<Item = SignerKey>,
        threshold: usize,
    ) -> Result<Self, SignError> {
        let keys: BTreeSet<_> = keys.into_iter().collect();
        if threshold == 0 || threshold > keys.len() {
            return Err(SignError::Threshold {
                threshold,
                keys: keys.len(),
            });
        }
        Ok(Self { keys, threshold })
    }

    /// How many signers it takes.
    pub fn threshold(&self) -> usize {
        self.threshold
    }

    /// The trusted signers who signed these very bytes, each once; others do not count. A signature in a trusted name
    /// that is not of them refuses: somebody changed the document or the signature.
    pub fn signers(
        &self,
        document: &[u8],
        signatures: &Signatures,
    ) -> Result<BTreeSet<SignerKey>, SignError> {
        let mut signers = BTreeSet::new();
        for signature in signatures.iter().filter(|s| self.keys.contains(&s.key)) {
            if !signature.is_of(document) {
                return Err(SignError::Forged(signature.key));
            }
            signers.insert(signature.key);
        }
        Ok(signers)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTrust {
    keys: Vec<SignerKey>,
    threshold: usize,
}

impl TryFrom<RawTrust> for Trust {
    type Error = SignError;

    fn try_from(raw: RawTrust) -> Result<Self, SignError> {
        Self::new(raw.keys, raw.threshold)
    }
}

/// Why a key, a file of signatures or a trust is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignError {
    /// Not a private key that is understood.
    #[error(
        "no Ed25519 private key in PKCS#8 form; make one with `casemate policy keygen` or \
         `openssl genpkey -algorithm ED25519`"
    )]
    PrivateKey,
    /// The operating system gave no randomness.
    #[error("no randomness for a key")]
    Randomness,
    /// Too large.
    #[error("a file of signatures has at most {MAX_SIGNATURES_LEN} bytes, this has {0}")]
    Length(usize),
    /// Not such a file.
    #[error("not a file of signatures: {0}")]
    Syntax(String),
    /// A version that is not known.
    #[error("files of signatures of version {0} are not known; 1 is")]
    Version(u32),
    /// Not a signature.
    #[error("the signature of {0} is not 128 hex digits")]
    Signature(SignerKey),
    /// One signer twice.
    #[error("{0} is there twice; keep one signature of each signer")]
    Twice(SignerKey),
    /// Too many.
    #[error("at most {MAX_SIGNATURES} signatures are taken")]
    Count,
    /// A threshold that is none, or cannot be reached.
    #[error("a threshold of {threshold} with {keys} different keys; write 1 to the number of keys")]
    Threshold {
        /// The threshold.
        threshold: usize,
        /// How many keys there are.
        keys: usize,
    },
    /// A signature in a trusted name that does not verify.
    #[error("the signature of {0} is not of this document; have it signed again as it is now")]
    Forged(SignerKey),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    signature: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    key: SignerKey,
    signature: String,
}

/// A key may sign other things too; none of them begins so.
fn message(document: &[u8]) -> Vec<u8> {
    [DOMAIN, document].concat()
}

/// The largest file of signatures that is read, in bytes.
pub const MAX_SIGNATURES_LEN: usize = 64 << 10;

const DOMAIN: &[u8] = b"casemate policy v1\0";
const PREFIX: &str = "ed25519:";
const VERSION: u32 = 1;
const MAX_SIGNATURES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> SigningKey {
        SigningKey::read(&SigningKey::generate().unwrap()).unwrap()
    }

    #[test]
    fn a_threshold_counts_different_trusted_signers_of_these_bytes() {
        let (a, b, stranger) = (key(), key(), key());
        let trust = Trust::new([a.public(), b.public()], 2).unwrap();
        let document = b"version = 1\n";
        let mut signatures = Signatures::default();
        let signed = |signatures: &Signatures| trust.signers(document, signatures).unwrap().len();
        assert_eq!(signed(&signatures), 0);
        signatures.add(a.sign(document)).unwrap();
        signatures.add(a.sign(document)).unwrap();
        signatures.add(stranger.sign(b"anything")).unwrap();
        assert_eq!(signed(&signatures), 1);
        signatures.add(b.sign(document)).unwrap();
        assert_eq!(signed(&signatures), 2);
        let read = Signatures::parse(signatures.to_toml().unwrap().as_bytes()).unwrap();
        assert_eq!(read, signatures);
        assert_eq!(
            trust.signers(b"version = 2\n", &read),
            Err(SignError::Forged(a.public()))
        );
        signatures.retain_of(document);
        assert_eq!(signatures.iter().count(), 2);
    }

    #[test]
    fn a_signature_is_for_policies_only() {
        let key = key();
        let bare = Signature {
            key: key.public(),
            signature: key.0.sign(b"document").as_ref().try_into().unwrap(),
        };
        assert!(!bare.is_of(b"document"));
        assert!(key.sign(b"document").is_of(b"document"));
    }

    #[test]
    fn thresholds_that_mean_nothing_are_refused() {
        let key = key().public();
        for (keys, threshold) in [(vec![], 0), (vec![key], 0), (vec![key, key], 2)] {
            assert!(Trust::new(keys, threshold).is_err());
        }
    }

    #[test]
    fn files_of_signatures_are_strict() {
        let key = key();
        let mut one = Signatures::default();
        one.add(key.sign(b"x")).unwrap();
        let good = one.to_toml().unwrap();
        let entry = &good[good.find("[[").unwrap()..];
        for bad in [
            String::new(),
            good.replace("version = 1", "version = 2"),
            good.replace("signature = \"", "signature = \"0"),
            good.replace("ed25519:", "rsa:"),
            format!("{good}{entry}"),
            format!("{good}note = \"\"\n"),
            "#".repeat(MAX_SIGNATURES_LEN + 1),
        ] {
            assert!(Signatures::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
