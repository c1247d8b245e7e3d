//! The key that a guest wants its secrets encrypted to: a JWK (RFC 7517), bound in report_data.
//!
//! [`TeePublicKey`] is the text as it came and as it is hashed; [`WrappingKey`] is the same key
//! once it has been found fit to encrypt to.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::agreement::{self, Algorithm, ECDH_P256, ECDH_P384, EphemeralPrivateKey};
use ring::rand::SystemRandom;
use rsa::traits::PublicKeyParts;
use rsa::{BigUint, RsaPublicKey};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A public key as a guest sends it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kty", deny_unknown_fields)]
pub enum TeePublicKey {
    /// An elliptic curve point, coordinates base64url.
    #[serde(rename = "EC")]
    Ec {
        /// The curve.
        crv: String,
        /// How the content key is wrapped.
        alg: String,
        /// The point's x.
        x: String,
        /// The point's y.
        y: String,
    },
    /// An RSA key, numbers base64url.
    #[serde(rename = "RSA")]
    Rsa {
        /// How the content key is wrapped.
        alg: String,
        /// The modulus.
        n: String,
        /// The exponent.
        e: String,
    },
}

/// Why a key cannot be encrypted to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// PKCS #1 v1.5 encryption.
    #[error("RSA1_5 is refused, its padding leaks; use ECDH-ES+A256KW or RSA-OAEP-256")]
    Pkcs1Padding,
    /// An algorithm that is not known here, or not for this kind of key.
    #[error("the key's `alg` is not known here; ECDH-ES+A256KW (EC) and RSA-OAEP-256 (RSA) are")]
    Algorithm,
    /// A curve that is not known here.
    #[error("the key's curve is not known here; P-256 and P-384 are")]
    Curve,
    /// Not a point of the curve.
    #[error("the key's coordinates are no point of its curve")]
    Point,
    /// An RSA key that is not fit to encrypt to.
    #[error("the RSA key needs a modulus of 2048 to 4096 bits and the exponent 65537")]
    Rsa,
}

/// A curve for ECDH-ES.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// NIST P-256, the guests' default.
    P256,
    /// NIST P-384.
    P384,
}

/// A guest's key that secrets can be encrypted to.
#[derive(Debug, Clone)]
pub enum WrappingKey {
    /// ECDH-ES+A256KW: an uncompressed point of a curve.
    Ec(Curve, Vec<u8>),
    /// RSA-OAEP-256.
    Rsa(Box<RsaPublicKey>),
}

impl TeePublicKey {
    /// The members by name, as they are hashed.
    pub fn members(&self) -> BTreeMap<&'static str, &str> {
        match self {
            Self::Ec { crv, alg, x, y } => BTreeMap::from([
                ("kty", "EC"),
                ("crv", crv.as_str()),
                ("alg", alg.as_str()),
                ("x", x.as_str()),
                ("y", y.as_str()),
            ]),
            Self::Rsa { alg, n, e } => BTreeMap::from([
                ("kty", "RSA"),
                ("alg", alg.as_str()),
                ("n", n.as_str()),
                ("e", e.as_str()),
            ]),
        }
    }
}

impl WrappingKey {
    /// Checks `key` whole: algorithm, curve, that it is a point of it, or the modulus' length.
    pub fn new(key: &TeePublicKey) -> Result<Self, KeyError> {
        match key {
            TeePublicKey::Ec { crv, alg, x, y } => {
                if alg != ECDH_ES_A256KW {
                    return Err(KeyError::Algorithm);
                }
                let curve = Curve::of_name(crv).ok_or(KeyError::Curve)?;
                let point = curve.point(x, y).ok_or(KeyError::Point)?;
                Ok(Self::Ec(curve, point))
            }
            TeePublicKey::Rsa { alg, n, e } => match alg.as_str() {
                RSA_OAEP_256 => rsa_key(n, e).map(|key| Self::Rsa(Box::new(key))),
                "RSA1_5" => Err(KeyError::Pkcs1Padding),
                _ => Err(KeyError::Algorithm),
            },
        }
    }
}

impl Curve {
    /// The name in JWKs (RFC 7518, 6.2.1.1).
    pub const fn name(self) -> &'static str {
        match self {
            Self::P256 => "P-256",
            Self::P384 => "P-384",
        }
    }

    pub(super) fn of_name(name: &str) -> Option<Self> {
        [Self::P256, Self::P384]
            .into_iter()
            .find(|curve| curve.name() == name)
    }

    pub(super) const fn agreement(self) -> &'static Algorithm {
        match self {
            Self::P256 => &ECDH_P256,
            Self::P384 => &ECDH_P384,
        }
    }

    const fn coordinate_len(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
        }
    }

    /// The uncompressed point of two base64url coordinates of the curve's full length, if it lies
    /// on the curve.
    pub(super) fn point(self, x: &str, y: &str) -> Option<Vec<u8>> {
        let mut point = vec![UNCOMPRESSED];
        for text in [x, y] {
            if text.len() > MAX_COORDINATE_TEXT {
                return None;
            }
            let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
            if bytes.len() != self.coordinate_len() {
                return None;
            }
            point.extend(bytes);
        }
        // ring has no other way to say whether a point is one.
        let probe = EphemeralPrivateKey::generate(self.agreement(), &SystemRandom::new()).ok()?;
        let peer = agreement::UnparsedPublicKey::new(self.agreement(), &point);
        agreement::agree_ephemeral(probe, &peer, |_| ()).ok()?;
        Some(point)
    }
}

/// The base64url coordinates of an uncompressed point.
pub(super) fn coordinates(curve: Curve, point: &[u8]) -> Option<(String, String)> {
    let (mark, both) = point.split_first()?;
    if *mark != UNCOMPRESSED || both.len() != 2 * curve.coordinate_len() {
        return None;
    }
    let (x, y) = both.split_at_checked(curve.coordinate_len())?;
    Some((URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y)))
}

fn rsa_key(n: &str, e: &str) -> Result<RsaPublicKey, KeyError> {
    if n.len() > MAX_MODULUS_TEXT || e.len() > MAX_EXPONENT_TEXT {
        return Err(KeyError::Rsa);
    }
    let number = |text: &str| {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| KeyError::Rsa)?;
        Ok(BigUint::from_bytes_be(&bytes))
    };
    let key = RsaPublicKey::new(number(n)?, number(e)?).map_err(|_| KeyError::Rsa)?;
    let bits = key.n().bits();
    if (MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits) && *key.e() == BigUint::from(RSA_EXPONENT) {
        Ok(key)
    } else {
        Err(KeyError::Rsa)
    }
}

pub(super) const ECDH_ES_A256KW: &str = "ECDH-ES+A256KW";
pub(super) const RSA_OAEP_256: &str = "RSA-OAEP-256";
const UNCOMPRESSED: u8 = 4;
const MAX_COORDINATE_TEXT: usize = 64;
const MAX_MODULUS_TEXT: usize = 684;
const MAX_EXPONENT_TEXT: usize = 8;
const MIN_RSA_BITS: usize = 2048;
const MAX_RSA_BITS: usize = 4096;
const RSA_EXPONENT: u32 = 65537;
