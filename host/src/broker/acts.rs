//! What owners do to the store from the command line, on its way into the ledger.
//!
//! The ledger has one writer, the broker that serves. So who changes the store leaves a note before, and the broker takes
//! the notes into its ledger before the next record: no release stands there before the act that made it possible. The
//! notes lie in the state folder, which is as much believed as the ledger's key beside it.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use casemate_attest::broker::{ResourcePath, ResourceStore, StoreError};
use casemate_policy::Timestamp;
use casemate_policy::ledger::{Entry, Outcome};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::admin::StoreAdmin;
use super::files::{self, FileError};
use crate::agent::api::Failure;

/// The notes that no ledger has yet.
pub struct Acts {
    folder: PathBuf,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// A secret was put into the store.
    SecretPut,
    /// A secret was removed from it.
    SecretRemove,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    act: Act,
    at: Timestamp,
    resource: String,
    uid: u32,
}

impl Acts {
    /// The notes of the broker with this state folder.
    pub fn of(state_dir: &Path) -> Self {
        Self {
            folder: state_dir.join("store-acts"),
        }
    }

    /// Leaves a note, on the disk when this returns; the store may change then.
    pub fn note(&self, act: Act, resource: &ResourcePath) -> Result<Noted, FileError> {
        let mut id = [0; 8];
        let failed = |source| FileError::Io {
            file: self.folder.clone(),
            source,
        };
        SystemRandom::new()
            .fill(&mut id)
            .map_err(|_| failed(std::io::Error::other("no randomness")))?;
        std::fs::create_dir_all(&self.folder).map_err(failed)?;
        let now = SystemTime::now();
        let note = Note {
            act,
            at: Timestamp::of(now),
            resource: resource.to_string(),
            uid: nix::unistd::getuid().as_raw(),
        };
        let text = serde_json::to_vec(&note).map_err(|e| failed(e.into()))?;
        let since = now.duration_since(SystemTime::UNIX_EPOCH);
        let order = since.map_or(0, |since| since.as_nanos());
        let name = format!("{order:020}-{}.json", hex::encode(id));
        let path = self.folder.join(name);
        files::replace(&path, &text)?;
        Ok(Noted(path))
    }

    /// Hands each note to `record`, oldest first, and forgets it then: what is not recorded stays. After a crash between
    /// the two a note is recorded twice, never not at all.
    pub fn take(
        &self,
        broker: &str,
        mut record: impl FnMut(Entry) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let failed = |e: FileError| Failure::new("STORE_ACTS", e.to_string());
        for path in self.waiting().map_err(failed)? {
            let text = files::read_if_there(&path, MAX_NOTE).map_err(failed)?;
            record(entry(broker, &path, &text.unwrap_or_default()))?;
            std::fs::remove_file(&path)
                .map_err(|source| failed(FileError::Io { file: path, source }))?;
        }
        Ok(())
    }

    fn waiting(&self) -> Result<Vec<PathBuf>, FileError> {
        let failed = |source| FileError::Io {
            file: self.folder.clone(),
            source,
        };
        let entries = match std::fs::read_dir(&self.folder) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let paths = entries.map(|entry| Ok(entry.map_err(failed)?.path()));
        let mut paths = paths.collect::<Result<Vec<_>, FileError>>()?;
        // One that is being written is not there yet.
        paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
        paths.sort();
        Ok(paths)
    }
}

/// A store whose every change leaves a note.
pub struct Noting {
    /// The store.
    pub store: Box<dyn StoreAdmin>,
    /// Where the notes go.
    pub acts: Acts,
}

impl Noting {
    /// Does it, behind a note that stays if `did` finds that it was done.
    fn noted<T>(
        &self,
        act: Act,
        path: &ResourcePath,
        change: impl FnOnce() -> Result<T, StoreError>,
        did: impl FnOnce(&T) -> bool,
    ) -> Result<T, StoreError> {
        let note = self.acts.note(act, path);
        let note = note.map_err(|e| StoreError(e.to_string()))?;
        let changed = change();
        if !changed.as_ref().is_ok_and(did) {
            note.withdraw();
        }
        changed
    }
}

impl ResourceStore for Noting {
    fn get(&self, path: &ResourcePath) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError> {
        self.store.get(path)
    }
}

impl StoreAdmin for Noting {
    fn put(&self, path: &ResourcePath, secret: &[u8]) -> Result<(), StoreError> {
        self.noted(
            Act::SecretPut,
            path,
            || self.store.put(path, secret),
            |()| true,
        )
    }

    fn list(&self) -> Result<Vec<String>, StoreError> {
        self.store.list()
    }

    fn remove(&self, path: &ResourcePath) -> Result<bool, StoreError> {
        self.noted(
            Act::SecretRemove,
            path,
            || self.store.remove(path),
            |there| *there,
        )
    }
}

/// A note that was left. The store's change did not come about: [`Noted::withdraw`].
pub struct Noted(PathBuf);

impl Noted {
    /// Nothing was done after all. If the ledger has the note already it says more than happened, never less.
    pub fn withdraw(self) {
        let _ = std::fs::remove_file(self.0);
    }
}

/// A note that cannot be read is an act all the same, and no reason to stop.
fn entry(broker: &str, path: &Path, text: &[u8]) -> Entry {
    match serde_json::from_slice::<Note>(text) {
        Ok(note) => {
            let call = match note.act {
                Act::SecretPut => "secret-put",
                Act::SecretRemove => "secret-remove",
            };
            let who = format!("uid:{}", note.uid);
            Entry::called(&who, call, &note.resource, Outcome::Done).with("at", note.at.to_string())
        }
        Err(error) => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Entry::called(broker, "unreadable-note", &name, Outcome::Failed)
                .with("reason", error.to_string())
        }
    }
}

/// Longest note in bytes.
const MAX_NOTE: u64 = 4096;
