//! The host's ledger as the agent keeps it: every decision and act is on the disk before its answer leaves.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use casemate_policy::ledger::{self, Entry, Ledger, Signer, VerifyingKey};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use serde::Serialize;

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
        ledger.append(entry).map_err(|e| failed(&e))?;
        ledger.checkpoint().map_err(|e| failed(&e))?;
        Ok(())
    }
}

/// What an offline verification found.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Records in the log.
    pub records: u64,
    /// Root of the tree, hex.
    pub root: String,
    /// Records behind the last checkpoint, which nothing signs yet.
    pub uncovered: u64,
    /// How many records say that an emulated technology was involved.
    pub emulated: u64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ledger verified: {} records ({} emulated), root {}, {} not yet under a checkpoint",
            self.records, self.emulated, self.root, self.uncovered
        )
    }
}

/// Verifies a ledger with nothing but the file and the public key.
pub fn verify(path: &Path, key: &Path) -> Result<Summary, Failure> {
    let text = fs::read_to_string(key).map_err(|e| failed(&format!("{}: {e}", key.display())))?;
    let key: VerifyingKey = text
        .trim()
        .parse()
        .map_err(|e| failed(&format!("{}: {e}", key.display())))?;
    let verified =
        ledger::verify(path, &key).map_err(|e| failed(&format!("{}: {e}", path.display())))?;
    Ok(Summary {
        records: verified.records().len() as u64,
        root: hex::encode(verified.tree().root()),
        uncovered: verified.uncovered(),
        emulated: verified.records().iter().filter(|r| r.emulated).count() as u64,
    })
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

/// Puts new content in the place of a file that only its owner can read: whole, or not at all.
pub fn replace_secret(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    write_secret(&fresh, bytes)?;
    fs::rename(&fresh, path)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::File::open(folder)?.sync_all()
}

fn failed(error: &dyn fmt::Display) -> Failure {
    Failure::new("EVIDENCE", format!("evidence: {error}"))
}
