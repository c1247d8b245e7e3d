//! The Linux/x86 boot protocol: the header of a bzImage and the zero page.
//!
//! The kernel image comes from whoever described the guest; every field is checked before it is used.

use std::ops::Range;

use super::BootError;
use super::map::MapEntry;
use crate::vmm::layout::{ACPI, BOOT_PARAMS, CMDLINE, CMDLINE_ROOM, KERNEL};

/// A bzImage whose header has been checked.
#[derive(Debug)]
pub struct KernelImage<'a> {
    setup_header: &'a [u8],
    payload: Range<u64>,
    init_size: u64,
    initrd_max: u64,
    cmdline_max: usize,
}

impl<'a> KernelImage<'a> {
    /// Reads the header (Documentation/arch/x86/boot.rst) from the first [`HEAD`] bytes, or all, of an image of this
    /// length.
    pub fn parse(image: &'a [u8], length: u64) -> Result<Self, BootError> {
        if length > MAX_IMAGE {
            return Err(BootError::Kernel("is larger than 256 MiB"));
        }
        if field(image, BOOT_FLAG)? != 0xaa55u16.to_le_bytes() || field(image, MAGIC)? != *b"HdrS" {
            return Err(BootError::Kernel(
                "is no bzImage (boot flag or `HdrS` missing)",
            ));
        }
        let version = u16::from_le_bytes(field(image, VERSION)?);
        if version < MIN_VERSION {
            return Err(BootError::Kernel("speaks a boot protocol older than 2.12"));
        }
        let [loadflags] = field(image, LOADFLAGS)?;
        if loadflags & LOADED_HIGH == 0 {
            return Err(BootError::Kernel("is a zImage; a bzImage is needed"));
        }
        let xloadflags = u16::from_le_bytes(field(image, XLOADFLAGS)?);
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Err(BootError::Kernel("has no 64-bit entry point"));
        }
        let [relocatable] = field(image, RELOCATABLE)?;
        let preferred = u64::from_le_bytes(field(image, PREF_ADDRESS)?);
        if relocatable == 0 && preferred != KERNEL {
            return Err(BootError::Kernel(
                "is not relocatable and prefers another address",
            ));
        }
        let alignment = u64::from(u32::from_le_bytes(field(image, ALIGNMENT)?));
        if alignment == 0 || !KERNEL.is_multiple_of(alignment) {
            return Err(BootError::Kernel(
                "wants an alignment that 16 MiB does not have",
            ));
        }
        let [sectors] = field(image, SETUP_SECTS)?;
        let setup = (u64::from(if sectors == 0 { 4 } else { sectors }) + 1) * 512;
        if length <= setup + ENTRY_OFFSET {
            return Err(BootError::Kernel("ends before its protected-mode part"));
        }
        let [jump] = field(image, JUMP)?;
        let header_end = JUMP + 1 + usize::from(jump);
        let setup_header = image
            .get(SETUP_SECTS..header_end.min(HEADER_ROOM_END))
            .ok_or(BootError::Kernel("has an impossible header length"))?;
        let init_size = u64::from(u32::from_le_bytes(field(image, INIT_SIZE)?));
        Ok(Self {
            setup_header,
            payload: setup..length,
            init_size: init_size.max(length - setup),
            initrd_max: u64::from(u32::from_le_bytes(field(image, INITRD_MAX)?)),
            cmdline_max: u32::from_le_bytes(field(image, CMDLINE_SIZE)?) as usize,
        })
    }

    /// Where in the image the protected-mode part is, to be loaded at [`KERNEL`].
    pub fn payload(&self) -> Range<u64> {
        self.payload.clone()
    }

    /// End of the memory the kernel needs before it can read its memory map.
    pub fn end(&self) -> u64 {
        KERNEL.saturating_add(self.init_size)
    }

    /// Highest address of the last byte of the initramfs.
    pub fn initrd_max(&self) -> u64 {
        self.initrd_max
    }

    /// Longest command line, without its zero.
    pub fn cmdline_max(&self) -> usize {
        self.cmdline_max.min(CMDLINE_ROOM - 1)
    }

    /// The zero page: the image's own header, then what a boot loader fills in, then the memory map.
    pub fn boot_params(
        &self,
        map: &[MapEntry],
        initrd: Option<(u64, u64)>,
    ) -> Result<Vec<u8>, BootError> {
        let mut page = vec![0u8; BOOT_PARAMS_SIZE];
        put(&mut page, SETUP_SECTS, self.setup_header)?;
        put(&mut page, TYPE_OF_LOADER, &[LOADER_UNDEFINED])?;
        put(&mut page, CMD_LINE_PTR, &(CMDLINE as u32).to_le_bytes())?;
        put(&mut page, ACPI_RSDP, &ACPI.to_le_bytes())?;
        put(&mut page, CODE32_START, &(KERNEL as u32).to_le_bytes())?;
        if let Some((start, length)) = initrd {
            let (start, length) = (narrow(start)?, narrow(length)?);
            put(&mut page, RAMDISK_IMAGE, &start.to_le_bytes())?;
            put(&mut page, RAMDISK_SIZE, &length.to_le_bytes())?;
        }
        put(&mut page, E820_ENTRIES, &[map.len() as u8])?;
        for (index, entry) in map.iter().enumerate() {
            let at = E820_TABLE + index * 20;
            put(&mut page, at, &entry.start.to_le_bytes())?;
            put(&mut page, at + 8, &entry.length.to_le_bytes())?;
            put(&mut page, at + 16, &entry.kind.to_le_bytes())?;
        }
        Ok(page)
    }
}

/// Where the kernel's 64-bit entry point is.
pub const ENTRY: u64 = KERNEL + ENTRY_OFFSET;
/// Where its 32-bit entry point is.
pub const ENTRY_32: u64 = KERNEL;
/// Address of the zero page, which goes into RSI.
pub const BOOT_PARAMS_ADDRESS: u64 = BOOT_PARAMS;

fn field<const N: usize>(image: &[u8], offset: usize) -> Result<[u8; N], BootError> {
    image
        .get(offset..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or(BootError::Kernel("ends within its header"))
}

fn put(page: &mut [u8], offset: usize, bytes: &[u8]) -> Result<(), BootError> {
    page.get_mut(offset..offset + bytes.len())
        .ok_or(BootError::Kernel("has a header longer than the zero page"))?
        .copy_from_slice(bytes);
    Ok(())
}

fn narrow(value: u64) -> Result<u32, BootError> {
    u32::try_from(value).map_err(|_| BootError::Initrd("lies above 4 GiB"))
}

/// The header is in these first bytes of an image.
pub const HEAD: u64 = 4096;
const MAX_IMAGE: u64 = 256 << 20;
const MIN_VERSION: u16 = 0x020c;
const BOOT_PARAMS_SIZE: usize = 4096;
const ENTRY_OFFSET: u64 = 0x200;
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
// offsets in the image and, the same, in the zero page
const ACPI_RSDP: usize = 0x70;
const E820_ENTRIES: usize = 0x1e8;
const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const JUMP: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const INITRD_MAX: usize = 0x22c;
const ALIGNMENT: usize = 0x230;
const RELOCATABLE: usize = 0x234;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
const HEADER_ROOM_END: usize = 0x290;
const E820_TABLE: usize = 0x2d0;

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::vmm::boot::map::memory_map;
    use crate::vmm::layout::SECRET_GPA;

    /// A header as a real kernel has it, and a payload of 4 KiB.
    pub fn small_image() -> Vec<u8> {
        let mut image = vec![0u8; 1024 + 4096];
        let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        set(SETUP_SECTS, &[1]);
        set(BOOT_FLAG, &0xaa55u16.to_le_bytes());
        set(JUMP, &[0x6a]);
        set(MAGIC, b"HdrS");
        set(VERSION, &0x020fu16.to_le_bytes());
        set(LOADFLAGS, &[1]);
        set(INITRD_MAX, &0x7fff_ffffu32.to_le_bytes());
        set(ALIGNMENT, &0x20_0000u32.to_le_bytes());
        set(RELOCATABLE, &[1]);
        set(XLOADFLAGS, &0x7fu16.to_le_bytes());
        set(CMDLINE_SIZE, &2047u32.to_le_bytes());
        set(PREF_ADDRESS, &KERNEL.to_le_bytes());
        set(INIT_SIZE, &0x200_0000u32.to_le_bytes());
        image
    }

    fn parse(image: &[u8]) -> Result<KernelImage<'_>, BootError> {
        KernelImage::parse(image, image.len() as u64)
    }

    #[test]
    fn a_good_header_is_read() {
        let image = small_image();
        let kernel = parse(&image).unwrap();
        assert_eq!(kernel.payload(), 1024..1024 + 4096);
        assert_eq!(kernel.end(), KERNEL + 0x200_0000);
        let page = kernel
            .boot_params(
                &memory_map(256 << 20, Some(SECRET_GPA)),
                Some((0x800_0000, 77)),
            )
            .unwrap();
        assert_eq!(&page[MAGIC..MAGIC + 4], b"HdrS");
        assert_eq!(page[E820_ENTRIES], 6);
        assert_eq!(page[RAMDISK_SIZE], 77);
    }

    #[test]
    fn bad_headers_are_refused() {
        let spoil: [(usize, &[u8]); 8] = [
            (BOOT_FLAG, &[0, 0]),
            (MAGIC, b"Hdrs"),
            (VERSION, &[0x0b, 0x02]),
            (LOADFLAGS, &[0]),
            (XLOADFLAGS, &[0]),
            (ALIGNMENT, &[0, 0, 0, 0]),
            (ALIGNMENT, &[3, 0, 0, 0]),
            (SETUP_SECTS, &[200]),
        ];
        for (at, bytes) in spoil {
            let mut image = small_image();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(parse(&image).is_err(), "{at:#x}");
        }
        for length in [0, 0x1f0, 0x210, 0x262, 1024, 1024 + 0x200] {
            assert!(parse(&small_image()[..length]).is_err(), "{length}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_image_makes_the_parser_fall(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..2048), at in 0usize..0x270) {
            let _ = parse(&bytes);
            let mut image = small_image();
            for (to, from) in image.iter_mut().skip(at).zip(&bytes) {
                *to = *from;
            }
            if let Ok(kernel) = parse(&image) {
                let _ = kernel.boot_params(&memory_map(256 << 20, None), None);
            }
        }
    }
}
