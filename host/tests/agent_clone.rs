//! Clones of a snapshot, templates, and the keys of snapshots, against the real agent, its jailed roles and the real
//! `/dev/kvm`. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;

use support::counter::{rounds, run, run_counter};
use support::{Host, POLICY, until};

#[test]
fn two_clones_of_a_template_run_at_once_and_share_nothing_that_they_write() {
    let mut host = Host::new("clone");
    host.start();
    host.write("host/data.raw", vec![5u8; 1 << 20]);
    host.write("host/rom.raw", vec![6u8; 1 << 20]);
    let tap = format!("cl{}", std::process::id());
    let devices = format!(
        "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n[[disk]]\nid = \"rom\"\npath = \"rom.raw\"\nread_only = true\n\
         [[net]]\nid = \"net0\"\ntap = {tap:?}\nmac = \"52:54:00:00:00:01\"\nannounce = [\"192.0.2.10\"]\n[vsock]\ncid = 3\n"
    );
    run(&host, "counter", &devices);
    until("it counts", || rounds(&host, "counter") > 20);
    host.run(&["snapshot", "counter", "t.snap", "--template"])
        .refused(1, &["TEMPLATE_DISKS", "--stop"]);
    assert!(!host.path("t.snap").exists());
    let taken = host.json(&["snapshot", "counter", "t.snap", "--template", "--stop"]);
    assert_eq!(taken["template"], true);
    host.run(&["restore", "t.snap"])
        .refused(1, &["SNAPSHOT_IS_TEMPLATE", "vm clone"]);
    let before = rounds(&host, "counter");

    let folder = host.path("disks");
    fs::create_dir(&folder).unwrap();
    let one = host.json(&["vm", "clone", "t.snap", "one"]);
    let two = host.json(&[
        "vm",
        "clone",
        "t.snap",
        "two",
        "--memory",
        "on-demand",
        "--disks",
        "disks",
    ]);
    for name in ["one", "two"] {
        until("the clone counts", || rounds(&host, name) > before + 20);
    }
    // Identity, address, context id, user: each its own.
    let mut seen = vec![(taken["vm_id"].clone(), "52:54:00:00:00:01".into(), 3.into())];
    for clone in [&one, &two] {
        assert_eq!(clone["epoch"], 1);
        let facts = (
            clone["vm_id"].clone(),
            clone["nets"][0]["mac"].clone(),
            clone["vsock_cid"].clone(),
        );
        for other in &seen {
            assert!(
                other.0 != facts.0 && other.1 != facts.1 && other.2 != facts.2,
                "{facts:?}"
            );
        }
        let mac = facts.1.as_str().unwrap();
        let first = u8::from_str_radix(&mac[..2], 16).unwrap();
        assert_eq!(first & 3, 2, "locally administered, unicast: {mac}");
        seen.push(facts);
    }
    let user = |clone: &serde_json::Value| {
        fs::metadata(format!("/proc/{}", clone["pid"]))
            .unwrap()
            .uid()
    };
    assert_ne!(user(&one), user(&two));
    // Disks: a copy each of what is written, the same of what is read.
    let copies = [
        host.path("state/guests/one/one-data.img"),
        folder.join("two-data.img"),
    ];
    for (copy, clone) in copies.iter().zip([&one, &two]) {
        assert!(fs::read(copy).unwrap() == [5u8; 1 << 20]);
        assert_eq!(fs::metadata(copy).unwrap().mode() & 0o777, 0o600);
        let open = open_files(&clone["pid"]);
        assert!(
            open.contains(copy) && open.contains(&host.path("host/rom.raw")),
            "{open:?}"
        );
        assert!(!open.contains(&host.path("host/data.raw")), "{open:?}");
    }
    host.run(&["vm", "clone", "t.snap", "one"])
        .refused(1, &["NAME_TAKEN"]);
    assert!(copies[0].exists(), "the running guest's");
    host.run(&["stop", "one"]).expect(0);
    // Its disk may hold what somebody needs.
    host.run(&["vm", "clone", "t.snap", "one"])
        .refused(1, &["DISK_EXISTS", "one-data.img"]);
    host.run(&["stop", "two"]).expect(0);
    // A template whose disk went on is none.
    fs::write(host.path("host/data.raw"), vec![7u8; 1 << 20]).unwrap();
    host.run(&["vm", "clone", "t.snap", "three"])
        .refused(1, &["SNAPSHOT_DISK_CHANGED"]);
    assert!(!host.path("state/guests/three/three-data.img").exists());
    let of = |record: &serde_json::Value, key: &str| record["detail"][key].clone();
    let records = host.records();
    let clones: Vec<_> = records
        .iter()
        .filter(|r| r["action"] == "clone" && r["outcome"] == "done")
        .collect();
    assert_eq!(clones.len(), 2, "{clones:#?}");
    assert_eq!(of(clones[0], "of"), taken["vm_id"]);
    assert_eq!(of(clones[0], "snapshot"), taken["snapshot_id"]);
    assert_eq!(of(clones[0], "vm_id"), one["vm_id"]);
    host.quiet(1);
}

#[test]
fn a_clone_runs_beside_the_guest_that_it_was_taken_of() {
    let mut host = Host::new("beside");
    host.start();
    run_counter(&host, "counter");
    host.run(&["snapshot", "counter", "one.snap"]).expect(0);
    host.run(&["snapshot", "counter", "two.snap"]).expect(0);
    // The older one, too: it is no way back for the guest.
    host.run(&["vm", "clone", "one.snap", "copy"]).expect(0);
    let (here, there) = (rounds(&host, "counter"), rounds(&host, "copy"));
    until("both count", || {
        rounds(&host, "counter") > here + 20 && rounds(&host, "copy") > there + 20
    });
    for name in ["counter", "copy"] {
        host.run(&["stop", name]).expect(0);
    }
    host.quiet(1);
}

#[test]
fn a_disk_under_a_running_guest_is_not_cloned_and_a_damaged_page_leaves_nothing() {
    let mut host = Host::new("busy");
    host.start();
    host.write("host/data.raw", vec![5u8; 1 << 20]);
    run(
        &host,
        "counter",
        "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n",
    );
    let taken = host.json(&["snapshot", "counter", "one.snap"]);
    host.run(&["vm", "clone", "one.snap", "copy"])
        .refused(1, &["DISK_IN_USE", "stop that guest"]);
    host.run(&["stop", "counter"]).expect(0);
    let mut bytes = fs::read(host.path("one.snap")).unwrap();
    let data = taken["pages"].as_u64().unwrap() - taken["zero_pages"].as_u64().unwrap();
    bytes[usize::try_from(data).unwrap() * 4096 + 2048] ^= 1;
    host.write("bad.snap", bytes);
    for memory in ["at-once", "on-demand"] {
        host.run(&["vm", "clone", "bad.snap", "copy", "--memory", memory])
            .refused(1, &["SNAPSHOT_PAGE", "cannot be cloned"]);
        assert!(host.listed("copy").is_none());
        assert!(!host.path("state/guests/copy/copy-data.img").exists());
    }
    host.run(&["vm", "clone", "one.snap", "copy"]).expect(0);
    host.run(&["stop", "copy"]).expect(0);
    host.run(&["vm", "clone", "one.snap", "../copy"])
        .refused(1, &["DESCRIPTION"]);
    host.quiet(1);
}

#[test]
fn copies_of_disks_lie_where_the_policy_lets_files_be() {
    let mut host = Host::new("files");
    let folders = format!("[files]\nfolders = [{:?}]\n", host.path("host"));
    host.write("policy.toml", format!("{POLICY}{folders}"));
    host.start();
    host.write("host/data.raw", vec![5u8; 1 << 20]);
    run(
        &host,
        "counter",
        "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n",
    );
    host.run(&["snapshot", "counter", "host/one.snap", "--stop"])
        .expect(0);
    fs::create_dir(host.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink(host.path("elsewhere"), host.path("host/way")).unwrap();
    for folder in ["elsewhere", "host/way"] {
        host.run(&["vm", "clone", "host/one.snap", "copy", "--disks", folder])
            .refused(3, &["POLICY_FILE_NOT_ALLOWED"]);
    }
    assert_eq!(fs::read_dir(host.path("elsewhere")).unwrap().count(), 0);
    host.run(&["vm", "clone", "host/one.snap", "copy", "--disks", "host"])
        .expect(0);
    assert!(host.path("host/copy-data.img").exists());
    host.run(&["stop", "copy"]).expect(0);
    host.quiet(1);
}

#[test]
fn cloning_is_an_act_of_its_own() {
    let people = "[[person]]\nname = \"root\"\nrole = \"operator\"\nuid = 0\nactions = [\"launch\", \"snapshot\", \"stop\", \"status\"]\n";
    let mut host = Host::with_policy("act", &format!("{POLICY}{people}"));
    host.start();
    run_counter(&host, "counter");
    let taken = host.json(&["snapshot", "counter", "one.snap", "--stop"]);
    host.run(&["vm", "clone", "one.snap", "copy"])
        .refused(3, &["POLICY_ROLE_NOT_ALLOWED"]);
    let id = taken["snapshot_id"].as_str().unwrap();
    host.run(&["vm", "snapshot-erase", id])
        .refused(3, &["POLICY_ROLE_NOT_ALLOWED"]);
    host.run(&["restore", "one.snap"]).expect(0);
    host.run(&["stop", "counter"]).expect(0);
}

#[test]
fn without_the_operators_key_there_is_no_snapshot_and_without_its_own_none_opens() {
    let mut host = Host::new("keys");
    host.start();
    run_counter(&host, "counter");
    let first = host.json(&["snapshot", "counter", "one.snap"]);
    host.run(&["snapshot", "counter", "two.snap", "--stop"])
        .expect(0);
    let key = host.path("snapshots.key");
    fs::rename(&key, host.path("away")).unwrap();
    host.run(&["restore", "two.snap"])
        .refused(1, &["SNAPSHOT_KEY", "snapshots.key"]);
    run_counter(&host, "other");
    host.run(&["snapshot", "other", "three.snap"])
        .refused(1, &["SNAPSHOT_KEY", "snapshots.key"]);
    assert!(!host.path("three.snap").exists());
    host.run(&["stop", "other"]).expect(0);
    // Another key is not the one, until the old one is named beside it.
    host.write_secret("snapshots.key", [9; 32]);
    host.run(&["restore", "two.snap"])
        .refused(1, &["SNAPSHOT_KEY", "previous_key"]);
    fs::rename(host.path("away"), &key).unwrap();
    host.run(&["restore", "two.snap"]).expect(0);
    host.run(&["stop", "counter"]).expect(0);

    let id = first["snapshot_id"].as_str().unwrap();
    host.run(&["vm", "snapshot-erase", "zz"])
        .refused(1, &["SNAPSHOT_ID"]);
    host.run(&["vm", "snapshot-erase", id]).expect(0);
    for args in [
        &["restore", "one.snap", "--allow-older"][..],
        &["vm", "clone", "one.snap", "copy"],
        &["vm", "snapshot-erase", id],
    ] {
        host.run(args).refused(1, &["SNAPSHOT_KEY_GONE", "erased"]);
    }
    host.run(&["restore", "two.snap"]).expect(0);
    host.run(&["stop", "counter"]).expect(0);
    let erased = host.records();
    let mut erased = erased.iter().filter(|r| r["action"] == "snapshot-erase");
    assert!(erased.any(|r| r["outcome"] == "done" && r["object"] == "counter"));
    host.quiet(1);
}

/// Files that a process has open.
fn open_files(pid: &serde_json::Value) -> Vec<std::path::PathBuf> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    open.filter_map(|entry| fs::read_link(entry.path()).ok())
        .collect()
}
