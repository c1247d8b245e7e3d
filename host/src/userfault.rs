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

/// Faults of guest memory: of its ranges in the order of the memory file, in which they are packed. Pages are counted as
/// there.
#[derive(Debug)]
pub struct Faults {
    fd: OwnedFd,
    ranges: Vec<FaultRange>,
}

/// A range of memory of the process that made [`Faults`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultRange {
    /// Where it begins there.
    pub base: u64,
    /// Its bytes, whole pages.
    pub length: u64,
}

impl Faults {
    /// Has faults in these ranges of this process wait for an answer, where nothing is in the memory yet. `device` is
    /// `/dev/userfaultfd`: who may open it is who may do this.
    pub fn register(device: BorrowedFd<'_>, ranges: Vec<FaultRange>) -> Result<Self, FaultError> {
        check(&ranges)?;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the request takes flags by value; a descriptor that is not /dev/userfaultfd refuses it.
        let raw = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        let raw = Errno::result(raw).map_err(failed("USERFAULTFD_IOC_NEW"))?;
        // SAFETY: the kernel has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let this = Self { fd, ranges };
        let mut api = Api {
            api: UFFD_API,
            ..Api::default()
        };
        this.request("UFFDIO_API", UFFDIO_API, &mut api)?;
        for range in &this.ranges {
            let mut register = Register {
                start: range.base,
                length: range.length,
                mode: MODE_MISSING,
                ioctls: 0,
            };
            this.request("UFFDIO_REGISTER", UFFDIO_REGISTER, &mut register)?;
        }
        Ok(this)
    }

    /// The same, from a process that made it, whose word for its ranges is checked.
    pub fn received(fd: OwnedFd, ranges: Vec<FaultRange>) -> Result<Self, FaultError> {
        check(&ranges)?;
        Ok(Self { fd, ranges })
    }

    /// Its descriptor, for the process that serves it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where the ranges are in the process that made it.
    pub fn ranges(&self) -> &[FaultRange] {
        &self.ranges
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
        match (message.first(), page_at(&self.ranges, address)) {
            (Some(&EVENT_PAGEFAULT), Some(page)) => Ok(Some(page)),
            _ => Err(FaultError::Message),
        }
    }

    /// Puts whole pages where nothing is yet, each of them at once, and wakes who waits for them. Pages that follow one
    /// another in the file may lie in two ranges.
    pub fn place(&self, page: u64, bytes: &[u8]) -> Result<Placed, FaultError> {
        let (mut page, mut rest) = (page, bytes);
        let mut placed = Placed::All;
        while !rest.is_empty() {
            let (address, room) = address_of(&self.ranges, page).ok_or(FaultError::Range)?;
            let room = usize::try_from(room).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(room.min(rest.len()));
            if self.place_at(address, now)? == Placed::Some {
                placed = Placed::Some;
            }
            page += now.len() as u64 / PAGE;
            rest = later;
        }
        Ok(placed)
    }

    fn place_at(&self, address: u64, bytes: &[u8]) -> Result<Placed, FaultError> {
        let length = bytes.len() as u64;
        loop {
            let mut copy = Copy {
                dst: address,
                src: bytes.as_ptr() as u64,
                length,
                mode: 0,
                copied: 0,
            };
            match self.request("UFFDIO_COPY", UFFDIO_COPY, &mut copy) {
                Ok(()) => return Ok(Placed::All),
                Err(FaultError::Ioctl(_, Errno::EEXIST)) => {
                    let mut range = Range {
                        start: address,
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
        for range in &self.ranges {
            let mut range = Range {
                start: range.base,
                length: range.length,
            };
            self.request("UFFDIO_UNREGISTER", UFFDIO_UNREGISTER, &mut range)?;
        }
        Ok(())
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
    /// Ranges that guest memory does not have.
    #[error("ranges of guest memory that are none, too many, empty, uneven, or one upon another")]
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

/// Few, whole pages, apart from one another.
fn check(ranges: &[FaultRange]) -> Result<(), FaultError> {
    let mut ends = Vec::with_capacity(ranges.len());
    for range in ranges {
        let end = range.base.checked_add(range.length);
        ends.push((range.base, end.ok_or(FaultError::Layout)?));
    }
    ends.sort_unstable();
    let even = |range: &FaultRange| {
        range.length > 0 && range.base.is_multiple_of(PAGE) && range.length.is_multiple_of(PAGE)
    };
    let apart = ends.windows(2).all(|pair| match pair {
        [(_, end), (next, _)] => end <= next,
        _ => true,
    });
    if (1..=MAX_RANGES).contains(&ranges.len()) && ranges.iter().all(even) && apart {
        return Ok(());
    }
    Err(FaultError::Layout)
}

/// The page of the file that an address lies in.
fn page_at(ranges: &[FaultRange], address: u64) -> Option<u64> {
    let mut first = 0;
    for range in ranges {
        let within = address.checked_sub(range.base);
        if let Some(offset) = within.filter(|offset| *offset < range.length) {
            return Some(first + offset / PAGE);
        }
        first += range.length / PAGE;
    }
    None
}

/// Where a page of the file lies, and how many bytes there are from there to the end of its range.
fn address_of(ranges: &[FaultRange], page: u64) -> Option<(u64, u64)> {
    let mut before = page;
    for range in ranges {
        let pages = range.length / PAGE;
        if before < pages {
            let offset = before * PAGE;
            return Some((range.base + offset, range.length - offset));
        }
        before -= pages;
    }
    None
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
/// Below the PCI window, firmware's place, from 4 GiB.
const MAX_RANGES: usize = 3;

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

    const TWO: [FaultRange; 2] = [
        FaultRange {
            base: 0x9000,
            length: 0x3000,
        },
        FaultRange {
            base: 0x1000,
            length: 0x2000,
        },
    ];

    #[test]
    fn pages_are_counted_as_in_the_file_wherever_their_range_lies() {
        for (page, address, room) in [
            (0, 0x9000, 0x3000),
            (2, 0xb000, 0x1000),
            (3, 0x1000, 0x2000),
            (4, 0x2000, 0x1000),
        ] {
            assert_eq!(address_of(&TWO, page), Some((address, room)));
            assert_eq!(page_at(&TWO, address + 0xfff), Some(page));
        }
        assert_eq!(address_of(&TWO, 5), None);
        for outside in [0, 0xfff, 0x3000, 0x8fff, 0xc000, u64::MAX] {
            assert_eq!(page_at(&TWO, outside), None, "{outside:#x}");
        }
    }

    #[test]
    fn ranges_that_are_no_guest_memory_are_refused() {
        let range = |base, length| FaultRange { base, length };
        check(&TWO).unwrap();
        check(&[range(0x1000, 0x1000), range(0x2000, 0x1000)]).unwrap();
        for bad in [
            vec![],
            vec![range(0x1000, 0)],
            vec![range(0x1001, 0x1000)],
            vec![range(0x1000, 0x1001)],
            vec![range(0x1000, !0xfff)],
            vec![range(0x1000, 0x2000), range(0x2000, 0x1000)],
            (0..4).map(|n| range(n << 20, 0x1000)).collect(),
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }
}
