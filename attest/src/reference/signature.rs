//! Who signs reference values: Ed25519 keys, and the detached file of their signatures.

use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use zeroize::Zeroizing;

/// A signer's private key.
pub struct SigningKey(Ed25519KeyPair);

/// A signer's public key, written `ed25519:` and 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SignerKey([u8; 32]);

/// One signer's signature over a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signature {
    /// Who.
    pub key: SignerKey,
    signature: [u8; 64],
}

/// A file of signatures over one document, in TOML; each signer once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Signatures(Vec<Signature>);

/// Why a key is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a private key that is understood.
    #[error(
        "no Ed25519 private key in PKCS#8 form; make one with `casemate attest reference key` or \
         `openssl genpkey -algorithm ED25519`"
    )]
    Private,
    /// Not a public key.
    #[error("`{0}` is no signer's key; `ed25519:` and 64 hex digits are")]
    Public(String),
    /// The operating system gave no randomness.
    #[error("no randomness for a key")]
    Randomness,
}

/// Why a file of signatures is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureFileError {
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
    /// Too many.
    #[error("at most {MAX_SIGNATURES} signatures are taken, this file has {0}")]
    Count(usize),
}

impl SigningKey {
    /// A new key as PKCS#8 DER.
    pub fn generate() -> Result<Zeroizing<Vec<u8>>, KeyError> {
        Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map(|key| Zeroizing::new(key.as_ref().to_vec()))
            .map_err(|_| KeyError::Randomness)
    }

    /// Reads PKCS#8, PEM or DER, with or without the public half.
    pub fn read(bytes: &[u8]) -> Result<Self, KeyError> {
        let pem = PrivatePkcs8KeyDer::from_pem_slice(bytes);
        let der = pem.as_ref().map_or(bytes, |der| der.secret_pkcs8_der());
        Ed25519KeyPair::from_pkcs8_maybe_unchecked(der)
            .map(Self)
            .map_err(|_| KeyError::Private)
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

impl Signature {
    /// Whether it is of these very bytes.
    pub fn is_of(&self, document: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.key.0)
            .verify(&message(document), &self.signature)
            .is_ok()
    }
}

impl Signatures {
    /// Reads a file of signatures. What they are of shows later.
    pub fn parse(bytes: &[u8]) -> Result<Self, SignatureFileError> {
        if bytes.len() > MAX_SIGNATURES_LEN {
            return Err(SignatureFileError::Length(bytes.len()));
        }
        let syntax = |error: &dyn fmt::Display| SignatureFileError::Syntax(error.to_string());
        let text = std::str::from_utf8(bytes).map_err(|e| syntax(&e))?;
        let file: File = toml::from_str(text).map_err(|e| syntax(&e))?;
        if file.version != VERSION {
            return Err(SignatureFileError::Version(file.version));
        }
        if file.signature.len() > MAX_SIGNATURES {
            return Err(SignatureFileError::Count(file.signature.len()));
        }
        let one = |entry: Entry| {
            let mut signature = [0; 64];
            hex::decode_to_slice(&entry.signature, &mut signature)
                .map_err(|_| SignatureFileError::Signature(entry.key))?;
            Ok(Signature {
                key: entry.key,
                signature,
            })
        };
        file.signature
            .into_iter()
            .map(one)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The file's text.
    pub fn to_toml(&self) -> Result<String, SignatureFileError> {
        let entry = |signature: &Signature| Entry {
            key: signature.key,
            signature: hex::encode(signature.signature),
        };
        let file = File {
            version: VERSION,
            signature: self.0.iter().map(entry).collect(),
        };
        toml::to_string(&file).map_err(|error| SignatureFileError::Syntax(error.to_string()))
    }

    /// Adds a signature in place of the same signer's earlier one.
    pub fn add(&mut self, signature: Signature) -> Result<(), SignatureFileError> {
        self.0.retain(|earlier| earlier.key != signature.key);
        if self.0.len() >= MAX_SIGNATURES {
            return Err(SignatureFileError::Count(self.0.len() + 1));
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

impl fmt::Display for SignerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", hex::encode(self.0))
    }
}

impl fmt::Debug for SignerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignerKey({self})")
    }
}

impl FromStr for SignerKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut key = [0; 32];
        text.strip_prefix(PREFIX)
            .and_then(|digits| hex::decode_to_slice(digits, &mut key).ok())
            .ok_or_else(|| KeyError::Public(text.to_owned()))?;
        Ok(Self(key))
    }
}

impl TryFrom<String> for SignerKey {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SignerKey> for String {
    fn from(key: SignerKey) -> Self {
        key.to_string()
    }
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

const DOMAIN: &[u8] = b"casemate reference values v1\0";
const PREFIX: &str = "ed25519:";
const VERSION: u32 = 1;
const MAX_SIGNATURES: usize = 64;
