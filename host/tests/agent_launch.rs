//! The owner's way through a launch, against the real agent, its jailed roles and the real `/dev/kvm`. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::{Host, SEV, SEV_WITH_SECRET};

#[test]
fn an_owner_who_finds_what_was_described_releases_the_secret() {
    let mut host = Host::new("release");
    host.start();
    let root = host.measured("vault");
    let guest = host.listed("vault").unwrap();
    assert_eq!(
        (&guest["state"], &guest["emulated"], &guest["technology"]),
        (&"measured".into(), &true.into(), &"sev".into())
    );
    let ran = host
        .release(
            "vault",
            "host/vm.toml",
            "session",
            &["--allow-emulated", &root, "--json"],
        )
        .expect(0);
    let result = ran.value();
    assert_eq!(result["released"], true);
    assert_eq!(result["verdict"]["emulated"], true);
    let checks = result["verdict"]["checks"].as_array().unwrap();
    assert!(
        checks.iter().all(|c| c["result"] == "accepted"),
        "{checks:?}"
    );
    // What the owner accepted is what `owner measure` says of the description.
    let measured = host.json(&["owner", "measure", "host/vm.toml"]);
    let digest = measured["launch_digest"].as_str().unwrap();
    let wanted = check(&result, "launch_measurement")["expected"].clone();
    assert!(wanted.as_str().unwrap().contains(digest), "{wanted}");
    let text = host
        .run(&["owner", "measure", "host/vm.toml"])
        .expect(0)
        .out;
    assert!(text.contains(digest), "{text}");
    // The guest runs (it only halts), its secret has been used up, and there is no second one.
    assert_ne!(host.listed("vault").unwrap()["state"], "measured");
    host.release(
        "vault",
        "host/vm.toml",
        "session",
        &["--allow-emulated", &root],
    )
    .refused(1, &["NOT_WAITING", "vault"]);
    host.run(&["stop", "vault"]).expect(0);
    assert!(host.listed("vault").is_none());
    host.quiet(1);
}

#[test]
fn an_owner_refuses_a_kernel_with_one_byte_changed() {
    let mut host = Host::new("changed");
    host.start();
    // The owner keeps a copy; the host changes its own after the session was made.
    let owners = host.describe("owner", "vault", SEV_WITH_SECRET);
    let hosts = host.describe("host", "vault", SEV_WITH_SECRET);
    let root = host.export_platform();
    host.owner_session(&owners, &root, "session");
    let kernel = host.path("host/vmlinuz");
    let mut bytes = fs::read(&kernel).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&kernel, bytes).unwrap();
    host.run(&["run", &hosts, "--owner-session", "session"])
        .expect(0);
    let allow = ["--allow-emulated", root.as_str(), "--json"];
    let result = host.release("vault", &owners, "session", &allow).expect(1);
    let result = result.value();
    assert_eq!(result["released"], false);
    assert_eq!(result["verdict"]["overall"], "rejected");
    assert_eq!(failing(&result), ["launch_measurement"]);
    let code = &check(&result, "launch_measurement")["code"];
    assert_eq!(code, "LAUNCH_MEASUREMENT_MISMATCH");
    let text = host
        .release("vault", &owners, "session", &allow[..2])
        .expect(1)
        .out;
    let line = text.lines().find(|l| l.contains("launch_measurement"));
    assert!(line.is_some_and(|l| l.contains("REJECTED")), "{text}");
    assert!(text.contains("secret NOT released"), "{text}");
    // Nothing was injected: the guest still waits. The kernel that was described is then accepted.
    assert_eq!(host.listed("vault").unwrap()["state"], "measured");
    host.release("vault", "host/vm.toml", "session", &allow)
        .expect(0);
}

#[test]
fn an_owner_believes_no_emulated_platform_unless_told_its_root() {
    let mut host = Host::new("root");
    host.start();
    let root = host.measured("vault");
    let session = [
        "owner",
        "session",
        "--platform",
        "platform",
        "--description",
        "host/vm.toml",
        "--out",
        "other",
    ];
    host.run(&session).refused(1, &["PLATFORM_UNTRUSTED"]);
    assert!(
        !host.path("other").exists(),
        "a refused platform leaves no keys"
    );
    for (more, wrong) in [
        (None, "none"),
        (Some(format!("sha256:{}", "0".repeat(64))), "another"),
    ] {
        let more: Vec<&str> = more
            .iter()
            .flat_map(|root| ["--allow-emulated", root])
            .chain(["--json"])
            .collect();
        let ran = host.release("vault", "host/vm.toml", "session", &more);
        let result = ran.value();
        assert!(matches!(ran.code, Some(1 | 2)), "{wrong}: {ran:?}");
        assert_eq!(result["released"], false);
        let chain = check(&result, "platform_chain");
        assert_ne!(chain["result"], "accepted");
        assert!(chain["code"].is_string(), "{chain}");
    }
    host.release(
        "vault",
        "host/vm.toml",
        "session",
        &["--allow-emulated", "sha256:12"],
    )
    .refused(64, &["--allow-emulated", "64 hex digits"]);
    assert_eq!(host.listed("vault").unwrap()["state"], "measured");
    host.release(
        "vault",
        "host/vm.toml",
        "session",
        &["--allow-emulated", &root],
    )
    .expect(0);
}

#[test]
fn a_session_of_another_owner_and_a_secret_too_large_release_nothing() {
    let mut host = Host::new("session");
    host.start();
    let root = host.measured("vault");
    host.owner_session("host/vm.toml", &root, "second");
    let allow = ["--allow-emulated", root.as_str(), "--json"];
    let result = host
        .release("vault", "host/vm.toml", "second", &allow)
        .expect(1)
        .value();
    assert_eq!(failing(&result), ["launch_measurement"]);
    host.release("vault", "host/vm.toml", "nowhere", &allow)
        .refused(1, &["nowhere/owner.keys"]);
    for (size, said) in [(2049, "2049"), (0, "0")] {
        host.write("secret", vec![7; size]);
        host.release("vault", "host/vm.toml", "session", &allow)
            .refused(1, &["SECRET", "1 to 2048 bytes", said]);
        assert_eq!(host.listed("vault").unwrap()["state"], "measured");
    }
    host.write("secret", vec![7; 2048]);
    host.release("vault", "host/vm.toml", "session", &allow)
        .expect(0);
}

#[test]
fn a_session_is_for_one_policy_and_its_keys_are_never_overwritten() {
    let mut host = Host::new("policy");
    host.start();
    let root = host.measured("vault");
    // The same folder again would lose the keys of the launch under way.
    let again = [
        "owner",
        "session",
        "--platform",
        "platform",
        "--description",
        "host/vm.toml",
        "--allow-emulated",
        &root,
        "--out",
        "session",
    ];
    let keys = fs::read(host.path("session/owner.keys")).unwrap();
    host.run(&again).refused(1, &["session"]);
    assert_eq!(fs::read(host.path("session/owner.keys")).unwrap(), keys);
    let other = host.describe(
        "other",
        "vault",
        "[confidential]\ntechnology = \"sev\"\npolicy = 0x1\nsecret = true\n",
    );
    let allow = ["--allow-emulated", root.as_str(), "--json"];
    let result = host
        .release("vault", &other, "session", &allow)
        .expect(1)
        .value();
    assert!(
        failing(&result).contains(&"guest_policy".to_owned()),
        "{result}"
    );
}

#[test]
fn a_session_and_a_description_without_a_secret_do_not_fit() {
    let mut host = Host::new("fits");
    host.start();
    let root = host.export_platform();
    let with = host.describe("with", "with", SEV_WITH_SECRET);
    let without = host.describe("without", "without", SEV);
    host.owner_session(&with, &root, "session");
    host.run(&["run", &with])
        .refused(1, &["OWNER_SESSION", "--owner-session"]);
    host.run(&["run", &without, "--owner-session", "session"])
        .refused(1, &["OWNER_SESSION", "secret = true"]);
    host.run(&["run", &with, "--owner-session", "nowhere"])
        .refused(1, &["nowhere/owner.cert", "casemate owner session"]);
    host.write("broken/owner.cert", vec![0; 2084]);
    host.write("broken/session.bin", vec![0; 128]);
    host.run(&["run", &with, "--owner-session", "broken"])
        .expect(1);
    host.write("short/owner.cert", b"x");
    host.write("short/session.bin", b"");
    host.run(&["run", &with, "--owner-session", "short"])
        .expect(1);
    // None of them left anything behind; the one without a secret runs at once.
    host.quiet(1);
    host.run(&["run", &without]).expect(0);
    assert!(host.listed("without").is_some() && host.listed("with").is_none());
}

#[test]
fn the_ledger_tells_what_happened_and_shows_a_change() {
    let mut host = Host::new("ledger");
    host.start();
    let root = host.measured("vault");
    let large = host.describe("large", "large", SEV);
    let text = fs::read_to_string(host.path(&large)).unwrap();
    host.write(&large, text.replace("64 MiB", "1 GiB"));
    host.run(&["run", &large])
        .refused(3, &["limits.max_memory_mib"]);
    host.release(
        "vault",
        "host/vm.toml",
        "session",
        &["--allow-emulated", &root],
    )
    .expect(0);
    host.run(&["stop", "vault"]).expect(0);
    // Allowed, and then it cannot be: that is a record as well.
    let broken = host.describe("broken", "broken", SEV);
    host.write("broken/vmlinuz", b"no kernel");
    host.run(&["run", &broken]).expect(1);
    let records = host.records();
    let found = |action: &str, object: &str, outcome: &str| {
        let record = records
            .iter()
            .find(|r| r["action"] == action && r["object"] == object && r["outcome"] == outcome);
        record
            .unwrap_or_else(|| panic!("no {action} {object} {outcome}: {records:#?}"))
            .clone()
    };
    let refusal = found("launch", "large", "refused");
    assert_eq!(refusal["code"], "too-much-memory");
    for (action, outcome) in [
        ("launch", "allowed"),
        ("launch", "done"),
        ("secret-release", "done"),
        ("stop", "done"),
    ] {
        assert_eq!(
            found(action, "vault", outcome)["emulated"],
            true,
            "{action}"
        );
    }
    assert_eq!(refusal["emulated"], true);
    found("launch", "broken", "allowed");
    let failure = found("launch", "broken", "failed");
    assert!(
        failure["emulated"] == true && failure["code"] != "",
        "{failure}"
    );
    let start = records.iter().find(|r| r["action"] == "start").unwrap();
    let binary = fs::read(env!("CARGO_BIN_EXE_casemate")).unwrap();
    let hash = ring::digest::digest(&ring::digest::SHA256, &binary);
    assert_eq!(start["detail"]["binary_sha256"], hex::encode(hash));
    assert_eq!(start["detail"]["sandbox"].as_array().unwrap().len(), 2);
    assert!(records.iter().any(|r| r["action"] == "policy-load"));
    let verify = [
        "evidence",
        "verify",
        "state/ledger",
        "--key",
        "state/ledger.pub",
    ];
    let summary = host.json(&verify);
    assert_eq!(summary["records"], records.len());
    assert_eq!(summary["uncovered"], 0);
    assert!(host.run(&verify).expect(0).out.contains(" verified: "));
    every_flipped_byte_is_refused(&host);
    let other = Host::new("other");
    other.write("state/x", b"");
    host.run(&["evidence", "verify", "state/ledger", "--key", "policy.toml"])
        .expect(1);
    host.run(&["evidence", "verify", "nowhere", "--key", "state/ledger.pub"])
        .refused(2, &["nowhere"]);
}

fn every_flipped_byte_is_refused(host: &Host) {
    let good = fs::read(host.path("state/ledger")).unwrap();
    let key = fs::read_to_string(host.path("state/ledger.pub")).unwrap();
    let key = key.trim().parse().unwrap();
    // Through the library, so that many positions can be tried.
    let step = good.len() / 97;
    for at in (0..good.len()).step_by(step.max(1)) {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let path = host.write("bad", &bad);
        assert!(
            casemate_policy::ledger::verify(&path, &key).is_err(),
            "byte {at}"
        );
    }
    let mut bad = good;
    let middle = bad.len() / 2;
    bad[middle] ^= 0x40;
    host.write("bad", &bad);
    host.run(&["evidence", "verify", "bad", "--key", "state/ledger.pub"])
        .refused(1, &["EVIDENCE", "bad"]);
}

#[test]
fn an_agent_started_again_is_the_same_platform_and_goes_on_with_its_ledger() {
    let mut host = Host::new("again");
    host.start();
    let root = host.export_platform();
    let before = host.records().len();
    assert!(host.end(Signal::SIGTERM).success());
    host.start();
    assert_eq!(host.export_platform(), root);
    let starts = host
        .records()
        .iter()
        .filter(|r| r["action"] == "start")
        .count();
    assert_eq!((starts, host.records().len()), (2, before + 1));
    host.json(&[
        "evidence",
        "verify",
        "state/ledger",
        "--key",
        "state/ledger.pub",
    ]);
    // An identity that was damaged is refused, not replaced behind the owners' backs.
    host.end(Signal::SIGTERM);
    host.write("state/processor.identity", b"damaged");
    let ran = host.start_fails();
    assert_ne!(ran.code, Some(0));
    assert_eq!(
        fs::read(host.path("state/processor.identity")).unwrap(),
        b"damaged"
    );
}

fn check<'a>(result: &'a Value, name: &str) -> &'a Value {
    let checks = result["verdict"]["checks"].as_array().unwrap();
    checks.iter().find(|c| c["name"] == name).unwrap()
}

fn failing(result: &Value) -> Vec<String> {
    let checks = result["verdict"]["checks"].as_array().unwrap();
    let bad = checks.iter().filter(|c| c["result"] != "accepted");
    bad.map(|c| c["name"].as_str().unwrap().to_owned())
        .collect()
}
