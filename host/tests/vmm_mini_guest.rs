//! A small freestanding guest on the real `/dev/kvm`, packed as a bzImage: it dirties 256 pages in turn and
//! prints its counter each time it has been round. No SSE, no hypercalls: it runs where Linux does not.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod vmm_support;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use casemate::vmm::protocol::{
    HandleKind, MachineState, MoverRequest, VmmEvent, VmmReply, VmmRequest,
};
use vmm_support::{Lines, Mover, Vmm, bzimage, image_file, kvm, migrate, plan};

#[test]
fn the_guest_runs_and_what_it_writes_is_in_the_dirty_log_exactly() {
    let lines = Lines::new();
    let mut vmm = launch(COUNTER, &lines);
    vmm.ask(VmmRequest::Run).unwrap();
    counts(&lines, 0, 3);
    vmm.ask(VmmRequest::Pause).unwrap();
    let mover = vmm.mover();
    let populated = mover.bitmap(MoverRequest::StartTracking);
    assert!(
        populated.contains(&WINDOW) && populated.contains(&0x1000),
        "kernel and window are populated"
    );
    assert!(
        mover.bitmap(MoverRequest::TakeDirty).is_empty(),
        "nothing runs"
    );
    let mut fewest = 256;
    for _ in 0..20 {
        let before = window(&mover);
        vmm.ask(VmmRequest::Resume).unwrap();
        std::thread::sleep(Duration::from_micros(100));
        vmm.ask(VmmRequest::Pause).unwrap();
        let after = window(&mover);
        let changed: Vec<u64> = (0..256)
            .filter(|n| before[*n as usize] != after[*n as usize])
            .map(|n| WINDOW + n)
            .collect();
        assert_eq!(mover.bitmap(MoverRequest::TakeDirty), changed);
        fewest = fewest.min(changed.len());
    }
    assert!(
        fewest < 256,
        "some rounds were short enough to tell pages apart"
    );
}

#[test]
fn the_guest_moves_there_and_back_and_counts_without_gap_or_repeat() {
    let lines = Lines::new();
    let mut vmm = launch(COUNTER, &lines);
    vmm.ask(VmmRequest::Run).unwrap();
    let mut next = counts(&lines, 0, 5);
    for _ in 0..3 {
        let mut target = Vmm::prepare(&plan(2, MEMORY, ""), handles(None, &lines)).unwrap();
        target.ask(VmmRequest::Incoming { copy: false }).unwrap();
        let moved = migrate(&mut vmm, &mut target);
        assert!(moved.pages >= 256 && moved.state_bytes > 4096, "{moved:?}");
        assert!(
            matches!(status(&mut vmm), MachineState::Paused),
            "the source stands"
        );
        vmm = target;
        next = counts(&lines, next, 200);
    }
}

#[test]
fn a_failed_move_leaves_the_guest_running_and_the_next_one_succeeds() {
    let lines = Lines::new();
    let mut vmm = launch(COUNTER, &lines);
    vmm.ask(VmmRequest::Run).unwrap();
    let mut next = counts(&lines, 0, 5);
    let mover = vmm.mover();
    let first = mover.bitmap(MoverRequest::StartTracking);
    mover.bitmap(MoverRequest::TakeDirty);
    mover.ask(MoverRequest::Pause).unwrap();
    mover.ask(MoverRequest::SaveState).unwrap();
    mover.ask(MoverRequest::Release).unwrap();
    mover.ask(MoverRequest::Resume).unwrap();
    next = counts(&lines, next, 50);
    // Again, and this time the mover dies.
    assert_eq!(
        mover.bitmap(MoverRequest::StartTracking),
        first,
        "all populated pages again"
    );
    mover.ask(MoverRequest::Pause).unwrap();
    drop(mover);
    next = counts(&lines, next, 50);
    assert!(matches!(status(&mut vmm), MachineState::Running));
    let mut target = Vmm::prepare(&plan(2, MEMORY, ""), handles(None, &lines)).unwrap();
    target.ask(VmmRequest::Incoming { copy: false }).unwrap();
    migrate(&mut vmm, &mut target);
    counts(&lines, next, 50);
}

#[test]
fn a_mover_that_dies_after_the_release_does_not_start_the_guest() {
    let lines = Lines::new();
    let mut vmm = launch(COUNTER, &lines);
    vmm.ask(VmmRequest::Run).unwrap();
    let next = counts(&lines, 0, 5);
    let mover = vmm.mover();
    mover.ask(MoverRequest::Pause).unwrap();
    mover.ask(MoverRequest::Release).unwrap();
    assert_eq!(vmm.ask(VmmRequest::Resume).unwrap_err().code, "WRONG_STATE");
    drop(mover);
    let next = drain(&lines, next);
    assert!(matches!(status(&mut vmm), MachineState::Paused));
    assert!(
        lines.next(Duration::from_millis(100)).is_none(),
        "it stands"
    );
    vmm.ask(VmmRequest::Resume).unwrap();
    counts(&lines, next, 20);
}

#[test]
fn a_mover_cannot_leave_the_order_or_guest_memory() {
    let lines = Lines::new();
    let mut vmm = launch(COUNTER, &lines);
    assert!(vmm.ask(VmmRequest::Resume).is_err());
    vmm.ask(VmmRequest::Run).unwrap();
    let mover = vmm.mover();
    let code = |request| mover.ask(request).unwrap_err().code;
    assert_eq!(code(MoverRequest::TakeDirty), "WRONG_STATE");
    assert_eq!(code(MoverRequest::SaveState), "WRONG_STATE");
    assert_eq!(code(MoverRequest::Release), "WRONG_STATE");
    assert_eq!(code(MoverRequest::Activate), "WRONG_STATE");
    assert_eq!(
        code(MoverRequest::RestoreState { length: 1 }),
        "WRONG_STATE"
    );
    assert_eq!(
        code(MoverRequest::SendPages {
            pages: vec![MEMORY / 4096]
        }),
        "BAD_PAGES"
    );
    assert_eq!(
        code(MoverRequest::SendPages {
            pages: vec![0; 257]
        }),
        "BAD_PAGES"
    );
    assert_eq!(code(MoverRequest::PlatformEvidence), "NOT_CONFIDENTIAL");
    assert!(
        nix::unistd::write(&mover.memory, b"x").is_err(),
        "the source's memory is read-only"
    );
    counts(&lines, 0, 20);

    let mut target = Vmm::prepare(&plan(2, MEMORY, ""), handles(None, &lines)).unwrap();
    target.ask(VmmRequest::Incoming { copy: false }).unwrap();
    let mover = target.mover();
    let code = |request| mover.ask(request).unwrap_err().code;
    assert_eq!(code(MoverRequest::Activate), "WRONG_STATE");
    assert_eq!(
        code(MoverRequest::RestoreState { length: u64::MAX }),
        "BAD_STATE"
    );
    assert_eq!(
        code(MoverRequest::RestoreState { length: 4096 }),
        "BAD_STATE"
    );
    assert_eq!(code(MoverRequest::Activate), "WRONG_STATE");
}

#[test]
fn a_mover_that_asks_and_does_not_read_is_dropped_and_holds_up_nobody() {
    let lines = Lines::new();
    let mut vmm = launch(COUNTER, &lines);
    vmm.ask(VmmRequest::Run).unwrap();
    let mover = vmm.mover();
    mover.ask_without_reading(MoverRequest::TakeDirty, 100_000);
    assert!(matches!(status(&mut vmm), MachineState::Running));
    counts(&lines, 0, 20);
    drop(vmm.mover());
}

#[test]
fn a_guest_that_resets_or_breaks_is_reported() {
    for (code, expect) in [
        (RESET, "reset"),
        (POWER_OFF, "shutdown"),
        (BREAK, "triple-fault"),
    ] {
        let lines = Lines::new();
        let mut vmm = launch(code, &lines);
        vmm.ask(VmmRequest::Run).unwrap();
        let event = vmm.event(Duration::from_secs(10));
        assert_eq!(
            event,
            Some(VmmEvent::GuestStopped {
                reason: expect.into()
            })
        );
        assert!(matches!(status(&mut vmm), MachineState::Stopped));
    }
}

#[test]
fn bad_plans_and_images_are_refused_with_a_code() {
    let lines = Lines::new();
    let refused = |plan, handles| Vmm::prepare(&plan, handles).err().map(|e| e.code);
    assert_eq!(
        refused(plan(0, MEMORY, ""), handles(None, &lines)),
        Some("BAD_PLAN".into())
    );
    assert_eq!(
        refused(plan(1, 4096, ""), handles(None, &lines)),
        Some("MEMORY".into())
    );
    assert_eq!(
        refused(plan(1, MEMORY, ""), vec![(HandleKind::Kvm, kvm())]),
        Some("BAD_HANDLES".into())
    );
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let fake = vec![
        (HandleKind::Kvm, null),
        (HandleKind::Console, lines.handle()),
    ];
    assert_eq!(refused(plan(1, MEMORY, ""), fake), Some("KVM".into()));
    let garbage = image_file(&[0x5a; 9000]);
    let mut vmm = Vmm::prepare(&plan(1, MEMORY, ""), handles(Some(garbage), &lines)).unwrap();
    assert_eq!(
        vmm.ask(VmmRequest::Launch {
            binding: Box::default()
        })
        .unwrap_err()
        .code,
        "BAD_IMAGE"
    );
    assert_eq!(vmm.ask(VmmRequest::Run).unwrap_err().code, "WRONG_STATE");
}

fn launch(code: &[u8], lines: &Lines) -> Vmm {
    let mut vmm = Vmm::prepare(
        &plan(2, MEMORY, ""),
        handles(Some(image_file(&bzimage(code, 0))), lines),
    )
    .unwrap();
    let launched = vmm
        .ask(VmmRequest::Launch {
            binding: Box::default(),
        })
        .unwrap();
    assert!(matches!(launched, VmmReply::Launched(None)));
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

fn status(vmm: &mut Vmm) -> MachineState {
    let VmmReply::Status(status) = vmm.ask(VmmRequest::Status).unwrap() else {
        panic!("no status");
    };
    status.state
}

fn window(mover: &Mover) -> Vec<[u8; 4096]> {
    (0..256).map(|n| mover.page(WINDOW + n)).collect()
}

/// Reads `count` lines; each must be the counter's next one. Returns what comes next.
fn counts(lines: &Lines, mut last: u32, count: u32) -> u32 {
    for _ in 0..count {
        let (_, line) = lines
            .next(Duration::from_secs(20))
            .expect("the guest counts on");
        last += 256;
        assert_eq!(decode(&line), Some(last), "{line}");
    }
    last
}

/// Reads what is there; each line must be the next.
fn drain(lines: &Lines, mut last: u32) -> u32 {
    while let Some((_, line)) = lines.next(Duration::from_millis(100)) {
        last += 256;
        assert_eq!(decode(&line), Some(last), "{line}");
    }
    last
}

/// Eight nibbles as letters from `a`.
fn decode(line: &str) -> Option<u32> {
    (line.len() == 8).then_some(())?;
    line.bytes().try_fold(0u32, |value, byte| {
        Some((value << 4) | u32::from(byte.checked_sub(b'a')?))
    })
}

const MEMORY: u64 = 64 << 20;
/// First page the guest writes.
const WINDOW: u64 = 0x2000;
/// ```text
///         xor ebx, ebx ; mov edx, 0x3f8
/// outer:  inc rbx ; movzx eax, bl ; shl eax, 12 ; add eax, 0x2000000 ; mov [rax], rbx
///         test bl, bl ; jnz outer
///         mov ecx, 28
/// digit:  mov eax, ebx ; shr eax, cl ; and eax, 15 ; add al, 'a' ; out dx, al ; sub ecx, 4 ; jns digit
///         mov al, 10 ; out dx, al ; jmp outer
/// ```
const COUNTER: &[u8] = &[
    0x31, 0xdb, 0xba, 0xf8, 0x03, 0x00, 0x00, 0x48, 0xff, 0xc3, 0x0f, 0xb6, 0xc3, 0xc1, 0xe0, 0x0c,
    0x05, 0x00, 0x00, 0x00, 0x02, 0x48, 0x89, 0x18, 0x84, 0xdb, 0x75, 0xeb, 0xb9, 0x1c, 0x00, 0x00,
    0x00, 0x89, 0xd8, 0xd3, 0xe8, 0x83, 0xe0, 0x0f, 0x04, 0x61, 0xee, 0x83, 0xe9, 0x04, 0x79, 0xf1,
    0xb0, 0x0a, 0xee, 0xeb, 0xd2,
];
/// `mov al, 0xfe ; out 0x64, al ; jmp $`
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
/// `mov dx, 0x600 ; mov al, 0x34 ; out dx, al ; jmp $`
const POWER_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xeb, 0xfe];
/// `ud2` without an interrupt table
const BREAK: &[u8] = &[0x0f, 0x0b];
