//! Structures as bytes: offsets are written down here once more, apart from the code under test.

use nix::errno::Errno;

use crate::memory::Caller;

/// A structure in the caller's memory.
pub(super) struct Fields {
    caller: Caller,
    address: u64,
    bytes: Vec<u8>,
}

impl Fields {
    pub(super) fn read(caller: Caller, address: u64, size: usize) -> Result<Self, Errno> {
        let bytes = caller.read(address, size)?;
        Ok(Self {
            caller,
            address,
            bytes,
        })
    }

    pub(super) fn u8(&self, at: usize) -> u8 {
        self.array::<1>(at)[0]
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    pub(super) fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    pub(super) fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.array(at)
    }

    pub(super) fn is_zero(&self, at: usize, length: usize) -> bool {
        let part = self.bytes.get(at..at + length);
        part.is_some_and(|part| part.iter().all(|byte| *byte == 0))
    }

    pub(super) fn set(&mut self, at: usize, value: &[u8]) {
        if let Some(part) = self.bytes.get_mut(at..at + value.len()) {
            part.copy_from_slice(value);
        }
    }

    pub(super) fn write_back(&self) -> Result<(), Errno> {
        self.caller.write(self.address, &self.bytes)
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut value = [0; N];
        if let Some(part) = self.bytes.get(at..at + N) {
            value.copy_from_slice(part);
        }
        value
    }
}
