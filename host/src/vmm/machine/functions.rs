//! The PCI functions of a machine: joined to memory, interrupts and doorbells, and put in their places.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::super::doorbells::{Doorbells, KvmDoorbells};
use super::super::hotplug::{HotPlug, Occupant};
use super::super::irq::{Interrupts, MsiRouter};
use super::super::layout::{MAX_FUNCTIONS, VIRTIO_BAR_SIZE, VIRTIO_BARS};
use super::super::pci::msix::Msix;
use super::MachineError;
use crate::devices::events::Events;
use crate::devices::virtio::transport::{Placement, VirtioPci};
use crate::devices::virtio::{GuestRam, VirtioDevice};
use crate::devices::watchdog::Watchdog;
use crate::machine::plan::MachinePlan;

/// What a function is joined to.
pub(super) struct Parts<'a> {
    pub(super) ram: &'a GuestRam,
    pub(super) interrupts: &'a Arc<Interrupts>,
    pub(super) doorbells: &'a Arc<KvmDoorbells>,
    pub(super) access_platform: bool,
}

impl Parts<'_> {
    /// A model as a function whose BAR is at `bar`, and its interrupts.
    pub(super) fn function(
        &self,
        model: Box<dyn VirtioDevice>,
        bar: u32,
        wake: EventFd,
    ) -> Result<(VirtioPci, Vec<u32>), MachineError> {
        let vectors = model.queue_sizes().len() + 1;
        let lines = (0..vectors)
            .map(|_| self.interrupts.message_line())
            .collect::<Result<Vec<_>, _>>()?;
        let gsis: Vec<u32> = lines.iter().map(|(gsi, _)| *gsi).collect();
        let msix = Arc::new(Msix::new(
            lines,
            Arc::clone(self.interrupts) as Arc<dyn MsiRouter>,
        ));
        let place = Placement {
            bar,
            ram: self.ram.clone(),
            wake,
            access_platform: self.access_platform,
        };
        let function = VirtioPci::new(model, msix, place);
        let function = function.inspect_err(|_| self.interrupts.give_back(&gsis))?;
        Ok((function, gsis))
    }

    /// A function whose BAR the guest places.
    pub(super) fn movable(&self, function: VirtioPci) -> VirtioPci {
        function.with_movable_bar(Arc::clone(self.doorbells) as Arc<dyn Doorbells>)
    }

    /// A function whose BAR stays where it is.
    fn fixed(&self, function: VirtioPci, bar: u64) -> Result<VirtioPci, MachineError> {
        for (queue, kick) in function.kicks().iter().enumerate() {
            self.doorbells
                .fix(kick, bar + VirtioPci::notify_offset(queue))?;
        }
        Ok(function)
    }
}

/// What is in which slot.
pub(super) type Plugged = Vec<(u8, Occupant)>;

/// The functions of the start, and those that are in slots.
pub(super) fn place_functions(
    models: Vec<Box<dyn VirtioDevice>>,
    parts: &Parts<'_>,
    wake: &EventFd,
    plan: &MachinePlan,
) -> Result<(Vec<Arc<VirtioPci>>, Plugged), MachineError> {
    let mut functions: Vec<Arc<VirtioPci>> = Vec::with_capacity(models.len());
    let mut plugged = Vec::new();
    let slots = plan.slots_in_order().into_iter();
    let slots = slots.chain(std::iter::repeat(None));
    for (model, slot) in models.into_iter().take(MAX_FUNCTIONS).zip(slots) {
        let bar = VIRTIO_BARS + functions.len() as u64 * VIRTIO_BAR_SIZE;
        let (function, gsis) = parts.function(model, bar as u32, wake.try_clone()?)?;
        match slot {
            Some(slot) => {
                let function = Arc::new(parts.movable(function));
                plugged.push((slot, Occupant { function, gsis }));
            }
            None if plan.firmware.is_some() => functions.push(Arc::new(parts.movable(function))),
            None => functions.push(Arc::new(parts.fixed(function, bar)?)),
        }
    }
    Ok((functions, plugged))
}

/// The slots of a plan, with what is in them from another host or an earlier time.
pub(super) fn make_slots(
    plan: &MachinePlan,
    events: &Arc<Events>,
    plugged: Plugged,
) -> Result<Option<Arc<HotPlug>>, MachineError> {
    if plan.hotplug.slots == 0 {
        return Ok(None);
    }
    let slots = HotPlug::new(plan.hotplug.slots, Arc::clone(events))?;
    for (slot, occupant) in plugged {
        slots.insert(slot, occupant)?;
    }
    Ok(Some(Arc::new(slots)))
}

/// The watchdog, behind all other functions of the start.
pub(super) fn place_watchdog(
    plan: &MachinePlan,
    slot: usize,
    wake: &EventFd,
) -> Result<Option<Arc<Watchdog>>, MachineError> {
    if plan.small.watchdog.is_none() {
        return Ok(None);
    }
    let bar = VIRTIO_BARS + slot as u64 * VIRTIO_BAR_SIZE;
    let watchdog = Watchdog::new(bar as u32, wake.try_clone()?)?;
    let watchdog = match plan.firmware {
        Some(_) => watchdog.with_movable_bar(),
        None => watchdog,
    };
    Ok(Some(Arc::new(watchdog)))
}
