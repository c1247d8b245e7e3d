//! An owner takes a platform, and it goes back: the real binary, the agent, the software secure processor, the ledger.
//! Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use casemate_attest::processor::snp::forge::Authority;
use casemate_attest::product::Product;
use casemate_attest::tcb::RawTcb;
use nix::sys::signal::Signal;
use serde_json::Value;
use support::{Host, POLICY, SEV};

/// The ledger's records of one action, oldest first.
fn records(host: &Host, action: &str) -> Vec<Value> {
    let records = host.records();
    let ours = records.into_iter().filter(|r| r["action"] == action);
    ours.collect()
}

fn outcomes(host: &Host, action: &str) -> Vec<String> {
    let records = records(host, action);
    for record in &records {
        assert_eq!(record["actor"], "operator", "{record}");
        assert_eq!(record["object"], "secure-processor", "{record}");
        assert_eq!(record["emulated"], true, "{record}");
    }
    let text = |r: &Value| r["outcome"].as_str().unwrap().to_owned();
    records.iter().map(text).collect()
}

fn show(host: &Host) -> Value {
    host.json(&["platform", "show"])
}

/// From the authority to the platform that has an owner; the export is in `platform`.
fn take(host: &Host) -> String {
    let made = host.json(&["platform", "oca", "new", "--out", "oca"]);
    host.run(&["platform", "csr", "--out", "pek.csr"]).expect(0);
    let root = host.export_platform();
    let sign = [
        "platform",
        "oca",
        "sign",
        "--csr",
        "pek.csr",
        "--oca",
        "oca",
        "--out",
        "pek.cert",
        "--platform",
        "platform",
        "--allow-emulated",
        &root,
    ];
    let said = host.run(&sign).expect(0).out;
    assert!(said.contains("of the platform whose"), "{said}");
    let import = [
        "platform",
        "import",
        "--oca",
        "oca/oca.cert",
        "--pek",
        "pek.cert",
    ];
    host.run(&import).expect(0);
    made["owner_sha256"].as_str().unwrap().to_owned()
}

#[test]
fn an_owner_takes_the_platform_and_a_factory_reset_gives_it_back() {
    let mut host = Host::new("owner");
    host.start();
    let before = show(&host);
    assert_eq!(before["owned"], false);
    assert_eq!(before["owner_sha256"], Value::Null);
    assert_eq!(before["state"], "init");
    assert_eq!(before["emulated"], true);
    let owner = take(&host);
    let mode = fs::metadata(host.path("oca/oca.key"))
        .unwrap()
        .permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);

    let after = show(&host);
    assert_eq!(
        (&after["owned"], &after["owner_sha256"]),
        (&true.into(), &owner.as_str().into())
    );
    assert_eq!(after["root_sha256"], before["root_sha256"]);
    assert_ne!(after["pdh"], before["pdh"]);
    let text = host.run(&["platform", "show"]).expect(0).out;
    assert!(
        text.contains("emulated, NOT AMD") && text.contains(&owner),
        "{text}"
    );
    let root = host.export_platform();
    host.run(&["attest", "platform", "platform", "--allow-emulated", &root])
        .expect(0);
    // A guest owner finds the whole chain in order, the new owner's certificate in it.
    let description = host.describe("vm", "vault", support::SEV_WITH_SECRET);
    host.owner_session(&description, &root, "session");
    assert_eq!(
        fs::read(host.path("platform/platform.cert")).unwrap()[2084..4168],
        fs::read(host.path("oca/oca.cert")).unwrap()
    );
    assert_eq!(outcomes(&host, "platform-csr"), ["done"]);
    assert_eq!(outcomes(&host, "platform-import"), ["allowed", "done"]);
    let done = records(&host, "platform-import").pop().unwrap();
    assert_eq!(done["detail"]["oca_sha256"], owner.as_str(), "{done}");

    // Kept: the agent started again has the same owner and keys.
    host.end(Signal::SIGTERM);
    host.start();
    assert_eq!(show(&host), after);

    host.run(&["platform", "factory-reset"])
        .refused(64, &["--yes"]);
    host.run(&["platform", "factory-reset", "--yes"]).expect(0);
    let reset = show(&host);
    assert_eq!(reset["owned"], false);
    assert_eq!(reset["root_sha256"], before["root_sha256"]);
    assert_ne!(reset["platform"], after["platform"]);
    assert_eq!(
        outcomes(&host, "platform-factory-reset"),
        ["allowed", "done"]
    );
    host.end(Signal::SIGTERM);
    host.start();
    assert_eq!(show(&host), reset);
    let key = host.path("state/ledger.pub");
    let ledger = host.path("state/ledger");
    host.run(&[
        "evidence",
        "verify",
        ledger.to_str().unwrap(),
        "--key",
        key.to_str().unwrap(),
    ])
    .expect(0);
}

#[test]
fn a_second_owner_and_wrong_files_are_refused_and_recorded() {
    let mut host = Host::new("second");
    host.start();
    take(&host);
    let owned = show(&host);
    let import = [
        "platform",
        "import",
        "--oca",
        "oca/oca.cert",
        "--pek",
        "pek.cert",
    ];
    host.run(&import)
        .refused(1, &["ALREADY_OWNED", "factory reset"]);
    assert_eq!(show(&host), owned);
    host.run(&["platform", "pek-gen"]).refused(64, &["--yes"]);
    host.run(&["platform", "pek-gen", "--yes"]).expect(0);
    assert_eq!(show(&host)["owned"], false);
    // The old request is of a PEK that is no more.
    host.run(&import).refused(1, &["INVALID_CERTIFICATE"]);
    assert_eq!(
        outcomes(&host, "platform-import"),
        ["allowed", "done", "allowed", "failed", "allowed", "failed"]
    );
    assert_eq!(
        records(&host, "platform-import")[3]["code"],
        "ALREADY_OWNED"
    );
    let root = host.export_platform();
    let sign = |csr: &str, more: &[&str]| {
        let args = [
            "platform",
            "oca",
            "sign",
            "--csr",
            csr,
            "--oca",
            "oca",
            "--out",
            "other.cert",
        ];
        host.run(&[&args, more].concat())
    };
    let checked = ["--platform", "platform", "--allow-emulated", root.as_str()];
    sign("pek.csr", &checked).refused(1, &["REQUEST", "another PEK"]);
    sign("pek.csr", &checked[..2]).refused(1, &["PLATFORM_UNTRUSTED"]);
    sign("platform/pdh.cert", &[]).refused(1, &["REQUEST", "casemate platform csr"]);
    assert!(!host.path("other.cert").exists());
    let said = sign("pek.csr", &[]).expect(0).out;
    assert!(said.contains("NOT checked"), "{said}");
    // An authority is not overwritten.
    let key = fs::read(host.path("oca/oca.key")).unwrap();
    host.run(&["platform", "oca", "new", "--out", "oca"])
        .refused(1, &["OUTPUT", "oca.key"]);
    assert_eq!(fs::read(host.path("oca/oca.key")).unwrap(), key);
}

#[test]
fn with_guests_the_keys_stay_and_only_the_pdh_may_change() {
    let mut host = Host::new("guests");
    host.start();
    let path = host.describe("vm", "vault", SEV);
    host.run(&["run", &path]).expect(0);
    let before = show(&host);
    assert_eq!(
        (&before["state"], &before["guests"]),
        (&"working".into(), &1.into())
    );
    for command in ["pek-gen", "factory-reset"] {
        host.run(&["platform", command, "--yes"])
            .refused(1, &["GUESTS_RUNNING", "1 SEV", "casemate stop"]);
        let action = format!("platform-{command}");
        assert_eq!(outcomes(&host, &action), ["refused"]);
        assert_eq!(records(&host, &action)[0]["code"], "GUESTS_RUNNING");
    }
    host.run(&["platform", "csr", "--out", "pek.csr"])
        .refused(1, &["INVALID_PLATFORM_STATE", "end them first"]);
    assert_eq!(show(&host), before);
    host.run(&["platform", "pdh-gen"]).expect(0);
    let after = show(&host);
    assert_ne!(after["pdh"], before["pdh"]);
    assert_eq!(after["platform"], before["platform"]);
    let recorded = records(&host, "platform-pdh-gen");
    assert_ne!(recorded[1]["detail"]["pdh_sha256"], Value::Null);
    host.run(&["stop", "vault"]).expect(0);
    host.run(&["platform", "pek-gen", "--yes"]).expect(0);
}

#[test]
fn an_identity_that_cannot_be_kept_changes_nothing() {
    let mut host = Host::new("full");
    host.start();
    let before = show(&host);
    // The place of the new file is taken by a folder that is not empty.
    host.write("state/processor.new/x", "");
    host.run(&["platform", "pek-gen", "--yes"])
        .refused(1, &["PROCESSOR_IDENTITY", "is what it was"]);
    assert_eq!(show(&host), before);
    assert_eq!(outcomes(&host, "platform-pek-gen"), ["allowed", "failed"]);
    fs::remove_dir_all(host.path("state/processor.new")).unwrap();
    host.run(&["platform", "pek-gen", "--yes"]).expect(0);
    let kept = host.path("state/processor.identity");
    assert_eq!(
        fs::metadata(kept).unwrap().permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn the_chip_is_named_and_amds_processor_missed_by_name() {
    let mut host = Host::new("chip");
    host.start();
    let id = host.json(&["platform", "id"]);
    let socket = id["sockets"][0].as_str().unwrap();
    assert_eq!(socket.len(), 128);
    let text = host.run(&["platform", "id"]).expect(0).out;
    assert_eq!(text.trim(), socket);
    host.run(&["platform", "--processor", "emulated", "show"])
        .expect(0);
    if !std::path::Path::new("/dev/sev").exists() {
        host.run(&["platform", "show", "--processor", "amd"])
            .refused(1, &["/dev/sev"]);
    }
}

#[test]
fn snp_is_shown_configured_and_exported() {
    let policy = POLICY.replace("\"sev\"]", "\"sev\", \"sev-snp\"]");
    let mut host = Host::with_policy("snp", &policy);
    // Made before, because it takes a while.
    let identity = Authority::shared().identity_again();
    host.write(
        "state/processor-snp.identity",
        &identity.to_bytes().unwrap()[..],
    );
    host.start();
    let first = show(&host)["snp"].clone();
    assert_eq!(first["product"], "genoa");
    assert_eq!(first["reported_tcb"], first["current_tcb"]);
    let shown = host.run(&["platform", "show"]).expect(0).out;
    assert!(
        shown.contains("reported TCB") && shown.contains("VCEK"),
        "{shown}"
    );

    let microcode = first["current_tcb"]["parts"]["microcode"].as_u64().unwrap();
    let parts = &first["current_tcb"]["parts"];
    let tcb = format!(
        "bl={},tee={},snp={},ucode={}",
        parts["boot_loader"],
        parts["tee"],
        parts["snp"],
        microcode - 1
    );
    let config = ["platform", "snp", "config", "--reported-tcb"];
    host.run(&[&config[..], &[&tcb, "--mask-chip-id"]].concat())
        .expect(0);
    let set = show(&host)["snp"].clone();
    assert_eq!(set["reported_tcb"]["parts"]["microcode"], microcode - 1);
    assert_eq!(
        (&set["mask_chip_id"], &set["mask_chip_key"]),
        (&true.into(), &false.into())
    );
    host.run(&[&config[..], &["bl=255,tee=255,snp=255,ucode=255"]].concat())
        .refused(1, &["INVALID_PARAM"]);
    host.run(&[&config[..], &["fmc=1,bl=1,tee=1,snp=1,ucode=1"]].concat())
        .refused(64, &["Turin"]);
    host.run(&[&config[..], &["rubbish"]].concat())
        .refused(64, &["rubbish"]);

    let raw = hex::decode(first["current_tcb"]["raw"].as_str().unwrap()).unwrap();
    let current = RawTcb(raw.try_into().unwrap()).of(Product::Genoa);
    let stick = identity.wrap_vlek(Product::Genoa, current, "csp").unwrap();
    host.write("vlek.bin", stick);
    host.run(&["platform", "snp", "vlek-load", "vlek.bin"])
        .expect(0);
    assert_eq!(show(&host)["snp"]["vlek_loaded"], true);
    host.run(&["platform", "snp", "commit"])
        .refused(64, &["--yes"]);
    host.run(&["platform", "snp", "commit", "--yes"]).expect(0);
    assert_eq!(show(&host)["snp"]["reported_tcb"], first["current_tcb"]);
    assert_eq!(
        outcomes(&host, "platform-snp-config"),
        ["allowed", "done", "allowed", "failed"]
    );
    assert_eq!(
        records(&host, "platform-snp-config")[1]["detail"]["mask_chip_id"],
        true
    );
    assert_eq!(
        outcomes(&host, "platform-snp-vlek-load"),
        ["allowed", "done"]
    );
    assert_eq!(outcomes(&host, "platform-snp-commit"), ["allowed", "done"]);

    host.export_platform();
    let verified = Command::new("openssl")
        .current_dir(host.path("platform"))
        .args([
            "verify",
            "-CAfile",
            "ark.pem",
            "-untrusted",
            "ask.pem",
            "vcek.pem",
        ])
        .output()
        .unwrap();
    assert!(verified.status.success(), "{verified:?}");
}
