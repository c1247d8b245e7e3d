//! A guest that wants out: a freestanding program on the real `/dev/kvm`, in the VMM's real cell with all filters on,
//! hammers ports, PCI configuration, registers and queues with pseudo-random values, while a neighbour counts. Needs root.
//!
//! `CASEMATE_HOSTILE_SECONDS` says for how long; a minute without it.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
#![expect(
    unsafe_code,
    reason = "the guest's code is assembled into this program"
)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use casemate::vmm::layout::{ECAM, HOTPLUG, VIRTIO_BARS};
use support::{Host, small_image};

#[test]
fn a_guest_that_hammers_every_device_neither_breaks_its_vmm_nor_leaves_nor_disturbs_its_neighbour()
{
    let mut host = Host::new("hostile");
    host.start();
    let neighbour = describe(&host, "neighbour", COUNTER, "");
    host.run(&["run", &neighbour]).expect(0);
    let attacker = describe(&host, "attacker", guest_code(), &devices(&host));
    let image = host.path("attacker/data.raw");
    let (mut starts, mut faults, mut endings) = (0u32, 0u64, BTreeSet::new());
    let until = Instant::now() + seconds();
    while Instant::now() < until {
        host.run(&["run", &attacker]).expect(0);
        starts += 1;
        for id in ["extra-1", "extra-2"] {
            let image = host.path(id).display().to_string();
            let words = ["vm", "attach", "attacker", "--disk", id, "--path", &image];
            // It may have stopped itself already.
            host.run(&words);
        }
        let pid = host.listed("attacker").unwrap()["pid"].clone();
        // The program ends itself now and then (a reset it hit upon, its own code overwritten): that is its right.
        let mut guest;
        loop {
            std::thread::sleep(Duration::from_millis(500));
            guest = host.json(&["status", "attacker"]);
            assert_eq!(guest["pid"], pid, "the same process all the time");
            if guest["state"] != "running" || Instant::now() > until {
                break;
            }
        }
        faults += guest["device_faults"].as_u64().unwrap();
        endings.insert(guest["state"].to_string());
        assert!(
            guest["state"] == "running" || guest["state"] == "stopped",
            "the VMM has ended: {guest}\n{}",
            host.log()
        );
        still_in_its_cell(&host);
        host.run(&["stop", "attacker"]).expect(0);
    }
    let least = 10 * seconds().as_secs();
    assert!(faults > least, "it met the devices {faults} times only");
    assert_eq!(
        fs::metadata(image).unwrap().len(),
        IMAGE,
        "the image's length"
    );
    let log = host.log();
    assert!(!log.contains("panicked"), "{log}");
    counts_without_gap(&host.path("state/guests/neighbour/console.log"));
    let state = host.listed("neighbour").unwrap()["state"].clone();
    assert_eq!(state, "running");
    host.run(&["stop", "neighbour"]).expect(0);
    eprintln!("{starts} starts, {faults} faults, ended as {endings:?}");
}

/// Every thread has its filter, and what must be refused is.
fn still_in_its_cell(host: &Host) {
    let report = host.json(&["sandbox", "probe", "attacker"]);
    let text = report.to_string();
    assert!(!text.contains("\"refused\":false"), "{text}");
}

/// The neighbour's lines, each the counter's next.
fn counts_without_gap(log: &Path) {
    let text = fs::read_to_string(log).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.pop(); // perhaps half a line
    for (line, number) in lines.iter().zip(1u32..) {
        let value = line
            .bytes()
            .fold(0u32, |value, byte| (value << 4) | u32::from(byte - b'a'));
        assert_eq!(value, number * 256, "line {number}: {line}");
    }
    let wanted = 10 * seconds().as_secs() as usize;
    assert!(lines.len() > wanted, "{} lines only", lines.len());
}

/// All there is, each twice where that is possible; the watchdog only barks.
fn devices(host: &Host) -> String {
    for id in ["extra-1", "extra-2"] {
        host.write(id, vec![0; IMAGE as usize]);
    }
    let image = fs::File::create(host.path("data.raw")).unwrap();
    image.set_len(IMAGE).unwrap();
    fs::create_dir_all(host.path("attacker")).unwrap();
    fs::rename(host.path("data.raw"), host.path("attacker/data.raw")).unwrap();
    let mut text = String::from(
        "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n[[disk]]\nid = \"rom\"\npath = \"initrd\"\nread_only = true\n",
    );
    // A host without tun has one device less to offer.
    if Path::new("/dev/net/tun").exists() {
        let tap = format!("hst{}", std::process::id());
        text += &format!("[[net]]\nid = \"net0\"\ntap = {tap:?}\nmac = \"52:54:00:00:00:01\"\n");
    }
    text += "[vsock]\ncid = 3\n[rng]\n[balloon]\n[console]\n[watchdog]\naction = \"report\"\n";
    text
}

fn describe(host: &Host, name: &str, code: &[u8], devices: &str) -> String {
    let description = host.describe(name, name, devices);
    let mut image = small_image();
    image.resize(1024 + 0x200 + code.len().next_multiple_of(4096), 0);
    image[1024 + 0x200..][..code.len()].copy_from_slice(code);
    host.write(&format!("{name}/vmlinuz"), image);
    description
}

fn seconds() -> Duration {
    let text = std::env::var("CASEMATE_HOSTILE_SECONDS").unwrap_or_default();
    Duration::from_secs(text.parse().unwrap_or(60))
}

const IMAGE: u64 = 1 << 20;
/// Counts and prints, as in `vmm_mini_guest.rs`.
const COUNTER: &[u8] = &[
    0x31, 0xdb, 0xba, 0xf8, 0x03, 0x00, 0x00, 0x48, 0xff, 0xc3, 0x0f, 0xb6, 0xc3, 0xc1, 0xe0, 0x0c,
    0x05, 0x00, 0x00, 0x00, 0x02, 0x48, 0x89, 0x18, 0x84, 0xdb, 0x75, 0xeb, 0xb9, 0x1c, 0x00, 0x00,
    0x00, 0x89, 0xd8, 0xd3, 0xe8, 0x83, 0xe0, 0x0f, 0x04, 0x61, 0xee, 0x83, 0xe9, 0x04, 0x79, 0xf1,
    0xb0, 0x0a, 0xee, 0xeb, 0xd2,
];

fn guest_code() -> &'static [u8] {
    unsafe extern "C" {
        static hostile_code: u8;
        static hostile_code_end: u8;
    }
    // SAFETY: both symbols are defined below, in this order and in one section; what is between them is never written.
    unsafe {
        let start = &raw const hostile_code;
        let length = (&raw const hostile_code_end).offset_from_unsigned(start);
        std::slice::from_raw_parts(start, length)
    }
}

// 64-bit code without a fixed address, entered in long mode with 4 GiB mapped one to one. Registers: rbx the generator's
// state (xorshift), r13 a device's registers, r14 the area that rings and buffers are in. Queue q of device d has its rings
// at r14 + d * 64 KiB + q * 16 KiB, a page each; buffers are 1 MiB further on. No SSE: the host's KVM may not have it.
std::arch::global_asm!(
    r#"
    .pushsection .rodata.hostile, "a", @progbits
    .globl hostile_code
    .globl hostile_code_end
hostile_code:
    mov     rsp, 0x2f00000
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    or      rax, 1
    mov     rbx, rax
    mov     r14d, 0x2000000

.Lh_loop:
    lea     rbp, [rip + .Lh_loop]
    push    rbp
    call    .Lh_next
    and     eax, 31
    cmp     eax, 3
    jb      .Lh_port_write
    je      .Lh_port_read
    cmp     eax, 7
    jb      .Lh_register_write
    je      .Lh_register_read
    cmp     eax, 9
    jb      .Lh_config
    je      .Lh_start
    cmp     eax, 12
    jb      .Lh_header
    je      .Lh_reset
    cmp     eax, 14
    jb      .Lh_scribble
    jmp     .Lh_offer

    // rax: the next pseudo-random number
.Lh_next:
    mov     rax, rbx
    shl     rax, 13
    xor     rbx, rax
    mov     rax, rbx
    shr     rax, 7
    xor     rbx, rax
    mov     rax, rbx
    shl     rax, 17
    xor     rbx, rax
    mov     rax, rbx
    ret

    // rax: a value that means something more often than chance has it
.Lh_value:
    call    .Lh_next
    mov     rcx, rax
    and     ecx, 7
    shr     rax, 8
    cmp     ecx, 4
    jb      .Lh_value_buffer
    je      .Lh_value_small
    cmp     ecx, 5
    je      .Lh_value_end
    cmp     ecx, 6
    je      .Lh_value_ones
    ret
.Lh_value_buffer:
    and     eax, 0x1ffff0
    add     rax, r14
    ret
.Lh_value_small:
    and     eax, 0xff
    ret
.Lh_value_end:
    and     eax, 0xff
    neg     rax
    add     rax, 0x4000000
    ret
.Lh_value_ones:
    mov     rax, -1
    ret

    // r13: a device's registers; rdi: its rings
.Lh_device:
    call    .Lh_next
    and     eax, 15
    mov     r13d, {bars}
    mov     edi, eax
    shl     eax, 15
    add     r13, rax
    shl     edi, 16
    add     rdi, r14
    ret

.Lh_port_write:
    call    .Lh_next
    mov     edx, eax
    bt      eax, 20
    jnc     1f
    and     edx, 7
    add     edx, 0xcf8
    bt      eax, 21
    jc      1f
    sub     edx, 0x900
    bt      eax, 22
    jc      1f
    // The slots' registers, whole ones most of the time.
    and     edx, 7
    lea     edx, [edx * 2 + {hotplug}]
    and     edx, 0xfffc
1:  bt      rax, 33
    jc      2f
    bt      rax, 34
    jc      3f
    shr     rax, 40
    out     dx, al
    ret
2:  shr     rax, 35
    out     dx, eax
    ret
3:  shr     rax, 35
    out     dx, ax
    ret

.Lh_port_read:
    call    .Lh_next
    mov     edx, eax
    bt      eax, 21
    jc      2f
    and     edx, 0xc
    add     edx, {hotplug}
2:  bt      eax, 20
    jc      1f
    in      al, dx
    ret
1:  in      eax, dx
    ret

    // r8: a register of a device, of the first ones more often
.Lh_register:
    call    .Lh_device
    call    .Lh_next
    mov     r8d, eax
    and     r8d, 0x7fff
    bt      eax, 20
    jc      1f
    and     r8d, 0x3f
1:  add     r8, r13
    ret

.Lh_register_write:
    call    .Lh_register
.Lh_write:
    call    .Lh_value
    mov     r9, rax
    call    .Lh_next
    and     eax, 3
    cmp     eax, 1
    jb      1f
    je      2f
    cmp     eax, 2
    je      3f
    mov     [r8], r9
    ret
1:  mov     [r8], r9b
    ret
2:  mov     [r8], r9w
    ret
3:  mov     [r8], r9d
    ret

.Lh_register_read:
    call    .Lh_register
    mov     rax, [r8]
    mov     al, [r8 + 1]
    ret

    // By ports, or by memory, slots that are there more often.
.Lh_config:
    call    .Lh_next
    bt      eax, 25
    jnc     2f
    mov     r8d, eax
    and     r8d, 0xffffc
    bt      eax, 26
    jc      1f
    and     r8d, 0x7f0fc
1:  mov     eax, {ecam}
    add     r8, rax
    jmp     .Lh_write
2:
    and     eax, 0x7ffc
    or      eax, 0x80000000
    mov     dx, 0xcf8
    out     dx, eax
    call    .Lh_next
    mov     edx, eax
    and     edx, 3
    add     edx, 0xcfc
    bt      eax, 20
    jc      1f
    in      eax, dx
    ret
1:  mov     r9d, edx
    call    .Lh_value
    mov     edx, r9d
    out     dx, eax
    ret

    // What a driver does; one time in eight the rings are anywhere.
.Lh_start:
    call    .Lh_device
    mov     byte ptr [r13 + 0x14], 0
    mov     ecx, 1000
1:  cmp     byte ptr [r13 + 0x14], 0
    je      2f
    dec     ecx
    jnz     1b
2:  mov     byte ptr [r13 + 0x14], 3
    xor     ecx, ecx
3:  mov     dword ptr [r13], ecx
    mov     eax, [r13 + 4]
    mov     dword ptr [r13 + 8], ecx
    mov     dword ptr [r13 + 0xc], eax
    inc     ecx
    cmp     ecx, 2
    jb      3b
    mov     byte ptr [r13 + 0x14], 11
    movzx   r9d, word ptr [r13 + 0x12]
    and     r9d, 7
    xor     r10d, r10d
4:  cmp     r10d, r9d
    jae     6f
    mov     word ptr [r13 + 0x16], r10w
    mov     word ptr [r13 + 0x18], 64
    mov     word ptr [r13 + 0x1a], r10w
    mov     rsi, rdi
    call    .Lh_next
    test    al, 7
    jnz     5f
    call    .Lh_value
    mov     rsi, rax
5:  mov     [r13 + 0x20], rsi
    add     rsi, 0x1000
    mov     [r13 + 0x28], rsi
    mov     dword ptr [rdi + 0x1000], 0
    add     rsi, 0x1000
    mov     [r13 + 0x30], rsi
    mov     word ptr [r13 + 0x1c], 1
    add     rdi, 0x4000
    inc     r10d
    jmp     4b
6:  mov     byte ptr [r13 + 0x14], 15
    ret

.Lh_reset:
    call    .Lh_next
    test    al, 7
    jnz     .Lh_offer
    call    .Lh_device
    mov     byte ptr [r13 + 0x14], 0
    ret

    // A header of a request somewhere: a small number, zero, a small number; or two page numbers.
.Lh_header:
    call    .Lh_next
    mov     r8d, eax
    and     r8d, 0xffff0
    lea     r8, [r8 + r14 + 0x100000]
    call    .Lh_next
    mov     ecx, eax
    and     ecx, 15
    mov     [r8], ecx
    shr     rax, 8
    mov     ecx, eax
    and     ecx, 0x7f
    mov     [r8 + 8], rcx
    mov     dword ptr [r8 + 4], 0
    bt      eax, 20
    jc      1f
    and     eax, 0x3fff
    mov     [r8 + 4], eax
1:  ret

.Lh_scribble:
    call    .Lh_next
    mov     r8d, eax
    and     r8d, 0x1ffff8
    call    .Lh_value
    mov     [r8 + r14], rax
    ret

    // Descriptors, one more available, a notification.
.Lh_offer:
    call    .Lh_device
    call    .Lh_next
    mov     r10d, eax
    and     r10d, 3
    mov     ecx, r10d
    shl     ecx, 14
    add     rdi, rcx
    shr     rax, 8
    mov     r11d, eax
    and     r11d, 3
    inc     r11d
    shr     rax, 8
    mov     r9d, eax
    and     r9d, 63
    mov     ebp, r9d
1:  call    .Lh_value
    mov     r8d, ebp
    shl     r8d, 4
    mov     [rdi + r8], rax
    call    .Lh_next
    mov     ecx, eax
    and     ecx, 0xfff
    bt      eax, 12
    jc      2f
    mov     ecx, 512
    bt      eax, 13
    jc      2f
    mov     ecx, 16
2:  mov     [rdi + r8 + 8], ecx
    shr     rax, 16
    mov     ecx, eax
    and     ecx, 3
    test    ah, 31
    jnz     3f
    or      ecx, 4
3:  mov     [rdi + r8 + 12], cx
    inc     ebp
    and     ebp, 63
    mov     ecx, ebp
    shr     eax, 16
    test    al, 15
    jnz     4f
    movzx   ecx, ah
4:  mov     [rdi + r8 + 14], cx
    dec     r11d
    jnz     1b
    movzx   ecx, word ptr [rdi + 0x1002]
    mov     eax, ecx
    and     eax, 63
    mov     [rdi + rax * 2 + 0x1004], r9w
    inc     ecx
    mov     [rdi + 0x1002], cx
    mov     [r13 + r10 * 4 + 0x3000], r10w
    ret
hostile_code_end:
    .popsection
"#,
    bars = const VIRTIO_BARS,
    ecam = const ECAM,
    hotplug = const HOTPLUG,
);
