//! The default store: one file, sealed with AES-256-GCM.
//!
//! The header (format, generation, nonce) is authenticated with the content, so nothing in the file can be changed,
//! nor its parts recombined. Each write has the next generation; the highest that was ever seen is kept in the state
//! folder, and an older file is refused. Who can put *both* back cannot be noticed from inside one machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::broker::{MAX_SECRET_LEN, ResourcePath, ResourceStore, StoreError};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::{Zeroize, Zeroizing};

use super::admin::StoreAdmin;
use super::files::{self, FileError};

/// A sealed file and what it takes to open it.
pub struct SealedStore {
    file: PathBuf,
    seen: PathBuf,
    key: Zeroizing<[u8; 32]>,
}

/// Why a sealed file is not used.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not such a file.
    #[error("{0} is no sealed store of this version")]
    Format(PathBuf),
    /// Another key, or changed bytes.
    #[error(
        "{0} does not open: it was sealed with another key, or changed; restore it from a copy"
    )]
    Tampered(PathBuf),
    /// Older than what was seen before.
    #[error("{file} is generation {found}, but {seen} was seen before: an old copy was put back; if you did, remove {}", .record.display())]
    RolledBack {
        /// The file.
        file: PathBuf,
        /// Where the highest generation is kept.
        record: PathBuf,
        /// The file's.
        found: u64,
        /// The highest so far.
        seen: u64,
    },
    /// The record of the highest generation cannot be read.
    #[error("{0} holds no generation; if you trust the store as it is, remove it")]
    Record(PathBuf),
    /// More than fits.
    #[error("a store holds at most {MAX_ENTRIES} secrets of at most {MAX_SECRET_LEN} bytes each")]
    Full,
    /// ring gave no randomness or did not seal.
    #[error("the store could not be sealed")]
    Seal,
}

type Secrets = BTreeMap<String, Zeroizing<String>>;

impl SealedStore {
    /// The store in `file`, opened with `key`; `state_dir` keeps the highest generation.
    pub fn new(file: &Path, key: Zeroizing<[u8; 32]>, state_dir: &Path) -> Self {
        let mut name = file.file_name().unwrap_or_default().to_owned();
        name.push(".generation");
        Self {
            file: file.to_owned(),
            seen: state_dir.join(name),
            key,
        }
    }

    /// The generation and the secrets, in base64 as they are kept; 0 and none before the first write.
    fn load(&self) -> Result<(u64, Secrets), SealedError> {
        let seen = self.seen()?;
        let Some(bytes) = files::read_if_there(&self.file, MAX_FILE_LEN)? else {
            return self.not_rolled_back(0, seen, Secrets::new());
        };
        let (header, sealed) = bytes
            .split_at_checked(HEADER_LEN)
            .ok_or_else(|| SealedError::Format(self.file.clone()))?;
        let (generation, nonce) =
            parsed(header).ok_or_else(|| SealedError::Format(self.file.clone()))?;
        let mut text = Zeroizing::new(sealed.to_vec());
        let opened = self
            .cipher()?
            .open_in_place(nonce, Aad::from(header), &mut text)
            .map_err(|_| SealedError::Tampered(self.file.clone()))?;
        let secrets: BTreeMap<String, String> =
            serde_json::from_slice(opened).map_err(|_| SealedError::Format(self.file.clone()))?;
        let secrets = secrets.into_iter().map(|(k, v)| (k, Zeroizing::new(v)));
        self.not_rolled_back(generation, seen, secrets.collect())
    }

    fn not_rolled_back(
        &self,
        found: u64,
        seen: u64,
        secrets: Secrets,
    ) -> Result<(u64, Secrets), SealedError> {
        if found < seen {
            return Err(SealedError::RolledBack {
                file: self.file.clone(),
                record: self.seen.clone(),
                found,
                seen,
            });
        }
        Ok((found, secrets))
    }

    /// Changes the secrets under a lock, writes them as the next generation, and remembers that.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut Secrets) -> Result<T, SealedError>,
    ) -> Result<T, SealedError> {
        let mut name = self.file.file_name().unwrap_or_default().to_owned();
        name.push(".lock");
        let _lock = files::lock(&self.file.with_file_name(name))?;
        let (generation, mut secrets) = self.load()?;
        let done = change(&mut secrets)?;
        if secrets.len() > MAX_ENTRIES {
            return Err(SealedError::Full);
        }
        let next = generation.checked_add(1).ok_or(SealedError::Full)?;
        files::replace(&self.file, &self.sealed(next, &secrets)?)?;
        files::replace(&self.seen, format!("{next}\n").as_bytes())?;
        Ok(done)
    }

    fn sealed(&self, generation: u64, secrets: &Secrets) -> Result<Vec<u8>, SealedError> {
        let plain: BTreeMap<&str, &str> = secrets
            .iter()
            .map(|(path, text)| (path.as_str(), text.as_str()))
            .collect();
        let mut text = Zeroizing::new(serde_json::to_vec(&plain).map_err(|_| SealedError::Seal)?);
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new()
            .fill(&mut nonce)
            .map_err(|_| SealedError::Seal)?;
        let mut file = MAGIC.to_vec();
        file.extend(generation.to_be_bytes());
        file.extend(nonce);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self
            .cipher()?
            .seal_in_place_separate_tag(nonce, Aad::from(&file), &mut text)
            .map_err(|_| SealedError::Seal)?;
        file.extend_from_slice(&text);
        file.extend_from_slice(tag.as_ref());
        Ok(file)
    }

    fn seen(&self) -> Result<u64, SealedError> {
        let Some(text) = files::read_if_there(&self.seen, 32)? else {
            return Ok(0);
        };
        let number = std::str::from_utf8(&text).ok();
        number
            .and_then(|text| text.trim_end().parse().ok())
            .ok_or_else(|| SealedError::Record(self.seen.clone()))
    }

    fn cipher(&self) -> Result<LessSafeKey, SealedError> {
        UnboundKey::new(&AES_256_GCM, self.key.as_ref())
            .map(LessSafeKey::new)
            .map_err(|_| SealedError::Seal)
    }
}

impl ResourceStore for SealedStore {
    // The file is opened anew each time, so that what an owner puts or removes counts at once.
    fn get(&self, path: &ResourcePath) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError> {
        let (_, secrets) = self.load().map_err(|e| StoreError(e.to_string()))?;
        let Some(text) = secrets.get(path.as_str()) else {
            return Ok(None);
        };
        let secret = STANDARD
            .decode(text.as_bytes())
            .map_err(|_| StoreError("an entry is no base64".to_owned()))?;
        Ok(Some(Zeroizing::new(secret)))
    }
}

impl StoreAdmin for SealedStore {
    fn put(&self, path: &ResourcePath, secret: &[u8]) -> Result<(), StoreError> {
        let put = |secrets: &mut Secrets| {
            if secret.len() > MAX_SECRET_LEN {
                return Err(SealedError::Full);
            }
            let text = Zeroizing::new(STANDARD.encode(secret));
            secrets.insert(path.as_str().to_owned(), text);
            Ok(())
        };
        self.change(put).map_err(|e| StoreError(e.to_string()))
    }

    fn list(&self) -> Result<Vec<String>, StoreError> {
        let (_, secrets) = self.load().map_err(|e| StoreError(e.to_string()))?;
        Ok(secrets.keys().cloned().collect())
    }

    fn remove(&self, path: &ResourcePath) -> Result<bool, StoreError> {
        let remove = |secrets: &mut Secrets| {
            let removed = secrets.remove(path.as_str());
            Ok(removed.map(|mut text| text.zeroize()).is_some())
        };
        self.change(remove).map_err(|e| StoreError(e.to_string()))
    }
}

fn parsed(header: &[u8]) -> Option<(u64, Nonce)> {
    let rest = header.strip_prefix(MAGIC)?;
    let (generation, nonce) = rest.split_first_chunk::<8>()?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
    Some((u64::from_be_bytes(*generation), nonce))
}

/// The last byte is the format's version.
const MAGIC: &[u8; 16] = b"CASEMATE-SEALED\x01";
const HEADER_LEN: usize = MAGIC.len() + 8 + NONCE_LEN;
const MAX_ENTRIES: usize = 4096;
const MAX_FILE_LEN: u64 = 512 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    struct Case {
        folder: tempfile::TempDir,
    }

    impl Case {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            std::fs::create_dir(folder.path().join("state")).unwrap();
            Self { folder }
        }

        fn file(&self) -> PathBuf {
            self.folder.path().join("secrets.sealed")
        }

        fn store(&self, key: u8) -> SealedStore {
            let state = self.folder.path().join("state");
            SealedStore::new(&self.file(), Zeroizing::new([key; 32]), &state)
        }
    }

    fn path(text: &str) -> ResourcePath {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_put_is_there_until_removed() {
        let case = Case::new();
        let store = case.store(1);
        let disk = path("default/key/disk");
        assert!(store.get(&disk).unwrap().is_none());
        store.put(&disk, b"\x00secret\xff").unwrap();
        store.put(&path("default/key/other"), b"").unwrap();
        let again = case.store(1);
        assert_eq!(
            again.get(&disk).unwrap().unwrap().as_slice(),
            b"\x00secret\xff"
        );
        assert_eq!(
            again.list().unwrap(),
            ["default/key/disk", "default/key/other"]
        );
        assert!(again.remove(&disk).unwrap());
        assert!(!again.remove(&disk).unwrap());
        assert!(store.get(&disk).unwrap().is_none());
        let raw = std::fs::read(case.file()).unwrap();
        assert!(!raw.windows(6).any(|window| window == b"secret"));
        assert!(store.put(&disk, &vec![0; MAX_SECRET_LEN + 1]).is_err());
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(case.file()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn no_byte_can_be_changed_and_another_key_does_not_open() {
        let case = Case::new();
        let disk = path("default/key/disk");
        case.store(1).put(&disk, b"secret").unwrap();
        let good = std::fs::read(case.file()).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(case.file(), bad).unwrap();
            assert!(case.store(1).get(&disk).is_err(), "byte {at}");
        }
        std::fs::write(case.file(), &good[..good.len() - 1]).unwrap();
        assert!(case.store(1).get(&disk).is_err());
        std::fs::write(case.file(), &good).unwrap();
        assert!(case.store(2).get(&disk).is_err());
        assert!(case.store(1).get(&disk).is_ok());
    }

    #[test]
    fn an_old_copy_is_noticed() {
        let case = Case::new();
        let disk = path("default/key/disk");
        case.store(1).put(&disk, b"revoked").unwrap();
        let old = std::fs::read(case.file()).unwrap();
        case.store(1).remove(&disk).unwrap();
        std::fs::write(case.file(), old).unwrap();
        let refused = case.store(1).get(&disk).unwrap_err().to_string();
        assert!(refused.contains("generation 1, but 2"), "{refused}");
        assert!(case.store(1).put(&disk, b"new").is_err());
        std::fs::remove_file(case.file()).unwrap();
        let refused = case.store(1).get(&disk).unwrap_err().to_string();
        assert!(refused.contains("generation 0, but 2"), "{refused}");
    }

    #[test]
    fn a_key_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let name = path.to_str().unwrap();
        let write = |bytes: &[u8], mode: u32| {
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        write("ab".repeat(32).as_bytes(), 0o600);
        assert_eq!(*files::read_key(name).unwrap(), [0xab; 32]);
        write(format!("{}\n", "ab".repeat(32)).as_bytes(), 0o400);
        assert_eq!(*files::read_key(name).unwrap(), [0xab; 32]);
        write(&[7; 32], 0o600);
        assert_eq!(*files::read_key(name).unwrap(), [7; 32]);
        write(&[7; 31], 0o600);
        assert!(files::read_key(name).is_err());
        for mode in [0o640, 0o604, 0o660] {
            write(&[7; 32], mode);
            let refused = files::read_key(name).unwrap_err().to_string();
            assert!(refused.contains("0600"), "{refused}");
        }
        assert!(files::read_key("credential:none").is_err());
        assert!(files::read_key("credential:../key").is_err());
    }
}
