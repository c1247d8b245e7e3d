//! A small freestanding firmware on the real `/dev/kvm`: it starts at the reset vector, asks `fw_cfg`, cannot write the
//! place it lies in, hears of the power button, moves with its place to another VMM, and switches the machine off.

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

use casemate::machine::plan::{FirmwarePlan, MachinePlan};
use casemate::vmm::protocol::{HandleKind, VmmEvent, VmmRequest};
use vmm_support::{Lines, Vmm, bzimage, image_file, kvm, migrate, plan};

#[test]
fn firmware_starts_at_the_reset_vector_moves_in_its_place_and_switches_off() {
    let plan = firmware_plan();
    let lines = Lines::new();
    let mut first = handles(&lines);
    first.push((HandleKind::Firmware, image_file(&image())));
    let mut vmm = Vmm::prepare(&plan, first).unwrap();
    let binding = Box::default();
    vmm.ask(VmmRequest::Launch { binding }).unwrap();
    vmm.ask(VmmRequest::Run).unwrap();
    assert_eq!(next(&lines), "Q0", "the signature's first letter");
    assert_eq!(next(&lines), "R0", "what it wrote over did not change");
    vmm.ask(VmmRequest::PowerButton).unwrap();
    let pressed = (0..5).any(|_| next(&lines) == "R1");
    assert!(pressed, "the events' port lies behind the chipset's");
    assert_eq!(next(&lines), "R0");
    let mut target = Vmm::prepare(&plan, handles(&lines)).unwrap();
    target.ask(VmmRequest::Incoming { copy: false }).unwrap();
    migrate(&mut vmm, &mut target);
    for _ in 0..3 {
        assert_eq!(next(&lines), "R0");
    }
    let event = target.event(Duration::from_secs(30));
    let Some(VmmEvent::GuestStopped { reason }) = event else {
        panic!("{event:?}");
    };
    assert_eq!(reason, "shutdown");
}

#[test]
fn what_is_no_firmware_of_the_plan_is_refused() {
    let lines = Lines::new();
    for (image, words) in [
        (Some(image()[..1 << 20].to_vec()), None),
        (Some(vec![0; (2 << 20) + 1]), Some("length")),
        (Some(vec![0; 8]), Some("length")),
        (None, Some("no firmware image")),
    ] {
        let mut given = handles(&lines);
        given.extend(image.map(|image| (HandleKind::Firmware, image_file(&image))));
        // A kernel does not stand in for it.
        given.push((HandleKind::Kernel, image_file(&bzimage(&[0xf4], 0))));
        let mut vmm = Vmm::prepare(&firmware_plan(), given).unwrap();
        let binding = Box::default();
        let answer = vmm.ask(VmmRequest::Launch { binding });
        match words {
            None => drop(answer.unwrap()),
            Some(words) => {
                let error = answer.unwrap_err();
                assert_eq!(error.code, "BAD_IMAGE");
                assert!(error.text.contains(words), "{error}");
            }
        }
    }
}

fn firmware_plan() -> MachinePlan {
    MachinePlan {
        firmware: FirmwarePlan::for_image(2 << 20),
        ..plan(1, 64 << 20, "")
    }
}

fn handles(lines: &Lines) -> Vec<(HandleKind, OwnedFd)> {
    vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, lines.handle()),
    ]
}

fn next(lines: &Lines) -> String {
    let line = lines.next(Duration::from_secs(20));
    line.expect("the firmware says something").1
}

/// 2 MiB; code, a mark and the reset vector in the last 64 KiB.
fn image() -> Vec<u8> {
    let mut image = vec![0xf4; 2 << 20];
    let last = image.len() - 0x1_0000;
    let mut put = |at: usize, bytes: &[u8]| {
        image[last + at..last + at + bytes.len()].copy_from_slice(bytes);
    };
    put(0xf000, CODE);
    put(0xf800, b"R");
    // jmp 0xf000
    put(0xfff0, &[0xe9, 0x0d, 0xf0]);
    image
}

const CODE: &[u8] = &[
    0xba, 0x10, 0x05, // mov dx, 0x510
    0x31, 0xc0, // xor ax, ax
    0xef, // out dx, ax
    0x42, // inc dx
    0xec, // in al, dx
    0x88, 0xc3, // mov bl, al
    0xbe, 0x40, 0x00, // mov si, 64
    // line:
    0xba, 0x18, 0x06, // mov dx, 0x618
    0xec, // in al, dx
    0x04, 0x30, // add al, '0'
    0x88, 0xc7, // mov bh, al
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x88, 0xd8, // mov al, bl
    0xee, // out dx, al
    0x88, 0xf8, // mov al, bh
    0xee, // out dx, al
    0xb0, 0x0a, // mov al, '\n'
    0xee, // out dx, al
    0x2e, 0xc6, 0x06, 0x00, 0xf8, 0x00, // mov byte cs:[0xf800], 0
    0x2e, 0xa0, 0x00, 0xf8, // mov al, cs:[0xf800]
    0x88, 0xc3, // mov bl, al
    // 250,000 ticks of the timer: 70 ms
    0xba, 0x08, 0x06, // mov dx, 0x608
    0x66, 0xed, // in eax, dx
    0x66, 0x89, 0xc7, // mov edi, eax
    // wait:
    0x66, 0xed, // in eax, dx
    0x66, 0x29, 0xf8, // sub eax, edi
    0x66, 0x25, 0xff, 0xff, 0xff, 0x00, // and eax, 0xffffff
    0x66, 0x3d, 0x90, 0xd0, 0x03, 0x00, // cmp eax, 250000
    0x72, 0xed, // jb wait
    0x4e, // dec si
    0x75, 0xc2, // jnz line
    0xba, 0x04, 0x06, // mov dx, 0x604
    0xb8, 0x00, 0x20, // mov ax, 0x2000
    0xef, // out dx, ax
    0xf4, // hlt
];
