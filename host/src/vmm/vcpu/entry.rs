//! State of the first vCPU at the entry points of the Linux boot protocol and of PVH.
//!
//! A guest in clear starts at the 64-bit one. A guest of AMD's own processor starts at the 32-bit one: without paging
//! its accesses are to encrypted memory whatever the tables say, it makes its own tables with the C-bit, and so the
//! position of that bit, which differs between hosts, is no input of the measurement.

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::vmm::boot::{linux, paging};
use crate::vmm::kvm::{KvmError, during};
use crate::vmm::layout::{GDT, PAGE_TABLES, START_INFO};

/// Registers with which a guest starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Instruction pointer.
    pub rip: u64,
    /// Second argument of the entry point: the zero page.
    pub rsi: u64,
}

impl Entry {
    /// The entry of a Linux kernel placed by [`BootImage`](crate::vmm::boot::BootImage).
    pub const LINUX: Self = Self {
        rip: linux::ENTRY,
        rsi: linux::BOOT_PARAMS_ADDRESS,
    };
}

/// Puts a vCPU at Linux's 32-bit entry point.
pub fn enter_linux_32(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let regs = kvm_regs {
        rip: linux::ENTRY_32,
        rsi: linux::BOOT_PARAMS_ADDRESS,
        rflags: 2,
        ..Default::default()
    };
    enter_protected_mode(vcpu, &regs)
}

/// Puts a vCPU at a PVH entry point (Xen's `docs/misc/pvh.pandoc`).
pub fn enter_pvh(vcpu: &VcpuFd, entry: u32) -> Result<(), KvmError> {
    let regs = kvm_regs {
        rip: entry.into(),
        rbx: START_INFO,
        rflags: 2,
        ..Default::default()
    };
    enter_protected_mode(vcpu, &regs)
}

/// Protected mode without paging, with the descriptor table of the layout.
fn enter_protected_mode(vcpu: &VcpuFd, regs: &kvm_regs) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(during("KVM_GET_SREGS"))?;
    flat_segments(&mut sregs, false);
    sregs.cr0 |= CR0_PE | CR0_ET;
    vcpu.set_sregs(&sregs).map_err(during("KVM_SET_SREGS"))?;
    vcpu.set_regs(regs).map_err(during("KVM_SET_REGS"))
}

/// Puts a vCPU into long mode at `entry`, with the descriptor and page tables of the layout.
pub fn enter_long_mode(vcpu: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(during("KVM_GET_SREGS"))?;
    flat_segments(&mut sregs, true);
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(during("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: entry.rip,
        rsi: entry.rsi,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(during("KVM_SET_REGS"))
}

/// Leaves a vCPU that has not run at reset, as it is measured: KVM's own state but for the type of the task
/// register, which KVM chooses by the processor's maker.
pub fn wait_at_reset(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(during("KVM_GET_SREGS"))?;
    sregs.tr.type_ = BUSY_16_BIT_TSS;
    vcpu.set_sregs(&sregs).map_err(during("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(during("KVM_GET_REGS"))?;
    regs.rdx = 0;
    vcpu.set_regs(&regs).map_err(during("KVM_SET_REGS"))
}

/// Leaves a vCPU that has not run at reset, but as QEMU has it and as it is measured with firmware: its first instruction
/// at `eip`, its task register of the 32-bit kind.
pub fn start_at_reset(vcpu: &VcpuFd, eip: u32) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(during("KVM_GET_SREGS"))?;
    sregs.tr.type_ = TSS_TYPE;
    sregs.cs.base = u64::from(eip & 0xffff_0000);
    vcpu.set_sregs(&sregs).map_err(during("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(during("KVM_GET_REGS"))?;
    regs.rip = u64::from(eip & 0xffff);
    regs.rdx = 0;
    vcpu.set_regs(&regs).map_err(during("KVM_SET_REGS"))
}

/// Model-specific registers of every vCPU at power-on, as firmware would leave them.
pub fn power_on_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    for (index, data) in POWER_ON {
        let entry = kvm_msr_entry {
            index: *index,
            data: *data,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| KvmError::State("MSR list"))?;
        let set = vcpu.set_msrs(&msrs).map_err(during("KVM_SET_MSRS"))?;
        if set != 1 {
            tracing::debug!(index, "power-on MSR not settable here");
        }
    }
    Ok(())
}

/// Flat segments and the descriptor table of the layout, for 64-bit code (`long`) or 32-bit.
fn flat_segments(sregs: &mut kvm_sregs, long: bool) {
    let data = segment(paging::DATA_SELECTOR, DATA_TYPE, false);
    sregs.cs = segment(paging::CODE_SELECTOR, CODE_TYPE, long);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        selector: paging::TSS_SELECTOR,
        type_: TSS_TYPE,
        s: 0,
        db: 0,
        ..data
    };
    sregs.gdt = kvm_dtable {
        base: if long {
            GDT
        } else {
            GDT + paging::GDT32_OFFSET
        },
        limit: paging::gdt_limit(),
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Where a processor begins.
pub const RESET_VECTOR: u32 = 0xffff_fff0;
/// Where the stack begins, in the first vCPU's hands only.
pub const BOOT_STACK: u64 = 0x8ff0;

const CODE_TYPE: u8 = 0xb;
const DATA_TYPE: u8 = 0x3;
const TSS_TYPE: u8 = 0xb;
const BUSY_16_BIT_TSS: u8 = 3;
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ON_WRITE_BACK: u64 = (1 << 11) | 6;
const POWER_ON: &[(u32, u64)] = &[
    (MISC_ENABLE, FAST_STRINGS),
    (MTRR_DEFAULT_TYPE, MTRR_ON_WRITE_BACK),
];
