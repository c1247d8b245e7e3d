//! Measured direct boot: a confidential guest starts in firmware, which takes kernel, initramfs and command line from
//! the host and compares them with hashes that were measured with the firmware.
//!
//! What is launched is what QEMU launches with `kernel-hashes=on`, in its order and with its registers, so that
//! `sev-snp-measure` and `casemate attest measure` compute the same digest. The image's tables are not believed before
//! `casemate-attest` has parsed them.

use casemate_attest::measure::guest::{self, Firmware, GuestDescription, GuestDigest};
use casemate_attest::measure::kernel_hashes::{FileHash, KernelHashes};
use casemate_attest::measure::ovmf::{Ovmf, PAGE_LEN, SecretArea, Section, SectionKind};
use casemate_attest::measure::vcpu::{CpuSignature, VcpuCount};
use casemate_attest::measure::vmsa::{Profile, ResetState, SevFeatures};

use super::{BootError, Component};
use crate::confidential::launch::{SpecialPage, VmsaPage};
use crate::machine::plan::{MachinePlan, Technology};
use crate::vmm::layout::PAGE_SIZE;

/// A guest that can be launched so.
#[derive(Debug)]
pub struct MeasuredBoot {
    steps: Vec<Step>,
    registers: Vec<VmsaPage>,
    ap_eip: Option<u32>,
    secret: Option<SecretArea>,
    digest: GuestDigest,
}

/// One step of the launch; the processor measures in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The image itself, which is in its place.
    Image {
        /// Its first byte.
        gpa: u64,
        /// Its length.
        length: u64,
    },
    /// The hashes, to be put there and measured.
    Hashes(Component),
    /// A page that the processor has a hand in.
    Special(u64, SpecialPage),
}

impl MeasuredBoot {
    /// What a plan is launched with. Pure: the owner's process computes the digest by the very same.
    pub fn new(
        plan: &MachinePlan,
        image: &[u8],
        kernel: &[u8],
        initrd: &[u8],
    ) -> Result<Self, BootError> {
        let ovmf = Ovmf::parse(image).map_err(BootError::Tables)?;
        let firmware = Firmware::new(ovmf);
        let (kernel, initrd) = (FileHash::of(kernel), FileHash::of(initrd));
        let hashes = KernelHashes::new(&kernel, Some(&initrd), Some(&plan.cmdline));
        let (technology, features) = match plan.technology {
            Technology::None => return Err(BootError::Firmware(NOT_MEASURED)),
            Technology::Sev { .. } => (guest::Technology::Sev, SevFeatures::NONE),
            Technology::SevEs { .. } => (guest::Technology::SevEs, SevFeatures::NONE),
            Technology::SevSnp { .. } => (guest::Technology::Snp, SevFeatures::SNP_ACTIVE),
        };
        let description = GuestDescription {
            technology,
            firmware: &firmware,
            kernel: Some(hashes),
            vcpus: VcpuCount::try_from(u16::from(plan.vcpus))
                .map_err(|_| BootError::Firmware(VCPUS))?,
            signature: SIGNATURE,
            features,
            profile: Profile::Qemu,
        };
        let digest = description.digest().map_err(BootError::Launch)?;
        let ovmf = firmware.ovmf();
        let steps = match technology {
            guest::Technology::Snp => with_sections(ovmf, &hashes)?,
            guest::Technology::Sev | guest::Technology::SevEs => with_table(ovmf, &hashes)?,
        };
        check_places(plan, &steps)?;
        let ap_eip = ovmf
            .reset_eip()
            .filter(|_| plan.technology.measures_registers());
        let registers = ap_eip.map_or_else(Vec::new, |eip| registers(plan, eip, features));
        Ok(Self {
            steps,
            registers,
            ap_eip,
            secret: ovmf.launch_secret(),
            digest,
        })
    }

    /// What is launched of memory.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The first registers of each vCPU, where they are measured.
    pub fn registers(&self) -> &[VmsaPage] {
        &self.registers
    }

    /// Where the vCPUs other than the first begin, where that is measured.
    pub fn ap_eip(&self) -> Option<u32> {
        self.ap_eip
    }

    /// Where a launch secret goes, if the firmware has a place for one.
    pub fn secret(&self) -> Option<SecretArea> {
        self.secret
    }

    /// The launch digest that the guest must have.
    pub fn digest(&self) -> GuestDigest {
        self.digest
    }
}

/// SEV and SEV-ES: the image, then the table alone.
fn with_table(ovmf: &Ovmf<'_>, hashes: &KernelHashes) -> Result<Vec<Step>, BootError> {
    let area = ovmf.hash_table().ok_or(BootError::Firmware(NO_TABLE))?;
    let table = Component {
        name: "kernel-hashes",
        gpa: area.gpa.into(),
        bytes: hashes.table().to_vec(),
    };
    Ok(vec![image(ovmf), Step::Hashes(table)])
}

/// SEV-SNP: the image, then every page that its metadata name.
fn with_sections(ovmf: &Ovmf<'_>, hashes: &KernelHashes) -> Result<Vec<Step>, BootError> {
    let mut steps = vec![image(ovmf)];
    for section in ovmf.sections() {
        let page = match section.kind {
            SectionKind::KernelHashes => {
                steps.push(Step::Hashes(hashes_page(ovmf, section, hashes)?));
                continue;
            }
            SectionKind::Secrets => SpecialPage::Secrets,
            SectionKind::Cpuid => SpecialPage::Cpuid,
            SectionKind::SecMem | SectionKind::SvsmCaa => SpecialPage::Zero,
            SectionKind::Unknown(_) => return Err(BootError::Firmware(UNKNOWN)),
        };
        let pages = (u64::from(section.gpa)..section.end()).step_by(PAGE_LEN);
        steps.extend(pages.map(|gpa| Step::Special(gpa, page)));
    }
    Ok(steps)
}

fn image(ovmf: &Ovmf<'_>) -> Step {
    Step::Image {
        gpa: ovmf.gpa(),
        length: ovmf.image().len() as u64,
    }
}

fn hashes_page(
    ovmf: &Ovmf<'_>,
    section: &Section,
    hashes: &KernelHashes,
) -> Result<Component, BootError> {
    let area = ovmf.hash_table();
    let inside = area.and_then(|area| area.gpa.checked_sub(section.gpa));
    let page = inside.and_then(|offset| hashes.page(offset as usize));
    Ok(Component {
        name: "kernel-hashes",
        gpa: section.gpa.into(),
        bytes: page.ok_or(BootError::Firmware(NO_TABLE))?.to_vec(),
    })
}

/// All but the image lies in the guest's low memory.
fn check_places(plan: &MachinePlan, steps: &[Step]) -> Result<(), BootError> {
    let fits = |step: &Step| {
        let (gpa, length) = match step {
            Step::Image { .. } => return true,
            Step::Hashes(hashes) => (hashes.gpa, hashes.bytes.len() as u64),
            Step::Special(gpa, _) => (*gpa, PAGE_SIZE),
        };
        gpa.checked_add(length)
            .is_some_and(|end| end <= plan.low_memory())
    };
    match steps.iter().all(fits) {
        true => Ok(()),
        false => Err(BootError::Firmware(BEYOND)),
    }
}

fn registers(plan: &MachinePlan, ap_eip: u32, features: SevFeatures) -> Vec<VmsaPage> {
    let other = ResetState::at(ap_eip, Profile::Qemu, SIGNATURE, features).page();
    let mut all = vec![other; plan.vcpus.into()];
    if let Some(boot) = all.first_mut() {
        *boot = ResetState::boot(Profile::Qemu, SIGNATURE, features).page();
    }
    all
}

/// What RDX says of a vCPU: nothing, so that the digest is the same on every processor.
const SIGNATURE: CpuSignature = CpuSignature(0);
const NOT_MEASURED: &str = "is measured of confidential guests only";
const VCPUS: &str = "cannot be measured with so many vCPUs";
const NO_TABLE: &str = "does not check kernel hashes; use Debian's OVMF.amdsev.fd";
const UNKNOWN: &str = "wants pages of a kind that is not known here";
const BEYOND: &str = "wants pages where the guest has no memory";

#[cfg(test)]
#[path = "measured_boot_tests.rs"]
mod tests;
