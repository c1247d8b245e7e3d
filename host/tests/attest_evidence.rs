//! `casemate attest report`, `platform` and `get` on real reports, real platforms and emulated ones.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use casemate_attest::legacy::{GuestPolicy, LegacyChain, OwnerSession, SevReport, TrustAnchors};
use casemate_attest::measure::LaunchDigest;
use casemate_attest::processor::{Identity, ProcessorConfig, SecureProcessor};
use serde_json::Value;
use support::{Ran, casemate, finish};
use tempfile::TempDir;

fn run(args: &[&str]) -> Ran {
    let mut command = casemate();
    command.args(args);
    finish(command)
}

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../attest/tests/vectors")
}

fn vector(name: &str) -> String {
    vectors().join(name).to_str().unwrap().to_owned()
}

fn json(ran: &Ran) -> Value {
    serde_json::from_str(&ran.out).unwrap()
}

/// A check's result and code.
fn check<'a>(verdict: &'a Value, name: &str) -> (&'a str, Option<&'a str>) {
    let mut checks = verdict["checks"].as_array().unwrap().iter();
    let check = checks.find(|check| check["name"] == name).unwrap();
    (check["result"].as_str().unwrap(), check["code"].as_str())
}

#[test]
fn every_vector_shows_its_fields_and_that_nothing_is_verified() {
    let expected = fs::read(vectors().join("expected.json")).unwrap();
    let expected: Vec<Value> = serde_json::from_slice(&expected).unwrap();
    let mut seen = 0;
    for case in expected.iter().filter(|case| case["report"].is_string()) {
        let file = vector(case["report"].as_str().unwrap());
        let ran = run(&["--json", "attest", "report", &file]);
        assert_eq!(ran.code, Some(0), "{file}: {}", ran.err);
        let shown = json(&ran);
        assert_eq!(shown["verified"], false);
        let (fields, wanted) = (&shown["report"], &case["fields"]);
        for name in [
            "guest_svn",
            "vmpl",
            "report_data",
            "measurement",
            "host_data",
            "id_key_digest",
            "author_key_digest",
            "report_id",
            "report_id_ma",
            "family_id",
            "image_id",
            "chip_id",
        ] {
            assert_eq!(fields[name], wanted[name], "{file}: {name}");
        }
        assert_eq!(fields["guest_policy"], wanted["policy"]);
        let kind = case["leaf_kind"].as_str().unwrap().to_lowercase();
        assert_eq!(fields["signing_key"], kind);
        assert_eq!(fields["version"], case["version"]);
        let ran = run(&["attest", "report", &file]);
        assert!(
            ran.out.starts_with("claims, nothing verified"),
            "{}",
            ran.out
        );
        assert!(ran.out.contains(wanted["measurement"].as_str().unwrap()));
        seen += 1;
    }
    assert_eq!(seen, 6);
}

#[test]
fn each_encoding_shows_the_same_report_and_its_source() {
    let folder = tempfile::tempdir().unwrap();
    let report = fs::read(vector("reports/genoa-v3/report.bin")).unwrap();
    let mut message = vec![0; 32];
    message[4..8].copy_from_slice(&1184u32.to_le_bytes());
    message.extend(&report);
    let hcl = fs::read(vector("reports/genoa-v3/hcl.bin")).unwrap();
    let raw = json(&run(&[
        "--json",
        "attest",
        "report",
        &vector("reports/genoa-v3/report.bin"),
    ]));
    for (source, bytes) in [
        ("hex of a raw report", hex::encode(&report).into_bytes()),
        ("a MSG_REPORT_RSP", message),
        ("an Azure HCL blob", hcl),
    ] {
        let file = folder.path().join("evidence");
        fs::write(&file, bytes).unwrap();
        let ran = run(&["--json", "attest", "report", file.to_str().unwrap()]);
        let shown = json(&ran);
        assert_eq!(shown["source"], source);
        assert_eq!(shown["report"], raw["report"]);
        if source.contains("Azure") {
            assert_eq!(shown["azure"]["check"]["result"], "accepted");
            assert_eq!(shown["azure"]["claims"]["keys"][0]["kid"], "HCLAkPub");
        } else {
            assert_eq!(shown["azure"], Value::Null);
        }
    }
}

#[test]
fn what_is_no_report_is_refused_with_its_code() {
    let folder = tempfile::tempdir().unwrap();
    let report = fs::read(vector("reports/genoa-v5/report.bin")).unwrap();
    let mut unknown = report.clone();
    unknown[0] = 6;
    for (bytes, code) in [
        (vec![], "EVIDENCE_EMPTY"),
        (report[1..].to_vec(), "EVIDENCE_UNKNOWN_FORMAT"),
        (vec![0; 2 << 20], "EVIDENCE_TOO_LONG"),
        (b"hello!".to_vec(), "EVIDENCE_TEXT_INVALID"),
        (b"HCLA\x02\0\0\0".to_vec(), "EVIDENCE_AZURE_INVALID"),
        (unknown, "REPORT_INVALID"),
    ] {
        let file = folder.path().join("evidence");
        fs::write(&file, bytes).unwrap();
        run(&["attest", "report", file.to_str().unwrap()]).refused(1, &[code]);
    }
    run(&["attest", "report", "/nowhere/report"]).refused(64, &["USAGE", "/nowhere/report"]);
    run(&["attest", "report"]).refused(64, &[]);
}

#[test]
fn every_legacy_vector_gets_its_verdict() {
    for (generation, code, overall) in [
        ("naples", 0, "accepted"),
        ("rome", 0, "accepted"),
        ("milan", 2, "cannot-verify"),
        ("genoa", 2, "cannot-verify"),
        ("turin", 2, "cannot-verify"),
    ] {
        let dir = vector(&format!("legacy/{generation}"));
        let ran = run(&["--json", "attest", "platform", &dir]);
        assert_eq!(ran.code, Some(code), "{generation}: {}", ran.err);
        let verdict = json(&ran);
        assert_eq!(verdict["overall"], overall);
        assert_eq!(verdict["emulated"], false);
        for name in ["platform_root", "ark_signed_by_ark", "ask_signed_by_ark"] {
            assert_eq!(check(&verdict, name).0, "accepted", "{generation}: {name}");
        }
        let table = run(&["attest", "platform", &dir]);
        assert_eq!(table.code, Some(code));
        assert!(table.out.contains("cek_signed_by_ask"), "{}", table.out);
    }
}

#[test]
fn a_root_without_its_signature_and_a_swapped_owner_are_rejected() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| {
        fs::copy(vectors().join("legacy").join(from), folder.path().join(to)).unwrap();
    };
    for name in ["ask", "cek", "oca", "pek", "pdh"] {
        copy(&format!("naples/{name}.cert"), &format!("{name}.cert"));
    }
    copy("naples/ark.cert.bad", "ark.cert");
    let dir = folder.path().to_str().unwrap();
    let ran = run(&["--json", "attest", "platform", dir]);
    assert_eq!(ran.code, Some(1));
    let rejected = ("rejected", Some("CERTIFICATE_MALFORMED"));
    assert_eq!(check(&json(&ran), "platform_root"), rejected);

    copy("naples/ark.cert", "ark.cert");
    assert_eq!(run(&["attest", "platform", dir]).code, Some(0));
    copy("rome/oca.cert", "oca.cert");
    let ran = run(&["--json", "attest", "platform", dir]);
    assert_eq!(ran.code, Some(1));
    let verdict = json(&ran);
    let rejected = ("rejected", Some("CERTIFICATE_SIGNATURE_INVALID"));
    assert_eq!(check(&verdict, "pek_signed_by_oca"), rejected);
    assert_eq!(check(&verdict, "pek_signed_by_cek").0, "accepted");
    assert_eq!(check(&verdict, "oca_signed_by_oca").0, "accepted");
}

#[test]
fn platform_arguments_that_cannot_be_used_are_usage_errors() {
    let dir = vector("legacy/rome");
    run(&["attest", "platform", "/nowhere"]).refused(64, &["USAGE", "/nowhere"]);
    run(&["attest", "platform", &dir, "--allow-emulated", "xyz"]).refused(64, &["xyz"]);
    run(&["attest", "platform", &dir, "--report", "r"]).refused(64, &["--nonce"]);
    let file = vector("legacy/rome/pek.cert");
    run(&["attest", "platform", &file]).refused(64, &["no folder"]);
}

/// An emulated platform as `casemate platform export` writes it, and a report of a guest on it.
struct Emulated {
    folder: TempDir,
    root: String,
    nonce: String,
    digest: String,
}

impl Emulated {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let identity = Identity::generate().unwrap();
        let root = identity.root_fingerprint();
        let mut processor = SecureProcessor::new(identity, ProcessorConfig::default());
        processor.init().unwrap();
        let chain = processor.pdh_cert_export().unwrap().clone();
        let report = report(&mut processor, &chain, root);
        for (name, bytes) in [
            ("pdh.cert", chain.pdh.as_bytes()),
            ("platform.cert", &chain.platform_certs()),
            ("amd.cert", &chain.amd_certs()),
            ("report.bin", report.as_bytes()),
        ] {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        Self {
            folder,
            root: format!("sha256:{}", hex::encode(root)),
            nonce: hex::encode(report.mnonce()),
            digest: report.digest().to_string(),
        }
    }

    fn judge(&self, more: &[&str]) -> Ran {
        let dir = self.folder.path().to_str().unwrap();
        run(&[&["--json", "attest", "platform", dir], more].concat())
    }
}

fn report(processor: &mut SecureProcessor, chain: &LegacyChain, root: [u8; 32]) -> SevReport {
    let trust = TrustAnchors::amd().with_emulated_root(root).unwrap();
    let policy = GuestPolicy::from_raw(1).unwrap();
    let (public, _) = OwnerSession::create(&chain.verify(&trust).unwrap(), policy).unwrap();
    let session = Some((&public.dh_cert, &public.session));
    let handle = processor.launch_start(policy, session).unwrap();
    processor.activate(handle, 1).unwrap();
    let guest = processor.guest(handle).unwrap();
    guest.launch_update_data(&[7; 4096]).unwrap();
    guest.launch_measure().unwrap();
    guest.launch_finish().unwrap();
    processor.attestation_report(handle, &[0xc5; 16]).unwrap()
}

#[test]
fn an_emulated_platform_and_its_report_count_only_where_it_is_named() {
    let emulated = Emulated::new();
    assert_eq!(emulated.digest, LaunchDigest::of(&[7; 4096]).to_string());
    let ran = emulated.judge(&[]);
    assert_eq!(ran.code, Some(1));
    let verdict = json(&ran);
    assert_eq!(verdict["emulated"], true);
    let untrusted = ("rejected", Some("PLATFORM_ROOT_UNTRUSTED"));
    assert_eq!(check(&verdict, "platform_root"), untrusted);

    let allow = ["--allow-emulated", &emulated.root];
    let ran = emulated.judge(&allow);
    assert_eq!(ran.code, Some(0), "{}", ran.out);
    assert_eq!(json(&ran)["emulated"], true);

    let file = emulated.folder.path().join("report.bin");
    let report = ["--report", file.to_str().unwrap()];
    let expect = ["--nonce", &emulated.nonce, "--digest", &emulated.digest];
    let ran = emulated.judge(&[&allow[..], &report, &expect].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.out);
    assert_eq!(check(&json(&ran), "report_signature").0, "accepted");

    let stale = ["--nonce", &"00".repeat(16), "--digest", &emulated.digest];
    let ran = emulated.judge(&[&allow[..], &report, &stale].concat());
    assert_eq!(ran.code, Some(1));
    let mismatch = ("rejected", Some("NONCE_MISMATCH"));
    assert_eq!(check(&json(&ran), "nonce"), mismatch);

    let other = ["--nonce", &emulated.nonce, "--digest", &"00".repeat(32)];
    let ran = emulated.judge(&[&allow[..], &report, &other].concat());
    let mismatch = ("rejected", Some("LAUNCH_DIGEST_MISMATCH"));
    assert_eq!(check(&json(&ran), "launch_digest"), mismatch);

    // Without the root's name not even a good report helps.
    let ran = emulated.judge(&[&report[..], &expect].concat());
    assert_eq!(ran.code, Some(1));

    // Another platform's certificates.
    let rome = vector("legacy/rome");
    let mut args = vec!["--json", "attest", "platform", &rome];
    args.extend(report.iter().chain(&expect));
    let ran = run(&args);
    assert_eq!(ran.code, Some(1));
    let wrong = ("rejected", Some("SEV_REPORT_SIGNATURE_INVALID"));
    assert_eq!(check(&json(&ran), "report_signature"), wrong);

    // An SNP report is none.
    let snp = vector("reports/genoa-v5/report.bin");
    let ran = emulated.judge(&[&["--report", &snp], &expect[..]].concat());
    ran.refused(1, &["SEV_REPORT_LENGTH"]);
}

#[test]
fn a_live_report_comes_from_a_configfs_entry() {
    let entry = tempfile::tempdir().unwrap();
    let path = |name: &str| entry.path().join(name);
    let report = vector("reports/genoa-v5/report.bin");
    // The kernel's side of one entry, in the order it is asked; a process of its own, so that
    // nothing in this one holds the FIFOs open.
    let made = Command::new("mkfifo")
        .args(["provider", "generation", "inblob", "outblob", "auxblob"])
        .current_dir(entry.path())
        .status();
    assert!(made.unwrap().success());
    let kernel = format!(
        "echo sev_guest > provider; echo 0 > generation; cat inblob > asked; \
         cat {report} > outblob; : > auxblob; echo 1 > generation"
    );
    let mut kernel = Command::new("sh")
        .args(["-c", &kernel])
        .current_dir(entry.path())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let data = fs::read(&report).unwrap()[0x50..0x90].to_vec();
    let (nonce, out) = (hex::encode(&data), path("report.bin"));
    let ran = run(&[
        "attest",
        "get",
        "--nonce",
        nonce.trim_end_matches("00"),
        "--entry",
        entry.path().to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ]);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(ran.out.contains("nothing is verified"), "{}", ran.out);
    assert!(kernel.wait().unwrap().success());
    assert_eq!(fs::read(out).unwrap(), fs::read(&report).unwrap());
    assert_eq!(fs::read(path("asked")).unwrap(), data);
}

#[test]
fn without_a_secure_processor_there_is_no_report_and_the_error_says_why() {
    let words = ["NO_REPORT", "modprobe sev-guest"];
    run(&["attest", "get", "--nonce", "00"]).refused(1, &words);
    let nowhere = ["attest", "get", "--nonce", "00", "--entry", "/nowhere"];
    run(&nowhere).refused(1, &words);
    let long = "00".repeat(65);
    for nonce in ["", "0", "xx", &long] {
        run(&["attest", "get", "--nonce", nonce]).refused(64, &["nonce"]);
    }
    run(&["attest", "get", "--nonce", "00", "--vmpl", "4"]).refused(64, &["--vmpl"]);
}
