//! The host's ledger as the agent keeps it: every decision and act is on the disk before its answer leaves.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use casemate_policy::ledger::{Entry, Ledger, Signer};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;

use crate::agent::api::Failure;
use crate::agent::vmm_process::lock;

/// The open ledger of this host.
pub struct Evidence {
    ledger: Mutex<Ledger>,
}

impl Evidence {
    /// Opens the ledger in `state_dir`, or begins one: `ledger.key` (secret), `ledger.pub`, `ledger`.
    pub fn open(state_dir: &Path, host: &str) -> Result<Self, Failure> {
        let pkcs8 = signing_key(&state_dir.join("ledger.key"))?;
        let signer =
            Signer::from_pkcs8(&format!("{host}/casemate"), &pkcs8).map_err(|e| failed(&e))?;
        let public = format!("{}\n", signer.verifying_key());
        fs::write(state_dir.join("ledger.pub"), public).map_err(|e| failed(&e))?;
        let ledger = Ledger::open(&state_dir.join("ledger"), signer).map_err(|e| failed(&e))?;
        Ok(Self {
            ledger: Mutex::new(ledger),
        })
    }

    /// Appends a record and signs the tree over it. What cannot be recorded must not be done.
    pub fn record(&self, entry: Entry) -> Result<(), Failure> {
        let mut ledger = lock(&self.ledger);
        ledger.append_signed(entry).map_err(|e| failed(&e))?;
        Ok(())
    }
}

fn signing_key(path: &Path) -> Result<Vec<u8>, Failure> {
    if let Ok(bytes) = fs::read(path) {
        return Ok(bytes);
    }
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|e| failed(&e))?;
    write_secret(path, pkcs8.as_ref()).map_err(|e| failed(&e))?;
    Ok(pkcs8.as_ref().to_vec())
}

/// Writes a new file that only its owner can read.
pub fn write_secret(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn failed(error: &dyn fmt::Display) -> Failure {
    Failure::new("EVIDENCE", format!("evidence: {error}"))
}
