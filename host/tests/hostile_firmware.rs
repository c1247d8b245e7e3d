//! Firmware that wants out: a program in real mode on the real `/dev/kvm`, in the VMM's real cell with all filters on,
//! hammers the board's ports, `fw_cfg` and the configuration of every PCI function, whose BARs it so moves about, with
//! pseudo-random values. Needs root.
//!
//! `CASEMATE_HOSTILE_SECONDS` says for how long; a quarter of a minute without it.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
#![expect(
    unsafe_code,
    reason = "the firmware's code is assembled into this program"
)]

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use support::Host;

#[test]
fn firmware_that_hammers_its_board_neither_breaks_its_vmm_nor_leaves_its_cell() {
    let mut host = Host::new("hostile-fw");
    host.start();
    let description = describe(&host);
    let (mut starts, mut endings) = (0u32, BTreeSet::new());
    let until = Instant::now() + seconds();
    while Instant::now() < until {
        host.run(&["run", &description]).expect(0);
        starts += 1;
        let pid = host.listed("attacker").unwrap()["pid"].clone();
        // It resets or switches off now and then: that is its right.
        let mut guest;
        loop {
            std::thread::sleep(Duration::from_millis(300));
            guest = host.json(&["status", "attacker"]);
            assert_eq!(guest["pid"], pid, "the same process all the time");
            if guest["state"] != "running" || Instant::now() > until {
                break;
            }
        }
        let state = guest["state"].as_str().unwrap();
        endings.insert(format!("{state} {}", guest["stopped"]));
        assert!(
            ["running", "stopped"].contains(&state),
            "the VMM has ended: {guest}\n{}",
            host.log()
        );
        let report = host.json(&["sandbox", "probe", "attacker"]).to_string();
        assert!(!report.contains("\"refused\":false"), "{report}");
        host.run(&["stop", "attacker"]).expect(0);
    }
    let console = std::fs::read(host.path("state/guests/attacker/console.log")).unwrap();
    // One mark for every 256 actions.
    let marks = console.iter().filter(|byte| **byte == b'.').count();
    assert!(marks > 20, "{marks} marks only, ended as {endings:?}");
    let log = host.log();
    assert!(!log.contains("panicked"), "{log}");
    eprintln!("{starts} starts, {marks} marks, ended as {endings:?}");
}

fn describe(host: &Host) -> String {
    let mut image = vec![0xf4; 1 << 20];
    let last = image.len() - 0x1_0000;
    let code = firmware_code();
    image[last..last + code.len()].copy_from_slice(code);
    // jmp 0x0000 of the same segment
    let vector = image.len() - 16;
    image[vector..vector + 3].copy_from_slice(&[0xe9, 0x0d, 0x00]);
    host.write("attacker/fw.fd", image);
    host.write("attacker/data.raw", vec![0; 1 << 20]);
    let text = "name = \"attacker\"\nvcpus = 1\nmemory = \"64 MiB\"\n[boot]\nfirmware = \"fw.fd\"\n\
                [[disk]]\nid = \"data\"\npath = \"data.raw\"\n[vsock]\ncid = 3\n[rng]\n[balloon]\n[console]\n\
                [watchdog]\naction = \"report\"\n";
    let path = host.write("attacker/vm.toml", text);
    path.display().to_string()
}

fn seconds() -> Duration {
    let text = std::env::var("CASEMATE_HOSTILE_SECONDS").unwrap_or_default();
    Duration::from_secs(text.parse().unwrap_or(15))
}

fn firmware_code() -> &'static [u8] {
    unsafe extern "C" {
        static firmware_code_start: u8;
        static firmware_code_end: u8;
    }
    // SAFETY: both symbols are defined below, in this order and in one section; what is between them is never written.
    unsafe {
        let start = &raw const firmware_code_start;
        let length = (&raw const firmware_code_end).offset_from_unsigned(start);
        std::slice::from_raw_parts(start, length)
    }
}

// Real mode, at the start of the last 64 KiB; no stack, no memory. Registers: ebx the generator's state, di counts.
// An action is to write, or read, a board's port with a random value of random width; or to write a register of a
// function of bus 0, half the time its first BAR or its command register.
std::arch::global_asm!(
    r#"
    .pushsection .rodata.hostile_fw, "a", @progbits
    .globl firmware_code_start
    .globl firmware_code_end
    .code16
firmware_code_start:
    rdtsc
    or      eax, 1
    mov     ebx, eax
    xor     di, di
2:
    inc     di
    test    di, 0xff
    jnz     3f
    mov     dx, 0x3f8
    mov     al, '.'
    out     dx, al
3:
    imul    ebx, ebx, 1664525
    add     ebx, 1013904223
    mov     eax, ebx
    shr     eax, 28
    cmp     al, 6
    jb      6f
    // a port of the board: 0x510 to 0x51f, 0x600 to 0x61f, 0x70, 0x71
    mov     ecx, ebx
    shr     ecx, 16
    mov     dx, 0x510
    and     cx, 0xf
    test    ebx, 0x1000000
    jz      4f
    mov     dx, 0x600
    test    ebx, 0x2000000
    jz      4f
    mov     dx, 0x70
    and     cx, 1
4:
    add     dx, cx
    imul    ebx, ebx, 1664525
    add     ebx, 1013904223
    mov     eax, ebx
    shr     eax, 12
    mov     ecx, ebx
    shr     ecx, 29
    cmp     cl, 2
    jb      5f
    je      7f
    cmp     cl, 5
    jb      8f
    out     dx, eax
    jmp     2b
5:
    in      eax, dx
    jmp     2b
7:
    out     dx, al
    jmp     2b
8:
    out     dx, ax
    jmp     2b
6:
    // a register: bits 15 to 8 are the function, 7 to 2 the register
    mov     eax, ebx
    shr     eax, 8
    and     eax, 0xf8fc
    test    ebx, 0x4000000
    jz      9f
    and     eax, 0xf810
    cmp     al, 0x10
    je      9f
    or      al, 4
9:
    or      eax, 0x80000000
    mov     dx, 0xcf8
    out     dx, eax
    imul    ebx, ebx, 1664525
    add     ebx, 1013904223
    mov     eax, ebx
    mov     dx, 0xcfc
    out     dx, eax
    jmp     2b
firmware_code_end:
    .code64
    .popsection
"#
);
