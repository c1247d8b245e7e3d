//! A qcow2 image: the disk's clusters, found by two levels of tables, in one file.
//!
//! Nothing in the file is believed: every offset is checked before it is used, and what an image can get wrong costs its
//! own guest only. The order of writes keeps the image whole whenever the host stops: counts and data first, then, behind
//! a barrier, the tables that point to them; and a cluster that is given up is used again only when no table on the
//! medium points to it. At worst clusters are lost (`qemu-img check` calls them leaks).

mod header;
mod refcount;
mod tables;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::super::ring::Segments;
use super::image::{Image, SECTOR};

use self::header::{AUTOCLEAR, HEADER_MAX, Header, refuse};
use self::refcount::Refcounts;
use self::tables::{Place, Tables};

/// An image and what is known of it.
pub(super) struct Qcow2 {
    image: Image,
    writable: bool,
    header: Header,
    tables: Tables,
    refcounts: Refcounts,
    /// Clusters that are free once the tables are on the medium.
    given_up: Vec<u64>,
    /// A cluster unpacked, and where it was packed.
    unpacked: Option<(u64, Vec<u8>)>,
}

impl Qcow2 {
    /// Reads header and first table.
    pub(super) fn new(file: File, writable: bool) -> io::Result<Qcow2> {
        let image = Image::new(file)?;
        let header = read_header(&image, writable)?;
        Ok(Qcow2 {
            tables: Tables::load(&image, &header)?,
            refcounts: Refcounts::load(&image, &header, writable)?,
            image,
            writable,
            header,
            given_up: Vec::new(),
            unpacked: None,
        })
    }

    /// Sectors of the disk.
    pub(super) fn sectors(&self) -> u64 {
        self.header.size / SECTOR
    }

    /// Takes the lock, and looks at the image anew: until now it was somebody else's.
    pub(super) fn lock(&mut self, shared: bool, name: &str) -> io::Result<()> {
        self.image.lock(shared, name)?;
        let fresh = self.reload();
        if fresh.is_err() {
            let _ = self.image.unlock();
        }
        fresh
    }

    fn reload(&mut self) -> io::Result<()> {
        let header = read_header(&self.image, self.writable)?;
        if header.size != self.header.size {
            return Err(refuse("has changed its size since it was opened"));
        }
        self.tables = Tables::load(&self.image, &header)?;
        self.refcounts = Refcounts::load(&self.image, &header, self.writable)?;
        self.header = header;
        self.given_up.clear();
        self.unpacked = None;
        if self.writable && header.version == 3 {
            // Bitmaps and the like are out of date by the first write.
            self.image.file().write_all_at(&[0; 8], AUTOCLEAR)?;
        }
        Ok(())
    }

    /// Gives the lock up; what was written is on the medium.
    pub(super) fn unlock(&mut self) -> io::Result<()> {
        self.flush()?;
        self.image.unlock()
    }

    /// Fills guest memory from the disk. The range is within the disk.
    pub(super) fn read(&mut self, offset: u64, to: &Segments<'_>) -> io::Result<()> {
        self.each_cluster(offset, to.len() as u64, |this, piece| {
            let part = piece.of(to)?;
            match this.tables.find(&this.image, &this.header, piece.cluster)? {
                Place::Nothing | Place::Kept(_) => fill_zero(&part),
                Place::At(host) => this.read_file(host + piece.within, &part),
                Place::Packed(packed) => {
                    let whole = this.unpack(packed)?;
                    let from = usize::try_from(piece.within).ok();
                    let bytes = from.and_then(|from| whole.get(from..from + part.len()));
                    put(&part, bytes.unwrap_or_default())
                }
            }
        })
    }

    /// Writes guest memory to the disk. The range is within the disk.
    pub(super) fn write(&mut self, offset: u64, from: &Segments<'_>) -> io::Result<()> {
        self.each_cluster(offset, from.len() as u64, |this, piece| {
            let part = piece.of(from)?;
            let host = this.place_to_write(piece)?;
            let extent = Image::raw_extent(host + piece.within, part.len() as u64)?;
            this.image.write(extent, &part)
        })
    }

    /// Makes a range read as zeros, giving back the clusters that lie wholly in it. What is left of others is written,
    /// if it must be exact; else it stays.
    pub(super) fn clear(&mut self, offset: u64, len: u64, exact: bool) -> io::Result<()> {
        let (cluster, size) = (self.header.cluster(), self.header.size);
        self.each_cluster(offset, len, |this, piece| {
            let end = piece.cluster * cluster + piece.within + piece.len;
            let whole = piece.within == 0 && (piece.len == cluster || end == size);
            let place = this.tables.find(&this.image, &this.header, piece.cluster)?;
            match place {
                Place::Nothing => Ok(()),
                _ if whole => {
                    this.bound_memory()?;
                    this.give_up(place);
                    this.tables
                        .set(&this.image, &this.header, piece.cluster, Place::Nothing)
                }
                _ if exact => {
                    let host = this.place_to_write(piece)?;
                    let extent = Image::raw_extent(host + piece.within, piece.len)?;
                    this.image.zero(extent, false)
                }
                _ => Ok(()),
            }
        })
    }

    /// Everything written so far is on the medium afterwards, and found there.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.image.flush()?;
        let (image, header) = (&self.image, &self.header);
        self.tables
            .write_out(image, header, || self.refcounts.take(image, header))?;
        for place in std::mem::take(&mut self.given_up) {
            self.refcounts.release(&self.image, &self.header, place)?;
        }
        Ok(())
    }

    /// Where a piece may be written: its own cluster, or a new one that holds what the old one held beside the piece.
    fn place_to_write(&mut self, piece: Piece) -> io::Result<u64> {
        let place = self.tables.find(&self.image, &self.header, piece.cluster)?;
        if let Place::At(host) = place {
            return Ok(host);
        }
        self.bound_memory()?;
        let new = self.refcounts.take(&self.image, &self.header)?;
        if let Place::Packed(packed) = place {
            self.unpack(packed)?;
            let bytes = self.unpacked.as_ref().map(|(_, bytes)| bytes.as_slice());
            self.image
                .file()
                .write_all_at(bytes.unwrap_or_default(), new)?;
        }
        self.give_up(place);
        self.tables
            .set(&self.image, &self.header, piece.cluster, Place::At(new))?;
        Ok(new)
    }

    fn give_up(&mut self, place: Place) {
        let cluster = self.header.cluster();
        match place {
            Place::Nothing => {}
            Place::At(host) | Place::Kept(host) => self.given_up.push(host),
            // Packed clusters share: each that this one touches is used once less.
            Place::Packed(packed) => {
                let (first, last) = (
                    packed.offset / cluster,
                    (packed.offset + packed.len - 1) / cluster,
                );
                self.given_up.extend((first..=last).map(|n| n * cluster));
            }
        }
    }

    /// A guest that writes and discards without flushing is flushed for.
    fn bound_memory(&mut self) -> io::Result<()> {
        if self.given_up.len() >= GIVEN_UP_MAX || self.tables.is_full() {
            self.flush()?;
        }
        Ok(())
    }

    /// Reads the file; what lies behind its end is zero.
    fn read_file(&self, offset: u64, to: &Segments<'_>) -> io::Result<()> {
        let there = self.image.length()?.saturating_sub(offset);
        let len = to.len();
        let have = usize::try_from(there).unwrap_or(usize::MAX).min(len);
        let split = |from, count| to.range(from, count).ok_or_else(outside);
        self.image
            .read(Image::raw_extent(offset, have as u64)?, &split(0, have)?)?;
        fill_zero(&split(have, len - have)?)
    }

    /// The last cluster unpacked is kept: a reader comes for the rest of it.
    fn unpack(&mut self, packed: tables::Packed) -> io::Result<&[u8]> {
        let known = self
            .unpacked
            .as_ref()
            .is_some_and(|(at, _)| *at == packed.offset);
        if !known {
            self.unpacked = Some((packed.offset, self.unpack_anew(packed)?));
        }
        let bytes = self.unpacked.as_ref().map(|(_, bytes)| bytes.as_slice());
        Ok(bytes.unwrap_or_default())
    }

    fn unpack_anew(&self, packed: tables::Packed) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(packed.len).map_err(io::Error::other)?];
        let there = self.image.length()?.saturating_sub(packed.offset);
        let have = usize::try_from(there)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let read = bytes.get_mut(..have).unwrap_or_default();
        self.image.file().read_exact_at(read, packed.offset)?;
        let mut whole = vec![0; usize::try_from(self.header.cluster()).map_err(io::Error::other)?];
        tables::inflate(&bytes, &mut whole)?;
        Ok(whole)
    }

    fn each_cluster(
        &mut self,
        offset: u64,
        len: u64,
        mut work: impl FnMut(&mut Self, Piece) -> io::Result<()>,
    ) -> io::Result<()> {
        let (cluster, end) = (self.header.cluster(), offset.saturating_add(len));
        if end > self.header.size {
            return Err(outside());
        }
        let mut at = offset;
        while at < end {
            let within = at % cluster;
            let len = (cluster - within).min(end - at);
            let piece = Piece {
                cluster: at / cluster,
                within,
                len,
                from: at - offset,
            };
            work(self, piece)?;
            at += len;
        }
        Ok(())
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if self.writable
            && let Err(error) = self.flush()
        {
            tracing::warn!(%error, "a disk's tables could not be written; what was not flushed is lost");
        }
    }
}

/// What of a request lies in one cluster.
#[derive(Clone, Copy)]
struct Piece {
    /// Number of the cluster on the disk.
    cluster: u64,
    /// Where in it.
    within: u64,
    len: u64,
    /// Where in the request.
    from: u64,
}

impl Piece {
    fn of<'a>(self, all: &Segments<'a>) -> io::Result<Segments<'a>> {
        let range = usize::try_from(self.from)
            .ok()
            .zip(usize::try_from(self.len).ok());
        range
            .and_then(|(from, len)| all.range(from, len))
            .ok_or_else(outside)
    }
}

fn read_header(image: &Image, writable: bool) -> io::Result<Header> {
    let mut bytes = [0; HEADER_MAX];
    let count = image.file().read_at(&mut bytes, 0)?;
    Header::parse(bytes.get(..count).unwrap_or_default(), writable)
}

fn fill_zero(to: &Segments<'_>) -> io::Result<()> {
    let (zeros, mut done) = ([0; 4096], 0);
    while done < to.len() {
        let count = (to.len() - done).min(zeros.len());
        done += to.write_at(done, zeros.get(..count).unwrap_or_default());
    }
    Ok(())
}

fn put(to: &Segments<'_>, bytes: &[u8]) -> io::Result<()> {
    match to.write_at(0, bytes) == to.len() {
        true => Ok(()),
        false => Err(outside()),
    }
}

fn outside() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "a request reaches beyond the disk",
    )
}

/// Clusters given up and not yet free.
const GIVEN_UP_MAX: usize = 4096;

#[cfg(test)]
mod tests;
