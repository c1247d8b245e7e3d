//! The number of a broker's start: advanced and on the disk before the first nonce is made.

use std::fs::File;
use std::path::Path;

use casemate_attest::broker::Epoch;

use super::files::{self, FileError};

/// The state folder of a running broker. No other broker can have it at the same time.
pub struct State {
    epoch: Epoch,
    _lock: File,
}

/// Why there is no epoch.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file of the folder.
    #[error("broker state: {0}")]
    File(#[from] FileError),
    /// The folder cannot be made.
    #[error("broker state {0}: {1}")]
    Folder(String, std::io::Error),
    /// The file does not hold a number that can be advanced.
    #[error(
        "broker state {0} holds no epoch; only if no copy of this folder is in use elsewhere, remove it"
    )]
    Damaged(String),
}

impl State {
    /// Takes the folder and advances its epoch.
    pub fn open(folder: &Path) -> Result<Self, StateError> {
        std::fs::create_dir_all(folder)
            .map_err(|e| StateError::Folder(folder.display().to_string(), e))?;
        let lock = files::lock(&folder.join("lock"))?;
        let path = folder.join("epoch");
        let number = match files::read_if_there(&path, MAX_LEN)? {
            None => 1,
            Some(text) => {
                advanced(&text).ok_or_else(|| StateError::Damaged(path.display().to_string()))?
            }
        };
        files::replace(&path, format!("{number}\n").as_bytes())?;
        Ok(Self {
            epoch: Epoch::durable(number),
            _lock: lock,
        })
    }

    /// The epoch of this start.
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }
}

fn advanced(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    text.trim_end().parse::<u64>().ok()?.checked_add(1)
}

const MAX_LEN: u64 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_has_its_own_epoch_and_one_broker_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        for number in 1..=3 {
            let state = State::open(folder.path()).unwrap();
            assert_eq!(state.epoch(), Epoch::durable(number));
            let second = State::open(folder.path()).err().unwrap().to_string();
            assert!(second.contains("another casemate broker"), "{second}");
        }
        let kept = std::fs::read_to_string(folder.path().join("epoch")).unwrap();
        assert_eq!(kept, "3\n");
        for damaged in ["", "x", "-1", "18446744073709551615"] {
            std::fs::write(folder.path().join("epoch"), damaged).unwrap();
            assert!(State::open(folder.path()).is_err(), "{damaged:?}");
        }
    }
}
