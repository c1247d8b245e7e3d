//! The system calls that have no safe wrapper among our dependencies.

#![expect(
    unsafe_code,
    reason = "module loading, interface ioctls, /dev/mem and reboot have no safe wrapper"
)]

use std::fs::File;
use std::io::{self, Error};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, listen, socket,
};
use zeroize::Zeroizing;

use crate::options::Exit;

/// Loads an uncompressed kernel module.
pub(crate) fn load_module(module: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open, the parameter string is a NUL-terminated constant, and no flag is set.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::last_os_error())
    }
}

/// Sets an interface's IPv4 address and mask.
pub(crate) fn interface_address(name: &str, ip: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
    for (request, value) in [(libc::SIOCSIFADDR, ip), (libc::SIOCSIFNETMASK, mask)] {
        let mut data = [0; 14]; // port, address, padding: a sockaddr_in after its family
        for (to, from) in data.iter_mut().skip(2).zip(value.octets()) {
            *to = from.cast_signed();
        }
        let address = libc::sockaddr {
            sa_family: libc::AF_INET as libc::sa_family_t,
            sa_data: data,
        };
        interface_ioctl(
            request,
            &mut interface_request(name, libc::__c_anonymous_ifr_ifru { ifru_addr: address })?,
        )?;
    }
    Ok(())
}

/// Sets an interface's IFF_UP and IFF_RUNNING.
pub(crate) fn interface_up(name: &str) -> io::Result<()> {
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    interface_ioctl(
        libc::SIOCSIFFLAGS,
        &mut interface_request(name, libc::__c_anonymous_ifr_ifru { ifru_flags: flags })?,
    )
}

/// Copies a physical range by mapping `/dev/mem`: works where reading does not (above the direct map).
pub(crate) fn map_and_copy(memory: &File, gpa: u64, size: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let misfit = (gpa & 0xfff) as usize;
    let length = misfit + size;
    let offset = libc::off_t::try_from(gpa & !0xfff)
        .map_err(|_| Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: a new mapping at an address of the kernel's choice; nothing else refers to it.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ,
            libc::MAP_SHARED,
            memory.as_raw_fd(),
            offset,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    let mut copy = Zeroizing::new(vec![0; size]);
    // SAFETY: the mapping is `length` = `misfit + size` bytes long and readable, `copy` is `size` bytes long, and they
    // do not overlap. Bytes may change under the copy, which copies them without giving out a reference.
    unsafe {
        std::ptr::copy_nonoverlapping(base.cast::<u8>().add(misfit), copy.as_mut_ptr(), size)
    };
    // SAFETY: exactly the mapping made above; no pointer into it is left.
    unsafe { libc::munmap(base, length) };
    Ok(copy)
}

/// A vsock listener on this port, reachable from the host.
pub(crate) fn vsock_listener(port: u32) -> io::Result<OwnedFd> {
    let listener = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(
        listener.as_raw_fd(),
        &VsockAddr::new(libc::VMADDR_CID_ANY, port),
    )?;
    listen(&listener, Backlog::new(8)?)?;
    Ok(listener)
}

/// The next connection of a listener, as a file to read and write.
pub(crate) fn vsock_accept(listener: &OwnedFd) -> io::Result<File> {
    let connection = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just returned this descriptor, and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(connection) })
}

/// The context id of this machine's virtio-vsock device, as its driver knows it.
pub(crate) fn context_id() -> io::Result<u32> {
    let device = File::open("/dev/vsock")?;
    let mut cid = 0u32;
    // SAFETY: the request writes one u32, to one that outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) };
    match result {
        0 => Ok(cid),
        _ => Err(Error::last_os_error()),
    }
}

/// `IOCTL_VM_SOCKETS_GET_LOCAL_CID` (linux/vm_sockets.h).
const GET_LOCAL_CID: libc::Ioctl = 0x7b9;

/// Takes the machine down. Returns only if the kernel refuses.
pub(crate) fn go_down(exit: Exit) -> Error {
    let how = match exit {
        Exit::Poweroff => libc::RB_POWER_OFF,
        Exit::Reboot => libc::RB_AUTOBOOT,
        Exit::Halt => libc::RB_HALT_SYSTEM,
    };
    nix::unistd::sync();
    // SAFETY: the call takes no pointer; ending every process here is its purpose.
    unsafe { libc::reboot(how) };
    Error::last_os_error()
}

fn interface_request(name: &str, value: libc::__c_anonymous_ifr_ifru) -> io::Result<libc::ifreq> {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: value,
    };
    if name.len() >= libc::IFNAMSIZ {
        return Err(Error::from(io::ErrorKind::InvalidInput)); // the last byte must stay NUL
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn interface_ioctl(request: libc::Ioctl, argument: &mut libc::ifreq) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?; // any IPv4 socket carries interface ioctls
    // SAFETY: the socket is open; these requests read a whole `ifreq`, which `argument` is, with a NUL-terminated name.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_copied_from_the_middle_of_a_mapping() {
        let path = std::env::temp_dir().join(format!("casemate-guest-map-{}", std::process::id()));
        let bytes: Vec<u8> = (0..3 * 4096_u32).map(|n| (n % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(
            *map_and_copy(&file, 4096 + 5, 5000).unwrap(),
            bytes[4101..9101]
        );
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn interface_names_are_bounded() {
        assert!(interface_up("a-name-of-sixteen").is_err());
        assert_eq!(
            interface_up("nonexistent0").unwrap_err().raw_os_error(),
            Some(libc::ENODEV)
        );
    }
}
