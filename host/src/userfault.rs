//! Page faults that another process answers (userfaultfd(2)): made by the VMM for its guest memory, served by the mover.
//!
//! The VMM keeps its own copy of the descriptor. So if the mover dies, a vCPU that waits for a page waits on, until the
//! VMM is killed: it never goes on with a page of zeros.
#![expect(
    unsafe_code,
    reason = "ioctls that name memory, and a descriptor that the kernel returns"
)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

/// Faults of one range of memory.
#[derive(Debug)]
pub struct Faults {
    fd: OwnedFd,
    base: u64,
    length: u64,
}

impl Faults {
    /// Has faults of `length` bytes at `base` of this process wait for an answer, where nothing is in the memory yet.
    /// `device` is `/dev/userfaultfd`: who may open it is who may do this.
    pub fn register(device: BorrowedFd<'_>, base: u64, length: u64) -> Result<Self, FaultError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the request takes flags by value; a descriptor that is not /dev/userfaultfd refuses it.
        let raw = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        let raw = Errno::result(raw).map_err(failed("USERFAULTFD_IOC_NEW"))?;
        // SAFETY: the kernel has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let this = Self { fd, base, length };
        let mut api = Api {
            api: UFFD_API,
            ..Api::default()
        };
        this.request("UFFDIO_API", UFFDIO_API, &mut api)?;
        let mut register = Register {
            start: base,
            length,
            mode: MODE_MISSING,
            ioctls: 0,
        };
        this.request("UFFDIO_REGISTER", UFFDIO_REGISTER, &mut register)?;
        Ok(this)
    }

    /// The same, from a process that made it.
    pub fn received(fd: OwnedFd, base: u64, length: u64) -> Self {
        Self { fd, base, length }
    }

    /// Its descriptor, for the process that serves it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where the range begins in the process that made it.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Waits for a fault.
    pub fn wait(&self, milliseconds: u16) -> Result<(), FaultError> {
        match poll(
            &mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)],
            milliseconds,
        ) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(failed("poll")(e)),
        }
    }

    /// The number of a page that somebody waits for, if there is one.
    pub fn next(&self) -> Result<Option<u64>, FaultError> {
        let mut message = [0u8; MESSAGE];
        match nix::unistd::read(&self.fd, &mut message) {
            Ok(MESSAGE) => {}
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(e) => return Err(failed("read")(e)),
        }
        let address = message.get(16..24).and_then(|b| b.try_into().ok());
        let address = address.map_or(0, u64::from_le_bytes);
        let offset = address.checked_sub(self.base).filter(|o| *o < self.length);
        match (message.first(), offset) {
            (Some(&EVENT_PAGEFAULT), Some(offset)) => Ok(Some(offset / PAGE)),
            _ => Err(FaultError::Message),
        }
    }

    /// Puts whole pages where nothing is yet, each of them at once, and wakes who waits for them.
    pub fn place(&self, page: u64, bytes: &[u8]) -> Result<Placed, FaultError> {
        let offset = page.checked_mul(PAGE).ok_or(FaultError::Range)?;
        let length = bytes.len() as u64;
        if offset
            .checked_add(length)
            .is_none_or(|end| end > self.length)
        {
            return Err(FaultError::Range);
        }
        loop {
            let mut copy = Copy {
                dst: self.base + offset,
                src: bytes.as_ptr() as u64,
                length,
                mode: 0,
                copied: 0,
            };
            match self.request("UFFDIO_COPY", UFFDIO_COPY, &mut copy) {
                Ok(()) => return Ok(Placed::All),
                Err(FaultError::Ioctl(_, Errno::EEXIST)) => {
                    let mut range = Range {
                        start: self.base + offset,
                        length,
                    };
                    self.request("UFFDIO_WAKE", UFFDIO_WAKE, &mut range)?;
                    return Ok(Placed::Some);
                }
                // The other process changes its map; part of it may be there.
                Err(FaultError::Ioctl(_, Errno::EAGAIN)) if copied(&copy) == 0 => {}
                Err(FaultError::Ioctl(_, Errno::EAGAIN)) => return Ok(Placed::Some),
                Err(e) => return Err(e),
            }
        }
    }

    /// From here on nothing waits any more: what is not there is zero.
    pub fn end(&self) -> Result<(), FaultError> {
        let mut range = Range {
            start: self.base,
            length: self.length,
        };
        self.request("UFFDIO_UNREGISTER", UFFDIO_UNREGISTER, &mut range)
    }

    fn request<T>(&self, name: &'static str, number: u64, body: &mut T) -> Result<(), FaultError> {
        // SAFETY: each number below stands for a request whose structure is T, sizes tested; what the structure names
        // as a source is a slice that outlives the call, and what it names as a target is checked by the kernel against
        // the range that was registered.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), number, std::ptr::from_mut(body)) };
        Errno::result(result).map(drop).map_err(failed(name))
    }
}

/// How much was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// Everything.
    All,
    /// Some of it was there before.
    Some,
}

/// What can go wrong with faults.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// The kernel refused.
    #[error(
        "{0}: {1}; restore with `--memory at-once`, or use a host with /dev/userfaultfd (Linux 6.1)"
    )]
    Ioctl(&'static str, #[source] Errno),
    /// No message of a page fault in the range.
    #[error("a message that is no page fault of guest memory")]
    Message,
    /// More than one range.
    #[error("guest memory is in several ranges; restore with `--memory at-once`")]
    Layout,
    /// Outside.
    #[error("pages outside guest memory")]
    Range,
}

impl From<FaultError> for crate::vmm::protocol::RoleError {
    fn from(error: FaultError) -> Self {
        Self::new("USERFAULT", error)
    }
}

fn failed(what: &'static str) -> impl Fn(Errno) -> FaultError {
    move |error| FaultError::Ioctl(what, error)
}

fn copied(copy: &Copy) -> i64 {
    copy.copied.max(0)
}

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

/// `UFFDIO_COPY`, for the mover's filter.
pub const UFFDIO_COPY: u64 = 0xc028_aa03;
/// `UFFDIO_WAKE`.
pub const UFFDIO_WAKE: u64 = 0x8010_aa02;
/// `UFFDIO_UNREGISTER`.
pub const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
/// Size of `struct uffd_msg`.
const MESSAGE: usize = 32;
const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_that_their_numbers_say() {
        let size = |number: u64| (number >> 16 & 0x3fff) as usize;
        assert_eq!(size(UFFDIO_API), size_of::<Api>());
        assert_eq!(size(UFFDIO_REGISTER), size_of::<Register>());
        assert_eq!(size(UFFDIO_COPY), size_of::<Copy>());
        assert_eq!(size(UFFDIO_WAKE), size_of::<Range>());
        assert_eq!(size(UFFDIO_UNREGISTER), size_of::<Range>());
    }
}
