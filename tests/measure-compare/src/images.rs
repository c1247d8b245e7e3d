//! Firmware images to measure: the public fixtures, and synthetic ones with the tables of OVMF.

use std::path::{Path, PathBuf};

/// A synthetic image: fill, SEV metadata, footer table.
#[derive(Debug, Clone)]
pub struct Image {
    /// Pages.
    pub pages: usize,
    /// Begins the fill.
    pub seed: u64,
    /// Where the other vCPUs begin.
    pub reset_eip: u32,
    /// Where kernel hashes go; 0 for nowhere.
    pub hash_table: u32,
    /// Address, length, kind of each metadata section.
    pub sections: Vec<(u32, u32, u32)>,
}

impl Image {
    /// The image's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut image = fill(self.pages * PAGE, self.seed);
        let metadata = self.metadata();
        let at = image.len() - PAGE + 64;
        image[at..at + metadata.len()].copy_from_slice(&metadata);
        let from_end = (image.len() - at) as u32;
        let mut table = Vec::new();
        entry(&mut table, RESET_BLOCK, &self.reset_eip.to_le_bytes());
        entry(&mut table, UNKNOWN, &[7; 11]);
        let area = [self.hash_table.to_le_bytes(), 0x400u32.to_le_bytes()].concat();
        entry(&mut table, HASH_TABLE, &area);
        entry(&mut table, METADATA, &from_end.to_le_bytes());
        let len = table.len() + 18;
        table.extend((len as u16).to_le_bytes());
        table.extend(hex(FOOTER));
        let end = image.len() - 32;
        image[end - table.len()..end].copy_from_slice(&table);
        image
    }

    fn metadata(&self) -> Vec<u8> {
        let mut raw = b"ASEV".to_vec();
        let count = self.sections.len() as u32;
        for word in [16 + 12 * count, 1, count] {
            raw.extend(word.to_le_bytes());
        }
        for (gpa, len, kind) in &self.sections {
            raw.extend(
                [*gpa, *len, *kind]
                    .iter()
                    .flat_map(|word| word.to_le_bytes()),
            );
        }
        raw
    }
}

/// The public fixture of that name: the last page of a real build.
pub fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(vectors().join(format!("ovmf_{name}_suffix.bin"))).unwrap()
}

/// A fixture below which lies as much fill as makes `pages`.
pub fn extended(name: &str, pages: usize, seed: u64) -> Vec<u8> {
    let suffix = fixture(name);
    let mut image = fill(pages * PAGE - suffix.len(), seed);
    image.extend(suffix);
    image
}

/// Fill that is not all the same and, like a real image, partly empty.
pub fn fill(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let page = match random.below(4) {
            0 => vec![0; PAGE],
            1 => vec![0xff; PAGE],
            _ => random.bytes(PAGE),
        };
        bytes.extend(page);
    }
    bytes.truncate(len);
    bytes
}

/// A repeatable sequence (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// One of these.
    pub fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    /// Bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.number().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../attest/tests/vectors/measurement")
}

fn entry(table: &mut Vec<u8>, guid: &str, content: &[u8]) {
    table.extend(content);
    table.extend((content.len() as u16 + 18).to_le_bytes());
    table.extend(hex(guid));
}

fn hex(digits: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    (0..digits.len()).step_by(2).map(byte).collect()
}

/// Bytes of a page.
pub const PAGE: usize = 4096;

// As they stand in an image: the first three groups little-endian.
const FOOTER: &str = "de82b596b21ff745baeaa366c55a082d";
const RESET_BLOCK: &str = "de71f7007e1acb4f890e68c77e2fb44e";
const HASH_TABLE: &str = "1f3755723b3a044b927b1da6efa8d454";
const METADATA: &str = "666588dc4a989847a75e5585a7bf67cc";
const UNKNOWN: &str = "00112233445566778899aabbccddeeff";
