//! What makes a guest of a snapshot another guest: identity, addresses, and disks of its own.
//!
//! Two clones share nothing that either can write: each disk is copied while nobody may write to it, in a way that lets
//! the file system share blocks until one of them is written (`copy_file_range(2)`). What a guest can only read is shared.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::agent::api::Failure;
use crate::agent::guest::Local;
use crate::agent::{files, launch};
use crate::image_file::{Hold, hold, next_data};
use crate::machine::plan::MachinePlan;

/// A plan's own copy: name, identity, addresses and context id are another guest's. `taken` are the context ids of the
/// guests that run here.
pub(super) fn identity(plan: &mut MachinePlan, name: &str, taken: &[u32]) -> Result<(), Failure> {
    name.clone_into(&mut plan.name);
    plan.vm_id = launch::random_id()?;
    for net in &mut plan.nets {
        let [a, b, c, d, e, f, ..] = launch::random_id()?;
        // Locally administered, unicast.
        net.mac = [a & 0xfc | 0x02, b, c, d, e, f];
        // Those are the addresses of the guest that it was.
        net.announce.clear();
    }
    if plan.vsock_cid.is_some() {
        plan.vsock_cid = Some(context_id(taken)?);
    }
    Ok(())
}

fn context_id(taken: &[u32]) -> Result<u32, Failure> {
    loop {
        let [a, b, c, d, ..] = launch::random_id()?;
        let cid = u32::from_le_bytes([a, b, c, d]) >> 1;
        if cid >= FIRST_CID && !taken.contains(&cid) {
            return Ok(cid);
        }
    }
}

/// Disks that were copied for a guest; gone again with this, unless they are kept.
#[derive(Default)]
pub(super) struct Copies {
    made: Vec<PathBuf>,
    kept: bool,
}

impl Copies {
    /// Gives the guest copies of all disks that it can write, in `folder`.
    pub(super) fn make(
        &mut self,
        plan: &MachinePlan,
        local: &mut Local,
        folder: &Path,
    ) -> Result<(), Failure> {
        for (path, disk) in local.disks.iter_mut().zip(&plan.disks) {
            if disk.read_only {
                continue;
            }
            let target = target(folder, &plan.name, &disk.id);
            let file = new_image(&target)?;
            self.made.push(target.clone());
            copy(path, &file).map_err(|e| failed(path, &target, &e))?;
            *path = target;
        }
        Ok(())
    }

    /// The copies are the guest's now.
    pub(super) fn keep(&mut self) {
        self.kept = true;
    }

    /// Where they are.
    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.made
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for path in self.made.iter().filter(|_| !self.kept) {
            // They were made here.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Where the copies of a guest's disks are put.
pub(super) fn targets(folder: &Path, plan: &MachinePlan) -> Vec<PathBuf> {
    let written = plan.disks.iter().filter(|disk| !disk.read_only);
    written
        .map(|disk| target(folder, &plan.name, &disk.id))
        .collect()
}

fn target(folder: &Path, name: &str, disk: &str) -> PathBuf {
    folder.join(format!("{name}-{disk}.img"))
}

fn new_image(path: &Path) -> Result<File, Failure> {
    let file = files::create(path);
    file.map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => Failure::new(
            "DISK_EXISTS",
            format!(
                "{} exists, and may be a guest's disk; remove it, or name another guest or folder",
                path.display()
            ),
        ),
        _ => Failure::new("RESOURCE", format!("{}: {e}", path.display())),
    })
}

/// Everything but the holes. Locked meanwhile, so that no VMM writes to it.
fn copy(from: &Path, mut to: &File) -> io::Result<()> {
    let source = files::open(from, false)?;
    let found = source.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other(
            "a block device; only disks in files are copied",
        ));
    }
    lock(&source)?;
    to.set_len(found.len())?;
    let mut at = 0;
    while let Some((start, end)) = next_data(&source, at)? {
        let mut reader = &source;
        reader.seek(SeekFrom::Start(start))?;
        to.seek(SeekFrom::Start(start))?;
        let length = end.saturating_sub(start);
        if io::copy(&mut reader.take(length), &mut to)? != length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = end;
    }
    to.sync_all()
}

/// As a VMM locks a disk that it only reads: whoever writes holds another lock.
fn lock(file: &File) -> io::Result<()> {
    match hold(file, Hold::Shared) {
        Ok(()) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "a guest that runs writes to it; stop that guest first",
        )),
        Err(e) => Err(e.into()),
    }
}

fn failed(from: &Path, to: &Path, error: &io::Error) -> Failure {
    let code = match error.kind() {
        io::ErrorKind::ResourceBusy => "DISK_IN_USE",
        _ => "RESOURCE",
    };
    Failure::new(
        code,
        format!(
            "{} cannot be copied to {}: {error}",
            from.display(),
            to.display()
        ),
    )
}

/// Far from those that people choose.
const FIRST_CID: u32 = 1 << 16;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn a_disk_is_copied_with_its_holes() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().canonicalize().unwrap().join(name);
        let from = at("from");
        let disk = File::create(&from).unwrap();
        disk.set_len(64 << 20).unwrap();
        for at in [0, 8 << 20, (64 << 20) - 7] {
            disk.write_all_at(b"written", at).unwrap();
        }
        let to = at("to");
        copy(&from, &new_image(&to).unwrap()).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        assert_eq!(new_image(&to).unwrap_err().code, "DISK_EXISTS");
        // An empty one, and one that is all hole.
        for length in [0, 1 << 20] {
            disk.set_len(0).unwrap();
            disk.set_len(length).unwrap();
            let to = at(&format!("to-{length}"));
            copy(&from, &new_image(&to).unwrap()).unwrap();
            assert_eq!(std::fs::metadata(&to).unwrap().len(), length);
        }
    }

    #[test]
    fn a_disk_that_somebody_writes_to_is_not_copied() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().canonicalize().unwrap().join("from");
        let disk = File::create(&from).unwrap();
        hold(&disk, Hold::Alone).unwrap();
        let to = new_image(&from.with_file_name("to")).unwrap();
        let error = copy(&from, &to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        drop(disk);
        copy(&from, &to).unwrap();
    }

    #[test]
    fn copies_that_nobody_keeps_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy");
        for kept in [false, true] {
            std::fs::write(&path, "c").unwrap();
            let mut copies = Copies {
                made: vec![path.clone()],
                kept: false,
            };
            if kept {
                copies.keep();
            }
            drop(copies);
            assert_eq!(path.exists(), kept);
        }
    }
}
