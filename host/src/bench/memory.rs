//! Guest-sized memory without a guest.

use std::fs::File;
use std::os::fd::AsFd;

use casemate_crypto_migrate::guest::{Gpn, PAGE_SIZE, PageRange};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::BenchError;
use crate::confidential::shared::{Access, GuestMemory, MemoryLayout};

/// Bytes that are copied at once.
pub const CHUNK: usize = 256 * 1024;

/// Memory of `size` bytes in a sealed memfd, mapped as the mover maps a guest's.
pub struct BenchMemory {
    /// The mapping.
    pub guest: GuestMemory,
    size: u64,
}

impl BenchMemory {
    /// Memory for the source: random, so that nothing about it compresses and no page is zero.
    pub fn random(size: u64) -> Result<Self, BenchError> {
        let memory = Self::new(size)?;
        let mut state = SEED;
        let mut chunk = vec![0; CHUNK];
        memory.each_chunk(|at, length| {
            let part = chunk.get_mut(..length).unwrap_or_default();
            for word in part.chunks_exact_mut(8) {
                word.copy_from_slice(&next_random(&mut state).to_le_bytes());
            }
            Ok(memory.guest.write(at, part)?)
        })?;
        Ok(memory)
    }

    /// Memory for the destination: every page is there before the first one arrives, as the mover finds it.
    pub fn populated(size: u64) -> Result<Self, BenchError> {
        let memory = Self::new(size)?;
        let zeroes = vec![0; CHUNK];
        memory.each_chunk(|at, length| {
            Ok(memory
                .guest
                .write(at, zeroes.get(..length).unwrap_or_default())?)
        })?;
        Ok(memory)
    }

    fn new(size: u64) -> Result<Self, BenchError> {
        let file = memfd_create(
            c"bench-memory",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )
        .map(File::from)
        .map_err(|e| BenchError::System("memfd_create", e.into()))?;
        file.set_len(size)
            .map_err(BenchError::system("ftruncate"))?;
        let length = i64::try_from(size)
            .map_err(|_| BenchError::Usage("the size is too large".to_owned()))?;
        // Memory that is not there is an error here, not a signal later.
        fallocate(&file, FallocateFlags::empty(), 0, length)
            .map_err(|e| BenchError::System("fallocate", e.into()))?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))
            .map_err(|e| BenchError::System("F_ADD_SEALS", e.into()))?;
        let layout = MemoryLayout::packed(&[(0, size)])?;
        let guest = GuestMemory::map(file.as_fd(), layout, Access::ReadWrite)?;
        Ok(Self { guest, size })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// As the offer names it.
    pub fn ranges(&self) -> Vec<PageRange> {
        vec![PageRange {
            start: Gpn(0),
            count: self.size / PAGE_SIZE as u64,
        }]
    }

    /// A checksum of all of it, by which the ends compare what they hold.
    pub fn checksum(&self) -> Result<u32, BenchError> {
        let mut hasher = crc32fast::Hasher::new();
        let mut chunk = vec![0; CHUNK];
        self.each_chunk(|at, length| {
            let part = chunk.get_mut(..length).unwrap_or_default();
            self.guest.read(at, part)?;
            hasher.update(part);
            Ok(())
        })?;
        Ok(hasher.finalize())
    }

    /// Calls with address and length of every piece of at most [`CHUNK`] bytes.
    pub fn each_chunk(
        &self,
        mut each: impl FnMut(u64, usize) -> Result<(), BenchError>,
    ) -> Result<(), BenchError> {
        let mut at = 0;
        while at < self.size {
            let length = usize::try_from(self.size - at).map_or(CHUNK, |left| left.min(CHUNK));
            each(at, length)?;
            at += length as u64;
        }
        Ok(())
    }
}

const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// Xorshift: not secret, not compressible.
fn next_random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_memory_has_no_zero_page_and_the_checksum_tells_it_from_other_memory() {
        let size = 1 << 20;
        let random = BenchMemory::random(size).unwrap();
        let empty = BenchMemory::populated(size).unwrap();
        let mut page = [0; PAGE_SIZE];
        random
            .guest
            .read(size - PAGE_SIZE as u64, &mut page)
            .unwrap();
        assert!(page.iter().any(|byte| *byte != 0));
        assert_ne!(random.checksum().unwrap(), empty.checksum().unwrap());
    }
}
