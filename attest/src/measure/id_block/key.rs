//! ID and author keys: P-384, in the form firmware takes them.

use crate::bytes::{push_reversed, reversed};
use crate::measure::snp::sha384;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P384_SHA384_FIXED, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair,
    UnparsedPublicKey,
};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use zeroize::Zeroizing;

/// A key that signs ID blocks or ID keys.
pub struct IdSigningKey(EcdsaKeyPair);

/// The public half: a point of P-384, big-endian x ‖ y. Whether it lies on the curve shows when a
/// signature is checked with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdPublicKey([u8; POINT_LEN]);

/// SHA-384 of a public key in firmware's form, as reports carry it; shown and serialised as 96
/// hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IdKeyDigest([u8; 48]);

/// Why a key is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdKeyError {
    /// Not a private key that is understood.
    #[error(
        "no P-384 private key in PKCS#8 form; make one with `casemate attest id-block key` or \
         `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384`, and convert others \
         with `openssl pkcs8 -topk8 -nocrypt`"
    )]
    Private,
    /// Not the length of a public key.
    #[error("a public key has {KEY_LEN} bytes, this has {0}")]
    Length(usize),
    /// Not the curve firmware knows.
    #[error("curve {0} is not P-384 (2)")]
    Curve(u32),
    /// Bytes outside the numbers are not zero.
    #[error("a public key has bytes outside its two numbers")]
    Fill,
    /// Not a digest.
    #[error("`{0}` is no key digest; 96 hex digits are")]
    Digest(String),
    /// The operating system gave no randomness.
    #[error("no randomness for a key")]
    Randomness,
}

impl IdSigningKey {
    /// A new key as PKCS#8 DER.
    pub fn generate() -> Result<Zeroizing<Vec<u8>>, IdKeyError> {
        EcdsaKeyPair::generate_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, &SystemRandom::new())
            .map(|key| Zeroizing::new(key.as_ref().to_vec()))
            .map_err(|_| IdKeyError::Randomness)
    }

    /// Reads PKCS#8 DER.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, IdKeyError> {
        EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, der, &SystemRandom::new())
            .map(Self)
            .map_err(|_| IdKeyError::Private)
    }

    /// Reads PKCS#8, PEM or DER.
    pub fn read(bytes: &[u8]) -> Result<Self, IdKeyError> {
        match PrivatePkcs8KeyDer::from_pem_slice(bytes) {
            Ok(der) => Self::from_pkcs8(der.secret_pkcs8_der()),
            Err(_) => Self::from_pkcs8(bytes),
        }
    }

    /// The public half.
    pub fn public(&self) -> IdPublicKey {
        let mut point = [0; POINT_LEN];
        // ring gives the uncompressed form: 4, x, y.
        let xy = self.0.public_key().as_ref().iter().skip(1);
        for (to, from) in point.iter_mut().zip(xy) {
            *to = *from;
        }
        IdPublicKey(point)
    }

    /// The signature in firmware's form: R and S little-endian in 72 bytes each, and zeros.
    pub(super) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, ring::error::Unspecified> {
        let signature = self.0.sign(&SystemRandom::new(), message)?;
        let (r, s) = signature.as_ref().split_at(NUMBER_LEN);
        let mut raw = Vec::with_capacity(SIGNATURE_LEN);
        push_reversed(&mut raw, r, FIELD_LEN);
        push_reversed(&mut raw, s, FIELD_LEN);
        raw.resize(SIGNATURE_LEN, 0);
        Ok(raw)
    }
}

impl IdPublicKey {
    /// Reads firmware's form: curve, x and y little-endian in 72 bytes each, zeros.
    pub fn parse(raw: &[u8]) -> Result<Self, IdKeyError> {
        let raw: &[u8; KEY_LEN] = raw.try_into().map_err(|_| IdKeyError::Length(raw.len()))?;
        let curve = crate::bytes::le32(raw, 0).unwrap_or_default();
        if curve != P384 {
            return Err(IdKeyError::Curve(curve));
        }
        let numbers = raw.get(4..).and_then(two_numbers);
        numbers.map(Self).ok_or(IdKeyError::Fill)
    }

    /// Firmware's form.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (x, y) = self.0.split_at(NUMBER_LEN);
        let mut raw = P384.to_le_bytes().to_vec();
        push_reversed(&mut raw, x, FIELD_LEN);
        push_reversed(&mut raw, y, FIELD_LEN);
        raw.resize(KEY_LEN, 0);
        raw
    }

    /// The digest that reports carry.
    pub fn digest(&self) -> IdKeyDigest {
        IdKeyDigest(sha384(&self.to_bytes()))
    }

    pub(super) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let Some(signature) = two_numbers(signature) else {
            return false;
        };
        let mut point = vec![UNCOMPRESSED];
        point.extend(self.0);
        UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point)
            .verify(message, &signature)
            .is_ok()
    }
}

impl IdKeyDigest {
    /// A digest from its bytes.
    pub const fn new(bytes: [u8; 48]) -> Self {
        Self(bytes)
    }

    /// The digest's bytes.
    pub const fn as_bytes(&self) -> &[u8; 48] {
        &self.0
    }
}

/// Two little-endian numbers of 72 bytes as big-endian ones of 48; `None` where a byte outside
/// of them is not zero.
fn two_numbers(raw: &[u8]) -> Option<[u8; POINT_LEN]> {
    let (first, rest) = raw.split_at_checked(FIELD_LEN)?;
    let (second, rest) = rest.split_at_checked(FIELD_LEN)?;
    let mut numbers = Vec::with_capacity(POINT_LEN);
    for field in [first, second] {
        let (number, fill) = field.split_at_checked(NUMBER_LEN)?;
        if fill.iter().any(|byte| *byte != 0) {
            return None;
        }
        numbers.extend(reversed(number));
    }
    if rest.iter().any(|byte| *byte != 0) {
        return None;
    }
    numbers.try_into().ok()
}

impl fmt::Display for IdKeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for IdKeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IdKeyDigest({self})")
    }
}

impl FromStr for IdKeyDigest {
    type Err = IdKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 48];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| IdKeyError::Digest(text.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for IdKeyDigest {
    type Error = IdKeyError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<IdKeyDigest> for String {
    fn from(digest: IdKeyDigest) -> Self {
        digest.to_string()
    }
}

const P384: u32 = 2;
const UNCOMPRESSED: u8 = 4;
const NUMBER_LEN: usize = 48;
const POINT_LEN: usize = 2 * NUMBER_LEN;
const FIELD_LEN: usize = 72;
const KEY_LEN: usize = 0x404;
const SIGNATURE_LEN: usize = 0x200;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_public_key_survives_firmware_s_form() {
        let key = IdSigningKey::from_pkcs8(&IdSigningKey::generate().unwrap()).unwrap();
        let public = key.public();
        assert_eq!(IdPublicKey::parse(&public.to_bytes()), Ok(public));
        assert_eq!(public.digest().to_string().parse(), Ok(public.digest()));
        assert!("00".parse::<IdKeyDigest>().is_err());
    }

    #[test]
    fn keys_are_read_as_pem_and_der_and_nothing_else_is_one() {
        let der = IdSigningKey::generate().unwrap();
        let mut pem = String::from("-----BEGIN PRIVATE KEY-----\n");
        use base64::Engine as _;
        pem += &base64::engine::general_purpose::STANDARD.encode(&*der);
        pem += "\n-----END PRIVATE KEY-----\n";
        let (a, b) = (IdSigningKey::read(&der), IdSigningKey::read(pem.as_bytes()));
        assert_eq!(a.unwrap().public(), b.unwrap().public());
        for bytes in [&b""[..], b"-----BEGIN PRIVATE KEY-----", &der[1..]] {
            assert_eq!(IdSigningKey::read(bytes).err(), Some(IdKeyError::Private));
        }
    }
}
