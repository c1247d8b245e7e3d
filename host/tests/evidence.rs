//! `casemate evidence`, as an operator and an auditor use it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use casemate_policy::ledger::{Cosigner, Entry, Ledger, Outcome, Signer};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use serde_json::Value;

struct World {
    directory: tempfile::TempDir,
    secret: Vec<u8>,
}

/// A host's ledger of 30 records with its public key beside it, and one checkpoint that an auditor kept.
fn world() -> World {
    let directory = tempfile::tempdir().unwrap();
    let secret = pkcs8();
    let world = World { directory, secret };
    let mut ledger = Ledger::open(&world.path("ledger"), world.signer()).unwrap();
    fs::write(
        world.path("ledger.pub"),
        format!("{}\n", ledger.verifying_key()),
    )
    .unwrap();
    for n in 0..30 {
        let action = if n % 3 == 0 { "launch" } else { "stop" };
        let outcome = if n % 4 == 0 {
            Outcome::Refused
        } else {
            Outcome::Done
        };
        let entry = Entry::new("operator", action, &format!("vm-{n}"), outcome)
            .with("measurement", "ab".repeat(48))
            .emulated(true);
        let (_, note) = ledger.append_signed(entry).unwrap();
        if n == 10 {
            fs::write(world.path("kept"), note).unwrap();
        }
    }
    world
}

impl World {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn signer(&self) -> Signer {
        Signer::from_pkcs8("site-a/casemate", &self.secret).unwrap()
    }

    fn run(&self, arguments: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_casemate"))
            .arg("evidence")
            .args(arguments.split(' '))
            .current_dir(self.directory.path())
            .output()
            .unwrap()
    }

    fn exit(&self, arguments: &str) -> i32 {
        self.run(arguments).status.code().unwrap()
    }

    fn json(&self, arguments: &str) -> Value {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn pkcs8() -> Vec<u8> {
    let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    key.as_ref().to_vec()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_ledger_and_its_bundle_verify_and_say_whose_key_it_was() {
    let world = world();
    let found = world.json("verify ledger --key ledger.pub --checkpoint kept --json");
    assert_eq!(
        (&found["records"], &found["emulated"], &found["uncovered"]),
        (&30.into(), &30.into(), &0.into())
    );
    assert_eq!(
        (&found["key_trusted"], &found["extends"]),
        (&true.into(), &1.into())
    );
    assert_eq!(world.json("verify ledger --json")["key_trusted"], false);
    assert_eq!(
        world.exit("export ledger --key ledger.pub --out all.tar"),
        0
    );
    assert_eq!(
        world.exit("export ledger --key ledger.pub --out all.tar"),
        2,
        "nothing is written over"
    );
    assert_eq!(world.json("verify all.tar --json")["key_trusted"], false);
    let found = world.json("verify all.tar --key ledger.pub --checkpoint kept --json");
    assert_eq!(
        (&found["what"], &found["records"], &found["key_trusted"]),
        (&"bundle".into(), &30.into(), &true.into())
    );
}

#[test]
fn what_is_wrong_is_1_and_what_cannot_be_told_is_2() {
    let world = world();
    assert_eq!(
        world.exit("export ledger --out some.tar --action launch"),
        0
    );
    assert_eq!(
        world.exit("export ledger --out proven.tar --action launch --checkpoint kept"),
        0
    );
    assert_eq!(
        world.exit("verify proven.tar --key ledger.pub --checkpoint kept"),
        0
    );
    assert_eq!(
        world.exit("verify some.tar --key ledger.pub --checkpoint kept"),
        2
    );
    assert_eq!(world.exit("verify nothing.tar --key ledger.pub"), 2);
    assert_eq!(world.exit("verify ledger --key nothing.pub"), 2);
    fs::write(world.path("junk"), "junk").unwrap();
    assert_eq!(world.exit("verify junk"), 1);
    let whole = fs::read_to_string(world.path("ledger")).unwrap();
    fs::write(world.path("ledger"), whole.replacen("vm-7\"", "vm-8\"", 1)).unwrap();
    assert_eq!(world.exit("verify ledger --key ledger.pub"), 1);
    assert_eq!(
        world.exit("export ledger --key ledger.pub --out damaged.tar"),
        1
    );
    assert!(!world.path("damaged.tar").exists());
}

/// Deleted, edited, reordered, cut, forked, rolled back, signed anew: by somebody who can write the file and, in the last
/// cases, by one with the host's key or another one.
#[test]
fn an_auditor_with_one_checkpoint_finds_every_rewriting() {
    let world = world();
    let check = || world.exit("verify ledger --key ledger.pub --checkpoint kept");
    assert_eq!(check(), 0);
    let whole = fs::read_to_string(world.path("ledger")).unwrap();
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    let mut swapped = lines.clone();
    swapped.swap(9, 11);
    let cases = [
        [&lines[..5], &lines[7..]].concat().concat(),
        whole.replacen("vm-3\"", "vm-4\"", 1),
        swapped.concat(),
        lines[..11].concat(),
        whole[..whole.len() / 4].to_owned(),
        String::new(),
    ];
    for case in &cases {
        fs::write(world.path("ledger"), case).unwrap();
        assert_eq!(check(), 1);
    }
    for (name, secret) in [("the host's", world.secret.clone()), ("another", pkcs8())] {
        for other in ["ledger", "ledger.tiles"] {
            let path = world.path(other);
            let _ = if path.is_dir() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            };
        }
        let signer = Signer::from_pkcs8("site-a/casemate", &secret).unwrap();
        let mut forged = Ledger::open(&world.path("ledger"), signer).unwrap();
        for _ in 0..40 {
            forged
                .append_signed(Entry::new("operator", "launch", "other", Outcome::Done))
                .unwrap();
        }
        drop(forged);
        assert_eq!(check(), 1, "{name} key");
    }
}

#[test]
fn records_are_found_and_followed() {
    let world = world();
    let found = world.json("query ledger --action launch --outcome refused --json");
    let places: Vec<u64> = found["records"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["seq"].as_u64().unwrap())
        .collect();
    assert_eq!(places, [0, 12, 24]);
    assert_eq!(
        world.json("query ledger --since 2000-01-01 --object vm-3 --json")["records"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        world.json("query ledger --until 2000-01-01 --json")["records"],
        Value::Array(vec![])
    );
    assert_eq!(world.exit("query ledger --since tomorrow"), 64);
    let tail = world.json("tail ledger -n 3 --json");
    assert_eq!(
        (&tail["records"][2]["seq"], &tail["verified"]),
        (&29.into(), &false.into())
    );
}

#[test]
fn other_systems_get_what_they_read() {
    let world = world();
    for (format, out, count) in [
        ("syslog", "log", 30),
        ("otlp", "otlp", 1),
        ("in-toto", "statements", 7),
    ] {
        assert_eq!(
            world.exit(&format!("export ledger --format {format} --out {out}")),
            0
        );
        let text = fs::read_to_string(world.path(out)).unwrap();
        assert_eq!(text.lines().count(), count, "{format}");
    }
    assert!(
        fs::read_to_string(world.path("log"))
            .unwrap()
            .starts_with("<108>1 ")
    );
    assert_eq!(
        lines(&world.path("statements"))[0]["_type"],
        "https://in-toto.io/Statement/v1"
    );
    assert!(lines(&world.path("otlp"))[0]["resourceLogs"].is_array());
    assert_eq!(world.exit("export ledger --format tiles --out static"), 0);
    for file in ["checkpoint", "tile/0/000.p/30", "tile/entries/000.p/30"] {
        assert!(world.path("static").join(file).exists(), "{file}");
    }
    assert_eq!(world.exit("report ledger --out report.html"), 0);
    assert!(
        fs::read_to_string(world.path("report.html"))
            .unwrap()
            .contains("Not covered")
    );
    assert!(world.json("report ledger --format oscal")["assessment-results"]["results"].is_array());
}

#[test]
fn witnesses_co_sign_and_are_asked_for() {
    let world = world();
    let witness = Cosigner::from_pkcs8("w.example/a", &pkcs8()).unwrap();
    fs::write(world.path("w.pub"), witness.witness_key().to_string()).unwrap();
    assert_eq!(
        world.exit("verify ledger --key ledger.pub --witness w.pub"),
        1
    );
    let note = String::from_utf8(world.run("checkpoint ledger --key ledger.pub").stdout).unwrap();
    fs::write(world.path("note"), &note).unwrap();
    assert_eq!(
        world.exit("cosign ledger note --witness w.pub"),
        1,
        "it is not co-signed yet"
    );
    fs::write(
        world.path("note"),
        witness.cosign(&note, 1_700_000_000).unwrap(),
    )
    .unwrap();
    assert_eq!(world.exit("cosign ledger note --witness w.pub"), 0);
    let found = world.json("verify ledger --key ledger.pub --witness w.pub --json");
    assert_eq!(found["witnessed"], 30);
    assert_eq!(
        world.exit("export ledger --key ledger.pub --out all.tar"),
        0
    );
    assert_eq!(
        world.json("verify all.tar --key ledger.pub --witness w.pub --json")["witnessed"],
        30
    );
    assert_eq!(
        world.exit("verify all.tar --witness w.pub --witness w.pub"),
        64
    );
}
