//! The small words of policy: technologies, fingerprints, names. Text becomes one of these only if it is well formed.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::document::guest::NamePattern;
use crate::sign::SignerKey;

/// The confidential technology of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Technology {
    /// A plain guest: the host can read its memory.
    None,
    /// AMD SEV: encrypted memory.
    Sev,
    /// AMD SEV-ES: encrypted memory and registers.
    SevEs,
    /// AMD SEV-SNP: encrypted memory and registers, protected mapping, signed reports.
    SevSnp,
}

impl fmt::Display for Technology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Sev => "sev",
            Self::SevEs => "sev-es",
            Self::SevSnp => "sev-snp",
        })
    }
}

/// A SHA-256 value, written `sha256:` and 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Wraps an already computed SHA-256 value.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The SHA-256 of `bytes`, e.g. of a DER SubjectPublicKeyInfo.
    pub fn of(bytes: &[u8]) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
        let mut out = [0; 32];
        for (to, from) in out.iter_mut().zip(digest.as_ref()) {
            *to = *from;
        }
        Self(out)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl FromStr for Fingerprint {
    type Err = TypeError;

    fn from_str(text: &str) -> Result<Self, TypeError> {
        let wrong = || TypeError::Fingerprint {
            found: shorten(text),
        };
        let digits = text.strip_prefix("sha256:").ok_or_else(wrong)?;
        if digits.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| wrong())?;
        Ok(Self(bytes))
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

/// A DNS name as it stands in a certificate's subject alternative name: lower case, no wildcard, no trailing dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DnsName(String);

impl DnsName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DnsName {
    type Err = TypeError;

    fn from_str(text: &str) -> Result<Self, TypeError> {
        let good_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if text.len() <= 253 && text.split('.').all(good_label) {
            Ok(Self(text.to_owned()))
        } else {
            Err(TypeError::DnsName {
                found: shorten(text),
            })
        }
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who a peer is: one subject alternative name *and* one public key. Neither alone is enough.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The DNS subject alternative name of its certificate.
    pub san: DnsName,
    /// SHA-256 of its DER SubjectPublicKeyInfo.
    pub spki: Fingerprint,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with key {}", self.san, self.spki)
    }
}

/// A moment in whole seconds, written as RFC 3339 in UTC: `2026-01-01T00:00:00Z`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp(u64);

impl Timestamp {
    /// So many seconds after 1970, up to the end of 9999; what is later is that end.
    pub fn from_unix(seconds: u64) -> Self {
        Self(seconds.min(END_OF_9999))
    }

    /// The moment of a clock; what is before 1970 is 1970, which no validity that has a beginning holds.
    pub fn of(time: SystemTime) -> Self {
        let since = time.duration_since(SystemTime::UNIX_EPOCH);
        Self::from_unix(since.map_or(0, |d| d.as_secs()))
    }

    /// Seconds after 1970.
    pub const fn unix(self) -> u64 {
        self.0
    }
}

impl FromStr for Timestamp {
    type Err = TypeError;

    fn from_str(text: &str) -> Result<Self, TypeError> {
        let wrong = || TypeError::Timestamp {
            found: shorten(text),
        };
        let time = humantime::parse_rfc3339(text).map_err(|_| wrong())?;
        let since = time
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_err(|_| wrong())?;
        if since.as_secs() <= END_OF_9999 {
            Ok(Self(since.as_secs()))
        } else {
            Err(wrong())
        }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(self.0);
        write!(f, "{}", humantime::format_rfc3339_seconds(time))
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a guest was launched from, as the firmware measured it: 64 (SEV, SEV-ES) or 96 (SEV-SNP) lower-case hex digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LaunchDigest(String);

impl FromStr for LaunchDigest {
    type Err = TypeError;

    fn from_str(text: &str) -> Result<Self, TypeError> {
        if is_hex(text, 64) || is_hex(text, 96) {
            Ok(Self(text.to_owned()))
        } else {
            Err(TypeError::LaunchDigest {
                found: shorten(text),
            })
        }
    }
}

impl fmt::Display for LaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for LaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who vouches for a launch: `ed25519:` and 64 hex digits for a signer of reference values, `id-key:` and 96 for the
/// SHA-384 digest of the key of an SNP ID block.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LaunchSigner(String);

impl FromStr for LaunchSigner {
    type Err = TypeError;

    fn from_str(text: &str) -> Result<Self, TypeError> {
        let known = text.strip_prefix("ed25519:").map(|d| is_hex(d, 64));
        let known = known.or_else(|| text.strip_prefix("id-key:").map(|d| is_hex(d, 96)));
        if known == Some(true) {
            Ok(Self(text.to_owned()))
        } else {
            Err(TypeError::LaunchSigner {
                found: shorten(text),
            })
        }
    }
}

impl fmt::Display for LaunchSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for LaunchSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that is not what it should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TypeError {
    /// Not a fingerprint.
    #[error("`{found}` is no fingerprint; write `sha256:` and 64 lower-case hex digits")]
    Fingerprint {
        /// The text found, shortened.
        found: String,
    },
    /// Not a moment.
    #[error("`{found}` is no moment between 1970 and 9999; write it as 2026-01-01T00:00:00Z")]
    Timestamp {
        /// The text found, shortened.
        found: String,
    },
    /// Not a launch digest.
    #[error(
        "`{found}` is no launch digest; write 64 (SEV, SEV-ES) or 96 (SEV-SNP) lower-case hex digits"
    )]
    LaunchDigest {
        /// The text found, shortened.
        found: String,
    },
    /// Not who could sign a launch.
    #[error(
        "`{found}` signs no launches; write `ed25519:` and 64, or `id-key:` and 96 lower-case hex digits"
    )]
    LaunchSigner {
        /// The text found, shortened.
        found: String,
    },
    /// Not a key that signs policies.
    #[error("`{found}` is no signer's key; write `ed25519:` and 64 lower-case hex digits")]
    SignerKey {
        /// The text found, shortened.
        found: String,
    },
    /// Not a pattern of guests' names.
    #[error("`{found}` is no pattern of names; write a name, its beginning and `*`, or `*` alone")]
    NamePattern {
        /// The text found, shortened.
        found: String,
    },
    /// Not a DNS name.
    #[error(
        "`{found}` is no DNS name; write lower-case labels joined by dots, such as `site-b.example.com`"
    )]
    DnsName {
        /// The text found, shortened.
        found: String,
    },
}

/// `TryFrom<String>` for serde, by way of `FromStr` and `Display`.
macro_rules! text_conversions {
    ($($name:ident),*) => {$(
        impl TryFrom<String> for $name {
            type Error = TypeError;
            fn try_from(text: String) -> Result<Self, TypeError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    )*};
}
text_conversions!(
    Fingerprint,
    DnsName,
    Timestamp,
    LaunchDigest,
    LaunchSigner,
    SignerKey,
    NamePattern
);

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Keeps a hostile or mistaken value from filling the error text.
pub(crate) fn shorten(text: &str) -> String {
    const KEEP: usize = 80;
    if text.chars().count() <= KEEP {
        text.to_owned()
    } else {
        text.chars().take(KEEP).chain(['…']).collect()
    }
}

/// 9999-12-31T23:59:59Z, the last moment that RFC 3339 writes.
const END_OF_9999: u64 = 253_402_300_799;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_digests_and_signers_are_strict() {
        let moment: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        assert_eq!(moment.to_string(), "2026-01-01T00:00:00Z");
        assert_eq!(
            Timestamp::from_unix(u64::MAX).to_string(),
            "9999-12-31T23:59:59Z"
        );
        for bad in ["", "2026-01-01", "1969-12-31T23:59:59Z", "yesterday"] {
            assert!(bad.parse::<Timestamp>().is_err(), "{bad}");
        }
        for (digits, good) in [
            (63, false),
            (64, true),
            (65, false),
            (95, false),
            (96, true),
        ] {
            assert_eq!("a".repeat(digits).parse::<LaunchDigest>().is_ok(), good);
        }
        assert!("A".repeat(64).parse::<LaunchDigest>().is_err());
        for (text, good) in [
            (format!("ed25519:{}", "0".repeat(64)), true),
            (format!("id-key:{}", "0".repeat(96)), true),
            (format!("id-key:{}", "0".repeat(64)), false),
            ("0".repeat(64), false),
        ] {
            assert_eq!(text.parse::<LaunchSigner>().is_ok(), good, "{text}");
        }
    }

    #[test]
    fn fingerprint_is_strict() {
        let text = format!("sha256:{}", "ab".repeat(32));
        assert_eq!(text.parse::<Fingerprint>().unwrap().to_string(), text);
        for bad in [
            text.to_uppercase(),
            text.replace("sha256:", ""),
            format!("{text}0"),
            text[..60].to_owned(),
        ] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
        let upper_digits = format!("sha256:{}", "AB".repeat(32));
        assert!(upper_digits.parse::<Fingerprint>().is_err());
        assert_eq!(
            Fingerprint::of(b"").to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn dns_name_is_strict() {
        for good in ["site-b.casemate.test", "a", "1.2"] {
            assert!(good.parse::<DnsName>().is_ok(), "{good}");
        }
        let long = "a".repeat(64);
        for bad in [
            "",
            "A.b",
            "*.b",
            "a.",
            ".a",
            "a..b",
            "-a",
            "a-",
            "a b",
            "ä",
            long.as_str(),
        ] {
            assert!(bad.parse::<DnsName>().is_err(), "{bad}");
        }
    }
}
