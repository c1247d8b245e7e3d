//! Requests of a raw image, many under way at once, by io_uring.
//!
//! What goes through a ring passes no seccomp filter, so the ring itself is bound before a filter is there: it is made
//! disabled, given the image as its only file, restricted to four operations on registered files and to no further
//! registration, and only then enabled. A filter lets threads enter this ring and no other.
#![expect(
    unsafe_code,
    reason = "the kernel reads and writes guest memory while requests are under way"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use nix::fcntl::FallocateFlags;

use super::super::GuestRam;
use super::image::Vector;

/// A ring on one image, and what is under way in it.
pub(super) struct Uring {
    ring: IoUring,
    flights: Vec<Option<Flight>>,
    under_way: usize,
    /// Requests in the ring that the kernel has not been told of.
    waiting: usize,
    /// The memory that requests under way point into: it stays mapped while there are any.
    ram: Option<GuestRam>,
}

/// A request, from its start to its answer.
pub(super) struct Flight {
    /// Its chain.
    pub(super) head: u16,
    /// Where in this process the byte of its status is.
    pub(super) status: usize,
    /// What it does.
    pub(super) action: Action,
    /// Where on the image.
    pub(super) offset: u64,
    /// How long.
    pub(super) len: u64,
    /// Its data in guest memory, in this process's addresses.
    pub(super) vectors: Vec<Vector>,
}

/// What a request does to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read,
    Write,
    Flush,
    /// Punches a hole.
    Discard,
    /// Writes zeros where no hole is wanted.
    Zero,
}

impl Uring {
    /// A ring for `file`, bound to what a disk needs. Before there is a filter.
    pub(super) fn new(file: &File) -> io::Result<Uring> {
        let ring = bound(file)?;
        Ok(Uring {
            ring,
            flights: (0..DEPTH).map(|_| None).collect(),
            under_way: 0,
            waiting: 0,
            ram: None,
        })
    }

    /// Readable while there are answers.
    pub(super) fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Requests from now on are in this memory.
    pub(super) fn attach(&mut self, ram: GuestRam) {
        self.finish_all(&mut |_, _| {});
        self.ram = Some(ram);
    }

    /// Whether one more can be started.
    pub(super) fn has_room(&self) -> bool {
        self.under_way < DEPTH && self.ram.is_some()
    }

    /// Whether any has not been answered.
    pub(super) fn is_busy(&self) -> bool {
        self.under_way > 0
    }

    /// Puts a request into the ring; gives it back if it cannot be.
    ///
    /// # Safety
    ///
    /// The vectors are slices of the memory that was attached last.
    pub(super) unsafe fn start(&mut self, flight: Flight) -> Result<(), Flight> {
        let free = self.flights.iter().position(Option::is_none);
        let Some((index, slot)) = free.and_then(|at| Some((at, self.flights.get_mut(at)?))) else {
            return Err(flight);
        };
        let flight = slot.insert(flight);
        let entry = entry(flight).user_data(index as u64);
        // SAFETY: the vectors are in a heap allocation of the flight, which stays in its slot until the kernel has answered;
        // they point into `self.ram`, which stays mapped as long. The caller vouches for the latter.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match (pushed, slot.take()) {
            (Ok(()), flight) => {
                *slot = flight;
                self.under_way += 1;
                self.waiting += 1;
                Ok(())
            }
            (Err(_), Some(flight)) => Err(flight),
            // Not reached: it was put there above.
            (Err(_), None) => Ok(()),
        }
    }

    /// Tells the kernel about all that was started.
    pub(super) fn submit(&mut self) {
        if self.waiting > 0 {
            self.enter(0);
            self.waiting = 0;
        }
    }

    /// A request that is answered, and what the kernel says: bytes, or a negative errno.
    pub(super) fn take_done(&mut self) -> Option<(Flight, i32)> {
        let answer = self.ring.completion().next()?;
        let index = usize::try_from(answer.user_data()).ok()?;
        let flight = self.flights.get_mut(index)?.take()?;
        self.under_way -= 1;
        Some((flight, answer.result()))
    }

    /// Waits until nothing is under way.
    pub(super) fn finish_all(&mut self, done: &mut dyn FnMut(Flight, i32)) {
        self.submit();
        loop {
            while let Some((flight, result)) = self.take_done() {
                done(flight, result);
            }
            if self.under_way == 0 {
                return;
            }
            self.enter(1);
        }
    }

    /// Enters the kernel, for as long as it takes: what was started is the kernel's to do or to refuse.
    fn enter(&self, want: usize) {
        let mut told = false;
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    if !told {
                        tracing::warn!(%error, "io_uring does not take requests yet");
                        told = true;
                    }
                    std::thread::sleep(RETRY);
                }
            }
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel writes to no memory that is not there.
        self.finish_all(&mut |_, _| {});
    }
}

fn entry(flight: &Flight) -> Entry {
    let (file, offset) = (Fixed(0), flight.offset);
    let vectors = flight.vectors.as_ptr().cast::<libc::iovec>();
    // At most one for each descriptor of a chain.
    let count = flight.vectors.len() as u32;
    let change = |mode: FallocateFlags| {
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        opcode::Fallocate::new(file, flight.len)
            .offset(offset)
            .mode(mode.bits())
            .build()
    };
    match flight.action {
        Action::Read => opcode::Readv::new(file, vectors, count)
            .offset(offset)
            .build(),
        Action::Write => opcode::Writev::new(file, vectors, count)
            .offset(offset)
            .build(),
        Action::Flush => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        Action::Discard => change(FallocateFlags::FALLOC_FL_PUNCH_HOLE),
        Action::Zero => change(FallocateFlags::FALLOC_FL_ZERO_RANGE),
    }
}

fn bound(file: &File) -> io::Result<IoUring> {
    let ring: IoUring = IoUring::builder()
        .dontfork()
        .setup_r_disabled()
        .build(DEPTH as u32)?;
    if !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let submitter = ring.submitter();
    submitter.register_files(&[file.as_raw_fd()])?;
    submitter.register_iowq_max_workers(&mut [WORKERS, WORKERS])?;
    submitter.register_restrictions(&mut [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
    ])?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

/// Most requests under way at once.
pub(super) const DEPTH: usize = 128;
/// Most threads of the kernel's for what cannot be done without waiting. They count among the jail's tasks.
const WORKERS: u32 = 4;
const RETRY: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn answer(ring: &mut IoUring, entry: &Entry) -> i32 {
        // SAFETY: what the entries below point at lives on.
        unsafe { ring.submission().push(entry) }.expect("room");
        ring.submit_and_wait(1).expect("entered");
        ring.completion().next().expect("answered").result()
    }

    fn file() -> File {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(1 << 20).expect("space");
        file
    }

    #[test]
    fn the_ring_itself_refuses_every_operation_but_those_of_a_disk() {
        let file = file();
        let mut ring = bound(&file).expect("this kernel has io_uring");
        let mut bytes = [0u8; 512];
        let vector = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let on = Fixed(0);
        let allowed = [
            opcode::Readv::new(on, &raw const vector, 1).build(),
            opcode::Writev::new(on, &raw const vector, 1).build(),
            opcode::Fsync::new(on).build(),
            opcode::Fallocate::new(on, 4096).build(),
        ];
        for entry in allowed {
            assert!(answer(&mut ring, &entry) >= 0, "{entry:?}");
        }
        let raw = io_uring::types::Fd(file.as_raw_fd());
        let path = c"/etc/passwd".as_ptr();
        let nowhere = io_uring::types::Fd(libc::AT_FDCWD);
        let refused = [
            opcode::Nop::new().build(),
            opcode::OpenAt::new(nowhere, path).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Close::new(raw).build(),
            opcode::Read::new(on, bytes.as_mut_ptr(), 512).build(),
            opcode::Ftruncate::new(on, 0).build(),
            // The right operation on a file that is not registered.
            opcode::Readv::new(raw, &raw const vector, 1).build(),
            // A flag that is not on the list.
            opcode::Fsync::new(on).build().flags(Flags::IO_LINK),
        ];
        for entry in refused {
            assert_eq!(answer(&mut ring, &entry), -libc::EACCES, "{entry:?}");
        }
        assert_eq!(
            answer(&mut ring, &opcode::Fsync::new(Fixed(1)).build()),
            -libc::EBADF
        );
    }

    #[test]
    fn nothing_more_can_be_registered() {
        let file = file();
        let ring = bound(&file).expect("this kernel has io_uring");
        let submitter = ring.submitter();
        let other = file.as_fd().as_raw_fd();
        let refused = |result: io::Result<()>| {
            let error = result.expect_err("it was registered").raw_os_error();
            assert_eq!(error, Some(libc::EACCES));
        };
        refused(submitter.unregister_files());
        refused(submitter.register_files_update(0, &[other]).map(drop));
        refused(submitter.register_eventfd(other));
        refused(submitter.register_personality().map(drop));
        refused(submitter.register_iowq_max_workers(&mut [64, 64]));
        assert!(
            submitter
                .register_restrictions(&mut [Restriction::sqe_op(opcode::Nop::CODE)])
                .is_err()
        );
    }
}
