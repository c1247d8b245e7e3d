//! An owner's way from a description to a signed reference value, from files alone.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{Host, Ran};

fn vector(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../attest/tests/vectors")
        .join(name)
}

/// `casemate attest MORE` in a folder with the fixtures and their kernel and initrd.
fn attest(host: &Host, more: &[&str]) -> Ran {
    let mut args = vec!["attest"];
    args.extend(more);
    host.run(&args)
}

fn folder() -> Host {
    let host = Host::new("measure");
    for name in ["ovmf_AmdSev_suffix.bin", "ovmf_OvmfX64_suffix.bin"] {
        let bytes = std::fs::read(vector("measurement").join(name)).unwrap();
        host.write(name, bytes);
    }
    host.write("empty", b"");
    host.write("k1", [0xaa; 8192]);
    host.write("i1", (0..=255).cycle().take(17 * 256).collect::<Vec<u8>>());
    host
}

const SNP: &[&str] = &[
    "measure",
    "--mode",
    "snp",
    "--ovmf",
    "ovmf_AmdSev_suffix.bin",
    "--vcpus",
    "4",
    "--vcpu-type",
    "EPYC-Milan",
];

#[test]
fn every_public_fixture_has_its_digest() {
    let host = folder();
    let text = std::fs::read(vector("measurement-expected.json")).unwrap();
    let cases: Value = serde_json::from_slice(&text).unwrap();
    for case in cases["cases"].as_array().unwrap() {
        let mode = match case["mode"].as_str().unwrap() {
            "SEV_SNP" => "snp",
            "SEV_ES" => "sev-es",
            _ => "sev",
        };
        let vcpus = case["vcpus"].to_string();
        let ovmf = case["ovmf"].as_str().unwrap();
        let mut args = vec![
            "measure", "--mode", mode, "--ovmf", ovmf, "--vcpus", &vcpus, "--json",
        ];
        if let Some(cpu) = case["cpu"].as_str() {
            args.extend(["--vcpu-type", cpu]);
        }
        args.extend(["--guest-features", case["guest_features"].as_str().unwrap()]);
        for (option, key) in [("--kernel", "kernel"), ("--initrd", "initrd")] {
            let file = case[key].as_str().unwrap();
            if file != "none" {
                args.extend([option, file]);
            }
        }
        if let Some(text) = case["cmdline"].as_str() {
            args.extend(["--append", text]);
        }
        let measured = attest(&host, &args).expect(0).value();
        assert_eq!(measured["digest"], case["digest"], "{}", case["name"]);
        assert_eq!(measured["mode"], mode);
        let sha256 = cases["inputs"][ovmf].as_str().unwrap();
        let found = measured["inputs"]["firmware"]["sha256"].as_str().unwrap();
        assert!(sha256.contains(found), "{sha256}");
    }
}

#[test]
fn usage_errors_are_64_and_name_the_option() {
    let host = folder();
    for (drop, add, word) in [
        ("--vcpus", &[][..], "--vcpus"),
        ("--vcpu-type", &[], "--vcpu-type"),
        ("--ovmf", &[], "--ovmf"),
        ("--mode", &[], "--mode"),
        ("", &["--initrd", "i1"], "--kernel"),
        ("", &["--append", "ro"], "--kernel"),
        ("", &["--vcpu-sig", "0x800f12"], "--vcpu-sig"),
        ("--vcpu-type", &["--vcpu-family", "25"], "--vcpu-model"),
        ("--vcpu-type", &["--vcpu-type", "Opteron"], "EPYC-Milan-v2"),
        ("--vcpus", &["--vcpus", "0"], "1 to 4096"),
        ("", &["--guest-features", "0xg"], "hex digits"),
        ("", &["--vmsa-profile", "ec2"], "qemu and casemate"),
        ("--mode", &["--mode", "tdx"], "sev-es"),
    ] {
        let mut args = SNP.to_vec();
        if let Some(at) = args.iter().position(|arg| *arg == drop) {
            args.drain(at..at + 2);
        }
        args.extend(add);
        let ran = attest(&host, &args).expect(64);
        let text = ran.err.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            text.contains(word) && ran.out.is_empty(),
            "{args:?}: {ran:?}"
        );
    }
}

#[test]
fn what_cannot_be_read_or_launched_is_refused() {
    let host = folder();
    host.write("short", [0; 4095]);
    host.write("plain", [0; 4096]);
    let with = |option: &str, value: &str, more: &[&str]| {
        let mut args = SNP.to_vec();
        let at = args.iter().position(|arg| *arg == option).unwrap();
        args[at + 1] = value;
        args.extend(more);
        attest(&host, &args)
    };
    with("--ovmf", "nowhere", &[]).refused(1, &["FILE", "nowhere"]);
    with("--ovmf", ".", &[]).refused(1, &["FILE"]);
    with("--ovmf", "short", &[]).refused(1, &["FIRMWARE", "4095"]);
    with("--ovmf", "/dev/zero", &[]).refused(1, &["FILE", "longer than"]);
    with("--ovmf", "plain", &[]).refused(1, &["UNLAUNCHABLE", "reset block"]);
    let x64 = "ovmf_OvmfX64_suffix.bin";
    with("--ovmf", x64, &["--kernel", "k1"]).refused(1, &["UNLAUNCHABLE", "AmdSev"]);
    with("--vcpus", "4", &["--kernel", "nowhere"]).refused(1, &["FILE", "nowhere"]);
    let ours = ["--vmsa-profile", "casemate", "--guest-features", "0x3"];
    with("--vcpus", "4", &ours).refused(1, &["UNLAUNCHABLE", "0x3"]);
}

#[test]
fn our_profile_is_beside_qemu_s_and_says_what_it_is() {
    let host = folder();
    let mut args = SNP.to_vec();
    args.push("--json");
    let qemu = attest(&host, &args).expect(0).value();
    args.extend(["--vmsa-profile", "casemate"]);
    let ours = attest(&host, &args).expect(0).value();
    assert_ne!(qemu["digest"], ours["digest"]);
    assert_eq!(ours["inputs"]["vmsa_profile"], "casemate");
    assert!(ours["notes"][0].as_str().unwrap().contains("yet"));
    let table = attest(&host, SNP).expect(0).out;
    assert!(table.starts_with(&format!(
        "launch digest {}\n",
        qemu["digest"].as_str().unwrap()
    )));
}

#[test]
fn an_id_block_is_made_checked_and_refused_when_changed() {
    let host = folder();
    let digest = {
        let mut args = SNP.to_vec();
        args.push("--json");
        attest(&host, &args).expect(0).value()["digest"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let key = |name: &str| {
        let made = attest(&host, &["id-block", "key", "--out", name, "--json"]);
        let made = made.expect(0).value();
        let shown = attest(&host, &["id-block", "digest", "--key", name, "--json"]);
        assert_eq!(shown.expect(0).value(), made);
        made["key_digest"].clone()
    };
    let (id, author) = (key("id.pem"), key("author.pem"));
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(host.path("id.pem"))
            .unwrap()
            .permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    attest(&host, &["id-block", "key", "--out", "id.pem"]).refused(1, &["OUTPUT", "id.pem"]);
    let make = [
        "id-block",
        "make",
        "--digest",
        &digest,
        "--id-key",
        "id.pem",
        "--author-key",
        "author.pem",
        "--guest-svn",
        "7",
        "--policy",
        "0x30000",
        "--out",
        "made",
        "--json",
    ];
    let made = attest(&host, &make).expect(0).value();
    assert_eq!(
        (&made["id_key_digest"], &made["author_key_digest"]),
        (&id, &author)
    );
    let check = [
        "id-block",
        "check",
        "--id-block",
        "made/id-block.bin",
        "--id-auth",
        "made/id-auth.bin",
        "--json",
    ];
    assert_eq!(attest(&host, &check).expect(0).value(), made);
    let mut block = std::fs::read(host.path("made/id-block.bin")).unwrap();
    block[0x54] ^= 1;
    host.write("made/id-block.bin", &block);
    attest(&host, &check).refused(1, &["ID_BLOCK", "did not sign"]);
    let wrong = [
        "id-block", "make", "--digest", "00", "--id-key", "id.pem", "--out", "made",
    ];
    attest(&host, &wrong).expect(64);
    let wrong = [
        "id-block", "make", "--digest", &digest, "--id-key", "k1", "--out", "made",
    ];
    attest(&host, &wrong).refused(1, &["KEY", "k1", "PKCS#8"]);
}

#[test]
fn reference_values_are_made_signed_by_two_and_checked() {
    let host = folder();
    let key = |name: &str| {
        let made = attest(&host, &["reference", "key", "--out", name, "--json"]).expect(0);
        made.value()["key"].as_str().unwrap().to_owned()
    };
    let (a, b) = (key("a.pem"), key("b.pem"));
    let make = |name: &str, more: &[&str]| {
        let mut args = vec!["reference", "make", "--name", name];
        args.extend(["--mode", "snp", "--ovmf", "ovmf_AmdSev_suffix.bin"]);
        args.extend(["--vcpus", "1,2-4", "--vcpu-type", "EPYC-Milan,EPYC-Genoa"]);
        args.extend(["--not-before", "2026-01-01T00:00:00Z"]);
        args.extend(["--expires", "2027-01-01T00:00:00Z", "--out", "values.toml"]);
        args.extend(more);
        attest(&host, &args)
    };
    make("web", &[]).expect(0);
    let two = make("db", &["--kernel", "k1", "--with", "values.toml", "--json"]);
    let guests = two.expect(0).value()["guest"].clone();
    assert_eq!(guests.as_array().unwrap().len(), 2);
    assert_eq!(guests[0]["launch"].as_array().unwrap().len(), 8);
    // The digest of one size is the one that `measure` gives.
    let measured = attest(&host, &[SNP, &["--json"]].concat())
        .expect(0)
        .value();
    let digest = measured["digest"].as_str().unwrap();
    assert_eq!(guests[0]["launch"][3]["digest"], digest);
    let sign = |key: &str| {
        let args = [
            "reference",
            "sign",
            "--document",
            "values.toml",
            "--key",
            key,
        ];
        attest(
            &host,
            &[&args[..], &["--signatures", "values.sig"]].concat(),
        )
        .expect(0);
    };
    let check = |more: &[&str]| {
        let mut args = vec!["reference", "check", "--document", "values.toml"];
        args.extend([
            "--signatures",
            "values.sig",
            "--trust",
            &a,
            "--trust",
            &b,
            "--json",
        ]);
        if !more.contains(&"--at") {
            args.extend(["--at", "2026-06-01T00:00:00Z"]);
        }
        args.extend(more);
        attest(&host, &args)
    };
    sign("a.pem");
    check(&[]).refused(1, &["REFERENCE_TOO_FEW_SIGNERS"]);
    check(&["--threshold", "1"]).expect(0);
    check(&["--threshold", "3"]).refused(1, &["REFERENCE_THRESHOLD"]);
    sign("b.pem");
    let checked = check(&["--digest", digest]).expect(0).value();
    assert_eq!(checked["guests"], serde_json::json!(["web"]));
    assert_eq!(checked["signers"].as_array().unwrap().len(), 2);
    check(&["--digest", &"0".repeat(96)]).refused(1, &["REFERENCE_NO_MATCH"]);
    check(&["--at", "2027-01-01T00:00:00Z"]).refused(1, &["REFERENCE_EXPIRED"]);
    check(&["--at", "2025-12-31T23:59:59Z"]).refused(1, &["REFERENCE_NOT_YET_VALID"]);
    let text = std::fs::read_to_string(host.path("values.toml")).unwrap();
    host.write("values.toml", text.replace("vcpus = 4", "vcpus = 5"));
    check(&[]).refused(1, &["REFERENCE_BAD_SIGNATURE"]);
    // Signed anew, the earlier signatures go: they are of another document.
    sign("a.pem");
    check(&["--threshold", "1"]).expect(0);
    host.write("values.toml", "version = 1\n");
    let args = [
        "reference",
        "sign",
        "--document",
        "values.toml",
        "--key",
        "a.pem",
    ];
    attest(
        &host,
        &[&args[..], &["--signatures", "values.sig"]].concat(),
    )
    .refused(1, &["REFERENCE_MALFORMED"]);
    make("db", &["--vcpus", "2"]).expect(64);
}
