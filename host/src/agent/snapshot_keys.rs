//! The host's key for snapshots, and the count of them: what makes a snapshot this host's and the newest.
//!
//! A snapshot's secret is HKDF-SHA-256 over the host's key with the snapshot's id as salt and the guest's as info: whoever
//! learns one opens one file. The host's key never leaves this process, nor the folder, where only root reads it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ring::hkdf;
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

/// Key and counts, in a folder of their own.
pub struct SnapshotKeys {
    folder: PathBuf,
}

impl SnapshotKeys {
    /// In the agent's state folder.
    pub fn at(state_dir: &Path) -> Self {
        Self {
            folder: state_dir.join("snapshots"),
        }
    }

    /// The secret of one snapshot of one guest.
    pub fn secret(
        &self,
        snapshot_id: &[u8; 16],
        vm_id: &[u8; 16],
    ) -> io::Result<Zeroizing<Vec<u8>>> {
        let key = self.host_key()?;
        let schedule = hkdf::Salt::new(hkdf::HKDF_SHA256, snapshot_id).extract(key.as_ref());
        let mut secret = Zeroizing::new(vec![0u8; 32]);
        let filled = schedule
            .expand(&[b"casemate-snapshot-key/1", vm_id], hkdf::HKDF_SHA256)
            .and_then(|okm| okm.fill(secret.as_mut()));
        filled.map_err(|_| io::Error::other("HKDF"))?;
        Ok(secret)
    }

    /// The generation of a guest's newest snapshot; 0 if it has none.
    pub fn newest(&self, vm_id: &[u8; 16]) -> io::Result<u64> {
        match fs::read_to_string(self.count(vm_id)) {
            Ok(text) => text.trim().parse().map_err(io::Error::other),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// Records a generation, durably; a failed snapshot leaves a gap, which does no harm.
    pub fn advance(&self, vm_id: &[u8; 16], generation: u64) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let path = self.count(vm_id);
        let fresh = path.with_extension("new");
        let mut file = File::create(&fresh)?;
        writeln!(file, "{generation}")?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        File::open(&self.folder)?.sync_all()
    }

    fn count(&self, vm_id: &[u8; 16]) -> PathBuf {
        self.folder.join(hex::encode(vm_id))
    }

    /// Read, or made at the first use.
    fn host_key(&self) -> io::Result<Zeroizing<[u8; 32]>> {
        let path = self.folder.join("host.key");
        let mut key = Zeroizing::new([0u8; 32]);
        match File::open(&path) {
            Ok(mut file) => {
                file.read_exact(key.as_mut())?;
                return Ok(key);
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        fs::create_dir_all(&self.folder)?;
        SystemRandom::new()
            .fill(key.as_mut())
            .map_err(|_| io::Error::other("the kernel gives no random bytes"))?;
        // Whole or not at all: half a key would be a key.
        let fresh = path.with_extension("new");
        let _ = fs::remove_file(&fresh);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(key.as_ref())?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        File::open(&self.folder)?.sync_all()?;
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_secret_is_of_one_snapshot_one_guest_and_one_host() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let keys = SnapshotKeys::at(here.path());
        let secret = |keys: &SnapshotKeys, id, vm| keys.secret(&[id; 16], &[vm; 16]).unwrap();
        let one = secret(&keys, 1, 1);
        assert_eq!(one, secret(&SnapshotKeys::at(here.path()), 1, 1));
        assert_ne!(one, secret(&keys, 2, 1));
        assert_ne!(one, secret(&keys, 1, 2));
        assert_ne!(one, secret(&SnapshotKeys::at(there.path()), 1, 1));
        let key = fs::metadata(here.path().join("snapshots/host.key")).unwrap();
        assert_eq!(key.permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_count_survives() {
        let folder = tempfile::tempdir().unwrap();
        let keys = SnapshotKeys::at(folder.path());
        assert_eq!(keys.newest(&[1; 16]).unwrap(), 0);
        keys.advance(&[1; 16], 3).unwrap();
        assert_eq!(SnapshotKeys::at(folder.path()).newest(&[1; 16]).unwrap(), 3);
        assert_eq!(keys.newest(&[2; 16]).unwrap(), 0);
    }
}
