//! The two bit fields of a report: what the guest's owner allowed, what the platform does.

use serde::{Deserialize, Serialize};
use std::fmt;

/// An SNP guest policy, as its owner set it at launch. Publication 56860, GUEST_POLICY.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnpPolicy(pub u64);

/// What a bit of an [`SnpPolicy`] allows or asks for; the value is the bit's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnpPolicyBit {
    /// SMT may be on.
    Smt = 16,
    /// A migration agent may be bound.
    MigrateMa = 18,
    /// The host may read and write guest memory with debug commands.
    Debug = 19,
    /// The guest must stay on one socket.
    SingleSocket = 20,
    /// CXL memory and devices may be used.
    CxlAllow = 21,
    /// Memory must be encrypted with AES-256-XTS.
    MemAes256Xts = 22,
    /// Running average power limits must be off.
    RaplDis = 23,
    /// Ciphertext hiding must be on.
    CiphertextHiding = 24,
    /// Page swapping by the host must be off.
    PageSwapDisable = 25,
}

/// What a platform does, as its firmware reports it. Publication 56860, PLATFORM_INFO.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PlatformInfo(pub u64);

/// A bit of a [`PlatformInfo`]; the value is the bit's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlatformBit {
    /// SMT is on.
    SmtEnabled = 0,
    /// Transparent memory encryption is on.
    TsmeEnabled = 1,
    /// Memory has ECC.
    EccEnabled = 2,
    /// Running average power limits are off.
    RaplDisabled = 3,
    /// Ciphertext hiding is on.
    CiphertextHidingEnabled = 4,
    /// The memory alias check has run since the last reset and found nothing.
    AliasCheckComplete = 5,
    /// Trusted I/O is on.
    TioEnabled = 7,
}

impl SnpPolicy {
    /// Whether `bit` is set.
    pub const fn has(self, bit: SnpPolicyBit) -> bool {
        self.0 & (1 << bit as u32) != 0
    }

    /// The lowest firmware ABI the guest accepts: major, minor.
    pub const fn min_abi(self) -> (u8, u8) {
        let [minor, major, ..] = self.0.to_le_bytes();
        (major, minor)
    }

    /// Whether bit 17, which firmware insists on, is set.
    pub const fn reserved_one_is_set(self) -> bool {
        self.0 & RESERVED_ONE != 0
    }

    /// Bits that have no name here and are not firmware's own.
    pub fn unknown_bits(self) -> u64 {
        let known = SnpPolicyBit::ALL
            .into_iter()
            .fold(ABI_VERSION | RESERVED_ONE, |mask, bit| {
                mask | (1 << bit as u32)
            });
        self.0 & !known
    }
}

impl SnpPolicyBit {
    /// All that have a name.
    pub const ALL: [Self; 9] = [
        Self::Smt,
        Self::MigrateMa,
        Self::Debug,
        Self::SingleSocket,
        Self::CxlAllow,
        Self::MemAes256Xts,
        Self::RaplDis,
        Self::CiphertextHiding,
        Self::PageSwapDisable,
    ];
}

impl PlatformInfo {
    /// Whether `bit` is set.
    pub const fn has(self, bit: PlatformBit) -> bool {
        self.0 & (1 << bit as u32) != 0
    }
}

impl PlatformBit {
    /// All that have a name.
    pub const ALL: [Self; 7] = [
        Self::SmtEnabled,
        Self::TsmeEnabled,
        Self::EccEnabled,
        Self::RaplDisabled,
        Self::CiphertextHidingEnabled,
        Self::AliasCheckComplete,
        Self::TioEnabled,
    ];
}

impl fmt::Display for SnpPolicyBit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Smt => "smt",
            Self::MigrateMa => "migrate_ma",
            Self::Debug => "debug",
            Self::SingleSocket => "single_socket",
            Self::CxlAllow => "cxl_allow",
            Self::MemAes256Xts => "mem_aes256_xts",
            Self::RaplDis => "rapl_dis",
            Self::CiphertextHiding => "ciphertext_hiding",
            Self::PageSwapDisable => "page_swap_disable",
        })
    }
}

impl fmt::Display for PlatformBit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SmtEnabled => "smt_enabled",
            Self::TsmeEnabled => "tsme_enabled",
            Self::EccEnabled => "ecc_enabled",
            Self::RaplDisabled => "rapl_disabled",
            Self::CiphertextHidingEnabled => "ciphertext_hiding_enabled",
            Self::AliasCheckComplete => "alias_check_complete",
            Self::TioEnabled => "tio_enabled",
        })
    }
}

impl fmt::Display for SnpPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = SnpPolicyBit::ALL.into_iter().filter(|bit| self.has(*bit));
        named(f, self.0, set)
    }
}

impl fmt::Display for PlatformInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = PlatformBit::ALL.into_iter().filter(|bit| self.has(*bit));
        named(f, self.0, set)
    }
}

/// `0x30000 (smt)`.
fn named<B: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    raw: u64,
    set: impl Iterator<Item = B>,
) -> fmt::Result {
    let names: Vec<_> = set.map(|bit| bit.to_string()).collect();
    match names.as_slice() {
        [] => write!(f, "{raw:#x}"),
        names => write!(f, "{raw:#x} ({})", names.join(", ")),
    }
}

const ABI_VERSION: u64 = 0xffff;
const RESERVED_ONE: u64 = 1 << 17;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_read_and_named() {
        let policy = SnpPolicy(0xb_0137);
        assert!(policy.has(SnpPolicyBit::Debug) && policy.has(SnpPolicyBit::Smt));
        assert!(!policy.has(SnpPolicyBit::MigrateMa));
        assert_eq!(policy.min_abi(), (1, 0x37));
        assert!(policy.reserved_one_is_set());
        assert_eq!(policy.to_string(), "0xb0137 (smt, debug)");
        assert_eq!(policy.unknown_bits(), 0);
        assert_eq!(SnpPolicy(1 << 40).unknown_bits(), 1 << 40);
        let info = PlatformInfo(0x25);
        assert_eq!(
            info.to_string(),
            "0x25 (smt_enabled, ecc_enabled, alias_check_complete)"
        );
    }
}
