//! The board of a machine that starts in firmware.

use std::sync::Arc;

use crate::machine::plan::MachinePlan;
use crate::vmm::boot::firmware;
use crate::vmm::chipset::Chipset;
use crate::vmm::chipset::cmos::Cmos;
use crate::vmm::chipset::fw_cfg::FwCfg;
use crate::vmm::memory::GuestMemory;

/// Puts it together, if the plan wants one.
pub(super) fn chipset(plan: &MachinePlan, memory: &Arc<GuestMemory>) -> Option<Chipset> {
    plan.firmware?;
    let low = plan.low_memory();
    let cmos = Cmos::new(low, plan.memory_bytes - low);
    let fw_cfg = FwCfg::new(firmware::items(plan), memory.ram().clone());
    let told = plan.clone();
    Some(Chipset::new(cmos, fw_cfg, move |ecam| {
        firmware::tables(&told, ecam)
    }))
}
