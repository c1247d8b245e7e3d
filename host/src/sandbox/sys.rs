//! The few system calls of the sandbox that no crate offers, each behind a safe signature.
#![expect(
    unsafe_code,
    reason = "raw system calls; each block names why it is harmless to memory"
)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// `prctl` operations whose arguments are plain numbers.
pub(crate) fn prctl(operation: libc::c_int, argument: u64) -> Result<i32, Errno> {
    // SAFETY: every operation used in this crate takes numbers only, so no memory is touched.
    Errno::result(unsafe { libc::prctl(operation, argument, 0u64, 0u64, 0u64) })
}

/// `prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)`.
pub(crate) fn clear_ambient() -> Result<(), Errno> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64).map(drop)
}

/// Empties the effective, permitted and inheritable sets of the calling thread.
pub(crate) fn capset_empty() -> Result<(), Errno> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let data = [[0u32; 3]; 2];
    // SAFETY: version 3 reads one header and two data structures of three words; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(result).map(drop)
}

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: RawFd) -> Result<(), Errno> {
    let first = u64::try_from(first).map_err(|_| Errno::EBADF)?;
    // SAFETY: called by a process that is about to own nothing but the descriptors below `first`; the
    // caller holds no owned descriptor above.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u64::from(u32::MAX), 0u64) };
    Errno::result(result).map(drop)
}

/// Takes over a descriptor of this process by its number, once it is known to be open.
pub(crate) fn adopt(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: F_GETFD only asks whether the number is open.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    // SAFETY: open (just asked), and handed over at this number by the parent, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Number of open descriptors below `limit`, by asking for each.
pub(crate) fn count_descriptors(limit: RawFd) -> u32 {
    // SAFETY: F_GETFD only asks whether the number is open.
    let open = |fd: &RawFd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0;
    u32::try_from((0..limit).filter(open).count()).unwrap_or(u32::MAX)
}

/// A descriptor for the process `pid`, close-on-exec.
pub(crate) fn pidfd_open(pid: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only; the result is a new descriptor that nobody else owns.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0u64) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: just created by the kernel.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// SIGKILL to the process behind `pidfd`.
pub(crate) fn pidfd_kill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: numbers only and a null siginfo.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0u64,
        )
    };
    Errno::result(result).map(drop)
}

/// The kernel's Landlock ABI, 0 without Landlock.
pub(crate) fn landlock_abi() -> u32 {
    // SAFETY: with LANDLOCK_CREATE_RULESET_VERSION the kernel wants a null attribute of size zero.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(abi).unwrap_or(0)
}

/// Joins a new, empty session keyring, so that the parent's keys are out of reach.
pub(crate) fn new_session_keyring() -> Result<(), Errno> {
    // SAFETY: a null name asks for an anonymous keyring.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0u64) };
    Errno::result(result).map(drop)
}

/// Ends the process at once, without destructors.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no precondition.
    unsafe { libc::_exit(code) }
}

/// Any system call, arguments as the kernel takes them.
///
/// # Safety
/// Pointers among the arguments must be valid for what the call does, or such that the kernel refuses them;
/// the call must not change memory or descriptors that safe code relies on.
pub(crate) unsafe fn raw(call: i64, args: [u64; 6]) -> Result<i64, Errno> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the caller's promise.
    Errno::result(unsafe { libc::syscall(call, a, b, c, d, e, f) })
}

/// Gives back the pages of the program itself that this process has read: its code and constants, which lie in the page
/// cache and come again by themselves when they are used. What only the start needed stays away.
pub fn forget_program_pages() {
    // SAFETY: the callback keeps to the interface, and takes no data.
    unsafe { libc::dl_iterate_phdr(Some(forget_object), std::ptr::null_mut()) };
}

unsafe extern "C" fn forget_object(
    object: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: glibc lends a live description of one loaded object, with its program headers.
    let object = unsafe { &*object };
    if object.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: as above; the headers are mapped as long as the object is.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = object.dlpi_addr.wrapping_add(header.p_vaddr);
        let page = start & !(PROGRAM_PAGE - 1);
        let length = header.p_memsz + (start - page);
        // SAFETY: a private mapping of a file that was never writable: its pages are the file's, and are read from it
        // again. The vDSO and other objects without a file refuse.
        let _ = unsafe { libc::madvise(page as *mut _, length as usize, libc::MADV_DONTNEED) };
    }
    0
}

const PROGRAM_PAGE: u64 = 4096;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
const KEYCTL_JOIN_SESSION_KEYRING: u64 = 1;

/// Makes glibc's allocator ask the kernel for nothing but memory, and seldom.
///
/// It reads files below `/proc` and `/sys` when it makes an arena beyond the first or gives a part of one back, which a
/// thread's filter would take for an attack. So there is one arena, and it keeps what it has: the same large buffers
/// come and go with every batch of pages.
pub fn quiet_allocator() {
    let settings = [
        (libc::M_ARENA_MAX, 1),
        (libc::M_TRIM_THRESHOLD, 1 << 30),
        (libc::M_MMAP_THRESHOLD, 16 << 20),
    ];
    for (setting, value) in settings {
        // SAFETY: sets a number in the allocator; no pointer is involved.
        if unsafe { libc::mallopt(setting, value) } != 1 {
            tracing::warn!(
                setting,
                "the allocator may open files from filtered threads"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_own_pages_go_and_come_again() {
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = statm.lines().find(|line| line.starts_with("RssFile:"));
            let kib = line.unwrap().split_whitespace().nth(1).unwrap();
            kib.parse::<u64>().unwrap()
        };
        let before = resident();
        forget_program_pages();
        let after = resident();
        // Other tests go on in the meantime, and what they run comes back.
        assert!(after < before, "{before} KiB, then {after} KiB");
        // Everything still works.
        assert_eq!(format!("{:?}", [1, 2]), "[1, 2]");
    }
}
