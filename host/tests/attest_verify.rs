//! `casemate attest verify` as an owner runs it: real files, the real binary, its exit status and output.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use casemate_attest::processor::snp::forge::report_fields;
use casemate_attest::processor::snp::{CaKeySize, SnpIdentity};
use casemate_attest::product::Product;
use casemate_attest::reference::{ReferenceDocument, Signatures, SigningKey};
use casemate_attest::report::{ReportVersion, SigningKey as KeyKind};
use casemate_attest::tcb::TcbVersion;
use casemate_attest::token::{Ear, EarKey, Tier};
use support::{Ran, casemate, finish};
use tempfile::TempDir;

/// A time at which the hardware vectors' leaves are in force, one apart.
const THEN: &str = "2026-11-22T00:00:00Z";

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}

fn vectors(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../attest/tests/vectors");
    root.join(path).display().to_string()
}

/// Report and leaf of a vector, and the options behind them.
fn verify(id: &str, more: &[&str]) -> Ran {
    let leaf = ["vcek.der", "vcek.pem", "vlek.der"]
        .map(|leaf| vectors(&format!("reports/{id}/{leaf}")))
        .into_iter()
        .find(|path| PathBuf::from(path).exists())
        .unwrap();
    let report = vectors(&format!("reports/{id}/report.bin"));
    run(&[&["--report", &report, "--leaf", &leaf], more].concat())
}

fn run(args: &[&str]) -> Ran {
    let mut command = casemate();
    command.args(["attest", "verify"]).args(args);
    finish(command)
}

fn codes(ran: &Ran) -> Vec<String> {
    let json = ran.value();
    let checks = json["checks"].as_array().unwrap();
    let codes = checks.iter().filter_map(|check| check["code"].as_str());
    let mut codes: Vec<_> = codes.map(str::to_owned).collect();
    codes.sort();
    codes
}

#[test]
fn the_hardware_reports_have_their_verdicts_and_exit_statuses() {
    let folder = Folder::new();
    let provisional = folder.write("provisional.toml", "provisional_firmware = \"allow\"\n");
    let nothing: [&str; 0] = [];
    for (id, policy, status, expected) in [
        ("milan-v2-debug", None, 1, &["DEBUG_ALLOWED"][..]),
        ("milan-v2", None, 1, &["PROVISIONAL_FIRMWARE"]),
        ("milan-v2", Some(&provisional), 0, &nothing),
        ("milan-v2-b", None, 0, &nothing),
        (
            "milan-v3-vlek",
            None,
            1,
            &["LEAF_EXPIRED", "PROVISIONAL_FIRMWARE", "VMPL_NOT_ALLOWED"],
        ),
        ("genoa-v3", None, 0, &nothing),
        ("genoa-v5", None, 0, &nothing),
    ] {
        let product = id.split('-').next().unwrap();
        let chain = vectors(&format!("chains/{product}"));
        for chain in [None, Some(&chain)] {
            let mut args = vec!["--at", THEN];
            args.extend(policy.iter().flat_map(|path| ["--policy", path.as_str()]));
            args.extend(chain.iter().flat_map(|path| ["--chain", path.as_str()]));
            let table = verify(id, &args).expect(status);
            let last = table.out.lines().last().unwrap();
            assert_eq!(last.starts_with("accepted"), status == 0, "{last}");
            assert!(
                last.contains("not checked: ") && last.contains("revocation"),
                "{last}"
            );
            assert!(!table.out.contains("emulated, NOT AMD"), "{}", table.out);
            args.push("--json");
            let ran = verify(id, &args).expect(status);
            assert_eq!(codes(&ran), expected, "{id}");
            for code in expected {
                assert!(last.contains(code) && table.out.contains(&format!("[{code}]")));
            }
        }
    }
    // Without --at the clock is the system's.
    verify("milan-v2-b", &[]).expect(0);
}

#[test]
fn json_has_the_verdict_each_check_and_the_report() {
    let nonce = hex::encode(b"hello-attestation");
    let ran = verify("genoa-v5", &["--at", THEN, "--json", "--nonce", &nonce]).expect(0);
    let json = ran.value();
    assert_eq!(json["overall"], "accepted");
    assert_eq!(json["emulated"], false);
    for check in json["checks"].as_array().unwrap() {
        for key in ["name", "result", "expected", "found"] {
            assert!(check[key].is_string(), "{check}");
        }
        assert!(check["code"].is_null(), "{check}");
    }
    let check = |name: &str| {
        let checks = json["checks"].as_array().unwrap();
        checks
            .iter()
            .find(|check| check["name"] == name)
            .unwrap()
            .clone()
    };
    assert_eq!(check("report_data")["result"], "accepted");
    assert_eq!(check("revocation")["result"], "not-checked");
    assert_eq!(
        check("revocation")["found"],
        "no CRL given: revocation was not checked"
    );
    let expected = fs::read_to_string(vectors("expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&expected).unwrap();
    let expected = expected
        .as_array()
        .unwrap()
        .iter()
        .find(|case| case["id"] == "genoa-v5");
    let fields = &expected.unwrap()["fields"];
    let report = &json["report"];
    assert_eq!(report["version"], 5);
    assert_eq!(report["product"], "genoa");
    assert_eq!(report["signing_key"], "vcek");
    for key in [
        "measurement",
        "report_data",
        "chip_id",
        "report_id",
        "host_data",
        "vmpl",
    ] {
        assert_eq!(report[key], fields[key], "{key}");
    }
    assert_eq!(
        report["reported_tcb"]["microcode"],
        fields["reported_tcb"]["microcode"]
    );
    assert_eq!(report["guest_policy"], fields["policy"]);
    assert_eq!(report["current_firmware"], "1.55.49");
    assert!(json["policy"][0].as_str().unwrap().starts_with("sha384:"));
    // A V2 report takes its product from the leaf.
    let old = verify("milan-v2-b", &["--at", THEN, "--json"]).value();
    assert_eq!(old["report"]["product"], "milan");
    assert_eq!(old["report"]["reported_tcb"]["snp"], 8);
}

#[test]
fn a_report_may_come_in_hex_or_base64() {
    use base64::Engine as _;
    let folder = Folder::new();
    let raw = fs::read(vectors("reports/genoa-v5/report.bin")).unwrap();
    let leaf = vectors("reports/genoa-v5/vcek.der");
    let base64 = base64::engine::general_purpose::STANDARD.encode(&raw);
    for (text, status) in [
        (hex::encode(&raw), 0),
        (base64, 0),
        (hex::encode(&raw[1..]), 1),
    ] {
        let path = folder.write("report.txt", text);
        run(&["--report", &path, "--leaf", &leaf, "--at", THEN]).expect(status);
    }
}

#[test]
fn bad_evidence_is_rejected_and_never_a_crash() {
    let folder = Folder::new();
    let good = fs::read(vectors("reports/genoa-v5/report.bin")).unwrap();
    let leaf = vectors("reports/genoa-v5/vcek.der");
    let mut flipped = good.clone();
    flipped[0x90] ^= 1;
    let mut unknown = good.clone();
    unknown[0] = 6;
    for (report, code) in [
        (&good[..1183], "REPORT_LENGTH"),
        (&[good.as_slice(), &[0]].concat(), "REPORT_LENGTH"),
        (&[], "REPORT_LENGTH"),
        (&flipped, "REPORT_SIGNATURE_INVALID"),
        (&unknown, "REPORT_VERSION_UNSUPPORTED"),
    ] {
        let path = folder.write("report.bin", report);
        let args = ["--report", &path, "--leaf", &leaf, "--at", THEN];
        let ran = run(&[&args[..], &["--json"]].concat()).expect(1);
        assert!(codes(&ran).contains(&code.to_owned()), "{code}");
        assert_eq!(
            ran.value()["report"].is_null(),
            code != "REPORT_SIGNATURE_INVALID"
        );
        run(&args).expect(1);
    }
    let truncated = fs::read(&leaf).unwrap();
    let truncated = folder.write("leaf.der", &truncated[..700]);
    let report = vectors("reports/genoa-v5/report.bin");
    let ran = run(&[
        "--report", &report, "--leaf", &truncated, "--at", THEN, "--json",
    ])
    .expect(1);
    assert!(codes(&ran).contains(&"CERTIFICATE_MALFORMED".to_owned()));
    // Another product's chain, and a nonce with a tail behind it.
    let foreign = vectors("chains/milan");
    verify("genoa-v5", &["--at", THEN, "--chain", &foreign]).expect(1);
    let nonce = hex::encode(b"hello");
    let ran = verify("genoa-v5", &["--at", THEN, "--nonce", &nonce, "--json"]).expect(1);
    assert_eq!(codes(&ran), ["REPORT_DATA_MISMATCH"]);
}

#[test]
fn a_required_list_that_is_missing_cannot_be_verified() {
    let folder = Folder::new();
    let policy = folder.write("policy.toml", "[crl]\nmode = \"required\"\n");
    let args = ["--at", THEN, "--policy", &policy];
    let ran = verify("genoa-v5", &args).expect(2);
    assert!(
        ran.out
            .lines()
            .last()
            .unwrap()
            .starts_with("CANNOT VERIFY: CRL_MISSING")
    );
    let crl = folder.write("crl.der", "no list");
    let ran = verify(
        "genoa-v5",
        &[&args[..], &["--crl", &crl, "--json"]].concat(),
    )
    .expect(1);
    assert_eq!(codes(&ran), ["CRL_MALFORMED"]);
}

#[test]
fn what_cannot_be_read_or_understood_is_usage() {
    let folder = Folder::new();
    let typo = folder.write("typo.toml", "measurment = []\n");
    let empty = folder.path("");
    let large = folder.write("large.bin", vec![0; (1 << 20) + 1]);
    let leaf = vectors("reports/genoa-v5/vcek.der");
    for (args, words) in [
        (
            &["--policy", typo.as_str()][..],
            &["unknown field", "line 1"][..],
        ),
        (&["--policy", "/nowhere/policy.toml"], &["cannot be read"]),
        (&["--chain", &empty], &["holds none of"]),
        (&["--chain", "/nowhere"], &["holds none of"]),
        (&["--crl", "/nowhere/crl"], &["cannot be read"]),
        (&["--nonce", "xyz"], &["nonce"]),
        (&["--nonce", ""], &["nonce"]),
        (&["--nonce", &"00".repeat(65)], &["1 to 64 bytes"]),
        (&["--at", "yesterday"], &["--at"]),
        (&["--allow-emulated", "sha256:00"], &["64 hex digits"]),
        (&["--ear-out", "x"], &["--ear-key"]),
        (&["--reference", "x"], &["--policy"]),
        (
            &["--ear-key", &typo, "--ear-out", "/nowhere/x"],
            &["PKCS#8"],
        ),
    ] {
        verify("genoa-v5", args).refused(64, words);
    }
    // Evidence comes from a host: what is too long is its fault, and a verdict.
    let report = vectors("reports/genoa-v5/report.bin");
    for (args, code) in [
        (["--report", &large, "--leaf", &leaf], "REPORT_LENGTH"),
        (["--report", "/dev/zero", "--leaf", &leaf], "REPORT_LENGTH"),
        (
            ["--report", &report, "--leaf", &large],
            "CERTIFICATE_TOO_LARGE",
        ),
    ] {
        let ran = run(&args).expect(1);
        assert!(ran.out.contains(code), "{code}: {}", ran.out);
    }
    run(&["--report", &empty, "--leaf", &leaf]).refused(64, &["cannot be read"]);
    run(&["--leaf", &leaf]).refused(64, &["--report"]);
    let help = run(&["--help"]).expect(0).out;
    for word in [
        "Exit status",
        "--allow-emulated",
        "--nonce",
        "emulated",
        "64 usage",
    ] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

/// An emulated Turin's evidence in a folder.
struct Emulated {
    folder: Folder,
    root: String,
    digest: String,
}

impl Emulated {
    fn new() -> Self {
        let folder = Folder::new();
        let identity = SnpIdentity::generate_with(CaKeySize::Rsa2048).unwrap();
        let tcb = TcbVersion {
            fmc: Some(1),
            boot_loader: 2,
            tee: 3,
            snp: 4,
            microcode: 200,
        };
        let vcek = identity.vcek(Product::Turin, tcb).unwrap();
        let (version, key) = (ReportVersion::V5, KeyKind::Vcek);
        let mut fields = report_fields(&identity, Product::Turin, version, key, tcb);
        fields.report_data = [7; 64];
        folder.write("report.bin", vcek.sign_report(&fields).unwrap());
        folder.write("vcek.der", vcek.certificate());
        let published = identity.certificates();
        folder.write("chain/ark.der", &published.ark);
        folder.write("chain/ask.der", &published.ask);
        folder.write("chain/asvk.der", &published.asvk);
        folder.write("chain/crl.der", &published.crl);
        Self {
            root: format!("sha256:{}", hex::encode(identity.root_fingerprint())),
            digest: hex::encode(fields.measurement),
            folder,
        }
    }

    fn verify(&self, more: &[&str]) -> Ran {
        let [report, leaf, chain] =
            ["report.bin", "vcek.der", "chain"].map(|name| self.folder.path(name));
        let args = ["--report", &report, "--leaf", &leaf, "--chain", &chain];
        run(&[&args[..], more].concat())
    }
}

#[test]
fn emulated_evidence_is_refused_unless_named_and_always_marked() {
    let emulated = Emulated::new();
    let ran = emulated.verify(&["--json"]).expect(1);
    assert!(codes(&ran).contains(&"ROOT_NOT_PINNED".to_owned()));
    let allowed = ["--allow-emulated", &emulated.root];
    let ran = emulated.verify(&allowed).expect(0);
    let last = ran.out.lines().last().unwrap();
    assert!(last.starts_with("accepted (emulated, NOT AMD)"), "{last}");
    // The folder's revocation list was found.
    assert!(!last.contains("revocation"), "{last}");
    let json = emulated
        .verify(&[&allowed[..], &["--json"]].concat())
        .expect(0)
        .value();
    assert_eq!(json["emulated"], true);
    assert_eq!(json["report"]["product"], "turin");
    assert!(
        json["policy"][1]
            .as_str()
            .unwrap()
            .contains("emulated-root")
    );
    // A policy file has the last word.
    let strict = emulated.folder.write("strict.toml", "");
    let with = |policy: &str, more: &[&str]| {
        emulated.verify(&[&["--policy", policy, "--json"], more].concat())
    };
    let ran = with(&strict, &allowed).expect(1);
    assert_eq!(codes(&ran), ["EMULATED_NOT_ALLOWED"]);
    assert_eq!(ran.value()["emulated"], true);
    let lenient = emulated
        .folder
        .write("lenient.toml", "allow_emulated = true");
    with(&lenient, &allowed).expect(0);
    with(&lenient, &[]).expect(1);
}

#[test]
fn an_attestation_result_is_signed_for_each_outcome() {
    let emulated = Emulated::new();
    let der = EarKey::generate().unwrap();
    let key = emulated.folder.write("ear.key", &der);
    let key_of = EarKey::from_pkcs8(&der).unwrap().verifier();
    let out = emulated.folder.path("result.jwt");
    let nonce = "07".repeat(64);
    for (more, status, tier) in [
        (
            &["--allow-emulated", emulated.root.as_str()][..],
            0,
            Tier::Warning,
        ),
        (&[], 1, Tier::Contraindicated),
    ] {
        let ear = ["--ear-key", &key, "--ear-out", &out, "--nonce", &nonce];
        emulated.verify(&[more, &ear[..]].concat()).expect(status);
        let token = fs::read_to_string(&out).unwrap();
        let ear = Ear::verify(&token, &key_of, SystemTime::now()).unwrap();
        assert_eq!(ear.status, tier);
        let verdict = &ear.appraisal().unwrap().verdict;
        assert_eq!(verdict.emulated, status == 0);
        assert_eq!(ear.eat_nonce.as_deref().map(str::len), Some(86));
    }
    let short = ["--ear-key", &key, "--ear-out", &out, "--nonce", "07"];
    emulated.verify(&short).refused(64, &["8 to 64 bytes"]);
}

#[test]
fn reference_values_are_believed_by_their_signatures() {
    let emulated = Emulated::new();
    let folder = &emulated.folder;
    let hash = "00".repeat(32);
    let text = format!(
        "version = 1\nnot_before = \"2026-01-01T00:00:00Z\"\nexpires = \"2099-01-01T00:00:00Z\"\n\
         [[guest]]\nname = \"vault\"\ntechnology = \"snp\"\n\
         [guest.inputs]\nvmsa_profile = \"qemu\"\nguest_features = \"0x1\"\n\
         firmware = {{ sha256 = \"{hash}\", size = 4096 }}\n\
         [[guest.launch]]\ndigest = \"{}\"\nvcpus = 1\nvcpu_signature = \"0xb00f21\"\n",
        emulated.digest
    );
    assert!(ReferenceDocument::parse(text.as_bytes()).is_ok());
    let signer = SigningKey::read(&SigningKey::generate().unwrap()).unwrap();
    let mut signatures = Signatures::default();
    signatures.add(signer.sign(text.as_bytes())).unwrap();
    let values = folder.write("values.toml", &text);
    folder.write("values.toml.sig", signatures.to_toml().unwrap());
    let policy = format!(
        "allow_emulated = true\nemulated_roots = [\"{}\"]\nreference_signers = [\"{}\"]\n",
        emulated.root,
        signer.public()
    );
    let policy = folder.write("policy.toml", policy);
    let args = ["--policy", &policy];
    let ran = emulated
        .verify(&[&args[..], &["--json"]].concat())
        .expect(1);
    assert_eq!(codes(&ran), ["MEASUREMENT_NOT_ALLOWED"]);
    let args = ["--policy", &policy, "--reference", &values];
    let ran = emulated.verify(&args).expect(0);
    assert!(ran.out.contains("`vault`"), "{}", ran.out);
    folder.write("values.toml", text.replace("vault", "other"));
    emulated
        .verify(&args)
        .refused(64, &["is not of this document"]);
}
