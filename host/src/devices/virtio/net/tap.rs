//! How a tap must be set before a card can use it.
#![expect(unsafe_code, reason = "two ioctls that no safe interface has")]

use std::ffi::{c_int, c_ulong};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

nix::ioctl_write_ptr!(tun_set_vnet_header_size, b'T', 216, c_int);
nix::ioctl_write_int!(tun_set_offload, b'T', 208);

/// Sets the header size and refuses offloads: the kernel finishes checksums and segments before it hands frames over.
pub(super) fn configure(tap: &OwnedFd, header: usize) -> io::Result<()> {
    let size = c_int::try_from(header).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the kernel reads one `c_int` from a reference that outlives the call.
    unsafe { tun_set_vnet_header_size(tap.as_raw_fd(), &size) }?;
    let none: c_ulong = 0;
    // SAFETY: the descriptor is open, and the argument is a number.
    unsafe { tun_set_offload(tap.as_raw_fd(), none) }?;
    Ok(())
}
