//! SNP attestation reports: 1184 bytes that a platform's VCEK or VLEK signed. Publication 56860,
//! ATTESTATION_REPORT.
//!
//! A parsed [`Report`] is a claim and nothing more: [`verify`](crate::verify) decides whether
//! anybody should believe it. It keeps the bytes as they came, because the signature is checked
//! over those and never over a re-encoding.

mod bits;

pub use bits::{PlatformBit, PlatformInfo, SnpPolicy, SnpPolicyBit};

use crate::bytes;
use crate::product::Product;
use crate::tcb::RawTcb;
use std::fmt;

/// The length of a report of every version.
pub const REPORT_LEN: usize = 0x4a0;

/// A report as a guest received it. Nothing in it is believed yet.
#[derive(Clone, PartialEq, Eq)]
pub struct Report {
    raw: [u8; REPORT_LEN],
    version: ReportVersion,
    signing_key: SigningKey,
}

/// A report layout that is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReportVersion {
    /// Firmware ABI 1.51 and later: says nothing of the product.
    V2 = 2,
    /// With CPUID family, model and stepping.
    V3 = 3,
    /// Fields as in V3.
    V4 = 4,
    /// With mitigation vectors.
    V5 = 5,
}

/// The kind of key that signed a report, as the report itself says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SigningKey {
    /// Versioned chip endorsement key: one chip's.
    Vcek,
    /// Versioned loaded endorsement key: one cloud provider's, for all its chips.
    Vlek,
}

/// A firmware version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirmwareVersion {
    /// ABI major.
    pub major: u8,
    /// ABI minor.
    pub minor: u8,
    /// Build.
    pub build: u8,
}

/// CPUID family, model (with their extended parts added) and stepping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidFms {
    /// Family: 0x19 for Milan and Genoa, 0x1a for Turin.
    pub family: u8,
    /// Model.
    pub model: u8,
    /// Stepping.
    pub stepping: u8,
}

/// Why bytes are no report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// Not the length of a report.
    #[error("an SNP report is {REPORT_LEN} bytes long, this is {0}")]
    Length(usize),
    /// A version whose layout is not known here.
    #[error("report version {0} is not known here; 2, 3, 4 and 5 are")]
    Version(u32),
    /// Not the one signature algorithm there is.
    #[error("signature algorithm {0} is not ECDSA P-384 with SHA-384 (1)")]
    SignatureAlgorithm(u32),
    /// The report says that no key, or an unknown kind of key, signed it.
    #[error("the report says that it is signed by key kind {0}, which is neither VCEK nor VLEK")]
    SigningKey(u32),
    /// Bytes that the signature does not cover are not zero.
    #[error("byte {0:#x} lies behind the signature and should be zero")]
    Trailing(usize),
}

impl Report {
    /// Reads exactly one report.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        let raw: [u8; REPORT_LEN] = bytes
            .try_into()
            .map_err(|_| ReportError::Length(bytes.len()))?;
        let version = match field32(&raw, VERSION_AT) {
            2 => ReportVersion::V2,
            3 => ReportVersion::V3,
            4 => ReportVersion::V4,
            5 => ReportVersion::V5,
            other => return Err(ReportError::Version(other)),
        };
        match field32(&raw, SIGNATURE_ALGORITHM_AT) {
            ECDSA_P384_SHA384 => {}
            other => return Err(ReportError::SignatureAlgorithm(other)),
        }
        let signing_key = match field32(&raw, KEY_INFO_AT) >> 2 & 7 {
            0 => SigningKey::Vcek,
            1 => SigningKey::Vlek,
            other => return Err(ReportError::SigningKey(other)),
        };
        let behind = raw.iter().enumerate().skip(SIGNATURE_END);
        if let Some((at, _)) = behind.into_iter().find(|(_, byte)| **byte != 0) {
            return Err(ReportError::Trailing(at));
        }
        Ok(Self {
            raw,
            version,
            signing_key,
        })
    }

    /// The bytes as they came.
    pub const fn as_bytes(&self) -> &[u8; REPORT_LEN] {
        &self.raw
    }

    /// The bytes that the signature covers.
    pub fn signed_bytes(&self) -> &[u8] {
        self.raw.get(..SIGNATURE_AT).unwrap_or_default()
    }

    /// The signature as ring and X9.62 order it: R, then S, 48 bytes each and big-endian. `None`
    /// where one is zero or does not fit into 48 bytes.
    pub fn signature(&self) -> Option<[u8; 96]> {
        let mut fixed = [0; 96];
        let halves = fixed.chunks_mut(SCALAR_LEN);
        for (half, at) in halves.zip([SIGNATURE_AT, SIGNATURE_AT + SCALAR_FIELD_LEN]) {
            let field: [u8; SCALAR_FIELD_LEN] = self.field(at);
            let (low, high) = field.split_at(SCALAR_LEN);
            if high.iter().any(|byte| *byte != 0) || low.iter().all(|byte| *byte == 0) {
                return None;
            }
            half.copy_from_slice(&bytes::reversed(low));
        }
        Some(fixed)
    }

    /// The layout.
    pub const fn version(&self) -> ReportVersion {
        self.version
    }

    /// The kind of key that is said to have signed.
    pub const fn signing_key(&self) -> SigningKey {
        self.signing_key
    }

    /// The security version number the guest's owner gave it.
    pub fn guest_svn(&self) -> u32 {
        field32(&self.raw, 0x04)
    }

    /// What the guest's owner allowed at launch.
    pub fn policy(&self) -> SnpPolicy {
        SnpPolicy(u64::from_le_bytes(self.field(0x08)))
    }

    /// The image family from the ID block.
    pub fn family_id(&self) -> [u8; 16] {
        self.field(0x10)
    }

    /// The image from the ID block.
    pub fn image_id(&self) -> [u8; 16] {
        self.field(0x20)
    }

    /// The privilege level that asked: 0 is the highest, `0xffff_ffff` the host itself.
    pub fn vmpl(&self) -> u32 {
        field32(&self.raw, 0x30)
    }

    /// The firmware that runs now.
    pub fn current_tcb(&self) -> RawTcb {
        RawTcb(self.field(0x38))
    }

    /// What the platform does.
    pub fn platform_info(&self) -> PlatformInfo {
        PlatformInfo(u64::from_le_bytes(self.field(0x40)))
    }

    /// Whether an author key signed the ID key.
    pub fn has_author_key(&self) -> bool {
        field32(&self.raw, KEY_INFO_AT) & 1 != 0
    }

    /// KEY_INFO's MASK_CHIP_KEY: whether the platform keeps its VCEK from signing. It says nothing of
    /// `chip_id`, which MASK_CHIP_ID of the platform's configuration turns to zeros.
    pub fn masks_chip_key(&self) -> bool {
        field32(&self.raw, KEY_INFO_AT) & 2 != 0
    }

    /// What the guest asked to have in its report: a nonce, a key's digest.
    pub fn report_data(&self) -> [u8; 64] {
        self.field(0x50)
    }

    /// The launch digest.
    pub fn measurement(&self) -> [u8; 48] {
        self.field(0x90)
    }

    /// What the host bound to the launch.
    pub fn host_data(&self) -> [u8; 32] {
        self.field(0xc0)
    }

    /// SHA-384 of the key that signed the ID block; zero without one.
    pub fn id_key_digest(&self) -> [u8; 48] {
        self.field(0xe0)
    }

    /// SHA-384 of the key that signed the ID key; zero without one.
    pub fn author_key_digest(&self) -> [u8; 48] {
        self.field(0x110)
    }

    /// This launch's own identity.
    pub fn report_id(&self) -> [u8; 32] {
        self.field(0x140)
    }

    /// The migration agent's identity; all ones without one.
    pub fn report_id_ma(&self) -> [u8; 32] {
        self.field(0x160)
    }

    /// Whether a migration agent is bound, which could export the guest.
    pub fn has_migration_agent(&self) -> bool {
        self.report_id_ma() != [0xff; 32]
    }

    /// The firmware that the signing key is derived for.
    pub fn reported_tcb(&self) -> RawTcb {
        RawTcb(self.field(0x180))
    }

    /// The processor; from V3 on.
    pub fn cpuid(&self) -> Option<CpuidFms> {
        let [family, model, stepping] = self.field(0x188);
        (self.version >= ReportVersion::V3).then_some(CpuidFms {
            family,
            model,
            stepping,
        })
    }

    /// The product that the report itself names; `None` in V2, and for a processor that is not
    /// known here.
    pub fn product(&self) -> Option<Product> {
        self.cpuid()
            .and_then(|cpuid| Product::from_cpuid(cpuid.family, cpuid.model))
    }

    /// The chip's identity; on Turin the first 8 bytes, zeros behind.
    pub fn chip_id(&self) -> [u8; 64] {
        self.field(0x1a0)
    }

    /// The firmware below which the platform can no longer be taken back.
    pub fn committed_tcb(&self) -> RawTcb {
        RawTcb(self.field(0x1e0))
    }

    /// The firmware that runs now.
    pub fn current_firmware(&self) -> FirmwareVersion {
        FirmwareVersion::from_fields(self.field(0x1e8))
    }

    /// The firmware that is committed.
    pub fn committed_firmware(&self) -> FirmwareVersion {
        FirmwareVersion::from_fields(self.field(0x1ec))
    }

    /// The firmware that ran when the guest was launched.
    pub fn launch_tcb(&self) -> RawTcb {
        RawTcb(self.field(0x1f0))
    }

    /// The mitigations in force when the guest was launched; from V5 on.
    pub fn launch_mitigations(&self) -> Option<u64> {
        (self.version >= ReportVersion::V5).then(|| u64::from_le_bytes(self.field(0x1f8)))
    }

    /// The mitigations in force now; from V5 on.
    pub fn current_mitigations(&self) -> Option<u64> {
        (self.version >= ReportVersion::V5).then(|| u64::from_le_bytes(self.field(0x200)))
    }

    /// Offsets are constants below the report's length.
    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        bytes::array(&self.raw, at).unwrap_or([0; N])
    }
}

impl FirmwareVersion {
    const fn from_fields([build, minor, major]: [u8; 3]) -> Self {
        Self {
            major,
            minor,
            build,
        }
    }
}

impl fmt::Display for FirmwareVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} build {}", self.major, self.minor, self.build)
    }
}

impl fmt::Display for CpuidFms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            family,
            model,
            stepping,
        } = self;
        write!(
            f,
            "family {family:#x}, model {model:#x}, stepping {stepping}"
        )
    }
}

impl fmt::Display for ReportVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "V{}", *self as u32)
    }
}

impl fmt::Display for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vcek => "VCEK",
            Self::Vlek => "VLEK",
        })
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Report({}, {}, measurement {})",
            self.version,
            self.signing_key,
            hex::encode(self.measurement())
        )
    }
}

fn field32(raw: &[u8; REPORT_LEN], at: usize) -> u32 {
    bytes::le32(raw, at).unwrap_or_default()
}

const VERSION_AT: usize = 0x00;
const SIGNATURE_ALGORITHM_AT: usize = 0x34;
const KEY_INFO_AT: usize = 0x48;
const SIGNATURE_AT: usize = 0x2a0;
const SIGNATURE_END: usize = SIGNATURE_AT + 2 * SCALAR_FIELD_LEN;
/// R and S are little-endian numbers in fields with room for P-521.
const SCALAR_FIELD_LEN: usize = 72;
const SCALAR_LEN: usize = 48;
const ECDSA_P384_SHA384: u32 = 1;

#[cfg(test)]
mod tests;
