//! Small freestanding guests on the real `/dev/kvm`: entered by PVH, with memory above 4 GiB, and told of ACPI's events.

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

use casemate::machine::plan::{MachinePlan, Technology};
use casemate::vmm::protocol::{HandleKind, MoverRequest, VmmRequest};
use vmm_support::{Lines, Vmm, bzimage, image_file, kvm, migrate, plan};

#[test]
fn an_elf_kernel_is_entered_by_pvh_and_finds_its_map_ecam_and_events() {
    for (memory, expect) in [(64 << 20, "ea"), (4 << 30, "eb")] {
        let lines = Lines::new();
        let mut vmm = launch(&plan(1, memory, ""), elf(PVH), &lines);
        vmm.ask(VmmRequest::Run).unwrap();
        assert_eq!(next(&lines), expect);
        vmm.ask(VmmRequest::PowerButton).unwrap();
        assert_eq!(next(&lines), "1");
        vmm.ask(VmmRequest::Pause).unwrap();
        let mover = vmm.mover();
        assert_eq!(
            mover.page(GENERATION)[..16],
            [7; 16],
            "the guest's own identity at first"
        );
        vmm.ask(VmmRequest::NewGeneration { id: [9; 16] }).unwrap();
        assert_eq!(mover.page(GENERATION)[..16], [9; 16]);
        drop(mover);
        vmm.ask(VmmRequest::Resume).unwrap();
        assert_eq!(next(&lines), "2");
        let running = vmm.ask(VmmRequest::NewGeneration { id: [9; 16] });
        assert_eq!(running.unwrap_err().code, "WRONG_STATE");
    }
}

#[test]
fn memory_above_4_gib_is_the_guests_and_moves_with_it() {
    let plan = plan(1, 5 << 30, "");
    let lines = Lines::new();
    let mut vmm = launch(&plan, bzimage(HIGH, 0), &lines);
    vmm.ask(VmmRequest::Run).unwrap();
    let mut count = counts(&lines, 0);
    let mover = vmm.mover();
    let populated = mover.bitmap(MoverRequest::StartTracking);
    assert!(populated.contains(&HIGH_PAGE), "bitmaps follow the file");
    vmm.ask(VmmRequest::Pause).unwrap();
    // Whatever was written meanwhile; then only the counter's own page.
    mover.bitmap(MoverRequest::TakeDirty);
    vmm.ask(VmmRequest::Resume).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    vmm.ask(VmmRequest::Pause).unwrap();
    assert_eq!(mover.bitmap(MoverRequest::TakeDirty), [HIGH_PAGE]);
    vmm.ask(VmmRequest::Resume).unwrap();
    drop(mover);
    for _ in 0..2 {
        let mut target = Vmm::prepare(&plan, handles(None, &lines)).unwrap();
        target.ask(VmmRequest::Incoming { copy: false }).unwrap();
        migrate(&mut vmm, &mut target);
        vmm = target;
        count = counts(&lines, count);
    }
}

#[test]
fn a_confidential_guest_gets_no_memory_above_4_gib() {
    let lines = Lines::new();
    let mut large = plan(1, 4 << 30, "");
    large.technology = Technology::Sev {
        emulated: true,
        policy: 1,
    };
    assert!(large.check().unwrap_err().contains("confidential"));
    let refused = Vmm::prepare(&large, handles(None, &lines)).err().unwrap();
    assert_eq!(refused.code, "BAD_PLAN");
}

fn launch(plan: &MachinePlan, kernel: Vec<u8>, lines: &Lines) -> Vmm {
    let mut vmm = Vmm::prepare(plan, handles(Some(image_file(&kernel)), lines)).unwrap();
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

fn next(lines: &Lines) -> String {
    let line = lines.next(Duration::from_secs(20));
    line.expect("the guest says something").1
}

/// Five lines, each the counter's next; returns the last.
fn counts(lines: &Lines, mut last: u32) -> u32 {
    for _ in 0..5 {
        last += 256;
        let line = next(lines);
        let value = line
            .bytes()
            .fold(0u32, |value, byte| (value << 4) | u32::from(byte - b'a'));
        assert_eq!(value, last, "{line}");
    }
    last
}

/// An ELF file with `code` at 16 MiB, its PVH entry.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0u8; 0x1000];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, b"\x7fELF\x02\x01\x01");
    set(16, &[2, 0, 62, 0]);
    set(0x20, &64u64.to_le_bytes());
    set(0x36, &[56, 0, 2, 0]);
    for (header, kind, offset, address, size) in [
        (64, 1u32, 0x800u64, 0x100_0000u64, 0x800u64),
        (120, 4, 0x200, 0, 20),
    ] {
        set(header, &kind.to_le_bytes());
        set(header + 8, &offset.to_le_bytes());
        set(header + 0x18, &address.to_le_bytes());
        set(header + 0x20, &size.to_le_bytes());
        set(header + 0x28, &size.to_le_bytes());
    }
    set(0x200, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    set(0x20c, b"Xen\0");
    set(0x210, &0x100_0000u32.to_le_bytes());
    set(0x800, code);
    image
}

/// Page of the memory file that holds the VM generation id.
const GENERATION: u64 = 0xff;
/// Page of the memory file that is at 4 GiB and three pages in the guest.
const HIGH_PAGE: u64 = (3 << 30) / 4096 + 3;
/// ```text
/// cmp dword ptr [ebx], 0x336ec578
/// jne stop
/// mov ecx, [0xe0000000]
/// mov edx, 0x3f8
/// mov al, 'm'
/// cmp ecx, 0x00081b36
/// jne out
/// mov al, 'e'
/// out:
/// out dx, al
/// mov esi, [ebx+40]
/// mov ecx, [ebx+48]
/// dec ecx
/// imul ecx, ecx, 24
/// add esi, ecx
/// mov al, [esi+4]
/// add al, 'a'
/// out dx, al
/// mov al, 10
/// out dx, al
/// wait:
/// mov edx, 0x608
/// in al, dx
/// test al, al
/// jz wait
/// mov edx, 0x3f8
/// add al, '0'
/// out dx, al
/// mov al, 10
/// out dx, al
/// jmp wait
/// stop:
/// mov edx, 0x600
/// mov al, 0x34
/// out dx, al
/// jmp stop
/// ```
const PVH: &[u8] = &[
    0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x75, 0x44, 0x8b, 0x0d, 0x00, 0x00, 0x00, 0xe0, 0xba, 0xf8,
    0x03, 0x00, 0x00, 0xb0, 0x6d, 0x81, 0xf9, 0x36, 0x1b, 0x08, 0x00, 0x75, 0x02, 0xb0, 0x65, 0xee,
    0x8b, 0x73, 0x28, 0x8b, 0x4b, 0x30, 0x49, 0x6b, 0xc9, 0x18, 0x01, 0xce, 0x8a, 0x46, 0x04, 0x04,
    0x61, 0xee, 0xb0, 0x0a, 0xee, 0xba, 0x08, 0x06, 0x00, 0x00, 0xec, 0x84, 0xc0, 0x74, 0xf6, 0xba,
    0xf8, 0x03, 0x00, 0x00, 0x04, 0x30, 0xee, 0xb0, 0x0a, 0xee, 0xeb, 0xe9, 0xba, 0x00, 0x06, 0x00,
    0x00, 0xb0, 0x34, 0xee, 0xeb, 0xf6,
];
/// ```text
/// mov qword ptr [0xa020], 0x2000003
/// mov rax, 0x100000083
/// mov [0x2000000], rax
/// mov rdi, 0x100003000
/// xor ebx, ebx
/// outer:
/// mov edx, 0x3f8
/// inc dword ptr [rdi]
/// mov ebx, [rdi]
/// test bl, bl
/// jnz outer
/// mov ecx, 28
/// digit:
/// mov eax, ebx
/// shr eax, cl
/// and eax, 15
/// add al, 'a'
/// out dx, al
/// sub ecx, 4
/// jns digit
/// mov al, 10
/// out dx, al
/// jmp outer
/// ```
const HIGH: &[u8] = &[
    0x48, 0xc7, 0x04, 0x25, 0x20, 0xa0, 0x00, 0x00, 0x03, 0x00, 0x00, 0x02, 0x48, 0xb8, 0x83, 0x00,
    0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x00, 0x02, 0x48, 0xbf,
    0x00, 0x30, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x31, 0xdb, 0xba, 0xf8, 0x03, 0x00, 0x00, 0xff,
    0x07, 0x8b, 0x1f, 0x84, 0xdb, 0x75, 0xf3, 0xb9, 0x1c, 0x00, 0x00, 0x00, 0x89, 0xd8, 0xd3, 0xe8,
    0x83, 0xe0, 0x0f, 0x04, 0x61, 0xee, 0x83, 0xe9, 0x04, 0x79, 0xf1, 0xb0, 0x0a, 0xee, 0xeb, 0xda,
];
