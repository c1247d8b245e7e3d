//! What firmware expects of the board it runs on: Intel's Q35 as QEMU has it, by the identities of host bridge and LPC
//! bridge, with their registers as far as OVMF uses them, a clock, a power management timer, and `fw_cfg`.
//!
//! Only machines that start in firmware have it. Every register value comes from the guest.

pub mod cmos;
pub mod fw_cfg;
pub mod power;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use self::cmos::{Cmos, CmosStateV1};
use self::fw_cfg::{FwCfg, FwCfgStateV1};
use self::power::{BLOCK, PowerManagement, PowerStateV1};
use super::boot::firmware::TABLES;
use super::layout::{CMOS, ECAM, FW_CFG, I8042_COMMAND, POWER_MANAGEMENT};
use super::pci::PciFunction;
use super::pci::config::{ConfigSpace, Identity};

/// The board of one machine.
pub struct Chipset {
    bridge: Arc<Bridge>,
    lpc: Arc<Bridge>,
    cmos: Cmos,
    power: PowerManagement,
    fw_cfg: FwCfg,
    tables: Box<dyn Fn(u64) -> Vec<u8> + Send + Sync>,
    /// The address for which the tables in `fw_cfg` were made.
    placed: Mutex<Option<u64>>,
}

/// What a write has done to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The port is not the board's.
    Elsewhere,
    /// The board took it.
    Taken,
    /// The machine is to be switched off.
    Off,
}

impl Chipset {
    /// A board of these parts. `tables` makes the file [`TABLES`] for an address of the ECAM range: firmware chooses
    /// that, and reads the tables afterwards.
    pub fn new(
        cmos: Cmos,
        fw_cfg: FwCfg,
        tables: impl Fn(u64) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let mut bridge = ConfigSpace::new(HOST_BRIDGE);
        bridge.allow(EXPRESS_BAR, &EXPRESS_BAR_BITS.to_le_bytes());
        bridge.allow(MEMORY_ATTRIBUTES, &[0xff; 7]);
        let mut lpc = ConfigSpace::new(LPC_BRIDGE);
        lpc.set(POWER_BASE, &[1]);
        lpc.allow(POWER_BASE, &[0x80, 0xff]);
        lpc.allow(POWER_CONTROL, &[0x87]);
        lpc.allow(PIRQ_A, &[0x8f; 4]);
        lpc.allow(PIRQ_E, &[0x8f; 4]);
        lpc.allow(ROOT_COMPLEX_BASE, &[0x01, 0xc0, 0xff, 0xff]);
        Self {
            bridge: Arc::new(Bridge(Mutex::new(bridge))),
            lpc: Arc::new(Bridge(Mutex::new(lpc))),
            cmos,
            power: PowerManagement::default(),
            fw_cfg,
            tables: Box::new(tables),
            placed: Mutex::new(None),
        }
    }

    /// Its functions on bus 0, with their slots.
    pub fn functions(&self) -> [(usize, Arc<dyn PciFunction>); 2] {
        [
            (0, Arc::clone(&self.bridge) as Arc<dyn PciFunction>),
            (LPC_SLOT, Arc::clone(&self.lpc) as Arc<dyn PciFunction>),
        ]
    }

    /// Where PCI configuration is reached by memory access, while the bridge decodes it.
    pub fn ecam(&self) -> Option<u64> {
        let mut register = [0; 8];
        self.bridge.space().read(EXPRESS_BAR, &mut register);
        let register = u64::from_le_bytes(register);
        (register & EXPRESS_BAR_ENABLE != 0).then_some(register & EXPRESS_BAR_BASE)
    }

    /// `in`; false if the port is not the board's.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        match Port::of(port) {
            Some(Port::Power(offset)) => self.power.read(offset, data),
            Some(Port::Cmos(offset)) => self.cmos.port_read(offset, data),
            Some(Port::FwCfg(offset)) => return self.fw_cfg.port_read(offset, data),
            // Both error bits: there is no keyboard controller to wait for. Nothing is to be read, a command is taken.
            Some(Port::Keyboard) => data.fill(NO_KEYBOARD),
            None => return false,
        }
        true
    }

    /// `out`.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Written {
        match Port::of(port) {
            Some(Port::Power(offset)) if self.power.write(offset, data) => return Written::Off,
            Some(Port::Power(_)) => {}
            Some(Port::Cmos(offset)) => self.cmos.port_write(offset, data),
            Some(Port::FwCfg(offset)) => {
                self.place_tables();
                if !self.fw_cfg.port_write(offset, data) {
                    return Written::Elsewhere;
                }
            }
            Some(Port::Keyboard) | None => return Written::Elsewhere,
        }
        Written::Taken
    }

    /// Offers what firmware boots in place of a disk's boot loader.
    pub fn offer(&self, kernel: Vec<u8>, initrd: Vec<u8>, cmdline: &str) {
        self.fw_cfg
            .update(|items| items.set_kernel(kernel, initrd, cmdline));
    }

    /// Registers and places, to be saved.
    pub fn save(&self) -> ChipsetStateV1 {
        ChipsetStateV1 {
            bridge: self.bridge.space().save(),
            lpc: self.lpc.space().save(),
            cmos: self.cmos.save(),
            power: self.power.save(),
            fw_cfg: self.fw_cfg.save(),
        }
    }

    /// Puts them back; nothing if no board was ever in that state.
    pub fn restore(&self, saved: ChipsetStateV1) -> Option<()> {
        self.cmos.restore(saved.cmos)?;
        self.bridge.space().restore(&saved.bridge);
        self.lpc.space().restore(&saved.lpc);
        self.power.restore(saved.power);
        self.fw_cfg.restore(saved.fw_cfg);
        self.place_tables();
        Some(())
    }

    /// The tables say where the ECAM range is now.
    fn place_tables(&self) {
        let now = self.ecam().unwrap_or(ECAM);
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        if *placed != Some(now) {
            *placed = Some(now);
            let tables = (self.tables)(now);
            self.fw_cfg.update(|items| items.set_file(TABLES, tables));
        }
    }
}

/// State of the board, version 1.
#[derive(Debug, Serialize, Deserialize)]
pub struct ChipsetStateV1 {
    bridge: Vec<u8>,
    lpc: Vec<u8>,
    cmos: CmosStateV1,
    power: PowerStateV1,
    fw_cfg: FwCfgStateV1,
}

/// A function that is nothing but its configuration space.
struct Bridge(Mutex<ConfigSpace>);

impl Bridge {
    fn space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for Bridge {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.space().read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        self.space().write(offset, data);
    }
}

/// Whose port it is, and how far it is from the first of its own.
#[derive(Clone, Copy)]
enum Port {
    Power(u16),
    Cmos(u16),
    FwCfg(u16),
    Keyboard,
}

impl Port {
    fn of(port: u16) -> Option<Self> {
        let from = |first: u16, count: u16| port.checked_sub(first).filter(|at| *at < count);
        let power = || from(POWER_MANAGEMENT, BLOCK as u16).map(Self::Power);
        let cmos = || from(CMOS, 2).map(Self::Cmos);
        let fw_cfg = || from(FW_CFG, FW_CFG_PORTS).map(Self::FwCfg);
        let keyboard = || (port == I8042_COMMAND).then_some(Self::Keyboard);
        power().or_else(cmos).or_else(fw_cfg).or_else(keyboard)
    }
}

const HOST_BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x29c0,
    class: 0x06_0000,
    revision: 0,
    subsystem: (0x1af4, 0x1100),
};
const LPC_BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x2918,
    class: 0x06_0100,
    revision: 2,
    subsystem: (0x1af4, 0x1100),
};
const LPC_SLOT: usize = 31;
const FW_CFG_PORTS: u16 = 12;
/// Parity and time-out.
const NO_KEYBOARD: u8 = 0xc0;
// the host bridge's registers: PCIEXBAR, of 256 MiB and so for all buses, and PAM
const EXPRESS_BAR: usize = 0x60;
const EXPRESS_BAR_ENABLE: u64 = 1;
const EXPRESS_BAR_BASE: u64 = 0xf_f000_0000;
const EXPRESS_BAR_BITS: u64 = EXPRESS_BAR_BASE | EXPRESS_BAR_ENABLE;
const MEMORY_ATTRIBUTES: usize = 0x90;
// the LPC bridge's: PMBASE, ACPI_CNTL, PIRQ routes, RCBA. They are kept and read back; what they would move stays.
const POWER_BASE: usize = 0x40;
const POWER_CONTROL: usize = 0x44;
const PIRQ_A: usize = 0x60;
const PIRQ_E: usize = 0x68;
const ROOT_COMPLEX_BASE: usize = 0xf0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::GuestRam;
    use crate::vmm::chipset::fw_cfg::{FIRST_FILE, FwCfgItems};
    use vm_memory::GuestAddress;

    fn chipset() -> Chipset {
        let mut items = FwCfgItems::new(1);
        items.set_file(TABLES, vec![0; 8]);
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let fw_cfg = FwCfg::new(items, ram);
        Chipset::new(Cmos::new(64 << 20, 0), fw_cfg, |ecam| {
            ecam.to_le_bytes().to_vec()
        })
    }

    fn read<const N: usize>(chipset: &Chipset, port: u16) -> Option<[u8; N]> {
        let mut data = [0xee; N];
        chipset.port_read(port, &mut data).then_some(data)
    }

    fn word(chipset: &Chipset, slot: usize, register: usize) -> u32 {
        let functions = chipset.functions();
        let (_, function) = functions.iter().find(|(at, _)| *at == slot).unwrap();
        let mut data = [0; 4];
        function.config_read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(chipset: &Chipset, slot: usize, register: usize, value: u32) {
        let functions = chipset.functions();
        let (_, function) = functions.iter().find(|(at, _)| *at == slot).unwrap();
        function.config_write(register, &value.to_le_bytes());
    }

    #[test]
    fn the_bridges_are_those_that_firmware_knows() {
        let chipset = chipset();
        assert_eq!(word(&chipset, 0, 0), 0x29c0_8086);
        assert_eq!(word(&chipset, 31, 0), 0x2918_8086);
        assert_eq!(word(&chipset, 31, 8) >> 8, 0x06_0100);
        set(&chipset, 31, POWER_BASE, 0xffff_ffff);
        assert_eq!(word(&chipset, 31, POWER_BASE), 0xff81);
        set(&chipset, 31, POWER_BASE, 0x0600);
        assert_eq!(word(&chipset, 31, POWER_BASE), 0x0601);
        set(&chipset, 31, 0x80, 0xffff_ffff);
        assert_eq!(word(&chipset, 31, 0x80), 0);
    }

    #[test]
    fn the_tables_follow_the_ecam_range_that_firmware_chooses() {
        let chipset = chipset();
        let told = || {
            assert_eq!(
                chipset.port_write(FW_CFG, &FIRST_FILE.to_le_bytes()),
                Written::Taken
            );
            u64::from_le_bytes(read(&chipset, FW_CFG + 1).unwrap())
        };
        assert_eq!((chipset.ecam(), told()), (None, ECAM));
        set(&chipset, 0, EXPRESS_BAR, 0xb000_0001);
        assert_eq!((chipset.ecam(), told()), (Some(0xb000_0000), 0xb000_0000));
        set(&chipset, 0, EXPRESS_BAR, u32::MAX);
        set(&chipset, 0, EXPRESS_BAR + 4, u32::MAX);
        assert_eq!(chipset.ecam(), Some(EXPRESS_BAR_BASE));
    }

    #[test]
    fn only_the_boards_ports_are_taken() {
        let chipset = chipset();
        let taken = [0x64, 0x70, 0x71, 0x510, 0x511, 0x514, 0x600, 0x604, 0x60b];
        for port in taken {
            assert!(read::<1>(&chipset, port).is_some(), "{port:#x}");
        }
        for port in [0x60, 0x6f, 0x72, 0x50f, 0x512, 0x51c, 0x5ff, 0x60c, 0x3f8] {
            assert!(read::<1>(&chipset, port).is_none(), "{port:#x}");
            assert_eq!(chipset.port_write(port, &[0]), Written::Elsewhere);
        }
        assert_eq!(
            chipset.port_write(I8042_COMMAND, &[0xfe]),
            Written::Elsewhere
        );
        assert_eq!(read(&chipset, I8042_COMMAND), Some([NO_KEYBOARD]));
        assert_eq!(chipset.port_write(0x604, &[1, 0x20]), Written::Off);
        assert_eq!(chipset.port_write(0x604, &[1, 0]), Written::Taken);
    }

    #[test]
    fn the_boards_state_travels() {
        let (from, to) = (chipset(), chipset());
        set(&from, 0, EXPRESS_BAR, 0xb000_0001);
        set(&from, 31, PIRQ_A, 0x0a0b_0a0b);
        from.port_write(CMOS, &[0x20]);
        from.port_write(FW_CFG, &FIRST_FILE.to_le_bytes());
        to.restore(from.save()).unwrap();
        assert_eq!(to.ecam(), Some(0xb000_0000));
        assert_eq!(word(&to, 31, PIRQ_A), 0x0a0b_0a0b);
        assert_eq!(read(&to, CMOS), Some([0x20]));
        assert_eq!(read(&to, FW_CFG + 1), Some([0, 0, 0, 0xb0]));
    }
}
