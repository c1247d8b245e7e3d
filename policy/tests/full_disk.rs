//! A disk that is full stops new records, and nothing else: with room again, the same ledger goes on.

use casemate_policy::ledger::{Entry, Ledger, LedgerError, Outcome, Signer, audit};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;

/// The limit on a file's size stands for the disk's end: a write stops in the middle in the same way.
#[test]
fn a_full_disk_refuses_and_a_disk_with_room_again_goes_on() {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    signals.thread_block().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger");
    let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    let signer = Signer::from_pkcs8("log.test", key.as_ref()).unwrap();
    let public = signer.verifying_key();
    let mut ledger = Ledger::open(&path, signer).unwrap();
    let entry = || Entry::new("operator", "launch", "vm", Outcome::Allowed);
    ledger.append_signed(entry()).unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    for room in [0, 1, 100] {
        setrlimit(Resource::RLIMIT_FSIZE, ledger.file_bytes() + room, hard).unwrap();
        for _ in 0..3 {
            assert!(matches!(
                ledger.append_signed(entry()),
                Err(LedgerError::Full(_))
            ));
        }
        setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
        ledger.append_signed(entry()).unwrap();
    }
    let mut seen = 0;
    let audited = audit(&path, &[public], &[], &mut |_, _| seen += 1).unwrap();
    assert_eq!((seen, audited.uncovered()), (4, 0));
}
