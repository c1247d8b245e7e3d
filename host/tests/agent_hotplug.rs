//! `casemate vm attach` and `casemate vm detach` against the real agent, in the VMM's real cell with all filters on. Needs
//! root and `/dev/kvm`; the card also `/dev/net/tun`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/plugged.rs"]
mod plugged;
mod support;

use std::fs;
use std::path::Path;

use serde_json::Value;
use support::{Host, small_image, until};

#[test]
fn a_disk_comes_works_and_goes_and_nothing_of_it_is_left() {
    let mut host = Host::new("hotplug");
    host.start();
    let path = describe(&host, "vm", "");
    host.run(&["run", &path]).expect(0);
    let before = descriptors(&host, "vm");
    assert_eq!(host.listed("vm").unwrap()["free_slots"], 4);
    let disk = image(&host, "first.raw", b"HOTPLUG1");
    let attach = ["vm", "attach", "vm", "--disk", "extra", "--path", &disk];
    let attached = host.json(&attach);
    let wanted = serde_json::json!([{"slot": 0, "device": {"disk": "extra"}, "source": disk}]);
    assert_eq!(
        (&attached["attached"], &attached["free_slots"]),
        (&wanted, &3.into())
    );
    assert_eq!(host.listed("vm").unwrap()["attached"], wanted);
    shows(&host, "HOTPLUG1", 1);
    assert!(descriptors(&host, "vm") > before);
    every_descriptor_is_of_a_kind_that_a_vmm_has(&host, &disk);

    // Its limits are changed as those of any other.
    let words = [
        "vm",
        "resize",
        "vm",
        "--disk",
        "extra",
        "--operations-per-second",
        "70",
    ];
    assert_eq!(host.json(&words)["limits"]["operations"]["per_second"], 70);

    host.run(&["vm", "detach", "vm", "--disk", "extra"])
        .expect(0);
    shows(&host, "g", 1);
    assert_eq!(descriptors(&host, "vm"), before, "something is left open");
    assert_eq!(host.listed("vm").unwrap()["free_slots"], 4);
    host.run(&["vm", "detach", "vm", "--disk", "extra"])
        .refused(1, &["NO_SUCH_DEVICE"]);

    // The lock is free again, the slot too, and so are the interrupts: as often as one likes.
    for round in 2..12 {
        host.run(&attach).expect(0);
        shows(&host, "HOTPLUG1", round);
        host.run(&["vm", "detach", "vm", "--disk", "extra"])
            .expect(0);
    }
    assert_eq!(descriptors(&host, "vm"), before);
    host.run(&["sandbox", "probe", "vm"]).expect(0);
    let of = |action: &str| {
        let records = host.records();
        let done = records
            .iter()
            .filter(|r| r["action"] == action && r["outcome"] == "done");
        done.count()
    };
    assert_eq!((of("attach"), of("detach")), (11, 11));
}

#[test]
fn what_cannot_be_attached_is_refused_and_changes_nothing() {
    let mut host = Host::new("hotplug-no");
    host.start();
    let own = image(&host, "vm/own.raw", b"ITS OWN ");
    let path = describe(
        &host,
        "vm",
        "[[disk]]\nid = \"own\"\npath = \"own.raw\"\n[hotplug]\nslots = 2\n",
    );
    host.run(&["run", &path]).expect(0);
    let other = describe(&host, "other", "[hotplug]\nslots = 0\n");
    host.run(&["run", &other]).expect(0);
    let before = descriptors(&host, "vm");
    let free = image(&host, "free.raw", b"FREE    ");
    host.write("text", "no qcow2");
    let text = host.path("text").display().to_string();
    for (line, code) in [
        (format!("vm --disk b --path {own}"), "DEVICE_LOCK"),
        (format!("vm --disk own --path {free}"), "DEVICE_EXISTS"),
        (format!("vm --disk b --path {free}.no"), "RESOURCE"),
        (format!("vm --disk b --path {text} --qcow2"), "DEVICE"),
        (format!("vm --disk ../b --path {free}"), "BAD_REQUEST"),
        (
            "vm --net b --mac 01:00:00:00:00:01".to_owned(),
            "BAD_REQUEST",
        ),
        ("vm --net b --tap a/b".to_owned(), "BAD_REQUEST"),
        (format!("other --disk b --path {free}"), "NO_FREE_SLOT"),
        (format!("nobody --disk b --path {free}"), "NO_SUCH_GUEST"),
    ] {
        let mut words = vec!["vm", "attach"];
        words.extend(line.split(' '));
        host.run(&words).refused(1, &[code]);
        assert_eq!(descriptors(&host, "vm"), before, "{line}");
    }
    for (id, file) in [("a", &free), ("b", &text)] {
        let words = [
            "vm",
            "attach",
            "vm",
            "--disk",
            id,
            "--path",
            file,
            "--read-only",
        ];
        host.run(&words).expect(0);
    }
    let third = image(&host, "third.raw", b"THIRD   ");
    host.run(&["vm", "attach", "vm", "--disk", "c", "--path", &third])
        .refused(1, &["NO_FREE_SLOT", "2 slots"]);
    host.run(&["vm", "detach", "vm", "--disk", "own"])
        .refused(1, &["DEVICE_FIXED", "from the start"]);
    let failed = host.records();
    let failed = failed
        .iter()
        .filter(|r| r["action"] == "attach" && r["outcome"] == "failed");
    assert_eq!(failed.count(), 10);
}

#[test]
fn a_guest_that_does_not_let_go_keeps_its_device() {
    let mut host = Host::new("hotplug-keep");
    host.start();
    let path = host.describe("vm", "vm", "");
    host.run(&["run", &path]).expect(0);
    let disk = image(&host, "a.raw", b"A       ");
    let attach = ["vm", "attach", "vm", "--disk", "a", "--path", &disk];
    host.run(&attach).expect(0);
    let detach = ["vm", "detach", "vm", "--disk", "a", "--timeout", "1"];
    host.run(&detach)
        .refused(1, &["STILL_ATTACHED", "within 1 s"]);
    assert_eq!(host.listed("vm").unwrap()["free_slots"], 3);
    // It can be moved and kept as it is.
    host.run(&["vm", "snapshot", "vm", "vm.snap"]).expect(0);
    host.json(&["vm", "pause", "vm"]);
    host.run(&detach).refused(1, &["WRONG_STATE"]);
    host.run(&[
        "vm",
        "attach",
        "vm",
        "--disk",
        "b",
        "--path",
        &image(&host, "b.raw", b"B       "),
    ])
    .expect(0);
    host.json(&["vm", "resume", "vm"]);
    assert_eq!(host.listed("vm").unwrap()["free_slots"], 2);
}

#[test]
fn what_was_attached_is_in_a_snapshot_and_works_after_it() {
    let mut host = Host::new("hotplug-snap");
    host.start();
    let path = describe(&host, "vm", "");
    host.run(&["run", &path]).expect(0);
    for (id, content) in [("a", b"FIRST..."), ("b", b"SECOND..")] {
        let disk = image(&host, id, content);
        host.run(&["vm", "attach", "vm", "--disk", id, "--path", &disk])
            .expect(0);
        shows(&host, &String::from_utf8_lossy(content), 1);
    }
    // The first slot is empty when it is kept.
    host.run(&["vm", "detach", "vm", "--disk", "a"]).expect(0);
    host.run(&["vm", "snapshot", "vm", "vm.snap", "--stop"])
        .expect(0);
    host.run(&["vm", "restore", "vm.snap"]).expect(0);
    let attached = host.listed("vm").unwrap()["attached"].clone();
    assert_eq!(
        (&attached[0]["slot"], attached.as_array().unwrap().len()),
        (&1.into(), 1)
    );
    // It is told anew of what is there.
    shows(&host, "SECOND..", 2);
    let disk = host.path("a").display().to_string();
    host.run(&["vm", "attach", "vm", "--disk", "a", "--path", &disk])
        .expect(0);
    shows(&host, "FIRST...", 2);
    for id in ["a", "b"] {
        host.run(&["vm", "detach", "vm", "--disk", id]).expect(0);
    }
    shows(&host, "g", 3);
}

#[test]
fn a_card_comes_and_goes() {
    if !Path::new("/dev/net/tun").exists() {
        eprintln!("skipped: no /dev/net/tun here");
        return;
    }
    let mut host = Host::new("hotplug-net");
    host.start();
    let path = describe(&host, "vm", "");
    host.run(&["run", &path]).expect(0);
    let before = descriptors(&host, "vm");
    let tap = format!("hp{}", std::process::id());
    let interface = format!("/sys/class/net/{tap}");
    let words = [
        "vm",
        "attach",
        "vm",
        "--net",
        "card",
        "--tap",
        &tap,
        "--bytes-per-second",
        "1 MiB",
    ];
    let attached = host.json(&words);
    assert_eq!(attached["attached"][0]["source"], tap);
    shows(&host, "n", 1);
    assert!(Path::new(&interface).exists());
    host.run(&["vm", "detach", "vm", "--net", "card"]).expect(0);
    shows(&host, "g", 1);
    assert_eq!(descriptors(&host, "vm"), before);
    until("the tap is gone", || !Path::new(&interface).exists());
}

fn describe(host: &Host, name: &str, more: &str) -> String {
    let description = host.describe(name, name, more);
    let code = plugged::code();
    let mut image = small_image();
    image.resize(1024 + 0x200 + code.len().next_multiple_of(4096), 0);
    image[1024 + 0x200..][..code.len()].copy_from_slice(code);
    host.write(&format!("{name}/vmlinuz"), image);
    description
}

fn image(host: &Host, file: &str, content: &[u8; 8]) -> String {
    let mut bytes = vec![0; 1 << 20];
    bytes[..8].copy_from_slice(content);
    let path = host.write(file, bytes);
    path.canonicalize().unwrap().display().to_string()
}

/// How often a line stands on the guest's console, in the end.
fn shows(host: &Host, line: &str, times: usize) {
    let console = host.path("state/guests/vm/console.log");
    until(&format!("{line} on the console {times} times"), || {
        let text = fs::read(&console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        assert!(
            !text.lines().any(|l| l == "G"),
            "the guest still sees what it let go of"
        );
        text.lines().filter(|l| *l == line).count() == times
    });
}

fn descriptors(host: &Host, name: &str) -> u64 {
    let report: Value = host.json(&["sandbox", "report", name]);
    report["reports"][0]["descriptors"].as_u64().unwrap()
}

fn every_descriptor_is_of_a_kind_that_a_vmm_has(host: &Host, disk: &str) {
    let pid = host.listed("vm").unwrap()["pid"].as_u64().unwrap();
    let mut disks = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let link = fs::read_link(entry.unwrap().path()).unwrap();
        let link = link.to_string_lossy().into_owned();
        disks += usize::from(link == disk);
        let known = [
            "anon_inode:",
            "/memfd:",
            "socket:",
            "pipe:",
            "/proc/",
            "/dev/null",
            "/dev/kvm",
        ];
        let known = known.iter().any(|kind| link.starts_with(kind));
        assert!(
            known || link == disk || link.ends_with("agent.log"),
            "{link}"
        );
    }
    assert_eq!(disks, 1);
}
