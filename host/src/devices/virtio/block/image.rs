//! A raw image: sectors read and written straight from and to guest memory, and the lock that says whose it is.
#![expect(
    unsafe_code,
    reason = "preadv and pwritev on guest memory, which no safe interface takes at an offset"
)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::bitmap::Bitmap;

use super::super::ring::{Segments, Slice};
use super::written::BLOCK;
use crate::image_file::{Hold, hold, next_data};

/// Bytes in a sector, whatever the medium has.
pub(super) const SECTOR: u64 = 512;

/// A raw image and its size when it was last looked at.
pub(super) struct Image {
    file: File,
    sectors: u64,
}

/// A run of bytes of the file.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    offset: i64,
    len: i64,
}

impl Image {
    pub(super) fn new(mut file: File) -> io::Result<Image> {
        // The end rather than the metadata, so that a block device works too.
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        Ok(Image { file, sectors })
    }

    /// Asks again; requests beyond a new end fail from now on.
    pub(super) fn look_at_size(&mut self) -> io::Result<()> {
        self.sectors = self.file.seek(SeekFrom::End(0))? / SECTOR;
        Ok(())
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// A run of bytes of the file, wherever it is.
    pub(super) fn raw_extent(offset: u64, len: u64) -> io::Result<Extent> {
        Ok(Extent {
            offset: offset.try_into().map_err(io::Error::other)?,
            len: len.try_into().map_err(io::Error::other)?,
        })
    }

    /// The file, for what is not the guest's data.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Where the file ends now.
    pub(super) fn length(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    /// Fills guest memory from the image. The caller made the extent from the length of `to`.
    pub(super) fn read(&self, extent: Extent, to: &Segments<'_>) -> io::Result<()> {
        let mut vectors = vectors(to);
        // SAFETY: the slices of guest memory that `to` borrows stay mapped while it does.
        let result = unsafe { self.transfer(false, extent.offset, &mut vectors) };
        // Also after an error, which may have come in the middle.
        to.slices()
            .iter()
            .for_each(|slice| slice.bitmap().mark_dirty(0, slice.len()));
        result
    }

    /// Writes guest memory to the image. The caller made the extent from the length of `from`.
    pub(super) fn write(&self, extent: Extent, from: &Segments<'_>) -> io::Result<()> {
        // SAFETY: as for `read`.
        unsafe { self.transfer(true, extent.offset, &mut vectors(from)) }
    }

    /// Transfers the rest of a request of which `done` bytes are.
    ///
    /// # Safety
    ///
    /// The vectors are slices of guest memory, mapped until this returns.
    pub(super) unsafe fn go_on(
        &self,
        write: bool,
        offset: u64,
        mut vectors: Vec<Vector>,
        done: usize,
    ) -> io::Result<()> {
        advance(&mut vectors, done);
        let offset = offset.saturating_add(done as u64);
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: the caller's promise.
        unsafe { self.transfer(write, offset, &mut vectors) }
    }

    /// Transfers everything, going on after short transfers and signals.
    ///
    /// # Safety
    ///
    /// As for `go_on`.
    unsafe fn transfer(
        &self,
        write: bool,
        mut offset: i64,
        vectors: &mut Vec<Vector>,
    ) -> io::Result<()> {
        while !vectors.is_empty() {
            let batch = vectors.get(..BATCH).unwrap_or(vectors);
            let (at, count) = (batch.as_ptr().cast::<libc::iovec>(), batch.len() as i32);
            let file = self.file.as_raw_fd();
            let move_bytes = match write {
                true => libc::pwritev,
                false => libc::preadv,
            };
            // SAFETY: each vector is a slice of guest memory that vm-memory checked and that the caller keeps mapped; the
            // guest may use it at the same time, which is why no Rust reference to it exists. The count is at most `BATCH`.
            let result = Errno::result(unsafe { move_bytes(file, at, count, offset) });
            match result {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    offset = offset.saturating_add(count as i64);
                    advance(vectors, count.unsigned_abs());
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Lets the file system forget what is there; it reads as zero afterwards.
    pub(super) fn discard(&self, extent: Extent) -> io::Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, extent)
    }

    /// Writes zeros; `may_unmap` allows holes.
    pub(super) fn zero(&self, extent: Extent, may_unmap: bool) -> io::Result<()> {
        if may_unmap {
            return self.discard(extent);
        }
        match self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, extent) {
            // A file system without this (tmpfs) can still make the content zero.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => self.discard(extent),
            result => result,
        }
    }

    fn allocate(&self, mode: FallocateFlags, extent: Extent) -> io::Result<()> {
        if extent.len == 0 {
            return Ok(());
        }
        Ok(fallocate(
            &self.file,
            mode | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            extent.offset,
            extent.len,
        )?)
    }

    /// A bit for each block that the file has storage for; all of them where nobody knows.
    pub(super) fn allocated(&self) -> io::Result<Vec<u64>> {
        let blocks = (self.sectors * SECTOR).div_ceil(BLOCK);
        let mut words = vec![0u64; usize::try_from(blocks.div_ceil(64)).map_err(io::Error::other)?];
        let size = self.sectors * SECTOR;
        let mut offset = 0;
        while offset < size {
            let Some((start, end)) = next_data(&self.file, offset)? else {
                break;
            };
            for block in start / BLOCK..end.min(size).div_ceil(BLOCK) {
                let word = usize::try_from(block / 64).ok();
                if let Some(word) = word.and_then(|word| words.get_mut(word)) {
                    *word |= 1 << (block % 64);
                }
            }
            offset = end.max(start + 1);
        }
        Ok(words)
    }

    /// Everything written so far is on the medium afterwards.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Takes the image for this open file description, or fails soon.
    pub(super) fn lock(&self, shared: bool, name: &str) -> io::Result<()> {
        let how = if shared { Hold::Shared } else { Hold::Alone };
        match hold(&self.file, how) {
            Err(Errno::EAGAIN | Errno::EACCES) => Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                format!(
                    "disk `{name}` is in use: another guest holds its lock; stop that guest or give this one its own image"
                ),
            )),
            Err(error) => Err(io::Error::new(
                io::Error::from(error).kind(),
                format!("disk `{name}` cannot be locked: {error}"),
            )),
            Ok(()) => Ok(()),
        }
    }

    pub(super) fn unlock(&self) -> io::Result<()> {
        Ok(hold(&self.file, Hold::Free)?)
    }
}

/// A slice of guest memory, as the kernel takes it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Vector(libc::iovec);

// SAFETY: an address and a length; what may be done with them is said where it is done.
unsafe impl Send for Vector {}

impl Vector {
    /// Address in this process, and length.
    pub(super) fn place(&self) -> (usize, usize) {
        (self.0.iov_base.addr(), self.0.iov_len)
    }
}

/// The slices as the kernel takes them, none of them empty.
pub(super) fn vectors(segments: &Segments<'_>) -> Vec<Vector> {
    let slices = segments.slices().iter().filter(|slice| !slice.is_empty());
    slices.map(vector).collect()
}

fn vector(slice: &Slice<'_>) -> Vector {
    Vector(libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    })
}

/// Takes the first `count` bytes off.
fn advance(vectors: &mut Vec<Vector>, mut count: usize) {
    let whole = vectors.iter().take_while(|vector| {
        let within = vector.0.iov_len <= count;
        count -= if within { vector.0.iov_len } else { 0 };
        within
    });
    let whole = whole.count();
    vectors.drain(..whole);
    if let Some(first) = vectors.first_mut() {
        first.0.iov_base = first.0.iov_base.wrapping_byte_add(count);
        first.0.iov_len -= count;
    }
}
/// The kernel's IOV_MAX.
const BATCH: usize = 1024;
