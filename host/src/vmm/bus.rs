//! Where a vCPU's port and memory accesses go.
//!
//! Every address, length and value comes from the guest; what nothing answers reads as ones.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::chipset::{Chipset, Written};
use super::hotplug::HotPlug;
use super::layout::{
    BEHIND_FIRMWARE, COM1, ECAM, ECAM_SIZE, EVENTS, HOTPLUG, HOTPLUG_SIZE, I8042_COMMAND,
    PCI_CONFIG_ADDRESS, PCI_CONFIG_DATA, PVPANIC, RESET_VALUE, S5_SLEEP_TYPE, SLEEP_CONTROL,
    SLEEP_STATUS, VIRTIO_BAR_SIZE, VIRTIO_BARS,
};
use super::page_sharing::PageSharing;
use super::pci::PciBus;
use crate::devices::events::Events;
use crate::devices::serial::Console;
use crate::devices::virtio::transport::VirtioPci;
use crate::devices::watchdog::Watchdog;

/// Accesses of a vCPU that KVM does not answer itself.
pub trait GuestBus: Send + Sync {
    /// `in`.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// `out`.
    fn port_write(&self, port: u16, data: &[u8]);
    /// A load from no memory.
    fn memory_read(&self, address: u64, data: &mut [u8]);
    /// A store to no memory.
    fn memory_write(&self, address: u64, data: &[u8]);
    /// A hypercall that KVM does not answer; the result for the guest.
    fn hypercall(&self, number: u64, arguments: &[u64; 6]) -> u64;
    /// `rdmsr` of one that KVM leaves to the VMM; `None` is a fault in the guest.
    fn read_msr(&self, index: u32) -> Option<u64>;
    /// `wrmsr` of such a one; false is a fault in the guest.
    fn write_msr(&self, index: u32, value: u64) -> bool;
}

/// The machine's own bus: COM1, PCI configuration, virtio BARs, ACPI events, power and reset.
pub struct MachineBus {
    console: Arc<Console>,
    events: Arc<Events>,
    pci: Arc<PciBus>,
    functions: Vec<Arc<VirtioPci>>,
    watchdog: Option<Arc<Watchdog>>,
    stop: Arc<StopNotice>,
    sharing: Option<Arc<PageSharing>>,
    chipset: Option<Arc<Chipset>>,
    slots: Option<Arc<HotPlug>>,
}

impl MachineBus {
    /// Connects the parts.
    pub fn new(
        console: Arc<Console>,
        events: Arc<Events>,
        pci: Arc<PciBus>,
        functions: Vec<Arc<VirtioPci>>,
        watchdog: Option<Arc<Watchdog>>,
        stop: Arc<StopNotice>,
        sharing: Option<Arc<PageSharing>>,
    ) -> Self {
        Self {
            console,
            events,
            pci,
            functions,
            watchdog,
            stop,
            sharing,
            chipset: None,
            slots: None,
        }
    }

    /// The same with slots, whose functions' BARs the guest places.
    pub fn with_slots(self, slots: Option<Arc<HotPlug>>) -> Self {
        Self { slots, ..self }
    }

    /// The same on a board that firmware knows, where it places BARs and the ECAM range.
    pub fn on_board(self, chipset: Option<Arc<Chipset>>) -> Self {
        Self { chipset, ..self }
    }

    /// Whose BAR an address is in, and where.
    fn device_at(&self, address: u64) -> Option<(Registers<'_>, u64)> {
        let fixed = if self.chipset.is_some() {
            self.placed_at(address)
        } else {
            self.fixed_at(address)
        };
        fixed.or_else(|| {
            let (function, offset) = self.slots.as_ref()?.placed_at(address)?;
            Some((Registers::Slot(function), offset))
        })
    }

    /// The same where the machine has placed them.
    fn fixed_at(&self, address: u64) -> Option<(Registers<'_>, u64)> {
        let offset = address.checked_sub(VIRTIO_BARS)?;
        let index = usize::try_from(offset / VIRTIO_BAR_SIZE).ok()?;
        let registers = match self.functions.get(index) {
            Some(function) => Registers::Virtio(function),
            // The watchdog's slot is the one behind theirs.
            None if index == self.functions.len() => Registers::Watchdog(self.watchdog.as_ref()?),
            None => return None,
        };
        Some((registers, offset % VIRTIO_BAR_SIZE))
    }
}

impl MachineBus {
    /// The same where the guest has placed them.
    fn placed_at(&self, address: u64) -> Option<(Registers<'_>, u64)> {
        let found = self.functions.iter().find_map(|function| {
            let offset = function.in_placed_bar(address)?;
            Some((Registers::Virtio(function.as_ref()), offset))
        });
        found.or_else(|| {
            let watchdog = self.watchdog.as_ref()?;
            let offset = watchdog.in_placed_bar(address)?;
            Some((Registers::Watchdog(watchdog), offset))
        })
    }

    /// How far into the ECAM range an address is.
    fn ecam_offset(&self, address: u64) -> Option<u64> {
        let base = match &self.chipset {
            Some(chipset) => chipset.ecam()?,
            None => ECAM,
        };
        address
            .checked_sub(base)
            .filter(|offset| *offset < ECAM_SIZE)
    }
}

/// A device with registers in memory.
enum Registers<'a> {
    Virtio(&'a VirtioPci),
    Slot(Arc<VirtioPci>),
    Watchdog(&'a Watchdog),
}

impl GuestBus for MachineBus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        let port = match &self.chipset {
            Some(chipset) if chipset.port_read(port, data) => return,
            Some(_) => behind_board(port),
            None => port,
        };
        data.fill(0xff);
        match port {
            COM1..=COM1_LAST => self.console.read((port - COM1) as u8, data),
            PCI_CONFIG_ADDRESS..PCI_CONFIG_DATA => {
                self.pci.read_address(port - PCI_CONFIG_ADDRESS, data)
            }
            PCI_CONFIG_DATA..=PCI_CONFIG_LAST => self.pci.read_data(port - PCI_CONFIG_DATA, data),
            HOTPLUG..=HOTPLUG_LAST => {
                if let Some(slots) = &self.slots {
                    slots.read(port - HOTPLUG, data);
                }
            }
            EVENTS => data
                .iter_mut()
                .take(1)
                .for_each(|byte| *byte = self.events.take()),
            // No command pending, nothing to read; ready for the reset command.
            I8042_COMMAND | SLEEP_CONTROL | SLEEP_STATUS => data.fill(0),
            PVPANIC => data.fill(PANICKED | CRASH_LOADED),
            _ => {}
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        let port = match self.chipset.as_ref().map(|c| c.port_write(port, data)) {
            Some(Written::Taken) => return,
            Some(Written::Off) => return self.stop.stop("shutdown"),
            Some(Written::Elsewhere) => behind_board(port),
            None => port,
        };
        match (port, data) {
            (COM1..=COM1_LAST, _) => self.console.write((port - COM1) as u8, data),
            (PCI_CONFIG_ADDRESS..PCI_CONFIG_DATA, _) => {
                self.pci.write_address(port - PCI_CONFIG_ADDRESS, data)
            }
            (PCI_CONFIG_DATA..=PCI_CONFIG_LAST, _) => {
                self.pci.write_data(port - PCI_CONFIG_DATA, data)
            }
            (I8042_COMMAND, [RESET_VALUE, ..]) => self.stop.stop("reset"),
            (HOTPLUG..=HOTPLUG_LAST, _) => {
                if let Some(slots) = &self.slots {
                    slots.write(port - HOTPLUG, data);
                }
            }
            (SLEEP_CONTROL, [SLEEP_NOW, ..]) => self.stop.stop("shutdown"),
            // A guest with a crash kernel goes on into that, and says only CRASH_LOADED.
            (PVPANIC, [events, ..]) if events & PANICKED != 0 => self.stop.stop("panic"),
            _ => {}
        }
    }

    fn memory_read(&self, address: u64, data: &mut [u8]) {
        match (self.device_at(address), self.ecam_offset(address)) {
            (Some((Registers::Virtio(function), offset)), _) => function.bar_read(offset, data),
            (Some((Registers::Slot(function), offset)), _) => function.bar_read(offset, data),
            (Some((Registers::Watchdog(watchdog), offset)), _) => watchdog.bar_read(offset, data),
            (None, Some(offset)) => self.pci.read_ecam(offset, data),
            (None, None) => data.fill(0xff),
        }
    }

    fn memory_write(&self, address: u64, data: &[u8]) {
        match (self.device_at(address), self.ecam_offset(address)) {
            (Some((Registers::Virtio(function), offset)), _) => function.bar_write(offset, data),
            (Some((Registers::Slot(function), offset)), _) => function.bar_write(offset, data),
            (Some((Registers::Watchdog(watchdog), offset)), _) => watchdog.bar_write(offset, data),
            (None, Some(offset)) => self.pci.write_ecam(offset, data),
            (None, None) => {}
        }
    }

    fn hypercall(&self, number: u64, arguments: &[u64; 6]) -> u64 {
        match &self.sharing {
            Some(sharing) => sharing.hypercall(number, arguments),
            None => UNKNOWN_HYPERCALL,
        }
    }

    fn read_msr(&self, index: u32) -> Option<u64> {
        self.sharing.as_ref()?.read_msr(index)
    }

    fn write_msr(&self, index: u32, value: u64) -> bool {
        let sharing = self.sharing.as_ref();
        sharing.is_some_and(|sharing| sharing.write_msr(index, value))
    }
}

/// The board has registers of its own at the places of our ACPI ports, which therefore lie behind them.
fn behind_board(port: u16) -> u16 {
    let place = port.wrapping_sub(BEHIND_FIRMWARE);
    if [SLEEP_CONTROL, SLEEP_STATUS, EVENTS].contains(&place) {
        place
    } else {
        port
    }
}

/// Says once, to everyone, that the guest has stopped itself.
pub struct StopNotice {
    reason: Mutex<Option<String>>,
    event: EventFd,
}

impl StopNotice {
    /// Nothing has stopped.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            reason: Mutex::default(),
            event: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// The guest has stopped; the first reason counts.
    pub fn stop(&self, reason: &str) {
        let mut slot = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(reason.chars().take(MAX_REASON).collect());
            // The counter cannot overflow by one write.
            let _ = self.event.write(1);
        }
    }

    /// Why, if it has.
    pub fn reason(&self) -> Option<String> {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Becomes readable when the guest stops.
    #[expect(unsafe_code, reason = "EventFd lends its descriptor as a number only")]
    pub fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the event's own and open as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}

const HOTPLUG_LAST: u16 = HOTPLUG + HOTPLUG_SIZE - 1;
const COM1_LAST: u16 = COM1 + 7;
const PCI_CONFIG_LAST: u16 = PCI_CONFIG_DATA + 3;
/// Events of the panic device (QEMU's `docs/specs/pvpanic.rst`).
const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 1 << 1;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_NOW: u8 = (S5_SLEEP_TYPE << 2) | SLEEP_ENABLE;
/// `-KVM_ENOSYS`.
const UNKNOWN_HYPERCALL: u64 = (-1000i64).cast_unsigned();
const MAX_REASON: usize = 200;
