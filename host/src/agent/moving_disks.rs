//! Disks that move along with their guest: opened for reading here, made anew where it goes.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use casemate_policy::HostPolicy;

use crate::agent::api::Failure;
use crate::agent::files;
use crate::agent::guest::Guest;
use crate::agent::vmm_process::lock;
use crate::machine::plan::{DiskFormat, MachinePlan};
use crate::mover::disks::OfferedDisk;
use crate::vmm::protocol::EXCHANGE_SIZE;

/// The disks that leave with a guest.
#[derive(Default)]
pub struct Leaving {
    /// Their places in the plan, and sizes in pages.
    pub disks: Vec<(u8, u64)>,
    /// Their images, for reading, in the same order.
    pub images: Vec<OwnedFd>,
}

/// Opens these disks of a guest.
pub fn open(guest: &Guest, ids: &[String]) -> Result<Leaving, Failure> {
    let plan = guest.plan_now();
    let local = lock(&guest.local).clone();
    let mut places = BTreeMap::new();
    for id in ids {
        let place = (0u8..).zip(&plan.disks).find(|(_, disk)| disk.id == *id);
        let (place, disk) = place.ok_or_else(|| {
            let name = &guest.plan.name;
            Failure::new(
                "NO_SUCH_DEVICE",
                format!("{name} has no disk {id:?}; its description names those it has"),
            )
        })?;
        if disk.format != DiskFormat::Raw {
            let text = format!(
                "disk {id} is no raw image; convert it, or give both hosts the same storage"
            );
            return Err(Failure::new("DISK_FORMAT", text));
        }
        places.insert(place, id);
    }
    let mut leaving = Leaving::default();
    for (place, id) in places {
        let path = local.disks.get(usize::from(place));
        let path =
            path.ok_or_else(|| Failure::new("INTERNAL", format!("disk {id} has no image")))?;
        let mut file = files::open(path, false).map_err(|e| unusable(path, &e))?;
        let length = file
            .seek(SeekFrom::End(0))
            .map_err(|e| unusable(path, &e))?;
        check_size(path, length)?;
        leaving.disks.push((place, length / PAGE));
        leaving.images.push(file.into());
    }
    Ok(leaving)
}

fn check_size(path: &Path, length: u64) -> Result<(), Failure> {
    let refuse = |why: String| {
        let text = format!(
            "{} {why}; give both hosts the same storage instead",
            path.display()
        );
        Err(Failure::new("DISK_SIZE", text))
    };
    match length {
        0 => refuse("is empty".to_owned()),
        _ if !length.is_multiple_of(PAGE) => refuse(format!(
            "has {length} bytes, which is no multiple of {PAGE}"
        )),
        _ if length > MAX_DISK => refuse(format!("has {length} bytes, more than {MAX_DISK}")),
        _ => Ok(()),
    }
}

/// Images made for a guest that is on its way; removed again unless it has come.
#[derive(Default)]
pub struct NewImages {
    paths: Vec<PathBuf>,
    /// For the mover, in the order of the offer.
    pub files: Vec<OwnedFd>,
}

impl NewImages {
    /// Makes an image for each disk that is offered, empty and of its size, where this host's policy says. None may exist.
    pub fn make(
        offered: &[OfferedDisk],
        plan: &MachinePlan,
        policy: &HostPolicy,
    ) -> Result<Self, Failure> {
        let mut images = Self::default();
        for one in offered {
            let disk = plan.disks.get(usize::from(one.disk));
            let disk = disk
                .filter(|disk| disk.format == DiskFormat::Raw)
                .ok_or_else(|| {
                    Failure::new(
                        "DESCRIPTION",
                        format!(
                            "the offer brings disk {}, which the guest has not, or not raw",
                            one.disk
                        ),
                    )
                })?;
            let place = policy.incoming_disk(&disk.id).ok_or_else(|| {
                Failure::new(
                    "POLICY_DISK",
                    format!("the policy has no place for disk {:?}", disk.id),
                )
            })?;
            images.add(&place.path, one.pages)?;
        }
        Ok(images)
    }

    fn add(&mut self, path: &Path, pages: u64) -> Result<(), Failure> {
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        let file = made.map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => Failure::new(
                "DISK_EXISTS",
                format!("{} is there already; remove it, or move the guest without this disk if it is the same storage", path.display()),
            ),
            _ => unusable(path, &e),
        })?;
        self.paths.push(path.to_owned());
        let length = pages.saturating_mul(PAGE);
        file.set_len(length).map_err(|e| unusable(path, &e))?;
        self.files.push(file.into());
        Ok(())
    }

    /// The guest is here: they stay.
    pub fn keep(&mut self) {
        self.paths.clear();
    }
}

impl Drop for NewImages {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(%error, path = %path.display(), "an image that nobody needs is left");
            }
        }
    }
}

fn unusable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(
        "RESOURCE",
        format!("{} cannot be used: {error}", path.display()),
    )
}

/// Largest disk that moves along: its bitmap fits the memory that VMM and mover exchange.
const MAX_DISK: u64 = EXCHANGE_SIZE as u64 * 8 * PAGE;
/// What travels at once; as large as a page of memory.
const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_do_not_fit_are_refused() {
        let code = |length| check_size(Path::new("d"), length).map_err(|e| e.code);
        for length in [PAGE, 128 << 30] {
            assert_eq!(code(length), Ok(()));
        }
        for length in [0, PAGE - 1, PAGE + 512, (128 << 30) + PAGE] {
            assert_eq!(code(length), Err("DISK_SIZE".to_owned()), "{length}");
        }
    }

    #[test]
    fn images_are_made_once_and_removed_unless_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        let mut images = NewImages::default();
        images.add(&one, 3).unwrap();
        assert_eq!(std::fs::metadata(&one).unwrap().len(), 3 * PAGE);
        let mut again = NewImages::default();
        again.add(&two, 1).unwrap();
        assert_eq!(again.add(&one, 3).unwrap_err().code, "DISK_EXISTS");
        assert_eq!(
            again
                .add(&folder.path().join("no/where"), 3)
                .unwrap_err()
                .code,
            "RESOURCE"
        );
        drop(again);
        assert!(!two.exists() && one.exists(), "what was there before stays");
        images.keep();
        drop(images);
        assert!(one.exists());
    }
}
