//! What the agent and VMMs do alike with files that hold disks or memory: their locks, and where they hold anything.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::{Whence, lseek};

/// How an image is held: by its open file description (`fcntl(2)`, open file description locks).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// By one that writes.
    Alone,
    /// By any number that read.
    Shared,
    /// Not at all.
    Free,
}

/// Holds an image so, or fails soon with `EAGAIN` or `EACCES`. Not at once: the kernel takes a ring apart, and with it the
/// lock of a guest that is gone, a moment after its process.
pub fn hold(file: &File, how: Hold) -> Result<(), Errno> {
    let begun = Instant::now();
    let mut result = set_lock(file, how);
    while matches!(result, Err(Errno::EAGAIN | Errno::EACCES)) && begun.elapsed() < PATIENCE {
        std::thread::sleep(PATIENCE / 50);
        result = set_lock(file, how);
    }
    result
}

/// The next bytes for which the file has storage, from `at` on: where they begin and end.
pub fn next_data(file: &File, at: u64) -> io::Result<Option<(u64, u64)>> {
    let at = i64::try_from(at).map_err(io::Error::other)?;
    let start = match lseek(file, at, Whence::SeekData) {
        Err(Errno::ENXIO) => return Ok(None),
        found => found?,
    };
    let end = lseek(file, start, Whence::SeekHole)?;
    Ok(Some((start.unsigned_abs(), end.unsigned_abs())))
}

fn set_lock(file: &File, how: Hold) -> Result<(), Errno> {
    let kind = match how {
        Hold::Alone => libc::F_WRLCK,
        Hold::Shared => libc::F_RDLCK,
        Hold::Free => libc::F_UNLCK,
    };
    let whole = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).map(drop)
}

/// How long a lock is waited for.
const PATIENCE: Duration = Duration::from_millis(500);
