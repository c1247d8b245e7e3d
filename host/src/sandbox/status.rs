//! What the kernel says of this process: `/proc/self/status` through a descriptor kept from before the jail.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::sys::uio::pread;

/// A descriptor of `/proc/self/status`; readable after the process has lost its `/proc`.
#[derive(Debug)]
pub(crate) struct StatusFile(pub(crate) OwnedFd);

/// A descriptor of `/proc/self`, kept only until Landlock closes.
#[derive(Debug)]
pub(crate) struct ProcSelf(pub(crate) File);

/// Threads of this process, by who runs in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Threads {
    /// Threads with code of this program.
    pub(crate) own: u32,
    /// Threads the kernel put into the process (KVM's huge page worker): they never leave the kernel.
    pub(crate) kernel: u32,
}

/// The lines that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) uids: Vec<u32>,
    pub(crate) gids: Vec<u32>,
    pub(crate) groups: Vec<u32>,
    pub(crate) threads: u32,
    pub(crate) no_new_privs: bool,
    /// Of the main thread.
    pub(crate) seccomp: u32,
    /// Set name and mask.
    pub(crate) capabilities: Vec<(String, u64)>,
    /// Process id, outermost namespace first.
    pub(crate) pids: Vec<u32>,
}

impl StatusFile {
    pub(crate) fn read(&self) -> Result<Status, Errno> {
        let mut buffer = [0u8; 8192];
        let length = pread(self.0.as_fd(), &mut buffer, 0)?;
        let bytes = buffer.get(..length).unwrap_or_default();
        Ok(parse(&String::from_utf8_lossy(bytes)))
    }
}

impl ProcSelf {
    pub(crate) fn reopen_read_only(&self, fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        self.open(&format!("fd/{}", fd.as_raw_fd()))
    }

    pub(crate) fn threads(&self) -> Result<Threads, Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut tasks = Dir::openat(&self.0, "task", flags, Mode::empty())?;
        let mut threads = Threads::default();
        for entry in tasks.iter() {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy();
            if name.starts_with('.') {
                continue;
            }
            let stat = self.text(&format!("task/{name}/stat"))?;
            if is_kernel_worker(&stat) {
                threads.kernel += 1;
            } else {
                threads.own += 1;
            }
        }
        Ok(threads)
    }

    /// Mounts this process can reach.
    pub(crate) fn mounts(&self) -> Result<usize, Errno> {
        Ok(self.text("mountinfo")?.lines().count())
    }

    fn text(&self, path: &str) -> Result<String, Errno> {
        let mut text = String::new();
        let read = File::from(self.open(path)?).read_to_string(&mut text);
        read.map_err(|_| Errno::EIO)?;
        Ok(text)
    }

    fn open(&self, path: &str) -> Result<OwnedFd, Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        openat(&self.0, path, flags, Mode::empty())
    }
}

impl Status {
    /// Names of all capabilities left, with the set they are in.
    pub(crate) fn capability_names(&self) -> Vec<String> {
        let named = |(set, mask): &(String, u64)| {
            (0..64u32)
                .filter(|bit| mask >> bit & 1 == 1)
                .map(|bit| format!("{set}:{bit}"))
                .collect::<Vec<_>>()
        };
        self.capabilities.iter().flat_map(named).collect()
    }
}

/// Field 9 of `/proc/<pid>/stat`, counted from behind the name.
fn is_kernel_worker(stat: &str) -> bool {
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
    let flags = fields.and_then(|f| f.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & (PF_USER_WORKER | PF_IO_WORKER) != 0)
}

fn parse(text: &str) -> Status {
    let mut status = Status::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let numbers = || value.split_whitespace().flat_map(str::parse).collect();
        let number = || value.trim().parse().unwrap_or(0);
        match key {
            "Uid" => status.uids = numbers(),
            "Gid" => status.gids = numbers(),
            "Groups" => status.groups = numbers(),
            "NSpid" => status.pids = numbers(),
            "Threads" => status.threads = number(),
            "NoNewPrivs" => status.no_new_privs = number() == 1,
            "Seccomp" => status.seccomp = number(),
            "CapInh" | "CapPrm" | "CapEff" | "CapBnd" | "CapAmb" => {
                // What cannot be read counts as full, never as empty.
                let mask = u64::from_str_radix(value.trim(), 16).unwrap_or(u64::MAX);
                status.capabilities.push((key.to_owned(), mask));
            }
            _ => {}
        }
    }
    status
}

/// linux/sched.h
const PF_IO_WORKER: u64 = 0x10;
const PF_USER_WORKER: u64 = 0x4000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_workers_are_told_by_their_flags() {
        assert!(is_kernel_worker("7 (a) b) S 1 1 1 0 -1 16448 0 0"));
        assert!(!is_kernel_worker("7 (a) b) S 1 1 1 0 -1 4194304 0 0"));
        assert!(!is_kernel_worker("nonsense"));
    }

    #[test]
    fn capabilities_and_ids_are_read() {
        let text = "Name:\tx\nUid:\t7\t7\t7\t7\nNSpid:\t400\t1\nThreads:\t3\nCapPrm:\t0000000000000005\n\
                    CapAmb:\tgarbage\nNoNewPrivs:\t1\nSeccomp:\t2\n";
        let status = parse(text);
        assert_eq!(status.uids, [7, 7, 7, 7]);
        assert_eq!(status.pids, [400, 1]);
        assert_eq!((status.threads, status.seccomp), (3, 2));
        assert!(status.no_new_privs);
        let names = status.capability_names();
        assert_eq!(names.first().unwrap(), "CapPrm:0");
        assert_eq!(names.len(), 2 + 64);
    }
}
