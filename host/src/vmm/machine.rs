//! One machine: built from a plan, loaded, run, paused, saved, restored. Knows no channel and no protocol.

mod board;
mod disks;
mod error;
mod functions;
mod launch;
mod plug;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::error::MachineError;
use self::functions::{Parts, make_slots, place_functions, place_watchdog};
use super::bus::{GuestBus, MachineBus, StopNotice};
use super::chipset::Chipset;
use super::device_thread::DeviceThread;
use super::doorbells::KvmDoorbells;
use super::hooks::{BareMachine, Handles, Hooks, ThreadKind};
use super::hotplug::HotPlug;
use super::irq::Interrupts;
use super::kvm::{Vm, during};
use super::layout::{COM1_GSI, EVENTS_GSI, GENERATION, MAX_FUNCTIONS, SECRET_GPA, SECRET_SIZE};
use super::memory::{ExchangeMemory, GuestMemory};
use super::page_sharing::PageSharing;
use super::pci::{PciBus, PciFunction};
use super::protocol::{HandleKind, RoleError};
use super::state::MachineStateV4;
use super::vcpu::entry::power_on_msrs;
use super::vcpu::model;
use super::vcpu::state::StateContext;
use super::vcpu::{Vcpu, VcpuError, cpuid};
use crate::confidential::kvm::real_kind;
use crate::confidential::launch::GuestProtection;
use crate::devices::events::{Event, Events};
use crate::devices::serial::Console;
use crate::devices::virtio::transport::VirtioPci;
use crate::devices::watchdog::Watchdog;
use crate::machine::plan::devices::{DeviceChange, DeviceName, DeviceStatus};
use crate::machine::plan::{FIRMWARE_OF_REAL, MAX_LOW_MEMORY, MAX_VCPUS, MachinePlan, Technology};
use crate::userfault::{FaultRange, Faults};

/// A machine with all its threads. Dropping it ends them.
pub struct Machine {
    // threads first, so that they end before what they use
    vcpus: Vec<Vcpu>,
    devices: DeviceThread,
    functions: Vec<Arc<VirtioPci>>,
    watchdog: Option<Arc<Watchdog>>,
    console: Arc<Console>,
    events: Arc<Events>,
    slots: Option<Arc<HotPlug>>,
    interrupts: Arc<Interrupts>,
    doorbells: Arc<KvmDoorbells>,
    pci: Arc<PciBus>,
    chipset: Option<Arc<Chipset>>,
    context: Arc<StateContext>,
    vm: Vm,
    memory: Arc<GuestMemory>,
    exchange: ExchangeMemory,
    // kept to the end: without it who waits for a page would get zeros
    faults: Option<Faults>,
    stop: Arc<StopNotice>,
    firmware: Option<File>,
    kernel: Option<File>,
    initrd: Option<File>,
    protection: Option<GuestProtection>,
    sharing: Option<Arc<PageSharing>>,
    /// Where a launch secret goes, and how much there is room for.
    secret_area: Option<(u64, u64)>,
    plan: MachinePlan,
}

impl Machine {
    /// Builds everything a plan names, closes the sandbox, starts the threads, stopped. No byte of the
    /// guest has been parsed when this returns.
    pub fn build(
        plan: MachinePlan,
        handles: &mut Handles,
        hooks: &Hooks,
    ) -> Result<Self, MachineError> {
        check_plan(&plan)?;
        let mut memory = match handles.take(HandleKind::Memory) {
            Some(file) => GuestMemory::handed_over(&plan, file.into())?,
            None => GuestMemory::of(&plan)?,
        };
        let reader = (hooks.reopen_read_only)(memory.file()).map_err(MachineError::Confine)?;
        memory.set_reader(reader);
        let memory = Arc::new(memory);
        let exchange = match handles.take(HandleKind::Exchange) {
            Some(file) => ExchangeMemory::handed_over(file.into())?,
            None => ExchangeMemory::new()?,
        };
        let faults = match handles.take(HandleKind::Userfault) {
            Some(device) => Some(register_faults(device, &memory)?),
            None => None,
        };
        let kvm = handles.require(HandleKind::Kvm)?;
        let kind = real_kind(plan.technology);
        let vm = Vm::new(kvm, Arc::clone(&memory), kind)?;
        let sharing = kind.map(|_| Arc::new(PageSharing::new(Arc::clone(&memory))));
        // KVM takes no machine that has a vCPU for an encrypted one.
        let bare = BareMachine {
            vm: &vm,
            memory: memory.file(),
            runs: &memory.runs(),
            exchange: exchange.file(),
        };
        let protection = (hooks.protection)(&plan, handles, &bare)?;
        let context = Arc::new(StateContext::new(vm.kvm(), vm.fd())?);
        if let Some(baseline) = &plan.cpu.baseline {
            model::check(baseline, plan.cpu.model, context.supported())?;
        }
        let vcpu_fds = make_vcpus(&vm, &context, &plan)?;
        let interrupts = Arc::new(Interrupts::new(Arc::clone(vm.fd())));
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let models = (hooks.devices)(&plan, handles)?;
        let doorbells = Arc::new(KvmDoorbells::new(Arc::clone(vm.fd())));
        let parts = Parts {
            ram: memory.ram(),
            interrupts: &interrupts,
            doorbells: &doorbells,
            access_platform: plan.technology != Technology::None,
        };
        let (functions, plugged) = place_functions(models, &parts, &wake, &plan)?;
        let console_line = interrupts.legacy_line(COM1_GSI)?;
        let console = Console::new(console_line, handles.require(HandleKind::Console)?)?;
        let console = Arc::new(match handles.take(HandleKind::ConsoleInput) {
            Some(input) => console.with_input(input, wake.try_clone()?)?,
            None => console,
        });
        let watchdog = place_watchdog(&plan, functions.len(), &wake)?;
        let chipset = board::chipset(&plan, &memory).map(Arc::new);
        let events = Arc::new(Events::new(interrupts.legacy_line(EVENTS_GSI)?));
        let slots = make_slots(&plan, &events, plugged)?;
        let pci = Arc::new(
            PciBus::new(
                functions
                    .iter()
                    .map(|f| Arc::clone(f) as Arc<dyn PciFunction>)
                    .chain(
                        watchdog
                            .iter()
                            .map(|w| Arc::clone(w) as Arc<dyn PciFunction>),
                    ),
            )
            .on_board(chipset.iter().flat_map(|board| board.functions()))
            .with_slots(slots.clone()),
        );
        let stop = Arc::new(StopNotice::new()?);
        let bus: Arc<dyn GuestBus> = Arc::new(
            MachineBus::new(
                Arc::clone(&console),
                Arc::clone(&events),
                Arc::clone(&pci),
                functions.clone(),
                watchdog.clone(),
                Arc::clone(&stop),
                sharing.clone(),
            )
            .on_board(chipset.clone())
            .with_slots(slots.clone()),
        );
        let firmware = handles.take(HandleKind::Firmware).map(File::from);
        let kernel = handles.take(HandleKind::Kernel).map(File::from);
        let initrd = handles.take(HandleKind::Initrd).map(File::from);

        (hooks.confine_process)().map_err(MachineError::Confine)?;
        let devices = DeviceThread::spawn(
            wake,
            functions.clone(),
            watchdog.clone(),
            Some(Arc::clone(&console)),
            hooks.confine_thread,
        )?;
        for (slot, function) in slots.iter().flat_map(|slots| slots.functions()) {
            devices.insert(functions.len() + usize::from(slot), function)?;
        }
        let mut vcpus = Vec::with_capacity(vcpu_fds.len());
        for (id, fd) in vcpu_fds {
            vcpus.push(Vcpu::spawn(
                id,
                fd,
                Arc::clone(&bus),
                Arc::clone(&stop),
                hooks.confine_thread,
            )?);
        }
        (hooks.confine_thread)(ThreadKind::Control).map_err(MachineError::Confine)?;
        Ok(Self {
            vcpus,
            devices,
            functions,
            watchdog,
            console,
            events,
            slots,
            interrupts,
            doorbells,
            pci,
            chipset,
            context,
            vm,
            memory,
            exchange,
            faults,
            stop,
            firmware,
            kernel,
            initrd,
            protection,
            sharing,
            secret_area: Some((SECRET_GPA, SECRET_SIZE)),
            plan,
        })
    }

    /// Starts or goes on.
    pub fn run(&self) -> Result<(), MachineError> {
        self.devices.run()?;
        for vcpu in &self.vcpus {
            // Tells the guest's watchdogs that it was stopped; refused before it uses the paravirtual clock.
            vcpu.call(|fd| {
                let _ = fd.kvmclock_ctrl();
            })?;
        }
        for vcpu in &self.vcpus {
            vcpu.run()?;
        }
        Ok(())
    }

    /// Stops the vCPUs, then the devices.
    pub fn pause(&self) -> Result<(), MachineError> {
        let pausing: Vec<_> = self
            .vcpus
            .iter()
            .map(Vcpu::pause)
            .collect::<Result<_, _>>()?;
        for each in pausing {
            each.wait()?;
        }
        self.devices.pause()?;
        Ok(())
    }

    /// Takes all vCPUs off their processors for so long.
    pub fn rest(&self, time: std::time::Duration) -> Result<(), MachineError> {
        for vcpu in &self.vcpus {
            vcpu.rest(time)?;
        }
        Ok(())
    }

    /// State of everything but memory; the machine is paused.
    pub fn save(&self) -> Result<Vec<u8>, MachineError> {
        let mut vcpus = Vec::with_capacity(self.vcpus.len());
        for (vcpu, id) in self.vcpus.iter().zip(0u8..) {
            let context = Arc::clone(&self.context);
            vcpus.push(vcpu.call(move |fd| context.save(id, fd))??);
        }
        let state = MachineStateV4 {
            vcpus,
            vm: self.vm.save()?,
            serial: self.console.save(),
            pci_address: self.pci.address(),
            functions: self.all().iter().map(|function| function.save()).collect(),
            watchdog: self.watchdog.as_ref().map(|watchdog| watchdog.save()),
            chipset: self.chipset.as_ref().map(|chipset| chipset.save()),
        };
        Ok(state.encode()?)
    }

    /// Puts a state into a machine that has not run; its memory is already there. For a `copy` it is the state of another
    /// guest, whose addresses it does not take over.
    pub fn restore(&self, bytes: &[u8], copy: bool) -> Result<(), MachineError> {
        let state = MachineStateV4::decode(bytes)?;
        let functions = self.all();
        if state.vcpus.len() != self.vcpus.len()
            || state.functions.len() != functions.len()
            || state.watchdog.is_some() != self.watchdog.is_some()
            || state.chipset.is_some() != self.chipset.is_some()
        {
            return Err(MachineError::Shape);
        }
        // Local APICs before the I/O APIC, which may deliver to them at once.
        for ((vcpu, saved), id) in self.vcpus.iter().zip(state.vcpus).zip(0u8..) {
            let context = Arc::clone(&self.context);
            vcpu.call(move |fd| context.restore(id, fd, &saved))??;
        }
        self.vm.restore(&state.vm)?;
        self.console.restore(&state.serial)?;
        self.pci.set_address(state.pci_address);
        for (function, saved) in functions.iter().zip(state.functions) {
            if copy {
                function.expect_copy();
            }
            function.restore(saved)?;
        }
        if let (Some(watchdog), Some(saved)) = (&self.watchdog, state.watchdog) {
            watchdog.restore(saved).ok_or(MachineError::Shape)?;
        }
        if let (Some(chipset), Some(saved)) = (&self.chipset, state.chipset) {
            chipset.restore(saved).ok_or(MachineError::Shape)?;
        }
        for function in &functions {
            function.rouse();
        }
        if let Some(slots) = &self.slots {
            // What the guest had not heard of yet did not travel.
            let plugged = slots.functions();
            plugged.iter().for_each(|(slot, _)| slots.tell(*slot));
        }
        if let Some(sharing) = &self.sharing {
            sharing.arrived();
        }
        Ok(())
    }

    /// Takes the locks of all devices.
    pub fn acquire(&self) -> Result<(), MachineError> {
        let functions = self.all();
        for (index, function) in functions.iter().enumerate() {
            if let Err(e) = function.acquire() {
                for taken in functions.iter().take(index) {
                    let _ = taken.release();
                }
                return Err(MachineError::Lock(index, e));
            }
        }
        Ok(())
    }

    /// Another process goes on with the same descriptors: what only this one knows of a disk is written to its image.
    pub fn hand_on(&self) -> Result<(), MachineError> {
        for (index, function) in self.all().iter().enumerate() {
            function
                .hand_on()
                .map_err(|e| MachineError::Lock(index, e))?;
        }
        Ok(())
    }

    /// Whatever of [`Machine::acquire`] could fail, and nothing that the guest would notice.
    pub fn take_up(&self) -> Result<(), MachineError> {
        for (index, function) in self.all().iter().enumerate() {
            function
                .take_up()
                .map_err(|e| MachineError::Lock(index, e))?;
        }
        Ok(())
    }

    /// Nobody else goes on after all. What was handed on is taken up again: the other process may have let go of locks,
    /// which are the descriptors'.
    pub fn keep_devices(&self, handed_on: bool) -> Result<(), MachineError> {
        self.all().iter().for_each(|function| function.kept());
        if handed_on { self.take_up() } else { Ok(()) }
    }

    /// Gives up the locks of all devices.
    pub fn release(&self) -> Result<(), MachineError> {
        for (index, function) in self.all().iter().enumerate() {
            function
                .release()
                .map_err(|e| MachineError::Lock(index, e))?;
        }
        Ok(())
    }

    /// A non-maskable interrupt to each vCPU, as a front panel's button gives.
    pub fn inject_nmi(&self) -> Result<(), MachineError> {
        for vcpu in &self.vcpus {
            vcpu.call(|fd| fd.nmi())?.map_err(during("KVM_NMI"))?;
        }
        Ok(())
    }

    /// Frequency of the vCPUs' TSC in kHz.
    pub fn tsc_khz(&self) -> Result<u32, MachineError> {
        let first = self.vcpus.first().ok_or(VcpuError::Gone)?;
        Ok(first
            .call(|fd| fd.get_tsc_khz())?
            .map_err(during("KVM_GET_TSC_KHZ"))?)
    }

    /// Announces the guest's addresses.
    pub fn announce(&self) -> Result<(), MachineError> {
        Ok(self.devices.announce()?)
    }

    /// Changes a device, of a guest that may be running. What the plan says of it changes too, and goes along in a move.
    pub fn change_device(
        &mut self,
        name: &DeviceName,
        change: &DeviceChange,
    ) -> Result<DeviceStatus, MachineError> {
        let function = self.device(name)?;
        function.change(change).map_err(MachineError::Change)?;
        self.plan.note_change(name, change);
        self.device_status(name)
    }

    /// What a device says of itself.
    pub fn device_status(&self, name: &DeviceName) -> Result<DeviceStatus, MachineError> {
        Ok(DeviceStatus {
            limits: self.plan.limits_of(name),
            ..self.device(name)?.device_status()
        })
    }

    fn device(&self, name: &DeviceName) -> Result<Arc<VirtioPci>, MachineError> {
        let index = self.plan.function_of(name);
        let function = index.and_then(|index| self.function(index));
        function.ok_or_else(|| MachineError::NoDevice(name.clone()))
    }

    /// The watchdog, if there is one.
    pub fn watchdog(&self) -> Option<&Watchdog> {
        self.watchdog.as_deref()
    }

    /// Asks the guest to shut itself down, as the power button of a real machine does.
    pub fn press_power_button(&self) {
        self.events.raise(Event::PowerButton);
    }

    /// Gives a plain guest another VM generation id and tells it: it is a copy of another, or went back in time, and
    /// must not use its random numbers, keys and identifiers again. For a restored machine: after the memory is there,
    /// before it runs.
    pub fn set_generation(&self, id: &[u8; 16]) -> Result<(), MachineError> {
        if self.plan.technology != Technology::None {
            return Err(MachineError::NoGeneration);
        }
        self.memory.write(GENERATION, id)?;
        self.events.raise(Event::Generation);
        Ok(())
    }

    /// The plan.
    pub fn plan(&self) -> &MachinePlan {
        &self.plan
    }

    /// The virtual machine, for its dirty log.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Exchange memory.
    pub fn exchange(&self) -> &ExchangeMemory {
        &self.exchange
    }

    /// Faults of guest memory, if others answer them.
    pub fn faults(&self) -> Option<&Faults> {
        self.faults.as_ref()
    }

    /// The confidential technology, if there is one.
    pub fn protection(&mut self) -> Option<&mut GuestProtection> {
        self.protection.as_mut()
    }

    /// LAUNCH_SECRET, to where the guest or its firmware looks for it.
    pub fn launch_secret(&mut self, header: &[u8], ciphertext: &[u8]) -> Result<(), RoleError> {
        let Some(protection) = &mut self.protection else {
            return Err(RoleError::new(
                "NOT_CONFIDENTIAL",
                "a plain guest has no secret of its launch",
            ));
        };
        let (gpa, room) = self.secret_area.ok_or_else(|| {
            RoleError::new(
                "NO_SECRET_AREA",
                "the firmware's tables name no place for a launch secret; use Debian's OVMF.amdsev.fd",
            )
        })?;
        if ciphertext.len() as u64 > room {
            let text = format!("the secret's packet is longer than its place, {room} bytes");
            return Err(RoleError::new("SECRET_TOO_LONG", text));
        }
        protection.launch_secret(header, ciphertext, gpa)
    }

    /// Whether the guest can be moved as it is now. What firmware of a confidential guest boots lies at this host alone;
    /// more has to fulfil only a guest of AMD's own processor.
    pub fn check_movable(&self) -> Result<(), RoleError> {
        if self.plan.firmware.is_some() && self.protection.is_some() {
            return Err(RoleError::new("FIRMWARE_STAYS", FIRMWARE_STAYS));
        }
        match &self.sharing {
            Some(sharing) => sharing.check_movable(),
            None => Ok(()),
        }
    }

    /// Hears when the guest stops itself.
    pub fn stop_notice(&self) -> &StopNotice {
        &self.stop
    }

    /// How often the guest broke the rules of a queue.
    pub fn device_faults(&self) -> u64 {
        let all = self.all();
        all.iter().map(|function| function.faults()).sum()
    }
}

const FIRMWARE_STAYS: &str = "a confidential guest that was launched in firmware does not move: what its firmware boots, and \
    checks, lies at this host; launch it anew at the other";

fn check_plan(plan: &MachinePlan) -> Result<(), MachineError> {
    let refuse = |text: &str| Err(MachineError::Plan(text.into()));
    if !(1..=MAX_VCPUS).contains(&plan.vcpus) {
        return refuse("vcpus must be 1 to 64");
    }
    if plan.technology != Technology::None && plan.memory_bytes > MAX_LOW_MEMORY {
        return refuse("a confidential guest has at most 3 GiB of memory");
    }
    if plan.firmware.is_some() && real_kind(plan.technology).is_some() {
        return refuse(FIRMWARE_OF_REAL);
    }
    // Slot 31 is the board's where there is firmware.
    if plan.functions() > MAX_FUNCTIONS - usize::from(plan.firmware.is_some()) {
        return refuse("at most 31 devices");
    }
    Ok(())
}

fn make_vcpus(
    vm: &Vm,
    context: &StateContext,
    plan: &MachinePlan,
) -> Result<Vec<(u8, VcpuFd)>, MachineError> {
    let encrypted = vm.encrypted().is_some();
    (0..plan.vcpus)
        .map(|id| {
            let fd = vm.create_vcpu(id)?;
            let leaves = cpuid::for_vcpu(context.supported(), &plan.cpu, id, plan.vcpus, encrypted);
            context.set_cpuid(id, &fd, &leaves)?;
            check_clock(vm, &fd, plan)?;
            power_on_msrs(&fd)?;
            Ok((id, fd))
        })
        .collect()
}

/// Has the guest's pages waited for.
fn register_faults(device: OwnedFd, memory: &GuestMemory) -> Result<Faults, MachineError> {
    let slots = memory.slots().into_iter();
    let ranges = slots.map(|(_, length, base)| FaultRange { base, length });
    Ok(Faults::register(device.as_fd(), ranges.collect())?)
}

/// A guest that ran elsewhere goes on here only if its TSC can.
fn check_clock(vm: &Vm, vcpu: &VcpuFd, plan: &MachinePlan) -> Result<(), MachineError> {
    let wanted = plan.cpu.baseline.as_ref().map_or(0, |b| b.tsc_khz);
    let here = vcpu.get_tsc_khz().map_err(during("KVM_GET_TSC_KHZ"))?;
    Ok(model::check_tsc(wanted, here, vm.scales_tsc())?)
}
