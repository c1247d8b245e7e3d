//! Reference counts: which clusters of the file are used. New ones come from those given up, then from the file's end.

use std::io;
use std::os::unix::fs::FileExt;

use super::super::image::Image;
use super::header::{Header, OFFSET_MAX, refuse};

/// The table of blocks of counts, and what is free.
pub(super) struct Refcounts {
    blocks: Vec<u64>,
    /// Clusters that were given up and read as zeros.
    free: Vec<u64>,
    /// The next cluster at the file's end, as an offset.
    end: u64,
}

impl Refcounts {
    /// Reads the table of an image that will be written to.
    pub(super) fn load(image: &Image, header: &Header, writable: bool) -> io::Result<Refcounts> {
        let mut blocks = Vec::new();
        if writable {
            let clusters = usize::try_from(header.refcount_clusters).map_err(io::Error::other)?;
            let cluster = usize::try_from(header.cluster()).map_err(io::Error::other)?;
            let mut bytes = vec![0; clusters * cluster];
            image
                .file()
                .read_exact_at(&mut bytes, header.refcount_offset)?;
            let (words, _) = bytes.as_chunks::<8>();
            blocks = words.iter().map(|word| u64::from_be_bytes(*word)).collect();
            // Only those that cover what there may be of a file.
            let used = blocks
                .iter()
                .rposition(|block| *block != 0)
                .map_or(0, |last| last + 1);
            blocks.truncate(used.max(1));
            let bad = |block: &u64| !block.is_multiple_of(header.cluster()) || *block > OFFSET_MAX;
            if blocks.iter().any(bad) {
                return Err(refuse(
                    "has a table of reference counts that points nowhere",
                ));
            }
        }
        Ok(Refcounts {
            blocks,
            free: Vec::new(),
            end: image.length()?.next_multiple_of(header.cluster()),
        })
    }

    /// A cluster that reads as zeros, counted once.
    pub(super) fn take(&mut self, image: &Image, header: &Header) -> io::Result<u64> {
        if let Some(offset) = self.free.pop() {
            self.change(image, header, offset, |count| (count == 0).then_some(1))?;
            return Ok(offset);
        }
        let mut offset = self.end;
        if self.block(header, offset)?.0 == 0 {
            self.new_block(image, header, offset)?;
            offset += header.cluster();
        }
        self.change(image, header, offset, |count| (count == 0).then_some(1))?;
        // The file reaches to the end of its last cluster.
        image
            .file()
            .write_all_at(&[0], offset + header.cluster() - 1)?;
        self.end = offset + header.cluster();
        Ok(offset)
    }

    /// A cluster is used once less; when nobody uses it, its storage goes back to the file system.
    pub(super) fn release(
        &mut self,
        image: &Image,
        header: &Header,
        offset: u64,
    ) -> io::Result<()> {
        let left = self.change(image, header, offset, |count| count.checked_sub(1))?;
        if left == 0
            && image
                .discard(Image::raw_extent(offset, header.cluster())?)
                .is_ok()
            && self.free.len() < FREE_MAX
        {
            self.free.push(offset);
        }
        Ok(())
    }

    /// A block of counts at `offset`, which counts itself.
    fn new_block(&mut self, image: &Image, header: &Header, offset: u64) -> io::Result<()> {
        let number = offset / header.cluster() / header.refcounts();
        let table = header.refcount_clusters * header.cluster() / 8;
        if number >= table {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "the image's table of reference counts is full; `qemu-img convert` makes a longer one",
            ));
        }
        let mut block = vec![0; usize::try_from(header.cluster()).map_err(io::Error::other)?];
        let own = usize::try_from(offset / header.cluster() % header.refcounts() * 2);
        if let Some(count) = own.ok().and_then(|at| block.get_mut(at + 1)) {
            *count = 1;
        }
        image.file().write_all_at(&block, offset)?;
        image.flush()?;
        let entry = header.refcount_offset + number * 8;
        image.file().write_all_at(&offset.to_be_bytes(), entry)?;
        let number = usize::try_from(number).map_err(io::Error::other)?;
        if self.blocks.len() <= number {
            self.blocks.resize(number + 1, 0);
        }
        if let Some(slot) = self.blocks.get_mut(number) {
            *slot = offset;
        }
        self.end = offset + header.cluster();
        Ok(())
    }

    /// Changes the count of a cluster; nothing means that the image is wrong about it.
    fn change(
        &self,
        image: &Image,
        header: &Header,
        offset: u64,
        change: impl Fn(u16) -> Option<u16>,
    ) -> io::Result<u16> {
        let (block, index) = self.block(header, offset)?;
        if block == 0 {
            return Err(refuse("uses a cluster that it does not count"));
        }
        let at = block + index * 2;
        let mut bytes = [0; 2];
        image.file().read_exact_at(&mut bytes, at)?;
        let new = change(u16::from_be_bytes(bytes)).ok_or_else(|| {
            refuse("counts a cluster wrongly; `qemu-img check -r all` may mend it")
        })?;
        image.file().write_all_at(&new.to_be_bytes(), at)?;
        Ok(new)
    }

    /// The block that counts a cluster, 0 if there is none, and the count's number in it.
    fn block(&self, header: &Header, offset: u64) -> io::Result<(u64, u64)> {
        let number = offset / header.cluster();
        let block = usize::try_from(number / header.refcounts()).map_err(io::Error::other)?;
        let block = self.blocks.get(block).copied().unwrap_or(0);
        Ok((block, number % header.refcounts()))
    }
}

/// Clusters that are kept in mind for use again; others are found free by nobody until `qemu-img` looks.
const FREE_MAX: usize = 1 << 16;
