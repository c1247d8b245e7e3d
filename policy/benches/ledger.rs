//! The ledger's speed on this machine's disk, beside a plain append and `fdatasync` of the same bytes in the same run.
//! Prints one JSON object.
//!
//! *single* is one record, durable when it returns; *signed* also has a checkpoint in the same write, as the agent does;
//! *batched* is 1,000 records a wait for the disk. *verify* reads all back; *proof* makes an inclusion proof from tiles.
//! *grown_kib* is by how much the process's memory grew while the log grew from its first to its last batch.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::fs::{self, File};
use std::io::Write as _;
use std::time::{Duration, Instant};

use casemate_policy::ledger::{Entry, Ledger, Nodes as _, Outcome, Signer, audit};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use serde_json::json;

fn main() {
    // `cargo test` runs benchmarks to see whether they still can.
    let (records, time) = match std::env::args().any(|arg| arg == "--bench") {
        true => (1_000_000, Duration::from_secs(2)),
        false => (2_000, Duration::from_millis(20)),
    };
    // Not in /tmp, which may be in memory.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("ledger");
    let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    let signer = Signer::from_pkcs8("site-a/casemate", key.as_ref()).unwrap();
    let public = signer.verifying_key();
    let mut ledger = Ledger::open(&path, signer).unwrap();

    let single = rate(time, || drop(ledger.append(entry(1)).unwrap()));
    let signed = rate(time, || drop(ledger.append_signed(entry(1)).unwrap()));
    let line = fs::read(&path).unwrap().len() / ledger.tree().frontier().size() as usize;
    let mut plain_file = File::create(directory.path().join("plain")).unwrap();
    let bytes = vec![b'x'; line];
    let mut plain = |bytes: &[u8]| {
        plain_file.write_all(bytes).unwrap();
        plain_file.sync_data().unwrap();
    };
    let plain_single = rate(time, || plain(&bytes));
    let batch = bytes.repeat(BATCH);
    let plain_batched = rate(time, || plain(&batch)) * BATCH as f64;

    ledger
        .append_all((0..BATCH as u64).map(entry).collect())
        .unwrap();
    let (before, begun) = (resident_kib(), Instant::now());
    let batches = records / BATCH as u64;
    for _ in 0..batches {
        ledger
            .append_all((0..BATCH as u64).map(entry).collect())
            .unwrap();
    }
    let batched = (batches * BATCH as u64) as f64 / begun.elapsed().as_secs_f64();
    let grown = resident_kib().saturating_sub(before);
    ledger.checkpoint().unwrap();

    let size = ledger.tree().frontier().size();
    let mut at = 0;
    let proofs = rate(time, || {
        at = (at + 7919) % size;
        drop(ledger.tree().inclusion_proof(at, size).unwrap());
    });
    drop(ledger);
    let (mut seen, begun) = (0u64, Instant::now());
    audit(&path, &[public], &[], &mut |_, _| seen += 1).unwrap();
    let verified = seen as f64 / begun.elapsed().as_secs_f64();
    println!(
        "{}",
        json!({
            "records": size,
            "bytes_per_record": line,
            "single_per_s": single.round(),
            "signed_per_s": signed.round(),
            "plain_fdatasync_per_s": plain_single.round(),
            "batched_per_s": batched.round(),
            "plain_batched_per_s": plain_batched.round(),
            "verify_per_s": verified.round(),
            "proof_us": (1e6 / proofs).round(),
            "grown_kib": grown,
        })
    );
}

fn entry(n: u64) -> Entry {
    Entry::new("operator", "launch", "vault", Outcome::Done)
        .with("measurement", "ab".repeat(48))
        .with("n", n)
        .emulated(true)
}

fn rate(time: Duration, mut work: impl FnMut()) -> f64 {
    let begun = Instant::now();
    let mut times = 0u32;
    while begun.elapsed() < time {
        work();
        times += 1;
    }
    f64::from(times) / begun.elapsed().as_secs_f64()
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

const BATCH: usize = 1000;
