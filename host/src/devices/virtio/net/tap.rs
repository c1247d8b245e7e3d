//! How a tap must be set before a card can use it.
#![expect(unsafe_code, reason = "three ioctls that no safe interface has")]

use std::ffi::{c_int, c_ulong};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;

nix::ioctl_write_ptr!(tun_set_vnet_header_size, b'T', 216, c_int);
nix::ioctl_write_int!(tun_set_offload, b'T', 208);
nix::ioctl_write_ptr!(tun_set_queue, b'T', 217, c_int);

/// Sets the header size and, until a driver says otherwise, refuses offloads: the kernel finishes checksums and segments
/// before it hands frames over.
pub(super) fn configure(tap: &OwnedFd, header: usize) -> io::Result<()> {
    let size = c_int::try_from(header).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the kernel reads one `c_int` from a reference that outlives the call.
    unsafe { tun_set_vnet_header_size(tap.as_raw_fd(), &size) }?;
    leave_undone(tap, 0)
}

/// What the kernel may leave undone in the frames it hands over (`TUN_F_*`).
pub(super) fn leave_undone(tap: &OwnedFd, flags: c_ulong) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the argument is a number.
    unsafe { tun_set_offload(tap.as_raw_fd(), flags) }?;
    Ok(())
}

/// Whether frames may arrive by this queue of its tap. The kernel refuses what is so already.
pub(super) fn take_part(tap: &OwnedFd, yes: bool) -> io::Result<()> {
    let flags = if yes {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the kernel reads an `ifreq`, of which `request` is one that outlives the call.
    unsafe { tun_set_queue(tap.as_raw_fd(), (&raw const request).cast()) }?;
    Ok(())
}
