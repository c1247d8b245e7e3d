//! `casemate attest fetch` and `casemate attest certificate`: the real binary against a key service on the loopback
//! device, with AMD's own certificates.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "../../attest/tests/common/kds_server.rs"]
mod kds_server;

use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_attest::processor::snp::{CaKeySize, SnpIdentity};
use casemate_attest::product::Product;
use casemate_attest::tcb::TcbVersion;
use kds_server::{Answer, KdsServer};
use serde_json::Value;
use tempfile::TempDir;

/// What a command left behind.
struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Ran {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap()
    }

    /// The results of all items, in order.
    fn results(&self) -> Vec<String> {
        self.field("result")
    }

    fn field(&self, name: &str) -> Vec<String> {
        let json = self.json();
        let items = json["items"].as_array().unwrap();
        items
            .iter()
            .map(|item| item[name].as_str().unwrap_or_default().to_owned())
            .collect()
    }
}

fn casemate(args: &[&str]) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_casemate"))
        .args(["--json", "attest"])
        .args(args)
        .env_remove("CASEMATE_KDS_CACHE")
        .output()
        .unwrap();
    Ran {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../attest/tests/vectors")
}

fn vector(path: &str) -> Vec<u8> {
    std::fs::read(vectors().join(path)).unwrap()
}

fn named(path: &str) -> String {
    vectors().join(path).to_str().unwrap().to_owned()
}

fn report() -> String {
    named("reports/genoa-v5/report.bin")
}

/// As AMD's service for the chip of `genoa-v5`; it has no revocation list to serve.
fn service() -> KdsServer {
    KdsServer::start(|path, before| match path {
        "/vcek/v1/Genoa/cert_chain" => {
            let chain = ["chains/genoa/ask.pem", "chains/genoa/ark.pem"].map(vector);
            Answer::Body(chain.concat())
        }
        path if path.ends_with("?blSPL=10&teeSPL=00&snpSPL=27&ucodeSPL=27") => match before {
            0 => Answer::Status(429, vec![("Retry-After", "0".to_owned())]),
            _ => Answer::Body(vector("reports/genoa-v5/vcek.der")),
        },
        _ => Answer::Status(404, vec![]),
    })
}

fn scratch() -> (TempDir, impl Fn(&str) -> String) {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().to_owned();
    (folder, move |name: &str| {
        base.join(name).to_str().unwrap().to_owned()
    })
}

#[test]
fn a_bundle_goes_from_a_connected_machine_to_one_that_is_not() {
    let server = service();
    let (_folder, file) = scratch();
    let (here, there, bundle) = (file("here"), file("there"), file("carried.json"));
    let base = server.base();
    let fetched = casemate(&[
        "fetch",
        "--report",
        &report(),
        "--cache",
        &here,
        "--bundle",
        &bundle,
        "--base-url",
        &base,
    ]);
    assert_eq!(fetched.code, 0, "{}{}", fetched.out, fetched.err);
    assert_eq!(fetched.results(), ["fetched", "fetched"]);
    assert_eq!(fetched.json()["emulated"], false);
    assert!(
        fetched.err.contains("[2/2] genoa vcek of chip"),
        "{}",
        fetched.err
    );
    let again = casemate(&[
        "fetch",
        "--report",
        &report(),
        "--cache",
        &here,
        "--base-url",
        &base,
    ]);
    assert_eq!(again.results(), ["cached", "cached"]);
    assert_eq!(server.asked().len(), 2);

    let offline = |cache: &str| {
        casemate(&[
            "fetch",
            "--report",
            &report(),
            "--cache",
            cache,
            "--offline",
        ])
    };
    assert_eq!(offline(&there).code, 2);
    assert_eq!(offline(&there).field("code"), ["KDS_NOT_CACHED"; 2]);
    let import = casemate(&["fetch", "--import", &bundle, "--cache", &there]);
    assert_eq!(
        (import.code, import.results()),
        (0, vec!["imported".to_owned(); 2])
    );
    assert_eq!(offline(&there).code, 0);
    // The same bundle from the other machine's cache: nothing in it is by chance.
    let second = file("second.json");
    casemate(&[
        "fetch",
        "--report",
        &report(),
        "--cache",
        &there,
        "--bundle",
        &second,
        "--offline",
    ]);
    assert_eq!(
        std::fs::read(&bundle).unwrap(),
        std::fs::read(&second).unwrap()
    );
    // What was fetched serves the other command.
    let leaf = named("reports/genoa-v5/vcek.der");
    assert_eq!(casemate(&["certificate", &leaf, "--chain", &there]).code, 0);
}

#[test]
fn the_leaf_is_named_by_hand_as_well_and_a_busy_service_is_waited_for() {
    let server = service();
    let (_folder, file) = scratch();
    let report = vector("reports/genoa-v5/report.bin");
    let chip = hex::encode(&report[0x1a0..0x1e0]);
    // Cached beforehand, so that the busy answer is the leaf's.
    let chain = ["chains/genoa/ask.pem", "chains/genoa/ark.pem"]
        .map(vector)
        .concat();
    std::fs::create_dir(file("cache")).unwrap();
    std::fs::write(file("cache/genoa-vcek-chain.pem"), chain).unwrap();
    let ran = casemate(&[
        "fetch",
        "--chip",
        &chip,
        "--product",
        "genoa",
        "--tcb",
        "bl=10,tee=0,snp=27,ucode=27",
        "--cache",
        &file("cache"),
        "--base-url",
        &server.base(),
    ]);
    assert_eq!(
        (ran.code, ran.results()),
        (0, vec!["cached".into(), "fetched".into()])
    );
    assert!(ran.err.contains("KDS_BUSY; waiting"), "{}", ran.err);
    assert!(ran.err.contains("asking again (2)"), "{}", ran.err);
    assert_eq!(server.asked().len(), 2);
}

#[test]
fn what_cannot_be_had_and_what_does_not_verify_differ() {
    let server = service();
    let (_folder, file) = scratch();
    let base = server.base();
    let crl = casemate(&[
        "fetch",
        "--report",
        &report(),
        "--crl",
        "--bundle",
        &file("b.json"),
        "--base-url",
        &base,
    ]);
    assert_eq!(crl.code, 2);
    assert_eq!(crl.results(), ["fetched", "unavailable", "fetched"]);
    assert_eq!(crl.field("code")[1], "KDS_NOT_FOUND");

    let vlek = named("reports/milan-v3-vlek/report.bin");
    let vlek = casemate(&[
        "fetch",
        "--report",
        &vlek,
        "--bundle",
        &file("v.json"),
        "--base-url",
        &base,
    ]);
    assert_eq!(
        (vlek.code, vlek.field("code")[0].as_str()),
        (2, "KDS_VLEK_NOT_SERVED")
    );

    let wrong = KdsServer::start(|_, _| Answer::Body(vector("reports/milan-v2/vcek.der")));
    let swapped = casemate(&[
        "fetch",
        "--report",
        &report(),
        "--cache",
        &file("c"),
        "--base-url",
        &wrong.base(),
    ]);
    assert_eq!(
        (swapped.code, swapped.results()),
        (1, vec!["unverified".to_owned(); 2])
    );
    assert_eq!(
        swapped.field("code"),
        ["KDS_ANSWER_NOT_PEM", "KDS_OTHER_ANSWER"]
    );
    let kept = Path::new(&file("c")).exists();
    assert!(!kept, "something that did not verify was kept");

    let gone = casemate(&[
        "fetch",
        "--report",
        &report(),
        "--cache",
        &file("c"),
        "--base-url",
        "http://127.0.0.1:1",
    ]);
    assert_eq!(
        (gone.code, gone.field("code")[0].as_str()),
        (2, "KDS_UNREACHABLE")
    );
    let leaf = named("reports/genoa-v5/vcek.der");
    let bad = casemate(&[
        "fetch",
        "--report",
        &leaf,
        "--cache",
        &file("c"),
        "--base-url",
        &base,
    ]);
    assert_eq!(
        (bad.code, bad.err.contains("longer than 1184")),
        (64, true),
        "{}",
        bad.err
    );
}

#[test]
fn a_tampered_cache_or_bundle_is_refused() {
    let server = service();
    let (_folder, file) = scratch();
    let (cache, bundle) = (file("cache"), file("bundle.json"));
    let fetch = |more: &[&str]| {
        let report = report();
        let args = [&["fetch", "--report", &report, "--cache", &cache], more].concat();
        casemate(&args)
    };
    let base = server.base();
    assert_eq!(fetch(&["--base-url", &base, "--bundle", &bundle]).code, 0);
    let leaf = std::fs::read_dir(&cache)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let leaf = leaf
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "der"));
    let leaf = leaf.unwrap();
    let mut bytes = std::fs::read(&leaf).unwrap();
    bytes[900] ^= 1;
    std::fs::write(&leaf, bytes).unwrap();
    let tampered = fetch(&["--offline"]);
    assert_eq!(
        (tampered.code, tampered.field("code")[1].as_str()),
        (1, "KDS_CACHE_REFUSED")
    );
    assert_eq!(
        fetch(&["--base-url", &base]).results(),
        ["cached", "fetched"]
    );
    assert_eq!(fetch(&["--offline"]).code, 0);

    let text = std::fs::read_to_string(&bundle).unwrap();
    let other_chip = text.replacen("\"chip_id\": \"", "\"chip_id\": \"ff", 1);
    let path = text.replacen("\"product\": \"genoa\"", "\"product\": \"../../genoa\"", 1);
    let extra = text.replacen("\"kind\"", "\"path\": \"/etc/passwd\", \"kind\"", 1);
    for (bad, code) in [
        (other_chip, "KDS_CHIP_LENGTH"),
        (path, "KDS_BUNDLE_DOCUMENT"),
        (extra, "KDS_BUNDLE_DOCUMENT"),
        (
            text.replace("\"snp\": 27", "\"snp\": 28"),
            "KDS_OTHER_ANSWER",
        ),
    ] {
        std::fs::write(&bundle, bad).unwrap();
        let import = casemate(&["fetch", "--import", &bundle, "--cache", &file("new")]);
        assert_eq!(
            (import.code, import.field("code")),
            (1, vec![code.to_owned()])
        );
        assert!(!Path::new(&file("new")).exists());
    }
    let absent = casemate(&[
        "fetch",
        "--import",
        &file("absent"),
        "--cache",
        &file("new"),
    ]);
    assert_eq!(
        (absent.code, absent.field("code")),
        (2, vec!["KDS_BUNDLE_READ".to_owned()])
    );
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused() {
    let (_folder, file) = scratch();
    let cache = file("cache");
    for args in [
        &["fetch"][..],
        &["fetch", "--report", &report()],
        &["fetch", "--cache", &cache],
        &["fetch", "--cache", &cache, "--chip", "00"],
        &[
            "fetch",
            "--cache",
            &cache,
            "--chip",
            "00",
            "--product",
            "genoa",
            "--tcb",
            "bl=1,tee=0,snp=1,ucode=1",
        ],
        &["fetch", "--cache", &cache, "--product", "venice"],
        &[
            "fetch",
            "--cache",
            &cache,
            "--product",
            "genoa",
            "--base-url",
            "ftp://example",
        ],
        &[
            "fetch",
            "--cache",
            &cache,
            "--product",
            "genoa",
            "--offline",
            "--refresh",
        ],
        &["fetch", "--import", "x"],
        &["fetch", "--import", "x", "--cache", &cache, "--crl"],
        &[
            "fetch",
            "--cache",
            &cache,
            "--report",
            "/nonexistent",
            "--offline",
        ],
        &["certificate"],
        &["certificate", "/nonexistent"],
        &["certificate", "x", "--at", "yesterday"],
    ] {
        let ran = casemate(args);
        assert_eq!(ran.code, 64, "{args:?}: {}", ran.err);
    }
}

const TURIN: &str = "certs-only/vcek-turin.der";

#[test]
fn a_certificate_is_verified_and_shown_without_a_report() {
    let verdict = |args: &[&str]| {
        let ran = casemate(&[&["certificate"], args].concat());
        let json = ran.json();
        let row = &json["certificates"][0];
        let code = row["code"].as_str().unwrap_or("").to_owned();
        (
            ran.code,
            row["result"].as_str().unwrap().to_owned(),
            code,
            json,
        )
    };
    let told = |args: &[&str]| {
        let (code, result, reason, _) = verdict(args);
        (code, result, reason)
    };
    let expect =
        |code: i32, result: &str, reason: &str| (code, result.to_owned(), reason.to_owned());
    let turin = named(TURIN);
    let (code, result, _, json) = verdict(&[&turin]);
    assert_eq!((code, result.as_str()), (0, "valid"));
    let claims = &json["certificates"][0]["claims"];
    assert_eq!(claims["product"], "turin");
    assert_eq!(claims["chip_id"].as_str().unwrap().len(), 16);
    let proven = &json["certificates"][0]["proven"];
    assert_eq!(
        (&proven["emulated"], &proven["revocation"]),
        (&false.into(), &"CRL_ABSENT".into())
    );
    assert_eq!(
        proven["root_sha256"],
        "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a"
    );
    for product in ["milan", "genoa"] {
        let chain = named(&format!("chains/{product}"));
        assert_eq!(
            told(&[&turin, "--chain", &chain]),
            expect(1, "invalid", "PRODUCT_MISMATCH")
        );
    }
    assert_eq!(
        told(&[&turin, "--chain", &named("chains/turin")]),
        expect(0, "valid", "")
    );
    let early = told(&[&turin, "--at", "2020-01-01T00:00:00Z"]);
    assert_eq!(early.0, 1);
    let none = told(&[&turin, "--chain", &named("legacy")]);
    assert_eq!(none, expect(2, "cannot-verify", "CHAIN_ABSENT"));
    for forged in ["vcek-invalid-legacy.der", "vcek-invalid-new.der"] {
        let file = named(&format!("certs-only/{forged}"));
        let (code, result, reason) = told(&[&file]);
        assert_eq!((code, result.as_str()), (1, "invalid"), "{reason}");
    }
    let vlek = named("reports/milan-v3-vlek/vlek.der");
    assert_eq!(
        told(&[&vlek, "--at", "2026-06-01T00:00:00Z"]),
        expect(1, "invalid", "LEAF_EXPIRED")
    );
    assert_eq!(
        told(&[&vlek, "--at", "2025-06-01T00:00:00Z"]),
        expect(0, "valid", "")
    );
    // The worst of several decides.
    assert_eq!(
        casemate(&["certificate", &turin, &vlek, "--at", "2026-06-01T00:00:00Z"]).code,
        1
    );
}

#[test]
fn an_emulated_root_counts_where_it_is_named_and_is_always_marked() {
    let identity = SnpIdentity::generate_with(CaKeySize::Rsa2048).unwrap();
    let tcb = TcbVersion {
        fmc: None,
        boot_loader: 1,
        tee: 0,
        snp: 2,
        microcode: 3,
    };
    let leaf = identity.vcek(Product::Milan, tcb).unwrap();
    let (_folder, file) = scratch();
    let certificates = identity.certificates();
    std::fs::create_dir(file("chain")).unwrap();
    for (name, der) in [
        ("leaf.der", leaf.certificate()),
        ("chain/ark.pem", &certificates.ark),
        ("chain/ask.pem", &certificates.ask),
        ("list.crl", &certificates.crl),
    ] {
        std::fs::write(file(name), der).unwrap();
    }
    let root = format!("sha256:{}", hex::encode(identity.root_fingerprint()));
    let (leaf, ark, chain, crl) = (
        file("leaf.der"),
        file("chain/ark.pem"),
        file("chain"),
        file("list.crl"),
    );
    let plain = casemate(&["certificate", &leaf, "--chain", &chain]);
    assert_eq!(plain.code, 1);
    assert_eq!(plain.json()["certificates"][0]["code"], "ROOT_NOT_PINNED");
    let named = ["--emulated-root", &ark, "--allow-emulated", &root];
    let args = [
        &["certificate", &leaf, "--chain", &chain, "--crl", &crl],
        &named[..],
    ]
    .concat();
    let trusted = casemate(&args);
    assert_eq!(trusted.code, 0, "{}", trusted.out);
    let proven = trusted.json()["certificates"][0]["proven"].clone();
    assert_eq!(
        (&proven["emulated"], &proven["revocation"]),
        (&true.into(), &"CRL_GOOD".into())
    );
    // AMD's own leaf with the emulated root's list: nothing is said against it, and nothing for it.
    let amd = casemate(&["certificate", &self::named(TURIN), "--crl", &crl]);
    assert_eq!(amd.code, 2);
    assert_eq!(amd.json()["certificates"][0]["code"], "CRL_WRONG_ISSUER");
}
