//! A raw image: sectors read and written straight from and to guest memory, and the lock that says whose it is.
#![expect(
    unsafe_code,
    reason = "preadv and pwritev on guest memory, which no safe interface takes at an offset"
)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use nix::unistd::{Whence, lseek};
use vm_memory::bitmap::Bitmap;

use super::super::ring::{Segments, Slice};
use super::written::BLOCK;

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
        each_batch(extent, to, |batch, offset| {
            let vectors: Vec<_> = batch.iter().map(vector).collect();
            // SAFETY: each vector is a slice of guest memory that vm-memory checked and that stays mapped while `batch`
            // borrows it; the guest may write to it at the same time, which is why no Rust reference to it exists.
            // The count is at most `BATCH`.
            let done = unsafe {
                libc::preadv(
                    self.file.as_raw_fd(),
                    vectors.as_ptr(),
                    vectors.len() as i32,
                    offset,
                )
            };
            let result = Errno::result(done);
            mark(batch, *result.as_ref().unwrap_or(&isize::MAX));
            result
        })
    }

    /// Writes guest memory to the image. The caller made the extent from the length of `from`.
    pub(super) fn write(&self, extent: Extent, from: &Segments<'_>) -> io::Result<()> {
        each_batch(extent, from, |batch, offset| {
            let vectors: Vec<_> = batch.iter().map(vector).collect();
            // SAFETY: as for `read`; the kernel only reads the memory.
            Errno::result(unsafe {
                libc::pwritev(
                    self.file.as_raw_fd(),
                    vectors.as_ptr(),
                    vectors.len() as i32,
                    offset,
                )
            })
        })
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
        let size = i64::try_from(self.sectors * SECTOR).map_err(io::Error::other)?;
        let mut offset = 0;
        while offset < size {
            let start = match lseek(&self.file, offset, Whence::SeekData) {
                Err(Errno::ENXIO) => break,
                start => start?,
            };
            let end = lseek(&self.file, start, Whence::SeekHole)?.min(size);
            for block in start.unsigned_abs() / BLOCK..end.unsigned_abs().div_ceil(BLOCK) {
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

    /// Takes the image for this open file description, or fails at once.
    pub(super) fn lock(&self, shared: bool, name: &str) -> io::Result<()> {
        match self.set_lock(if shared { libc::F_RDLCK } else { libc::F_WRLCK }) {
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
        Ok(self.set_lock(libc::F_UNLCK)?)
    }

    fn set_lock(&self, kind: i32) -> Result<(), Errno> {
        let whole = libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&whole)).map(drop)
    }
}

/// Runs `transfer` until the whole extent is done, going on after short transfers and signals.
fn each_batch(
    extent: Extent,
    segments: &Segments<'_>,
    transfer: impl Fn(&[Slice<'_>], i64) -> Result<isize, Errno>,
) -> io::Result<()> {
    let total = segments.len();
    let mut done = 0;
    while done < total {
        let rest = segments.range(done, total - done).ok_or(Errno::EFAULT)?;
        let batch = rest.slices().get(..BATCH).unwrap_or(rest.slices());
        match transfer(batch, extent.offset.saturating_add(done as i64)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count.unsigned_abs(),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn vector(slice: &Slice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

/// Marks what the kernel wrote (after an error: may have written) in the dirty bitmap.
fn mark(batch: &[Slice<'_>], written: isize) {
    let mut left = written.unsigned_abs();
    for slice in batch {
        let here = left.min(slice.len());
        slice.bitmap().mark_dirty(0, here);
        left -= here;
    }
}

/// The kernel's IOV_MAX.
const BATCH: usize = 1024;
