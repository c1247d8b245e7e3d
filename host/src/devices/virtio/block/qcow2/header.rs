//! The header of a qcow2 image (QEMU's `docs/interop/qcow2.txt`). The file is somebody's: every number is bounded before it is
//! used, and what this reader does not know how to honour is refused.

use std::io;

/// What the header says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Size of the disk in bytes, a multiple of 512.
    pub(super) size: u64,
    pub(super) l1_entries: u64,
    pub(super) l1_offset: u64,
    pub(super) refcount_offset: u64,
    pub(super) refcount_clusters: u64,
}

impl Header {
    /// Reads the first bytes of a file, all that there are up to [`HEADER_MAX`].
    pub(super) fn parse(bytes: &[u8], writable: bool) -> io::Result<Header> {
        let word = |at: usize| -> Option<u32> {
            let bytes = bytes.get(at..at.checked_add(4)?)?;
            Some(u32::from_be_bytes(bytes.try_into().ok()?))
        };
        let wide = |at| Some(u64::from(word(at)?) << 32 | u64::from(word(at + 4)?));
        let short = || refuse("is too short for a qcow2 image");
        let want = |at| word(at).ok_or_else(short);
        let want_wide = |at| wide(at).ok_or_else(short);
        if want(0)? != MAGIC {
            return Err(refuse(
                "is no qcow2 image; leave `format` out for a raw one",
            ));
        }
        let version = want(4)?;
        if !(2..=3).contains(&version) {
            return Err(refuse(&format!(
                "is qcow2 version {version}; 2 and 3 are read"
            )));
        }
        let header = Header {
            version,
            cluster_bits: want(20)?,
            size: want_wide(24)?,
            l1_entries: want(36)?.into(),
            l1_offset: want_wide(40)?,
            refcount_offset: want_wide(48)?,
            refcount_clusters: want(56)?.into(),
        };
        if want_wide(8)? != 0 {
            return Err(refuse(
                "has a backing file, whose path a guest's VMM does not follow; `qemu-img convert` makes it whole",
            ));
        }
        if want(32)? != 0 {
            return Err(refuse(
                "is encrypted by QEMU; let the guest encrypt its disk itself",
            ));
        }
        let snapshots = want(60)?;
        if writable && snapshots != 0 {
            return Err(refuse(
                "has internal snapshots, which only `read_only` disks may; `qemu-img convert` leaves them out",
            ));
        }
        let mut refcount_order = 4;
        if version == 3 {
            check_features(want_wide(72)?, writable)?;
            refcount_order = want(96)?;
            // The compression type follows where the header is long enough; 0 is zlib.
            if want(100)? > 104 && bytes.get(104).is_some_and(|kind| *kind != 0) {
                return Err(refuse(
                    "is compressed by another method than zlib; `qemu-img convert` without `compression_type`",
                ));
            }
        }
        header.check(writable, refcount_order)?;
        Ok(header)
    }

    fn check(&self, writable: bool, refcount_order: u32) -> io::Result<()> {
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(refuse("has clusters that are not of 512 bytes to 2 MiB"));
        }
        if !self.size.is_multiple_of(512) || !(512..=SIZE_MAX).contains(&self.size) {
            return Err(refuse(
                "is of a size that no disk here has: a multiple of 512 up to 8 TiB",
            ));
        }
        let cluster = self.cluster();
        let covered = cluster * self.l2_entries();
        if self.l1_entries > L1_MAX || self.l1_entries * covered < self.size {
            return Err(refuse(
                "has a first table that is too long or too short for its size",
            ));
        }
        let aligned = [self.l1_offset, self.refcount_offset];
        if aligned
            .iter()
            .any(|at| *at == 0 || !at.is_multiple_of(cluster) || *at > OFFSET_MAX)
        {
            return Err(refuse("has tables that do not begin where a cluster does"));
        }
        if writable && (refcount_order != 4 || self.cluster_bits < 16) {
            return Err(refuse(
                "cannot be written to: its clusters are smaller than 64 KiB, or its reference counts not of 16 bits; `qemu-img convert` makes it so",
            ));
        }
        if writable && !(1..=REFCOUNT_CLUSTERS_MAX).contains(&self.refcount_clusters) {
            return Err(refuse(
                "has a table of reference counts that is too long or missing",
            ));
        }
        Ok(())
    }

    /// Bytes in a cluster.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries in a second table: one cluster of them.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster() / 8
    }

    /// Reference counts in a block of them.
    pub(super) fn refcounts(&self) -> u64 {
        self.cluster() / 2
    }
}

fn check_features(incompatible: u64, writable: bool) -> io::Result<()> {
    if incompatible & CORRUPT != 0 {
        return Err(refuse(
            "is marked as corrupt; `qemu-img check -r all` may mend it",
        ));
    }
    if incompatible & DIRTY != 0 && writable {
        return Err(refuse(
            "was not closed by who wrote to it last; `qemu-img check -r all` mends its counts",
        ));
    }
    if incompatible & !(DIRTY | COMPRESSION) != 0 {
        return Err(refuse(&format!(
            "needs what is not supported here (incompatible features {incompatible:#x}: data in another file, extended tables, or newer); `qemu-img convert` leaves them out"
        )));
    }
    Ok(())
}

/// An error that says what is wrong with the image.
pub(super) fn refuse(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the image {what}"))
}

/// As much as is read of a header.
pub(super) const HEADER_MAX: usize = 112;
/// Where version 3 keeps the features that a writer that does not know them must clear.
pub(super) const AUTOCLEAR: u64 = 88;
/// A file offset in a table: 56 bits in all.
pub(super) const OFFSET_MAX: u64 = (1 << 56) - 1;
/// 8 TiB: with clusters of 64 KiB, one cluster of a table of counts is enough for twice that.
const SIZE_MAX: u64 = 8 << 40;
/// 1 MiB of table: 8 TiB in clusters of 64 KiB have 16,384 entries, 4 GiB in clusters of 512 bytes all of these.
const L1_MAX: u64 = 1 << 17;
const REFCOUNT_CLUSTERS_MAX: u64 = 16;
const MAGIC: u32 = 0x5146_49fb;
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const COMPRESSION: u64 = 1 << 3;

#[cfg(test)]
mod tests {
    use super::*;

    /// A header that is good, as bytes.
    fn bytes() -> Vec<u8> {
        let mut bytes = vec![0; HEADER_MAX];
        for (at, value) in [
            (0, MAGIC),
            (4, 3),
            (20, 16),
            (28, 1 << 20),
            (36, 1),
            (44, 0x3_0000),
            (52, 0x1_0000),
            (56, 1),
            (96, 4),
            (100, 112),
        ] {
            bytes[at..at + 4].copy_from_slice(&u32::to_be_bytes(value));
        }
        bytes
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_and_says_why() {
        let header = Header::parse(&bytes(), true).unwrap();
        assert_eq!(
            (header.size, header.cluster(), header.version),
            (1 << 20, 1 << 16, 3)
        );
        for (at, byte, writable, words) in [
            (0, 0, false, "no qcow2 image"),
            (7, 4, false, "version 4"),
            (15, 1, false, "backing file"),
            (35, 2, false, "encrypted"),
            (63, 1, true, "snapshots"),
            (79, 1, true, "not closed"),
            (79, 2, false, "corrupt"),
            (79, 4, false, "not supported"),
            (79, 16, false, "not supported"),
            (72, 1, false, "not supported"),
            (104, 1, false, "zlib"),
            (23, 8, false, "512 bytes to 2 MiB"),
            (23, 22, false, "512 bytes to 2 MiB"),
            (23, 255, false, "512 bytes to 2 MiB"),
            (31, 1, false, "multiple of 512"),
            (24, 1, false, "up to 8 TiB"),
            (39, 0, false, "first table"),
            (36, 1, false, "first table"),
            (47, 1, false, "begin where"),
            (45, 0, false, "begin where"),
            (48, 1, false, "begin where"),
            (23, 12, true, "smaller than 64 KiB"),
            (99, 3, true, "16 bits"),
            (59, 0, true, "missing"),
            (59, 17, true, "too long"),
        ] {
            let mut bad = bytes();
            bad[at] = byte;
            let error = Header::parse(&bad, writable).unwrap_err().to_string();
            assert!(error.contains(words), "byte {at} = {byte}: {error}");
        }
        for (at, byte) in [(63, 1), (79, 1), (99, 3), (59, 0)] {
            let mut readable = bytes();
            readable[at] = byte;
            Header::parse(&readable, false).unwrap();
        }
        for length in [0, 3, 40, 71, 99] {
            assert!(
                Header::parse(&bytes()[..length], false).is_err(),
                "{length}"
            );
        }
    }
}
