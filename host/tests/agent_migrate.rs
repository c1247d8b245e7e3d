//! Moves between two real agents with their jailed roles, on the machine's own `/dev/kvm`. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::counter::{Story, rounds, run, run_counter};
use support::pair::Pair;
use support::{Host, SEV, until};

#[test]
fn a_dry_run_says_what_a_move_would_be_like_and_moves_nothing() {
    let pair = Pair::new("dry", ["", ""]);
    run_counter(&pair.a, "counter");
    let mut story = Story::of("counter");
    story.hear(&pair.a, 5);
    let plan = pair
        .a
        .json(&["migrate", "counter", "--to", "b", "--dry-run"]);
    assert_eq!(
        (&plan["kind"], &plan["to"]),
        (&"assessed".into(), &"b".into())
    );
    let checks: Vec<_> = plan["checks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["check"].as_str().unwrap())
        .collect();
    assert_eq!(
        checks,
        [
            "policy here",
            "peer",
            "policy there",
            "processor there",
            "memory there",
            "devices there"
        ]
    );
    assert_eq!(plan["memory_mib"], 64);
    // 256 pages are written all the time, and the console's port is no memory.
    let dirty = plan["dirty_kib_per_s"].as_u64().unwrap();
    assert!((900..=1100).contains(&dirty), "{plan}");
    assert!(plan["populated_kib"].as_u64().unwrap() > 1024);
    assert!(
        plan["throughput_kib_per_s"].as_u64().unwrap() > 10_000,
        "{plan}"
    );
    assert_eq!(plan["convergence"], "converged");
    assert!(pair.a.runs("counter") && pair.b.listed("counter").is_none());
    assert_eq!(pair.a.listed("counter").unwrap()["epoch"], 1);
    pair.b.quiet(1);
    story.hear(&pair.a, 20);
    let done = |host: &Host, action: &str| {
        host.records()
            .iter()
            .any(|r| r["action"] == action && r["outcome"] == "done")
    };
    assert!(done(&pair.a, "assess-out") && done(&pair.b, "assess-in"));
    assert!(!done(&pair.a, "migrate-out") && !done(&pair.b, "migrate-in"));
    let shown = pair
        .a
        .run(&["migrate", "counter", "--to", "b", "--dry-run"])
        .expect(0);
    assert!(
        shown.out.contains("nothing has moved") && shown.out.contains("memory there"),
        "{shown:?}"
    );

    // What was foretold comes about.
    let report = moved(&pair.a, &["counter", "--to", "b"]);
    story.leave(&pair.a);
    story.hear(&pair.b, 50);
    assert_eq!(report["epoch"], 2);
    assert!(report["downtime_ms"].as_f64().unwrap() < 300.0, "{report}");
    let rounds = report["rounds"].as_u64().unwrap();
    assert!(rounds <= plan["rounds"].as_u64().unwrap() + 2, "{report}");
    eprintln!("plan {plan}\noutcome {report}");
}

#[test]
fn a_dry_run_is_refused_with_the_code_of_what_stands_in_the_way() {
    let pair = Pair::new("short", ["", ""]);
    let big = pair.a.describe("big", "big", "");
    let text = std::fs::read_to_string(pair.a.path(&big)).unwrap();
    pair.a.write(&big, text.replace("64 MiB", "60 GiB"));
    pair.a.run(&["run", &big]).expect(0);
    for more in [&["--dry-run"][..], &[]] {
        let mut args = vec!["migrate", "big", "--to", "b"];
        args.extend(more);
        pair.a
            .run(&args)
            .refused(1, &["MEMORY_SHORT", "available", "runs on here"]);
    }
    assert!(pair.a.runs("big"));
    pair.a.run(&["stop", "big"]).expect(0);

    let described = pair.a.describe(
        "plain",
        "plain",
        "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n",
    );
    pair.a.write("plain/data.raw", vec![0; 1 << 20]);
    pair.a.run(&["run", &described]).expect(0);
    pair.a
        .run(&["migrate", "plain", "--to", "b", "--dry-run"])
        .refused(3, &["POLICY_", "data"]);
    pair.a
        .run(&["migrate", "plain", "--to", "c", "--dry-run"])
        .refused(3, &["POLICY_PEER_UNKNOWN"]);
    pair.there.cut();
    pair.a
        .run(&["migrate", "plain", "--to", "b", "--dry-run"])
        .expect(1);
    assert!(pair.a.runs("plain"));
    pair.b.quiet(1);
}

#[test]
fn a_disk_that_cannot_be_reached_there_is_found_before_anything_moves() {
    let more = "[[incoming_disk]]\nid = \"data\"\npath = \"/nowhere/data.raw\"\n";
    let pair = Pair::new("disk", ["", more]);
    let described = pair.a.describe(
        "plain",
        "plain",
        "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n",
    );
    pair.a.write("plain/data.raw", vec![0; 1 << 20]);
    pair.a.run(&["run", &described]).expect(0);
    pair.a
        .run(&["migrate", "plain", "--to", "b", "--dry-run"])
        .refused(1, &["RESOURCE", "/nowhere/data.raw", "runs on here"]);
    assert!(pair.a.runs("plain"));
}

#[test]
fn a_sev_guest_s_target_is_judged_before_anything_moves() {
    let pair = Pair::new("sev", ["", ""]);
    let described = pair.a.describe("sev", "vault", SEV);
    pair.a.run(&["run", &described]).expect(0);
    // Neither policy names the other's emulated root.
    let refused = pair
        .a
        .run(&["migrate", "vault", "--to", "b", "--dry-run"])
        .expect(1);
    assert!(!refused.err.contains("GUEST_FAILED"), "{refused:?}");
    assert!(pair.a.runs("vault"));
    let attested = pair.a.records();
    assert!(
        attested
            .iter()
            .any(|r| r["actor"] == "mover" && r["outcome"] != "done"),
        "the verdict is on record"
    );
    pair.a
        .run(&["migrate", "vault", "--to", "b", "--read-back"])
        .refused(1, &["READ_BACK_UNSUPPORTED"]);
}

#[test]
fn what_was_compared_is_in_the_result_and_in_both_ledgers() {
    let pair = Pair::new("verify", ["", ""]);
    run_counter(&pair.a, "counter");
    let report = moved(&pair.a, &["counter", "--to", "b", "--read-back"]);
    let verified = &report["verified"];
    assert!(verified["pages"].as_u64().unwrap() > 256, "{verified}");
    assert_eq!(verified["announced"], 0);
    for key in ["seals_sha256", "state_sha256", "content_sha256"] {
        assert_eq!(verified[key].as_str().unwrap().len(), 64, "{key}");
        for (host, action) in [(&pair.a, "migrate-out"), (&pair.b, "migrate-in")] {
            let records = host.records();
            let record = records
                .iter()
                .rfind(|r| r["action"] == action && r["outcome"] == "done")
                .unwrap();
            assert_eq!(record["detail"][key], verified[key], "{key} in {action}");
        }
    }
    assert!(report["forecast_error_ms"].is_number() && report["throttle_percent"].is_number());
    let report = moved(&pair.b, &["counter", "--to", "a"]);
    assert_eq!(report["verified"]["content_sha256"], Value::Null);
}

/// The counter writes a MiB over and over. At 1 MiB/s nothing converges until it is slowed down.
#[test]
fn a_busy_guest_is_slowed_down_until_it_fits_or_the_operator_switches() {
    let pair = Pair::new("busy", ["", ""]);
    run_counter(&pair.a, "counter");
    let mut story = Story::of("counter");
    story.hear(&pair.a, 5);
    let mut throttled = 0;
    let begun = Instant::now();
    let args = [
        "counter",
        "--to",
        "b",
        "--downtime-limit",
        "1",
        "--bandwidth",
        "4",
    ];
    let mut proceeded = false;
    let ran = pair.a.migrate(&args, |event| {
        throttled = throttled.max(event["throttle_percent"].as_u64().unwrap_or(0));
        if throttled >= 30 && !std::mem::replace(&mut proceeded, true) {
            pair.a
                .run(&["migrate-set", "counter", "--bandwidth", "64"])
                .expect(0);
            pair.a.run(&["proceed", "counter"]).expect(0);
        }
    });
    let report = ran.expect(0).value();
    assert!(throttled >= 30, "{report}");
    assert_eq!(report["convergence"], "proceeded", "{report}");
    assert!(begun.elapsed() < Duration::from_secs(60));
    story.leave(&pair.a);
    let counted = story.hear(&pair.b, 20);
    let begun = Instant::now();
    let before = counted;
    let after = story.hear(&pair.b, 50);
    eprintln!(
        "{} rounds in {:?} after the move",
        after - before,
        begun.elapsed()
    );
    let actions: Vec<_> = pair
        .a
        .records()
        .iter()
        .map(|r| r["action"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert!(
        actions.iter().any(|a| a == "migrate-set")
            && actions.iter().any(|a| a == "migrate-proceed")
    );
    pair.b
        .run(&["proceed", "counter"])
        .refused(1, &["NOT_MOVING"]);
}

#[test]
fn a_throttled_guest_gets_all_its_time_again_after_a_cancel_and_memory_is_whole_at_the_next_move() {
    let pair = Pair::new("cancel", ["", ""]);
    run_counter(&pair.a, "counter");
    let mut story = Story::of("counter");
    let args = [
        "counter",
        "--to",
        "b",
        "--downtime-limit",
        "1",
        "--bandwidth",
        "4",
    ];
    let mut seen = Vec::new();
    for end in ["cancel", "time"] {
        let mut all = args.to_vec();
        if end == "time" {
            all.extend(["--time-limit", "2"]);
        }
        let mut cancelled = false;
        let ran = pair.a.migrate(&all, |event| {
            let throttled = event["throttle_percent"].as_u64().unwrap_or(0);
            if end == "cancel" && throttled >= 20 && !std::mem::replace(&mut cancelled, true) {
                pair.a.run(&["cancel", "counter"]).expect(0);
            }
        });
        seen.push(ran.expect(1).err);
        assert!(pair.a.runs("counter"));
        story.hear(&pair.a, 20);
        until("nothing of it is left there", || {
            pair.b.listed("counter").is_none()
        });
    }
    assert!(
        seen[0].contains("CANCELLED") && seen[1].contains("TIME_LIMIT"),
        "{seen:?}"
    );
    let report = moved(&pair.a, &["counter", "--to", "b", "--read-back"]);
    assert_eq!(
        report["verified"]["content_sha256"].as_str().unwrap().len(),
        64
    );
    story.leave(&pair.a);
    story.hear(&pair.b, 50);
}

/// Both hosts have a place of their own for the disk; nothing of it is shared.
fn with_disks(tag: &str) -> (Pair, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let place = |host: &str| {
        let path = folder.path().join(format!("{host}.raw"));
        format!("[[incoming_disk]]\nid = \"data\"\npath = {path:?}\n")
    };
    let pair = Pair::new(tag, [&place("a"), &place("b")]);
    (pair, folder)
}

fn run_with_disk(host: &Host, image: &[u8]) {
    let disk = "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n";
    host.write("host/data.raw", []);
    let file = std::fs::File::options()
        .write(true)
        .open(host.path("host/data.raw"))
        .unwrap();
    // Zero blocks become holes.
    file.set_len(image.len() as u64).unwrap();
    for (number, block) in image.chunks(4096).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, number as u64 * 4096).unwrap();
        }
    }
    run(host, "counter", disk);
    until("it counts", || rounds(host, "counter") > 20);
}

/// 64 MiB, of which 300 blocks here and there hold something.
fn image() -> Vec<u8> {
    let mut image = vec![0; 64 << 20];
    for block in 0..300usize {
        let at = block * 51 % (16 << 10) * 4096;
        let bytes = (0..4096u32).map(|n| (n as usize * 7 + block) as u8 | 1);
        image[at..at + 4096]
            .iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = from);
    }
    image
}

#[test]
fn a_disk_moves_along_with_its_holes_and_comes_back() {
    let (pair, folder) = with_disks("along");
    let image = image();
    run_with_disk(&pair.a, &image);
    let mut story = Story::of("counter");
    story.hear(&pair.a, 5);
    pair.a
        .run(&["migrate", "counter", "--to", "b", "--copy-disk", "other"])
        .refused(1, &["NO_SUCH_DEVICE", "other"]);
    let there = folder.path().join("b.raw");
    let plan = pair.a.json(&[
        "migrate",
        "counter",
        "--to",
        "b",
        "--copy-disk",
        "data",
        "--dry-run",
    ]);
    assert!(plan["populated_kib"].as_u64().unwrap() > 300 * 4);
    pair.b.quiet(1);
    assert!(!there.exists(), "an assessment leaves nothing");

    let args = ["counter", "--to", "b", "--copy-disk", "data", "--read-back"];
    let report = moved(&pair.a, &args);
    story.leave(&pair.a);
    story.hear(&pair.b, 20);
    assert!(
        std::fs::read(&there).unwrap() == image,
        "the image is the same"
    );
    let stored = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&there).unwrap()) * 512;
    assert!(
        (300 * 4096..400 * 4096).contains(&stored),
        "{stored} bytes are stored"
    );
    assert!(report["verified"]["pages"].as_u64().unwrap() >= 300 + 256);
    assert!(report["verified"]["content_sha256"].is_string());

    // Somebody's file is in the way: it stays what it is, and so does the guest.
    let back = folder.path().join("a.raw");
    std::fs::write(&back, "somebody's").unwrap();
    pair.b
        .run(&["migrate", "counter", "--to", "a", "--copy-disk", "data"])
        .refused(1, &["DISK_EXISTS", "a.raw", "runs on here"]);
    assert_eq!(std::fs::read(&back).unwrap(), b"somebody's");
    std::fs::remove_file(&back).unwrap();
    moved(&pair.b, &["counter", "--to", "a", "--copy-disk", "data"]);
    story.leave(&pair.b);
    story.hear(&pair.a, 20);
    assert!(std::fs::read(&back).unwrap() == image);
}

#[test]
fn a_disk_of_an_odd_size_stays_where_it_is() {
    let (pair, _folder) = with_disks("odd");
    run_with_disk(&pair.a, &[7; 4096 + 512]);
    pair.a
        .run(&["migrate", "counter", "--to", "b", "--copy-disk", "data"])
        .refused(1, &["DISK_SIZE", "4608"]);
    assert!(pair.a.runs("counter"));
}

#[test]
fn a_disk_that_finds_no_room_leaves_the_guest_and_no_trace_and_the_next_try_succeeds() {
    let (pair, folder) = with_disks("full");
    run_with_disk(&pair.a, &image());
    let small = folder.path();
    mount(small, "size=256k");
    let args = ["migrate", "counter", "--to", "b", "--copy-disk", "data"];
    pair.a.run(&args).refused(1, &["DISK_FULL", "runs on here"]);
    let is_empty = || std::fs::read_dir(small).unwrap().next().is_none();
    until("the image is removed", is_empty);
    mount(small, "remount,size=64m");
    let mut story = Story::of("counter");
    story.hear(&pair.a, 20);
    moved(&pair.a, &args[1..]);
    story.leave(&pair.a);
    story.hear(&pair.b, 20);
    assert!(std::fs::read(small.join("b.raw")).unwrap() == image());
    pair.b.run(&["stop", "counter"]).expect(0);
    pair.b.quiet(1);
    // The kernel gives the image's ring up a moment after the guest.
    until("the folder can be unmounted", || {
        let unmounted = std::process::Command::new("umount").arg(small).status();
        unmounted.unwrap().success()
    });
}

fn mount(at: &std::path::Path, options: &str) {
    let mut command = std::process::Command::new("mount");
    command.args(["-t", "tmpfs", "-o", options, "none"]).arg(at);
    assert!(command.status().unwrap().success());
}

fn moved(host: &Host, args: &[&str]) -> Value {
    let mut all = vec!["--json", "migrate"];
    all.extend(args);
    let out = host.run(&all).expect(0).out;
    serde_json::from_str(out.lines().last().unwrap()).unwrap()
}
