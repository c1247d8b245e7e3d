#![expect(unsafe_code, reason = "tap devices and bridges are set up by ioctl")]
//! Opens tap devices and puts them on a bridge; the VMM gets only the open descriptor.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Opens (and if need be makes) a tap device, sets it up, and puts it on `bridge`. It goes away with the descriptor
/// unless it was persistent.
pub fn open(name: &str, bridge: Option<&str>) -> Result<OwnedFd, TapError> {
    let tap = attached(name, 0)?;
    bring_up(name, bridge)?;
    Ok(tap)
}

/// The same with `count` queues, a descriptor for each; of one queue it is no different.
pub fn open_queues(name: &str, bridge: Option<&str>, count: u8) -> Result<Vec<OwnedFd>, TapError> {
    if count <= 1 {
        return Ok(vec![open(name, bridge)?]);
    }
    let queues = (0..count).map(|_| attached(name, libc::IFF_MULTI_QUEUE));
    let queues = queues.collect::<Result<_, _>>()?;
    bring_up(name, bridge)?;
    Ok(queues)
}

/// A descriptor that is a queue of the tap `name`, which is made with the first.
fn attached(name: &str, queues: libc::c_int) -> Result<OwnedFd, TapError> {
    let failed = |step| TapError::at(name, step);
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(failed(
            "open /dev/net/tun (load the module tun, run as root)",
        ))?;
    let mut request = interface(name);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
    // SAFETY: the descriptor is /dev/net/tun and the argument a live ifreq.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
        .map_err(|e| {
            let text = match e.raw_os_error() {
                Some(libc::EINVAL) => {
                    "create it (is it there already, made with or without `multi_queue` where this wants the other?)"
                }
                _ => "create it (is another guest using it?)",
            };
            failed(text)(e)
        })?;
    Ok(device.into())
}

fn bring_up(name: &str, bridge: Option<&str>) -> Result<(), TapError> {
    let failed = |step| TapError::at(name, step);
    let control = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(io::Error::from)
    .map_err(failed("open a control socket"))?;
    if let Some(bridge) = bridge {
        enslave(&control, bridge, name)
            .map_err(failed("put it on its bridge (does the bridge exist?)"))?;
    }
    set_up(&control, name).map_err(failed("set it up"))
}

/// A tap device that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("tap device {name}: cannot {step}: {source}")]
pub struct TapError {
    name: String,
    step: &'static str,
    source: io::Error,
}

impl TapError {
    fn at(name: &str, step: &'static str) -> impl FnOnce(io::Error) -> Self {
        let name = name.to_owned();
        move |source| Self { name, step, source }
    }
}

fn enslave(control: &OwnedFd, bridge: &str, port: &str) -> io::Result<()> {
    let port = CString::new(port)?;
    // SAFETY: the argument is a NUL-terminated string that lives through the call.
    let index = unsafe { libc::if_nametoindex(port.as_ptr()) };
    let mut request = interface(bridge);
    request.ifr_ifru.ifru_ifindex = i32::try_from(index).unwrap_or_default();
    // SAFETY: a socket and a live ifreq that names the bridge and the port's index.
    check(unsafe { libc::ioctl(control.as_raw_fd(), SIOCBRADDIF, &raw mut request) })
}

fn set_up(control: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = interface(name);
    request.ifr_ifru.ifru_flags =
        i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or_default();
    // SAFETY: a socket and a live ifreq.
    check(unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) })
}

/// An ifreq with the name in it; names longer than the field are cut, which the kernel then does not find.
fn interface(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .take(libc::IFNAMSIZ - 1)
        .zip(name.bytes())
    {
        *to = from.cast_signed();
    }
    request
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Adds a port to a bridge (linux/sockios.h); the libc crate lacks it.
const SIOCBRADDIF: libc::Ioctl = 0x89a2;
