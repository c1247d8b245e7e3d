//! The system calls that no crate in use wraps.
#![expect(
    unsafe_code,
    reason = "module loading, power-off and interface flags are raw system calls"
)]

use std::{
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

/// Load a kernel module from an uncompressed file.
pub fn load_module(file: &File) -> nix::Result<()> {
    // SAFETY: finit_module(2) reads from the descriptor, which `file` keeps open, and from an empty C string.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match Errno::result(result) {
        Err(Errno::EEXIST) | Ok(_) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// End the machine; with QEMU's `-no-reboot` the process ends.
pub fn restart() -> nix::Result<()> {
    // SAFETY: reboot(2) with a constant command touches no memory of ours.
    Errno::result(unsafe { libc::reboot(libc::RB_AUTOBOOT) }).map(drop)
}

/// Bring up `lo` of the current network namespace.
pub fn loopback_up() -> nix::Result<()> {
    let socket: OwnedFd = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero `ifreq` is valid: its fields are byte arrays, integers and a union of such.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or_default();
    // SAFETY: SIOCSIFFLAGS reads an `ifreq`, and `request` is one that outlives the call.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })
        .map(drop)
}
