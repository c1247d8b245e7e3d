//! `casemate vm stop` and `casemate vm resize` against the real agent. Needs root and `/dev/kvm`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;

use support::Host;

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
