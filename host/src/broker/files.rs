//! Files that hold secrets or state: who may read them, and how they are replaced.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::config::CREDENTIAL;

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read or written.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others can read a secret.
    #[error("{file} may be read by others (mode {mode:o}); make it 0600 and your own")]
    Open {
        /// The file.
        file: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Longer than it may be.
    #[error("{file} is longer than {limit} bytes")]
    TooLong {
        /// The file.
        file: PathBuf,
        /// The bound.
        limit: u64,
    },
    /// Not a key.
    #[error(
        "{0} is no key: 64 hex digits or 32 bytes; make one with `(umask 077; head -c 32 /dev/urandom > FILE)`"
    )]
    Key(PathBuf),
    /// systemd gave no credentials.
    #[error(
        "there is no credential `{0}`: not started by systemd with LoadCredential= or LoadCredentialEncrypted="
    )]
    Credential(String),
}

/// Reads a secret that nobody else can read, at most `limit` bytes.
pub fn read_secret(path: &Path, limit: u64) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let failed = |source| FileError::Io {
        file: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode() & 0o777;
    let own = metadata.uid() == 0 || metadata.uid() == nix::unistd::geteuid().as_raw();
    if mode & 0o077 != 0 || !own {
        let file = path.to_owned();
        return Err(FileError::Open { file, mode });
    }
    read_at_most(file, path, limit).map(Zeroizing::new)
}

/// Reads a file of at most `limit` bytes; `None` where there is none.
pub fn read_if_there(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, FileError> {
    match File::open(path) {
        Ok(file) => read_at_most(file, path, limit).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FileError::Io {
            file: path.to_owned(),
            source,
        }),
    }
}

/// The 32-byte key that a configuration names.
pub fn read_key(name: &str) -> Result<Zeroizing<[u8; 32]>, FileError> {
    let path = match name.strip_prefix(CREDENTIAL) {
        None => PathBuf::from(name),
        Some(credential) => {
            let missing = || FileError::Credential(credential.to_owned());
            if credential.contains('/') {
                return Err(missing());
            }
            let folder = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(missing)?;
            Path::new(&folder).join(credential)
        }
    };
    let bytes = read_secret(&path, 128)?;
    let text = bytes.trim_ascii();
    let mut key = Zeroizing::new([0; 32]);
    if hex::decode_to_slice(text, key.as_mut()).is_ok() {
        return Ok(key);
    }
    match <[u8; 32]>::try_from(bytes.as_slice()) {
        Ok(raw) => Ok(Zeroizing::new(raw)),
        Err(_) => Err(FileError::Key(path)),
    }
}

/// Replaces a file whole or not at all, for its owner only, and on the disk when this returns.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    // Of a name alone the parent is the empty path, which no system call takes.
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    let folder = folder.unwrap_or(Path::new("."));
    let write = || {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let beside = path.with_file_name(name);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|source| FileError::Io {
        file: path.to_owned(),
        source,
    })
}

/// A lock that ends with the value, or with the process.
pub fn lock(path: &Path) -> Result<File, FileError> {
    let failed = |source| FileError::Io {
        file: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::Error(source)) => Err(failed(source)),
        Err(std::fs::TryLockError::WouldBlock) => {
            let busy = "in use by another casemate broker";
            Err(failed(io::Error::new(io::ErrorKind::WouldBlock, busy)))
        }
    }
}

fn read_at_most(file: File, path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    match read {
        Ok(len) if len as u64 > limit => Err(FileError::TooLong {
            file: path.to_owned(),
            limit,
        }),
        Ok(_) => Ok(bytes),
        Err(source) => Err(FileError::Io {
            file: path.to_owned(),
            source,
        }),
    }
}
