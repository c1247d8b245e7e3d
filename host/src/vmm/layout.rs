//! The map of guest physical addresses and ports: every fixed number of the machine, in one place.

/// Page size of guest memory.
pub const PAGE_SIZE: u64 = 4096;

/// Global descriptor table for the first instructions.
pub const GDT: u64 = 0x6000;
/// `struct boot_params`, the "zero page" of the Linux boot protocol.
pub const BOOT_PARAMS: u64 = 0x7000;
/// `struct hvm_start_info` of a kernel that is entered by PVH, with what it points to; one page.
pub const START_INFO: u64 = 0x8000;
/// Page map level 4; behind it one page of directory pointers and four of directories: 4 GiB, identity.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, with its terminating zero.
pub const CMDLINE_ROOM: usize = 0x1000;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI: RSDP first, the tables behind it.
pub const ACPI: u64 = 0xe_0000;
/// SMBIOS: the entry point, which firmware has on a 16-byte boundary of the last 64 KiB of the mebibyte, then the tables.
pub const SMBIOS: u64 = 0xf_0000;
/// The page that begins with the VM generation id, 16 bytes, of a plain guest.
pub const GENERATION: u64 = 0xf_f000;
/// End of the first mebibyte, where RAM goes on.
pub const HIGH_RAM: u64 = 0x10_0000;
/// The page that receives the launch secret: reserved in the e820 map, above 1 MiB (so that the kernel
/// does not mark it busy and `/dev/mem` may map it) and just below the kernel, which never decompresses over it.
pub const SECRET_GPA: u64 = KERNEL - PAGE_SIZE;
/// Size of the secret page.
pub const SECRET_SIZE: u64 = PAGE_SIZE;
/// The page that SEV-SNP firmware fills with the guest's secrets; reserved like [`SECRET_GPA`], which follows it.
pub const SNP_SECRETS: u64 = SECRET_GPA - PAGE_SIZE;
/// The page that SEV-SNP firmware checks: what the guest may believe of its processor.
pub const SNP_CPUID: u64 = SNP_SECRETS - PAGE_SIZE;
/// Where the compressed kernel is loaded; what most kernels prefer.
pub const KERNEL: u64 = 0x100_0000;

/// Least guest memory: kernel, its decompression and a small initramfs.
pub use crate::machine::plan::{MAX_LOW_MEMORY, MAX_MEMORY, MIN_MEMORY};

/// Where RAM goes on that does not fit below the PCI window: 4 GiB.
pub const HIGH_MEMORY: u64 = 4 << 30;
/// Start of the memory window of the PCI host bridge, where RAM below 4 GiB ends at the latest.
pub const PCI_WINDOW: u64 = MAX_LOW_MEMORY;
/// Last byte of that window.
pub const PCI_WINDOW_LAST: u64 = 0xdfff_ffff;
/// BAR of the first virtio function; the others follow.
pub const VIRTIO_BARS: u64 = 0xd000_0000;
/// Size of each BAR.
pub const VIRTIO_BAR_SIZE: u64 = 0x8000;
/// PCI configuration by memory access (ECAM): 4 KiB a function, bus 0 only.
pub const ECAM: u64 = 0xe000_0000;
/// Its size.
pub const ECAM_SIZE: u64 = 1 << 20;
/// What firmware sets aside for the ECAM ranges of all buses; its PCI window lies behind.
pub const PCI_ECAM_SPAN: u64 = 256 << 20;
/// Last byte of the PCI window of firmware.
pub const PCI_FIRMWARE_LAST: u64 = 0xfbff_ffff;
/// I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// KVM's identity map page for real mode on old processors.
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// KVM's task state segment, three pages.
pub const KVM_TSS: usize = 0xfeff_d000;

/// End of firmware's place, the reset vector in its last 16 bytes: 4 GiB.
pub const FIRMWARE_END: u64 = 4 << 30;

/// COM1.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt.
pub const COM1_GSI: u32 = 4;
/// Interrupt of ACPI's generic event device.
pub const EVENTS_GSI: u32 = 5;
/// Port that says, and forgets, which of its events have happened.
pub const EVENTS: u16 = 0x608;
/// Status and command port of the i8042; only the reset pulse is there.
pub const I8042_COMMAND: u16 = 0x64;
/// The i8042 command that pulses the reset line; ACPI's reset register is the same.
pub const RESET_VALUE: u8 = 0xfe;
/// ACPI sleep control register.
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS: u16 = 0x604;
/// Sleep type of S5 in the DSDT's `_S5_`.
pub const S5_SLEEP_TYPE: u8 = 5;
/// The panic device: one byte of events.
pub const PVPANIC: u16 = 0x505;
/// Clock and memory of a PC: index and data port; only behind firmware.
pub const CMOS: u16 = 0x70;
/// `fw_cfg`: selector and data port, and, from the fourth on, the address of a DMA request; only for firmware.
pub const FW_CFG: u16 = 0x510;
/// Power management registers of the chipset, where firmware puts them.
pub const POWER_MANAGEMENT: u16 = 0x600;
/// How far the ACPI sleep and event ports lie behind their places where firmware has the chipset's registers there.
pub const BEHIND_FIRMWARE: u16 = 0x10;
/// Registers of the slots for hot-plug, where QEMU has them: what came, what shall go, what the guest lets go of.
pub const HOTPLUG: u16 = 0xae00;
/// Their length in bytes.
pub const HOTPLUG_SIZE: u16 = 12;
/// PCI configuration address port, 4 bytes; the data port follows.
pub const PCI_CONFIG_ADDRESS: u16 = 0xcf8;
/// PCI configuration data port, 4 bytes.
pub const PCI_CONFIG_DATA: u16 = 0xcfc;

/// First interrupt number behind the I/O APIC's pins, for MSI-X.
pub const FIRST_MSI_GSI: u32 = 24;
/// Most virtio functions: slots 1 to 31 of bus 0.
pub const MAX_FUNCTIONS: usize = 31;

/// How much of `memory` bytes of RAM lies below 4 GiB; the rest begins at [`HIGH_MEMORY`].
pub fn low_memory(memory: u64) -> u64 {
    memory.min(MAX_LOW_MEMORY)
}
