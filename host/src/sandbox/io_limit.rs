//! How much a guest may read and write of the block devices beneath its disks: `io.max` of cgroup v2.
//!
//! The device's own limits (`[[disk]] limit`) bound what a guest asks for; these bound what reaches the host's devices,
//! whoever caused it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Limits for each block device beneath a guest's disks; what is absent is not limited.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimits {
    /// Bytes read a second.
    pub read_bytes: Option<u64>,
    /// Bytes written a second.
    pub write_bytes: Option<u64>,
    /// Reads a second.
    pub reads: Option<u64>,
    /// Writes a second.
    pub writes: Option<u64>,
    /// Whether a guest whose limits this host cannot enforce is refused; else its sandbox report says so.
    pub required: bool,
}

/// The limits, and the devices that they are for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoShare {
    /// The same for each.
    pub limits: IoLimits,
    /// The devices, `major:minor`, each once.
    pub devices: BTreeSet<String>,
    /// Why there is none beneath some disks, one line each.
    pub without: Vec<String>,
}

impl IoLimits {
    /// For the devices beneath these disks, by name and what the agent has opened.
    pub fn of_disks<'a>(
        self,
        disks: impl IntoIterator<Item = (&'a str, std::io::Result<fs::Metadata>)>,
    ) -> IoShare {
        let mut share = IoShare {
            limits: self,
            ..IoShare::default()
        };
        for (id, metadata) in disks {
            let found = metadata.map_err(|e| e.to_string());
            match found.and_then(|found| device_beneath(&found, Path::new(DEVICES))) {
                Ok(device) => {
                    share.devices.insert(device);
                }
                Err(why) => share.without.push(format!("disk `{id}`: {why}")),
            }
        }
        share
    }

    /// As the kernel's `io.max` takes it, without the device.
    pub(super) fn text(&self) -> String {
        let keys = [
            ("rbps", self.read_bytes),
            ("wbps", self.write_bytes),
            ("riops", self.reads),
            ("wiops", self.writes),
        ];
        let given = keys
            .iter()
            .filter_map(|(key, value)| Some((key, (*value)?)));
        let words: Vec<String> = given.map(|(key, value)| format!("{key}={value}")).collect();
        words.join(" ")
    }
}

/// The whole block device that a disk's bytes lie on: `io.max` knows no partitions.
fn device_beneath(disk: &fs::Metadata, sysfs: &Path) -> Result<String, String> {
    let number = match disk.file_type().is_block_device() {
        true => disk.rdev(),
        false => disk.dev(),
    };
    let (major, minor) = (libc::major(number), libc::minor(number));
    let name = format!("{major}:{minor}");
    if major == 0 {
        return Err(format!(
            "its file system (device {name}) is on no single block device, as tmpfs, btrfs and overlay are not"
        ));
    }
    let place = sysfs.join(&name);
    if !place.join("partition").exists() {
        return Ok(name);
    }
    // A link to a folder within the whole device's.
    let whole = fs::canonicalize(&place).map(|partition| partition.join("../dev"));
    whole
        .and_then(fs::read_to_string)
        .map(|text| text.trim().to_owned())
        .map_err(|error| format!("the device of partition {name} is not found: {error}"))
}

/// Where the kernel lists block devices by number.
const DEVICES: &str = "/sys/dev/block";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn limits_are_written_as_the_kernel_reads_them() {
        let limits = IoLimits {
            read_bytes: Some(1 << 20),
            writes: Some(7),
            ..IoLimits::default()
        };
        assert_eq!(limits.text(), "rbps=1048576 wiops=7");
        assert_eq!(IoLimits::default().text(), "");
    }

    #[test]
    fn a_file_is_on_the_whole_device_beneath_its_partition_or_on_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join("disk.raw")).unwrap();
        let found = file.metadata().unwrap();
        let number = format!("{}:{}", libc::major(found.dev()), libc::minor(found.dev()));
        let sysfs = folder.path();
        if libc::major(found.dev()) != 0 {
            assert_eq!(device_beneath(&found, sysfs), Ok(number.clone()));
            fs::create_dir_all(sysfs.join("sda/sda1")).unwrap();
            fs::write(sysfs.join("sda/dev"), "8:0\n").unwrap();
            fs::write(sysfs.join("sda/sda1/partition"), "1\n").unwrap();
            symlink(sysfs.join("sda/sda1"), sysfs.join(number)).unwrap();
            assert_eq!(device_beneath(&found, sysfs), Ok("8:0".to_owned()));
        }
        // A file system of the kernel's own memory.
        let found = fs::metadata("/proc/self").unwrap();
        let share = IoLimits::default().of_disks([("data", Ok(found))]);
        assert!(share.devices.is_empty());
        let why = share.without.join("");
        assert!(
            why.contains("disk `data`") && why.contains("tmpfs"),
            "{why}"
        );
    }
}
