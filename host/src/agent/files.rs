//! Files of this host that somebody names: decided by where they really are, and opened there or not at all.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

use crate::agent::api::{Attach, Request};

/// Where a file really is: no link is left to follow. One that is still to be made is where its folder is; what is not
/// there at all stays as it was named, and opening it will say so.
pub fn real(path: &Path) -> PathBuf {
    path.canonicalize()
        .ok()
        .or_else(|| {
            let folder = path.parent()?.canonicalize().ok()?;
            Some(folder.join(path.file_name()?))
        })
        .unwrap_or_else(|| path.to_owned())
}

/// Opens a regular file or a block device at exactly this path: a link that somebody put in its way since it was decided
/// on fails (openat2(2), `RESOLVE_NO_SYMLINKS`), and a pipe holds up nobody.
pub fn open(path: &Path, writable: bool) -> io::Result<File> {
    let access = if writable {
        OFlag::O_RDWR
    } else {
        OFlag::O_RDONLY
    };
    let how = OpenHow::new()
        .flags(access | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    let file = File::from(openat2(AT_FDCWD, path, how)?);
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(file);
    }
    Err(io::Error::other("not a regular file, nor a block device"))
}

/// Makes a file at exactly this path, for its owner alone: nothing is there yet, and no link is on the way.
pub fn create(path: &Path) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC)
        .mode(Mode::S_IRUSR | Mode::S_IWUSR)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(File::from(openat2(AT_FDCWD, path, how)?))
}

/// Paths as a policy is asked about them.
pub fn in_words<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Vec<String> {
    let paths = paths.into_iter();
    paths.map(|path| path.display().to_string()).collect()
}

impl Request {
    /// The file of this host that it names, if it names one that the policy has rules for.
    pub(super) fn file(&self) -> Option<&Path> {
        match self {
            Self::Run { description, .. } | Self::Create { description } => Some(description),
            Self::Snapshot { file, .. } | Self::Restore { file, .. } | Self::Clone { file, .. } => {
                Some(file)
            }
            Self::Attach {
                device: Attach::Disk(disk),
                ..
            } => Some(&disk.path),
            _ => None,
        }
    }

    /// The same request, with its file where that really is.
    pub(super) fn with_real_file(mut self) -> Self {
        match &mut self {
            Self::Run { description, .. } | Self::Create { description } => {
                *description = real(description);
            }
            Self::Snapshot { file, .. } | Self::Restore { file, .. } => *file = real(file),
            Self::Clone { file, disks, .. } => {
                *file = real(file);
                if let Some(folder) = disks {
                    *folder = real(folder);
                }
            }
            Self::Attach {
                device: Attach::Disk(disk),
                ..
            } => disk.path = real(&disk.path),
            _ => {}
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_opened_where_it_really_is() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().canonicalize().unwrap().join(name);
        std::fs::create_dir(at("inside")).unwrap();
        std::fs::write(at("inside/disk"), "d").unwrap();
        symlink(at("inside"), at("way")).unwrap();
        symlink(at("inside/disk"), at("link")).unwrap();
        for named in ["link", "way/disk", "inside/../way/disk"] {
            assert_eq!(real(&at(named)), at("inside/disk"), "{named}");
            assert!(open(&at(named), false).is_err(), "{named}");
        }
        assert_eq!(real(&at("way/new")), at("inside/new"));
        assert_eq!(real(&at("no/new")), at("no/new"));
        assert!(open(&at("way/disk"), false).is_err(), "a link on the way");
        open(&at("inside/disk"), true).unwrap();
        assert!(create(&at("way/made")).is_err(), "a link on the way");
        symlink(at("inside/gone"), at("dangling")).unwrap();
        for there in ["inside/disk", "dangling"] {
            let error = create(&at(there)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{there}");
        }
        create(&at("inside/made")).unwrap();
    }

    #[test]
    fn pipes_folders_and_devices_of_other_kinds_are_no_files() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRUSR).unwrap();
        for path in [&pipe, folder.path(), Path::new("/dev/null")] {
            assert!(open(path, false).is_err(), "{}", path.display());
        }
    }
}
