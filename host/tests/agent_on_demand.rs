//! Restores on demand of guests whose memory is in several ranges, and of a mover that dies under one. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::counter::{rounds, run_across_the_hole, run_with};
use support::{Host, POLICY, until};

#[test]
fn a_guest_below_and_above_the_hole_is_restored_on_demand_page_by_page() {
    let mut host = large("hole");
    host.start();
    run_across_the_hole(&host, "counter");
    for (round, memory) in ["on-demand", "on-demand", "at-once"]
        .into_iter()
        .enumerate()
    {
        let file = format!("{round}.snap");
        let taken = host.json(&["snapshot", "counter", &file, "--stop"]);
        assert_eq!(taken["pages"], (4u64 << 30) / 4096);
        let before = rounds(&host, "counter");
        assert!(before > 0);
        host.run(&["restore", &file, "--memory", memory]).expect(0);
        until("it counts on", || rounds(&host, "counter") > before + 20);
    }
    host.run(&["stop", "counter"]).expect(0);
    host.quiet(1);
}

#[test]
fn a_damaged_page_above_the_hole_ends_the_guest_that_waits_for_it() {
    let mut host = large("high");
    host.start();
    run_across_the_hole(&host, "counter");
    let taken = host.json(&["snapshot", "counter", "good.snap", "--stop"]);
    let data = taken["pages"].as_u64().unwrap() - taken["zero_pages"].as_u64().unwrap();
    let before = rounds(&host, "counter");
    let mut bytes = fs::read(host.path("good.snap")).unwrap();
    // The last data page is one that the guest checks in each round, above 4 GiB.
    bytes[usize::try_from(data).unwrap() * 4096 + 2048] ^= 1;
    host.write("bad.snap", bytes);
    host.run(&["restore", "bad.snap", "--memory", "on-demand"])
        .refused(1, &["SNAPSHOT_PAGE", "was ended"]);
    assert!(host.listed("counter").is_none());
    let after = rounds(&host, "counter");
    assert!(
        after <= before + 1,
        "it went on for {} rounds",
        after - before
    );
    host.quiet(1);
}

#[test]
fn a_mover_that_dies_under_a_restore_ends_the_guest_and_says_so() {
    let mut host = large("dies");
    host.start();
    // So much data that the restore is under way for a while.
    let initrd: Vec<u8> = (0..INITRD).map(|n| (n % 251) as u8 | 1).collect();
    run_with(&host, "counter", |host, text| {
        host.write("host/initrd", &initrd);
        text.replace("64 MiB", "256 MiB")
    });
    until("it counts", || rounds(&host, "counter") > 20);
    host.run(&["snapshot", "counter", "one.snap", "--stop"])
        .expect(0);
    let mut died_running = 0;
    for attempt in 0..20 {
        let name = format!("again-{attempt}");
        let mut command = host.command(&[
            "restore",
            "one.snap",
            "--memory",
            "on-demand",
            "--name",
            &name,
        ]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = child.spawn().unwrap();
        until("a mover", || !host.roles_of("mover").is_empty());
        // Held still, it cannot come to its end while we look whether the guest runs.
        std::thread::sleep(std::time::Duration::from_millis(attempt * 12));
        let movers = host.roles_of("mover");
        signal(&movers, Signal::SIGSTOP);
        let running = host.listed(&name).is_some();
        signal(&movers, Signal::SIGKILL);
        let output = child.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            // It was faster; what it restored is whole.
            until("it counts on", || rounds(&host, &name) > 20);
            host.run(&["stop", &name]).expect(0);
            break;
        }
        assert!(error.contains("MOVER_DIED"), "{error}");
        assert_eq!(error.contains("was ended"), running, "{error}");
        assert!(host.listed(&name).is_none());
        // Where it ran, it counted right to its end.
        rounds(&host, &name);
        died_running += u32::from(running);
    }
    assert!(died_running > 0, "no mover died under a running guest");
    host.quiet(1);
}

#[test]
fn a_guest_whose_code_is_its_firmware_gets_that_on_demand_too() {
    let mut host = Host::new("rom");
    host.start();
    let mut image = vec![0xf4; 2 << 20];
    let last = image.len() - 0x1_0000;
    image[last + 0xf000..][..PRINTS.len()].copy_from_slice(PRINTS);
    // jmp 0xf000, at the reset vector
    image[last + 0xfff0..][..3].copy_from_slice(&[0xe9, 0x0d, 0xf0]);
    host.write("host/fw.fd", image);
    let text = "name = \"rom\"\nvcpus = 1\nmemory = \"64 MiB\"\n[boot]\nfirmware = \"fw.fd\"\n";
    host.write("host/vm.toml", text);
    host.run(&["run", "host/vm.toml"]).expect(0);
    let console = host.path("state/guests/rom/console.log");
    let printed = || fs::metadata(&console).map_or(0, |found| found.len());
    until("it prints", || printed() > 20);
    host.run(&["snapshot", "rom", "rom.snap", "--stop"])
        .expect(0);
    let before = printed();
    host.run(&["restore", "rom.snap", "--memory", "on-demand"])
        .expect(0);
    until("it goes on", || printed() > before + 20);
    host.run(&["stop", "rom"]).expect(0);
    host.quiet(1);
}

/// A host whose policy lets guests be of 5 GiB.
fn large(tag: &str) -> Host {
    Host::with_policy(
        tag,
        &POLICY.replace("max_memory_mib = 256", "max_memory_mib = 5120"),
    )
}

fn signal(movers: &[u32], signal: Signal) {
    for mover in movers {
        // Gone already is just as good.
        let _ = kill(Pid::from_raw(i32::try_from(*mover).unwrap()), signal);
    }
}

/// ```text
///         mov dx, 0x3f8
/// again:  mov al, 'r' ; out dx, al ; mov cx, 0x400 ; loop $ ; jmp again
/// ```
const PRINTS: &[u8] = &[
    0xba, 0xf8, 0x03, 0xb0, 0x72, 0xee, 0xb9, 0x00, 0x04, 0xe2, 0xfe, 0xeb, 0xf6,
];
const INITRD: usize = 128 << 20;
