//! The system calls that nix has not: seccomp with a listener, its notifications, memory of another process.
#![expect(
    unsafe_code,
    reason = "seccomp notification and process_vm have no safe wrappers"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{seccomp_notif, seccomp_notif_addfd, seccomp_notif_resp, sock_filter, sock_fprog};
use nix::errno::Errno;
use nix::unistd::Pid;

/// Makes the program of `command` start traced by the calling thread and under `filter`; its listener arrives
/// at the other end of `socket`.
pub(crate) fn start_under(command: &mut Command, filter: Vec<sock_filter>, socket: OwnedFd) {
    let prepare = move || {
        // SAFETY: plain system calls on memory that lives through them; between fork and exec nothing else is
        // allowed, and nothing here allocates or locks.
        unsafe {
            if libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) == -1
                || libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == -1
            {
                return Err(io::Error::last_os_error());
            }
            let program = sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_ptr().cast_mut(),
            };
            let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
                | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
            let mode = libc::SECCOMP_SET_MODE_FILTER;
            let listener = libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program);
            if listener < 0 {
                return Err(io::Error::last_os_error());
            }
            send_descriptor(socket.as_raw_fd(), listener as RawFd)
        }
    };
    // SAFETY: see above; the closure holds what it uses.
    unsafe { command.pre_exec(prepare) };
}

/// Sends one descriptor with one byte; async-signal-safe.
unsafe fn send_descriptor(socket: RawFd, descriptor: RawFd) -> io::Result<()> {
    let mut byte = [0u8];
    let mut vector = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let mut control = [0u64; 4];
    // SAFETY: the message and its parts live through sendmsg; `control` has room for one header and a descriptor.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header)
            .cast::<RawFd>()
            .write_unaligned(descriptor);
        match libc::sendmsg(socket, &raw const message, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

/// What a traced thread has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It has ended.
    Ended,
    /// At `PTRACE_EVENT_*`.
    Event(i32),
    /// At the end of a system call.
    Syscall,
    /// A signal is on its way to it; nix has no name for those above 31.
    Signal(i32),
}

/// Waits for a traced thread of the calling thread: its number, what it has come to, and how it ended if it has.
pub(crate) fn wait_traced() -> Result<(Pid, Stop, String), Errno> {
    let mut status = 0;
    // This thread's own only: other doubles of this process have threads of their own.
    let flags = libc::__WALL | libc::__WNOTHREAD;
    // SAFETY: the kernel writes one integer that lives through the call.
    let pid = Errno::result(unsafe { libc::waitpid(-1, &raw mut status, flags) })?;
    let (stop, end) = if libc::WIFEXITED(status) {
        let code = libc::WEXITSTATUS(status);
        (Stop::Ended, format!("exit status {code}"))
    } else if libc::WIFSIGNALED(status) {
        (Stop::Ended, format!("signal {}", libc::WTERMSIG(status)))
    } else {
        let signal = libc::WSTOPSIG(status);
        let stop = match status >> 16 {
            0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
            0 => Stop::Signal(signal),
            event => Stop::Event(event),
        };
        (stop, String::new())
    };
    Ok((Pid::from_raw(pid), stop, end))
}

/// Lets a stopped thread go on, with a signal or (0) without.
pub(crate) fn go_on(pid: Pid, signal: i32) {
    // One that was killed meanwhile needs no leave.
    // SAFETY: numbers only.
    let _ = unsafe { libc::ptrace(libc::PTRACE_CONT, pid.as_raw(), 0, i64::from(signal)) };
}

/// The listening end of a filter.
pub(crate) struct Listener(OwnedFd);

/// A system call that waits for its answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) id: u64,
    pub(crate) pid: Pid,
    pub(crate) number: libc::c_long,
    pub(crate) args: [u64; 6],
}

impl Listener {
    pub(crate) fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// The next call; blocks.
    pub(crate) fn receive(&self) -> Result<Call, Errno> {
        // SAFETY: all of this structure's bit patterns are valid; the kernel asks for zeroes.
        let mut call: seccomp_notif = unsafe { std::mem::zeroed() };
        self.ioctl(libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call)?;
        Ok(Call {
            id: call.id,
            pid: Pid::from_raw(i32::try_from(call.pid).unwrap_or(0)),
            number: libc::c_long::from(call.data.nr),
            args: call.data.args,
        })
    }

    /// Whether the call still waits: if so, its pid was the caller's while its memory was read.
    pub(crate) fn waits(&self, call: &Call) -> bool {
        let mut id = call.id;
        self.ioctl(libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw mut id)
            .is_ok()
    }

    /// Lets the kernel carry the call out.
    pub(crate) fn pass(&self, call: &Call) -> Result<(), Errno> {
        self.respond(call, 0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32)
    }

    /// Ends the call with a value or an errno.
    pub(crate) fn answer(&self, call: &Call, outcome: Result<i64, Errno>) -> Result<(), Errno> {
        match outcome {
            Ok(value) => self.respond(call, value, 0, 0),
            Err(errno) => self.respond(call, 0, -(errno as i32), 0),
        }
    }

    /// Ends the call with a new descriptor of the caller's.
    pub(crate) fn inject(&self, call: &Call, descriptor: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut request = seccomp_notif_addfd {
            id: call.id,
            flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
            srcfd: descriptor.as_raw_fd().cast_unsigned(),
            newfd: 0,
            newfd_flags: libc::O_CLOEXEC.cast_unsigned(),
        };
        self.ioctl(libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw mut request)
    }

    fn respond(&self, call: &Call, val: i64, error: i32, flags: u32) -> Result<(), Errno> {
        let mut response = seccomp_notif_resp {
            id: call.id,
            val,
            error,
            flags,
        };
        self.ioctl(libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut response)
    }

    fn ioctl<T>(&self, request: libc::Ioctl, argument: *mut T) -> Result<(), Errno> {
        // SAFETY: each caller passes the structure of its request, alive and writable.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) }).map(drop)
    }
}

/// Takes the listener out of the socket; `None` if the child ended before it sent one.
pub(crate) fn receive_listener(socket: BorrowedFd<'_>) -> Option<Listener> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut byte = [0u8];
    let mut vectors = [io::IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut vectors, Some(&mut space), flags).ok()?;
    message.cmsgs().ok()?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().map(|fd| {
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
            Listener::new(unsafe { OwnedFd::from_raw_fd(*fd) })
        }),
        _ => None,
    })
}
