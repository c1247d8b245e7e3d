//! Disks that move along: their blocks travel as pages do, at numbers behind all memory.
//!
//! Disk `n` of the plan has the pages from `(n + 1) << 34` on, far above what guest memory may have; so rounds, seals,
//! manifest and dirty bitmaps are the same for both, and the destination knows from the offer which disks come.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use casemate_crypto_migrate::guest::{Gpn, PAGE_SIZE, PageContent, PageRange};

use super::source::read_extents;
use crate::vmm::protocol::RoleError;

/// The page numbers of a disk.
pub fn range_of(disk: u8, pages: u64) -> PageRange {
    PageRange {
        start: Gpn((u64::from(disk) + 1) << DISK_SHIFT),
        count: pages,
    }
}

/// Whether a page is a disk's.
pub fn is_disk(page: Gpn) -> bool {
    page.0 >> DISK_SHIFT != 0
}

/// A disk that an offer brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfferedDisk {
    /// Its place in the plan.
    pub disk: u8,
    /// Its size.
    pub pages: u64,
}

/// Tells apart what an offer has of memory and of disks.
pub fn split(ranges: &[PageRange]) -> Result<(Vec<PageRange>, Vec<OfferedDisk>), RoleError> {
    let (disks, memory): (Vec<_>, Vec<_>) = ranges
        .iter()
        .copied()
        .partition(|range| is_disk(range.start));
    let disks = disks.iter().map(|range| {
        let disk = (range.start.0 >> DISK_SHIFT).checked_sub(1);
        let disk = disk.and_then(|disk| u8::try_from(disk).ok());
        match disk.filter(|disk| range_of(*disk, range.count) == *range) {
            Some(disk) if range.count < 1 << DISK_SHIFT => Ok(OfferedDisk {
                disk,
                pages: range.count,
            }),
            _ => Err(RoleError::new(
                "OFFER_MISMATCH",
                format!("no disk begins at page {:#x}", range.start.0),
            )),
        }
    });
    let disks = disks.collect::<Result<Vec<_>, _>>()?;
    if memory
        .iter()
        .any(|range| range.start.0.saturating_add(range.count) > 1 << DISK_SHIFT)
    {
        return Err(RoleError::new(
            "OFFER_MISMATCH",
            "memory reaches into the numbers of the disks",
        ));
    }
    Ok((memory, disks))
}

/// The images of the disks that move along.
#[derive(Default)]
pub struct Disks(Vec<DiskFile>);

struct DiskFile {
    disk: OfferedDisk,
    file: File,
    /// At the destination: blocks that were written at all. A new image is zero.
    written: Vec<u64>,
}

impl Disks {
    /// Joins the disks of an offer and their images, in the same order.
    pub fn new(disks: Vec<OfferedDisk>, files: Vec<OwnedFd>) -> Result<Self, RoleError> {
        if disks.len() != files.len() {
            return Err(RoleError::new(
                "ROLE_PROTOCOL",
                format!("{} images for {} disks", files.len(), disks.len()),
            ));
        }
        let join = |(disk, file): (OfferedDisk, OwnedFd)| DiskFile {
            disk,
            file: File::from(file),
            written: vec![0; usize::try_from(disk.pages.div_ceil(64)).unwrap_or(0)],
        };
        Ok(Self(disks.into_iter().zip(files).map(join).collect()))
    }

    /// Their pages.
    pub fn ranges(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.0
            .iter()
            .map(|one| range_of(one.disk.disk, one.disk.pages))
    }

    /// The disks.
    pub fn offered(&self) -> impl Iterator<Item = OfferedDisk> + '_ {
        self.0.iter().map(|one| one.disk)
    }

    /// Reads blocks that follow one another.
    pub fn read(&self, first: Gpn, into: &mut [u8]) -> Result<(), RoleError> {
        let (one, block) = self.find(first)?;
        let read = one.file.read_exact_at(into, block * PAGE_SIZE as u64);
        read.map_err(|e| {
            RoleError::new(
                "DISK_READ",
                format!("block {block} of disk {}: {e}", one.disk.disk),
            )
        })
    }

    /// Reads blocks (ascending) and passes them on as extents, those that are zero as such.
    pub fn read_extents(
        &self,
        pages: &[Gpn],
        emit: &mut dyn FnMut(Gpn, PageContent<'_>),
    ) -> Result<(), RoleError> {
        let read = |first: Gpn, data: &mut [u8]| self.read(first, data);
        read_extents(pages, read, emit)
    }

    /// Writes what arrived. Where nothing but zeros ever came, the image keeps its hole.
    pub fn write(&mut self, first: Gpn, content: PageContent<'_>) -> Result<(), RoleError> {
        let bytes = match content {
            PageContent::Data(bytes) if bytes.len().is_multiple_of(PAGE_SIZE) => bytes,
            PageContent::Zero => &ZEROES,
            _ => {
                return Err(RoleError::new(
                    "PAGE_KIND",
                    "a disk's blocks travel in clear",
                ));
            }
        };
        let zero = matches!(content, PageContent::Zero);
        let (one, block) = self.find_mut(first)?;
        let count = (bytes.len() / PAGE_SIZE) as u64;
        if block.saturating_add(count) > one.disk.pages {
            return Err(no_block(first));
        }
        if zero && !one.is_written(block) {
            return Ok(());
        }
        one.mark(block, count);
        let written = one.file.write_all_at(bytes, block * PAGE_SIZE as u64);
        written.map_err(|e| one.failed(&e))
    }

    /// What was written so far is on the medium afterwards.
    pub fn sync(&self) -> Result<(), RoleError> {
        let mut all = self.0.iter();
        all.try_for_each(|one| one.file.sync_data().map_err(|e| one.failed(&e)))
    }

    fn find(&self, page: Gpn) -> Result<(&DiskFile, u64), RoleError> {
        let found = self.0.iter().find_map(|one| Some((one, one.block(page)?)));
        found.ok_or_else(|| no_block(page))
    }

    fn find_mut(&mut self, page: Gpn) -> Result<(&mut DiskFile, u64), RoleError> {
        let found = self.0.iter_mut().find_map(|one| {
            let block = one.block(page)?;
            Some((one, block))
        });
        found.ok_or_else(|| no_block(page))
    }
}

impl DiskFile {
    fn block(&self, page: Gpn) -> Option<u64> {
        let start = range_of(self.disk.disk, self.disk.pages).start.0;
        page.0
            .checked_sub(start)
            .filter(|block| *block < self.disk.pages)
    }

    fn is_written(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64)
            .ok()
            .and_then(|word| self.written.get(word));
        word.is_none_or(|word| word & (1 << (block % 64)) != 0)
    }

    fn mark(&mut self, block: u64, count: u64) {
        for block in block..block + count {
            let word = usize::try_from(block / 64).ok();
            if let Some(word) = word.and_then(|word| self.written.get_mut(word)) {
                *word |= 1 << (block % 64);
            }
        }
    }

    fn failed(&self, error: &std::io::Error) -> RoleError {
        let disk = self.disk.disk;
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => RoleError::new(
                "DISK_FULL",
                format!("no room for disk {disk} here: {error}; make room, or choose another host"),
            ),
            _ => RoleError::new("DISK_WRITE", format!("disk {disk}: {error}")),
        }
    }
}

fn no_block(page: Gpn) -> RoleError {
    RoleError::new("BAD_DISK", format!("no disk has page {:#x}", page.0))
}

/// 64 TiB a disk; 31 of them below the engine's last page.
const DISK_SHIFT: u32 = 34;
const ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn disks(pages: &[u64]) -> (Disks, Vec<File>) {
        let files: Vec<File> = pages
            .iter()
            .map(|_| tempfile::tempfile().unwrap())
            .collect();
        let offered = (0u8..).zip(pages).map(|(disk, pages)| OfferedDisk {
            disk,
            pages: *pages,
        });
        for (file, pages) in files.iter().zip(pages) {
            file.set_len(pages * PAGE_SIZE as u64).unwrap();
        }
        let handles = files
            .iter()
            .map(|file| file.try_clone().unwrap().into())
            .collect();
        (Disks::new(offered.collect(), handles).unwrap(), files)
    }

    #[test]
    fn offers_are_split_and_odd_ones_refused() {
        let memory = PageRange {
            start: Gpn(0),
            count: 1 << 24,
        };
        let all = [memory, range_of(0, 5), range_of(3, 7)];
        let (found, disks) = split(&all).unwrap();
        assert_eq!(found, [memory]);
        let offered = |disk, pages| OfferedDisk { disk, pages };
        assert_eq!(disks, [offered(0, 5), offered(3, 7)]);
        for odd in [
            PageRange {
                start: Gpn((1 << DISK_SHIFT) + 1),
                count: 5,
            },
            PageRange {
                start: Gpn(1 << 43),
                count: 5,
            },
            PageRange {
                start: Gpn(1 << DISK_SHIFT),
                count: 1 << DISK_SHIFT,
            },
            PageRange {
                start: Gpn(7),
                count: 1 << DISK_SHIFT,
            },
        ] {
            assert_eq!(split(&[odd]).unwrap_err().code, "OFFER_MISMATCH", "{odd:?}");
        }
    }

    #[test]
    fn blocks_go_where_they_belong_and_holes_stay_holes() {
        let (mut to, files) = disks(&[64, 300]);
        let at = |disk, block| Gpn(range_of(disk, 1).start.0 + block);
        to.write(at(0, 62), PageContent::Data(&[7; 2 * PAGE_SIZE]))
            .unwrap();
        to.write(at(1, 299), PageContent::Data(&[9; PAGE_SIZE]))
            .unwrap();
        to.write(at(1, 5), PageContent::Zero).unwrap();
        assert_eq!(
            files[1].metadata().unwrap().blocks(),
            8,
            "a block of data, and holes"
        );
        let mut seen = [0; 2 * PAGE_SIZE];
        to.read(at(0, 62), &mut seen).unwrap();
        assert_eq!(seen, [7; 2 * PAGE_SIZE]);
        to.write(at(0, 63), PageContent::Zero).unwrap();
        to.read(at(0, 62), &mut seen).unwrap();
        assert_eq!(
            (seen[0], seen[PAGE_SIZE]),
            (7, 0),
            "what was written becomes zero again"
        );
        to.sync().unwrap();
    }

    #[test]
    fn nothing_is_written_beside_a_disk() {
        let (mut to, files) = disks(&[64]);
        let at = |disk, block| Gpn(range_of(disk, 1).start.0 + block);
        for (page, data) in [(at(0, 64), 1), (at(0, 63), 2), (at(1, 0), 1), (Gpn(3), 1)] {
            let bytes = vec![1; data * PAGE_SIZE];
            let refused = to.write(page, PageContent::Data(&bytes)).unwrap_err();
            assert_eq!(refused.code, "BAD_DISK");
        }
        let odd = to
            .write(at(0, 0), PageContent::Data(&[1; 100]))
            .unwrap_err();
        assert_eq!(odd.code, "PAGE_KIND");
        assert_eq!(files[0].metadata().unwrap().len(), 64 * PAGE_SIZE as u64);
        assert_eq!(files[0].metadata().unwrap().blocks(), 0);
        assert!(Disks::new(vec![OfferedDisk { disk: 0, pages: 1 }], Vec::new()).is_err());
    }

    #[test]
    fn extents_are_read_as_they_lie() {
        let (from, files) = disks(&[100]);
        files[0]
            .write_all_at(&[3; 3 * PAGE_SIZE], 4 * PAGE_SIZE as u64)
            .unwrap();
        let pages: Vec<Gpn> = [4, 5, 6, 7, 50]
            .map(|n| Gpn(range_of(0, 1).start.0 + n))
            .to_vec();
        let mut seen = Vec::new();
        let mut emit = |page: Gpn, content: PageContent<'_>| {
            let length = match content {
                PageContent::Data(bytes) => bytes.len() / PAGE_SIZE,
                _ => 0,
            };
            seen.push((page.0 & 0xff, length));
        };
        from.read_extents(&pages, &mut emit).unwrap();
        assert_eq!(seen, [(4, 3), (7, 0), (50, 0)]);
    }
}
