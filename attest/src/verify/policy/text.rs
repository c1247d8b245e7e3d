//! Values that stand as text in a policy file.

use crate::report::{FirmwareVersion, ReportVersion, SigningKey};
use serde::de::{Error, Unexpected};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::str::FromStr;

/// Exactly `N` bytes, written as hex digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hex<const N: usize>(pub [u8; N]);

/// SHA-256 of something, written `sha256:` and 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

/// A firmware ABI version, written `1.51`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Abi {
    /// Before the point.
    pub major: u8,
    /// Behind it.
    pub minor: u8,
}

/// Why a text is no fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint is `sha256:` and 64 hex digits")]
pub struct FingerprintError;

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix("sha256:").ok_or(FingerprintError)?;
        exact(digits).map(Self).ok_or(FingerprintError)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl<const N: usize> fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl<const N: usize> fmt::Debug for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Hex<N> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        exact(&text).map(Self).ok_or_else(|| {
            let wanted = format!("{N} bytes as {} hex digits", 2 * N);
            D::Error::invalid_value(Unexpected::Str(&text), &wanted.as_str())
        })
    }
}

impl<'de> Deserialize<'de> for Abi {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        match numbers(&text).as_deref() {
            Some([major, minor]) => Ok(Self {
                major: *major,
                minor: *minor,
            }),
            _ => Err(invalid(&text, "a firmware ABI such as \"1.51\"")),
        }
    }
}

/// `["vcek", "vlek"]`
pub(super) fn signing_keys<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<Vec<SigningKey>>, D::Error> {
    let one = |text: &String| match text.as_str() {
        "vcek" => Ok(SigningKey::Vcek),
        "vlek" => Ok(SigningKey::Vlek),
        other => Err(invalid(other, "\"vcek\" or \"vlek\"")),
    };
    let texts = Vec::<String>::deserialize(from)?;
    texts.iter().map(one).collect::<Result<_, _>>().map(Some)
}

/// `3`
pub(super) fn report_version<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<ReportVersion>, D::Error> {
    Ok(Some(match u64::deserialize(from)? {
        2 => ReportVersion::V2,
        3 => ReportVersion::V3,
        4 => ReportVersion::V4,
        5 => ReportVersion::V5,
        other => {
            let wanted = "a report version that is known: 2, 3, 4 or 5";
            return Err(D::Error::invalid_value(
                Unexpected::Unsigned(other),
                &wanted,
            ));
        }
    }))
}

/// `"1.55.29"`
pub(super) fn firmware<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<FirmwareVersion>, D::Error> {
    let text = String::deserialize(from)?;
    match numbers(&text).as_deref() {
        Some([major, minor, build]) => Ok(Some(FirmwareVersion {
            major: *major,
            minor: *minor,
            build: *build,
        })),
        _ => Err(invalid(&text, "major, minor and build such as \"1.55.29\"")),
    }
}

fn invalid<E: Error>(text: &str, wanted: &str) -> E {
    E::invalid_value(Unexpected::Str(text), &wanted)
}

fn exact<const N: usize>(digits: &str) -> Option<[u8; N]> {
    hex::decode(digits).ok()?.try_into().ok()
}

fn numbers(text: &str) -> Option<Vec<u8>> {
    let number = |part: &str| {
        let plain = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| part.parse().ok()).flatten()
    };
    text.split('.').map(number).collect()
}
