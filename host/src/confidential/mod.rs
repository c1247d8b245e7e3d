//! Confidential technologies: the launch as a typestate, the software secure processor and its role.

pub mod control;
pub mod kvm;
pub mod launch;
pub mod page_map;
mod platform_order;
mod processor_guest;
pub mod processor_role;
mod processor_snp;
pub mod protocol;
pub mod shared;
pub mod software;

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::confidential::kvm::{KvmSev, RealSev, SevVm};
use crate::confidential::launch::GuestProtection;
use crate::confidential::shared::MemoryLayout;
use crate::confidential::software::SoftwareFirmware;
use crate::ipc::Channel;
use crate::machine::plan::{MachinePlan, Technology};
use crate::vmm::hooks::{BareMachine, Handles};
use crate::vmm::protocol::{HandleKind, RoleError};

/// Where a guest's memory lies.
#[derive(Clone, Copy, Debug)]
pub struct GuestMemoryView<'a> {
    /// The memory file, writable, sealed against shrinking.
    pub file: BorrowedFd<'a>,
    /// Guest physical start and length of each run, packed in the file in this order.
    pub runs: &'a [(u64, u64)],
}

/// The VMM's hook ([`Hooks::protection`](crate::vmm::hooks::Hooks)): takes the psp's channel, or `/dev/sev`, from the
/// handles.
pub fn protection(
    plan: &MachinePlan,
    handles: &mut Handles,
    machine: &BareMachine<'_>,
) -> Result<Option<GuestProtection>, RoleError> {
    let view = GuestMemoryView {
        file: machine.memory,
        runs: machine.runs,
    };
    let Some(initialise) = machine.vm.encrypted() else {
        let processor = handles.take(HandleKind::Processor).map(Channel::from_fd);
        return open(plan, view, machine.exchange, processor);
    };
    let Technology::Sev { policy, .. } = plan.technology else {
        return Err(RoleError::new(
            "FIRMWARE_NEEDED",
            "SEV-ES and SEV-SNP guests of a real processor need a firmware, which this VMM does not boot",
        ));
    };
    let real = RealSev {
        vm: Arc::clone(machine.vm.fd()),
        initialise,
        device: handles.require(HandleKind::SevDevice)?,
        amd: certificates(handles)?,
    };
    open_real(policy, view, machine.exchange, real).map(Some)
}

/// Opens the confidential technology that a plan asks for; `None` for a plain guest.
///
/// `processor` is the VMM's end of its channel to the `psp` role.
pub fn open(
    plan: &MachinePlan,
    memory: GuestMemoryView<'_>,
    exchange: BorrowedFd<'_>,
    processor: Option<Channel>,
) -> Result<Option<GuestProtection>, RoleError> {
    if plan.technology == Technology::None {
        return Ok(None);
    }
    if !plan.technology.emulated() {
        return Err(RoleError::new(
            "SEV_NOT_AVAILABLE",
            "a guest of AMD's own secure processor needs its own kind of machine",
        ));
    }
    let channel = processor.ok_or_else(|| {
        RoleError::new(
            "NO_PROCESSOR",
            "a guest under the emulated processor needs the channel to the psp role; the agent must hand it in",
        )
    })?;
    let layout = MemoryLayout::packed(memory.runs)?;
    let firmware =
        SoftwareFirmware::attach(channel, plan.technology, memory.file, &layout, exchange)?;
    Ok(Some(GuestProtection::new(firmware)))
}

/// Opens AMD's own secure processor; see [`kvm`] for what is untested.
pub fn open_real<V: SevVm + 'static>(
    policy: u32,
    memory: GuestMemoryView<'_>,
    exchange: BorrowedFd<'_>,
    real: RealSev<V>,
) -> Result<GuestProtection, RoleError> {
    let layout = MemoryLayout::packed(memory.runs)?;
    let firmware = KvmSev::attach(real, policy, memory.file, layout, exchange)?;
    Ok(GuestProtection::new(firmware))
}

/// ASK ‖ ARK, if the agent has them: they are needed only where a guest is to arrive.
fn certificates(handles: &mut Handles) -> Result<Vec<u8>, RoleError> {
    let Some(file) = handles.take(HandleKind::AmdCertificates) else {
        return Ok(Vec::new());
    };
    let mut bytes = Vec::new();
    let read = File::from(file)
        .take(MAX_CERTIFICATES)
        .read_to_end(&mut bytes);
    read.map_err(|e| RoleError::new("AMD_CERTIFICATES", format!("cannot be read: {e}")))?;
    Ok(bytes)
}

/// Two of AMD's largest are 3.3 KiB.
const MAX_CERTIFICATES: u64 = 16 << 10;

#[cfg(test)]
mod snp_tests;
#[cfg(test)]
pub(crate) mod tests;
