//! What lies in guest memory before the first instruction, from the plan and the images alone: the VMM
//! loads it, and the owner's process measures the very same bytes.
//!
//! Kernel and initramfs are whatever the description named; nothing in them is believed.

pub mod acpi;
pub mod elf;
pub mod firmware;
mod image;
pub mod linux;
pub mod map;
pub mod measured;
pub mod measured_boot;
pub mod paging;
mod pvh;
mod smbios;
mod table_loader;

use super::layout::{
    ACPI, BOOT_PARAMS, CMDLINE, CMDLINE_ROOM, GDT, GENERATION, HIGH_RAM, KERNEL, PAGE_SIZE,
    PAGE_TABLES, SECRET_GPA, SECRET_SIZE, SMBIOS, SNP_CPUID, SNP_SECRETS, START_INFO, low_memory,
};
use crate::machine::plan::{MachinePlan, Technology};
use casemate_attest::measure::guest::GuestError;
use casemate_attest::measure::ovmf::OvmfError;
use elf::ElfKernel;
pub use image::{Image, Part};
use linux::KernelImage;
use map::{MapEntry, memory_map};

/// One piece of initial guest memory, whole pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Component {
    /// What it is: `gdt`, `boot-params`, `start-info`, `page-tables`, `cmdline`, `acpi`, `smbios`, `generation`,
    /// `kernel`, `initrd`.
    pub name: &'static str,
    /// Where it goes; page-aligned.
    pub gpa: u64,
    /// The bytes, padded with zeros to whole pages.
    pub bytes: Vec<u8>,
}

/// Everything that is in guest memory at the start, and how the first vCPU begins.
#[derive(Debug)]
pub struct BootImage<'a> {
    /// The pieces in the order in which they are measured.
    pub pieces: Vec<Component>,
    /// What comes from the images beside them, unmeasured; none of a confidential guest.
    pub parts: Vec<Part<'a>>,
    /// The first vCPU's entry.
    pub start: Start,
}

/// How the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A bzImage, by the Linux boot protocol.
    Linux,
    /// An ELF kernel, by PVH, at this address.
    Pvh(u32),
    /// Firmware, at the reset vector.
    Reset,
}

impl<'a> BootImage<'a> {
    /// Pure: the same plan and images give the same pieces everywhere. The kernel is a bzImage or, of a plain guest,
    /// an ELF file with a PVH entry; its first bytes tell which.
    pub fn assemble(
        plan: &MachinePlan,
        kernel: impl Into<Image<'a>>,
        initrd: impl Into<Image<'a>>,
    ) -> Result<Self, BootError> {
        let (kernel, initrd) = (kernel.into(), initrd.into());
        let magic = kernel.read(0, elf::MAGIC.len() as u64)?;
        if magic.is_some_and(|magic| *magic == *elf::MAGIC) {
            Self::elf(plan, kernel, initrd)
        } else {
            Self::bzimage(plan, kernel, initrd)
        }
    }

    fn bzimage(
        plan: &MachinePlan,
        kernel: Image<'a>,
        initrd: Image<'a>,
    ) -> Result<Self, BootError> {
        let head = kernel.length().min(linux::HEAD);
        let head = kernel.read(0, head)?.unwrap_or_default();
        let image = KernelImage::parse(&head, kernel.length())?;
        let ramdisk = place_initrd(plan, image.end(), image.initrd_max(), initrd)?;
        let cmdline = command_line(plan, image.cmdline_max())?;
        let map = memory_map(plan.memory_bytes, reserved(plan.technology));
        let mut pieces = vec![
            component("gdt", GDT, paging::gdt()),
            component(
                "boot-params",
                BOOT_PARAMS,
                image.boot_params(&map, ramdisk)?,
            ),
            component("page-tables", PAGE_TABLES, paging::page_tables()),
        ];
        pieces.extend(described(plan, cmdline));
        let payload = image.payload();
        let part = Part {
            name: "kernel",
            gpa: KERNEL,
            image: kernel,
            offset: payload.start,
            length: payload.end - payload.start,
        };
        let mut parts = Vec::new();
        if plan.technology == Technology::None {
            parts.push(part);
        } else {
            let bytes = kernel.read(part.offset, part.length)?;
            let bytes = bytes.unwrap_or_default().into_owned();
            pieces.push(component("kernel", KERNEL, bytes));
        }
        let mut whole = Self {
            pieces,
            parts,
            start: Start::Linux,
        };
        whole.finish(plan, ramdisk, initrd)?;
        Ok(whole)
    }

    fn elf(plan: &MachinePlan, kernel: Image<'a>, initrd: Image<'a>) -> Result<Self, BootError> {
        if plan.technology != Technology::None {
            return Err(BootError::Kernel(
                "is an ELF file, whose PVH entry knows of no encryption; a confidential guest needs a bzImage",
            ));
        }
        let image = ElfKernel::parse(kernel)?;
        let ramdisk = place_initrd(plan, image.end(), u64::from(u32::MAX), initrd)?;
        let cmdline = command_line(plan, CMDLINE_ROOM - 1)?;
        let map: Vec<MapEntry> = memory_map(plan.memory_bytes, None);
        let mut pieces = vec![
            component("gdt", GDT, paging::gdt()),
            component("start-info", START_INFO, pvh::start_info(ramdisk, &map)),
        ];
        pieces.extend(described(plan, cmdline));
        let mut whole = Self {
            pieces,
            parts: image.parts(),
            start: Start::Pvh(image.entry()),
        };
        whole.finish(plan, ramdisk, initrd)?;
        Ok(whole)
    }

    /// Adds the initramfs, and checks that all of it lies apart.
    fn finish(
        &mut self,
        plan: &MachinePlan,
        ramdisk: Option<(u64, u64)>,
        initrd: Image<'a>,
    ) -> Result<(), BootError> {
        match ramdisk {
            Some((gpa, length)) if plan.technology == Technology::None => self.parts.push(Part {
                name: "initrd",
                gpa,
                image: initrd,
                offset: 0,
                length,
            }),
            Some((gpa, _)) => {
                let bytes = initrd.whole()?.into_owned();
                self.pieces.push(component("initrd", gpa, bytes));
            }
            None => {}
        }
        let pieces = self
            .pieces
            .iter()
            .map(|piece| (piece.name, piece.gpa, piece.bytes.len() as u64));
        let parts = self
            .parts
            .iter()
            .map(|part| (part.name, part.gpa, part.length));
        check_layout(pieces.chain(parts), low_memory(plan.memory_bytes))
    }
}

/// What every kernel finds: its command line, and how the machine describes itself. What is different in each guest
/// (UUID, generation) only a plain one is told: of the others all is measured, and their owners must know it before.
fn described(plan: &MachinePlan, cmdline: Vec<u8>) -> Vec<Component> {
    let plain = plan.technology == Technology::None;
    let id = if plain { plan.vm_id } else { [0; 16] };
    let mut pieces = vec![
        component("cmdline", CMDLINE, cmdline),
        component(
            "acpi",
            ACPI,
            acpi::tables(plan.vcpus, plain, acpi::Slots::of(plan), ACPI),
        ),
        component("smbios", SMBIOS, smbios::tables(&id, plan.memory_bytes)),
    ];
    if plain {
        pieces.push(component("generation", GENERATION, id.to_vec()));
    }
    pieces
}

/// What the VMM appends to the command line of a plan.
pub fn appended_cmdline(plan: &MachinePlan) -> String {
    match plan.technology {
        Technology::None => String::new(),
        Technology::Sev { .. } | Technology::SevEs { .. } => {
            format!(" casemate.secret={SECRET_GPA:#x},{SECRET_SIZE:#x}")
        }
        Technology::SevSnp { .. } => format!(" casemate.snp={SNP_SECRETS:#x},{SNP_CPUID:#x}"),
    }
}

/// Where the reserved memory in front of the kernel begins, if there is any.
fn reserved(technology: Technology) -> Option<u64> {
    match technology {
        Technology::SevSnp { .. } => Some(SNP_CPUID),
        Technology::Sev { .. } | Technology::SevEs { .. } => Some(SECRET_GPA),
        Technology::None => None,
    }
}

/// Why a guest cannot be assembled.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Not a kernel this machine can start.
    #[error("kernel image {0}")]
    Kernel(&'static str),
    /// Not a firmware image this machine can start in.
    #[error("firmware image {0}")]
    Firmware(&'static str),
    /// Its tables for confidential guests are not well formed.
    #[error("firmware image")]
    Tables(#[source] OvmfError),
    /// No confidential guest can be launched in it so.
    #[error("firmware image")]
    Launch(#[source] GuestError),
    /// Not an initramfs this machine can place.
    #[error("initramfs {0}")]
    Initrd(&'static str),
    /// Too little memory.
    #[error("guest memory of {0} bytes is too small: the kernel needs {1}")]
    Memory(u64, u64),
    /// The command line is too long or has a zero byte.
    #[error("kernel command line of {0} bytes: at most {1}, without zero bytes")]
    Cmdline(usize, usize),
    /// An image cannot be read.
    #[error("kernel or initramfs cannot be read: {0}")]
    Read(#[source] std::io::Error),
    /// Two pieces overlap.
    #[error("{0} does not fit its place in guest memory")]
    Overlap(&'static str),
}

/// Start and length of the initramfs: as high as it may be, above the kernel that ends at `end`.
fn place_initrd(
    plan: &MachinePlan,
    end: u64,
    last: u64,
    initrd: Image<'_>,
) -> Result<Option<(u64, u64)>, BootError> {
    let memory = low_memory(plan.memory_bytes);
    if end > memory {
        return Err(BootError::Memory(plan.memory_bytes, end));
    }
    if initrd.is_empty() {
        return Ok(None);
    }
    let length = initrd.length();
    let top = memory.min(last.saturating_add(1));
    let start = top
        .checked_sub(length)
        .map(|start| start - start % PAGE_SIZE)
        .filter(|start| *start >= end)
        .ok_or(BootError::Initrd(
            "does not fit above the kernel; give the guest more memory",
        ))?;
    Ok(Some((start, length)))
}

fn command_line(plan: &MachinePlan, limit: usize) -> Result<Vec<u8>, BootError> {
    let mut line = plan.cmdline.clone().into_bytes();
    line.extend_from_slice(appended_cmdline(plan).as_bytes());
    if line.len() > limit || line.contains(&0) {
        return Err(BootError::Cmdline(line.len(), limit));
    }
    line.push(0);
    Ok(line)
}

fn component(name: &'static str, gpa: u64, mut bytes: Vec<u8>) -> Component {
    bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE as usize), 0);
    Component { name, gpa, bytes }
}

/// Name, start and length of all that is loaded: ascending, apart, and in memory.
fn check_layout(
    all: impl Iterator<Item = (&'static str, u64, u64)>,
    memory: u64,
) -> Result<(), BootError> {
    let mut end = 0;
    for (name, gpa, length) in all {
        let limit = if gpa < HIGH_RAM { HIGH_RAM } else { memory };
        let last = gpa.saturating_add(length);
        if gpa < end || last > limit {
            return Err(BootError::Overlap(name));
        }
        end = last;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::elf::tests::small_elf;
    use super::linux::tests::small_image;
    use super::*;

    pub fn plan() -> MachinePlan {
        MachinePlan {
            name: "t".into(),
            vm_id: [1; 16],
            vcpus: 2,
            cpu: Default::default(),
            memory_bytes: 128 << 20,
            firmware: None,
            cmdline: "console=ttyS0".into(),
            technology: Technology::Sev {
                emulated: true,
                policy: 0,
            },
            disks: vec![],
            nets: vec![],
            vsock_cid: None,
            small: Default::default(),
            hotplug: Default::default(),
        }
    }

    fn assemble(plan: &MachinePlan) -> Vec<Component> {
        let kernel = small_image();
        let image = BootImage::assemble(plan, &kernel, b"initramfs").unwrap();
        assert!(image.parts.is_empty() || plan.technology == Technology::None);
        assert_eq!(image.start, Start::Linux);
        image.pieces
    }

    #[test]
    fn the_pieces_are_whole_pages_in_order_and_the_same_each_time() {
        let pieces = assemble(&plan());
        let names: Vec<&str> = pieces.iter().map(|p| p.name).collect();
        assert_eq!(
            names,
            [
                "gdt",
                "boot-params",
                "page-tables",
                "cmdline",
                "acpi",
                "smbios",
                "kernel",
                "initrd"
            ]
        );
        for piece in &pieces {
            assert!(piece.bytes.len().is_multiple_of(4096) && piece.gpa.is_multiple_of(4096));
            let end = piece.gpa + piece.bytes.len() as u64;
            assert!(
                end <= SECRET_GPA || piece.gpa > SECRET_GPA,
                "{}",
                piece.name
            );
        }
        assert_eq!(pieces, assemble(&plan()));
    }

    #[test]
    fn the_measured_bytes_of_this_version_do_not_change_unnoticed() {
        let pieces = assemble(&plan());
        let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
        for piece in &pieces {
            digest.update(&piece.gpa.to_le_bytes());
            digest.update(&piece.bytes);
        }
        assert_eq!(hex::encode(digest.finish()), GOLDEN);
    }

    /// Owners compare against what their own copy of this code assembles: a change here is a new version.
    const GOLDEN: &str = "85a1771e588064bf618d0d7abcb8fa52a8ce84941ef22bde0a71fe27680dd896";

    #[test]
    fn every_input_is_in_the_pieces() {
        let of = |plan: &MachinePlan, kernel: &Vec<u8>, initrd: &[u8]| {
            BootImage::assemble(plan, kernel, initrd).unwrap().pieces
        };
        let image = small_image();
        let base = of(&plan(), &image, b"initramfs");
        let mut kernel = small_image();
        *kernel.last_mut().unwrap() ^= 1;
        assert_ne!(base, of(&plan(), &kernel, b"initramfs"));
        assert_ne!(base, of(&plan(), &image, b"initramfz"));
        let other = MachinePlan {
            cmdline: "quiet".into(),
            ..plan()
        };
        assert_ne!(base, of(&other, &image, b"initramfs"));
        let other = MachinePlan { vcpus: 3, ..plan() };
        assert_ne!(base, of(&other, &image, b"initramfs"));
    }

    #[test]
    fn the_secret_page_is_named_on_the_command_line_of_a_confidential_guest_only() {
        let pieces = assemble(&plan());
        let line = &pieces[3].bytes;
        assert!(line.starts_with(b"console=ttyS0 casemate.secret=0xfff000,0x1000\0"));
        let plain = MachinePlan {
            technology: Technology::None,
            ..plan()
        };
        assert_eq!(appended_cmdline(&plain), "");
        let snp = MachinePlan {
            technology: Technology::SevSnp {
                emulated: true,
                policy: 0x30000,
            },
            ..plan()
        };
        assert_eq!(appended_cmdline(&snp), " casemate.snp=0xffe000,0xffd000");
    }

    #[test]
    fn only_a_plain_guest_is_told_what_is_its_own() {
        let plain = MachinePlan {
            technology: Technology::None,
            ..plan()
        };
        let other = MachinePlan {
            vm_id: [2; 16],
            ..plain.clone()
        };
        let generation = |plan| {
            let pieces = assemble(plan);
            let piece = pieces.iter().find(|piece| piece.name == "generation");
            piece.map(|piece| piece.bytes[..16].to_vec())
        };
        assert_eq!(generation(&plain), Some(vec![1; 16]));
        assert_eq!(generation(&other), Some(vec![2; 16]));
        let moved = MachinePlan {
            vm_id: [2; 16],
            ..plan()
        };
        assert_eq!(assemble(&plan()), assemble(&moved));
        assert_eq!(generation(&plan()), None);
    }

    #[test]
    fn an_elf_kernel_is_told_from_a_bzimage_and_entered_by_pvh() {
        let plain = MachinePlan {
            technology: Technology::None,
            ..plan()
        };
        let elf = small_elf();
        let image = BootImage::assemble(&plain, &elf, b"initramfs").unwrap();
        assert_eq!(image.start, Start::Pvh(0x100_0010));
        let names: Vec<&str> = image.pieces.iter().map(|p| p.name).collect();
        assert_eq!(names[..2], ["gdt", "start-info"]);
        assert_eq!(names.last(), Some(&"generation"));
        let parts: Vec<_> = image.parts.iter().map(|p| (p.name, p.gpa)).collect();
        let initrd = (128 << 20) - 4096;
        assert_eq!(
            parts,
            [
                ("kernel", 0x100_0000),
                ("kernel", 0x110_0800),
                ("initrd", initrd)
            ]
        );
        let error = BootImage::assemble(&plan(), &small_elf(), b"").unwrap_err();
        assert!(error.to_string().contains("needs a bzImage"), "{error}");
    }

    #[test]
    fn what_is_loaded_lies_below_the_pci_window_however_much_memory_there_is() {
        let large = MachinePlan {
            technology: Technology::None,
            memory_bytes: 8 << 30,
            ..plan()
        };
        for kernel in [small_image(), small_elf()] {
            let image = BootImage::assemble(&large, &kernel, b"initramfs").unwrap();
            let last = image.parts.last().unwrap();
            let bytes = last.image.read(last.offset, last.length).unwrap().unwrap();
            assert_eq!(bytes, &b"initramfs"[..]);
            assert!(last.gpa + last.length <= 3 << 30);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let small = MachinePlan {
            memory_bytes: 32 << 20,
            ..plan()
        };
        let error = BootImage::assemble(&small, &small_image(), b"").unwrap_err();
        assert!(matches!(error, BootError::Memory(..)));
        let initrd = vec![0u8; 96 << 20];
        let error = BootImage::assemble(&plan(), &small_image(), &initrd).unwrap_err();
        assert!(matches!(error, BootError::Initrd(_)));
        let long = MachinePlan {
            cmdline: "x".repeat(3000),
            ..plan()
        };
        let error = BootImage::assemble(&long, &small_image(), b"").unwrap_err();
        assert!(matches!(error, BootError::Cmdline(..)));
    }
}
