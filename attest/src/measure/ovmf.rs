//! OVMF images: where an SEV guest's firmware says what it needs.
//!
//! A table of GUIDed entries ends 32 bytes before the end of the image and is read backwards. One
//! entry names the reset vector of the other vCPUs, one the place of the kernel hashes, one the
//! metadata: pages that the host must prepare. Formats: edk2's `OvmfPkg/ResetVector`.
//!
//! An image may come from anybody, so every length and place in it is checked against the image
//! and against its neighbours before it is used: what is ambiguous is refused.

use crate::bytes;
use std::fmt;

/// The largest image that is read, in bytes.
pub const MAX_OVMF_LEN: usize = 64 << 20;
/// The size of a page, in bytes.
pub const PAGE_LEN: usize = 4096;
/// One page.
pub type Page = [u8; PAGE_LEN];

/// A firmware image whose tables are well formed. It lies just below 4 GiB.
#[derive(Clone)]
pub struct Ovmf<'a> {
    image: &'a [u8],
    reset_eip: Option<u32>,
    hash_table: Option<HashTableArea>,
    launch_secret: Option<SecretArea>,
    sections: Vec<Section>,
}

/// Where the firmware looks for the hashes of kernel, initrd and command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashTableArea {
    /// Guest physical address, not 0.
    pub gpa: u32,
    /// Its length in bytes, where the image says so.
    pub len: Option<u32>,
}

/// Where the firmware looks for a launch secret of SEV and SEV-ES.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SecretArea {
    /// Guest physical address, not 0.
    pub gpa: u32,
    /// Its length in bytes, not 0.
    pub len: u32,
}

/// Pages that the firmware wants prepared, from its SEV metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// Guest physical address of the first page.
    pub gpa: u32,
    /// Length in bytes: whole pages, at least one.
    pub len: u32,
    /// What for.
    pub kind: SectionKind,
}

/// What a [`Section`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SectionKind {
    /// Memory that the firmware uses before it accepts memory itself (1).
    SecMem,
    /// The SNP secrets page (2).
    Secrets,
    /// The SNP CPUID page (3).
    Cpuid,
    /// The calling area of an SVSM (4).
    SvsmCaa,
    /// The page of the kernel hashes (0x10).
    KernelHashes,
    /// A kind that is not known here.
    Unknown(u32),
}

/// Why an image is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OvmfError {
    /// Empty, too large, or not whole pages.
    #[error(
        "an OVMF image is whole pages of {PAGE_LEN} bytes, at most {MAX_OVMF_LEN} bytes in all; this has \
         {0} bytes: give the combined or the CODE image as the VMM loads it"
    )]
    Length(usize),
    /// The footer table does not lie within the image.
    #[error("the footer table says that it has {0} bytes, which the image does not hold")]
    TableLength(u16),
    /// An entry is shorter than its header or longer than what is left of the table.
    #[error("a footer table entry has {found} bytes where 18 to {left} fit")]
    EntryLength {
        /// What the entry says.
        found: u16,
        /// What is left of the table.
        left: usize,
    },
    /// An entry that counts is there twice.
    #[error("the footer table has two {0} entries")]
    Duplicate(&'static str),
    /// An entry's content is too short.
    #[error("the footer table's {0} entry is too short")]
    ShortEntry(&'static str),
    /// The metadata do not lie within the image.
    #[error("the SEV metadata at {0} bytes before the image's end do not lie within it")]
    MetadataPlace(u32),
    /// The metadata are not what they should be.
    #[error("no SEV metadata (ASEV, version 1) where the footer table says they are")]
    MetadataHeader,
    /// The metadata's count and length do not go together, or the count is out of bounds.
    #[error("SEV metadata of {len} bytes cannot hold {count} sections; at most {MAX_SECTIONS}")]
    MetadataCount {
        /// Sections, as the header says.
        count: u32,
        /// Bytes, as the header says.
        len: u32,
    },
    /// A section is not whole pages below 4 GiB.
    #[error("the section of {len:#x} bytes at {gpa:#x} is not whole pages below 4 GiB")]
    SectionPlace {
        /// Its address.
        gpa: u32,
        /// Its length.
        len: u32,
    },
    /// A secrets or CPUID section is not one page.
    #[error("the {kind} section at {gpa:#x} is not one page")]
    SectionLength {
        /// Which kind.
        kind: SectionKind,
        /// Its address.
        gpa: u32,
    },
    /// Two sections, or a section and the image, share pages.
    #[error("two things want the page at {0:#x}; no host can launch that")]
    Overlap(u32),
}

impl<'a> Ovmf<'a> {
    /// Reads the tables of an image. An image without a footer table is one without SEV support,
    /// and parses.
    pub fn parse(image: &'a [u8]) -> Result<Self, OvmfError> {
        if image.is_empty() || image.len() > MAX_OVMF_LEN || !image.len().is_multiple_of(PAGE_LEN) {
            return Err(OvmfError::Length(image.len()));
        }
        let entries = Entries::read(image)?;
        let sections = match entries.metadata {
            Some(from_end) => read_sections(image, from_end)?,
            None => Vec::new(),
        };
        let ovmf = Self {
            image,
            reset_eip: entries.reset_eip,
            hash_table: entries.hash_table,
            launch_secret: entries.launch_secret,
            sections,
        };
        ovmf.refuse_overlaps()?;
        Ok(ovmf)
    }

    /// The image.
    pub const fn image(&self) -> &'a [u8] {
        self.image
    }

    /// The image's pages, from the lowest address on.
    pub fn pages(&self) -> &'a [Page] {
        self.image.as_chunks().0
    }

    /// The guest physical address of the image's first page.
    pub const fn gpa(&self) -> u64 {
        FOUR_GIB - self.image.len() as u64
    }

    /// Where vCPUs other than the first begin; `None` where the image has no SEV-ES support.
    pub const fn reset_eip(&self) -> Option<u32> {
        self.reset_eip
    }

    /// Where the firmware looks for kernel hashes; `None` where it does not look.
    pub const fn hash_table(&self) -> Option<HashTableArea> {
        self.hash_table
    }

    /// Where the firmware looks for a launch secret; `None` where it does not look.
    pub const fn launch_secret(&self) -> Option<SecretArea> {
        self.launch_secret
    }

    /// The SNP sections, in the image's order, which is the order they are measured in.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    fn refuse_overlaps(&self) -> Result<(), OvmfError> {
        let mut ranges: Vec<_> = self
            .sections
            .iter()
            .map(|section| (u64::from(section.gpa), section.end()))
            .collect();
        ranges.push((self.gpa(), FOUR_GIB));
        ranges.sort_unstable();
        for (lower, upper) in ranges.iter().zip(ranges.iter().skip(1)) {
            if upper.0 < lower.1 {
                // below 4 GiB, as every range's start
                return Err(OvmfError::Overlap(upper.0 as u32));
            }
        }
        Ok(())
    }
}

impl Section {
    /// The first address behind it; at most 4 GiB.
    pub const fn end(&self) -> u64 {
        self.gpa as u64 + self.len as u64
    }

    fn parse(gpa: u32, len: u32, kind: u32) -> Result<Self, OvmfError> {
        let section = Self {
            gpa,
            len,
            kind: SectionKind::of(kind),
        };
        let whole = |n: u32| (n as usize).is_multiple_of(PAGE_LEN);
        if len == 0 || !whole(gpa) || !whole(len) || section.end() > FOUR_GIB {
            return Err(OvmfError::SectionPlace { gpa, len });
        }
        let kind = section.kind;
        let one_page = matches!(kind, SectionKind::Secrets | SectionKind::Cpuid);
        if one_page && len as usize != PAGE_LEN {
            return Err(OvmfError::SectionLength { kind, gpa });
        }
        Ok(section)
    }
}

impl SectionKind {
    const fn of(number: u32) -> Self {
        match number {
            1 => Self::SecMem,
            2 => Self::Secrets,
            3 => Self::Cpuid,
            4 => Self::SvsmCaa,
            0x10 => Self::KernelHashes,
            other => Self::Unknown(other),
        }
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SecMem => f.write_str("SEC memory"),
            Self::Secrets => f.write_str("secrets"),
            Self::Cpuid => f.write_str("CPUID"),
            Self::SvsmCaa => f.write_str("SVSM calling area"),
            Self::KernelHashes => f.write_str("kernel hashes"),
            Self::Unknown(number) => write!(f, "unknown ({number:#x})"),
        }
    }
}

impl fmt::Debug for Ovmf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ovmf")
            .field("len", &self.image.len())
            .field("reset_eip", &self.reset_eip)
            .field("hash_table", &self.hash_table)
            .field("launch_secret", &self.launch_secret)
            .field("sections", &self.sections)
            .finish()
    }
}

/// What the footer table says of what counts here.
#[derive(Default)]
struct Entries {
    reset_eip: Option<u32>,
    hash_table: Option<HashTableArea>,
    launch_secret: Option<SecretArea>,
    metadata: Option<u32>,
    seen: [bool; 4],
}

impl Entries {
    fn read(image: &[u8]) -> Result<Self, OvmfError> {
        let mut entries = Self::default();
        let Some(mut table) = footer_table(image)? else {
            return Ok(entries);
        };
        while let Some((rest, len, guid)) = split_header(table) {
            let wrong = OvmfError::EntryLength {
                found: len,
                left: table.len(),
            };
            let content = usize::from(len).checked_sub(ENTRY_HEADER);
            let start = content.and_then(|content| rest.len().checked_sub(content));
            let split = start.and_then(|start| rest.split_at_checked(start));
            let (before, content) = split.ok_or(wrong)?;
            entries.add(guid, content)?;
            table = before;
        }
        Ok(entries)
    }

    fn add(&mut self, guid: [u8; 16], content: &[u8]) -> Result<(), OvmfError> {
        let known = [
            RESET_BLOCK_GUID,
            HASH_TABLE_GUID,
            METADATA_GUID,
            SECRET_BLOCK_GUID,
        ];
        let names = [
            "SEV-ES reset block",
            "SEV hash table",
            "SEV metadata",
            "SEV secret block",
        ];
        let found = known.iter().zip(names).zip(&mut self.seen);
        let Some(((_, name), seen)) = found.into_iter().find(|((known, _), _)| **known == guid)
        else {
            return Ok(());
        };
        if *seen {
            return Err(OvmfError::Duplicate(name));
        }
        *seen = true;
        let word = bytes::le32(content, 0).ok_or(OvmfError::ShortEntry(name))?;
        match guid {
            RESET_BLOCK_GUID => self.reset_eip = Some(word),
            METADATA_GUID => self.metadata = Some(word),
            SECRET_BLOCK_GUID => {
                let len = bytes::le32(content, 4).ok_or(OvmfError::ShortEntry(name))?;
                let there = word != 0 && len != 0;
                self.launch_secret = there.then_some(SecretArea { gpa: word, len });
            }
            // An address of 0 is how an image says that it does not look.
            _ if word == 0 => {}
            _ => {
                self.hash_table = Some(HashTableArea {
                    gpa: word,
                    len: bytes::le32(content, 4),
                });
            }
        }
        Ok(())
    }
}

/// The footer table without its own footer entry; `None` where the image has none.
fn footer_table(image: &[u8]) -> Result<Option<&[u8]>, OvmfError> {
    let end = image.len().saturating_sub(BEHIND_TABLE);
    let Some((before, len, FOOTER_GUID)) = image.get(..end).and_then(split_header) else {
        return Ok(None);
    };
    usize::from(len)
        .checked_sub(ENTRY_HEADER)
        .and_then(|content| before.len().checked_sub(content))
        .and_then(|start| before.get(start..))
        .map(Some)
        .ok_or(OvmfError::TableLength(len))
}

/// An entry's header stands at its end: what lies before it, the entry's length, its GUID.
fn split_header(table: &[u8]) -> Option<(&[u8], u16, [u8; 16])> {
    let (rest, guid) = table.split_last_chunk::<16>()?;
    let (rest, len) = rest.split_last_chunk::<2>()?;
    Some((rest, u16::from_le_bytes(*len), *guid))
}

fn read_sections(image: &[u8], from_end: u32) -> Result<Vec<Section>, OvmfError> {
    let misplaced = OvmfError::MetadataPlace(from_end);
    let start = image.len().checked_sub(from_end as usize);
    let metadata = start
        .and_then(|start| image.get(start..))
        .ok_or(misplaced.clone())?;
    let field = |at| bytes::le32(metadata, at).ok_or(misplaced.clone());
    let (signature, len, version, count) = (field(0)?, field(4)?, field(8)?, field(12)?);
    if signature.to_le_bytes() != *b"ASEV" || version != 1 {
        return Err(OvmfError::MetadataHeader);
    }
    let body = metadata
        .get(METADATA_HEADER..len as usize)
        .ok_or(misplaced)?;
    let (sections, _) = body.as_chunks::<SECTION_LEN>();
    let sections = sections
        .get(..count as usize)
        .filter(|sections| sections.len() <= MAX_SECTIONS)
        .ok_or(OvmfError::MetadataCount { count, len })?;
    sections
        .iter()
        .map(|section| {
            let [g0, g1, g2, g3, l0, l1, l2, l3, k0, k1, k2, k3] = *section;
            Section::parse(
                u32::from_le_bytes([g0, g1, g2, g3]),
                u32::from_le_bytes([l0, l1, l2, l3]),
                u32::from_le_bytes([k0, k1, k2, k3]),
            )
        })
        .collect()
}

/// A GUID as EFI stores it: the first three groups little-endian.
pub(super) const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let [a0, a1, a2, a3] = a.to_le_bytes();
    let [b0, b1] = b.to_le_bytes();
    let [c0, c1] = c.to_le_bytes();
    let [d0, d1, d2, d3, d4, d5, d6, d7] = d;
    [
        a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, d2, d3, d4, d5, d6, d7,
    ]
}

const FOUR_GIB: u64 = 1 << 32;
/// The reset vector's 16 bytes and as many before it.
const BEHIND_TABLE: usize = 32;
/// Length, GUID.
const ENTRY_HEADER: usize = 18;
/// Signature, length, version, count.
const METADATA_HEADER: usize = 16;
/// Address, length, kind.
const SECTION_LEN: usize = 12;
/// Real images have seven.
const MAX_SECTIONS: usize = 256;

// 96b582de-1fb2-45f7-baea-a366c55a082d
const FOOTER_GUID: [u8; 16] = guid(
    0x96b5_82de,
    0x1fb2,
    0x45f7,
    [0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d],
);
// 00f771de-1a7e-4fcb-890e-68c77e2fb44e
const RESET_BLOCK_GUID: [u8; 16] = guid(
    0x00f7_71de,
    0x1a7e,
    0x4fcb,
    [0x89, 0x0e, 0x68, 0xc7, 0x7e, 0x2f, 0xb4, 0x4e],
);
// 4c2eb361-7d9b-4cc3-8081-127c90d3d294
const SECRET_BLOCK_GUID: [u8; 16] = guid(
    0x4c2e_b361,
    0x7d9b,
    0x4cc3,
    [0x80, 0x81, 0x12, 0x7c, 0x90, 0xd3, 0xd2, 0x94],
);
// 7255371f-3a3b-4b04-927b-1da6efa8d454
const HASH_TABLE_GUID: [u8; 16] = guid(
    0x7255_371f,
    0x3a3b,
    0x4b04,
    [0x92, 0x7b, 0x1d, 0xa6, 0xef, 0xa8, 0xd4, 0x54],
);
// dc886566-984a-4798-a75e-5585a7bf67cc
const METADATA_GUID: [u8; 16] = guid(
    0xdc88_6566,
    0x984a,
    0x4798,
    [0xa7, 0x5e, 0x55, 0x85, 0xa7, 0xbf, 0x67, 0xcc],
);

#[cfg(test)]
#[path = "ovmf_tests.rs"]
pub(super) mod tests;
