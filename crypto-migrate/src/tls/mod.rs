//! TLS 1.3, mutual, with the allow-list inside the handshake and a deadline on every read and write.
//!
//! Only `TLS_AES_256_GCM_SHA384`; no resumption, no tickets, no early data; ALPN [`ALPN`]. Both ends verify
//! the chain and then SAN and SPKI of whoever terminates the TLS: the peer on a direct path, the gateway on a
//! gateway path. Not yet believed after the handshake: that the TLS peer is the migration peer; the session
//! decides that (see [`crate::session`]).
//!
//! The handshake is rustls's ([`handshake`]), the records after it are sealed and opened here ([`records`]): where the
//! bytes lie, instead of in buffers of their own.

mod handshake;
mod records;
mod verify;

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustls::{CertificateError, Connection};
use zeroize::Zeroizing;

pub use self::handshake::{accept, connect};
use self::records::{Receiver, Sender};
use crate::code::Code;
use crate::crypto::CryptoError;
use crate::identity::{IdentityError, PeerIdentity};

/// The application protocol.
pub const ALPN: &[u8] = b"casemate-migrate/1";

/// A connected byte stream that can time out.
pub trait Transport: Read + Write + Send {
    /// As `TcpStream::set_read_timeout`.
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
    /// As `TcpStream::set_write_timeout`.
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
    /// As `TcpStream::set_nonblocking`.
    fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()>;
    /// Ends both directions.
    fn close(&self) -> io::Result<()>;
}

macro_rules! transport {
    ($($stream:ty),*) => {$(
        impl Transport for $stream {
            fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                <$stream>::set_read_timeout(self, timeout)
            }
            fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                <$stream>::set_write_timeout(self, timeout)
            }
            fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
                <$stream>::set_nonblocking(self, nonblocking)
            }
            fn close(&self) -> io::Result<()> {
                self.shutdown(std::net::Shutdown::Both)
            }
        }
    )*};
}

transport!(TcpStream, UnixStream);

/// A connection that failed or was refused.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The peer was silent or too slow.
    #[error("the peer did not answer within the deadline of the phase")]
    Timeout,
    /// The connection ended in the middle.
    #[error("the connection ended before the stream did")]
    Truncated,
    /// Whoever terminates the TLS is refused by this host.
    #[error(transparent)]
    Refused(IdentityError),
    /// The peer refused this host's certificate or handshake.
    #[error("the peer ended TLS with the alert {0}; is this host in its allow-list?")]
    Alert(String),
    /// Rubbish, or another TLS version.
    #[error("TLS failed: {0}")]
    Protocol(rustls::Error),
    /// No or another application protocol.
    #[error("the peer does not speak casemate-migrate/1")]
    Alpn,
    /// The operator cancelled while waiting.
    #[error("cancelled")]
    Cancelled,
    /// A key has served as long as it may.
    #[error("a TLS key has protected as many records as it may, and the peer did not update it")]
    KeyLimit,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

impl TlsError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            TlsError::Timeout => Code::PeerTimeout,
            TlsError::Truncated => Code::StreamTruncated,
            TlsError::Refused(error) => error.code(),
            TlsError::Alert(_) => Code::TlsRefusedByPeer,
            TlsError::Protocol(_) => Code::TlsFailed,
            TlsError::Alpn => Code::AlpnMismatch,
            TlsError::Cancelled => Code::Cancelled,
            TlsError::KeyLimit => Code::SealLimit,
            TlsError::Io(_) => Code::TransportFailed,
        }
    }
}

/// A TLS connection over a transport.
pub struct TlsStream<T> {
    /// Of the handshake; knows its names and exporters.
    connection: Connection,
    io: T,
    sender: Sender,
    receiver: Receiver,
    peer: PeerIdentity,
}

impl<T: Transport> TlsStream<T> {
    /// Whoever terminates the TLS at the other side: allowed to, but not necessarily the migration peer.
    pub fn peer(&self) -> &PeerIdentity {
        &self.peer
    }

    /// Name of the cipher suite.
    pub fn suite(&self) -> String {
        let suite = self.connection.negotiated_cipher_suite();
        suite.map_or_else(|| "none".into(), |suite| format!("{:?}", suite.suite()))
    }

    /// Name of the key agreement group.
    pub fn group(&self) -> String {
        let group = self.connection.negotiated_key_exchange_group();
        group.map_or_else(|| "none".into(), |group| format!("{:?}", group.name()))
    }

    /// Keying material of this very TLS connection (RFC 8446, 7.5).
    pub fn exporter(&self, label: &[u8]) -> Result<Zeroizing<[u8; 32]>, TlsError> {
        let out = Zeroizing::new([0; 32]);
        self.connection
            .export_keying_material(out, label, None)
            .map_err(TlsError::Protocol)
    }

    /// Fills `out` or fails by the deadline; then `out` may hold bytes that nobody authenticated. `cancelled` is asked
    /// about ten times a second.
    pub fn read_exact(
        &mut self,
        out: &mut [u8],
        deadline: Instant,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), TlsError> {
        let mut filled = 0;
        while let Some(rest) = out.get_mut(filled..)
            && !rest.is_empty()
        {
            match self.receiver.read(rest) {
                Ok(Some(count)) => filled += count,
                Ok(None) if self.receiver.closed() => return Err(TlsError::Truncated),
                Ok(None) => self.fill(deadline, cancelled)?,
                Err(error) => return Err(self.refuse(error)),
            }
        }
        Ok(())
    }

    /// Writes everything or fails by the deadline. The bytes are encrypted where they lie: what is left is ciphertext.
    pub fn write_all(&mut self, bytes: &mut Vec<u8>, deadline: Instant) -> Result<(), TlsError> {
        bytes.push(0);
        let written = self.write_but_last(bytes, deadline);
        bytes.pop();
        written
    }

    /// The same without the last byte, which the record layer needs for a moment.
    pub(crate) fn write_but_last(
        &mut self,
        bytes: &mut [u8],
        deadline: Instant,
    ) -> Result<(), TlsError> {
        if self.receiver.take_update_request() {
            self.sender.update(&mut self.io, deadline)?;
        }
        self.sender.send(&mut self.io, bytes, deadline)
    }

    /// Whether the peer has sent anything, without waiting.
    pub fn readable(&mut self) -> Result<bool, TlsError> {
        if self.receiver.advance()? {
            return Ok(true);
        }
        self.io.set_nonblocking(true)?;
        let read = self.receiver.fill_from(&mut self.io);
        self.io.set_nonblocking(false)?;
        match read {
            Ok(0) => Ok(true), // the end is news, too
            Ok(_) => self.receiver.advance(),
            Err(error) if is_pause(&error) => Ok(false),
            Err(error) => Err(map_io(error)),
        }
    }

    /// Says that nothing follows.
    pub fn finish(&mut self, deadline: Instant) -> Result<(), TlsError> {
        self.sender.alert(&mut self.io, CLOSE_NOTIFY, deadline)
    }

    /// Reads and drops everything until the peer closes or the deadline passes, so that what was written last
    /// is not lost to a TCP reset; then closes.
    pub fn linger(&mut self, deadline: Instant) {
        loop {
            match self.receiver.advance() {
                Ok(true) if !self.receiver.closed() => self.receiver.drop_plain(),
                Ok(false) if self.fill(deadline, &|| false).is_ok() => {}
                _ => break,
            }
        }
        self.close();
    }

    /// Ends the connection without ceremony.
    pub fn close(&mut self) {
        if let Err(error) = self.io.close() {
            tracing::trace!(%error, "closing the connection");
        }
    }

    /// Waits for bytes.
    fn fill(&mut self, deadline: Instant, cancelled: &dyn Fn() -> bool) -> Result<(), TlsError> {
        loop {
            match self.receiver.fill_from(&mut self.io) {
                Ok(0) => return Err(TlsError::Truncated),
                Ok(_) => break,
                Err(error) if is_pause(&error) => {
                    if Instant::now() >= deadline {
                        return Err(TlsError::Timeout);
                    }
                    if cancelled() {
                        return Err(TlsError::Cancelled);
                    }
                }
                Err(error) => return Err(map_io(error)),
            }
        }
        // A peer that dribbles bytes makes progress, but not for longer than the deadline.
        if Instant::now() >= deadline {
            Err(TlsError::Timeout)
        } else if cancelled() {
            Err(TlsError::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Tells the peer, as far as it listens, why its record is refused.
    fn refuse(&mut self, error: TlsError) -> TlsError {
        let description = match &error {
            TlsError::Protocol(rustls::Error::DecryptError) => BAD_RECORD_MAC,
            TlsError::Protocol(_) => UNEXPECTED_MESSAGE,
            _ => return error,
        };
        let deadline = Instant::now() + ALERT_TIME;
        if let Err(error) = self.sender.alert(&mut self.io, description, deadline) {
            tracing::debug!(%error, "the TLS alert could not be sent");
        }
        error
    }
}

const SLICE: Duration = Duration::from_millis(100);
const ALERT_TIME: Duration = Duration::from_secs(1);
const CLOSE_NOTIFY: u8 = 0;
const UNEXPECTED_MESSAGE: u8 = 10;
const BAD_RECORD_MAC: u8 = 20;

/// A transport that returns at least every [`SLICE`].
fn bound<T: Transport>(transport: &T) -> io::Result<()> {
    transport.set_nonblocking(false)?;
    transport.set_read_timeout(Some(SLICE))?;
    transport.set_write_timeout(Some(SLICE))
}

fn is_pause(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

fn map_io(error: io::Error) -> TlsError {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error.kind() {
        BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof => TlsError::Truncated,
        _ => TlsError::Io(error),
    }
}

fn map_tls(error: rustls::Error) -> TlsError {
    match error {
        rustls::Error::AlertReceived(alert) => TlsError::Alert(format!("{alert:?}")),
        rustls::Error::NoApplicationProtocol => TlsError::Alpn,
        rustls::Error::InvalidCertificate(CertificateError::Other(ref other)) => {
            match other.0.downcast_ref::<IdentityError>() {
                Some(refused) => TlsError::Refused(refused.clone()),
                None => TlsError::Protocol(error),
            }
        }
        other => TlsError::Protocol(other),
    }
}

impl From<CryptoError> for TlsError {
    fn from(error: CryptoError) -> Self {
        match error {
            CryptoError::SealLimit => TlsError::KeyLimit,
            _ => TlsError::Protocol(rustls::Error::DecryptError),
        }
    }
}

/// Those that the document names.
#[cfg(test)]
pub(crate) fn limits() -> [u64; 3] {
    records::limits()
}

#[cfg(test)]
mod tests;
