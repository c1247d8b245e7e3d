//! Devices that are attached and detached while the guest runs.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{Machine, MachineError, Parts};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::transport::VirtioPci;
use crate::machine::plan::devices::DeviceName;
use crate::machine::plan::{Attachment, MachinePlan};
use crate::vmm::hooks::{Handles, Hooks};
use crate::vmm::hotplug::{HotPlug, Occupant, SlotError};
use crate::vmm::protocol::{HandleKind, RoleError};

impl Machine {
    /// Puts a device into the first free slot, and tells the guest. Its descriptor is the image, or the tap. If anything
    /// fails, the machine is as it was.
    pub fn attach(
        &mut self,
        attachment: Attachment,
        descriptor: OwnedFd,
        hooks: &Hooks,
    ) -> Result<u8, MachineError> {
        let slots = self.slots.clone().ok_or(MachineError::NoSlot(0))?;
        let free = self.plan.free_slot();
        let slot = free.ok_or(MachineError::NoSlot(self.plan.hotplug.slots))?;
        let mut plan = self.plan.clone();
        if !plan.plug(slot, attachment.clone()) {
            return Err(MachineError::DeviceThere(attachment.name()));
        }
        plan.check().map_err(MachineError::Plan)?;
        let model = model_of(&self.plan, attachment, descriptor, hooks)?;
        let wake = second_handle(self.devices.wake())?;
        let parts = self.parts();
        let (function, gsis) = parts.function(model, 0, wake)?;
        let function = Arc::new(parts.movable(function));
        let occupant = Occupant { function, gsis };
        if let Err(error) = self.put_in(&slots, slot, &occupant) {
            self.forget(&occupant);
            return Err(error);
        }
        self.plan = plan;
        slots.tell(slot);
        Ok(slot)
    }

    fn put_in(&self, slots: &HotPlug, slot: u8, occupant: &Occupant) -> Result<(), MachineError> {
        let index = self.functions.len() + usize::from(slot);
        let function = &occupant.function;
        function
            .acquire()
            .map_err(|e| MachineError::Lock(index, e))?;
        slots.insert(slot, occupant.clone())?;
        let joined = self.devices.insert(index, Arc::clone(function));
        joined.inspect_err(|_| slots.withdraw(slot))?;
        Ok(())
    }

    /// Asks the guest to let go of a device that was attached; [`Machine::let_go`] takes it out when it has.
    pub fn ask_back(&self, name: &DeviceName) -> Result<(), MachineError> {
        let (slots, slot) = self.slot(name)?;
        Ok(slots.ask_back(slot)?)
    }

    /// The guest keeps it after all; fails if it has let go of it.
    pub fn keep(&mut self, name: &DeviceName) -> Result<(), MachineError> {
        self.let_go()?;
        let (slots, slot) = self.slot(name)?;
        match slots.keep(slot) {
            true => Ok(()),
            false => Err(SlotError::Empty(slot).into()),
        }
    }

    /// Takes out what the guest has let go of: nothing of it is left in this process.
    pub fn let_go(&mut self) -> Result<(), MachineError> {
        let Some(slots) = self.slots.clone() else {
            return Ok(());
        };
        for (slot, occupant) in slots.take_ejected() {
            let index = self.functions.len() + usize::from(slot);
            self.devices.remove(index)?;
            self.forget(&occupant);
            let plugged = self.plan.hotplug.plugged.iter();
            let name = plugged
                .filter(|one| one.slot == slot)
                .map(|one| one.device.clone())
                .next();
            if let Some(name) = name {
                self.plan.unplug(&name);
            }
        }
        Ok(())
    }

    /// The slots, of a machine that has some.
    pub fn slots(&self) -> Option<&HotPlug> {
        self.slots.as_deref()
    }

    /// Every function: those of the start in PCI order, then what is in the slots.
    pub(super) fn all(&self) -> Vec<Arc<VirtioPci>> {
        let mut all = self.functions.clone();
        let plugged = self.slots.iter().flat_map(|slots| slots.functions());
        all.extend(plugged.map(|(_, function)| function));
        all
    }

    /// One by its number, as [`MachinePlan::function_of`] counts.
    pub(super) fn function(&self, index: usize) -> Option<Arc<VirtioPci>> {
        match self.functions.get(index) {
            Some(function) => Some(Arc::clone(function)),
            None => {
                let slot = index.checked_sub(self.functions.len())?;
                self.slots.as_ref()?.function(slot)
            }
        }
    }

    fn slot(&self, name: &DeviceName) -> Result<(&HotPlug, u8), MachineError> {
        if let (Some(slots), Some(slot)) = (self.slots(), self.plan.slot_of(name)) {
            return Ok((slots, slot));
        }
        match self.plan.function_of(name) {
            Some(_) => Err(MachineError::Fixed(name.clone())),
            None => Err(MachineError::NoDevice(name.clone())),
        }
    }

    fn forget(&self, occupant: &Occupant) {
        occupant.function.unplug();
        self.interrupts.give_back(&occupant.gsis);
    }

    fn parts(&self) -> Parts<'_> {
        Parts {
            ram: self.memory.ram(),
            interrupts: &self.interrupts,
            doorbells: &self.doorbells,
            access_platform: false,
        }
    }
}

/// Its model, made as those of the start are.
fn model_of(
    plan: &MachinePlan,
    attachment: Attachment,
    descriptor: OwnedFd,
    hooks: &Hooks,
) -> Result<Box<dyn VirtioDevice>, MachineError> {
    let mut alone = MachinePlan {
        disks: Vec::new(),
        nets: Vec::new(),
        vsock_cid: None,
        small: Default::default(),
        hotplug: Default::default(),
        ..plan.clone()
    };
    let kind = match attachment {
        Attachment::Disk(disk) => {
            alone.disks.push(disk);
            HandleKind::Disk(0)
        }
        Attachment::Net(net) => {
            alone.nets.push(net);
            HandleKind::Tap { card: 0, pair: 0 }
        }
    };
    let mut handles = Handles::new(vec![kind], vec![descriptor])?;
    let mut models = (hooks.devices)(&alone, &mut handles)?;
    models.pop().ok_or_else(|| {
        let text = "a plan of one device made none";
        MachineError::Role(RoleError::new("INTERNAL", text))
    })
}

/// Another handle of an event, made by a call that the control thread may use (`EventFd::try_clone` takes another).
#[expect(unsafe_code, reason = "EventFd lends its descriptor as a number only")]
fn second_handle(event: &EventFd) -> io::Result<EventFd> {
    // SAFETY: the descriptor is the event's own and open as long as `event` is borrowed.
    let lent = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let second = lent.try_clone_to_owned()?;
    // SAFETY: an open descriptor of an eventfd that nobody else owns.
    Ok(unsafe { EventFd::from_raw_fd(second.into_raw_fd()) })
}
