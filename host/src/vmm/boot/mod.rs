//! What lies in guest memory before the first instruction, from the plan and the images alone: the VMM
//! loads it, and the owner's process measures the very same bytes.
//!
//! Kernel and initramfs are whatever the description named; nothing in them is believed.

pub mod acpi;
pub mod linux;
pub mod measured;
pub mod paging;

use super::layout::{
    ACPI, BOOT_PARAMS, CMDLINE, GDT, HIGH_RAM, KERNEL, PAGE_SIZE, PAGE_TABLES, SECRET_GPA,
    SECRET_SIZE, SNP_CPUID, SNP_SECRETS,
};
use crate::machine::plan::{MachinePlan, Technology};
use linux::KernelImage;

/// One piece of initial guest memory, whole pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Component {
    /// What it is: `gdt`, `boot-params`, `page-tables`, `cmdline`, `acpi`, `kernel`, `initrd`.
    pub name: &'static str,
    /// Where it goes; page-aligned.
    pub gpa: u64,
    /// The bytes, padded with zeros to whole pages.
    pub bytes: Vec<u8>,
}

/// Everything that is in guest memory at the start.
pub struct BootImage;

impl BootImage {
    /// The pieces in the order in which they are measured. Pure: the same plan and images give the same
    /// pieces everywhere.
    pub fn assemble(
        plan: &MachinePlan,
        kernel: &[u8],
        initrd: &[u8],
    ) -> Result<Vec<Component>, BootError> {
        let image = KernelImage::parse(kernel)?;
        if image.end() > plan.memory_bytes {
            return Err(BootError::Memory(plan.memory_bytes, image.end()));
        }
        let ramdisk = place_initrd(&image, plan.memory_bytes, initrd)?;
        let cmdline = command_line(plan, image.cmdline_max())?;
        let mut pieces = vec![
            component("gdt", GDT, paging::gdt()),
            component(
                "boot-params",
                BOOT_PARAMS,
                image.boot_params(plan.memory_bytes, reserved(plan.technology), ramdisk)?,
            ),
            component("page-tables", PAGE_TABLES, paging::page_tables()),
            component("cmdline", CMDLINE, cmdline),
            component("acpi", ACPI, acpi::tables(plan.vcpus, ACPI)),
            component("kernel", KERNEL, image.payload().to_vec()),
        ];
        if let Some((gpa, _)) = ramdisk {
            pieces.push(component("initrd", gpa, initrd.to_vec()));
        }
        check_layout(&pieces, plan.memory_bytes)?;
        Ok(pieces)
    }
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

/// Where the reserved memory in front of the kernel begins.
fn reserved(technology: Technology) -> u64 {
    match technology {
        Technology::SevSnp { .. } => SNP_CPUID,
        Technology::None | Technology::Sev { .. } | Technology::SevEs { .. } => SECRET_GPA,
    }
}

/// Why a guest cannot be assembled.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Not a kernel this machine can start.
    #[error("kernel image {0}")]
    Kernel(&'static str),
    /// Not an initramfs this machine can place.
    #[error("initramfs {0}")]
    Initrd(&'static str),
    /// Too little memory.
    #[error("guest memory of {0} bytes is too small: the kernel needs {1}")]
    Memory(u64, u64),
    /// The command line is too long or has a zero byte.
    #[error("kernel command line of {0} bytes: at most {1}, without zero bytes")]
    Cmdline(usize, usize),
    /// Two pieces overlap.
    #[error("{0} does not fit its place in guest memory")]
    Overlap(&'static str),
}

fn place_initrd(
    image: &KernelImage<'_>,
    memory: u64,
    initrd: &[u8],
) -> Result<Option<(u64, u64)>, BootError> {
    if initrd.is_empty() {
        return Ok(None);
    }
    let length = initrd.len() as u64;
    let top = memory.min(image.initrd_max().saturating_add(1));
    let start = top
        .checked_sub(length)
        .map(|start| start - start % PAGE_SIZE)
        .filter(|start| *start >= image.end())
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

fn check_layout(pieces: &[Component], memory: u64) -> Result<(), BootError> {
    let mut end = 0;
    for piece in pieces {
        let limit = if piece.gpa < HIGH_RAM {
            HIGH_RAM
        } else {
            memory
        };
        if piece.gpa < end || piece.gpa + piece.bytes.len() as u64 > limit {
            return Err(BootError::Overlap(piece.name));
        }
        end = piece.gpa + piece.bytes.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::linux::tests::small_image;
    use super::*;

    fn plan() -> MachinePlan {
        MachinePlan {
            name: "t".into(),
            vm_id: [1; 16],
            vcpus: 2,
            cpu: Default::default(),
            memory_bytes: 128 << 20,
            cmdline: "console=ttyS0".into(),
            technology: Technology::Sev {
                emulated: true,
                policy: 0,
            },
            disks: vec![],
            nets: vec![],
            vsock_cid: None,
        }
    }

    #[test]
    fn the_pieces_are_whole_pages_in_order_and_the_same_each_time() {
        let pieces = BootImage::assemble(&plan(), &small_image(), b"initramfs").unwrap();
        let names: Vec<&str> = pieces.iter().map(|p| p.name).collect();
        assert_eq!(
            names,
            [
                "gdt",
                "boot-params",
                "page-tables",
                "cmdline",
                "acpi",
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
        assert_eq!(
            pieces,
            BootImage::assemble(&plan(), &small_image(), b"initramfs").unwrap()
        );
    }

    #[test]
    fn the_measured_bytes_of_this_version_do_not_change_unnoticed() {
        let pieces = BootImage::assemble(&plan(), &small_image(), b"initramfs").unwrap();
        let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
        for piece in &pieces {
            digest.update(&piece.gpa.to_le_bytes());
            digest.update(&piece.bytes);
        }
        assert_eq!(hex::encode(digest.finish()), GOLDEN);
    }

    /// Owners compare against what their own copy of this code assembles: a change here is a new version.
    const GOLDEN: &str = "fb99a5fed388e5d1cc851f07e51fa43c215b58b06459da88ac4b96095cf1663c";

    #[test]
    fn every_input_is_in_the_pieces() {
        let base = BootImage::assemble(&plan(), &small_image(), b"initramfs").unwrap();
        let mut kernel = small_image();
        *kernel.last_mut().unwrap() ^= 1;
        assert_ne!(
            base,
            BootImage::assemble(&plan(), &kernel, b"initramfs").unwrap()
        );
        assert_ne!(
            base,
            BootImage::assemble(&plan(), &small_image(), b"initramfz").unwrap()
        );
        let other = MachinePlan {
            cmdline: "quiet".into(),
            ..plan()
        };
        assert_ne!(
            base,
            BootImage::assemble(&other, &small_image(), b"initramfs").unwrap()
        );
        let other = MachinePlan { vcpus: 3, ..plan() };
        assert_ne!(
            base,
            BootImage::assemble(&other, &small_image(), b"initramfs").unwrap()
        );
    }

    #[test]
    fn the_secret_page_is_named_on_the_command_line_of_a_confidential_guest_only() {
        let pieces = BootImage::assemble(&plan(), &small_image(), b"").unwrap();
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
