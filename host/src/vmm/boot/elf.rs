//! An uncompressed ELF kernel that says where it is entered by PVH: Linux's `vmlinux`, FreeBSD, unikernels.
//!
//! The file comes from whoever described the guest; every offset, length and address is checked before it is used.

use std::borrow::Cow;

use super::{BootError, Image, Part};
use crate::vmm::layout::{HIGH_RAM, PCI_WINDOW};

/// What begins an ELF file.
pub const MAGIC: &[u8] = b"\x7fELF";

/// A kernel whose headers have been checked.
#[derive(Debug)]
pub struct ElfKernel<'a> {
    image: Image<'a>,
    segments: Vec<Segment>,
    entry: u32,
}

/// What a program header wants loaded: where it goes and where that ends, and what of the file is put there.
#[derive(Debug)]
struct Segment {
    address: u64,
    end: u64,
    offset: u64,
    length: u64,
}

impl<'a> ElfKernel<'a> {
    /// Reads the headers, once, and finds the PVH note.
    pub fn parse(image: impl Into<Image<'a>>) -> Result<Self, BootError> {
        let image = image.into();
        let file = image.read(0, FILE_HEADER)?.ok_or(ENDS)?;
        let header: [u8; 20] = at(&file, 0)?;
        // 64-bit, little-endian, version 1; executable or position-independent; x86-64
        let (shape, machine) = (header.get(4..7), header.get(16..20));
        if !file.starts_with(MAGIC)
            || shape != Some(&[2, 1, 1])
            || !matches!(machine, Some([2 | 3, 0, 62, 0]))
        {
            return Err(refused("is no 64-bit x86 ELF executable"));
        }
        let table = word64(&file, PROGRAM_HEADERS)?;
        let (size, count) = (word16(&file, ENTRY_SIZE)?, word16(&file, ENTRY_COUNT)?);
        if size != HEADER_SIZE || count > MAX_HEADERS {
            return Err(refused("has program headers of another size, or over 64"));
        }
        let length = u64::from(count) * u64::from(HEADER_SIZE);
        let table = image.read(table, length)?.ok_or(ENDS)?;
        let (mut segments, mut entry) = (Vec::new(), None);
        for header in table.chunks_exact(HEADER_SIZE.into()) {
            match word32(header, 0)? {
                LOAD => segments.extend(Segment::read(image, header)?),
                NOTE if entry.is_none() => entry = pvh_entry(&notes(image, header)?)?,
                _ => {}
            }
        }
        let entry = entry.ok_or(refused(
            "is an ELF file without a PVH entry point (a note of Xen, type 18); build Linux with CONFIG_PVH",
        ))?;
        segments.sort_by_key(|segment| segment.address);
        let kernel = Self {
            image,
            segments,
            entry,
        };
        kernel.check()?;
        Ok(kernel)
    }

    /// Where it is entered, in 32-bit protected mode.
    pub fn entry(&self) -> u32 {
        self.entry
    }

    fn start(&self) -> u64 {
        self.segments.first().map_or(0, |segment| segment.address)
    }

    /// End of the memory that it occupies.
    pub fn end(&self) -> u64 {
        self.segments.last().map_or(0, |segment| segment.end)
    }

    /// What is loaded, ascending, apart from each other; what is between and behind is zero.
    pub fn parts(&self) -> Vec<Part<'a>> {
        let filled = self.segments.iter().filter(|segment| segment.length > 0);
        let part = |segment: &Segment| Part {
            name: "kernel",
            gpa: segment.address,
            image: self.image,
            offset: segment.offset,
            length: segment.length,
        };
        filled.map(part).collect()
    }

    fn check(&self) -> Result<(), BootError> {
        if self.start() < HIGH_RAM || self.end() > PCI_WINDOW {
            return Err(refused(
                "wants to be loaded below 1 MiB or above 3 GiB, or not at all",
            ));
        }
        if self.end() - self.start() > MAX_SPAN {
            return Err(refused("spans more than 512 MiB"));
        }
        let mut neighbours = self.segments.iter().zip(self.segments.iter().skip(1));
        if neighbours.any(|(one, next)| one.end > next.address) {
            return Err(refused("has segments that overlap"));
        }
        let within = |segment: &&Segment| {
            let code = segment.address..segment.address + segment.length;
            code.contains(&u64::from(self.entry))
        };
        match self.segments.iter().find(within) {
            Some(_) => Ok(()),
            None => Err(refused("has its PVH entry point outside of its segments")),
        }
    }
}

impl Segment {
    /// Nothing for a segment without memory.
    fn read(image: Image<'_>, header: &[u8]) -> Result<Option<Self>, BootError> {
        let address = word64(header, PHYSICAL)?;
        let memory = word64(header, MEMORY_SIZE)?;
        let (offset, length) = contents(image, header)?;
        let end = address.checked_add(memory);
        match end {
            Some(end) if length <= memory => Ok((memory > 0).then_some(Self {
                address,
                end,
                offset,
                length,
            })),
            _ => Err(refused("has a segment that is larger than its memory")),
        }
    }
}

/// Offset and length of what a program header names of the file; in it.
fn contents(image: Image<'_>, header: &[u8]) -> Result<(u64, u64), BootError> {
    let (offset, length) = (word64(header, FILE_OFFSET)?, word64(header, FILE_SIZE)?);
    let end = offset.checked_add(length);
    match end.filter(|end| *end <= image.length()) {
        Some(_) => Ok((offset, length)),
        None => Err(ENDS),
    }
}

fn notes<'a>(image: Image<'a>, header: &[u8]) -> Result<Cow<'a, [u8]>, BootError> {
    let (offset, length) = contents(image, header)?;
    if length > MAX_NOTES {
        return Err(refused("has notes of more than 64 KiB"));
    }
    image.read(offset, length)?.ok_or(ENDS)
}

/// The note `Xen`, type 18: a 32-bit address (some write 64 bits).
fn pvh_entry(mut notes: &[u8]) -> Result<Option<u32>, BootError> {
    while notes.len() >= NOTE_HEADER {
        let name_length = word32(notes, 0)? as usize;
        let length = word32(notes, 4)? as usize;
        let kind = word32(notes, 8)?;
        let rest = notes.get(NOTE_HEADER..).unwrap_or_default();
        let name = rest.get(..name_length).ok_or(ENDS)?;
        let rest = skip(rest, name_length)?;
        let value = rest.get(..length).ok_or(ENDS)?;
        if name == b"Xen\0" && kind == XEN_ELFNOTE_PHYS32_ENTRY {
            let beyond = value.get(4..).unwrap_or_default();
            if !matches!(length, 4 | 8) || beyond.iter().any(|byte| *byte != 0) {
                return Err(refused("has a PVH entry point of more than 32 bits"));
            }
            return word32(value, 0).map(Some);
        }
        notes = skip(rest, length)?;
    }
    Ok(None)
}

/// Behind a field that is padded to 4 bytes; the last one's padding may be missing.
fn skip(bytes: &[u8], length: usize) -> Result<&[u8], BootError> {
    let padded = length.checked_next_multiple_of(4).ok_or(ENDS)?;
    Ok(bytes.get(padded..).unwrap_or_default())
}

fn at<const N: usize>(bytes: &[u8], offset: usize) -> Result<[u8; N], BootError> {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or(ENDS)
}

fn word16(bytes: &[u8], offset: usize) -> Result<u16, BootError> {
    at(bytes, offset).map(u16::from_le_bytes)
}

fn word32(bytes: &[u8], offset: usize) -> Result<u32, BootError> {
    at(bytes, offset).map(u32::from_le_bytes)
}

fn word64(bytes: &[u8], offset: usize) -> Result<u64, BootError> {
    at(bytes, offset).map(u64::from_le_bytes)
}

fn refused(problem: &'static str) -> BootError {
    BootError::Kernel(problem)
}

const ENDS: BootError = BootError::Kernel("ends before what its ELF headers name");
const MAX_SPAN: u64 = 512 << 20;
const MAX_HEADERS: u16 = 64;
const MAX_NOTES: u64 = 64 << 10;
const FILE_HEADER: u64 = 64;
const HEADER_SIZE: u16 = 56;
// the file's header
const PROGRAM_HEADERS: usize = 0x20;
const ENTRY_SIZE: usize = 0x36;
const ENTRY_COUNT: usize = 0x38;
// a program header
const LOAD: u32 = 1;
const NOTE: u32 = 4;
const FILE_OFFSET: usize = 0x08;
const PHYSICAL: usize = 0x18;
const FILE_SIZE: usize = 0x20;
const MEMORY_SIZE: usize = 0x28;
// a note
const NOTE_HEADER: usize = 12;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Code at 16 MiB and data 1 MiB behind it with 8 KiB of memory, entered at the code's 16th byte.
    pub fn small_elf() -> Vec<u8> {
        let mut image = vec![0u8; 0x1000];
        let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        set(0, b"\x7fELF\x02\x01\x01");
        set(16, &[2, 0, 62, 0]);
        set(PROGRAM_HEADERS, &64u64.to_le_bytes());
        set(ENTRY_SIZE, &HEADER_SIZE.to_le_bytes());
        set(ENTRY_COUNT, &3u16.to_le_bytes());
        // Not in the order of addresses.
        let headers = [
            (LOAD, 0x400, 0x110_0800u64, 0x10, 0x2000u64),
            (NOTE, 0x200, 0, 0x28, 0),
            (LOAD, 0x300, 0x100_0000, 0x40, 0x40),
        ];
        for (index, (kind, offset, address, size, memory)) in headers.into_iter().enumerate() {
            let header = 64 + index * 56;
            set(header, &kind.to_le_bytes());
            set(header + FILE_OFFSET, &(offset as u64).to_le_bytes());
            set(header + PHYSICAL, &address.to_le_bytes());
            set(header + FILE_SIZE, &(size as u64).to_le_bytes());
            set(header + MEMORY_SIZE, &memory.to_le_bytes());
        }
        // Another note first.
        set(0x200, &[2, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0, b'L', 0, 0, 0]);
        set(0x210, &[9; 4]);
        set(0x214, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        set(0x220, b"Xen\0");
        set(0x224, &[0x10, 0, 0, 1]);
        image[0x300..0x340].fill(0xc3);
        image[0x400..0x410].fill(0xda);
        image
    }

    #[test]
    fn segments_are_laid_out_and_the_entry_is_the_notes() {
        let image = small_elf();
        let kernel = ElfKernel::parse(&image).unwrap();
        assert_eq!(kernel.entry(), 0x100_0010);
        assert_eq!((kernel.start(), kernel.end()), (0x100_0000, 0x110_2800));
        let parts = kernel.parts();
        let found: Vec<_> = parts
            .iter()
            .map(|part| {
                let bytes = part.image.read(part.offset, part.length).unwrap();
                (part.gpa, bytes.unwrap().into_owned())
            })
            .collect();
        let expected = [
            (0x100_0000, vec![0xc3; 0x40]),
            (0x110_0800, vec![0xda; 0x10]),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_cannot_be_loaded_is_refused_with_the_reason() {
        let data = 64;
        let code = 64 + 2 * 56;
        let cases: [(usize, &[u8], &str); 12] = [
            (4, &[1], "64-bit"),
            (18, &[3, 0], "64-bit"),
            (ENTRY_SIZE, &[32], "another size"),
            (ENTRY_COUNT, &[65], "over 64"),
            (PROGRAM_HEADERS, &[0xff; 8], "ends before"),
            (0x21c, &[17], "without a PVH"),
            (data + FILE_OFFSET, &[0xff; 8], "ends before"),
            (data + FILE_SIZE, &[0, 0x30], "ends before"),
            (data + MEMORY_SIZE, &[0xf, 0], "larger than its memory"),
            (data + PHYSICAL, &[0x20, 0, 0, 1], "overlap"),
            (code + PHYSICAL, &[0, 0, 0, 0], "below 1 MiB"),
            (0x224, &[0x40, 0, 0, 1], "outside"),
        ];
        for (at, bytes, words) in cases {
            let mut image = small_elf();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            let error = ElfKernel::parse(&image).unwrap_err().to_string();
            assert!(error.contains(words), "{at:#x}: {error}");
        }
        let mut image = small_elf();
        image[data + MEMORY_SIZE..data + MEMORY_SIZE + 4].copy_from_slice(&[0, 0, 0, 0x20]);
        let error = ElfKernel::parse(&image).unwrap_err().to_string();
        assert!(error.contains("512 MiB"), "{error}");
        for length in [0, 4, 63, 200, 0x210, 0x400] {
            assert!(
                ElfKernel::parse(&small_elf()[..length]).is_err(),
                "{length}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn no_file_makes_the_parser_fall(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64), at in 0usize..0x280) {
            let mut image = small_elf();
            for (to, from) in image.iter_mut().skip(at).zip(&bytes) {
                *to = *from;
            }
            if let Ok(kernel) = ElfKernel::parse(&image) {
                let end = kernel.parts().iter().fold(HIGH_RAM, |end, part| {
                    assert!(part.gpa >= end && part.offset + part.length <= image.len() as u64);
                    part.gpa + part.length
                });
                proptest::prop_assert!(end <= kernel.end());
            }
        }
    }
}
