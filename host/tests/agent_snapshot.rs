//! Snapshot and restore against the real agent, its jailed roles and the real `/dev/kvm`. Needs root.
//!
//! The guest writes its counter over 256 pages in turn, checks what it wrote there the round before, and prints the
//! counter after each round: a page lost, old or of another place shows as an `X`, a moment lost as a gap.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;
use std::time::{Duration, Instant};

use support::{Host, SEV, small_image, until};

#[test]
fn a_guest_stopped_by_a_snapshot_goes_on_where_it_was_in_either_way() {
    let mut host = Host::new("snap");
    host.start();
    run_counter(&host, "counter");
    for memory in ["at-once", "on-demand"] {
        let file = format!("{memory}.snap");
        let taken = host.json(&["snapshot", "counter", &file, "--stop"]);
        assert!(host.listed("counter").is_none(), "it has ended");
        assert_eq!(taken["stopped"], true);
        let before = rounds(&host, "counter");
        assert!(before > 0);
        let restored = host.json(&["restore", &file, "--memory", memory]);
        assert_eq!(restored["state"], "running");
        until("it counts on", || rounds(&host, "counter") > before + 20);
        eprintln!(
            "{memory}: {} us from the request to the running guest, {} data pages",
            restored["launch_us"],
            taken["pages"].as_u64().unwrap() - taken["zero_pages"].as_u64().unwrap()
        );
    }
    assert_eq!(host.listed("counter").unwrap()["epoch"], 3);
    host.run(&["stop", "counter"]).expect(0);
    let done: Vec<_> = host
        .records()
        .iter()
        .map(|r| r["action"].as_str().unwrap_or_default().to_owned())
        .filter(|a| a == "snapshot" || a == "restore")
        .collect();
    assert!(done.iter().any(|a| a == "snapshot") && done.iter().any(|a| a == "restore"));
    host.quiet(1);
}

#[test]
fn a_running_guest_goes_on_after_a_snapshot_and_a_paused_one_stays_paused() {
    let mut host = Host::new("runs");
    host.start();
    run_counter(&host, "counter");
    let taken = host.json(&["snapshot", "counter", "one.snap"]);
    assert_eq!(
        (&taken["generation"], &taken["stopped"]),
        (&1.into(), &false.into())
    );
    let before = rounds(&host, "counter");
    until("it counts on", || rounds(&host, "counter") > before + 20);
    host.run(&["pause", "counter"]).expect(0);
    let taken = host.json(&["snapshot", "counter", "two.snap"]);
    assert_eq!(taken["generation"], 2);
    assert_eq!(host.listed("counter").unwrap()["state"], "paused");
    // The guest that a snapshot was taken of is one, whatever name its copy would have.
    host.run(&["restore", "two.snap", "--name", "copy"])
        .refused(1, &["ALREADY_HERE"]);
    host.run(&["snapshot", "counter", "two.snap"])
        .refused(1, &["SNAPSHOT_EXISTS"]);
    host.run(&["stop", "counter"]).expect(0);
    host.run(&["restore", "one.snap"])
        .refused(1, &["SNAPSHOT_OLDER", "--allow-older"]);
    assert!(host.listed("counter").is_none());
    host.run(&["restore", "one.snap", "--name", "copy", "--allow-older"])
        .expect(0);
    let copy = host.listed("copy").unwrap();
    assert_eq!(
        (&copy["vm_id"], &copy["epoch"]),
        (&taken["vm_id"], &2.into())
    );
    until("the copy counts", || rounds(&host, "copy") > 20);
    host.run(&["stop", "copy"]).expect(0);
    host.quiet(1);
}

#[test]
fn a_changed_snapshot_is_refused_and_on_demand_ends_the_guest() {
    let mut host = Host::new("bad");
    host.start();
    run_counter(&host, "counter");
    let taken = host.json(&["snapshot", "counter", "good.snap", "--stop"]);
    let good = fs::read(host.path("good.snap")).unwrap();
    let data = taken["pages"].as_u64().unwrap() - taken["zero_pages"].as_u64().unwrap();
    // The last data page: nothing but the fill in the background asks for it soon.
    let page = usize::try_from(data).unwrap() * 4096 + 2048;
    let last = good.len() - 1;
    let changed = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    let cases = [
        ("page", changed(page), "SNAPSHOT_PAGE"),
        ("state", changed(last), "SNAPSHOT_CHANGED"),
        ("header", changed(50), "SNAPSHOT_HEADER"),
        ("cut", good[..last].to_vec(), "SNAPSHOT_TRUNCATED"),
        ("empty", Vec::new(), "SNAPSHOT_MALFORMED"),
    ];
    for (name, bytes, code) in cases {
        let file = format!("{name}.snap");
        host.write(&file, bytes);
        for memory in ["at-once", "on-demand"] {
            let ran = host.run(&["restore", &file, "--memory", memory]);
            let error = ran.refused(1, &[code]).err;
            let ran_already = name == "page" && memory == "on-demand";
            assert_eq!(error.contains("was ended"), ran_already, "{error}");
            assert!(host.listed("counter").is_none());
        }
    }
    // After all that the good one is as good as before. Under a name of its own: the console of the old one holds what the
    // guest that was ended left of a line.
    host.run(&[
        "restore",
        "good.snap",
        "--memory",
        "on-demand",
        "--name",
        "again",
    ])
    .expect(0);
    let before = rounds(&host, "again");
    until("it counts on", || rounds(&host, "again") > before + 20);
    host.run(&["stop", "again"]).expect(0);
    host.quiet(1);
}

#[test]
fn a_snapshot_is_not_restored_onto_a_disk_that_has_changed_since() {
    let mut host = Host::new("disk");
    host.start();
    host.write("host/data.raw", vec![0u8; 1 << 20]);
    let disk = "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n";
    run(&host, "counter", disk);
    host.run(&["snapshot", "counter", "one.snap", "--stop"])
        .expect(0);
    let image = host.path("host/data.raw");
    let written = fs::metadata(&image).unwrap().modified().unwrap();
    fs::write(&image, vec![1u8; 1 << 20]).unwrap();
    host.run(&["restore", "one.snap"])
        .refused(1, &["SNAPSHOT_DISK_CHANGED", "data.raw"]);
    // A copy with the same size and time stands in for the image.
    fs::write(&image, vec![0u8; 1 << 20]).unwrap();
    let file = fs::File::options().write(true).open(&image).unwrap();
    file.set_modified(written).unwrap();
    host.run(&["restore", "one.snap"]).expect(0);
    host.run(&["stop", "counter"]).expect(0);
    fs::write(&image, vec![1u8; 1 << 20]).unwrap();
    host.run(&["restore", "one.snap", "--allow-changed-disks"])
        .expect(0);
    host.run(&["stop", "counter"]).expect(0);
}

#[test]
fn a_confidential_guest_has_no_snapshot_and_another_hosts_is_refused() {
    let mut host = Host::new("sev");
    host.start();
    let description = host.describe("sev", "vault", SEV);
    host.run(&["run", &description]).expect(0);
    host.run(&["snapshot", "vault", "vault.snap"])
        .refused(1, &["TECHNOLOGY_CANNOT_SNAPSHOT", "launch it anew"]);
    assert!(!host.path("vault.snap").exists());
    run_counter(&host, "counter");
    host.run(&["snapshot", "counter", "one.snap", "--stop"])
        .expect(0);
    let mut other = Host::new("other");
    other.start();
    other.write("one.snap", fs::read(host.path("one.snap")).unwrap());
    other
        .run(&["restore", "one.snap"])
        .refused(1, &["SNAPSHOT_HEADER", "another host"]);
}

fn run_counter(host: &Host, name: &str) {
    run(host, name, "");
    until("it counts", || rounds(host, name) > 20);
}

fn run(host: &Host, name: &str, more: &str) {
    let description = host.describe("host", name, more);
    let mut image = small_image();
    image[1024 + 0x200..][..COUNTER.len()].copy_from_slice(COUNTER);
    host.write("host/vmlinuz", image);
    host.run(&["run", &description]).expect(0);
}

/// Rounds on the guest's console, each checked to be the next one. A line may be half written at the end, and a restored
/// guest begins with the rest of the line in which the snapshot was taken; what it printed before is on the console of its
/// name from before.
fn rounds(host: &Host, name: &str) -> u64 {
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
