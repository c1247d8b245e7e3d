//! The host's half of the network figures: a tap that all guests get in turn, and who answers behind it.
#![expect(
    unsafe_code,
    reason = "a persistent tap and its address are set up by ioctl"
)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// The tap's name.
pub const TAP: &str = "bench0";
/// The host's address on it.
pub const HERE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The guest's.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Of the guest's card.
pub const MAC: &str = "52:54:00:00:00:77";
/// The same.
pub const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x77];

/// A tap that stays when a VMM closes it; it goes away with this.
pub struct Tap(File);

impl Tap {
    /// Makes it, with the host's address, up.
    pub fn new() -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .context("open /dev/net/tun")?;
        let mut request = request();
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
        ioctl(&file, libc::TUNSETIFF, &mut request).context("make the tap")?;
        // SAFETY: a tun descriptor; the argument is a number.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1) })
            .context("keep the tap")?;
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("make a socket")?;
        let mask = Ipv4Addr::new(255, 255, 255, 0);
        for (what, address) in [(libc::SIOCSIFADDR, HERE), (libc::SIOCSIFNETMASK, mask)] {
            let mut request = self::request();
            let mut data = [0; 14];
            for (to, from) in data.iter_mut().skip(2).zip(address.octets()) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_addr = libc::sockaddr {
                sa_family: libc::AF_INET as libc::sa_family_t,
                sa_data: data,
            };
            ioctl(&socket, what, &mut request).context("give the tap its address")?;
        }
        let mut request = self::request();
        let up = libc::IFF_UP | libc::IFF_RUNNING;
        request.ifr_ifru.ifru_flags = i16::try_from(up).unwrap_or_default();
        ioctl(&socket, libc::SIOCSIFFLAGS, &mut request).context("set the tap up")?;
        // Only one may hold it: from here on the guests' VMMs.
        drop(file);
        Ok(Self(
            OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/net/tun")?,
        ))
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let mut request = request();
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
        if ioctl(&self.0, libc::TUNSETIFF, &mut request).is_ok() {
            // SAFETY: as in `new`.
            let _ = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETPERSIST, 0) };
        }
    }
}

/// Answers guests from now on.
pub fn listen() -> Result<()> {
    let listener = TcpListener::bind((HERE, PORT)).context("listen for the guest")?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A guest that has gone is the next one's business.
            thread::spawn(move || serve(stream));
        }
    });
    Ok(())
}

/// One figure: its first byte says which.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut which = [0];
    stream.read_exact(&mut which)?;
    match which {
        [b's'] => take(stream),
        [b'r'] => give(stream),
        _ => echo(stream),
    }
}

fn take(mut stream: TcpStream) -> io::Result<()> {
    let mut bytes = vec![0; CHUNK];
    let mut all = 0u64;
    loop {
        match stream.read(&mut bytes)? {
            0 => return stream.write_all(&all.to_le_bytes()),
            count => all += count as u64,
        }
    }
}

fn give(mut stream: TcpStream) -> io::Result<()> {
    let bytes = vec![0x5a; CHUNK];
    let begun = Instant::now();
    while begun.elapsed() < LONG_ENOUGH {
        stream.write_all(&bytes)?;
    }
    Ok(())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// A request for the tap.
fn request() -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn ioctl(
    on: &impl std::os::fd::AsRawFd,
    what: libc::Ioctl,
    request: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: an open descriptor and a live ifreq, which is what each request here reads.
    check(unsafe { libc::ioctl(on.as_raw_fd(), what, std::ptr::from_mut(request)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const PORT: u16 = 5201;
const CHUNK: usize = 64 << 10;
const LONG_ENOUGH: Duration = Duration::from_millis(1500);
const PATIENCE: Duration = Duration::from_secs(10);
