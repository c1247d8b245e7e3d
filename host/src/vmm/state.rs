//! The state of a whole machine as it travels: tagged, versioned, bounded.
//!
//! It arrives authenticated, but from another host: it is parsed once, and each part checks its own.

use serde::{Deserialize, Serialize};

use super::chipset::ChipsetStateV1;
use super::kvm::VmStateV1;
use super::vcpu::state::VcpuStateV1;
use crate::devices::serial::SerialStateV1;
use crate::devices::virtio::transport::VirtioStateV1;
use crate::devices::watchdog::WatchdogStateV1;
use crate::machine::saved::{FormatError, MACHINE_STATE};

/// Everything of a machine but its memory, version 3.
#[derive(Serialize, Deserialize)]
pub struct MachineStateV4 {
    /// vCPUs in order.
    pub vcpus: Vec<VcpuStateV1>,
    /// Interrupt controllers, timer, clock.
    pub vm: VmStateV1,
    /// COM1.
    pub serial: SerialStateV1,
    /// PCI configuration address register.
    pub pci_address: u32,
    /// Virtio functions in slot order.
    pub functions: Vec<VirtioStateV1>,
    /// Watchdog, if the machine has one.
    pub watchdog: Option<WatchdogStateV1>,
    /// The board, if the machine starts in firmware.
    pub chipset: Option<ChipsetStateV1>,
}

impl MachineStateV4 {
    /// As [`MACHINE_STATE`] says.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        MACHINE_STATE.encode(self)
    }

    /// Reads what [`MachineStateV4::encode`] wrote; nothing may follow.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        MACHINE_STATE.decode(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_golden_file_is_read_and_written_again_as_it_is() {
        let golden = golden();
        let state = MachineStateV4::decode(&golden).unwrap();
        assert!(
            state.vcpus.len() == 2
                && state.functions.len() == 6
                && state.watchdog.is_some()
                && state.chipset.is_some(),
            "a file that says nothing of some part would not tell of its change"
        );
        assert!(state.encode().unwrap() == golden);
    }

    #[test]
    fn states_of_other_versions_are_refused_with_what_to_do() {
        let golden = golden();
        for (version, remedy) in [(1, "the casemate that wrote it"), (5, "update")] {
            let mut other = golden.clone();
            other[8] = version;
            let error = MachineStateV4::decode(&other).err().unwrap();
            assert!(
                error.is_version() && error.to_string().contains(remedy),
                "{error}"
            );
        }
        assert!(MachineStateV4::decode(&golden[..golden.len() - 1]).is_err());
    }

    /// Of a machine that has every device; `host/tests/vmm_state.rs` writes it.
    fn golden() -> Vec<u8> {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/machine-state-4.bin"
        );
        std::fs::read(path).unwrap()
    }
}
