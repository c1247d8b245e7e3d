//! The hashes of kernel, initrd and command line that a host hands to the firmware, and which are
//! measured with it: so the digest covers what the firmware then loads and compares.
//!
//! The table is QEMU's (`target/i386/sev.c`), which edk2 reads.

use super::ovmf::{PAGE_LEN, Page, guid};
use ring::digest;
use std::io;

/// SHA-256 hashes of what is booted, as the firmware compares them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelHashes {
    /// The kernel file.
    pub kernel: [u8; 32],
    /// The initrd file; of nothing where there is none.
    pub initrd: [u8; 32],
    /// The command line with its terminating zero byte.
    pub cmdline: [u8; 32],
}

/// The hash and the length of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileHash {
    /// SHA-256 of the content.
    pub sha256: [u8; 32],
    /// Length in bytes.
    pub len: u64,
}

impl KernelHashes {
    /// The hashes of a boot: no initrd and no command line count as empty ones.
    pub fn new(kernel: &FileHash, initrd: Option<&FileHash>, cmdline: Option<&str>) -> Self {
        Self {
            kernel: kernel.sha256,
            initrd: initrd.map_or_else(|| sha256(&[]), |initrd| initrd.sha256),
            cmdline: cmdline_hash(cmdline.unwrap_or_default()),
        }
    }

    /// The table, padded to whole 16-byte blocks as QEMU loads it.
    pub fn table(&self) -> [u8; TABLE_LEN] {
        let entries = [
            (CMDLINE_GUID, &self.cmdline),
            (INITRD_GUID, &self.initrd),
            (KERNEL_GUID, &self.kernel),
        ];
        let mut content = Vec::with_capacity(TABLE_LEN);
        content.extend(TABLE_GUID);
        content.extend(UNPADDED_LEN.to_le_bytes());
        for (guid, hash) in entries {
            content.extend(guid);
            content.extend(ENTRY_LEN.to_le_bytes());
            content.extend(hash);
        }
        let mut table = [0; TABLE_LEN];
        for (to, from) in table.iter_mut().zip(content) {
            *to = from;
        }
        table
    }

    /// The page with the table at `offset`, zero elsewhere; `None` where the table would leave it.
    pub fn page(&self, offset: usize) -> Option<Page> {
        let mut page = [0; PAGE_LEN];
        let end = offset.checked_add(TABLE_LEN)?;
        page.get_mut(offset..end)?.copy_from_slice(&self.table());
        Some(page)
    }
}

impl FileHash {
    /// Hashes all that `source` gives, in pieces of [`PIECE_LEN`] bytes. More than `max` bytes
    /// are an error.
    pub fn read(source: &mut impl io::Read, max: u64) -> io::Result<Self> {
        let mut context = digest::Context::new(&digest::SHA256);
        let mut piece = vec![0; PIECE_LEN];
        let mut len = 0u64;
        loop {
            let count = match source.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            len = len.saturating_add(count as u64);
            if len > max {
                let text = format!("longer than {max} bytes");
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
            }
            context.update(piece.get(..count).unwrap_or_default());
        }
        Ok(Self {
            sha256: array(context.finish()),
            len,
        })
    }

    /// Hashes bytes at hand.
    pub fn of(content: &[u8]) -> Self {
        Self {
            sha256: sha256(content),
            len: content.len() as u64,
        }
    }
}

/// SHA-256 of a command line as it is measured: with a terminating zero byte.
pub fn cmdline_hash(cmdline: &str) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(cmdline.as_bytes());
    context.update(&[0]);
    array(context.finish())
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    array(digest::digest(&digest::SHA256, bytes))
}

fn array(digest: digest::Digest) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.as_ref());
    bytes
}

/// The padded table, in bytes.
pub const TABLE_LEN: usize = 176;
/// How much of a file is in memory at a time, in bytes.
pub const PIECE_LEN: usize = 256 << 10;

const UNPADDED_LEN: u16 = 168;
const ENTRY_LEN: u16 = 50;

// 9438d606-4f22-4cc9-b479-a793d411fd21
const TABLE_GUID: [u8; 16] = guid(
    0x9438_d606,
    0x4f22,
    0x4cc9,
    [0xb4, 0x79, 0xa7, 0x93, 0xd4, 0x11, 0xfd, 0x21],
);
// 4de79437-abd2-427f-b835-d5b172d2045b
const KERNEL_GUID: [u8; 16] = guid(
    0x4de7_9437,
    0xabd2,
    0x427f,
    [0xb8, 0x35, 0xd5, 0xb1, 0x72, 0xd2, 0x04, 0x5b],
);
// 44baf731-3a2f-4bd7-9af1-41e29169781d
const INITRD_GUID: [u8; 16] = guid(
    0x44ba_f731,
    0x3a2f,
    0x4bd7,
    [0x9a, 0xf1, 0x41, 0xe2, 0x91, 0x69, 0x78, 0x1d],
);
// 97d02dd8-bd20-4c94-aa78-e7714d36ab2a
const CMDLINE_GUID: [u8; 16] = guid(
    0x97d0_2dd8,
    0xbd20,
    0x4c94,
    [0xaa, 0x78, 0xe7, 0x71, 0x4d, 0x36, 0xab, 0x2a],
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_three_entries_and_padding() {
        let hashes = KernelHashes::new(&FileHash::of(b"kernel"), None, Some("ro"));
        let table = hashes.table();
        assert_eq!(u16::from_le_bytes([table[16], table[17]]), 168);
        assert_eq!(table[36..68], sha256(b"ro\0"));
        assert_eq!(table[86..118], sha256(b""));
        assert_eq!(table[136..168], sha256(b"kernel"));
        assert_eq!(table[168..], [0; 8]);
    }

    #[test]
    fn no_command_line_is_an_empty_one_and_the_page_ends_where_it_ends() {
        let kernel = FileHash::of(b"kernel");
        let hashes = KernelHashes::new(&kernel, None, None);
        assert_eq!(
            hashes,
            KernelHashes::new(&kernel, Some(&FileHash::of(b"")), Some(""))
        );
        let page = hashes.page(0xc00).unwrap();
        assert_eq!(page[0xc00..0xc00 + TABLE_LEN], hashes.table());
        assert!(page[..0xc00].iter().all(|byte| *byte == 0));
        assert!(hashes.page(PAGE_LEN - TABLE_LEN).is_some());
        assert!(hashes.page(PAGE_LEN - TABLE_LEN + 1).is_none());
        assert!(hashes.page(usize::MAX).is_none());
    }

    #[test]
    fn files_are_hashed_in_pieces_and_have_an_end() {
        let content = vec![7; PIECE_LEN * 2 + 5];
        let hash = FileHash::read(&mut content.as_slice(), content.len() as u64).unwrap();
        assert_eq!(hash, FileHash::of(&content));
        let error = FileHash::read(&mut content.as_slice(), content.len() as u64 - 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert!(FileHash::read(&mut io::repeat(0), 1 << 20).is_err());
    }
}
