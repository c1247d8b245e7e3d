//! A guest's description and the launch digest it must have.
//!
//! In SNP the digest covers the firmware's pages, the pages its metadata name in the order they
//! stand there, then every vCPU's state. In SEV it is SHA-256 over the firmware and the table of
//! kernel hashes; SEV-ES adds every vCPU's state.

use super::kernel_hashes::KernelHashes;
use super::ovmf::{Ovmf, PAGE_LEN, Section, SectionKind};
use super::sev::{LaunchDigest, LaunchDigester};
use super::snp::{PageType, SnpLaunchDigest, SnpLaunchDigester};
use super::vcpu::{CpuSignature, VcpuCount};
use super::vmsa::{Profile, ResetState, SevFeatures};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// What protects a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Technology {
    /// Memory encrypted.
    Sev,
    /// And registers.
    SevEs,
    /// And memory integrity.
    Snp,
}

/// A firmware image together with what measuring it has cost so far: guests that share it are
/// measured for little more than their own part. Not more than the image is kept.
#[derive(Debug)]
pub struct Firmware<'a> {
    ovmf: Ovmf<'a>,
    snp: OnceLock<SnpLaunchDigest>,
    sev: OnceLock<SevPrefix>,
}

/// All that a launch digest depends on.
#[derive(Debug, Clone, Copy)]
pub struct GuestDescription<'a> {
    /// What protects it.
    pub technology: Technology,
    /// Its firmware.
    pub firmware: &'a Firmware<'a>,
    /// What the firmware shall boot; `None` where the firmware finds it itself, unmeasured.
    pub kernel: Option<KernelHashes>,
    /// How many vCPUs; of no account in SEV.
    pub vcpus: VcpuCount,
    /// What CPUID leaf 1 says of them; of no account in SEV.
    pub signature: CpuSignature,
    /// SEV features. Of no account in SEV, nor in SEV-ES under QEMU, which offers none there.
    pub features: SevFeatures,
    /// Whose VMM launches.
    pub profile: Profile,
}

/// A launch digest of one technology or the other, shown in hex.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum GuestDigest {
    /// SEV and SEV-ES: 32 bytes.
    Sev(LaunchDigest),
    /// SNP: 48 bytes.
    Snp(SnpLaunchDigest),
}

/// Why a description leads to no launch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuestError {
    /// The firmware does not know how vCPUs begin.
    #[error(
        "the firmware has no SEV-ES reset block, so it cannot run under SEV-ES or SNP; use an \
         OVMF built with SEV support"
    )]
    NoResetBlock,
    /// The reset block has no address.
    #[error("the firmware's SEV-ES reset block is empty, so it can have one vCPU, not {0}")]
    NoApReset(u16),
    /// The firmware would not check the kernel.
    #[error(
        "the firmware does not check kernel hashes, so a kernel cannot be part of the \
         measurement; use the AmdSev build of OVMF, or leave the kernel out"
    )]
    NoKernelHashes,
    /// The table of hashes does not fit where the firmware wants it.
    #[error("the table of kernel hashes does not fit at {0:#x}, where the firmware wants it")]
    HashTablePlace(u32),
    /// A section whose measurement is not known.
    #[error("the firmware has a section of unknown kind {kind:#x} at {gpa:#x}")]
    UnknownSection {
        /// Its number.
        kind: u32,
        /// Its address.
        gpa: u32,
    },
    /// Features with which our VMM starts no such guest.
    #[error(
        "casemate starts no {technology} guest with SEV features {found}; {wanted} is needed and \
         {optional} may be added"
    )]
    Features {
        /// What protects the guest.
        technology: Technology,
        /// What the description says.
        found: SevFeatures,
        /// What must be there.
        wanted: SevFeatures,
        /// What may be there.
        optional: SevFeatures,
    },
}

/// Why a text is no launch digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no launch digest; 64 (SEV, SEV-ES) or 96 (SNP) hex digits are")]
pub struct GuestDigestError(String);

/// Why a text names no technology.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no technology; sev, sev-es and snp are")]
pub struct TechnologyError(String);

impl<'a> Firmware<'a> {
    /// A firmware that nothing is known of yet.
    pub const fn new(ovmf: Ovmf<'a>) -> Self {
        Self {
            ovmf,
            snp: OnceLock::new(),
            sev: OnceLock::new(),
        }
    }

    /// Its image and tables.
    pub const fn ovmf(&self) -> &Ovmf<'a> {
        &self.ovmf
    }

    /// The SNP launch digest of the image's pages alone: what `sev-snp-measure` calls its hash.
    pub fn snp_digest(&self) -> SnpLaunchDigest {
        *self.snp.get_or_init(|| {
            let mut digester = SnpLaunchDigester::new();
            digester.normal(self.ovmf.gpa(), self.ovmf.pages());
            digester.finish()
        })
    }

    fn snp_digester(&self) -> SnpLaunchDigester {
        SnpLaunchDigester::continuing(self.snp_digest())
    }

    fn sev_digester(&self) -> LaunchDigester {
        let prefix = self.sev.get_or_init(|| {
            let mut digester = LaunchDigester::new();
            digester.update(self.ovmf.image());
            SevPrefix(digester)
        });
        prefix.0.clone()
    }

    /// SHA-256 of the image.
    pub fn sha256(&self) -> [u8; 32] {
        *self.sev_digester().finish().as_bytes()
    }
}

impl GuestDescription<'_> {
    /// The digest that the guest must have.
    pub fn digest(&self) -> Result<GuestDigest, GuestError> {
        match self.technology {
            Technology::Sev => self.sev().map(GuestDigest::Sev),
            Technology::SevEs => self.sev_es().map(GuestDigest::Sev),
            Technology::Snp => self.snp().map(GuestDigest::Snp),
        }
    }

    /// The features that the guest's VMSAs carry; `None` where it has no VMSA.
    pub fn effective_features(&self) -> Result<Option<SevFeatures>, GuestError> {
        let (wanted, optional) = match (self.technology, self.profile) {
            (Technology::Sev, _) => return Ok(None),
            (Technology::SevEs, Profile::Qemu) => return Ok(Some(SevFeatures::NONE)),
            (Technology::Snp, Profile::Qemu) => return Ok(Some(self.features)),
            (Technology::SevEs, Profile::Casemate) => (SevFeatures::NONE, SevFeatures::DEBUG_SWAP),
            (Technology::Snp, Profile::Casemate) => {
                (SevFeatures::SNP_ACTIVE, SevFeatures::DEBUG_SWAP)
            }
        };
        let known = wanted.with(optional);
        if self.features.contains(wanted) && known.contains(self.features) {
            return Ok(Some(self.features));
        }
        Err(GuestError::Features {
            technology: self.technology,
            found: self.features,
            wanted,
            optional,
        })
    }

    fn snp(&self) -> Result<SnpLaunchDigest, GuestError> {
        let vcpus = self.vcpu_states()?;
        let sections = self.firmware.ovmf.sections();
        let checks = |section: &Section| section.kind == SectionKind::KernelHashes;
        if self.kernel.is_some() && !sections.iter().any(checks) {
            return Err(GuestError::NoKernelHashes);
        }
        // Refusals come before the work.
        let unknown = |section: &Section| match section.kind {
            SectionKind::Unknown(kind) => Some((kind, section.gpa)),
            _ => None,
        };
        if let Some((kind, gpa)) = sections.iter().find_map(unknown) {
            return Err(GuestError::UnknownSection { kind, gpa });
        }
        let mut digester = self.firmware.snp_digester();
        for section in sections {
            self.add_section(&mut digester, section)?;
        }
        digester.vmsa(&vcpus.boot.page(), 1);
        digester.vmsa(&vcpus.other.page(), vcpus.others);
        Ok(digester.finish())
    }

    fn add_section(
        &self,
        digester: &mut SnpLaunchDigester,
        section: &Section,
    ) -> Result<(), GuestError> {
        let page_type = match (section.kind, &self.kernel) {
            (SectionKind::KernelHashes, Some(hashes)) => {
                let page = self.hashes_page(hashes, section)?;
                digester.normal(section.gpa.into(), &[page]);
                return Ok(());
            }
            (SectionKind::Secrets, _) => PageType::Secrets,
            (SectionKind::Cpuid, _) => PageType::Cpuid,
            _ => PageType::Zero,
        };
        let count = section.len / PAGE_LEN as u32;
        digester.without_content(page_type, section.gpa.into(), count);
        Ok(())
    }

    fn hashes_page(
        &self,
        hashes: &KernelHashes,
        section: &Section,
    ) -> Result<[u8; PAGE_LEN], GuestError> {
        let gpa = self.hash_table_gpa()?;
        let offset = gpa as usize % PAGE_LEN;
        let one_page = section.len as usize == PAGE_LEN;
        hashes
            .page(offset)
            .filter(|_| one_page)
            .ok_or(GuestError::HashTablePlace(gpa))
    }

    fn hash_table_gpa(&self) -> Result<u32, GuestError> {
        let area = self.firmware.ovmf.hash_table();
        let area = area.ok_or(GuestError::NoKernelHashes)?;
        let room = area.len.map_or(usize::MAX, |len| len as usize);
        if room < super::kernel_hashes::TABLE_LEN {
            return Err(GuestError::HashTablePlace(area.gpa));
        }
        Ok(area.gpa)
    }

    fn sev(&self) -> Result<LaunchDigest, GuestError> {
        self.sev_without_vcpus().map(LaunchDigester::finish)
    }

    fn sev_es(&self) -> Result<LaunchDigest, GuestError> {
        let vcpus = self.vcpu_states()?;
        let mut digester = self.sev_without_vcpus()?;
        digester.update(&vcpus.boot.page());
        let page = vcpus.other.page();
        for _ in 0..vcpus.others {
            digester.update(&page);
        }
        Ok(digester.finish())
    }

    fn sev_without_vcpus(&self) -> Result<LaunchDigester, GuestError> {
        let table = match &self.kernel {
            Some(hashes) => {
                self.hash_table_gpa()?;
                Some(hashes.table())
            }
            None => None,
        };
        let mut digester = self.firmware.sev_digester();
        digester.update(table.as_ref().map_or(&[][..], |table| table));
        Ok(digester)
    }

    fn vcpu_states(&self) -> Result<VcpuStates, GuestError> {
        let ap_eip = self.firmware.ovmf.reset_eip();
        let ap_eip = ap_eip.ok_or(GuestError::NoResetBlock)?;
        let others = self.vcpus.get() - 1;
        if ap_eip == 0 && others > 0 {
            return Err(GuestError::NoApReset(self.vcpus.get()));
        }
        let features = self.effective_features()?.unwrap_or(SevFeatures::NONE);
        Ok(VcpuStates {
            boot: ResetState::boot(self.profile, self.signature, features),
            other: ResetState::at(ap_eip, self.profile, self.signature, features),
            others,
        })
    }
}

/// The states of all vCPUs: the first, and the others, which are all alike.
struct VcpuStates {
    boot: ResetState,
    other: ResetState,
    others: u16,
}

struct SevPrefix(LaunchDigester);

impl fmt::Debug for SevPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SevPrefix")
    }
}

impl GuestDigest {
    /// Its bytes: 32 or 48.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Sev(digest) => digest.as_bytes(),
            Self::Snp(digest) => digest.as_bytes(),
        }
    }
}

impl FromStr for GuestDigest {
    type Err = GuestDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let snp = text.parse().map(Self::Snp).ok();
        snp.or_else(|| text.parse().map(Self::Sev).ok())
            .ok_or_else(|| GuestDigestError(text.to_owned()))
    }
}

impl TryFrom<String> for GuestDigest {
    type Error = GuestDigestError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<GuestDigest> for String {
    fn from(digest: GuestDigest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for GuestDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sev(digest) => digest.fmt(f),
            Self::Snp(digest) => digest.fmt(f),
        }
    }
}

impl fmt::Display for Technology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sev => "sev",
            Self::SevEs => "sev-es",
            Self::Snp => "snp",
        })
    }
}

impl FromStr for Technology {
    type Err = TechnologyError;

    /// Takes `seves` and `sev-snp` as other tools write them.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "sev" => Ok(Self::Sev),
            "sev-es" | "seves" => Ok(Self::SevEs),
            "snp" | "sev-snp" => Ok(Self::Snp),
            _ => Err(TechnologyError(text.to_owned())),
        }
    }
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
