//! The 32-bit guest policy: what the owner forbids the platform to do with a guest.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A firmware API version. Orders by major, then minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ApiVersion {
    /// Major version.
    pub major: u8,
    /// Minor version.
    pub minor: u8,
}

impl ApiVersion {
    /// A version from its two parts.
    pub const fn new(major: u8, minor: u8) -> Self {
        Self { major, minor }
    }
}

impl fmt::Display for ApiVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// One bit of the guest policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u32)]
pub enum PolicyFlag {
    /// NODBG: the host may not decrypt guest memory with the debug commands.
    NoDebug = 1 << 0,
    /// NOKS: the guest's key may not be shared with another guest.
    NoKeySharing = 1 << 1,
    /// ES: the guest's register state must be encrypted (SEV-ES).
    EncryptedState = 1 << 2,
    /// NOSEND: the guest may not leave this platform.
    NoSend = 1 << 3,
    /// DOMAIN: the guest may move only to a platform with the same owner (OCA).
    Domain = 1 << 4,
    /// SEV: the guest may move only to a platform that AMD certifies for SEV.
    Sev = 1 << 5,
}

impl PolicyFlag {
    /// Every flag, in bit order.
    pub const ALL: [Self; 6] = [
        Self::NoDebug,
        Self::NoKeySharing,
        Self::EncryptedState,
        Self::NoSend,
        Self::Domain,
        Self::Sev,
    ];

    /// The name AMD's specification uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoDebug => "NODBG",
            Self::NoKeySharing => "NOKS",
            Self::EncryptedState => "ES",
            Self::NoSend => "NOSEND",
            Self::Domain => "DOMAIN",
            Self::Sev => "SEV",
        }
    }
}

/// The guest policy: flags and the lowest firmware API version the guest may run under.
///
/// Reserved bits are refused, not ignored: a bit that this code does not know might mean a
/// freedom it should not grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct GuestPolicy(u32);

/// Why a number is not a guest policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A reserved bit is set.
    #[error(
        "guest policy {0:#010x} sets reserved bits; only bits 0 to 5 and 16 to 31 have a meaning"
    )]
    Reserved(u32),
}

impl GuestPolicy {
    /// A policy of `flags` under firmware of at least `min_api`.
    pub fn new(flags: &[PolicyFlag], min_api: ApiVersion) -> Self {
        let api = u32::from(min_api.major) << 16 | u32::from(min_api.minor) << 24;
        Self(flags.iter().fold(api, |raw, &flag| raw | flag as u32))
    }

    /// Reads the raw 32-bit form.
    pub const fn from_raw(raw: u32) -> Result<Self, PolicyError> {
        if raw & RESERVED != 0 {
            return Err(PolicyError::Reserved(raw));
        }
        Ok(Self(raw))
    }

    /// The raw 32-bit form.
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// The form that measures and MACs are computed over.
    pub const fn to_le_bytes(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }

    /// Whether `flag` is set.
    pub const fn has(self, flag: PolicyFlag) -> bool {
        self.0 & flag as u32 != 0
    }

    /// The lowest firmware API version that may run or receive the guest.
    pub const fn min_api(self) -> ApiVersion {
        let [_, _, major, minor] = self.0.to_le_bytes();
        ApiVersion { major, minor }
    }
}

impl TryFrom<u32> for GuestPolicy {
    type Error = PolicyError;

    fn try_from(raw: u32) -> Result<Self, Self::Error> {
        Self::from_raw(raw)
    }
}

impl From<GuestPolicy> for u32 {
    fn from(policy: GuestPolicy) -> Self {
        policy.0
    }
}

impl fmt::Display for GuestPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x} (", self.0)?;
        for flag in PolicyFlag::ALL.into_iter().filter(|&flag| self.has(flag)) {
            write!(f, "{} ", flag.name())?;
        }
        write!(f, "API>={})", self.min_api())
    }
}

const RESERVED: u32 = 0x0000_ffc0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_version_sit_where_amd_puts_them() {
        let policy = GuestPolicy::new(
            &[PolicyFlag::NoDebug, PolicyFlag::Sev],
            ApiVersion::new(1, 0x37),
        );
        assert_eq!(policy.raw(), 0x3701_0021);
        assert_eq!(policy.min_api(), ApiVersion::new(1, 55));
        assert!(policy.has(PolicyFlag::NoDebug) && !policy.has(PolicyFlag::NoSend));
        assert_eq!(policy.to_string(), "0x37010021 (NODBG SEV API>=1.55)");
    }

    #[test]
    fn reserved_bits_are_refused() {
        for bit in 6..16 {
            assert_eq!(
                GuestPolicy::from_raw(1 << bit),
                Err(PolicyError::Reserved(1 << bit))
            );
        }
        assert!(serde_json::from_str::<GuestPolicy>("64").is_err());
        assert!(serde_json::from_str::<GuestPolicy>("1").is_ok());
    }

    #[test]
    fn versions_compare_major_first() {
        assert!(ApiVersion::new(0, 200) < ApiVersion::new(1, 0));
        assert!(ApiVersion::new(1, 51) < ApiVersion::new(1, 55));
    }
}
