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

use std::os::fd::BorrowedFd;

use crate::confidential::kvm::{KvmSev, RealSev, SevVm};
use crate::confidential::launch::GuestProtection;
use crate::confidential::shared::MemoryLayout;
use crate::confidential::software::SoftwareFirmware;
use crate::ipc::Channel;
use crate::machine::plan::{MachinePlan, Technology};
use crate::vmm::hooks::Handles;
use crate::vmm::protocol::{HandleKind, RoleError};

/// Where a guest's memory lies.
#[derive(Clone, Copy, Debug)]
pub struct GuestMemoryView<'a> {
    /// The memory file, writable, sealed against shrinking.
    pub file: BorrowedFd<'a>,
    /// Guest physical start and length of each run, packed in the file in this order.
    pub runs: &'a [(u64, u64)],
}

/// The VMM's hook ([`Hooks::protection`](crate::vmm::hooks::Hooks)): takes the psp's channel from the handles.
pub fn protection(
    plan: &MachinePlan,
    handles: &mut Handles,
    memory: BorrowedFd<'_>,
    exchange: BorrowedFd<'_>,
) -> Result<Option<GuestProtection>, RoleError> {
    let processor = handles.take(HandleKind::Processor).map(Channel::from_fd);
    let view = GuestMemoryView {
        file: memory,
        runs: &[(0, plan.memory_bytes)],
    };
    open(plan, view, exchange, processor)
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
            "this VMM boots no guest under AMD's own secure processor yet; describe the guest with `emulated = true`",
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

/// Opens AMD's own secure processor for a VMM that can boot such a guest; see [`kvm`] for what is untested.
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

#[cfg(test)]
mod snp_tests;
#[cfg(test)]
pub(crate) mod tests;
