//! Where a ledger's files are: `ledger`, which is written to, `ledger.<first record>`, which are full, `ledger.tiles`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};

use super::LedgerError;
use super::chain;
use super::frame::{self, Kind};
use super::note::VerifyingKey;
use super::record::Record;

/// The full files of a ledger, oldest first.
pub(super) fn closed(path: &Path) -> Result<Vec<PathBuf>, LedgerError> {
    let mut found = Vec::new();
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return Ok(found);
    };
    for entry in fs::read_dir(folder(path)).map_err(LedgerError::Io)? {
        let entry = entry.map_err(LedgerError::Io)?;
        let file = entry.file_name();
        let rest = file.to_str().and_then(|file| file.strip_prefix(name));
        if rest.is_some_and(is_number) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// The name of the file whose first record is this one.
pub(super) fn numbered(path: &Path, first: u64) -> PathBuf {
    with_suffix(path, &format!(".{first:020}"))
}

/// The first record of a full file.
pub(super) fn first_of(closed: &Path) -> Option<u64> {
    closed.extension()?.to_str()?.parse().ok()
}

/// The folder of tiles.
pub(super) fn tiles(path: &Path) -> PathBuf {
    with_suffix(path, ".tiles")
}

/// The folder of checkpoints that witnesses have co-signed.
pub(super) fn cosigned(path: &Path) -> PathBuf {
    with_suffix(path, ".cosigned")
}

/// The next file, while it is being made.
pub(super) fn fresh(path: &Path) -> PathBuf {
    with_suffix(path, ".new")
}

/// Finishes the change of files that a crash interrupted: the old one has its number, the next is whole (it was
/// synchronised before) and has not got its name.
pub(super) fn resume(path: &Path) -> Result<(), LedgerError> {
    let fresh = fresh(path);
    let there = |path: &Path| path.try_exists().map_err(LedgerError::Io);
    if there(&fresh)? && !there(path)? {
        fs::rename(&fresh, path).map_err(LedgerError::Io)?;
        sync_folder(path)?;
    }
    Ok(())
}

/// Removes a next file that never got its name. The caller holds the ledger.
pub(super) fn forget(path: &Path) -> Result<(), LedgerError> {
    match fs::remove_file(fresh(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(LedgerError::Io(error)),
        _ => Ok(()),
    }
}

/// Makes names in the ledger's folder durable.
pub(super) fn sync_folder(path: &Path) -> Result<(), LedgerError> {
    File::open(folder(path))
        .and_then(|directory| directory.sync_all())
        .map_err(LedgerError::Io)
}

/// The key before the first rotation in any of the files, as that record claims.
pub(super) fn first_rotation(path: &Path) -> Option<VerifyingKey> {
    let mut files = closed(path).ok()?;
    files.push(path.to_owned());
    files
        .iter()
        .find_map(|file| rotation_in(file).ok().flatten())
}

fn rotation_in(file: &Path) -> io::Result<Option<VerifyingKey>> {
    let mut reader = BufReader::with_capacity(256 << 10, File::open(file)?);
    let mut line = Vec::new();
    loop {
        line.clear();
        let longest = frame::MAX_PAYLOAD as u64 + 64;
        if (&mut reader).take(longest).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        let decoded = line.strip_suffix(b"\n").and_then(frame::decode);
        let Some((Kind::Record, payload)) = decoded else {
            continue;
        };
        // Cheap first: canonical JSON has the action first, in one spelling.
        if !payload.starts_with("{\"action\":\"rotate-key\"") {
            continue;
        }
        let key = Record::from_canonical(payload).and_then(|record| chain::old_key(&record));
        if key.is_some() {
            return Ok(key);
        }
    }
}

fn folder(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn is_number(rest: &str) -> bool {
    rest.strip_prefix('.').is_some_and(|digits| {
        digits.len() == 20 && digits.bytes().all(|digit| digit.is_ascii_digit())
    })
}
