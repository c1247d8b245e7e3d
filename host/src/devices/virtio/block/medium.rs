//! What a disk's content is in: a raw image, or a qcow2 one. Which of them is said, and never guessed from the content,
//! which is the guest's.
#![expect(unsafe_code, reason = "passes on addresses of guest memory")]

use std::fs::File;
use std::io;

use super::super::ring::Segments;
use super::image::{Image, SECTOR, Vector};
use super::qcow2::Qcow2;
use crate::machine::plan::DiskFormat;

/// The content of a disk.
pub(super) enum Medium {
    Raw(Image),
    Qcow2(Box<Qcow2>),
}

/// A run of bytes that lies within the disk.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Medium {
    pub(super) fn open(file: File, format: DiskFormat, read_only: bool) -> io::Result<Medium> {
        Ok(match format {
            DiskFormat::Raw => Medium::Raw(Image::new(file)?),
            DiskFormat::Qcow2 => Medium::Qcow2(Box::new(Qcow2::new(file, !read_only)?)),
        })
    }

    pub(super) fn sectors(&self) -> u64 {
        match self {
            Medium::Raw(image) => image.sectors(),
            Medium::Qcow2(image) => image.sectors(),
        }
    }

    /// The bytes of these sectors, if the disk has them.
    pub(super) fn extent(&self, sector: u64, bytes: u64) -> Option<Extent> {
        let end = sector.checked_add(bytes / SECTOR)?;
        if !bytes.is_multiple_of(SECTOR) || end > self.sectors() {
            return None;
        }
        let offset = sector.checked_mul(SECTOR)?;
        Some(Extent { offset, len: bytes })
    }

    /// Most sectors of one discard or write-zeroes request: what is done without much delay.
    pub(super) fn clear_max(&self) -> u32 {
        let most = match self {
            Medium::Raw(image) => image.sectors(),
            Medium::Qcow2(_) => QCOW2_CLEAR_MAX,
        };
        u32::try_from(most).unwrap_or(u32::MAX)
    }

    /// Fills guest memory from the disk. The caller made the extent from the length of `to`.
    pub(super) fn read(&mut self, extent: Extent, to: &Segments<'_>) -> io::Result<()> {
        match self {
            Medium::Raw(image) => image.read(Image::raw_extent(extent.offset, extent.len)?, to),
            Medium::Qcow2(image) => image.read(extent.offset, to),
        }
    }

    /// Writes guest memory to the disk. The caller made the extent from the length of `from`.
    pub(super) fn write(&mut self, extent: Extent, from: &Segments<'_>) -> io::Result<()> {
        match self {
            Medium::Raw(image) => image.write(Image::raw_extent(extent.offset, extent.len)?, from),
            Medium::Qcow2(image) => image.write(extent.offset, from),
        }
    }

    /// Transfers the rest of a request to a raw image.
    ///
    /// # Safety
    ///
    /// The vectors are slices of guest memory, mapped until this returns.
    pub(super) unsafe fn go_on(
        &self,
        write: bool,
        offset: u64,
        vectors: Vec<Vector>,
        done: usize,
    ) -> io::Result<()> {
        match self {
            // SAFETY: the caller's promise.
            Medium::Raw(image) => unsafe { image.go_on(write, offset, vectors, done) },
            Medium::Qcow2(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Punches a hole in a raw image.
    pub(super) fn discard_raw(&self, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Medium::Raw(image) => image.discard(Image::raw_extent(offset, len)?),
            Medium::Qcow2(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// The file of a raw image, whose requests a ring can do.
    pub(super) fn raw_file(&self) -> Option<&File> {
        match self {
            Medium::Raw(image) => Some(image.file()),
            Medium::Qcow2(_) => None,
        }
    }

    /// Forgets what is there, as far as it can.
    pub(super) fn discard(&mut self, extent: Extent) -> io::Result<()> {
        match self {
            Medium::Raw(image) => image.discard(Image::raw_extent(extent.offset, extent.len)?),
            Medium::Qcow2(image) => image.clear(extent.offset, extent.len, false),
        }
    }

    /// Writes zeros; `may_unmap` allows holes.
    pub(super) fn zero(&mut self, extent: Extent, may_unmap: bool) -> io::Result<()> {
        match self {
            Medium::Raw(image) => {
                image.zero(Image::raw_extent(extent.offset, extent.len)?, may_unmap)
            }
            Medium::Qcow2(image) => image.clear(extent.offset, extent.len, true),
        }
    }

    /// A bit for each block that holds anything.
    pub(super) fn allocated(&self) -> io::Result<Vec<u64>> {
        match self {
            Medium::Raw(image) => image.allocated(),
            Medium::Qcow2(_) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "only raw images move along",
            )),
        }
    }

    /// Everything written so far is on the medium afterwards.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        match self {
            Medium::Raw(image) => image.flush(),
            Medium::Qcow2(image) => image.flush(),
        }
    }

    /// Takes the image for this open file description, or fails at once.
    pub(super) fn lock(&mut self, shared: bool, name: &str) -> io::Result<()> {
        match self {
            Medium::Raw(image) => image.lock(shared, name),
            Medium::Qcow2(image) => image.lock(shared, name),
        }
    }

    pub(super) fn unlock(&mut self) -> io::Result<()> {
        match self {
            Medium::Raw(image) => image.unlock(),
            Medium::Qcow2(image) => image.unlock(),
        }
    }

    /// Looks how large the image is now.
    pub(super) fn look_at_size(&mut self) -> io::Result<()> {
        match self {
            Medium::Raw(image) => image.look_at_size(),
            Medium::Qcow2(_) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a qcow2 image is not resized while it is in use",
            )),
        }
    }
}

/// 1 GiB: 16,384 clusters of 64 KiB.
const QCOW2_CLEAR_MAX: u64 = (1 << 30) / SECTOR;
