//! `casemate policy`: from an empty folder to a signed policy with cases, and back to decisions of the past.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::Command;

use casemate_policy::claims::{Actor, Inquiry};
use casemate_policy::ledger::{Ledger, Signer};
use casemate_policy::{Action, HostPolicy, Technology, decide, history};
use serde_json::Value;

const POLICY: &str = "version = 3\nnot_before = '2026-01-01T00:00:00Z'\nnot_after = '2027-01-01T00:00:00Z'\n\
    [host]\nname = 'site-a'\n[technologies]\nallowed = ['sev']\n[limits]\nmax_vcpus = 2\nmax_memory_mib = 64\n";
const CASES: &str = "[[case]]\nname = 'small'\nwant = 'allow'\n[case.ask]\nclock = '2026-06-01T00:00:00Z'\n\
    actor = { local = { uid = 0 } }\nobject = 'vm'\n\
    action = { launch = { technology = 'sev', emulated = false, vcpus = 2, memory_mib = 64, policy_bits = 1 } }\n";

struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn casemate(folder: &Path, arguments: &[&str]) -> Ran {
    let ran = Command::new(env!("CARGO_BIN_EXE_casemate"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    Ran {
        code: ran.status.code().unwrap(),
        out: String::from_utf8(ran.stdout).unwrap(),
        err: String::from_utf8(ran.stderr).unwrap(),
    }
}

fn json(folder: &Path, arguments: &[&str], code: i32) -> Value {
    let ran = casemate(folder, &[&["--json"], arguments].concat());
    assert_eq!(ran.code, code, "{arguments:?}: {}{}", ran.out, ran.err);
    serde_json::from_str(&ran.out).unwrap()
}

fn refused(folder: &Path, arguments: &[&str], code: i32, word: &str) {
    let ran = casemate(folder, arguments);
    assert_eq!(ran.code, code, "{arguments:?}: {}{}", ran.out, ran.err);
    assert!(ran.err.contains(word), "{arguments:?}: {}", ran.err);
}

#[test]
fn a_policy_is_signed_by_two_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    fs::write(at.join("p.toml"), POLICY).unwrap();
    let key = |name: &str| {
        let made = json(at, &["policy", "keygen", "--out", name], 0);
        made["key"].as_str().unwrap().to_owned()
    };
    let (a, b) = (key("a.key"), key("b.key"));
    refused(at, &["policy", "keygen", "--out", "a.key"], 1, "a.key");
    let when = "2026-06-01T00:00:00Z";
    let trust = ["--trust", &a, "--trust", &b, "--at", when];
    let check = |more: &[&'static str]| [&["policy", "check", "p.toml"], &trust[..], more].concat();
    refused(at, &check(&[]), 1, "UNDER_THRESHOLD");
    json(at, &["policy", "sign", "p.toml", "--key", "a.key"], 0);
    refused(at, &check(&[]), 1, "UNDER_THRESHOLD");
    json(at, &check(&["--threshold", "1"]), 0);
    json(at, &["policy", "sign", "p.toml", "--key", "b.key"], 0);
    let checked = json(at, &check(&[]), 0);
    assert_eq!(checked["signers"].as_array().unwrap().len(), 2);
    assert_eq!(
        (&checked["version"], &checked["signatures_checked"]),
        (&3.into(), &true.into())
    );
    let late = ["policy", "check", "p.toml", "--at", "2027-01-01T00:00:00Z"];
    refused(at, &late, 1, "NOT_VALID_NOW");
    // A host's mark.
    let digest = checked["digest"].as_str().unwrap();
    let mark = |version: u64| {
        let text = format!("{{\"version\":{version},\"digest\":\"{digest}\",\"signed\":true}}");
        fs::write(at.join("mark"), text).unwrap();
    };
    mark(3);
    json(at, &check(&["--mark", "mark"]), 0);
    mark(4);
    refused(at, &check(&["--mark", "mark"]), 1, "OLDER_POLICY");
    // What was signed is this text.
    fs::write(at.join("p.toml"), format!("{POLICY}# more\n")).unwrap();
    refused(at, &check(&[]), 1, "SIGNATURES_INVALID");
    json(at, &["policy", "sign", "p.toml", "--key", "a.key"], 0);
    refused(at, &check(&[]), 1, "UNDER_THRESHOLD");
    fs::write(at.join("p.toml"), POLICY.replace("max_vcpus", "max_cpus")).unwrap();
    refused(at, &["policy", "check", "p.toml"], 1, "limits.max_cpus");
    refused(
        at,
        &["policy", "sign", "p.toml", "--key", "a.key"],
        1,
        "limits.max_cpus",
    );
}

#[test]
fn cases_decide_the_exit_status() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    fs::write(at.join("p.toml"), POLICY).unwrap();
    fs::create_dir(at.join("cases")).unwrap();
    let test = ["policy", "test", "p.toml", "cases"];
    refused(at, &test, 1, "no case");
    fs::write(at.join("cases/a.toml"), CASES).unwrap();
    assert_eq!(json(at, &test, 0)["passed"], 1);
    fs::write(
        at.join("cases/b.toml"),
        CASES.replace("vcpus = 2", "vcpus = 3"),
    )
    .unwrap();
    let tested = json(at, &test, 1);
    assert_eq!(
        (&tested["passed"], &tested["failed"]),
        (&1.into(), &1.into())
    );
    let ran = casemate(at, &test);
    assert!(ran.out.contains("REFUSES limits.max_vcpus"), "{}", ran.out);
    assert!(
        ran.out.contains("wanted allow, found too-many-vcpus"),
        "{}",
        ran.out
    );
}

#[test]
fn the_past_is_explained_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    fs::create_dir(at.join("policies")).unwrap();
    fs::write(at.join("policies/p.toml"), POLICY).unwrap();
    fs::write(at.join("policies/notes.toml"), "no policy").unwrap();
    let policy = HostPolicy::parse("p", POLICY).unwrap();
    let random = ring::rand::SystemRandom::new();
    let key = ring::signature::Ed25519KeyPair::generate_pkcs8(&random).unwrap();
    let signer = Signer::from_pkcs8("h", key.as_ref()).unwrap();
    fs::write(at.join("pub"), format!("{}\n", signer.verifying_key())).unwrap();
    let mut ledger = Ledger::open(&at.join("ledger"), signer).unwrap();
    for vcpus in 1..=3 {
        let action = Action::Launch {
            technology: Technology::Sev,
            emulated: false,
            vcpus,
            memory_mib: 64,
            policy_bits: 1,
        };
        let clock = "2026-06-01T00:00:00Z".parse().unwrap();
        let inquiry = Inquiry::new(Actor::Local { uid: 7 }, "vm", action, clock);
        let decision = decide(&policy, &inquiry);
        ledger
            .append(history::entry("olga", &inquiry, &decision, policy.digest()))
            .unwrap();
    }
    ledger.checkpoint().unwrap();
    drop(ledger);
    let log = ["--ledger", "ledger", "--key", "pub"];
    let explain =
        |seq, policies| [&["policy", "explain", seq, "--policy", policies], &log[..]].concat();
    let why = json(at, &explain("2", "policies"), 0);
    assert_eq!(why["agrees"], true);
    assert_eq!(why["decision"]["code"], "too-many-vcpus");
    let ran = casemate(at, &explain("2", "policies"));
    for word in [
        "record 2: launch \"vm\"",
        "user 7",
        "wanted 1 to 2 vCPUs; found 3",
    ] {
        assert!(ran.out.contains(word), "{word}: {}", ran.out);
    }
    refused(at, &explain("9", "policies"), 1, "NO_DECISION");
    fs::write(
        at.join("other.toml"),
        POLICY.replace("max_vcpus = 2", "max_vcpus = 1"),
    )
    .unwrap();
    // Status 2: what would be needed to tell is not there.
    refused(at, &explain("2", "other.toml"), 2, "not among the policies");
    let diff = |new| [&["policy", "diff", new], &log[..]].concat();
    assert_eq!(json(at, &diff("policies/p.toml"), 0)["compared"], 3);
    let changed = json(at, &diff("other.toml"), 1);
    assert_eq!(changed["changed"].as_array().unwrap().len(), 1);
    assert_eq!(changed["changed"][0]["seq"], 1);
    // A ledger that does not verify tells nothing.
    let mut bytes = fs::read(at.join("ledger")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(at.join("ledger"), bytes).unwrap();
    refused(at, &diff("other.toml"), 1, "EVIDENCE");
}
