//! The two levels of tables that say where a cluster is, and packed clusters.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use super::super::image::Image;
use super::header::{Header, OFFSET_MAX, refuse};

/// Where a cluster of the disk is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere: it reads as zeros.
    Nothing,
    /// At this offset, and used once.
    At(u64),
    /// Compressed.
    Packed(Packed),
    /// It reads as zeros, and QEMU keeps a cluster for it.
    Kept(u64),
}

/// A compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packed {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// The first table whole, and some of the second ones.
pub(super) struct Tables {
    first: Vec<u64>,
    first_changed: bool,
    /// By their number in the first table.
    second: BTreeMap<u64, Second>,
    /// For the choice of which to forget.
    clock: u64,
    most: usize,
}

struct Second {
    entries: Vec<u64>,
    changed: bool,
    used: u64,
}

impl Tables {
    pub(super) fn load(image: &Image, header: &Header) -> io::Result<Tables> {
        let first = read_table(image, header.l1_offset, header.l1_entries)?;
        let most = CACHE / usize::try_from(header.cluster()).unwrap_or(CACHE);
        Ok(Tables {
            first,
            first_changed: false,
            second: BTreeMap::new(),
            clock: 0,
            most: most.max(2),
        })
    }

    /// Where a cluster is.
    pub(super) fn find(
        &mut self,
        image: &Image,
        header: &Header,
        cluster: u64,
    ) -> io::Result<Place> {
        let (number, index) = (cluster / header.l2_entries(), cluster % header.l2_entries());
        match self.second(image, header, number)? {
            None => Ok(Place::Nothing),
            Some(second) => {
                let entry = usize::try_from(index)
                    .ok()
                    .and_then(|i| second.entries.get(i));
                parse(entry.copied().unwrap_or(0), header)
            }
        }
    }

    /// Says where a cluster is from now on. A new second table gets its place in the file only by
    /// [`Tables::write_out`].
    pub(super) fn set(
        &mut self,
        image: &Image,
        header: &Header,
        cluster: u64,
        place: Place,
    ) -> io::Result<()> {
        let (number, index) = (cluster / header.l2_entries(), cluster % header.l2_entries());
        if self.second(image, header, number)?.is_none() {
            let entries = vec![0; usize::try_from(header.l2_entries()).map_err(io::Error::other)?];
            self.clock += 1;
            let used = self.clock;
            self.second.insert(
                number,
                Second {
                    entries,
                    changed: false,
                    used,
                },
            );
        }
        let second = self.second.get_mut(&number);
        let index = usize::try_from(index).map_err(io::Error::other)?;
        let entry = second.and_then(|second| {
            second.changed = true;
            second.entries.get_mut(index)
        });
        if let Some(entry) = entry {
            *entry = match place {
                Place::At(host) => host | COPIED,
                // Without a backing file nothing reads as zeros, and needs no flag.
                Place::Nothing | Place::Packed(_) | Place::Kept(_) => 0,
            };
        }
        Ok(())
    }

    /// Whether changed tables fill the memory there is for them.
    pub(super) fn is_full(&self) -> bool {
        self.second.values().filter(|second| second.changed).count() + 1 >= self.most
    }

    /// Writes the changed tables, then the first one where it changed. `take` gives clusters for new tables.
    pub(super) fn write_out(
        &mut self,
        image: &Image,
        header: &Header,
        mut take: impl FnMut() -> io::Result<u64>,
    ) -> io::Result<()> {
        let changed = self.second.iter_mut().filter(|(_, second)| second.changed);
        let mut any = false;
        for (number, second) in changed {
            let slot = usize::try_from(*number)
                .ok()
                .and_then(|n| self.first.get_mut(n));
            let slot = slot.ok_or_else(|| refuse("has no place for a table"))?;
            if *slot & OFFSET == 0 {
                *slot = take()? | COPIED;
                self.first_changed = true;
            }
            let bytes: Vec<u8> = second
                .entries
                .iter()
                .flat_map(|e| e.to_be_bytes())
                .collect();
            image.file().write_all_at(&bytes, *slot & OFFSET)?;
            second.changed = false;
            any = true;
        }
        if self.first_changed {
            image.flush()?;
            let bytes: Vec<u8> = self.first.iter().flat_map(|e| e.to_be_bytes()).collect();
            image.file().write_all_at(&bytes, header.l1_offset)?;
            self.first_changed = false;
        }
        if any { image.flush() } else { Ok(()) }
    }

    fn second(
        &mut self,
        image: &Image,
        header: &Header,
        number: u64,
    ) -> io::Result<Option<&mut Second>> {
        self.clock += 1;
        if !self.second.contains_key(&number) {
            let slot = usize::try_from(number).ok().and_then(|n| self.first.get(n));
            let offset = slot.ok_or_else(|| refuse("has no table for a cluster"))? & OFFSET;
            if offset == 0 {
                return Ok(None);
            }
            check_offset(offset, header)?;
            let entries = read_table(image, offset, header.l2_entries())?;
            self.make_room();
            self.second.insert(
                number,
                Second {
                    entries,
                    changed: false,
                    used: 0,
                },
            );
        }
        let used = self.clock;
        let mut second = self.second.get_mut(&number);
        if let Some(second) = &mut second {
            second.used = used;
        }
        Ok(second)
    }

    /// Forgets the table that was not used for the longest time; changed ones stay.
    fn make_room(&mut self) {
        while self.second.len() >= self.most {
            let clean = self.second.iter().filter(|(_, second)| !second.changed);
            match clean.min_by_key(|(_, second)| second.used).map(|(n, _)| *n) {
                Some(oldest) => self.second.remove(&oldest),
                None => return,
            };
        }
    }
}

fn parse(entry: u64, header: &Header) -> io::Result<Place> {
    if entry & PACKED != 0 {
        let bits = 62 - (header.cluster_bits - 8);
        let offset = entry & ((1 << bits) - 1) & OFFSET_MAX;
        let sectors = (entry & (PACKED - 1)) >> bits;
        let len = (sectors + 1) * 512 - offset % 512;
        return Ok(Place::Packed(Packed { offset, len }));
    }
    let host = entry & OFFSET;
    check_offset(host, header)?;
    Ok(match (host, header.version == 3 && entry & ZERO != 0) {
        (0, _) => Place::Nothing,
        (_, true) => Place::Kept(host),
        (_, false) => Place::At(host),
    })
}

fn check_offset(offset: u64, header: &Header) -> io::Result<()> {
    match offset.is_multiple_of(header.cluster()) {
        true => Ok(()),
        false => Err(refuse(
            "has a table that points into the middle of a cluster",
        )),
    }
}

fn read_table(image: &Image, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
    let entries = usize::try_from(entries).map_err(io::Error::other)?;
    let mut bytes = vec![0; entries * 8];
    let read = image.file().read_exact_at(&mut bytes, offset);
    read.map_err(|e| {
        refuse(&format!(
            "has a table at {offset:#x} that cannot be read: {e}"
        ))
    })?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok(words.iter().map(|word| u64::from_be_bytes(*word)).collect())
}

/// Unpacks a raw deflate stream, which must fill the cluster.
pub(super) fn inflate(packed: &[u8], whole: &mut [u8]) -> io::Result<()> {
    let mut state = Box::<DecompressorOxide>::default();
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, _, count) = decompress(&mut state, packed, whole, 0, flags);
    match status {
        TINFLStatus::Done | TINFLStatus::HasMoreOutput if count == whole.len() => Ok(()),
        _ => Err(refuse("has a compressed cluster that cannot be unpacked")),
    }
}

/// Memory for second tables, in bytes.
const CACHE: usize = 1 << 20;
/// Bits 9 to 55: where a table or a cluster is.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Used once: it may be written in place.
const COPIED: u64 = 1 << 63;
const PACKED: u64 = 1 << 62;
const ZERO: u64 = 1;
