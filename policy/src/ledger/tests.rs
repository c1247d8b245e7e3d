use super::*;
use proptest::prelude::*;

struct StoppedClock;
impl Clock for StoppedClock {
    fn now(&self) -> Stamp {
        Stamp {
            wall: std::time::UNIX_EPOCH,
            monotonic_ns: 7,
        }
    }
}

fn signer(seed: u8) -> Signer {
    Signer::from_seed("log.test", &[seed; 32]).unwrap()
}

fn open(path: &Path) -> Result<Ledger, LedgerError> {
    Ledger::open_with_clock(path, signer(1), Box::new(StoppedClock))
}

fn entry(n: u64) -> Entry {
    Entry::new("agent", "launch", &format!("vm-{n}"), Outcome::Allowed).with("n", n)
}

/// A ledger of 3 records, a checkpoint, 2 records, a checkpoint.
fn sample(directory: &tempfile::TempDir) -> PathBuf {
    let path = directory.path().join("ledger");
    let mut ledger = open(&path).unwrap();
    for n in 0..5 {
        assert_eq!(ledger.append(entry(n)).unwrap().seq, n);
        if n == 2 || n == 4 {
            ledger.checkpoint().unwrap();
        }
    }
    path
}

#[test]
fn what_is_appended_verifies_and_survives_reopening() {
    let directory = tempfile::tempdir().unwrap();
    let path = sample(&directory);
    let verified = verify(&path, &signer(1).verifying_key()).unwrap();
    assert_eq!((verified.records().len(), verified.uncovered()), (5, 0));
    let mut ledger = open(&path).unwrap();
    assert_eq!(ledger.tree().root(), verified.tree().root());
    assert_eq!(ledger.append(entry(5)).unwrap().seq, 5);
    let again = verify(&path, &signer(1).verifying_key()).unwrap();
    assert_eq!((again.records().len(), again.uncovered()), (6, 1));
    assert!(again.contains(verified.last_checkpoint().unwrap()));
    assert!(matches!(open(&path), Err(LedgerError::Busy)));
}

#[test]
fn the_file_is_readable_as_documented() {
    let directory = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(sample(&directory)).unwrap();
    let line = text.lines().nth(1).unwrap();
    let payload = r#"{"action":"launch","actor":"agent","code":"","detail":{"n":0},"emulated":false,"monotonic_ns":7,"object":"vm-0","outcome":"allowed","seq":0,"time":"1970-01-01T00:00:00.000000000Z"}"#;
    assert_eq!(
        line,
        format!(
            "R {} {:08x} {payload}",
            payload.len(),
            crc32fast::hash(payload.as_bytes())
        )
    );
    assert!(text.lines().nth(4).unwrap().starts_with("C "));
}

#[test]
fn another_key_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = sample(&directory);
    assert!(matches!(
        verify(&path, &signer(2).verifying_key()),
        Err(LedgerError::Checkpoint { line: 5, .. })
    ));
    assert!(matches!(
        Ledger::open(&path, signer(2)),
        Err(LedgerError::Checkpoint { .. })
    ));
}

#[test]
fn a_torn_tail_is_cut_off_and_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let path = sample(&directory);
    let whole = fs::read(&path).unwrap();
    let last_line = whole[..whole.len() - 1]
        .iter()
        .rposition(|b| *b == b'\n')
        .unwrap()
        + 1;
    for cut in [last_line + 1, last_line + 20, whole.len() - 1] {
        fs::write(&path, &whole[..cut]).unwrap();
        assert!(matches!(
            verify(&path, &signer(1).verifying_key()),
            Err(LedgerError::TornTail { .. })
        ));
        let ledger = open(&path).unwrap();
        assert_eq!(ledger.repaired(), Some((cut - last_line) as u64));
        drop(ledger);
        let verified = verify(&path, &signer(1).verifying_key()).unwrap();
        assert_eq!(verified.records().last().unwrap().action, "repair");
        assert_eq!((verified.records().len(), verified.uncovered()), (6, 3));
    }
}

#[test]
fn an_empty_or_half_written_header_is_a_new_ledger() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger");
    for start in [&b""[..], &frame::HEADER[..5]] {
        fs::write(&path, start).unwrap();
        drop(open(&path).unwrap());
        assert!(verify(&path, &signer(1).verifying_key()).is_ok());
    }
    fs::write(&path, b"something else\n").unwrap();
    assert!(matches!(open(&path), Err(LedgerError::NotALedger)));
}

#[test]
fn a_rewritten_record_with_a_right_checksum_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = sample(&directory);
    let text = fs::read_to_string(&path).unwrap();
    let old = text.lines().nth(2).unwrap();
    let payload = old.splitn(4, ' ').nth(3).unwrap().replace("vm-1", "vm-9");
    let forged = text.replace(old, frame::encode(Kind::Record, &payload).trim_end());
    fs::write(&path, forged).unwrap();
    assert!(matches!(
        verify(&path, &signer(1).verifying_key()),
        Err(LedgerError::Checkpoint { line: 5, .. })
    ));
}

#[test]
fn removed_swapped_or_repeated_lines_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = sample(&directory);
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let variants = [
        [&lines[..2], &lines[3..]].concat(),
        [&lines[..2], &lines[3..4], &lines[2..3], &lines[4..]].concat(),
        [&lines[..3], &lines[2..]].concat(),
    ];
    for variant in variants {
        fs::write(&path, variant.concat()).unwrap();
        assert!(matches!(
            verify(&path, &signer(1).verifying_key()),
            Err(LedgerError::Damaged { .. })
        ));
    }
}

#[test]
fn a_held_checkpoint_reveals_a_ledger_that_was_cut_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = sample(&directory);
    let key = signer(1).verifying_key();
    let held = verify(&path, &key)
        .unwrap()
        .last_checkpoint()
        .unwrap()
        .clone();
    let text = fs::read_to_string(&path).unwrap();
    let cut: String = text.split_inclusive('\n').take(5).collect();
    fs::write(&path, cut).unwrap();
    assert!(!verify(&path, &key).unwrap().contains(&held));
}

#[test]
fn a_record_that_is_too_large_is_refused_and_the_ledger_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut ledger = open(&directory.path().join("ledger")).unwrap();
    let huge = entry(0).with("text", "x".repeat(frame::MAX_PAYLOAD).as_str());
    assert!(matches!(
        ledger.append(huge),
        Err(LedgerError::TooLarge { .. })
    ));
    assert_eq!(ledger.append(entry(0)).unwrap().seq, 0);
}

proptest! {
    /// Any changed byte anywhere in a ledger that ends in a checkpoint is noticed.
    #[test]
    fn any_changed_byte_is_noticed(at: prop::sample::Index, change in 1u8..) {
        static SAMPLE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("changed");
        let mut bytes = SAMPLE.get_or_init(|| fs::read(sample(&directory)).unwrap()).clone();
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        fs::write(&path, &bytes).unwrap();
        prop_assert!(verify(&path, &signer(1).verifying_key()).is_err());
    }
}

fn key(seed: u8) -> VerifyingKey {
    signer(seed).verifying_key()
}

fn count(path: &Path, trusted: &[VerifyingKey], held: &[String]) -> Result<u64, LedgerError> {
    let mut seen = 0;
    audit(path, trusted, held, &mut |_, _| seen += 1).map(|_| seen)
}

/// A ledger with three files, two keys and six or more records in each; and checkpoints kept on the way.
fn long(directory: &tempfile::TempDir) -> (PathBuf, Vec<String>) {
    let path = directory.path().join("ledger");
    let mut ledger = open(&path).unwrap();
    let mut held = Vec::new();
    for n in 0..18 {
        let (_, note) = ledger.append_signed(entry(n)).unwrap();
        held.push(note);
        match n {
            5 | 11 => ledger.rotate_file().unwrap(),
            8 => ledger.rotate_key(signer(2)).unwrap(),
            _ => {}
        }
    }
    (path, held)
}

#[test]
fn a_released_ledger_is_read_and_goes_on() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let text = fs::read_to_string(golden.join("ledger-1.pub")).unwrap();
    let released: VerifyingKey = text.trim().parse().unwrap();
    assert_eq!(
        verify(&golden.join("ledger-1"), &released)
            .unwrap()
            .records()
            .len(),
        5
    );
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger");
    fs::copy(golden.join("ledger-1"), &path).unwrap();
    let mut ledger = open(&path).unwrap();
    assert_eq!(ledger.append(entry(5)).unwrap().seq, 5);
    assert_eq!(verify(&path, &released).unwrap().uncovered(), 1);
}

#[test]
fn several_files_and_keys_are_one_log_and_any_of_its_keys_verifies_it() {
    let directory = tempfile::tempdir().unwrap();
    let (path, held) = long(&directory);
    assert_eq!(files::closed(&path).unwrap().len(), 2);
    for trusted in [key(1), key(2)] {
        assert_eq!(count(&path, &[trusted], &held).unwrap(), 19);
    }
    assert!(matches!(
        count(&path, &[key(3)], &[]),
        Err(LedgerError::UntrustedKey)
    ));
    let keys = || vec![signer(1), signer(2)];
    let ledger = Ledger::open_with_keys(&path, keys(), Box::new(StoppedClock)).unwrap();
    assert_eq!(ledger.verifying_key(), key(2));
    assert_eq!(ledger.tree().size(), 19);
    drop(ledger);
    assert!(matches!(open(&path), Err(LedgerError::UntrustedKey)));
}

#[test]
fn retention_leaves_every_proof_and_every_held_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let (path, mut held) = long(&directory);
    let mut ledger = Ledger::open(&path, signer(2)).unwrap();
    assert_eq!(ledger.retain(5).unwrap(), 0);
    assert_eq!(ledger.retain(13).unwrap(), 13);
    let size = ledger.tree().size();
    let proof = ledger.tree().inclusion_proof(0, size).unwrap().unwrap();
    drop(ledger);
    let audited = audit(&path, &[key(1)], &held, &mut |_, _| {}).unwrap();
    assert_eq!((audited.base.size(), audited.frontier.size()), (13, 20));
    let first = entry(0).stamped(0, StoppedClock.now()).canonical();
    let leaf = merkle::leaf_hash(first.as_bytes());
    let root = audited.frontier.root();
    assert!(merkle::verify_inclusion(&leaf, 0, size, &proof, &root));
    assert!(matches!(
        verify(&path, &key(1)),
        Err(LedgerError::Pruned { first: 13 })
    ));
    // A checkpoint of another past, by the right key, is still found out.
    let forged = Checkpoint {
        origin: "log.test".to_owned(),
        size: 4,
        root: [7; 32],
    };
    held.push(signer(1).sign(&forged.to_text()).unwrap());
    assert!(matches!(
        count(&path, &[key(1)], &held),
        Err(LedgerError::Forked { size: 4 })
    ));
}

#[test]
fn files_that_are_removed_or_swapped_are_missed() {
    let directory = tempfile::tempdir().unwrap();
    let (path, _) = long(&directory);
    let closed = files::closed(&path).unwrap();
    let (first, second) = (fs::read(&closed[0]).unwrap(), fs::read(&closed[1]).unwrap());
    fs::remove_file(&closed[0]).unwrap();
    assert!(matches!(
        count(&path, &[key(1)], &[]),
        Err(LedgerError::Removed { first: 6 })
    ));
    fs::write(&closed[0], &second).unwrap();
    fs::write(&closed[1], &first).unwrap();
    assert_eq!(count(&path, &[key(1)], &[]).unwrap_err().code(), "DAMAGED");
    fs::write(&closed[0], &first).unwrap();
    fs::remove_file(&closed[1]).unwrap();
    assert_eq!(count(&path, &[key(1)], &[]).unwrap_err().code(), "DAMAGED");
    fs::write(&closed[1], &second[..second.len() - 1]).unwrap();
    assert_eq!(count(&path, &[key(1)], &[]).unwrap_err().code(), "DAMAGED");
}

/// What somebody with the file, and in the last cases with a key that is no longer in force, can try.
#[test]
fn an_auditor_who_kept_one_checkpoint_finds_every_rewriting() {
    let directory = tempfile::tempdir().unwrap();
    let (path, held) = long(&directory);
    let kept = [held[9].clone()];
    let rewritten = |records: u64, keys: &[u8], edit: u64| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        let mut ledger =
            Ledger::open_with_clock(&path, signer(keys[0]), Box::new(StoppedClock)).unwrap();
        for n in 0..records {
            let changed = if n == edit { entry(100) } else { entry(n) };
            ledger.append_signed(changed).unwrap();
            if n == 8 && keys.len() > 1 {
                ledger.rotate_key(signer(keys[1])).unwrap();
            }
        }
        (directory, path)
    };
    let refused = |made: (tempfile::TempDir, PathBuf), trusted: &[VerifyingKey]| {
        count(&made.1, trusted, &kept).unwrap_err().code()
    };
    assert_eq!(count(&path, &[key(1)], &kept).unwrap(), 19);
    assert_eq!(
        count(&rewritten(18, &[1, 2], 99).1, &[key(1)], &kept).unwrap(),
        19
    );
    // Rolled back, and a fork: both signed with the right keys.
    assert_eq!(refused(rewritten(9, &[1, 2], 99), &[key(1)]), "ROLLED_BACK");
    assert_eq!(refused(rewritten(18, &[1, 2], 3), &[key(1)]), "FORKED");
    // Signed anew with the key that was rotated out, as if there had been no rotation.
    assert_eq!(
        refused(rewritten(19, &[1], 99), &[key(1)]),
        "HELD_CHECKPOINT"
    );
    assert_eq!(refused(rewritten(19, &[1], 99), &[key(2)]), "CHECKPOINT");
    // Signed anew with a key of the forger's.
    assert_eq!(
        refused(rewritten(19, &[3], 99), &[key(1), key(2)]),
        "CHECKPOINT"
    );
    assert_eq!(
        refused(rewritten(19, &[3, 4], 99), &[key(1)]),
        "UNTRUSTED_KEY"
    );
    assert_eq!(
        refused(rewritten(19, &[1, 4], 99), &[key(1)]),
        "HELD_CHECKPOINT"
    );
    assert_eq!(
        refused(rewritten(19, &[1, 4], 99), &[key(2)]),
        "UNTRUSTED_KEY"
    );
}

#[test]
fn the_old_key_signs_nothing_after_a_rotation() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger");
    let mut ledger = open(&path).unwrap();
    ledger.append_signed(entry(0)).unwrap();
    ledger.rotate_key(signer(2)).unwrap();
    ledger.signer = signer(1);
    ledger.append_signed(entry(1)).unwrap();
    assert_eq!(
        count(&path, &[key(1)], &[]).unwrap_err().code(),
        "CHECKPOINT"
    );
}

#[test]
fn a_rotation_is_not_by_another_name_or_to_the_same_key() {
    let directory = tempfile::tempdir().unwrap();
    let mut ledger = open(&directory.path().join("ledger")).unwrap();
    assert!(ledger.rotate_key(signer(1)).is_err());
    let other = Signer::from_seed("log.other", &[2; 32]).unwrap();
    assert!(ledger.rotate_key(other).is_err());
    ledger.append(entry(0)).unwrap();
}

/// A checkpoint whose signature is wrong is refused also where a later one covers it, if it is the last of its key.
#[test]
fn the_last_signature_is_verified() {
    let directory = tempfile::tempdir().unwrap();
    let path = sample(&directory);
    let text = fs::read_to_string(&path).unwrap();
    let last = text.lines().last().unwrap();
    let (_, payload) = frame::decode(last.as_bytes()).unwrap();
    let note: String = serde_json::from_str(payload).unwrap();
    let at = note.len() - 10;
    let swapped = if note.as_bytes()[at] == b'A' {
        "B"
    } else {
        "A"
    };
    let forged = [&note[..at], swapped, &note[at + 1..]].concat();
    let forged = frame::encode(Kind::Checkpoint, &quoted(&forged));
    fs::write(&path, text.replace(last, forged.trim_end())).unwrap();
    assert_eq!(
        count(&path, &[key(1)], &[]).unwrap_err().code(),
        "CHECKPOINT"
    );
}

#[test]
fn a_batch_is_whole_or_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger");
    let mut ledger = open(&path).unwrap();
    let huge = entry(1).with("text", "x".repeat(frame::MAX_PAYLOAD).as_str());
    assert!(ledger.append_all(vec![entry(0), huge]).is_err());
    assert_eq!(ledger.tree().size(), 0);
    let records = ledger.append_all((0..300).map(entry).collect()).unwrap();
    assert_eq!(records.last().unwrap().seq, 299);
    assert!(directory.path().join("ledger.tiles/tile/0/000").exists());
    assert_eq!(count(&path, &[key(1)], &[]).unwrap(), 300);
}
