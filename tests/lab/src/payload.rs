//! What a program needs inside the lab, as one read-only ext4 disk: each file appears at its own path there.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use crate::{
    command::output,
    error::{Error, OnFile, Result},
    machine::DISK_SIZE,
    paths::make_dir,
    tools::Tools,
};

/// Files and directories, and where they shall appear.
#[derive(Default)]
pub struct Payload {
    entries: Vec<(PathBuf, String)>,
}

impl Payload {
    /// Add a file or directory, to appear at the same absolute path.
    pub fn add(&mut self, source: &Path) -> Result<()> {
        let absolute = std::path::absolute(source).on("find", source)?;
        let at = absolute
            .to_str()
            .ok_or_else(|| Error::Usage(format!("{} is not UTF-8", source.display())))?;
        self.add_at(source, at.to_owned())
    }

    /// Add a file or directory, to appear at `at`; a second entry for the same place is left out.
    pub fn add_at(&mut self, source: &Path, at: String) -> Result<()> {
        if !at.starts_with('/') {
            return Err(Error::Usage(format!(
                "payload destination {at} is not an absolute path"
            )));
        }
        fs::metadata(source).on("read payload", source)?;
        if self.entries.iter().all(|(_, known)| *known != at) {
            self.entries.push((source.to_path_buf(), at));
        }
        Ok(())
    }

    /// Where the entries shall appear, in the disk's order.
    pub fn places(&self) -> Vec<String> {
        self.entries.iter().map(|(_, at)| at.clone()).collect()
    }

    /// Write the disk image `image`, staging in the directory `scratch`.
    pub fn write(&self, tools: &Tools, scratch: &Path, image: &Path) -> Result<()> {
        let stage = scratch.join("payload");
        make_dir(&stage.join("files"))?;
        for (index, (source, _)) in self.entries.iter().enumerate() {
            stage_tree(source, &stage.join("files").join(index.to_string()))?;
        }
        make_blank(image, DISK_SIZE)?;
        let mut make = tools.command("mke2fs");
        make.args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-m",
            "0",
            "-b",
            "4096",
            "-O",
            "^has_journal,^resize_inode",
        ]);
        make.args(["-E", "nodiscard,lazy_itable_init=1,root_owner=0:0", "-d"])
            .arg(&stage)
            .arg(image);
        output(&mut make)?;
        fs::remove_dir_all(&stage).on("remove", &stage)
    }
}

/// An empty disk of `size` bytes.
pub fn make_blank(image: &Path, size: u64) -> Result<()> {
    File::create(image)
        .and_then(|file| file.set_len(size))
        .on("create", image)
}

fn stage_tree(source: &Path, to: &Path) -> Result<()> {
    if source.is_dir() {
        make_dir(to)?;
        for entry in fs::read_dir(source).on("list", source)? {
            let entry = entry.on("list", source)?;
            stage_tree(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    // A symbolic link is followed: its target may lie outside the payload.
    let source = &fs::canonicalize(source).on("read payload", source)?;
    match fs::hard_link(source, to) {
        Err(error) if may_copy(&error) => fs::copy(source, to).map(drop),
        other => other,
    }
    .on("stage payload", source)
}

/// Other file system, or a file of another user under `protected_hardlinks`.
fn may_copy(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::CrossesDevices
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::TooManyLinks
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_must_be_absolute_and_sources_exist() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, "x").unwrap();
        let mut payload = Payload::default();
        payload.add(&file).unwrap();
        payload.add(&file).unwrap();
        assert_eq!(payload.places(), [file.to_str().unwrap()]);
        assert!(payload.add_at(&file, "relative".into()).is_err());
        assert!(payload.add(&dir.path().join("missing")).is_err());
    }
}
