//! The child's memory and descriptors, as the kernel would see them.

use std::fs;
use std::io::{IoSlice, IoSliceMut};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

/// The process behind a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    pub(crate) pid: Pid,
    /// Bytes that the process may lock, if it has said so to the double.
    pub(crate) memlock: Option<u64>,
}

impl Caller {
    /// `copy_from_user`.
    pub(crate) fn read(self, address: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; length];
        let remote = [remote(address, length)?];
        let done = process_vm_readv(self.pid, &mut [IoSliceMut::new(&mut bytes)], &remote)
            .map_err(|_| Errno::EFAULT)?;
        (done == length).then_some(bytes).ok_or(Errno::EFAULT)
    }

    /// `copy_to_user`.
    pub(crate) fn write(self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        if bytes.is_empty() {
            return Ok(());
        }
        let remote = [remote(address, bytes.len())?];
        let done = process_vm_writev(self.pid, &[IoSlice::new(bytes)], &remote)
            .map_err(|_| Errno::EFAULT)?;
        (done == bytes.len()).then_some(()).ok_or(Errno::EFAULT)
    }

    /// A path, up to its end; `None` if it is too long or not text.
    pub(crate) fn path(self, address: u64) -> Option<String> {
        let mut path = Vec::new();
        let mut at = address;
        while path.len() < PATH_MAX {
            // Never across a page: the next one may be unmapped.
            let part = (PAGE - at % PAGE).min(64);
            let bytes = self.read(at, usize::try_from(part).ok()?).ok()?;
            if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
                path.extend_from_slice(bytes.get(..end)?);
                return String::from_utf8(path).ok();
            }
            path.extend_from_slice(&bytes);
            at += part;
        }
        None
    }

    /// Whether every page of a range is mapped, writable where that is asked: what pinning needs.
    pub(crate) fn pinnable(self, address: u64, length: u64, writable: bool) -> bool {
        let Some(end) = address.checked_add(length) else {
            return false;
        };
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid)).unwrap_or_default();
        let mut next = address;
        for (low, high, may_write) in maps.lines().filter_map(mapping) {
            if low <= next && next < high && (may_write || !writable) {
                next = high;
            }
            if next >= end {
                return true;
            }
        }
        false
    }

    /// Pages that the process may lock; `None` without a bound.
    pub(crate) fn lockable_pages(self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())?;
        if effective >> CAP_IPC_LOCK & 1 == 1 {
            return None;
        }
        if let Some(bytes) = self.memlock {
            return Some(bytes / PAGE);
        }
        let limits = fs::read_to_string(format!("/proc/{}/limits", self.pid)).unwrap_or_default();
        let soft = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max locked memory"))
            .and_then(|rest| rest.split_whitespace().next().map(str::to_owned))?;
        soft.parse::<u64>().ok().map(|bytes| bytes / PAGE)
    }

    /// What a descriptor is, as /proc names it.
    pub(crate) fn descriptor(self, descriptor: u64) -> Option<String> {
        let link = fs::read_link(format!("/proc/{}/fd/{descriptor}", self.pid)).ok()?;
        Some(link.to_string_lossy().into_owned())
    }

    /// Whether a descriptor is open for writing.
    pub(crate) fn writable(self, descriptor: u64) -> bool {
        let info = fs::read_to_string(format!("/proc/{}/fdinfo/{descriptor}", self.pid));
        info.unwrap_or_default()
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok())
            .is_some_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
    }
}

/// Pages that a range touches, as `sev_pin_memory` counts them.
pub(crate) fn pages(address: u64, length: u64) -> u64 {
    let last = address.saturating_add(length.saturating_sub(1)) / PAGE;
    last - address / PAGE + 1
}

fn remote(address: u64, length: usize) -> Result<RemoteIoVec, Errno> {
    let base = usize::try_from(address).map_err(|_| Errno::EFAULT)?;
    Ok(RemoteIoVec { base, len: length })
}

/// Start, end and write permission of a line of `maps`.
fn mapping(line: &str) -> Option<(u64, u64, bool)> {
    let mut words = line.split_whitespace();
    let (low, high) = words.next()?.split_once('-')?;
    let low = u64::from_str_radix(low, 16).ok()?;
    let high = u64::from_str_radix(high, 16).ok()?;
    Some((low, high, words.next()?.as_bytes().get(1) == Some(&b'w')))
}

/// A page.
pub(crate) const PAGE: u64 = 4096;
const PATH_MAX: usize = 4096;
const CAP_IPC_LOCK: u32 = 14;
