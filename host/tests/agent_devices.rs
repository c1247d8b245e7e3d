//! `casemate vm stop` and `casemate vm resize` against the real agent. Needs root and `/dev/kvm`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;

use support::{Host, small_image, until};

#[test]
fn a_guest_that_hears_no_power_button_runs_on_until_it_is_forced() {
    let mut host = Host::new("button");
    host.start();
    let path = host.describe("vm", "vault", "");
    host.run(&["run", &path]).expect(0);
    host.run(&["vm", "stop", "vault", "--timeout", "1"])
        .refused(1, &["STILL_RUNNING", "within 1 s", "--force"]);
    assert_eq!(host.listed("vault").unwrap()["state"], "running");
    host.json(&["vm", "pause", "vault"]);
    host.run(&["vm", "stop", "vault"])
        .refused(1, &["WRONG_STATE", "resume it"]);
    host.json(&["vm", "resume", "vault"]);
    host.run(&["vm", "stop", "vault", "--timeout", "1", "--force"])
        .expect(0);
    assert!(host.listed("vault").is_none());
    host.run(&["vm", "stop", "vault"])
        .refused(1, &["NO_SUCH_GUEST"]);
    let count = |action: &str| {
        let records = host.records();
        let done = records.iter().filter(|r| {
            (&r["action"], &r["object"], &r["outcome"])
                == (&action.into(), &"vault".into(), &"done".into())
        });
        done.count()
    };
    assert_eq!((count("power-button"), count("stop")), (2, 1));
}

#[test]
fn an_unfed_watchdog_is_in_state_record_and_metrics() {
    let mut host = Host::new("unfed");
    host.start();
    for (action, wanted) in [
        ("stop", "stopped"),
        ("pause", "paused"),
        ("report", "running"),
    ] {
        let watchdog = format!("[watchdog]\naction = {action:?}\n");
        let path = host.describe("vm", action, &watchdog);
        let mut image = small_image();
        image.resize(1024 + 0x200 + 4096, 0);
        image[1024 + 0x200..][..STARVE.len()].copy_from_slice(STARVE);
        host.write("vm/vmlinuz", image);
        host.run(&["run", &path]).expect(0);
        until("it is on record", || {
            let records = host.records();
            let unfed = records.iter().filter(|r| {
                r["action"] == "guest-watchdog" && r["object"] == action && r["outcome"] == "done"
            });
            unfed.count() == 1
        });
        until(&format!("it is {wanted}"), || {
            host.listed(action).unwrap()["state"] == wanted
        });
        if action == "stop" {
            assert_eq!(host.listed(action).unwrap()["stopped"], "watchdog");
        }
        host.run(&["stop", action]).expect(0);
    }
    let metrics = host.run(&["metrics"]).expect(0).out;
    let line = "casemate_watchdog_expirations_total 3";
    assert!(metrics.lines().any(|found| found == line), "{metrics}");
}

/// The watchdog is in slot 1 and starts with two stages of some 50 ms, as in `vmm_devices.rs`.
const STARVE: &[u8] = &[
    0xba, 0xf8, 0x0c, 0x00, 0x00, 0xb8, 0x60, 0x08, 0x00, 0x80, 0xef, 0xb2, 0xfc, 0xb8, 0x03, 0x00,
    0x00, 0x00, 0x66, 0xef, 0xbf, 0x00, 0x00, 0x00, 0xd0, 0x66, 0xc7, 0x47, 0x0c, 0x80, 0x00, 0x66,
    0xc7, 0x47, 0x0c, 0x86, 0x00, 0xc7, 0x07, 0x32, 0x00, 0x00, 0x00, 0x66, 0xc7, 0x47, 0x0c, 0x80,
    0x00, 0x66, 0xc7, 0x47, 0x0c, 0x86, 0x00, 0xc7, 0x47, 0x04, 0x32, 0x00, 0x00, 0x00, 0xb2, 0xf8,
    0xb8, 0x68, 0x08, 0x00, 0x80, 0xef, 0xb2, 0xfc, 0xb0, 0x02, 0xee, 0xeb, 0xfe,
];

#[test]
fn a_disk_grows_and_its_limits_change_and_go_along_in_a_snapshot() {
    let mut host = Host::new("resize");
    host.start();
    let disk = host.write("vm/data.raw", vec![0; 1 << 20]);
    let described = "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n";
    let path = host.describe("vm", "vault", described);
    host.run(&["run", &path]).expect(0);
    fs::File::options()
        .write(true)
        .open(&disk)
        .unwrap()
        .set_len(3 << 20)
        .unwrap();
    let resized = host.json(&["vm", "resize", "vault", "--disk", "data"]);
    assert_eq!(resized["size"], 3 << 20);
    assert_eq!(resized["limits"]["operations"], serde_json::Value::Null);
    let limit = ["--operations-per-second", "70", "--operations-burst", "9"];
    let mut words = vec!["vm", "resize", "vault", "--disk", "data"];
    words.extend(limit);
    let limited = host.json(&words);
    let wanted = serde_json::json!({"per_second": 70, "burst": 9});
    assert_eq!(limited["limits"]["operations"], wanted);
    for wrong in [
        ["--disk", "other"],
        ["--balloon", "8 MiB"],
        ["--disk", "../data"],
    ] {
        let mut words = vec!["vm", "resize", "vault"];
        words.extend(wrong);
        assert_eq!(host.run(&words).code, Some(1), "{wrong:?}");
    }
    host.run(&["vm", "snapshot", "vault", "vault.snap", "--stop"])
        .expect(0);
    host.run(&["vm", "restore", "vault.snap"]).expect(0);
    let restored = host.json(&["vm", "resize", "vault", "--disk", "data"]);
    assert_eq!(restored["limits"]["operations"], wanted);
    host.run(&["vm", "stop", "vault", "--force"]).expect(0);
    let records = host.records();
    let of_data = records.iter().filter(|r| r["action"] == "resize");
    assert!(of_data.count() >= 3);
}
