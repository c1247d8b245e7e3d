//! Where the broker is, and a connection to it that ends at its deadline.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::time::{Duration, Instant};

use vsock::{VsockAddr, VsockStream};

/// `http://HOST:PORT` or `vsock://CID:PORT`; the host's CID is 2.
///
/// There is no https: a secret is encrypted to a key of this guest's own and needs no other
/// protection on the way. What TLS would add is who the *broker* is: a guest that must know keeps
/// that in what it does with the secret, which opens the right disk or does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Over TCP: host and port.
    Tcp(String),
    /// Over vsock: context id and port.
    Vsock(u32, u32),
}

/// Not such an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no broker's address; give http://HOST:PORT or vsock://CID:PORT (the host is CID 2)"
)]
pub struct EndpointError(String);

/// A connection with a deadline for all that is read and written.
pub struct Connection {
    stream: Stream,
    ends: Instant,
}

enum Stream {
    Tcp(TcpStream),
    Vsock(VsockStream),
}

impl Endpoint {
    /// Connects; the connection is over `patience` from now.
    pub fn connect(&self, patience: Duration) -> io::Result<Connection> {
        let ends = Instant::now() + patience;
        let stream = match self {
            Self::Tcp(address) => Stream::Tcp(connect_tcp(address, patience)?),
            Self::Vsock(cid, port) => {
                Stream::Vsock(VsockStream::connect(&VsockAddr::new(*cid, *port))?)
            }
        };
        Ok(Connection { stream, ends })
    }

    /// What the `Host` header says.
    pub fn authority(&self) -> String {
        match self {
            Self::Tcp(address) => address.clone(),
            Self::Vsock(cid, port) => format!("vsock-{cid}:{port}"),
        }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        parsed(text).ok_or_else(|| EndpointError(text.to_owned()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Vsock(cid, port) => write!(f, "vsock://{cid}:{port}"),
        }
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left()?;
        match &mut self.stream {
            Stream::Tcp(stream) => {
                stream.set_read_timeout(Some(left))?;
                stream.read(buffer)
            }
            Stream::Vsock(stream) => {
                stream.set_read_timeout(Some(left))?;
                stream.read(buffer)
            }
        }
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.left()?;
        match &mut self.stream {
            Stream::Tcp(stream) => {
                stream.set_write_timeout(Some(left))?;
                stream.write(bytes)
            }
            Stream::Vsock(stream) => {
                stream.set_write_timeout(Some(left))?;
                stream.write(bytes)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Connection {
    fn left(&self) -> io::Result<Duration> {
        let left = self.ends.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        Ok(left)
    }
}

fn connect_tcp(address: &str, patience: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn parsed(text: &str) -> Option<Endpoint> {
    if let Some(rest) = text.strip_prefix("http://") {
        let address = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = address.rsplit_once(':')?;
        let port: u16 = port.parse().ok()?;
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-_:[]".contains(c);
        let good = port != 0 && !host.is_empty() && host.chars().all(plain);
        return good.then(|| Endpoint::Tcp(address.to_owned()));
    }
    let (cid, port) = text.strip_prefix("vsock://")?.split_once(':')?;
    Some(Endpoint::Vsock(cid.parse().ok()?, port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_whole_or_refused() {
        for (text, endpoint) in [
            (
                "http://10.0.0.1:8080",
                Endpoint::Tcp("10.0.0.1:8080".into()),
            ),
            ("http://[::1]:80/", Endpoint::Tcp("[::1]:80".into())),
            ("vsock://2:8080", Endpoint::Vsock(2, 8080)),
        ] {
            assert_eq!(text.parse(), Ok(endpoint));
        }
        for bad in [
            "",
            "http://",
            "http://host",
            "http://host:0",
            "http://host:x",
            "http://a b:1",
            "http://host:1/path",
            "http://u@h:1",
            "https://host:1",
            "vsock://2",
            "vsock://x:1",
            "vsock://2:-1",
            "http://h\r\nx:1",
        ] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad:?}");
        }
    }
}
