//! A guest that writes its counter over 256 pages in turn, checks what it wrote there the round before, and prints the
//! counter after each round: a page lost, old or of another place shows as an `X`, a moment lost as a gap.

use std::fs;
use std::time::{Duration, Instant};

use super::{Host, small_image, until};

/// Runs the guest and waits until it counts.
pub fn run_counter(host: &Host, name: &str) {
    run(host, name, "");
    until("it counts", || rounds(host, name) > 20);
}

/// Runs the guest; `more` goes behind its description.
pub fn run(host: &Host, name: &str, more: &str) {
    run_with(host, name, |_, text| format!("{text}{more}"));
}

/// Runs the guest with another description, which `change` makes of the usual one.
pub fn run_with(host: &Host, name: &str, change: impl Fn(&Host, String) -> String) {
    run_code(host, name, COUNTER, change);
}

/// Runs it with 4 GiB of memory and its pages around the hole: 124 end where memory below 4 GiB does, the others begin
/// at 4 GiB. Then waits until it counts.
pub fn run_across_the_hole(host: &Host, name: &str) {
    let mut code = ACROSS.to_vec();
    code.extend(COUNTER);
    // Its pages begin in the first of the two mapped large pages, 124 before the second.
    code[ACROSS.len() + 17..][..4].copy_from_slice(&0x0218_4000u32.to_le_bytes());
    run_code(host, name, &code, |_, text| text.replace("64 MiB", "4 GiB"));
    until("it counts", || rounds(host, name) > 20);
}

fn run_code(host: &Host, name: &str, code: &[u8], change: impl Fn(&Host, String) -> String) {
    let description = host.describe("host", name, "");
    let text = fs::read_to_string(host.path(&description)).unwrap();
    let mut image = small_image();
    image[1024 + 0x200..][..code.len()].copy_from_slice(code);
    host.write("host/vmlinuz", image);
    host.write(&description, change(host, text));
    host.run(&["run", &description]).expect(0);
}

/// Rounds on the guest's console, each checked to be the next one. A line may be half written at the end, and a restored
/// guest begins with the rest of the line in which the snapshot was taken; what it printed before is on the console of its
/// name from before.
pub fn rounds(host: &Host, name: &str) -> u64 {
    let console = host.path(&format!("state/guests/{name}/console.log"));
    let settled = Instant::now() + Duration::from_millis(1);
    while Instant::now() < settled {
        std::thread::yield_now();
    }
    let text = fs::read_to_string(console).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut last = None;
    let rest_of_a_line = whole.lines().next().is_some_and(|line| line.len() < 8);
    for line in whole.lines().skip(usize::from(rest_of_a_line)) {
        let count = line.bytes().fold(0u64, |value, byte| {
            (value << 4) | u64::from(byte.wrapping_sub(b'a'))
        });
        assert_eq!(line.len(), 8, "{line:?}");
        if let Some(last) = last {
            assert_eq!(count, last + 256, "a gap or a repeat");
        }
        last = Some(count);
    }
    last.unwrap_or(0) / 256
}

/// ```text
///         xor ebx, ebx ; mov edx, 0x3f8
/// outer:  inc rbx ; movzx eax, bl ; shl eax, 12 ; add eax, 0x2000000
///         cmp rbx, 256 ; jbe fresh ; lea rcx, [rbx-256] ; cmp [rax], rcx ; jne bad
/// fresh:  mov [rax], rbx ; test bl, bl ; jnz outer
///         print ebx as eight letters and a line end ; jmp outer
/// bad:    print 'X' and a line end ; jmp $
/// ```
const COUNTER: &[u8] = &[
    0x31, 0xdb, 0xba, 0xf8, 0x03, 0x00, 0x00, 0x48, 0xff, 0xc3, 0x0f, 0xb6, 0xc3, 0xc1, 0xe0, 0x0c,
    0x05, 0x00, 0x00, 0x00, 0x02, 0x48, 0x81, 0xfb, 0x00, 0x01, 0x00, 0x00, 0x76, 0x0c, 0x48, 0x8d,
    0x8b, 0x00, 0xff, 0xff, 0xff, 0x48, 0x39, 0x08, 0x75, 0x20, 0x48, 0x89, 0x18, 0x84, 0xdb, 0x75,
    0xd6, 0xb9, 0x1c, 0x00, 0x00, 0x00, 0x89, 0xd8, 0xd3, 0xe8, 0x83, 0xe0, 0x0f, 0x04, 0x61, 0xee,
    0x83, 0xe9, 0x04, 0x79, 0xf1, 0xb0, 0x0a, 0xee, 0xeb, 0xbd, 0xb0, 0x58, 0xee, 0xb0, 0x0a, 0xee,
    0xeb, 0xfe,
];

/// The two large pages at 32 MiB become the last one below the hole and the first above it:
///
/// ```text
///         mov eax, 0xbfe00083 ; mov [0xb080], rax ; mov rax, 0x100000083 ; mov [0xb088], rax
///         mov rax, cr3 ; mov cr3, rax
/// ```
const ACROSS: &[u8] = &[
    0xb8, 0x83, 0x00, 0xe0, 0xbf, 0x48, 0x89, 0x04, 0x25, 0x80, 0xb0, 0x00, 0x00, 0x48, 0xb8, 0x83,
    0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x48, 0x89, 0x04, 0x25, 0x88, 0xb0, 0x00, 0x00, 0x0f,
    0x20, 0xd8, 0x0f, 0x22, 0xd8,
];

/// What the guest prints, whichever hosts it runs on: the consoles put together in the order of its visits.
pub struct Story {
    name: String,
    /// What was there before this guest's visit, by host.
    read: std::collections::BTreeMap<String, usize>,
    told: String,
}

impl Story {
    /// Nothing heard yet.
    pub fn of(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            read: Default::default(),
            told: String::new(),
        }
    }

    /// Hears the guest on the host where it is until it has told `more` rounds more. Every byte must continue what was
    /// told before; how far it has counted.
    #[track_caller]
    pub fn hear(&mut self, host: &Host, more: u64) -> u64 {
        let aim = self.checked() + more;
        until("the guest counts on", || {
            self.take(host);
            self.checked() >= aim
        });
        self.checked()
    }

    /// The guest has left this host: the last that it said here.
    #[track_caller]
    pub fn leave(&mut self, host: &Host) {
        // The agent copies what is left in the pipe after the guest's end.
        std::thread::sleep(Duration::from_millis(200));
        self.take(host);
    }

    fn take(&mut self, host: &Host) {
        let console = host.path(&format!("state/guests/{}/console.log", self.name));
        let text = fs::read_to_string(console).unwrap_or_default();
        let from = self.read.entry(host.name.clone()).or_default();
        self.told.push_str(&text[*from..]);
        *from = text.len();
    }

    /// Rounds told; each must be the next one.
    #[track_caller]
    fn checked(&self) -> u64 {
        let whole = self.told.rfind('\n').map_or("", |end| &self.told[..end]);
        let mut last = 0;
        for line in whole.lines() {
            let count = line.bytes().fold(0u64, |value, byte| {
                (value << 4) | u64::from(byte.wrapping_sub(b'a'))
            });
            assert!(
                line.len() == 8 && count == last + 256,
                "{last} and then {line:?}"
            );
            last = count;
        }
        last / 256
    }
}
