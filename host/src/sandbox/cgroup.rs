//! One cgroup v2 group per role process: limits on memory, tasks and processors, and a way to kill all of it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::io_limit::IoShare;
use super::jail::CpuShare;

/// A group of our own, removed with everything in it when dropped.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// What is limited and what could not be, one line each.
    pub notes: Vec<String>,
}

impl Cgroup {
    /// Creates the group `casemate/<name>` in the cgroup v2 hierarchy and sets what limits its controllers
    /// allow. `None` with the reason where there is no such hierarchy at all.
    pub fn create(
        name: &str,
        memory_max: Option<u64>,
        pids_max: u32,
        cpu: &CpuShare,
        io: Option<&IoShare>,
    ) -> Result<(Option<Self>, Vec<String>), CgroupError> {
        let Some(root) = hierarchy() else {
            let note =
                "cgroup: no v2 hierarchy is mounted; memory and tasks are bounded by rlimits only";
            return match io.filter(|io| io.limits.required) {
                Some(_) => Err(CgroupError::NoIo("no v2 hierarchy is mounted".to_owned())),
                None => Ok((None, vec![note.to_owned()])),
            };
        };
        let parent = root.join(PARENT);
        let path = parent.join(name);
        make_both(&parent, &path)?;
        // Where a controller is missing (hybrid hosts keep it in v1) the write fails; `notes` will say so.
        for dir in [&root, &parent] {
            for controller in ["+memory", "+pids", "+cpu", "+io"] {
                let _ = fs::write(dir.join("cgroup.subtree_control"), controller);
            }
        }
        let mut group = Self {
            path,
            notes: Vec::new(),
        };
        if group.populated()? {
            let path = std::mem::take(&mut group.path);
            return Err(CgroupError::InUse(path));
        }
        if let Some(limit) = memory_max {
            group.limit("memory.max", &limit.to_string())?;
            // Guest memory must not be swapped to a disk in the clear; where the file is absent there is no swap.
            let _ = fs::write(group.path.join("memory.swap.max"), "0");
        }
        group.limit("pids.max", &pids_max.to_string())?;
        if let Some(percent) = cpu.percent {
            // Microseconds of each period of a tenth of a second.
            group.limit("cpu.max", &format!("{} 100000", u64::from(percent) * 1000))?;
        }
        if let Some(weight) = cpu.weight {
            group.limit("cpu.weight", &weight.to_string())?;
        }
        if let Some(io) = io {
            group.limit_io(io)?;
        }
        let notes = group.notes.clone();
        Ok((Some(group), notes))
    }

    /// The group's `cgroup.procs`, open for writing: a process that writes `0` joins.
    pub fn procs(&self) -> Result<OwnedFd, CgroupError> {
        let path = self.path.join("cgroup.procs");
        let file = fs::OpenOptions::new().write(true).open(&path);
        Ok(file.map_err(|e| CgroupError::Io(path, e))?.into())
    }

    /// Kills all members and removes the group.
    pub fn remove(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        kill_and_remove(&self.path);
        self.path = PathBuf::new();
    }

    fn populated(&self) -> Result<bool, CgroupError> {
        let path = self.path.join("cgroup.events");
        let events = fs::read_to_string(&path).map_err(|e| CgroupError::Io(path, e))?;
        Ok(events.lines().any(|line| line == "populated 1"))
    }

    /// Limits each device beneath the guest's disks, and looks whether the kernel has taken it.
    fn limit_io(&mut self, io: &IoShare) -> Result<(), CgroupError> {
        let path = self.path.join("io.max");
        let mut missing = io.without.clone();
        let wanted = io.limits.text();
        for device in &io.devices {
            let line = format!("{device} {wanted}");
            let taken = fs::write(&path, &line)
                .and_then(|()| fs::read_to_string(&path))
                .map(|text| text.lines().any(|l| limits_alike(l, &line)));
            match taken {
                Ok(true) => self.notes.push(format!("cgroup: io.max = {line}")),
                Ok(false) => missing.push(format!("device {device}: the kernel did not keep it")),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    missing.push("the v2 hierarchy has no io controller".to_owned());
                    break;
                }
                Err(e) => missing.push(format!("device {device}: {e}")),
            }
        }
        if io.limits.required && !missing.is_empty() {
            return Err(CgroupError::NoIo(missing.join("; ")));
        }
        let said = missing
            .iter()
            .map(|m| format!("cgroup: io.max not set: {m}"));
        self.notes.extend(said);
        Ok(())
    }

    fn limit(&mut self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        if !path.exists() {
            self.notes.push(format!(
                "cgroup: {file} not set: the v2 hierarchy has no such controller (a hybrid host keeps it in v1)"
            ));
            return Ok(());
        }
        fs::write(&path, value).map_err(|e| CgroupError::Io(path, e))?;
        self.notes.push(format!("cgroup: {file} = {value}"));
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Kills all members of the group `casemate/<name>` and removes it, if there is one.
pub fn end(name: &str) {
    if let Some(root) = hierarchy() {
        kill_and_remove(&root.join(PARENT).join(name));
    }
}

/// Removes the groups that a killed agent left behind: those whose name is `ours`, as another agent's group that is
/// empty may just have been made. Members that are dying with their agent are waited for; a group with one that goes
/// on living stays. Returns the number removed.
pub fn sweep(ours: impl Fn(&str) -> bool) -> usize {
    let Some(parent) = hierarchy().map(|root| root.join(PARENT)) else {
        return 0;
    };
    let Ok(entries) = fs::read_dir(&parent) else {
        return 0;
    };
    let removed = entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(&ours))
        .filter(|entry| remove_when_empty(&entry.path()))
        .count();
    let _ = fs::remove_dir(parent);
    removed
}

/// Where cgroup v2 is mounted, and which controllers it offers there.
pub fn hierarchy() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.join("cgroup.controllers").exists())
}

/// Why a group could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file of the hierarchy could not be used.
    #[error("cgroup file {0:?}: {1}; the agent needs root and a writable cgroup v2 hierarchy")]
    Io(PathBuf, #[source] io::Error),
    /// Limits that the description demands cannot be set.
    #[error(
        "`resources.io_max` cannot be enforced here: {0}; mend that, or leave out `required` and have it noted only"
    )]
    NoIo(String),
    /// The group exists and has members.
    #[error("cgroup {0:?} has living processes; stop them or choose another name")]
    InUse(PathBuf),
}

/// Whether a line of `io.max` has everything that was written: the kernel adds `max` for what was not.
fn limits_alike(line: &str, written: &str) -> bool {
    let mut words = written.split_whitespace();
    let device = words.next();
    line.split_whitespace().next() == device
        && words.all(|word| line.split_whitespace().any(|have| have == word))
}

fn kill_and_remove(path: &Path) {
    let _ = fs::write(path.join("cgroup.kill"), "1");
    remove_when_empty(path);
    if let Some(parent) = path.parent() {
        // Refused while other groups are left in it.
        let _ = fs::remove_dir(parent);
    }
}

fn remove_when_empty(path: &Path) -> bool {
    for _ in 0..REMOVE_ATTEMPTS {
        match fs::remove_dir(path) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result.is_ok(),
        }
    }
    false
}

/// Makes a group and, where another agent has just removed it as empty, the parent again.
fn make_both(parent: &Path, path: &Path) -> Result<(), CgroupError> {
    let mut result = Ok(());
    for _ in 0..REMOVE_ATTEMPTS {
        make(parent)?;
        result = make(path);
        match &result {
            Err(CgroupError::Io(_, e)) if e.kind() == io::ErrorKind::NotFound => {}
            _ => break,
        }
    }
    result
}

fn make(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::Io(path.to_owned(), e))
        }
        _ => Ok(()),
    }
}

const PARENT: &str = "casemate";
const REMOVE_ATTEMPTS: u32 = 100;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::sandbox::io_limit::IoLimits;

    fn share(required: bool, without: &[&str]) -> IoShare {
        let limits = IoLimits {
            read_bytes: Some(1 << 20),
            required,
            ..IoLimits::default()
        };
        IoShare {
            limits,
            devices: ["7:0".to_owned()].into(),
            without: without.iter().map(|w| (*w).to_owned()).collect(),
        }
    }

    fn group(folder: &Path) -> Cgroup {
        Cgroup {
            path: folder.to_owned(),
            notes: Vec::new(),
        }
    }

    #[test]
    fn limits_that_cannot_be_set_are_said_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        // A kernel that keeps what it is told, as it writes it.
        let mut kept = group(folder.path());
        kept.limit_io(&share(true, &[])).unwrap();
        assert_eq!(kept.notes, ["cgroup: io.max = 7:0 rbps=1048576"]);
        let nowhere = ["disk `data`: on tmpfs"];
        let mut said = group(folder.path());
        said.limit_io(&share(false, &nowhere)).unwrap();
        assert!(
            said.notes
                .concat()
                .contains("not set: disk `data`: on tmpfs"),
            "{said:?}"
        );
        let refused = group(folder.path())
            .limit_io(&share(true, &nowhere))
            .unwrap_err();
        assert!(refused.to_string().contains("on tmpfs"), "{refused}");
        // No such folder, and so no such controller.
        let none = folder.path().join("none");
        let mut said = group(&none);
        said.limit_io(&share(false, &[])).unwrap();
        assert!(said.notes.concat().contains("no io controller"), "{said:?}");
        assert!(group(&none).limit_io(&share(true, &[])).is_err());
        assert!(limits_alike(
            "7:0 rbps=1 wbps=max riops=max wiops=max",
            "7:0 rbps=1"
        ));
        assert!(!limits_alike("7:0 rbps=2 wbps=max", "7:0 rbps=1"));
        assert!(!limits_alike("7:1 rbps=1", "7:0 rbps=1"));
    }

    #[test]
    fn a_parent_that_another_agent_removes_as_empty_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let parent = folder.path().join("parent");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    for _ in 0..50 {
                        let _ = fs::remove_dir(&parent);
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let path = parent.join("group");
            let made = (0..1000).all(|_| {
                let made = make_both(&parent, &path).is_ok();
                let _ = fs::remove_dir(&path);
                made
            });
            over.store(true, Ordering::Relaxed);
            assert!(made);
        });
    }
}
