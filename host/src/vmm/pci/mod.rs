//! PCI: one root bus behind configuration mechanism 1 and ECAM, type-0 functions only, MSI-X only.

pub mod config;
pub mod msix;

use std::sync::{Arc, Mutex, PoisonError};

use config::{ConfigSpace, Identity};

use super::hotplug::HotPlug;

/// A function on the bus, as its configuration space shows it. Offsets and lengths come from the guest.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space.
    fn config_read(&self, offset: usize, data: &mut [u8]);
    /// Writes configuration space.
    fn config_write(&self, offset: usize, data: &[u8]);
}

/// Bus 0: the host bridge in slot 0, functions from slot 1.
pub struct PciBus {
    address: Mutex<u32>,
    functions: Vec<Arc<dyn PciFunction>>,
    /// Of a board that firmware knows: its own functions, in their slots, its host bridge in place of ours.
    board: Vec<(usize, Arc<dyn PciFunction>)>,
    /// Behind all functions: what comes and goes.
    slots: Option<Arc<HotPlug>>,
}

impl PciBus {
    /// A bus with these functions in slots 1, 2, ….
    pub fn new(functions: impl IntoIterator<Item = Arc<dyn PciFunction>>) -> Self {
        let bridge: Arc<dyn PciFunction> =
            Arc::new(HostBridge(Mutex::new(ConfigSpace::new(HOST_BRIDGE))));
        Self {
            address: Mutex::new(0),
            functions: std::iter::once(bridge).chain(functions).collect(),
            board: Vec::new(),
            slots: None,
        }
    }

    /// The same with slots behind these functions.
    pub fn with_slots(self, slots: Option<Arc<HotPlug>>) -> Self {
        Self { slots, ..self }
    }

    /// The same on a board that has functions of its own.
    pub fn on_board(self, board: impl IntoIterator<Item = (usize, Arc<dyn PciFunction>)>) -> Self {
        Self {
            board: board.into_iter().collect(),
            ..self
        }
    }

    /// The address register.
    pub fn address(&self) -> u32 {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the address register (restore).
    pub fn set_address(&self, address: u32) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    /// Reads the address register; `offset` is within it.
    pub fn read_address(&self, offset: u16, data: &mut [u8]) {
        let bytes = self.address().to_le_bytes();
        for (to, from) in data.iter_mut().zip(bytes.iter().skip(usize::from(offset))) {
            *to = *from;
        }
    }

    /// Writes the address register.
    pub fn write_address(&self, offset: u16, data: &[u8]) {
        let mut address = self.address.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = address.to_le_bytes();
        for (to, from) in bytes.iter_mut().skip(usize::from(offset)).zip(data) {
            *to = *from;
        }
        *address = u32::from_le_bytes(bytes);
    }

    /// Reads through the data register.
    pub fn read_data(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((function, register)) = self.selected(offset) {
            function.config_read(register, data);
        }
    }

    /// Writes through the data register.
    pub fn write_data(&self, offset: u16, data: &[u8]) {
        if let Some((function, register)) = self.selected(offset) {
            function.config_write(register, data);
        }
    }

    /// Reads by memory access; `offset` is from the start of the bus's range.
    pub fn read_ecam(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((function, register)) = self.at_ecam(offset) {
            function.config_read(register, data);
        }
    }

    /// Writes by memory access.
    pub fn write_ecam(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.at_ecam(offset) {
            function.config_write(register, data);
        }
    }

    fn at_ecam(&self, offset: u64) -> Option<(Arc<dyn PciFunction>, usize)> {
        let (function, register) = (offset >> 12, (offset & 0xfff) as usize);
        if function & 7 != 0 {
            return None;
        }
        let slot = usize::try_from(function >> 3).ok()?;
        Some((self.function(slot)?, register))
    }

    fn function(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        let board = self.board.iter().find(|(at, _)| *at == slot);
        let fixed = board
            .map(|(_, function)| function)
            .or_else(|| self.functions.get(slot));
        match fixed {
            Some(function) => Some(Arc::clone(function)),
            None => {
                let behind = slot.checked_sub(self.functions.len())?;
                self.slots.as_ref()?.pci_function(behind)
            }
        }
    }

    fn selected(&self, offset: u16) -> Option<(Arc<dyn PciFunction>, usize)> {
        let address = self.address();
        let (bus, slot, function) = (
            (address >> 16) & 0xff,
            (address >> 11) & 0x1f,
            (address >> 8) & 7,
        );
        if address & ENABLE == 0 || bus != 0 || function != 0 {
            return None;
        }
        let register = (address & 0xfc) as usize + usize::from(offset);
        Some((self.function(slot as usize)?, register))
    }
}

struct HostBridge(Mutex<ConfigSpace>);

impl PciFunction for HostBridge {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
    }
}

const ENABLE: u32 = 1 << 31;
// The ids Red Hat gave to the generic host bridge; no driver binds to it.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem: (0x1af4, 0x1100),
};

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bus: &PciBus, slot: u32, register: u32) -> u32 {
        bus.write_address(0, &(ENABLE | (slot << 11) | register).to_le_bytes());
        let mut data = [0; 4];
        bus.read_data(0, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_bridge_is_in_slot_0_and_empty_slots_are_ones() {
        let bus = PciBus::new([]);
        assert_eq!(read(&bus, 0, 0), 0x0008_1b36);
        assert_eq!(read(&bus, 0, 8) >> 8, 0x06_0000);
        assert_eq!(read(&bus, 1, 0), u32::MAX);
    }

    #[test]
    fn nothing_answers_without_the_enable_bit_or_on_other_buses_and_functions() {
        let bus = PciBus::new([]);
        for address in [0u32, ENABLE | (1 << 16), ENABLE | (1 << 8)] {
            bus.write_address(0, &address.to_le_bytes());
            let mut data = [0; 4];
            bus.read_data(0, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
        }
    }

    #[test]
    fn ecam_shows_the_same_functions_and_nothing_behind_them() {
        let bus = PciBus::new([]);
        let read = |offset| {
            let mut data = [0; 4];
            bus.read_ecam(offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(0), 0x0008_1b36);
        assert_eq!(read(8) >> 8, 0x06_0000);
        for nothing in [0x100, 0xffe, 1 << 12, 1 << 15, 0xf_ffff, u64::MAX] {
            assert_eq!(read(nothing), u32::MAX, "{nothing:#x}");
            bus.write_ecam(nothing, &[0; 4]);
        }
        bus.write_ecam(0x3c, &[7]);
        assert_eq!(read(0x3c) & 0xff, 7);
    }

    #[test]
    fn the_address_register_reads_back() {
        let bus = PciBus::new([]);
        bus.write_address(0, &0x8000_1234u32.to_le_bytes());
        let mut data = [0; 4];
        bus.read_address(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_1234);
        bus.write_address(3, &[0x7f]);
        assert_eq!(bus.address(), 0x7f00_1234);
    }
}
