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

use support::counter::{rounds, run, run_counter};
use support::{Host, SEV, until};

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
        .refused(1, &["SNAPSHOT_KEY_GONE", "another host"]);
}
