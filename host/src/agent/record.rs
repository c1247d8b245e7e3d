//! Who owns a guest: one small file a guest, written durably before the fact it records comes true.
//!
//! The epoch is the fence. It rises by one with each move, and a host runs a guest only under the epoch its own
//! record holds. After a cut no host guesses: a record that says `handing-over` keeps the guest stopped here.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The record of one guest on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ownership {
    /// The guest's identity, hex.
    pub vm_id: String,
    /// Ownership epoch.
    pub epoch: u64,
    /// Where ownership stands.
    pub state: OwnershipState,
    /// The peer it came from, goes to, or went to.
    pub peer: Option<String>,
}

/// Where ownership stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OwnershipState {
    /// This host runs the guest under `epoch`.
    Owner,
    /// The commit to `epoch` has been or is about to be sent; only the peer's answer decides.
    HandingOver,
    /// The peer confirmed that it runs the guest under `epoch`.
    HandedOver,
    /// It was to run here and never did; the peer keeps it under `epoch`.
    GivenBack,
    /// The guest ended here.
    Ended,
}

/// The folder of all records.
#[derive(Clone, Debug)]
pub struct Records {
    folder: PathBuf,
}

impl Records {
    /// Opens (and if need be makes) the folder.
    pub fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    /// Reads the record of a guest; none if this host never had it.
    pub fn read(&self, name: &str) -> io::Result<Option<Ownership>> {
        match fs::read(self.path(name)) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(io::Error::from),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Guests that have a record.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let file = entry?.file_name();
            let name = file.to_str().and_then(|file| file.strip_suffix(".json"));
            names.extend(name.map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// Writes a record; when this returns, it survives a power cut.
    pub fn write(&self, name: &str, record: &Ownership) -> io::Result<()> {
        let target = self.path(name);
        let fresh = target.with_extension("new");
        let mut file = File::create(&fresh)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        file.sync_all()?;
        fs::rename(&fresh, &target)?;
        File::open(&self.folder)?.sync_all()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back_and_a_broken_one_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path()).unwrap();
        assert_eq!(records.read("vault").unwrap(), None);
        let record = Ownership {
            vm_id: "00".into(),
            epoch: 3,
            state: OwnershipState::HandingOver,
            peer: Some("site-b".into()),
        };
        records.write("vault", &record).unwrap();
        assert_eq!(records.read("vault").unwrap(), Some(record));
        assert_eq!(records.names().unwrap(), ["vault"]);
        fs::write(folder.path().join("vault.json"), b"{").unwrap();
        assert!(records.read("vault").is_err());
    }
}
