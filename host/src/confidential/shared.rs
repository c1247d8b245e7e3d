//! Memory that two roles share: a guest's pages and the exchange memory, mapped from a memfd and read by copy.
//!
//! The other side writes whenever it likes, so nothing is ever borrowed from a mapping: every access is a
//! bounds-checked copy. The other side must not shrink the file either (a fault would kill this role), so a
//! file without the shrink seal is not mapped. The mapping itself is `vm-memory`'s; no unsafe code here.

use std::fs::File;
use std::os::fd::BorrowedFd;

use casemate_crypto_migrate::guest::PAGE_SIZE;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use serde::{Deserialize, Serialize};
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, FileOffset, MmapRegion};

use crate::vmm::protocol::{EXCHANGE_PAGES, EXCHANGE_SIZE, PACKET_STRIDE, RoleError};

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The mapping has no write permission.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// A sealed memfd, mapped shared.
#[derive(Debug)]
pub struct SharedMemory {
    region: MmapRegion,
    access: Access,
}

impl SharedMemory {
    /// Maps the first `length` bytes of a memfd that can no longer shrink.
    pub fn map(fd: BorrowedFd<'_>, length: u64, access: Access) -> Result<Self, SharedError> {
        let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(SharedError::NotSealable)?;
        if !SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
            return Err(SharedError::NotSealed);
        }
        let size = nix::sys::stat::fstat(fd)?.st_size;
        if length == 0 || u64::try_from(size).unwrap_or(0) < length {
            return Err(SharedError::TooShort { size, length });
        }
        let length = usize::try_from(length).map_err(|_| SharedError::TooShort { size, length })?;
        let file = File::from(fd.try_clone_to_owned().map_err(SharedError::Clone)?);
        let protection = match access {
            Access::ReadOnly => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        let region = MmapRegion::build(
            Some(FileOffset::new(file, 0)),
            length,
            protection,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|e| SharedError::Map(e.to_string()))?;
        Ok(Self { region, access })
    }

    /// Size of the mapping in bytes.
    pub fn len(&self) -> u64 {
        self.region.len() as u64
    }

    /// Whether nothing is mapped; never true of a mapping that [`SharedMemory::map`] made.
    pub fn is_empty(&self) -> bool {
        self.region.len() == 0
    }

    /// Copies bytes out.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), SharedError> {
        let at = self.check(offset, into.len())?;
        self.region
            .as_volatile_slice()
            .read_slice(into, at)
            .map_err(|_| SharedError::outside(offset, into.len()))
    }

    /// Copies bytes in.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), SharedError> {
        if self.access == Access::ReadOnly {
            return Err(SharedError::ReadOnly);
        }
        let at = self.check(offset, from.len())?;
        self.region
            .as_volatile_slice()
            .write_slice(from, at)
            .map_err(|_| SharedError::outside(offset, from.len()))
    }

    /// Address of the mapping in this process, for an ioctl that names user memory.
    pub fn host_address(&self, offset: u64, length: u64) -> Result<u64, SharedError> {
        let length = usize::try_from(length).map_err(|_| SharedError::outside(offset, 0))?;
        self.check(offset, length)?;
        Ok(self.region.as_ptr() as u64 + offset)
    }

    fn check(&self, offset: u64, length: usize) -> Result<usize, SharedError> {
        let end = offset.checked_add(length as u64);
        match (usize::try_from(offset), end) {
            (Ok(at), Some(end)) if end <= self.len() => Ok(at),
            _ => Err(SharedError::outside(offset, length)),
        }
    }
}

/// One run of guest memory in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRun {
    /// Guest physical address, page aligned.
    pub gpa: u64,
    /// Length in bytes, page aligned, not zero.
    pub length: u64,
    /// Offset in the file, page aligned.
    pub offset: u64,
}

/// The runs of one guest: ascending, apart from each other, packed in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLayout {
    runs: Vec<MemoryRun>,
    length: u64,
}

impl MemoryLayout {
    /// Parses runs given as guest physical start and length, packed in the file in this order.
    pub fn packed(runs: &[(u64, u64)]) -> Result<Self, SharedError> {
        let mut offset = 0u64;
        let mut out = Vec::new();
        for &(gpa, length) in runs {
            out.push(MemoryRun {
                gpa,
                length,
                offset,
            });
            offset = offset.checked_add(length).ok_or(SharedError::Layout)?;
        }
        Self::new(out)
    }

    /// Parses runs that another role names.
    pub fn new(runs: Vec<MemoryRun>) -> Result<Self, SharedError> {
        let page = PAGE_SIZE as u64;
        let (mut length, mut next) = (0u64, 0u64);
        if runs.is_empty() || runs.len() > MAX_RUNS {
            return Err(SharedError::Layout);
        }
        for run in &runs {
            let aligned = run.gpa % page == 0 && run.length % page == 0;
            if !aligned || run.length == 0 || run.gpa < next || run.offset != length {
                return Err(SharedError::Layout);
            }
            next = run.gpa.checked_add(run.length).ok_or(SharedError::Layout)?;
            length += run.length;
            if length > MAX_GUEST_MEMORY {
                return Err(SharedError::Layout);
            }
        }
        Ok(Self { runs, length })
    }

    /// The runs.
    pub fn runs(&self) -> &[MemoryRun] {
        &self.runs
    }

    /// Bytes of the file that the runs fill.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// File offset of a guest physical range, if one run holds all of it.
    pub fn offset(&self, gpa: u64, length: u64) -> Option<u64> {
        let end = gpa.checked_add(length)?;
        let run = self
            .runs
            .iter()
            .find(|run| run.gpa <= gpa && end <= run.gpa + run.length)?;
        Some(run.offset + (gpa - run.gpa))
    }
}

/// A guest's memory: the mapping and where in it which address lies.
#[derive(Debug)]
pub struct GuestMemory {
    memory: SharedMemory,
    layout: MemoryLayout,
}

impl GuestMemory {
    /// Maps a guest's memory.
    pub fn map(
        fd: BorrowedFd<'_>,
        layout: MemoryLayout,
        access: Access,
    ) -> Result<Self, SharedError> {
        let memory = SharedMemory::map(fd, layout.length(), access)?;
        Ok(Self { memory, layout })
    }

    /// Where the runs are.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// Copies guest memory out.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), SharedError> {
        self.memory.read(self.offset(gpa, into.len())?, into)
    }

    /// Copies into guest memory.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<(), SharedError> {
        self.memory.write(self.offset(gpa, from.len())?, from)
    }

    /// Address of a guest physical range in this process, for an ioctl that names user memory.
    pub fn host_address(&self, gpa: u64, length: u64) -> Result<u64, SharedError> {
        let offset = self
            .layout
            .offset(gpa, length)
            .ok_or(SharedError::outside(gpa, 0))?;
        self.memory.host_address(offset, length)
    }

    fn offset(&self, gpa: u64, length: usize) -> Result<u64, SharedError> {
        self.layout
            .offset(gpa, length as u64)
            .ok_or(SharedError::outside(gpa, length))
    }
}

/// The exchange memory, seen as [`EXCHANGE_PAGES`] slots for firmware packets, or as one run of bytes.
#[derive(Debug)]
pub struct Exchange {
    memory: SharedMemory,
}

impl Exchange {
    /// Maps exchange memory.
    pub fn map(fd: BorrowedFd<'_>) -> Result<Self, SharedError> {
        let memory = SharedMemory::map(fd, EXCHANGE_SIZE as u64, Access::ReadWrite)?;
        Ok(Self { memory })
    }

    /// Copies packet `slot` out.
    pub fn packet(&self, slot: usize) -> Result<Packet, SharedError> {
        let at = Self::slot(slot)?;
        let mut packet = Packet::default();
        self.memory.read(at, &mut packet.header)?;
        self.memory.read(at + HEADER_STRIDE, &mut packet.data)?;
        Ok(packet)
    }

    /// Copies a packet into `slot`.
    pub fn put_packet(&self, slot: usize, header: &[u8], data: &[u8]) -> Result<(), SharedError> {
        let at = Self::slot(slot)?;
        if header.len() != HEADER || data.len() != PAGE_SIZE {
            return Err(SharedError::outside(at, header.len() + data.len()));
        }
        self.memory.write(at, header)?;
        self.memory.write(at + HEADER_STRIDE, data)
    }

    /// Copies the first `length` bytes out.
    pub fn read(&self, length: u64) -> Result<Vec<u8>, SharedError> {
        if length > self.memory.len() {
            return Err(SharedError::outside(length, 0));
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| SharedError::Layout)?];
        self.memory.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies bytes to the start.
    pub fn write(&self, bytes: &[u8]) -> Result<(), SharedError> {
        self.memory.write(0, bytes)
    }

    fn slot(slot: usize) -> Result<u64, SharedError> {
        if slot >= EXCHANGE_PAGES {
            return Err(SharedError::outside(slot as u64, PACKET_STRIDE));
        }
        Ok((slot * PACKET_STRIDE) as u64)
    }
}

/// A firmware packet, copied out of the exchange memory.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Flags, IV, MAC.
    pub header: [u8; HEADER],
    /// The page under the transport key.
    pub data: [u8; PAGE_SIZE],
}

impl Default for Packet {
    fn default() -> Self {
        Self {
            header: [0; HEADER],
            data: [0; PAGE_SIZE],
        }
    }
}

/// What can be wrong with shared memory.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// Not a memfd.
    #[error("shared memory is not a memfd that can be sealed: {0}")]
    NotSealable(#[source] Errno),
    /// Could be cut under our feet.
    #[error("shared memory lacks the seal against shrinking; seal the memfd with F_SEAL_SHRINK")]
    NotSealed,
    /// The file holds less than was promised.
    #[error("shared memory holds {size} bytes where {length} were promised")]
    TooShort {
        /// Size of the file.
        size: i64,
        /// What was promised.
        length: u64,
    },
    /// The runs overlap, are unaligned, not packed, too many or too large.
    #[error("the layout of guest memory is not one of packed, page-aligned, ascending runs")]
    Layout,
    /// An access beyond the end, or across a hole.
    #[error("{length} bytes at {at:#x} are not all inside the memory")]
    Outside {
        /// Address or offset.
        at: u64,
        /// Length.
        length: usize,
    },
    /// A write to memory that was mapped to be read.
    #[error("shared memory is mapped read-only")]
    ReadOnly,
    /// The descriptor could not be doubled.
    #[error("descriptor of shared memory cannot be duplicated: {0}")]
    Clone(#[source] std::io::Error),
    /// mmap failed.
    #[error("shared memory cannot be mapped: {0}")]
    Map(String),
    /// Another system call failed.
    #[error("shared memory cannot be examined: {0}")]
    System(#[from] Errno),
}

impl SharedError {
    fn outside(at: u64, length: usize) -> Self {
        Self::Outside { at, length }
    }
}

impl From<SharedError> for RoleError {
    fn from(error: SharedError) -> Self {
        Self {
            code: "BAD_MEMORY".to_owned(),
            text: error.to_string(),
        }
    }
}

/// Header of a packet, in bytes.
pub const HEADER: usize = casemate_crypto_migrate::guest::PACKET_HEADER_SIZE;
/// The header's place in the exchange memory, padded.
const HEADER_STRIDE: u64 = (PACKET_STRIDE - PAGE_SIZE) as u64;
/// Most runs of one guest.
const MAX_RUNS: usize = 16;
/// Most memory of one guest: 1 TiB.
const MAX_GUEST_MEMORY: u64 = 1 << 40;

/// A sealed memfd of `length` bytes, as the VMM makes them.
#[cfg(test)]
pub(crate) fn sealed_memfd(length: u64) -> std::os::fd::OwnedFd {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::AsFd;
    let fd = memfd_create(
        "casemate-test",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )
    .unwrap();
    nix::unistd::ftruncate(fd.as_fd(), i64::try_from(length).unwrap()).unwrap();
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(seals)).unwrap();
    fd
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    const PAGE: u64 = PAGE_SIZE as u64;

    #[test]
    fn two_mappings_of_one_file_see_each_other() {
        let fd = sealed_memfd(4 * PAGE);
        let a = SharedMemory::map(fd.as_fd(), 4 * PAGE, Access::ReadWrite).unwrap();
        let b = SharedMemory::map(fd.as_fd(), 4 * PAGE, Access::ReadOnly).unwrap();
        a.write(PAGE - 3, b"across a page").unwrap();
        let mut seen = [0; 13];
        b.read(PAGE - 3, &mut seen).unwrap();
        assert_eq!(&seen, b"across a page");
        assert!(matches!(b.write(0, b"x"), Err(SharedError::ReadOnly)));
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let fd = memfd_create("t", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(fd.as_fd(), 4096).unwrap();
        let error = SharedMemory::map(fd.as_fd(), 4096, Access::ReadWrite).unwrap_err();
        assert!(matches!(error, SharedError::NotSealed), "{error}");
        let file = tempfile::tempfile().unwrap();
        let error = SharedMemory::map(file.as_fd(), 4096, Access::ReadWrite).unwrap_err();
        assert!(
            matches!(error, SharedError::NotSealed | SharedError::NotSealable(_)),
            "{error}"
        );
    }

    #[test]
    fn a_short_file_and_an_access_outside_are_refused() {
        let fd = sealed_memfd(PAGE);
        let error = SharedMemory::map(fd.as_fd(), 2 * PAGE, Access::ReadWrite).unwrap_err();
        assert!(matches!(error, SharedError::TooShort { .. }), "{error}");
        let memory = SharedMemory::map(fd.as_fd(), PAGE, Access::ReadWrite).unwrap();
        let mut byte = [0];
        memory.read(PAGE - 1, &mut byte).unwrap();
        for at in [PAGE, u64::MAX] {
            let error = memory.read(at, &mut byte).unwrap_err();
            assert!(matches!(error, SharedError::Outside { .. }), "{error}");
        }
    }

    #[test]
    fn a_layout_translates_and_knows_its_holes() {
        let layout = MemoryLayout::packed(&[(0, 2 * PAGE), (16 * PAGE, PAGE)]).unwrap();
        assert_eq!(layout.length(), 3 * PAGE);
        assert_eq!(layout.offset(16 * PAGE, PAGE), Some(2 * PAGE));
        assert_eq!(layout.offset(PAGE, 2 * PAGE), None);
        assert_eq!(layout.offset(u64::MAX, PAGE), None);
    }

    #[test]
    fn a_layout_that_overlaps_or_is_not_packed_is_refused() {
        assert!(MemoryLayout::packed(&[(0, 2 * PAGE), (PAGE, PAGE)]).is_err());
        assert!(MemoryLayout::packed(&[(1, PAGE)]).is_err());
        assert!(MemoryLayout::packed(&[]).is_err());
        assert!(MemoryLayout::packed(&[(u64::MAX - PAGE + 1, PAGE)]).is_err());
        let unpacked = MemoryRun {
            gpa: 0,
            length: PAGE,
            offset: PAGE,
        };
        assert!(MemoryLayout::new(vec![unpacked]).is_err());
    }
}
