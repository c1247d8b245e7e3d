//! The whole state of a vCPU, saved and put back in the order KVM needs.
//!
//! A saved state comes from another host, after its authentication but not after any check of its sense:
//! KVM refuses what is impossible, the rest can only harm the guest itself.
#![expect(
    unsafe_code,
    reason = "KVM_GET/SET_XSAVE write and read a buffer sized by a capability"
)]

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::cpuid;
use crate::vmm::kvm::{KvmError, during};

/// State of one vCPU, version 1.
#[derive(Serialize, Deserialize)]
pub struct VcpuStateV1 {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

impl VcpuStateV1 {
    /// Instruction pointer and the argument registers, for diagnosis and tests.
    pub fn regs(&self) -> &kvm_regs {
        &self.regs
    }
}

/// What of the host a vCPU needs to be saved and restored.
pub struct StateContext {
    msr_indices: Vec<u32>,
    supported: CpuId,
    extra_xsave_words: usize,
    leaves: Mutex<BTreeMap<u8, Vec<kvm_cpuid_entry2>>>,
}

impl StateContext {
    /// Asks KVM once for all vCPUs.
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, KvmError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(during("KVM_GET_MSR_INDEX_LIST"))?;
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(during("KVM_GET_SUPPORTED_CPUID"))?;
        let size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            msr_indices: list.as_slice().to_vec(),
            supported,
            extra_xsave_words: size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4),
            leaves: Mutex::default(),
        })
    }

    /// Leaves KVM supports.
    pub fn supported(&self) -> &CpuId {
        &self.supported
    }

    /// Gives vCPU `id` its CPUID leaves, and remembers them: what KVM reads back has bits of the host's and of
    /// the moment in it.
    pub fn set_cpuid(
        &self,
        id: u8,
        vcpu: &VcpuFd,
        leaves: &[kvm_cpuid_entry2],
    ) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(leaves).map_err(|_| KvmError::State("CPUID table"))?;
        vcpu.set_cpuid2(&cpuid).map_err(during("KVM_SET_CPUID2"))?;
        self.leaves().insert(id, leaves.to_vec());
        Ok(())
    }

    /// Reads everything of vCPU `id`. It must have completed its last exit.
    pub fn save(&self, id: u8, vcpu: &VcpuFd) -> Result<VcpuStateV1, KvmError> {
        // mp_state first: reading it makes KVM take pending INIT and SIPI into account.
        let mp_state = vcpu.get_mp_state().map_err(during("KVM_GET_MP_STATE"))?;
        Ok(VcpuStateV1 {
            cpuid: self.leaves().get(&id).cloned().unwrap_or_default(),
            mp_state,
            regs: vcpu.get_regs().map_err(during("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(during("KVM_GET_SREGS"))?,
            xsave: self.get_xsave(vcpu)?,
            xcrs: vcpu.get_xcrs().map_err(during("KVM_GET_XCRS"))?,
            debugregs: vcpu.get_debug_regs().map_err(during("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(during("KVM_GET_LAPIC"))?,
            tsc_khz: vcpu.get_tsc_khz().map_err(during("KVM_GET_TSC_KHZ"))?,
            msrs: self.get_msrs(vcpu)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(during("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Writes everything into a fresh vCPU.
    pub fn restore(&self, id: u8, vcpu: &VcpuFd, state: &VcpuStateV1) -> Result<(), StateError> {
        cpuid::check_compatible(&self.supported, &state.cpuid)?;
        self.set_cpuid(id, vcpu, &state.cpuid)?;
        // The same frequency scales nothing; another one needs hardware scaling and fails without it.
        if vcpu.get_tsc_khz().ok() != Some(state.tsc_khz) {
            vcpu.set_tsc_khz(state.tsc_khz)
                .map_err(during("KVM_SET_TSC_KHZ"))?;
        }
        vcpu.set_mp_state(state.mp_state)
            .map_err(during("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&state.regs).map_err(during("KVM_SET_REGS"))?;
        vcpu.set_sregs(&state.sregs)
            .map_err(during("KVM_SET_SREGS"))?;
        vcpu.set_xcrs(&state.xcrs).map_err(during("KVM_SET_XCRS"))?;
        self.set_xsave(vcpu, &state.xsave)?;
        vcpu.set_debug_regs(&state.debugregs)
            .map_err(during("KVM_SET_DEBUGREGS"))?;
        // The local APIC needs the APIC base of sregs; the deadline MSR needs the local APIC.
        vcpu.set_lapic(&state.lapic)
            .map_err(during("KVM_SET_LAPIC"))?;
        set_msrs(vcpu, &state.msrs)?;
        vcpu.set_vcpu_events(&state.events)
            .map_err(during("KVM_SET_VCPU_EVENTS"))?;
        Ok(())
    }

    fn leaves(&self) -> MutexGuard<'_, BTreeMap<u8, Vec<kvm_cpuid_entry2>>> {
        self.leaves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get_xsave(&self, vcpu: &VcpuFd) -> Result<Vec<u32>, KvmError> {
        if self.extra_xsave_words == 0 {
            let xsave = vcpu.get_xsave().map_err(during("KVM_GET_XSAVE"))?;
            return Ok(xsave.region.to_vec());
        }
        let mut xsave =
            Xsave::new(self.extra_xsave_words).map_err(|_| KvmError::State("xsave size"))?;
        // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 gave for this machine, and no feature is
        // enabled dynamically in this process.
        unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(during("KVM_GET_XSAVE2"))?;
        let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
        words.extend_from_slice(xsave.as_slice());
        Ok(words)
    }

    fn set_xsave(&self, vcpu: &VcpuFd, words: &[u32]) -> Result<(), StateError> {
        let mut xsave =
            Xsave::new(self.extra_xsave_words).map_err(|_| StateError::Impossible("xsave"))?;
        let (region, extra) = words
            .split_at_checked(XSAVE_WORDS)
            .ok_or(StateError::Impossible("xsave"))?;
        // A longer area than this host's may only be zero beyond it.
        let (fits, beyond) = extra.split_at(extra.len().min(self.extra_xsave_words));
        if beyond.iter().any(|word| *word != 0) {
            return Err(StateError::Impossible("xsave"));
        }
        for (to, from) in xsave.as_mut_slice().iter_mut().zip(fits) {
            *to = *from;
        }
        let mut fixed = kvm_xsave::default();
        for (to, from) in fixed.region.iter_mut().zip(region) {
            *to = *from;
        }
        // SAFETY: nothing but the fixed part is replaced; the length of the array behind it stays.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region = fixed.region;
        // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 gave for this machine.
        unsafe { vcpu.set_xsave2(&xsave) }.map_err(during("KVM_SET_XSAVE"))?;
        Ok(())
    }

    /// All MSRs of the list that can be read.
    fn get_msrs(&self, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, KvmError> {
        let mut entries = Vec::with_capacity(self.msr_indices.len());
        let mut left: Vec<u32> = self.msr_indices.clone();
        while !left.is_empty() {
            let wanted: Vec<kvm_msr_entry> = left
                .iter()
                .take(kvm_bindings::KVM_MAX_MSR_ENTRIES)
                .map(|index| kvm_msr_entry {
                    index: *index,
                    ..Default::default()
                })
                .collect();
            let mut msrs = Msrs::from_entries(&wanted).map_err(|_| KvmError::State("MSR list"))?;
            let read = vcpu.get_msrs(&mut msrs).map_err(during("KVM_GET_MSRS"))?;
            entries.extend_from_slice(msrs.as_slice().get(..read).unwrap_or_default());
            // KVM stops at the first one it cannot read: skip that one, go on behind it.
            let skip = if read < wanted.len() { read + 1 } else { read };
            left.drain(..skip.min(left.len()));
        }
        Ok(entries)
    }
}

/// Sets all MSRs; those which only say what the hardware is, and are refused, are left as they are if
/// they have the wanted value already.
fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    // The deadline is relative to the TSC, so it comes last.
    let (late, mut ordered): (Vec<kvm_msr_entry>, Vec<kvm_msr_entry>) = entries
        .iter()
        .partition(|entry| entry.index == IA32_TSC_DEADLINE);
    ordered.extend(late);
    let mut rest = ordered.as_slice();
    while let [first, ..] = rest {
        let chunk = rest
            .get(..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES))
            .unwrap_or_default();
        let msrs = Msrs::from_entries(chunk).map_err(|_| StateError::Impossible("MSR list"))?;
        let set = vcpu.set_msrs(&msrs).map_err(during("KVM_SET_MSRS"))?;
        if set == 0 {
            accept_if_equal(vcpu, first)?;
        }
        rest = rest.get(set.max(1)..).unwrap_or_default();
    }
    Ok(())
}

fn accept_if_equal(vcpu: &VcpuFd, entry: &kvm_msr_entry) -> Result<(), StateError> {
    let probe = kvm_msr_entry {
        index: entry.index,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[probe]).map_err(|_| StateError::Impossible("MSR list"))?;
    let read = vcpu.get_msrs(&mut msrs).map_err(during("KVM_GET_MSRS"))?;
    let here = msrs.as_slice().first().map_or(0, |msr| msr.data);
    if read == 1 && here == entry.data {
        return Ok(());
    }
    if entry.data == 0 {
        // Not there on this host, and unused on the other.
        return Ok(());
    }
    Err(StateError::Msr {
        index: entry.index,
        wanted: entry.data,
        here,
    })
}

/// Why a vCPU state cannot be put back.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Features are missing here.
    #[error(transparent)]
    Cpuid(#[from] cpuid::CpuidMismatch),
    /// Not a state this version writes.
    #[error("vCPU state: {0} is impossible")]
    Impossible(&'static str),
    /// An MSR cannot have the saved value here.
    #[error("MSR {index:#x} must be {wanted:#x}, this host holds it at {here:#x}")]
    Msr {
        /// Which one.
        index: u32,
        /// What the state says.
        wanted: u64,
        /// What it is.
        here: u64,
    },
}

const XSAVE_WORDS: usize = 1024;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
