//! The host's ledger as the agent keeps it: every decision and act is on the disk before its answer leaves.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use casemate_policy::ledger::events::Start;
use casemate_policy::ledger::{Entry, Ledger, Nodes as _, Signer, SystemClock};
use ring::digest;
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;

use crate::agent::api::Failure;
use crate::agent::vmm_process::lock;

/// The open ledger of this host.
pub struct Evidence {
    ledger: Mutex<Ledger>,
    origin: String,
    files: KeyFiles,
}

/// Where the ledger's keys are.
struct KeyFiles {
    key: PathBuf,
    /// A key that the log is about to go over to.
    next: PathBuf,
    public: PathBuf,
}

impl KeyFiles {
    fn below(state_dir: &Path) -> Self {
        Self {
            key: state_dir.join("ledger.key"),
            next: state_dir.join("ledger.key.next"),
            public: state_dir.join("ledger.pub"),
        }
    }

    /// The next key is the key.
    fn change(&self) -> Result<(), Failure> {
        let folder = self.key.parent().unwrap_or(Path::new("."));
        fs::rename(&self.next, &self.key)
            .and_then(|()| fs::File::open(folder)?.sync_all())
            .map_err(|e| failed(&e))
    }

    fn publish(&self, ledger: &Ledger) -> Result<(), Failure> {
        let public = format!("{}\n", ledger.verifying_key());
        fs::write(&self.public, public).map_err(|e| failed(&e))
    }
}

impl Evidence {
    /// Opens the ledger in `state_dir`, or begins one: `ledger.key` (secret), `ledger.pub`, `ledger`.
    pub fn open(state_dir: &Path, host: &str) -> Result<Self, Failure> {
        let origin = format!("{host}/casemate");
        let files = KeyFiles::below(state_dir);
        let signer = |pkcs8: &[u8]| Signer::from_pkcs8(&origin, pkcs8).map_err(|e| failed(&e));
        let mut signers = vec![signer(&signing_key(&files.key)?)?];
        // A crash may have come between the log's change of keys and the files'.
        if let Ok(next) = fs::read(&files.next) {
            signers.push(signer(&next)?);
        }
        let next = signers.get(1).map(Signer::verifying_key);
        let path = state_dir.join("ledger");
        let ledger = Ledger::open_with_keys(&path, signers, Box::new(SystemClock))
            .map_err(|e| failed(&e))?;
        if next.is_some_and(|next| next == ledger.verifying_key()) {
            files.change()?;
        }
        files.publish(&ledger)?;
        Ok(Self {
            ledger: Mutex::new(ledger),
            origin,
            files,
        })
    }

    /// Lets the log go on under a new key; the old one and the new one, as verifier keys.
    pub fn rotate_key(&self) -> Result<(String, String), Failure> {
        let mut ledger = lock(&self.ledger);
        let old = ledger.verifying_key().to_string();
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|e| failed(&e))?;
        let signer = Signer::from_pkcs8(&self.origin, pkcs8.as_ref()).map_err(|e| failed(&e))?;
        // The new key is on the disk before the log names it, and the old one until it has.
        replace_secret(&self.files.next, pkcs8.as_ref()).map_err(|e| failed(&e))?;
        ledger.rotate_key(signer).map_err(|e| failed(&e))?;
        self.files.change()?;
        self.files.publish(&ledger)?;
        Ok((old, ledger.verifying_key().to_string()))
    }

    /// Removes full files with nothing but records before `keep_from`; the first record that is left.
    pub fn retain(&self, keep_from: u64) -> Result<u64, Failure> {
        let mut ledger = lock(&self.ledger);
        // The file that is written to is not full; what is in it goes on in another first.
        ledger.rotate_file().map_err(|e| failed(&e))?;
        ledger.retain(keep_from).map_err(|e| failed(&e))
    }

    /// Records what begins here: the program by its hash, what holds its roles, and the policy it goes by.
    pub fn record_start(&self, host: &str, policy: &str) -> Result<(), Failure> {
        let binary = own_hash().map_err(|e| failed(&e))?;
        self.record(Entry::started(Start {
            host,
            version: env!("CARGO_PKG_VERSION"),
            binary: &binary,
            policy,
            sandbox: crate::doctor::sandbox(),
        }))
    }

    /// Appends what belongs together with one wait for the disk; the last record is signed over.
    pub fn record_all(&self, before: Vec<Entry>, last: Entry) -> Result<(), Failure> {
        if !before.is_empty() {
            let mut ledger = lock(&self.ledger);
            ledger.append_all(before).map_err(|e| failed(&e))?;
        }
        self.record(last)
    }

    /// Appends a record and signs the tree over it. What cannot be recorded must not be done.
    pub fn record(&self, entry: Entry) -> Result<(), Failure> {
        let mut ledger = lock(&self.ledger);
        ledger.append_signed(entry).map_err(|e| failed(&e))?;
        // The record is durable; a file that could not be changed grows on and is tried again at the next record.
        if ledger.file_bytes() >= MAX_FILE
            && let Err(error) = ledger.rotate_file()
        {
            tracing::warn!("the ledger goes on in the same file: {error}");
        }
        Ok(())
    }

    /// Records so far, and bytes of the file that is written to.
    pub fn size(&self) -> (u64, u64) {
        let ledger = lock(&self.ledger);
        (ledger.tree().size(), ledger.file_bytes())
    }
}

/// SHA-256 of the program that runs, hex; of the very file, also if another has its name by now.
fn own_hash() -> io::Result<String> {
    let mut program = fs::File::open("/proc/self/exe")?;
    let mut context = digest::Context::new(&digest::SHA256);
    let mut block = vec![0; 1 << 20];
    loop {
        match program.read(&mut block)? {
            0 => return Ok(hex::encode(context.finish())),
            read => context.update(block.get(..read).unwrap_or_default()),
        }
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
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Puts new content in the place of a file that only its owner can read: whole, or not at all.
pub fn replace_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
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

/// The size from which the ledger goes on in a new file, in bytes; what a start reads.
const MAX_FILE: u64 = 64 << 20;
