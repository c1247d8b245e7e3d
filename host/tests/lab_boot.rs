//! Debian's kernel as it finds this machine, in the lab: from an ELF file and from a bzImage, with memory above 4 GiB,
//! without a word of complaint about ACPI, and shut down by the power button.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod vmm_support;

use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use casemate::vmm::protocol::{HandleKind, VmmEvent, VmmRequest};
use vmm_support::{Lines, Vmm, kvm, plan};

#[test]
fn linux_boots_from_an_elf_file_with_memory_above_4_gib() {
    let _turn = turn();
    let (_vmm, _lines, said) = boot("LAB_GUEST_VMLINUX", 4 << 10);
    let expected = [
        "DMI: Casemate Casemate virtual machine",
        "ACPI: PCI Root Bridge [PCI0] (domain 0000 [bus 00])",
        "PCI: MMCONFIG at [mem 0xe0000000-0xe00fffff] reserved",
        "BIOS-e820: [mem 0x0000000100000000-0x000000013fffffff] usable",
    ];
    for words in expected {
        assert!(
            said.iter().any(|line| line.contains(words)),
            "no `{words}`: {said:#?}"
        );
    }
    let up = said.iter().find(|line| line.contains("guest: up")).unwrap();
    let memory: u64 = up
        .rsplit_once("memory_mib=")
        .unwrap()
        .1
        .trim()
        .parse()
        .unwrap();
    assert!(memory > 3700, "{up}");
    assert_no_complaint(&said);
}

#[test]
fn linux_hears_the_power_button_and_shuts_down() {
    let _turn = turn();
    let (mut vmm, lines, said) = boot("LAB_GUEST_VMLINUX", 256);
    vmm.ask(VmmRequest::PowerButton).unwrap();
    until(&lines, &mut vmm, "guest: power button", said);
    let stopped = VmmEvent::GuestStopped {
        reason: "shutdown".into(),
    };
    assert_eq!(vmm.event(Duration::from_secs(30)), Some(stopped));
}

#[test]
fn linux_boots_from_a_bzimage_and_likes_acpi_too() {
    let _turn = turn();
    let (_vmm, _lines, said) = boot("LAB_GUEST_KERNEL", 256);
    assert_no_complaint(&said);
}

/// One guest at a time: several that boot at once are more than the lab's emulation bears.
fn turn() -> MutexGuard<'static, ()> {
    static ONE_GUEST: Mutex<()> = Mutex::new(());
    ONE_GUEST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Boots up to `guest: ready`; what the console said until then.
fn boot(kernel: &str, memory_mib: u64) -> (Vmm, Lines, Vec<String>) {
    let lines = Lines::new();
    let open = |variable: &str| {
        let path = std::env::var_os(variable).expect("runs in the lab");
        File::open(path).unwrap().into()
    };
    let handles = vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, lines.handle()),
        (HandleKind::Kernel, open(kernel)),
        (HandleKind::Initrd, open("LAB_GUEST_INITRD")),
    ];
    let plan = plan(1, memory_mib << 20, "console=ttyS0 panic=-1");
    let mut vmm = Vmm::prepare(&plan, handles).unwrap();
    vmm.ask(VmmRequest::Launch {
        binding: Box::default(),
    })
    .unwrap();
    vmm.ask(VmmRequest::Run).unwrap();
    let said = until(&lines, &mut vmm, "guest: ready", Vec::new());
    (vmm, lines, said)
}

/// Waits for a line; `said` is what was said before, for whoever reads of a failure.
fn until(lines: &Lines, vmm: &mut Vmm, words: &str, mut said: Vec<String>) -> Vec<String> {
    let limit = Instant::now() + Duration::from_secs(60);
    while Instant::now() < limit {
        if let Some((_, line)) = lines.next(Duration::from_secs(1)) {
            let found = line.contains(words);
            said.push(line);
            if found {
                return said;
            }
        } else if let Some(event) = vmm.event(Duration::from_millis(1)) {
            panic!("{event:?}: {said:#?}");
        }
    }
    panic!("no `{words}`: {said:#?}");
}

fn assert_no_complaint(said: &[String]) {
    let complaints = [
        "ACPI Error",
        "ACPI BIOS",
        "ACPI Warning",
        "Firmware Bug",
        "can't claim",
        "FW_BUG",
    ];
    let bad: Vec<_> = said
        .iter()
        .filter(|line| complaints.iter().any(|words| line.contains(words)))
        .collect();
    assert!(bad.is_empty(), "{bad:#?}");
}
