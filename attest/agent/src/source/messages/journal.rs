//! What keeps two processes from using one sequence number, and a process from using it twice: a
//! locked file with the request whose reply has not been taken.
//!
//! It holds ciphertext only. Without it nothing is used twice either, but the guest may have no
//! way on after a lost reply.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_attest::processor::snp::MESSAGE_MAX;

use super::MessagesError;

/// Locked as long as it lives.
pub(super) struct Journal {
    file: File,
    path: PathBuf,
}

impl Journal {
    /// Waits at most `patience` for another process.
    pub(super) fn lock(path: &Path, patience: Duration) -> Result<Self, MessagesError> {
        let file = open(path).map_err(|error| failed("opened", path, error))?;
        let ends = Instant::now() + patience;
        loop {
            match file.try_lock() {
                Ok(()) => {
                    let path = path.to_owned();
                    return Ok(Self { file, path });
                }
                Err(TryLockError::WouldBlock) if Instant::now() >= ends => {
                    return Err(MessagesError::Busy(path.to_owned()));
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
                Err(TryLockError::Error(error)) => return Err(failed("locked", path, error)),
            }
        }
    }

    /// The request whose reply has not been taken; nothing, or no request at all, if there is none.
    pub(super) fn pending(&self) -> Result<Vec<u8>, MessagesError> {
        let mut request = vec![0; MESSAGE_MAX];
        let mut len = 0;
        while let Some(room) = request.get_mut(len..).filter(|room| !room.is_empty()) {
            match self.file.read_at(room, len as u64) {
                Ok(0) => break,
                Ok(count) => len += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed("read", &self.path, error)),
            }
        }
        request.truncate(len);
        Ok(request)
    }

    /// Keeps a request before it can go out.
    pub(super) fn keep(&self, request: &[u8]) -> Result<(), MessagesError> {
        self.file
            .write_all_at(request, 0)
            .and_then(|()| self.file.sync_data())
            .map_err(|error| failed("written", &self.path, error))
    }

    /// Its reply has been taken.
    pub(super) fn clear(&self) -> Result<(), MessagesError> {
        self.file
            .set_len(0)
            .map_err(|error| failed("written", &self.path, error))
    }
}

fn open(path: &Path) -> io::Result<File> {
    // An initramfs has no /run.
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

fn failed(doing: &'static str, path: &Path, error: io::Error) -> MessagesError {
    MessagesError::File {
        doing,
        path: path.to_owned(),
        error,
        remedy: "it takes root, and a writable folder",
    }
}

const PAUSE: Duration = Duration::from_millis(20);
