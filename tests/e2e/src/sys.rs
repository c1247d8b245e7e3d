#![expect(
    unsafe_code,
    reason = "pre_exec, and packet sockets of one protocol, are not wrapped by a crate in use"
)]
//! The system calls that no crate in use wraps.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{getpid, getppid};

/// Makes a command start in a network namespace and end with the thread that starts it.
pub fn tie(command: &mut Command, namespace: &File) -> io::Result<()> {
    let namespace = namespace.try_clone()?;
    let parent = getpid();
    let prepare = move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        set_pdeathsig(Signal::SIGTERM)?;
        // The parent may have died before the request.
        if getppid() == parent {
            Ok(())
        } else {
            Err(io::ErrorKind::Interrupted.into())
        }
    };
    // SAFETY: the closure runs in the forked child and makes three system calls, all async-signal-safe; it allocates
    // nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
    Ok(())
}

/// A non-blocking packet socket that sees every frame of one EtherType in the current network namespace.
pub fn packet_socket(ether_type: u16) -> io::Result<File> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket(2) takes three integers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(ether_type.to_be())) };
    if fd.as_raw_fd() < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nothing else knows it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}
