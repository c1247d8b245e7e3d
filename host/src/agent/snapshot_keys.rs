//! The keys of snapshots, and the count of them: what makes a snapshot this host's, the newest, and one that can be opened.
//!
//! Each snapshot has a random key of its own. It lies in the agent's state folder under the operator's key, which is not
//! there: who copies state folder and snapshots, or finds their disk, has nothing. What a mover gets is HKDF over the
//! snapshot's key, so that a mover that was broken into has one file. A snapshot whose key is gone is noise.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::agent::config::SnapshotConfig;
use crate::agent::files;
use crate::machine::saved::{Format, FormatError};

/// Keys and counts, in a folder of their own.
pub struct SnapshotKeys {
    state_dir: PathBuf,
    operator: Option<SnapshotConfig>,
}

/// Whose a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotOf<'a> {
    /// The snapshot's id.
    pub snapshot_id: &'a [u8; 16],
    /// The guest's identity.
    pub vm_id: &'a [u8; 16],
}

impl SnapshotKeys {
    /// In the agent's state folder, under the operator's key, if its configuration names one.
    pub fn at(state_dir: &Path, operator: Option<&SnapshotConfig>) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
            operator: operator.cloned(),
        }
    }

    /// Makes the key of a new snapshot of the guest `name`, durably, and gives the secret for its file.
    pub fn make(&self, of: SnapshotOf<'_>, name: &str) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let wrapping = self.operator_key()?;
        let mut key = Zeroizing::new([0u8; KEY]);
        random(key.as_mut())?;
        self.keep(&wrapping.wrap(of, name, &key)?, of.snapshot_id)?;
        derive(&*key, of.snapshot_id, &[SECRET, of.vm_id])
    }

    /// The secret of a snapshot. A key that is still under the operator's previous one is put under the present one.
    pub fn secret(&self, of: SnapshotOf<'_>) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let present = self.operator_key()?;
        let kept = self.kept(of.snapshot_id)?;
        let key = if kept.under == present.id {
            present.unwrap(of, &kept)?
        } else {
            let previous = self.previous_key()?;
            let previous = previous.filter(|key| key.id == kept.under);
            let key = previous.ok_or(KeyError::Other)?.unwrap(of, &kept)?;
            self.keep(&present.wrap(of, &kept.name, &key)?, of.snapshot_id)?;
            key
        };
        derive(&*key, of.snapshot_id, &[SECRET, of.vm_id])
    }

    /// The name of the guest that a snapshot was taken of.
    pub fn name(&self, snapshot_id: &[u8; 16]) -> Result<String, KeyError> {
        Ok(self.kept(snapshot_id)?.name)
    }

    /// Destroys the key of a snapshot: its bytes are written over, then it is removed.
    pub fn erase(&self, snapshot_id: &[u8; 16]) -> Result<(), KeyError> {
        let path = self.path(snapshot_id);
        let file = OpenOptions::new().write(true).open(&path);
        let mut file = file.map_err(|e| gone_or(e, &path))?;
        let failed = |e| KeyError::File(path.clone(), e);
        let length = file.metadata().map_err(failed)?.len().min(KEPT.max as u64);
        io::copy(&mut io::repeat(0).take(length), &mut file).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        fs::remove_file(&path).map_err(failed)?;
        self.sync(&self.keys())
    }

    /// The generation of a guest's newest snapshot; 0 if it has none.
    pub fn newest(&self, vm_id: &[u8; 16]) -> Result<u64, KeyError> {
        let path = self.count(vm_id);
        let failed = |e| KeyError::File(path.clone(), e);
        match fs::read_to_string(&path) {
            Ok(text) => text
                .trim()
                .parse()
                .map_err(io::Error::other)
                .map_err(failed),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(e) => Err(failed(e)),
        }
    }

    /// Records a generation, durably; a failed snapshot leaves a gap, which does no harm.
    pub fn advance(&self, vm_id: &[u8; 16], generation: u64) -> Result<(), KeyError> {
        let path = self.count(vm_id);
        self.write_whole(&path, format!("{generation}\n").as_bytes())
    }

    fn folder(&self) -> PathBuf {
        self.state_dir.join("snapshots")
    }

    fn keys(&self) -> PathBuf {
        self.folder().join("keys")
    }

    fn path(&self, snapshot_id: &[u8; 16]) -> PathBuf {
        self.keys().join(hex::encode(snapshot_id))
    }

    fn count(&self, vm_id: &[u8; 16]) -> PathBuf {
        self.folder().join(hex::encode(vm_id))
    }

    fn kept(&self, snapshot_id: &[u8; 16]) -> Result<KeptKey, KeyError> {
        let path = self.path(snapshot_id);
        let file = File::open(&path).map_err(|e| gone_or(e, &path))?;
        let mut bytes = Vec::new();
        file.take(KEPT.max as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| KeyError::File(path.clone(), e))?;
        KEPT.decode(&bytes).map_err(|e| KeyError::Format(path, e))
    }

    fn keep(&self, kept: &KeptKey, snapshot_id: &[u8; 16]) -> Result<(), KeyError> {
        let path = self.path(snapshot_id);
        let bytes = KEPT
            .encode(kept)
            .map_err(|e| KeyError::Format(path.clone(), e))?;
        self.write_whole(&path, &bytes)
    }

    /// Whole or not at all: half a key would be a key.
    fn write_whole(&self, path: &Path, bytes: &[u8]) -> Result<(), KeyError> {
        let folder = path.parent().unwrap_or(&self.state_dir).to_owned();
        let fresh = path.with_extension("new");
        let write = || {
            fs::create_dir_all(&folder)?;
            let _ = fs::remove_file(&fresh);
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&fresh, path)
        };
        write().map_err(|e| KeyError::File(path.to_owned(), e))?;
        self.sync(&folder)
    }

    fn sync(&self, folder: &Path) -> Result<(), KeyError> {
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|e| KeyError::File(folder.to_owned(), e))
    }

    fn operator_key(&self) -> Result<OperatorKey, KeyError> {
        let config = self.operator.as_ref().ok_or(KeyError::NotConfigured)?;
        OperatorKey::read(&config.key, &self.state_dir)
    }

    fn previous_key(&self) -> Result<Option<OperatorKey>, KeyError> {
        let previous = self.operator.as_ref();
        let previous = previous.and_then(|config| config.previous_key.as_ref());
        previous
            .map(|path| OperatorKey::read(path, &self.state_dir))
            .transpose()
    }
}

/// The operator's key, as long as it is needed.
struct OperatorKey {
    bytes: Zeroizing<Vec<u8>>,
    /// Tells it from others, and says nothing of it.
    id: [u8; 8],
}

impl OperatorKey {
    /// Read anew each time: who takes the file away takes the snapshots away.
    fn read(path: &Path, state_dir: &Path) -> Result<Self, KeyError> {
        let real = files::real(path);
        let refuse = |why: &str| KeyError::Operator(path.to_owned(), why.to_owned());
        if real.starts_with(files::real(state_dir)) {
            return Err(refuse(
                "it is in the agent's state folder, whose copies it shall protect; keep it elsewhere",
            ));
        }
        let file = files::open(&real, false).map_err(|e| refuse(&e.to_string()))?;
        let found = file.metadata().map_err(|e| refuse(&e.to_string()))?;
        if found.mode() & 0o077 != 0 {
            return Err(refuse("others than its owner may use it; chmod 600"));
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_OPERATOR + 1));
        file.take(MAX_OPERATOR as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| refuse(&e.to_string()))?;
        if !(KEY..=MAX_OPERATOR).contains(&bytes.len()) {
            return Err(refuse(
                "it has less than 32 bytes or more than 4096; make one with `openssl rand -out FILE 32`",
            ));
        }
        let id = derive(&bytes, b"", &[OPERATOR_ID])?;
        let id = id.first_chunk().copied().unwrap_or_default();
        Ok(Self { bytes, id })
    }

    fn wrap(&self, of: SnapshotOf<'_>, name: &str, key: &[u8; KEY]) -> Result<KeptKey, KeyError> {
        let mut kept = KeptKey {
            name: name.to_owned(),
            under: self.id,
            nonce: [0; NONCE_LEN],
            wrapped: key.to_vec(),
        };
        random(&mut kept.nonce)?;
        let sealed = self.cipher(of.snapshot_id)?.seal_in_place_append_tag(
            Nonce::assume_unique_for_key(kept.nonce),
            Aad::from(bound(of, name)),
            &mut kept.wrapped,
        );
        sealed.map_err(|_| KeyError::Crypto)?;
        Ok(kept)
    }

    fn unwrap(&self, of: SnapshotOf<'_>, kept: &KeptKey) -> Result<Zeroizing<[u8; KEY]>, KeyError> {
        let mut bytes = Zeroizing::new(kept.wrapped.clone());
        let cipher = self.cipher(of.snapshot_id)?;
        let opened = cipher.open_in_place(
            Nonce::assume_unique_for_key(kept.nonce),
            Aad::from(bound(of, &kept.name)),
            &mut bytes,
        );
        let opened = opened.map_err(|_| KeyError::Changed)?;
        let key = <[u8; KEY]>::try_from(&*opened).map_err(|_| KeyError::Changed)?;
        Ok(Zeroizing::new(key))
    }

    /// A key for one snapshot's key: random nonces never come near their bound.
    fn cipher(&self, snapshot_id: &[u8; 16]) -> Result<LessSafeKey, KeyError> {
        let key = derive(&self.bytes, snapshot_id, &[WRAP])?;
        let key = UnboundKey::new(&AES_256_GCM, &key).map_err(|_| KeyError::Crypto)?;
        Ok(LessSafeKey::new(key))
    }
}

/// A snapshot's key as it lies in the folder. Version 1.
#[derive(Serialize, Deserialize)]
struct KeptKey {
    /// The guest's name when it was taken.
    name: String,
    /// Which of the operator's keys it is under.
    under: [u8; 8],
    nonce: [u8; NONCE_LEN],
    /// Key and tag.
    #[serde(with = "serde_bytes")]
    wrapped: Vec<u8>,
}

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// No key of the operator's is configured.
    #[error(
        "this host has no key for snapshots; name one in the agent's configuration: [snapshots] key = \"…\", a file of 32 \
         random bytes"
    )]
    NotConfigured,
    /// The operator's key cannot be used.
    #[error("the operator's key for snapshots, {0}, cannot be used: {1}")]
    Operator(PathBuf, String),
    /// The snapshot's key is under a key that is not here.
    #[error(
        "the snapshot's key is under another key of the operator's; name that one as `previous_key` in [snapshots]"
    )]
    Other,
    /// There is no key.
    #[error(
        "this host has no key of this snapshot: another host sealed it, an older casemate did, or its key was erased"
    )]
    Gone,
    /// The kept key does not open.
    #[error("the snapshot's key was changed, or is of another snapshot")]
    Changed,
    /// Bytes that are no kept key of this version.
    #[error("{0}: {1}")]
    Format(PathBuf, #[source] FormatError),
    /// A file.
    #[error("{0}: {1}")]
    File(PathBuf, #[source] io::Error),
    /// No random bytes, or a key that is none.
    #[error("the cryptography of this host failed")]
    Crypto,
}

impl KeyError {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Gone => "SNAPSHOT_KEY_GONE",
            _ => "SNAPSHOT_KEY",
        }
    }
}

fn gone_or(error: io::Error, path: &Path) -> KeyError {
    match error.kind() {
        io::ErrorKind::NotFound => KeyError::Gone,
        _ => KeyError::File(path.to_owned(), error),
    }
}

fn bound(of: SnapshotOf<'_>, name: &str) -> Vec<u8> {
    [WRAP, of.snapshot_id, of.vm_id, name.as_bytes()].concat()
}

fn random(bytes: &mut [u8]) -> Result<(), KeyError> {
    SystemRandom::new()
        .fill(bytes)
        .map_err(|_| KeyError::Crypto)
}

fn derive(key: &[u8], salt: &[u8], info: &[&[u8]]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let mut secret = Zeroizing::new(vec![0u8; KEY]);
    let schedule = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(key);
    let filled = schedule
        .expand(info, hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(secret.as_mut()));
    filled.map_err(|_| KeyError::Crypto)?;
    Ok(secret)
}

const KEPT: Format = Format {
    name: "snapshot key",
    tag: *b"CSMT-SKY",
    version: 1,
    max: 512,
};
const KEY: usize = 32;
const MAX_OPERATOR: usize = 4096;
const SECRET: &[u8] = b"casemate-snapshot-key/2";
const WRAP: &[u8] = b"casemate-snapshot-wrap/1";
const OPERATOR_ID: &[u8] = b"casemate-snapshot-operator/1";

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            place.key("one", &[1; 32]);
            place
        }

        fn key(&self, name: &str, bytes: &[u8]) -> PathBuf {
            let path = self.0.path().join(name);
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            path
        }

        fn keys(&self, key: &str, previous: Option<&str>) -> SnapshotKeys {
            let config = SnapshotConfig {
                key: self.0.path().join(key),
                previous_key: previous.map(|name| self.0.path().join(name)),
            };
            SnapshotKeys::at(&self.0.path().join("state"), Some(&config))
        }

        fn kept(&self, snapshot: u8) -> PathBuf {
            let name = hex::encode([snapshot; 16]);
            self.0.path().join("state/snapshots/keys").join(name)
        }
    }

    fn of<'a>(snapshot_id: &'a [u8; 16], vm_id: &'a [u8; 16]) -> SnapshotOf<'a> {
        SnapshotOf { snapshot_id, vm_id }
    }

    #[test]
    fn a_secret_is_of_one_snapshot_one_guest_and_one_host() {
        let (here, there) = (Place::new(), Place::new());
        let keys = here.keys("one", None);
        let first = keys.make(of(&[1; 16], &[1; 16]), "vault").unwrap();
        let second = keys.make(of(&[2; 16], &[1; 16]), "vault").unwrap();
        assert_ne!(first, second);
        let again = here.keys("one", None);
        assert_eq!(again.secret(of(&[1; 16], &[1; 16])).unwrap(), first);
        assert_eq!(again.name(&[1; 16]).unwrap(), "vault");
        let refused =
            |keys: &SnapshotKeys, id, vm| keys.secret(of(&[id; 16], &[vm; 16])).unwrap_err();
        assert!(matches!(refused(&again, 1, 2), KeyError::Changed));
        assert!(matches!(refused(&again, 3, 1), KeyError::Gone));
        let elsewhere = there.keys("one", None);
        assert_eq!(refused(&elsewhere, 1, 1).code(), "SNAPSHOT_KEY_GONE");
        // Another snapshot's key in its place is none.
        fs::copy(here.kept(2), here.kept(1)).unwrap();
        assert!(matches!(refused(&again, 1, 1), KeyError::Changed));
        let mode = fs::metadata(here.kept(2)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn nothing_of_a_key_is_in_the_state_folder_and_without_the_operators_there_is_none() {
        let place = Place::new();
        let keys = place.keys("one", None);
        let secret = keys.make(of(&[1; 16], &[1; 16]), "vault").unwrap();
        let kept = fs::read(place.kept(1)).unwrap();
        assert!(
            !kept
                .windows(16)
                .any(|part| secret.windows(16).any(|s| s == part))
        );
        assert!(
            !kept.windows(8).any(|part| part == [1u8; 8]),
            "the operator's"
        );
        let unconfigured = SnapshotKeys::at(&place.0.path().join("state"), None);
        let refused = |keys: &SnapshotKeys| {
            let made = keys.make(of(&[9; 16], &[1; 16]), "vault").unwrap_err();
            let read = keys.secret(of(&[1; 16], &[1; 16])).unwrap_err();
            assert_eq!(made.to_string(), read.to_string());
            assert_eq!(made.code(), "SNAPSHOT_KEY");
            made.to_string()
        };
        assert!(refused(&unconfigured).contains("[snapshots] key"));
        fs::remove_file(place.0.path().join("one")).unwrap();
        assert!(refused(&keys).contains("No such file"));
        let open = place.key("one", &[1; 32]);
        fs::set_permissions(&open, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(refused(&keys).contains("chmod 600"));
        for length in [0, 31, 4097] {
            place.key("one", &vec![1; length]);
            assert!(refused(&keys).contains("less than 32 bytes"));
        }
        let inside = place.key("state/inside", &[1; 32]);
        let keys = place.keys(inside.to_str().unwrap(), None);
        assert!(refused(&keys).contains("state folder"));
        assert!(!place.kept(9).exists());
    }

    #[test]
    fn another_key_of_the_operators_takes_over_and_the_old_one_may_go() {
        let place = Place::new();
        let secret = place
            .keys("one", None)
            .make(of(&[1; 16], &[1; 16]), "vault");
        let secret = secret.unwrap();
        place.key("two", &[2; 40]);
        let two = place.keys("two", None);
        let refused = two.secret(of(&[1; 16], &[1; 16])).unwrap_err();
        assert!(matches!(refused, KeyError::Other));
        let both = place.keys("two", Some("one"));
        assert_eq!(both.secret(of(&[1; 16], &[1; 16])).unwrap(), secret);
        assert_eq!(two.secret(of(&[1; 16], &[1; 16])).unwrap(), secret);
        let one = place.keys("one", None).secret(of(&[1; 16], &[1; 16]));
        assert!(matches!(one.unwrap_err(), KeyError::Other));
    }

    #[test]
    fn an_erased_key_is_gone_for_good_and_the_others_stay() {
        let place = Place::new();
        let keys = place.keys("one", None);
        for snapshot in [1, 2] {
            keys.make(of(&[snapshot; 16], &[1; 16]), "vault").unwrap();
        }
        // Whoever holds the file open sees its bytes go.
        let mut held = File::open(place.kept(1)).unwrap();
        keys.erase(&[1; 16]).unwrap();
        let mut bytes = Vec::new();
        held.read_to_end(&mut bytes).unwrap();
        assert!(bytes.len() > 32 && bytes.iter().all(|byte| *byte == 0));
        let gone = keys.secret(of(&[1; 16], &[1; 16])).unwrap_err();
        assert_eq!(gone.code(), "SNAPSHOT_KEY_GONE");
        assert!(matches!(keys.erase(&[1; 16]).unwrap_err(), KeyError::Gone));
        keys.secret(of(&[2; 16], &[1; 16])).unwrap();
    }

    #[test]
    fn the_count_survives() {
        let place = Place::new();
        let keys = place.keys("one", None);
        assert_eq!(keys.newest(&[1; 16]).unwrap(), 0);
        keys.advance(&[1; 16], 3).unwrap();
        assert_eq!(place.keys("one", None).newest(&[1; 16]).unwrap(), 3);
        assert_eq!(keys.newest(&[2; 16]).unwrap(), 0);
    }
}
