//! What the kernel says of this process: `/proc/self/status` through a descriptor kept from before the jail.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::uio::pread;

/// A descriptor of `/proc/self/status`; readable after the process has lost its `/proc`.
#[derive(Debug)]
pub(crate) struct StatusFile(pub(crate) OwnedFd);

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

#[cfg(test)]
mod tests {
    use super::*;

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
