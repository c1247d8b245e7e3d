//! Guest RAM and the exchange memory: sealed memfds, mapped once, shared by descriptor with the mover and
//! the secure processor.
//!
//! Whoever holds a writable descriptor can change the bytes at any time; nothing read from here twice is the same.
#![expect(unsafe_code, reason = "madvise on the mapping of guest memory")]

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion, VolatileMemory};

use super::layout::{FIRMWARE_END, HIGH_MEMORY, MAX_MEMORY, MIN_MEMORY, PAGE_SIZE, low_memory};
use crate::devices::virtio::GuestRam;
use crate::image_file::next_data;
use crate::machine::plan::MachinePlan;

/// All memory of a guest in one memfd: RAM from address 0, firmware's place in front of 4 GiB if it has one, and from
/// 4 GiB the RAM that does not fit below the PCI window. What firmware is in neither guest nor device can write.
/// Bitmaps of pages follow the file, in which the runs are packed.
pub struct GuestMemory {
    ram: GuestRam,
    runs: Vec<Run>,
    file: File,
    reader: Option<OwnedFd>,
}

/// One run: where it begins in the guest, and its mapping.
struct Run {
    gpa: u64,
    rom: bool,
    region: Arc<MmapRegion<AtomicBitmap>>,
}

impl GuestMemory {
    /// Makes memory of `size` bytes, a multiple of 2 MiB within the bounds of the layout.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        check_size(size)?;
        Self::with_size(size)
    }

    /// Makes the memory of a plan that has been checked.
    pub fn of(plan: &MachinePlan) -> Result<Self, MemoryError> {
        check_size(plan.memory_bytes)?;
        Self::laid_out(plan.memory_bytes, plan.low_memory(), rom_bytes(plan))
    }

    /// The memory of a guest that another VMM has had until now. Whoever made the file is not believed: it must be of this
    /// plan's size, and stay so.
    pub fn handed_over(plan: &MachinePlan, file: File) -> Result<Self, MemoryError> {
        check_handed(&file, plan.mapped_bytes())?;
        Self::mapped(file, plan.memory_bytes, plan.low_memory(), rom_bytes(plan))
    }

    /// Makes memory of any number of pages; for small freestanding guests.
    pub fn with_size(size: u64) -> Result<Self, MemoryError> {
        Self::laid_out(size, low_memory(size), 0)
    }

    fn laid_out(size: u64, low: u64, rom: u64) -> Result<Self, MemoryError> {
        let whole = size.checked_add(rom).ok_or(MemoryError::Size(size))?;
        Self::mapped(sealed_memfd(c"guest-memory", whole)?, size, low, rom)
    }

    fn mapped(file: File, size: u64, low: u64, rom: u64) -> Result<Self, MemoryError> {
        let mut runs = vec![Run::map(&file, 0, 0, low)?];
        if rom > 0 {
            let place = FIRMWARE_END.checked_sub(rom);
            let place = place.ok_or(MemoryError::Size(rom))?;
            let run = Run::map(&file, place, low, rom)?;
            runs.push(Run { rom: true, ..run });
        }
        if size > low {
            runs.push(Run::map(&file, HIGH_MEMORY, low + rom, size - low)?);
        }
        let regions = runs
            .iter()
            .filter(|run| !run.rom)
            .map(|run| GuestRegionMmap::with_arc(Arc::clone(&run.region), GuestAddress(run.gpa)))
            .collect::<Option<Vec<_>>>()
            .ok_or(MemoryError::Size(size))?;
        let ram = GuestRam::from_regions(regions)?;
        Ok(Self {
            ram,
            runs,
            file,
            reader: None,
        })
    }

    /// Guest memory as devices see it.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.runs.iter().map(Run::length).sum()
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.size() / PAGE_SIZE
    }

    /// Guest physical start and length of each run; file offsets follow the same order, packed.
    pub fn runs(&self) -> Vec<(u64, u64)> {
        self.runs
            .iter()
            .map(|run| (run.gpa, run.length()))
            .collect()
    }

    /// What a memslot is made of, for each run: guest physical start, length, and where it is mapped in this process.
    pub fn slots(&self) -> Vec<(u64, u64, u64)> {
        self.runs
            .iter()
            .map(|run| (run.gpa, run.length(), run.region.as_ptr() as u64))
            .collect()
    }

    /// Whether the guest can only read a run.
    pub fn is_rom(&self, run: usize) -> bool {
        self.runs.get(run).is_some_and(|run| run.rom)
    }

    /// Puts firmware into its place, which it fills.
    pub fn load_rom(&self, bytes: &[u8]) -> Result<(), MemoryError> {
        let run = self.runs.iter().find(|run| run.rom);
        let run = run.filter(|run| run.length() == bytes.len() as u64);
        run.and_then(|run| run.region.get_slice(0, bytes.len()).ok())
            .ok_or(MemoryError::Range(FIRMWARE_END, bytes.len()))?
            .copy_from(bytes);
        Ok(())
    }

    /// The memory file, readable and writable.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Keeps a descriptor of the same file that cannot write, for [`GuestMemory::file_for_reader`].
    pub fn set_reader(&mut self, reader: OwnedFd) {
        self.reader = Some(reader);
    }

    /// The memory file for a reader. Without a descriptor of its own the file is sealed against new writable
    /// mappings instead, which is as good from then on.
    pub fn file_for_reader(&self) -> Result<BorrowedFd<'_>, MemoryError> {
        if let Some(reader) = &self.reader {
            return Ok(reader.as_fd());
        }
        fcntl(
            &self.file,
            FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE),
        )?;
        Ok(self.file.as_fd())
    }

    /// Copies bytes in.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        self.ram
            .write_slice(bytes, GuestAddress(gpa))
            .map_err(|_| MemoryError::Range(gpa, bytes.len()))
    }

    /// Copies bytes in, straight from an offset and length of a file.
    pub fn write_from(
        &self,
        gpa: u64,
        mut file: &File,
        (offset, length): (u64, u64),
    ) -> Result<(), MemoryError> {
        let length = usize::try_from(length).map_err(|_| MemoryError::Size(length))?;
        file.seek(SeekFrom::Start(offset))?;
        self.ram
            .read_exact_volatile_from(GuestAddress(gpa), &mut file, length)
            .map_err(|e| match e {
                vm_memory::GuestMemoryError::IOError(e) => MemoryError::System(e),
                _ => MemoryError::Range(gpa, length),
            })
    }

    /// Copies bytes out.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let length = bytes.len();
        self.ram
            .read_slice(bytes, GuestAddress(gpa))
            .map_err(|_| MemoryError::Range(gpa, length))
    }

    /// Pages written by device models since the last call, one bit a page.
    pub fn take_device_writes(&self) -> Vec<u64> {
        let runs = self.runs.iter();
        runs.flat_map(|run| run.region.bitmap().get_and_reset())
            .collect()
    }

    /// Notes pages as written though no byte was: what they are has changed.
    pub fn mark_written(&self, gpa: u64, length: u64) {
        let Ok(length) = usize::try_from(length) else {
            return;
        };
        if let Some((run, offset)) = self.find(gpa) {
            run.region.bitmap().mark_dirty(offset, length);
        }
    }

    /// Whether a device model wrote the page at `gpa`.
    pub fn device_wrote(&self, gpa: u64) -> bool {
        self.find(gpa)
            .is_some_and(|(run, offset)| run.region.bitmap().dirty_at(offset))
    }

    /// The run that an address is in, and how far.
    fn find(&self, gpa: u64) -> Option<(&Run, usize)> {
        self.runs.iter().find_map(|run| {
            let offset = gpa.checked_sub(run.gpa).filter(|at| *at < run.length())?;
            Some((run, usize::try_from(offset).ok()?))
        })
    }

    /// Pages that hold anything at all, one bit a page: what the memory file has storage for.
    pub fn populated(&self) -> Result<Vec<u64>, MemoryError> {
        let mut bitmap = vec![0u64; self.pages().div_ceil(64) as usize];
        let mut offset = 0;
        while offset < self.size() {
            let Some((start, end)) = next_data(&self.file, offset)? else {
                break;
            };
            for page in start / PAGE_SIZE..end.div_ceil(PAGE_SIZE).min(self.pages()) {
                if let Some(word) = bitmap.get_mut((page / 64) as usize) {
                    *word |= 1 << (page % 64);
                }
            }
            offset = end;
        }
        Ok(bitmap)
    }
}

impl Run {
    fn map(file: &File, gpa: u64, offset: u64, size: u64) -> Result<Self, MemoryError> {
        let length = usize::try_from(size).map_err(|_| MemoryError::Size(size))?;
        let page = NonZeroUsize::new(PAGE_SIZE as usize).ok_or(MemoryError::Size(size))?;
        let mapping = MmapRegionBuilder::new_with_bitmap(length, AtomicBitmap::new(length, page))
            .with_file_offset(FileOffset::new(file.try_clone()?, offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()?;
        keep_to_this_process(&mapping)?;
        in_huge_pages(&mapping);
        let region = Arc::new(mapping);
        Ok(Self {
            gpa,
            rom: false,
            region,
        })
    }

    fn length(&self) -> u64 {
        self.region.size() as u64
    }
}

/// Memory for bulk data between the VMM and one mover. The other side may change it at any time: copy, then parse.
pub struct ExchangeMemory {
    mapping: MmapRegion<()>,
    file: File,
}

impl ExchangeMemory {
    /// Makes the exchange memory.
    pub fn new() -> Result<Self, MemoryError> {
        let size = super::protocol::EXCHANGE_SIZE;
        Self::over(sealed_memfd(c"exchange", size as u64)?)
    }

    /// The exchange memory that another VMM of the same guest has had until now.
    pub fn handed_over(file: File) -> Result<Self, MemoryError> {
        check_handed(&file, super::protocol::EXCHANGE_SIZE as u64)?;
        Self::over(file)
    }

    fn over(file: File) -> Result<Self, MemoryError> {
        let size = super::protocol::EXCHANGE_SIZE;
        let mapping = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), size)?;
        Ok(Self { mapping, file })
    }

    /// Its descriptor.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Puts bytes at the start.
    pub fn put(&self, bytes: &[u8]) -> Result<(), MemoryError> {
        self.mapping
            .get_slice(0, bytes.len())
            .map_err(|_| MemoryError::Exchange(bytes.len()))?
            .copy_from(bytes);
        Ok(())
    }

    /// Takes a private copy of the first `length` bytes.
    pub fn take(&self, length: usize) -> Result<Vec<u8>, MemoryError> {
        let slice = self
            .mapping
            .get_slice(0, length)
            .map_err(|_| MemoryError::Exchange(length))?;
        let mut bytes = vec![0u8; length];
        slice.copy_to(&mut bytes);
        Ok(bytes)
    }
}

/// What can go wrong with memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not a size a guest can have.
    #[error("guest memory of {0} bytes: must be a multiple of 2 MiB, from 64 MiB to 64 GiB")]
    Size(u64),
    /// The kernel refused.
    #[error("guest memory: {0}")]
    System(#[from] std::io::Error),
    /// The kernel refused.
    #[error("guest memory: {0}")]
    Errno(#[from] Errno),
    /// The mapping failed.
    #[error("guest memory cannot be mapped")]
    Map(#[from] vm_memory::mmap::MmapRegionError),
    /// The region list is impossible.
    #[error("guest memory cannot be laid out")]
    Layout(#[from] vm_memory::GuestRegionCollectionError),
    /// Outside guest memory.
    #[error("{1} bytes at {0:#x} are outside guest memory")]
    Range(u64, usize),
    /// Longer than the exchange memory.
    #[error("{0} bytes do not fit the exchange memory")]
    Exchange(usize),
    /// What another VMM handed over is not what it should be.
    #[error("memory that was handed over: {0}")]
    Handed(&'static str),
}

/// What firmware takes beside the RAM.
fn rom_bytes(plan: &MachinePlan) -> u64 {
    plan.firmware.map_or(0, |firmware| firmware.rom_bytes)
}

fn check_size(size: u64) -> Result<(), MemoryError> {
    if (MIN_MEMORY..=MAX_MEMORY).contains(&size) && size.is_multiple_of(2 << 20) {
        return Ok(());
    }
    Err(MemoryError::Size(size))
}

/// Of this size, and of a size that nobody can change: a file that shrinks would end whoever has it mapped.
fn check_handed(file: &File, size: u64) -> Result<(), MemoryError> {
    if file.metadata()?.len() != size {
        return Err(MemoryError::Handed("its size is not the plan's"));
    }
    let seals = fcntl(file, FcntlArg::F_GET_SEALS)
        .map(SealFlag::from_bits_retain)
        .map_err(|_| MemoryError::Handed("it is no memory file"))?;
    if !seals.contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW) {
        return Err(MemoryError::Handed("its size is not sealed"));
    }
    Ok(())
}

fn sealed_memfd(name: &std::ffi::CStr, size: u64) -> Result<File, MemoryError> {
    let file = File::from(memfd_create(
        name,
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    file.set_len(size)?;
    fcntl(
        &file,
        FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW),
    )?;
    Ok(file)
}

/// Neither in a core dump nor, should there ever be one, in a child.
fn keep_to_this_process<B: Bitmap>(mapping: &MmapRegion<B>) -> Result<(), MemoryError> {
    let Some(start) = NonNull::new(mapping.as_ptr().cast()) else {
        return Ok(());
    };
    for advice in [MmapAdvise::MADV_DONTDUMP, MmapAdvise::MADV_DONTFORK] {
        // SAFETY: the range is exactly one live mapping of ours, and neither advice changes its content.
        unsafe { madvise(start, mapping.size(), advice) }?;
    }
    Ok(())
}

/// In huge pages, where the host has them for shared memory (`shmem_enabled`): a guest then leaves for one page in 512
/// that it touches first.
fn in_huge_pages<B: Bitmap>(mapping: &MmapRegion<B>) {
    if let Some(start) = NonNull::new(mapping.as_ptr().cast()) {
        // SAFETY: as above. A kernel without huge pages refuses, and nothing is lost.
        let _ = unsafe { madvise(start, mapping.size(), MmapAdvise::MADV_HUGEPAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 4096, (64 << 20) + 4096, (64 << 30) + (2 << 20)] {
            assert!(
                matches!(GuestMemory::new(size), Err(MemoryError::Size(_))),
                "{size}"
            );
        }
    }

    #[test]
    fn only_touched_pages_are_populated_and_logged() {
        let memory = GuestMemory::with_size(1 << 20).unwrap();
        memory.write(5 * 4096 + 7, b"x").unwrap();
        memory.write(70 * 4096 - 1, b"yz").unwrap();
        let expect = vec![1 << 5, (1 << 5) | (1 << 6), 0, 0];
        assert_eq!(memory.populated().unwrap(), expect);
        assert_eq!(memory.take_device_writes(), expect);
        assert_eq!(memory.take_device_writes(), vec![0; 4]);
    }

    #[test]
    fn memory_goes_on_above_4_gib_and_bitmaps_follow_the_file() {
        let memory = GuestMemory::new(5 << 30).unwrap();
        assert_eq!(memory.runs(), [(0, 3 << 30), (4 << 30, 2 << 30)]);
        memory.write((4 << 30) + 4096, b"high").unwrap();
        memory.write((3 << 30) - 1, b"l").unwrap();
        assert!(memory.write(3 << 30, b"x").is_err());
        assert!(memory.write((3 << 30) - 1, b"xy").is_err());
        assert!(memory.device_wrote((4 << 30) + 4096) && !memory.device_wrote(4096));
        let low_pages = (3 << 30) / 4096;
        let mut expect = vec![0u64; (5 << 30) / 4096 / 64];
        expect[low_pages / 64 - 1] = 1 << 63;
        expect[low_pages / 64] = 1 << 1;
        assert_eq!(memory.populated().unwrap(), expect);
        assert_eq!(memory.take_device_writes(), expect);
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&memory.file, &mut bytes, (3 << 30) + 4096)
            .unwrap();
        assert_eq!(&bytes, b"high");
    }

    #[test]
    fn firmware_lies_in_front_of_4_gib_and_no_device_writes_it() {
        let memory = GuestMemory::laid_out(5 << 30, 2 << 30, 4 << 20).unwrap();
        let rom = (4u64 << 30) - (4 << 20);
        let runs = [(0, 2 << 30), (rom, 4 << 20), (4 << 30, 3 << 30)];
        assert_eq!(memory.runs(), runs);
        assert_eq!(
            [0, 1, 2, 3].map(|run| memory.is_rom(run)),
            [false, true, false, false]
        );
        assert_eq!(memory.pages(), ((5 << 30) + (4 << 20)) / 4096);
        assert!(memory.load_rom(&[1; 2 << 20]).is_err());
        memory.load_rom(&vec![0x5a; 4 << 20]).unwrap();
        assert!(memory.write(rom, b"x").is_err() && memory.read(rom, &mut [0]).is_err());
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&memory.file, &mut byte, 2 << 30).unwrap();
        assert_eq!(byte, [0x5a]);
        memory.write((4 << 30) + 5, b"high").unwrap();
        let at = (2 << 30) + (4 << 20) + 5;
        std::os::unix::fs::FileExt::read_exact_at(&memory.file, &mut byte, at).unwrap();
        assert_eq!(byte, *b"h");
        let without = GuestMemory::with_size(1 << 20).unwrap();
        assert!(without.load_rom(&[]).is_err());
    }

    #[test]
    fn the_readers_descriptor_cannot_write_and_the_file_cannot_grow() {
        let memory = GuestMemory::with_size(1 << 20).unwrap();
        let reader = File::from(
            memory
                .file_for_reader()
                .unwrap()
                .try_clone_to_owned()
                .unwrap(),
        );
        assert!(nix::unistd::write(&reader, b"x").is_err());
        assert!(memory.file.set_len(2 << 20).is_err());
    }

    #[test]
    fn memory_is_taken_over_as_it_is_and_only_if_nobody_can_cut_it() {
        let plan = MachinePlan {
            name: "memory".into(),
            vm_id: [1; 16],
            vcpus: 1,
            cpu: Default::default(),
            memory_bytes: 64 << 20,
            firmware: None,
            cmdline: String::new(),
            technology: crate::machine::plan::Technology::None,
            disks: vec![],
            nets: vec![],
            vsock_cid: None,
            small: Default::default(),
            hotplug: Default::default(),
        };
        let first = GuestMemory::of(&plan).unwrap();
        first.write(5 * 4096, b"there").unwrap();
        let second = |file| GuestMemory::handed_over(&plan, file);
        let taken = second(first.file.try_clone().unwrap()).unwrap();
        let mut bytes = [0; 5];
        taken.read(5 * 4096, &mut bytes).unwrap();
        assert_eq!((&bytes, taken.runs()), (b"there", first.runs()));
        taken.write(0, b"one memory").unwrap();
        let mut same = [0; 10];
        first.read(0, &mut same).unwrap();
        assert_eq!(&same, b"one memory");
        let unsealed = memfd_create(c"m", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let unsealed = File::from(unsealed);
        unsealed.set_len(64 << 20).unwrap();
        let short = sealed_memfd(c"m", 62 << 20).unwrap();
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(64 << 20).unwrap();
        for wrong in [unsealed, short, plain] {
            assert!(matches!(second(wrong), Err(MemoryError::Handed(_))));
        }
    }

    #[test]
    fn writes_outside_are_refused() {
        let memory = GuestMemory::with_size(1 << 20).unwrap();
        assert!(memory.write((1 << 20) - 1, b"xy").is_err());
    }
}
