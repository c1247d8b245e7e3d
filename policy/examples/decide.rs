//! The whole way: a policy, two decisions, their records, a checkpoint, and what an auditor does with the file.
//!
//! Run with `cargo run --example decide -p casemate-policy`.

use casemate_policy::ledger::{Checkpoint, Entry, Signer, merkle, verify};
use casemate_policy::{Action, HostPolicy, Ledger, Technology, evaluate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // What the administrator wrote. A mistake would be named with its line and key.
    let policy = HostPolicy::parse("policy.toml", POLICY)?;

    // The log's key: made once, kept in a file of mode 0600. Only the public half leaves the host.
    let random = ring::rand::SystemRandom::new();
    let pkcs8 =
        ring::signature::Ed25519KeyPair::generate_pkcs8(&random).map_err(|_| "no randomness")?;
    let signer = Signer::from_pkcs8("site-a.example/ledger", pkcs8.as_ref())?;
    let public_key = signer.verifying_key();

    let path = std::env::temp_dir().join(format!("casemate-decide-{}.ledger", std::process::id()));
    let mut ledger = Ledger::open(&path, signer)?;

    // Two questions; each answer is recorded before anybody acts on it.
    let questions = [
        Action::Launch {
            technology: Technology::Sev,
            emulated: true,
            vcpus: 2,
            memory_mib: 512,
            policy_bits: 1,
        },
        Action::MigrateOut {
            technology: Technology::SevSnp,
            emulated: false,
            peer_name: "site-b".to_owned(),
        },
    ];
    for action in &questions {
        let decision = evaluate(&policy, action);
        println!("{}: {}", action.name(), decision.code.as_str());
        for refusal in decision.refusals() {
            println!(
                "  {}: wanted {}; found {}",
                refusal.rule, refusal.wanted, refusal.found
            );
            println!("  instead: {}", refusal.remedy);
        }
        let entry = Entry::decided("agent", action.name(), "vm-1", &decision);
        ledger.append(entry.with("policy", policy.digest().to_string()))?;
    }
    let note = ledger.checkpoint()?;
    drop(ledger);

    // The auditor: the file, the public key, and the checkpoint that was handed over on its own.
    let verified = verify(&path, &public_key)?;
    let held = Checkpoint::open(&note, &public_key)?;
    println!("\n{note}");
    println!(
        "{} records verified, {} not yet signed",
        verified.records().len(),
        verified.uncovered()
    );
    println!(
        "the handed-over checkpoint is of this log: {}",
        verified.contains(&held)
    );

    // One record proven to somebody who has nothing but the checkpoint.
    let record = verified.records().get(1).ok_or("no second record")?;
    let proof = verified
        .tree()
        .inclusion_proof(record.seq, held.size)
        .ok_or("no proof")?;
    let leaf = merkle::leaf_hash(record.canonical().as_bytes());
    let proven = merkle::verify_inclusion(&leaf, record.seq, held.size, &proof, &held.root);
    println!(
        "record {} is in it, proven with {} hashes: {proven}",
        record.seq,
        proof.len()
    );

    std::fs::remove_file(&path)?;
    Ok(())
}

const POLICY: &str = r#"
[host]
name = "site-a"

[technologies]
allowed = ["none", "sev", "sev-snp"]
allow_emulated = true

[limits]
max_vcpus = 8
max_memory_mib = 16384

[migration]
outgoing = true

[[peer]]
name = "site-b"
san = "site-b.example"
spki = "sha256:2222222222222222222222222222222222222222222222222222222222222222"
path = "direct"
"#;
