//! TLS 1.3, mutual, with the allow-list inside the handshake and a deadline on every read and write.
//!
//! Only `TLS_AES_256_GCM_SHA384`; no resumption, no tickets, no early data; ALPN [`ALPN`]. Both ends verify
//! the chain and then SAN and SPKI of whoever terminates the TLS: the peer on a direct path, the gateway on a
//! gateway path. Not yet believed after the handshake: that the TLS peer is the migration peer; the session
//! decides that (see [`crate::session`]).

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, ClientConnection, Resumption};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ServerConfig, ServerConnection};
use rustls::{CertificateError, Connection, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use zeroize::Zeroizing;

use crate::code::Code;
use crate::identity::{AllowList, IdentityError, Local, PeerIdentity, TrustAnchors, Usage};

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
            TlsError::Io(_) => Code::TransportFailed,
        }
    }
}

/// A TLS connection over a transport.
pub struct TlsStream<T> {
    connection: Connection,
    io: BoundedIo<T>,
    peer: PeerIdentity,
}

/// Connects as client (source) and completes the handshake within `timeout`.
pub fn connect<T: Transport>(
    transport: T,
    local: &Local,
    timeout: Duration,
) -> Result<TlsStream<T>, TlsError> {
    let (provider, verifier) = parts(local);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Protocol)?
        .dangerous() // the verifier is stricter than the default one
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(local.identity.resolver());
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false; // the name of a host is nobody else's business
    let name = ServerName::try_from("casemate.invalid").map_err(|_| TlsError::Alpn)?;
    let connection = ClientConnection::new(Arc::new(config), name).map_err(TlsError::Protocol)?;
    handshake(Connection::Client(connection), transport, timeout)
}

/// Accepts as server (destination) and completes the handshake within `timeout`.
pub fn accept<T: Transport>(
    transport: T,
    local: &Local,
    timeout: Duration,
) -> Result<TlsStream<T>, TlsError> {
    let (provider, verifier) = parts(local);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Protocol)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(local.identity.resolver());
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    let connection = ServerConnection::new(Arc::new(config)).map_err(TlsError::Protocol)?;
    handshake(Connection::Server(connection), transport, timeout)
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

    /// Fills `out` or fails by the deadline. `cancelled` is asked about ten times a second.
    pub fn read_exact(
        &mut self,
        out: &mut [u8],
        deadline: Instant,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), TlsError> {
        let mut rest = out;
        while !rest.is_empty() {
            match self.connection.reader().read(rest) {
                Ok(0) => return Err(TlsError::Truncated),
                Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.fill(deadline, cancelled)?
                }
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(TlsError::Truncated);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes everything or fails by the deadline.
    pub fn write_all(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), TlsError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let count = self.connection.writer().write(rest)?;
            rest = rest.get(count..).unwrap_or_default();
            self.flush(deadline)?;
        }
        Ok(())
    }

    /// Whether the peer has sent anything, without waiting.
    pub fn readable(&mut self) -> Result<bool, TlsError> {
        let state = self.connection.process_new_packets().map_err(map_tls)?;
        if state.plaintext_bytes_to_read() > 0 || state.peer_has_closed() {
            return Ok(true);
        }
        self.io.inner.set_nonblocking(true)?;
        let read = self.connection.read_tls(&mut self.io);
        self.io.inner.set_nonblocking(false)?;
        match read {
            Ok(0) => Ok(true), // the end is news, too
            Ok(_) => {
                let state = self.connection.process_new_packets().map_err(map_tls)?;
                Ok(state.plaintext_bytes_to_read() > 0 || state.peer_has_closed())
            }
            Err(error) if is_pause(&error) => Ok(false),
            Err(error) => Err(map_io(error)),
        }
    }

    /// Says that nothing follows.
    pub fn finish(&mut self, deadline: Instant) -> Result<(), TlsError> {
        self.connection.send_close_notify();
        self.flush(deadline)
    }

    /// Reads and drops everything until the peer closes or the deadline passes, so that what was written last
    /// is not lost to a TCP reset; then closes.
    pub fn linger(&mut self, deadline: Instant) {
        let mut sink = [0; 4096];
        loop {
            match self.connection.reader().read(&mut sink) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.fill(deadline, &|| false).is_err() {
                        break;
                    }
                }
                Err(_) => break,
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        self.close();
    }

    /// Ends the connection without ceremony.
    pub fn close(&mut self) {
        if let Err(error) = self.io.inner.close() {
            tracing::trace!(%error, "closing the connection");
        }
    }

    fn fill(&mut self, deadline: Instant, cancelled: &dyn Fn() -> bool) -> Result<(), TlsError> {
        match self.flush(deadline) {
            // The peer no longer listens; what it said before it closed may still be there.
            Ok(()) | Err(TlsError::Truncated) => {}
            Err(error) => return Err(error),
        }
        loop {
            match self.connection.read_tls(&mut self.io) {
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
        if let Err(error) = self.connection.process_new_packets() {
            self.send_alert(deadline);
            return Err(map_tls(error));
        }
        // A peer that dribbles bytes makes progress, but not for longer than the deadline.
        if Instant::now() >= deadline {
            Err(TlsError::Timeout)
        } else {
            Ok(())
        }
    }

    fn flush(&mut self, deadline: Instant) -> Result<(), TlsError> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut self.io) {
                Ok(_) => {}
                Err(error) if is_pause(&error) => {
                    if Instant::now() >= deadline {
                        return Err(TlsError::Timeout);
                    }
                }
                Err(error) => return Err(map_io(error)),
            }
        }
        Ok(())
    }

    fn send_alert(&mut self, deadline: Instant) {
        if let Err(error) = self.flush(deadline) {
            tracing::debug!(%error, "the TLS alert could not be sent");
        }
    }
}

fn handshake<T: Transport>(
    mut connection: Connection,
    transport: T,
    timeout: Duration,
) -> Result<TlsStream<T>, TlsError> {
    connection.set_buffer_limit(Some(WRITE_BUFFER));
    let deadline = Instant::now() + timeout;
    let io = BoundedIo::new(transport)?;
    let unknown = PeerIdentity::unknown();
    let mut stream = TlsStream {
        connection,
        io,
        peer: unknown,
    };
    while stream.connection.is_handshaking() {
        if stream.connection.wants_write() {
            stream.flush(deadline)?;
        } else {
            stream.fill_handshake(deadline)?;
        }
    }
    stream.flush(deadline)?;
    if stream.connection.alpn_protocol() != Some(ALPN) {
        return Err(TlsError::Alpn);
    }
    let leaf = stream
        .connection
        .peer_certificates()
        .and_then(<[_]>::first)
        .ok_or(TlsError::Alpn)?;
    stream.peer = PeerIdentity::parse(leaf).map_err(TlsError::Refused)?;
    Ok(stream)
}

impl<T: Transport> TlsStream<T> {
    /// As `fill`, but the end of the stream is an error at once.
    fn fill_handshake(&mut self, deadline: Instant) -> Result<(), TlsError> {
        loop {
            match self.connection.read_tls(&mut self.io) {
                Ok(0) => return Err(TlsError::Truncated),
                Ok(_) => break,
                Err(error) if is_pause(&error) && Instant::now() < deadline => {}
                Err(error) if is_pause(&error) => return Err(TlsError::Timeout),
                Err(error) => return Err(map_io(error)),
            }
        }
        if let Err(error) = self.connection.process_new_packets() {
            self.send_alert(Instant::now() + ALERT_TIME);
            return Err(map_tls(error));
        }
        if Instant::now() >= deadline {
            Err(TlsError::Timeout)
        } else {
            Ok(())
        }
    }
}

/// A transport that returns at least every [`SLICE`], with a large read buffer (rustls reads 4 KiB at a time).
struct BoundedIo<T> {
    inner: T,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl<T: Transport> BoundedIo<T> {
    fn new(inner: T) -> io::Result<Self> {
        inner.set_nonblocking(false)?;
        inner.set_read_timeout(Some(SLICE))?;
        inner.set_write_timeout(Some(SLICE))?;
        Ok(Self {
            inner,
            buffer: vec![0; READ_BUFFER],
            start: 0,
            end: 0,
        })
    }
}

impl<T: Transport> Read for BoundedIo<T> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            self.end = self.inner.read(&mut self.buffer)?;
        }
        let count = self
            .buffer
            .get(self.start..self.end)
            .unwrap_or_default()
            .read(out)?;
        self.start += count;
        Ok(count)
    }
}

impl<T: Transport> Write for BoundedIo<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner.write(bytes)
    }

    fn write_vectored(&mut self, bytes: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.inner.write_vectored(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Chain, then allow-list, for either side of the connection.
#[derive(Debug)]
struct PeerVerifier {
    anchors: TrustAnchors,
    allow: AllowList,
    provider: Arc<CryptoProvider>,
    subjects: Vec<rustls::DistinguishedName>,
}

impl PeerVerifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
    ) -> Result<(), rustls::Error> {
        let chain: Vec<_> = std::iter::once(leaf)
            .chain(intermediates)
            .cloned()
            .collect();
        self.anchors
            .verify(&chain, usage)
            .and_then(|peer| self.allow.may_terminate_tls(&peer))
            .map_err(|error| {
                rustls::Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(
                    Arc::new(error),
                )))
            })
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, Usage::Server)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &self.subjects
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, Usage::Client)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

const SLICE: Duration = Duration::from_millis(100);
const ALERT_TIME: Duration = Duration::from_secs(1);
const READ_BUFFER: usize = 128 * 1024;
const WRITE_BUFFER: usize = 256 * 1024;

fn parts(local: &Local) -> (Arc<CryptoProvider>, Arc<PeerVerifier>) {
    let provider = local.provider.tls();
    let subjects = local.anchors.subjects();
    let (anchors, allow) = (local.anchors.clone(), local.allow.clone());
    (
        provider.clone(),
        Arc::new(PeerVerifier {
            anchors,
            allow,
            provider,
            subjects,
        }),
    )
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
