//! The processor that a guest sees on the real `/dev/kvm`: models, many vCPUs, interrupts from outside, and how it stops.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod vmm_support;

use std::os::fd::OwnedFd;
use std::time::Duration;

use casemate::machine::cpu::{CpuBaseline, CpuModel, Topology};
use casemate::machine::plan::MachinePlan;
use casemate::vmm::protocol::{
    HandleKind, MachineState, RoleError, VmmEvent, VmmReply, VmmRequest,
};
use casemate::vmm::vcpu::features::{WORDS, words_of};
use casemate::vmm::vcpu::{cpuid, model};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;
use vmm_support::{Lines, Vmm, bzimage, image_file, kvm, migrate, plan};

#[test]
fn a_guest_of_a_named_model_is_told_its_features_and_no_more() {
    // What this KVM has of it: kvm_pvm leaves SSE3 and later out, and then says so.
    let whole = words_of(CpuModel::Baseline, false);
    let mut given = given(CpuModel::Host);
    match model::baseline(CpuModel::Baseline, &supported()) {
        Ok(baseline) => assert_eq!(baseline.words, words_of(CpuModel::Baseline, is_amd(&given))),
        Err(refused) => assert!(refused.to_string().contains("sse3"), "{refused}"),
    }
    for (word, model) in given.words.iter_mut().zip(whole) {
        *word &= model;
    }
    given.xsave.clear();
    let host = self::given(CpuModel::Host);
    assert_ne!(given.words, host.words, "the host has more");
    // Not asked of a guest, nor of KVM_GET_CPUID2: kvm_pvm puts the processor's own in place of what it was told.
    let plan = modelled(CpuModel::Baseline, given.clone());
    let leaves = cpuid::for_vcpu(&supported(), &plan.cpu, 0, 1, false);
    let of_the_vmm = 1 << 31 | 1 << 24; // HYPERVISOR, TSC_DEADLINE
    for (place, word) in WORDS.iter().zip(given.words) {
        let found = leaves
            .iter()
            .find(|leaf| (leaf.function, leaf.index) == (place.function, place.index));
        let value = found.map_or(0, |l| [l.eax, l.ebx, l.ecx, l.edx][place.register]);
        assert_eq!(value & !(of_the_vmm & place.ignored), word, "{place:x?}");
    }
    // KVM takes them, and a machine of that model runs.
    let lines = Lines::new();
    let mut vmm = launch(&plan, COUNT, &lines);
    vmm.ask(VmmRequest::Run).unwrap();
    assert_eq!(next(&lines), 1);
}

#[test]
fn a_host_that_lacks_a_feature_refuses_the_machine_and_names_it() {
    let mut given = given(CpuModel::Host);
    given.words[3] |= !given.words[3] & (1 << 27 | 1 << 23);
    let refused = prepare(&modelled(CpuModel::Host, given)).err().unwrap();
    assert_eq!(refused.code, "CPU_UNSUPPORTED");
    let named = refused.text.contains("movdiri") || refused.text.contains("bit 23 of CPUID 0x7.0");
    assert!(named, "{refused}");
}

#[test]
fn a_guest_whose_clock_this_host_cannot_give_is_refused() {
    let mut given = given(CpuModel::Host);
    let VmmReply::Prepared { tsc_khz } = prepared(&modelled(CpuModel::Host, given.clone())) else {
        panic!("no clock");
    };
    assert!(tsc_khz > 0);
    given.tsc_khz = tsc_khz;
    assert!(prepare(&modelled(CpuModel::Host, given.clone())).is_ok());
    given.tsc_khz = tsc_khz / 2;
    let other = prepare(&modelled(CpuModel::Host, given));
    if Kvm::new()
        .unwrap()
        .check_extension(kvm_ioctls::Cap::TscControl)
    {
        drop(other.ok().unwrap());
    } else {
        assert!(other.err().unwrap().text.contains("cannot scale"));
    }
}

#[test]
fn sixty_four_vcpus_run_and_move() {
    let mut wide = plan(64, MEMORY, "");
    wide.cpu.topology = Some(Topology {
        sockets: 2,
        cores: 16,
        threads: 2,
    });
    let lines = Lines::new();
    let mut vmm = launch(&wide, COUNT, &lines);
    vmm.ask(VmmRequest::Run).unwrap();
    let before = next(&lines);
    let mut target = Vmm::prepare(&wide, handles(None, &lines)).unwrap();
    target.ask(VmmRequest::Incoming { copy: false }).unwrap();
    migrate(&mut vmm, &mut target);
    drop(vmm);
    // Without a gap or a repeat, before and after.
    for count in 1..200 {
        assert_eq!(next(&lines), before + count);
    }
}

#[test]
fn a_panic_is_told_from_a_shutdown_a_reset_and_a_triple_fault() {
    for (code, reason) in [
        (PANIC, "panic"),
        (CRASH_KERNEL_THEN_OFF, "shutdown"),
        (RESET, "reset"),
        (BREAK, "triple-fault"),
    ] {
        let lines = Lines::new();
        let mut vmm = launch(&plan(1, MEMORY, ""), code, &lines);
        vmm.ask(VmmRequest::Run).unwrap();
        let expected = VmmEvent::GuestStopped {
            reason: reason.into(),
        };
        assert_eq!(vmm.event(Duration::from_secs(10)), Some(expected));
        let VmmReply::Status(status) = vmm.ask(VmmRequest::Status).unwrap() else {
            panic!("no status");
        };
        assert_eq!(status.state, MachineState::Stopped);
        assert_eq!(status.stopped.as_deref(), Some(reason));
    }
}

#[test]
fn an_nmi_reaches_a_running_guest_only() {
    let lines = Lines::new();
    let mut vmm = launch(&plan(1, MEMORY, ""), COUNT, &lines);
    assert_eq!(
        vmm.ask(VmmRequest::InjectNmi).unwrap_err().code,
        "WRONG_STATE"
    );
    vmm.ask(VmmRequest::Run).unwrap();
    next(&lines);
    vmm.ask(VmmRequest::InjectNmi).unwrap();
    // It has no interrupt table: the interrupt is its end.
    let end = VmmEvent::GuestStopped {
        reason: "triple-fault".into(),
    };
    assert_eq!(vmm.event(Duration::from_secs(10)), Some(end));
}

fn supported() -> CpuId {
    let kvm = Kvm::new().unwrap();
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()
}

fn is_amd(given: &CpuBaseline) -> bool {
    given.vendor == *b"AuthenticAMD"
}

fn given(cpu: CpuModel) -> CpuBaseline {
    model::baseline(cpu, &supported()).unwrap()
}

fn modelled(cpu: CpuModel, given: CpuBaseline) -> MachinePlan {
    let mut plan = plan(1, MEMORY, "");
    plan.cpu.model = cpu;
    plan.cpu.baseline = Some(given);
    plan
}

fn prepare(plan: &MachinePlan) -> Result<Vmm, RoleError> {
    Vmm::prepare(plan, handles(None, &Lines::new()))
}

fn prepared(plan: &MachinePlan) -> VmmReply {
    Vmm::prepare_reply(plan, handles(None, &Lines::new()))
        .unwrap()
        .1
}

fn launch(plan: &MachinePlan, code: &[u8], lines: &Lines) -> Vmm {
    let image = image_file(&bzimage(code, 0));
    let mut vmm = Vmm::prepare(plan, handles(Some(image), lines)).unwrap();
    vmm.ask(VmmRequest::Launch {
        binding: Box::default(),
    })
    .unwrap();
    vmm
}

fn handles(kernel: Option<OwnedFd>, lines: &Lines) -> Vec<(HandleKind, OwnedFd)> {
    let mut handles = vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, lines.handle()),
    ];
    handles.extend(kernel.map(|kernel| (HandleKind::Kernel, kernel)));
    handles
}

fn next(lines: &Lines) -> u32 {
    let (_, line) = lines.next(Duration::from_secs(20)).expect("a line");
    decode(&line)
}

/// Eight nibbles as letters from `a`.
fn decode(line: &str) -> u32 {
    assert_eq!(line.len(), 8, "{line}");
    line.bytes()
        .fold(0, |value, byte| (value << 4) | u32::from(byte - b'a'))
}

const MEMORY: u64 = 64 << 20;
/// `xor ebx, ebx ; mov edx, 0x3f8 ;` again: `inc ebx ;` print ebx `; jmp` again
const COUNT: &[u8] = &[
    0x31, 0xdb, 0xba, 0xf8, 0x03, 0x00, 0x00, 0xff, 0xc3, 0xb9, 0x1c, 0x00, 0x00, 0x00, 0x89, 0xd8,
    0xd3, 0xe8, 0x83, 0xe0, 0x0f, 0x04, 0x61, 0xee, 0x83, 0xe9, 0x04, 0x79, 0xf1, 0xb0, 0x0a, 0xee,
    0xeb, 0xe5,
];
/// `mov dx, 0x505 ; in al, dx ; and al, 1 ; out dx, al ; jmp $`: what the device offers, it gets.
const PANIC: &[u8] = &[0x66, 0xba, 0x05, 0x05, 0xec, 0x24, 0x01, 0xee, 0xeb, 0xfe];
/// `mov dx, 0x505 ; mov al, 2 ; out dx, al ; mov dx, 0x600 ; mov al, 0x34 ; out dx, al ; jmp $`
const CRASH_KERNEL_THEN_OFF: &[u8] = &[
    0x66, 0xba, 0x05, 0x05, 0xb0, 0x02, 0xee, 0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xeb, 0xfe,
];
/// `mov al, 0xfe ; out 0x64, al ; jmp $`
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
/// `ud2` without an interrupt table
const BREAK: &[u8] = &[0x0f, 0x0b];
