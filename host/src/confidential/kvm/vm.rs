//! Which kind of virtual machine a guest's policy needs, and how this kernel makes one.

use kvm_ioctls::{Kvm, VmFd};
use nix::errno::Errno;

use super::error::SevError;
use crate::machine::plan::Technology;

/// Kinds of guest that Linux's SEV commands launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// Memory encrypted.
    Sev,
    /// Registers too.
    SevEs,
    /// And memory that the host cannot change behind the guest's back.
    Snp,
}

/// How a virtual machine becomes a SEV one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initialise {
    /// A machine of its own type, and `KVM_SEV_INIT2` (Linux 6.10).
    Typed,
    /// A machine of the default type, and `KVM_SEV_INIT` or `KVM_SEV_ES_INIT`.
    Older,
}

impl GuestKind {
    /// The kind that the 32-bit policy of SEV asks for (bit 2: ES); SNP has policies of its own.
    pub fn of_policy(policy: u32) -> Self {
        if policy & POLICY_ES == 0 {
            Self::Sev
        } else {
            Self::SevEs
        }
    }

    fn vm_type(self) -> u32 {
        match self {
            Self::Sev => kvm_bindings::KVM_X86_SEV_VM,
            Self::SevEs => kvm_bindings::KVM_X86_SEV_ES_VM,
            Self::Snp => kvm_bindings::KVM_X86_SNP_VM,
        }
    }
}

/// The kind of a guest that AMD's own processor is to launch; `None` where it has no part.
pub fn real_kind(technology: Technology) -> Option<GuestKind> {
    match technology {
        _ if technology.emulated() => None,
        Technology::None => None,
        Technology::Sev { .. } => Some(GuestKind::Sev),
        Technology::SevEs { .. } => Some(GuestKind::SevEs),
        Technology::SevSnp { .. } => Some(GuestKind::Snp),
    }
}

/// Makes the virtual machine for a guest: of its own type where this kernel has types.
pub fn create_vm(kvm: &Kvm, kind: GuestKind) -> Result<(VmFd, Initialise), SevError> {
    let types = kvm.check_extension_raw(CAP_VM_TYPES);
    let (vm_type, initialise) = match u32::try_from(types) {
        Ok(types) if types & (1 << kind.vm_type()) != 0 => (kind.vm_type(), Initialise::Typed),
        _ if kind == GuestKind::Snp => {
            return Err(SevError::Unsupported(
                "this kernel makes no machines for SNP guests; use Linux 6.11 or later with kvm_amd.sev_snp=1 on a \
                 processor with SNP enabled in its BIOS settings",
            ));
        }
        _ => (kvm_bindings::KVM_X86_DEFAULT_VM, Initialise::Older),
    };
    let vm = kvm
        .create_vm_with_type(u64::from(vm_type))
        .map_err(|error| SevError::Kernel {
            command: "KVM_CREATE_VM",
            errno: Errno::from_raw(error.errno()),
        })?;
    Ok((vm, initialise))
}

/// `KVM_CAP_VM_TYPES`.
const CAP_VM_TYPES: std::os::raw::c_ulong = 235;
/// The policy bit of SEV-ES.
const POLICY_ES: u32 = 1 << 2;
