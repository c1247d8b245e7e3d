//! The small words of policy: technologies, fingerprints, names. Text becomes one of these only if it is well formed.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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
text_conversions!(Fingerprint, DnsName);

/// Keeps a hostile or mistaken value from filling the error text.
fn shorten(text: &str) -> String {
    const KEEP: usize = 80;
    if text.chars().count() <= KEEP {
        text.to_owned()
    } else {
        text.chars().take(KEEP).chain(['…']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
