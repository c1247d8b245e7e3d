use std::fs;
use std::path::{Path, PathBuf};

use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;

use super::*;
use crate::ledger::{
    Checkpoint, Cosigner, Entry, Ledger, Outcome, Signer, VerifyingKey, Witnesses,
};

fn pkcs8() -> Vec<u8> {
    let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    key.as_ref().to_vec()
}

fn entry(n: u64) -> Entry {
    let action = if n == 0 { "start" } else { "launch" };
    Entry::new("operator", action, &format!("vm-{n}"), Outcome::Done)
        .with("policy", "sha256:00")
        .emulated(n.is_multiple_of(2))
}

/// A ledger of 300 records in three files under two keys, some removed; and the checkpoints of its past.
struct World {
    directory: tempfile::TempDir,
    ledger: PathBuf,
    keys: Vec<VerifyingKey>,
    /// The key in force.
    secret: Vec<u8>,
    held: Vec<String>,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        let mut secret = pkcs8();
        let signer = Signer::from_pkcs8("log.test", &secret).unwrap();
        let mut keys = vec![signer.verifying_key()];
        let mut ledger = Ledger::open(&path, signer).unwrap();
        let mut held = Vec::new();
        for n in 0..300 {
            held.push(ledger.append_signed(entry(n)).unwrap().1);
            match n {
                99 | 199 => ledger.rotate_file().unwrap(),
                150 => {
                    secret = pkcs8();
                    let next = Signer::from_pkcs8("log.test", &secret).unwrap();
                    keys.push(next.verifying_key());
                    ledger.rotate_key(next).unwrap();
                }
                _ => {}
            }
        }
        Self {
            directory,
            ledger: path,
            keys,
            secret,
            held,
        }
    }

    fn signer(&self) -> Signer {
        Signer::from_pkcs8("log.test", &self.secret).unwrap()
    }

    fn export(&self, name: &str, selection: &Selection<'_>) -> Result<PathBuf, BundleError> {
        let to = self.directory.path().join(name);
        export(&self.ledger, &self.keys[..1], selection, &to)?;
        Ok(to)
    }

    fn expect(&self, held: &[usize]) -> Expectations {
        Expectations {
            trusted: self.keys[..1].to_vec(),
            held: held.iter().map(|n| self.held[*n].clone()).collect(),
            witnesses: Witnesses::default(),
        }
    }
}

fn check(bundle: &Path, expectations: &Expectations) -> Result<(Found, u64), BundleError> {
    let mut seen = 0;
    verify(bundle, expectations, &mut |_| seen += 1).map(|found| (found, seen))
}

#[test]
fn a_whole_ledger_verifies_elsewhere_as_file_and_as_folder() {
    let world = World::new();
    let bundle = world.export("all.tar", &Selection::default()).unwrap();
    let (found, seen) = check(&bundle, &world.expect(&[0, 98, 150, 298])).unwrap();
    assert_eq!((seen, found.manifest.size, found.keys.len()), (301, 301, 2));
    assert!(found.key_trusted);
    assert_eq!(
        found.manifest.policies,
        [PolicySeen {
            digest: "sha256:00".into(),
            seq: 0
        }]
    );
    let folder = world.directory.path().join("unpacked");
    tar::Archive::new(fs::File::open(&bundle).unwrap())
        .unpack(&folder)
        .unwrap();
    assert_eq!(check(&folder, &world.expect(&[5])).unwrap().1, 301);
    assert!(matches!(
        world.export("all.tar", &Selection::default()),
        Err(BundleError::Io(_))
    ));
}

#[test]
fn keys_decide_what_is_believed() {
    let world = World::new();
    let bundle = world.export("all.tar", &Selection::default()).unwrap();
    assert!(
        !check(&bundle, &Expectations::default())
            .unwrap()
            .0
            .key_trusted
    );
    for (trusted, good) in [
        (world.keys[0].clone(), true),
        (world.keys[1].clone(), true),
        (World::new().keys[0].clone(), false),
    ] {
        let expectations = Expectations {
            trusted: vec![trusted],
            ..Expectations::default()
        };
        let result = check(&bundle, &expectations);
        assert_eq!(result.is_ok(), good);
        assert!(good || matches!(result, Err(BundleError::UntrustedKey)));
    }
}

#[test]
fn a_selection_is_proven_record_by_record_also_after_retention() {
    let world = World::new();
    let mut ledger = Ledger::open(&world.ledger, world.signer()).unwrap();
    assert_eq!(ledger.retain(201).unwrap(), 201);
    drop(ledger);
    let odd = |record: &Record| record.seq % 7 == 3;
    let selection = Selection {
        only: Some(&odd),
        since: vec![world.held[42].clone()],
    };
    let bundle = world.export("some.tar", &selection).unwrap();
    let (found, seen) = check(&bundle, &world.expect(&[42])).unwrap();
    assert_eq!((found.manifest.kind, seen), (Kind::Selection, 14));
    assert!(matches!(
        check(&bundle, &world.expect(&[41])),
        Err(BundleError::Unproven { size: 42 })
    ));
    let whole = world
        .export(
            "rest.tar",
            &Selection {
                only: None,
                ..selection
            },
        )
        .unwrap();
    let (found, seen) = check(&whole, &world.expect(&[42, 250])).unwrap();
    assert_eq!((found.manifest.first, seen), (201, 101));
}

#[test]
fn a_checkpoint_of_another_past_or_of_the_future_refuses() {
    let (world, other) = (World::new(), World::new());
    let since = vec![world.held[42].clone()];
    let bundle = world
        .export("all.tar", &Selection { only: None, since })
        .unwrap();
    let refused = |note: &str| {
        let mut expectations = world.expect(&[]);
        expectations.held = vec![note.to_owned()];
        check(&bundle, &expectations).unwrap_err().code()
    };
    let forged = |size| {
        let (origin, root) = ("log.test".to_owned(), [7; 32]);
        let checkpoint = Checkpoint { origin, size, root };
        world.signer().sign(&checkpoint.to_text()).unwrap()
    };
    assert_eq!(refused(&other.held[7]), "SIGNATURE");
    assert_eq!(refused(&forged(1000)), "ROLLED_BACK");
    for size in [7, 43, 301] {
        assert_eq!(refused(&forged(size)), "FORKED");
    }
}

#[test]
fn witnesses_are_counted_on_any_checkpoint_of_the_bundle() {
    let world = World::new();
    let witness = Cosigner::from_pkcs8("w.test/a", &pkcs8()).unwrap();
    let cosigned = witness.cosign(&world.held[250], 1000).unwrap();
    let selection = Selection {
        only: None,
        since: vec![cosigned],
    };
    let bundle = world.export("all.tar", &selection).unwrap();
    let mut expectations = world.expect(&[]);
    expectations.witnesses = Witnesses::new(vec![witness.witness_key()], 1).unwrap();
    assert_eq!(
        check(&bundle, &expectations).unwrap().0.witnessed,
        Some(252)
    );
    let stranger = Cosigner::from_pkcs8("w.test/b", &pkcs8())
        .unwrap()
        .witness_key();
    expectations.witnesses = Witnesses::new(vec![stranger], 1).unwrap();
    assert_eq!(
        check(&bundle, &expectations).unwrap_err().code(),
        "WITNESSES"
    );
}

/// Every byte of every member counts, and every member is needed.
#[test]
fn any_changed_byte_is_noticed() {
    let world = World::new();
    let few = |record: &Record| record.seq % 100 == 1;
    let selections = [
        Selection {
            only: Some(&few),
            since: vec![world.held[42].clone()],
        },
        Selection::default(),
    ];
    for (n, selection) in selections.iter().enumerate() {
        let bundle = world.export(&format!("{n}.tar"), selection).unwrap();
        let folder = world.directory.path().join(format!("unpacked-{n}"));
        tar::Archive::new(fs::File::open(&bundle).unwrap())
            .unpack(&folder)
            .unwrap();
        let expectations = world.expect(&[]);
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let whole = fs::read(&path).unwrap();
            let step = (whole.len() / 40).max(1);
            for at in (0..whole.len()).step_by(step) {
                let mut changed = whole.clone();
                changed[at] ^= 1;
                fs::write(&path, &changed).unwrap();
                let time = path.ends_with(MANIFEST) && {
                    let text = String::from_utf8_lossy(&whole);
                    let from = text.find("\"time\"").unwrap();
                    (from + 7..from + 29).contains(&at)
                };
                assert!(
                    time || check(&folder, &expectations).is_err(),
                    "{path:?} byte {at}"
                );
            }
            fs::write(&path, &whole[..whole.len() / 2]).unwrap();
            assert!(
                whole.is_empty() || check(&folder, &expectations).is_err(),
                "{path:?} cut"
            );
            fs::remove_file(&path).unwrap();
            assert!(check(&folder, &expectations).is_err(), "{path:?} removed");
            fs::write(&path, &whole).unwrap();
        }
        assert!(check(&folder, &expectations).is_ok());
        fs::write(folder.join("more"), b"x").unwrap();
        assert!(check(&folder, &expectations).is_err());
    }
}

/// A forger who also mends the manifest is stopped by the tree, and one who mends the tree by the signature.
#[test]
fn changed_records_with_a_mended_manifest_are_refused() {
    let world = World::new();
    let bundle = world.export("all.tar", &Selection::default()).unwrap();
    let folder = world.directory.path().join("unpacked");
    tar::Archive::new(fs::File::open(&bundle).unwrap())
        .unpack(&folder)
        .unwrap();
    let manifest = fs::read_to_string(folder.join(MANIFEST)).unwrap();
    let records = fs::read_to_string(folder.join(RECORDS)).unwrap();
    let lines: Vec<&str> = records.lines().collect();
    let without = |n: usize| [&lines[..n], &lines[n + 1..]].concat();
    let edited = records.replacen("vm-7\"", "vm-8\"", 1);
    let mut swapped = lines.clone();
    swapped.swap(10, 11);
    let variants = [
        edited,
        without(20).join("\n") + "\n",
        swapped.join("\n") + "\n",
        lines[..300].join("\n") + "\n",
    ];
    for forged in variants {
        let mut mended: Manifest = serde_json::from_str(&manifest).unwrap();
        mended.records = forged.lines().count() as u64;
        mended
            .files
            .insert(RECORDS.into(), members::sha256(forged.as_bytes()));
        fs::write(folder.join(RECORDS), &forged).unwrap();
        fs::write(
            folder.join(MANIFEST),
            serde_json::to_string(&mended).unwrap(),
        )
        .unwrap();
        let refused = check(&folder, &world.expect(&[])).unwrap_err();
        assert!(
            matches!(refused.code(), "WRONG_RECORD" | "WRONG_RECORDS"),
            "{refused}"
        );
    }
}

/// Of a selection, each record stands or falls with its own proof.
#[test]
fn a_changed_record_of_a_selection_is_refused_also_with_a_mended_manifest() {
    let world = World::new();
    let few = |record: &Record| record.seq % 100 == 7;
    let only: Option<&dyn Fn(&Record) -> bool> = Some(&few);
    let since = Vec::new();
    let bundle = world
        .export("some.tar", &Selection { only, since })
        .unwrap();
    let folder = world.directory.path().join("unpacked");
    let file = fs::File::open(&bundle).unwrap();
    tar::Archive::new(file).unpack(&folder).unwrap();
    let text = fs::read_to_string(folder.join(MANIFEST)).unwrap();
    let mut mended: Manifest = serde_json::from_str(&text).unwrap();
    let records = fs::read_to_string(folder.join(RECORDS)).unwrap();
    let forged = records.replacen("vm-7\"", "vm-8\"", 1);
    assert_ne!(forged, records);
    let digest = members::sha256(forged.as_bytes());
    mended.files.insert(RECORDS.into(), digest);
    fs::write(folder.join(RECORDS), &forged).unwrap();
    let text = serde_json::to_string(&mended).unwrap();
    fs::write(folder.join(MANIFEST), text).unwrap();
    let refused = check(&folder, &world.expect(&[])).unwrap_err();
    assert_eq!(refused.code(), "WRONG_RECORD");
}
