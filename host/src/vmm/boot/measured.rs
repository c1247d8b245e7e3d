//! What a technology measures beside the pieces of memory: the vCPUs' first registers, and SEV-SNP's special pages.
//!
//! The owner's process computes the launch digest from here, the VMM gives the very same to the firmware.

use casemate_attest::measure::LaunchDigester;
use casemate_attest::measure::guest::GuestDigest;
use casemate_attest::measure::snp::{PageType, SnpLaunchDigest, SnpLaunchDigester};
use casemate_attest::measure::vcpu::CpuSignature;
use casemate_attest::measure::vmsa::{EntryState, Profile, ResetState, SevFeatures};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::{Component, paging};
use crate::confidential::launch::{SpecialPage, VmsaPage};
use crate::machine::plan::{MachinePlan, Technology};
use crate::vmm::layout::{GDT, PAGE_SIZE, PAGE_TABLES, SNP_CPUID, SNP_SECRETS};
use crate::vmm::vcpu::entry::{BOOT_STACK, Entry};

/// Pages that SEV-SNP firmware has a hand in, in the order in which they are launched; none for others.
pub fn special_pages(technology: Technology) -> &'static [(u64, SpecialPage)] {
    match technology {
        Technology::SevSnp { .. } => &[
            (SNP_SECRETS, SpecialPage::Secrets),
            (SNP_CPUID, SpecialPage::Cpuid),
        ],
        Technology::None | Technology::Sev { .. } | Technology::SevEs { .. } => &[],
    }
}

/// The first registers of each vCPU where the technology measures them: the first enters the kernel, the others
/// wait at reset. A vCPU's family, model and stepping are not told (RDX is 0), so that the digest is the same on
/// every processor.
pub fn vcpu_states(plan: &MachinePlan) -> Vec<VmsaPage> {
    let features = match plan.technology {
        Technology::None | Technology::Sev { .. } => return Vec::new(),
        Technology::SevEs { .. } => SevFeatures::NONE,
        Technology::SevSnp { .. } => SevFeatures::SNP_ACTIVE,
    };
    let first = EntryState {
        rip: Entry::LINUX.rip,
        rsi: Entry::LINUX.rsi,
        rsp: BOOT_STACK,
        cr3: PAGE_TABLES,
        gdt: GDT as u32,
        gdt_limit: paging::gdt_limit(),
        selectors: [
            paging::CODE_SELECTOR,
            paging::DATA_SELECTOR,
            paging::TSS_SELECTOR,
        ],
        features,
    };
    let other = ResetState::boot(Profile::Casemate, CpuSignature(0), features).page();
    let mut states = vec![other; plan.vcpus.into()];
    if let Some(boot) = states.first_mut() {
        *boot = first.page();
    }
    states
}

/// The launch digest of a guest; none for a plain one.
pub fn launch_digest(plan: &MachinePlan, pieces: &[Component]) -> Option<GuestDigest> {
    match plan.technology {
        Technology::None => None,
        Technology::Sev { .. } | Technology::SevEs { .. } => {
            let mut digester = LaunchDigester::new();
            pieces
                .iter()
                .for_each(|piece| digester.update(&piece.bytes));
            let states = vcpu_states(plan);
            states.iter().for_each(|state| digester.update(state));
            Some(GuestDigest::Sev(digester.finish()))
        }
        Technology::SevSnp { .. } => Some(GuestDigest::Snp(snp_digest(plan, pieces))),
    }
}

fn snp_digest(plan: &MachinePlan, pieces: &[Component]) -> SnpLaunchDigest {
    let mut digester = SnpLaunchDigester::new();
    for piece in pieces {
        let (pages, _whole) = piece.bytes.as_chunks::<{ PAGE_SIZE as usize }>();
        digester.normal(piece.gpa, pages);
    }
    for (gpa, page) in special_pages(plan.technology) {
        let kind = match page {
            SpecialPage::Zero => PageType::Zero,
            SpecialPage::Secrets => PageType::Secrets,
            SpecialPage::Cpuid => PageType::Cpuid,
        };
        digester.without_content(kind, *gpa, 1);
    }
    for state in vcpu_states(plan) {
        digester.vmsa(&state, 1);
    }
    digester.finish()
}

/// The CPUID page (publication 56860, "CPUID Page"): a count, then 48 bytes a leaf. Leaves of the hypervisor's own
/// range are not for the firmware, empty ones say what a missing one says, and 64 are all that fit.
pub fn cpuid_page(leaves: &[kvm_cpuid_entry2]) -> Vec<u8> {
    let told: Vec<&kvm_cpuid_entry2> = leaves
        .iter()
        .filter(|leaf| leaf.function & HYPERVISOR_RANGE_MASK != HYPERVISOR_RANGE)
        .filter(|leaf| (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) != (0, 0, 0, 0))
        .take(MAX_LEAVES)
        .collect();
    let mut page = Vec::with_capacity(PAGE_SIZE as usize);
    page.extend_from_slice(&(told.len() as u32).to_le_bytes());
    page.resize(LEAVES_AT, 0);
    for leaf in told {
        let indexed = leaf.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        // Of leaf 0xd the sizes depend on XCR0; these are those of reset.
        let xcr0 = u64::from(leaf.function == XSAVE_LEAF);
        let index = if indexed { leaf.index } else { 0 };
        for word in [leaf.function, index] {
            page.extend_from_slice(&word.to_le_bytes());
        }
        for wide in [xcr0, 0] {
            page.extend_from_slice(&wide.to_le_bytes());
        }
        for word in [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] {
            page.extend_from_slice(&word.to_le_bytes());
        }
        page.extend_from_slice(&[0; 8]);
    }
    page.resize(PAGE_SIZE as usize, 0);
    page
}

const HYPERVISOR_RANGE: u32 = 0x4000_0000;
const HYPERVISOR_RANGE_MASK: u32 = 0xf000_0000;
const XSAVE_LEAF: u32 = 0xd;
const MAX_LEAVES: usize = 64;
const LEAVES_AT: usize = 16;
