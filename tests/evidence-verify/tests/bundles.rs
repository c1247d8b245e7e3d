//! Bundles made by Casemate, whole and damaged, before both verifiers; and its OSCAL before NIST's schema.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_policy::bundle::{self, Expectations, Selection};
use casemate_policy::ledger::{Entry, Ledger, Outcome, Record, Signer, VerifyingKey};
use casemate_policy::report::{Report, Source, oscal};
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;

struct World {
    directory: tempfile::TempDir,
    keys: Vec<VerifyingKey>,
    held: Vec<String>,
}

/// A ledger of 40 records in two files under two keys.
fn world() -> World {
    let directory = tempfile::tempdir().unwrap();
    let fresh = || {
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Signer::from_pkcs8("site-a/casemate", key.as_ref()).unwrap()
    };
    let signer = fresh();
    let mut keys = vec![signer.verifying_key()];
    let mut ledger = Ledger::open(&directory.path().join("ledger"), signer).unwrap();
    let mut held = Vec::new();
    for n in 0..39u64 {
        let action = ["start", "launch", "migrate-out"][(n % 3) as usize];
        let outcome = [Outcome::Done, Outcome::Refused][(n % 2) as usize];
        let entry =
            Entry::new("operator", action, &format!("vm-{n}"), outcome).emulated(true).with("policy", "sha256:00");
        held.push(ledger.append_signed(entry).unwrap().1);
        match n {
            12 => ledger.rotate_file().unwrap(),
            20 => {
                let next = fresh();
                keys.push(next.verifying_key());
                ledger.rotate_key(next).unwrap();
            }
            _ => {}
        }
    }
    World { directory, keys, held }
}

impl World {
    fn export(&self, name: &str, only: Option<&dyn Fn(&Record) -> bool>) -> PathBuf {
        let to = self.directory.path().join(name);
        let since = vec![self.held[4].clone(), self.held[7].clone(), self.held[30].clone()];
        let ledger = self.directory.path().join("ledger");
        bundle::export(&ledger, &self.keys[..1], &Selection { only, since }, &to).unwrap();
        to
    }

    /// Whether the independent verifier accepts, and whether Casemate does.
    fn accepted(&self, bundle: &Path, key: &VerifyingKey) -> (bool, bool) {
        self.accepted_by(bundle, key, None)
    }

    /// The same, of auditors who keep a checkpoint.
    fn accepted_by(&self, bundle: &Path, key: &VerifyingKey, held: Option<&str>) -> (bool, bool) {
        let file = self.directory.path().join("key");
        fs::write(&file, key.to_string()).unwrap();
        let kept = self.directory.path().join("kept");
        let kept = held.map(|held| fs::write(&kept, held).map(|()| kept.clone()).unwrap());
        let mut independent = Command::new(env!("CARGO_BIN_EXE_evidence-verify"));
        let independent = independent.args([bundle, &file]).args(kept).output().unwrap();
        assert!(independent.status.code().is_some_and(|code| code < 2), "it crashed: {independent:?}");
        let held = held.map(str::to_owned).into_iter().collect();
        let expectations = Expectations { trusted: vec![key.clone()], held, ..Expectations::default() };
        let ours = bundle::verify(bundle, &expectations, &mut |_| {});
        (independent.status.success(), ours.is_ok())
    }
}

type Members = BTreeMap<String, Vec<u8>>;

fn unpack(bundle: &Path) -> (Vec<String>, Members) {
    let mut archive = tar::Archive::new(fs::File::open(bundle).unwrap());
    let (mut order, mut members) = (Vec::new(), Members::new());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        members.insert(name.clone(), bytes);
        order.push(name);
    }
    (order, members)
}

fn pack(order: &[String], members: &Members, to: &Path) {
    let mut archive = tar::Builder::new(fs::File::create(to).unwrap());
    for name in order.iter().filter(|name| members.contains_key(*name)) {
        let bytes = &members[name];
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_entry_type(tar::EntryType::Regular);
        archive.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    archive.finish().unwrap();
}

/// The manifest, made to fit what a forger has put into the members.
fn mend(members: &mut Members) {
    let mut manifest: serde_json::Value = serde_json::from_slice(&members["manifest.json"]).unwrap();
    for (name, bytes) in members.iter().filter(|(name, _)| *name != "manifest.json") {
        manifest["files"][name] = hex(digest(&SHA256, bytes).as_ref()).into();
    }
    let records = String::from_utf8_lossy(&members["records.jsonl"]).into_owned();
    let parsed: Vec<serde_json::Value> = records.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    manifest["records"] = parsed.len().into();
    let starts = parsed.iter().filter(|record| record["action"] == "start");
    let policies: Vec<_> =
        starts.map(|r| serde_json::json!({ "digest": r["detail"]["policy"], "seq": r["seq"] })).collect();
    manifest["policies"] = policies.into();
    members.insert("manifest.json".into(), manifest.to_string().into_bytes());
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn both_verifiers_accept_what_was_exported_and_only_by_the_logs_keys() {
    let (world, other) = (world(), world());
    let some = |record: &Record| record.seq % 5 == 2;
    for bundle in [world.export("all.tar", None), world.export("some.tar", Some(&some))] {
        for key in &world.keys {
            assert_eq!(world.accepted(&bundle, key), (true, true));
        }
        assert_eq!(world.accepted(&bundle, &other.keys[0]), (false, false));
    }
}

/// Not a bit of a bundle can be changed, in whatever member, header or padding it is.
#[test]
fn both_verifiers_refuse_every_flipped_bit() {
    let world = world();
    let bundle = world.export("all.tar", None);
    let whole = fs::read(&bundle).unwrap();
    let flipped = bundle.with_extension("flipped");
    let mut end = whole.clone();
    end.push(0);
    fs::write(&flipped, end).unwrap();
    assert_eq!(world.accepted(&flipped, &world.keys[0]), (false, false), "longer by a zero");
    for at in (0..whole.len()).step_by(61) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&flipped, bytes).unwrap();
        assert_eq!(world.accepted(&flipped, &world.keys[0]), (false, false), "byte {at}");
    }
}

/// Who kept a checkpoint finds out what the log's own key cannot show: another past, and an older end.
#[test]
fn both_verifiers_hold_a_bundle_to_a_kept_checkpoint() {
    let (world, other) = (world(), world());
    let some = |record: &Record| record.seq % 5 == 2;
    let (all, some) = (world.export("all.tar", None), world.export("some.tar", Some(&some)));
    let by = |bundle: &Path, held: &str| world.accepted_by(bundle, &world.keys[0], Some(held));
    for held in &world.held {
        assert_eq!(by(&all, held), (true, true));
    }
    // A selection proves what was asked of it, and nothing of other checkpoints.
    assert_eq!((by(&some, &world.held[7]), by(&some, &world.held[8])), ((true, true), (false, false)));
    assert_eq!(by(&all, &other.held[8]), (false, false));
    // The same key, later, and with another past.
    let secret = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    let log = |name: &str, records: u64| {
        let signer = Signer::from_pkcs8("site-a/casemate", secret.as_ref()).unwrap();
        let (key, path) = (signer.verifying_key(), world.directory.path().join(name));
        let mut ledger = Ledger::open(&path, signer).unwrap();
        let mut note = String::new();
        for n in 0..records {
            let entry = Entry::new("operator", "stop", &format!("{name}-{n}"), Outcome::Done);
            note = ledger.append_signed(entry).unwrap().1;
        }
        let to = path.with_extension("tar");
        bundle::export(&path, std::slice::from_ref(&key), &Selection::default(), &to).unwrap();
        (to, key, note)
    };
    let ((short, key, early), (long, _, _)) = (log("a", 5), log("b", 9));
    assert_eq!(world.accepted_by(&short, &key, Some(&early)), (true, true));
    assert_eq!(world.accepted_by(&long, &key, None), (true, true));
    assert_eq!(world.accepted_by(&long, &key, Some(&early)), (false, false), "forked");
    let (_, _, late) = log("c", 7);
    assert_eq!(world.accepted_by(&short, &key, Some(&late)), (false, false), "rolled back");
}

/// Each damage is tried by a careless forger, and by one who mends the manifest.
#[test]
fn both_verifiers_refuse_every_damage() {
    let (world, other) = (world(), world());
    let some = |record: &Record| record.seq % 5 == 2;
    let foreign = unpack(&other.export("foreign.tar", None)).1;
    for bundle in [world.export("all.tar", None), world.export("some.tar", Some(&some))] {
        let (order, whole) = unpack(&bundle);
        let damaged = bundle.with_extension("damaged");
        // What is packed here is refused for what is in it, not for how it was packed.
        let mut again = whole.clone();
        mend(&mut again);
        for members in [&whole, &again] {
            pack(&order, members, &damaged);
            assert_eq!(world.accepted(&damaged, &world.keys[0]), (true, true));
        }
        let mut cases: Vec<(String, Members)> = Vec::new();
        for name in order.iter().filter(|name| *name != "README.txt") {
            let mut members = whole.clone();
            members.remove(name);
            cases.push((format!("{name} removed"), members));
            let size = whole[name].len();
            for at in [0, size / 3, size / 2, size - 2] {
                let mut members = whole.clone();
                members.get_mut(name).unwrap()[at] ^= 1;
                cases.push((format!("{name} changed at {at}"), members));
            }
        }
        for name in ["keys.json", "checkpoint", "records.jsonl", "consistency.jsonl"] {
            let mut members = whole.clone();
            members.insert(name.into(), foreign[name].clone());
            cases.push((format!("{name} of another log"), members));
        }
        for (what, forged) in forged_records(&whole["records.jsonl"]) {
            let mut members = whole.clone();
            members.insert("records.jsonl".into(), forged);
            cases.push((what.to_owned(), members));
        }
        for (what, mut members) in cases {
            pack(&order, &members, &damaged);
            assert_eq!(world.accepted(&damaged, &world.keys[0]), (false, false), "{what}");
            let has_manifest =
                members.get("manifest.json").map(|m| serde_json::from_slice::<serde_json::Value>(m).is_ok());
            if has_manifest == Some(true) && members.contains_key("records.jsonl") && !what.starts_with("manifest") {
                mend(&mut members);
                pack(&order, &members, &damaged);
                assert_eq!(world.accepted(&damaged, &world.keys[0]), (false, false), "{what}, mended");
            }
        }
        let bytes = fs::read(&bundle).unwrap();
        for length in [0, 100, 512, bytes.len() / 2, bytes.len() - 1536] {
            fs::write(&damaged, &bytes[..length]).unwrap();
            assert_eq!(world.accepted(&damaged, &world.keys[0]), (false, false), "cut at {length}");
        }
    }
}

/// Deleted, edited, reordered, repeated and cut records.
fn forged_records(whole: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let text = String::from_utf8(whole.to_vec()).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let mut swapped = lines.clone();
    swapped.swap(2, 3);
    vec![
        ("deleted", [&lines[..3], &lines[4..]].concat().concat().into_bytes()),
        ("edited", text.replacen("operator", "operatox", 1).into_bytes()),
        ("reordered", swapped.concat().into_bytes()),
        ("repeated", [&lines[..3], &lines[2..]].concat().concat().into_bytes()),
        ("cut back", lines[..lines.len() - 1].concat().into_bytes()),
        ("with a carriage return", text.replacen('\n', "\r\n", 1).into_bytes()),
    ]
}

/// The schema is NIST's, release 1.2.3 of OSCAL.
#[test]
fn the_oscal_document_is_valid_against_nists_schema_and_a_damaged_one_is_not() {
    let world = world();
    let bundle = world.export("all.tar", None);
    let mut report = Report::new().unwrap();
    let found = bundle::verify(&bundle, &Expectations::default(), &mut |record| report.add(&record)).unwrap();
    report.source = Some(Source {
        origin: found.manifest.origin,
        size: found.manifest.size,
        root: found.root,
        key: found.keys.last().unwrap().clone(),
        key_trusted: false,
        time: found.manifest.time,
    });
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/oscal_assessment-results_schema.json");
    let schema = serde_json::from_slice(&fs::read(schema).unwrap()).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let document = oscal(&report).unwrap();
    let errors: Vec<String> =
        validator.iter_errors(&document).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert_eq!(errors, Vec::<String>::new());
    for (path, value) in [
        ("/assessment-results/uuid", serde_json::json!("x")),
        ("/assessment-results/results/0/start", serde_json::json!("yesterday")),
        ("/assessment-results/results/0/observations/0/methods", serde_json::json!([])),
        ("/assessment-results/import-ap", serde_json::json!({})),
    ] {
        let mut damaged = document.clone();
        *damaged.pointer_mut(path).unwrap() = value;
        assert!(!validator.is_valid(&damaged), "{path}");
    }
    let empty = Report { source: report.source.clone(), ..Report::new().unwrap() };
    assert!(validator.is_valid(&oscal(&empty).unwrap()));
}
