//! The registers that an owner expects in a measurement are those that KVM holds when a launch is measured.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use casemate::machine::plan::{MachinePlan, Technology};
use casemate::vmm::boot::measured::vcpu_states;
use casemate::vmm::vcpu::entry::{
    Entry, RESET_VECTOR, enter_long_mode, start_at_reset, wait_at_reset,
};
use casemate_attest::measure::vcpu::CpuSignature;
use casemate_attest::measure::vmsa::{Profile, ResetState, SevFeatures};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::Kvm;

#[test]
fn what_is_measured_of_each_vcpu_is_what_kvm_holds() {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let plan = MachinePlan {
        firmware: None,
        name: "registers".into(),
        vm_id: [0; 16],
        vcpus: 2,
        cpu: Default::default(),
        memory_bytes: 64 << 20,
        cmdline: String::new(),
        technology: Technology::SevSnp {
            emulated: true,
            policy: 0x3_0000,
        },
        disks: vec![],
        nets: vec![],
        vsock_cid: None,
        small: Default::default(),
        hotplug: Default::default(),
    };
    let states = vcpu_states(&plan);
    assert_eq!(states.len(), 2);
    for (id, measured) in (0u64..).zip(&states) {
        let vcpu = vm.create_vcpu(id).unwrap();
        match id {
            0 => enter_long_mode(&vcpu, Entry::LINUX).unwrap(),
            _ => wait_at_reset(&vcpu).unwrap(),
        }
        let (special, general) = (vcpu.get_sregs().unwrap(), vcpu.get_regs().unwrap());
        assert_eq!(of_kvm(&special, &general), of_page(measured), "vCPU {id}");
    }
}

#[test]
fn what_is_measured_with_firmware_is_what_kvm_holds() {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let ap_eip = 0x80_b004;
    for (id, eip) in [(0, RESET_VECTOR), (1, ap_eip)] {
        let measured = ResetState::at(eip, Profile::Qemu, CpuSignature(0), SevFeatures::SNP_ACTIVE);
        let vcpu = vm.create_vcpu(id).unwrap();
        start_at_reset(&vcpu, eip).unwrap();
        let (special, general) = (vcpu.get_sregs().unwrap(), vcpu.get_regs().unwrap());
        assert_eq!(
            of_kvm(&special, &general),
            of_page(&measured.page()),
            "vCPU {id}"
        );
    }
}

/// Name and value of everything that both sides hold. A VMSA adds what hardware or KVM force on every guest
/// (EFER.SVME, CR4.MCE) and leaves out what KVM clears (CR0.CD and NW): these are set aside.
type Registers = Vec<(&'static str, u64)>;

fn of_kvm(special: &kvm_sregs, general: &kvm_regs) -> Registers {
    let mut all: Registers = vec![
        ("cr0", special.cr0 & !CACHE_BITS),
        ("cr3", special.cr3),
        ("cr4", special.cr4 & !MCE),
        ("efer", special.efer & !SVME),
        ("rip", general.rip),
        ("rsp", general.rsp),
        ("rbp", general.rbp),
        ("rsi", general.rsi),
        ("rdx", general.rdx),
        ("rflags", general.rflags),
    ];
    for (name, segment) in [
        ("es", special.es),
        ("cs", special.cs),
        ("ss", special.ss),
        ("ds", special.ds),
        ("fs", special.fs),
        ("gs", special.gs),
        ("tr", special.tr),
    ] {
        all.push((name, packed(&segment)));
        all.push((name, segment.base));
    }
    for (name, table) in [("gdt", special.gdt), ("idt", special.idt)] {
        let kvm_dtable { base, limit, .. } = table;
        all.push((name, u64::from(limit)));
        all.push((name, base));
    }
    all
}

/// Offsets: AMD APM volume 2, table B-4.
fn of_page(page: &[u8; 4096]) -> Registers {
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    let mut all: Registers = vec![
        ("cr0", word(0x158) & !CACHE_BITS),
        ("cr3", word(0x150)),
        ("cr4", word(0x148) & !MCE),
        ("efer", word(0xd0) & !SVME),
        ("rip", word(0x178)),
        ("rsp", word(0x1d8)),
        ("rbp", word(0x328)),
        ("rsi", word(0x330)),
        ("rdx", word(0x310)),
        ("rflags", word(0x170)),
    ];
    for (name, at) in [
        ("es", 0x00),
        ("cs", 0x10),
        ("ss", 0x20),
        ("ds", 0x30),
        ("fs", 0x40),
        ("gs", 0x50),
        ("tr", 0x90),
    ] {
        all.push((name, word(at)));
        all.push((name, word(at + 8)));
    }
    for (name, at) in [("gdt", 0x60), ("idt", 0x80)] {
        all.push((name, word(at) >> 32));
        all.push((name, word(at + 8)));
    }
    all
}

/// Selector, attributes and limit as a VMSA packs them.
fn packed(segment: &kvm_segment) -> u64 {
    let attributes = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.avl) << 8
        | u64::from(segment.l) << 9
        | u64::from(segment.db) << 10
        | u64::from(segment.g) << 11;
    u64::from(segment.selector) | attributes << 16 | u64::from(segment.limit) << 32
}

const CACHE_BITS: u64 = 1 << 29 | 1 << 30;
const MCE: u64 = 1 << 6;
const SVME: u64 = 1 << 12;
