//! The handshake: rustls's, fed record by record, so that not a byte behind it is read by anybody but [`Receiver`].

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::{ClientConfig, ClientConnection, Resumption};
use rustls::server::{ServerConfig, ServerConnection};
use rustls::{Connection, KeyLog};
use rustls_pki_types::ServerName;
use zeroize::Zeroizing;

use super::records::{Receiver, Sender};
use super::verify::parts;
use super::{ALERT_TIME, ALPN, TlsError, TlsStream, Transport, bound, is_pause, map_io, map_tls};
use crate::crypto::{Provider, TrafficSecret};
use crate::identity::{Local, PeerIdentity};

/// Connects as client (source) and completes the handshake within `timeout`.
pub fn connect<T: Transport>(
    transport: T,
    local: &Local,
    timeout: Duration,
) -> Result<TlsStream<T>, TlsError> {
    let (provider, verifier) = parts(local);
    let secrets = Arc::new(Secrets::default());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Protocol)?
        .dangerous() // the verifier is stricter than the default one
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(local.identity.resolver());
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false; // the name of a host is nobody else's business
    config.key_log = secrets.clone();
    let name = ServerName::try_from("casemate.invalid").map_err(|_| TlsError::Alpn)?;
    let connection = ClientConnection::new(Arc::new(config), name).map_err(TlsError::Protocol)?;
    let shaken = handshake(Connection::Client(connection), transport, timeout)?;
    shaken.stream(secrets.take(CLIENT), secrets.take(SERVER), local.provider)
}

/// Accepts as server (destination) and completes the handshake within `timeout`.
pub fn accept<T: Transport>(
    transport: T,
    local: &Local,
    timeout: Duration,
) -> Result<TlsStream<T>, TlsError> {
    let (provider, verifier) = parts(local);
    let secrets = Arc::new(Secrets::default());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Protocol)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(local.identity.resolver());
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.key_log = secrets.clone();
    let connection = ServerConnection::new(Arc::new(config)).map_err(TlsError::Protocol)?;
    let shaken = handshake(Connection::Server(connection), transport, timeout)?;
    shaken.stream(secrets.take(SERVER), secrets.take(CLIENT), local.provider)
}

/// A completed handshake, and what was read behind it.
struct Shaken<T> {
    connection: Connection,
    io: T,
    incoming: Incoming,
}

impl<T: Transport> Shaken<T> {
    fn stream(
        self,
        send: Result<TrafficSecret, TlsError>,
        receive: Result<TrafficSecret, TlsError>,
        provider: Provider,
    ) -> Result<TlsStream<T>, TlsError> {
        let Self {
            connection,
            io,
            incoming,
        } = self;
        if connection.alpn_protocol() != Some(ALPN) {
            return Err(TlsError::Alpn);
        }
        let leaf = connection.peer_certificates().and_then(<[_]>::first);
        let peer = PeerIdentity::parse(leaf.ok_or(TlsError::Alpn)?).map_err(TlsError::Refused)?;
        Ok(TlsStream {
            connection,
            io,
            sender: Sender::new(send?, provider)?,
            receiver: Receiver::new(receive?, provider, incoming)?,
            peer,
        })
    }
}

fn handshake<T: Transport>(
    mut connection: Connection,
    mut io: T,
    timeout: Duration,
) -> Result<Shaken<T>, TlsError> {
    let deadline = Instant::now() + timeout;
    bound(&io)?;
    let mut incoming = Incoming::new();
    while connection.is_handshaking() {
        if connection.wants_write() {
            flush(&mut connection, &mut io, deadline)?;
        } else if let Err(error) = process(&mut connection, &mut io, &mut incoming, deadline) {
            if let Err(error) = flush(&mut connection, &mut io, Instant::now() + ALERT_TIME) {
                tracing::debug!(%error, "the TLS alert could not be sent");
            }
            return Err(error);
        }
    }
    flush(&mut connection, &mut io, deadline)?;
    Ok(Shaken {
        connection,
        io,
        incoming,
    })
}

/// Gives rustls exactly one record.
fn process<T: Transport>(
    connection: &mut Connection,
    io: &mut T,
    incoming: &mut Incoming,
    deadline: Instant,
) -> Result<(), TlsError> {
    let length = loop {
        if let Some(length) = incoming.record_length() {
            break length;
        }
        match incoming.fill_from(io) {
            Ok(0) => return Err(TlsError::Truncated),
            Ok(_) => {}
            Err(error) if is_pause(&error) => {}
            Err(error) => return Err(map_io(error)),
        }
        if Instant::now() >= deadline {
            return Err(TlsError::Timeout);
        }
    };
    let mut record = &*incoming.take(length);
    while !record.is_empty() {
        connection.read_tls(&mut record)?;
    }
    connection.process_new_packets().map_err(map_tls)?;
    Ok(())
}

fn flush<T: Transport>(
    connection: &mut Connection,
    io: &mut T,
    deadline: Instant,
) -> Result<(), TlsError> {
    while connection.wants_write() {
        match connection.write_tls(io) {
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

/// What was read and not yet taken: whole records, and the beginning of one.
pub(super) struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Incoming {
    fn new() -> Self {
        Self {
            bytes: vec![0; READ_BUFFER],
            start: 0,
            end: 0,
        }
    }

    /// Bytes of the first record, header included, if all of it is there. A length that no record has is returned as
    /// it stands: whoever takes the record finds it short, and refuses it.
    pub(super) fn record_length(&self) -> Option<usize> {
        let there = self.bytes.get(self.start..self.end)?;
        let &[_, _, _, high, low] = there.first_chunk::<RECORD_HEADER>()?;
        let length = RECORD_HEADER + usize::from(u16::from_be_bytes([high, low]));
        let impossible = length > MAX_RECORD;
        (impossible || there.len() >= length).then(|| length.min(there.len()))
    }

    /// Takes the first bytes; they stay where they are until the next [`Incoming::fill_from`].
    pub(super) fn take(&mut self, length: usize) -> &mut [u8] {
        let from = self.start;
        self.start = self.end.min(from + length);
        self.bytes.get_mut(from..self.start).unwrap_or_default()
    }

    /// Takes the first record, if all of it is there, and says where it lies until the next [`Incoming::fill_from`].
    pub(super) fn take_record(&mut self) -> Option<Range<usize>> {
        let length = self.record_length()?;
        let from = self.start;
        self.take(length);
        Some(from..self.start)
    }

    /// The bytes there.
    pub(super) fn slice(&mut self, at: &Range<usize>) -> &mut [u8] {
        self.bytes.get_mut(at.clone()).unwrap_or_default()
    }

    /// Reads once, as much as there is room for.
    pub(super) fn fill_from<T: Transport>(&mut self, io: &mut T) -> std::io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.end < MAX_RECORD {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = self.bytes.get_mut(self.end..).unwrap_or_default();
        let count = io.read(room)?;
        self.end += count;
        Ok(count)
    }
}

/// Size of a record's header.
pub(super) const RECORD_HEADER: usize = 5;
/// The largest record that RFC 8446, 5.2 allows, header included.
const MAX_RECORD: usize = RECORD_HEADER + (1 << 14) + 256;
const READ_BUFFER: usize = 256 * 1024;
const CLIENT: &str = "CLIENT_TRAFFIC_SECRET_0";
const SERVER: &str = "SERVER_TRAFFIC_SECRET_0";

/// Takes the two traffic secrets out of the handshake; nothing is logged.
#[derive(Default)]
struct Secrets(Mutex<Labelled>);

type Labelled = Vec<(&'static str, Zeroizing<Vec<u8>>)>;

impl Secrets {
    fn take(&self, label: &str) -> Result<TrafficSecret, TlsError> {
        let mut secrets = self.lock();
        let at = secrets.iter().position(|(name, _)| *name == label);
        let (_, secret) = secrets.swap_remove(at.ok_or(TlsError::Alpn)?);
        Ok(TrafficSecret::new(&secret)?)
    }

    fn lock(&self) -> MutexGuard<'_, Labelled> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyLog for Secrets {
    fn will_log(&self, label: &str) -> bool {
        [CLIENT, SERVER].contains(&label)
    }

    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        if let Some(name) = [CLIENT, SERVER].into_iter().find(|name| *name == label) {
            self.lock().push((name, Zeroizing::new(secret.to_vec())));
        }
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets")
    }
}
