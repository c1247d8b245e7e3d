//! The state of a whole machine as it travels: tagged, versioned, bounded.
//!
//! It arrives authenticated, but from another host: it is parsed once, and each part checks its own.

use serde::{Deserialize, Serialize};

use super::chipset::ChipsetStateV1;
use super::kvm::VmStateV1;
use super::protocol::MAX_STATE;
use super::vcpu::state::VcpuStateV1;
use crate::devices::serial::SerialStateV1;
use crate::devices::virtio::transport::VirtioStateV1;
use crate::devices::watchdog::WatchdogStateV1;

/// Everything of a machine but its memory, version 1.
#[derive(Serialize, Deserialize)]
pub struct MachineStateV1 {
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

impl MachineStateV1 {
    /// Tag, version, body.
    pub fn encode(&self) -> Result<Vec<u8>, StateFormatError> {
        let mut bytes = TAG.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        let bytes = postcard::to_extend(self, bytes).map_err(StateFormatError::Body)?;
        if bytes.len() > MAX_STATE {
            return Err(StateFormatError::Size(bytes.len()));
        }
        Ok(bytes)
    }

    /// Reads what [`MachineStateV1::encode`] wrote; nothing may follow.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateFormatError> {
        if bytes.len() > MAX_STATE {
            return Err(StateFormatError::Size(bytes.len()));
        }
        let rest = bytes
            .strip_prefix(TAG.as_slice())
            .ok_or(StateFormatError::Tag)?;
        let (version, body) = rest.split_first_chunk::<2>().ok_or(StateFormatError::Tag)?;
        let version = u16::from_le_bytes(*version);
        if version != VERSION {
            return Err(StateFormatError::Version(version));
        }
        let (state, rest) = postcard::take_from_bytes(body).map_err(StateFormatError::Body)?;
        if !rest.is_empty() {
            return Err(StateFormatError::Trailing(rest.len()));
        }
        Ok(state)
    }
}

/// Bytes that are no machine state of this version.
#[derive(Debug, thiserror::Error)]
pub enum StateFormatError {
    /// No tag.
    #[error("not a machine state")]
    Tag,
    /// Another version.
    #[error("machine state of version {0}; this host reads version 1, update it")]
    Version(u16),
    /// Too long.
    #[error("machine state of {0} bytes is larger than 4 MiB")]
    Size(usize),
    /// The body does not parse.
    #[error("machine state cannot be read")]
    Body(#[source] postcard::Error),
    /// Something follows the body.
    #[error("{0} bytes behind the machine state")]
    Trailing(usize),
}

const TAG: &[u8; 8] = b"CSMT-MST";
const VERSION: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_state_is_refused() {
        let refuse = |bytes: &[u8]| {
            MachineStateV1::decode(bytes)
                .err()
                .map(|e| e.to_string())
                .unwrap()
        };
        assert_eq!(refuse(b""), "not a machine state");
        assert_eq!(refuse(b"CSMT-MST\x01"), "not a machine state");
        assert!(refuse(b"CSMT-MST\x02\x00").contains("version 2"));
        assert!(refuse(b"CSMT-MST\x01\x00\xff\xff\xff\xff\x0f").contains("cannot be read"));
        assert!(refuse(&vec![0; MAX_STATE + 1]).contains("larger"));
    }
}
