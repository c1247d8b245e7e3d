//! What two hosts have agreed on, for policies and records. No key, and no exporter: only its hash.

use super::{SessionError, channel_binding};
use crate::crypto::Provider;
use crate::identity::PeerIdentity;
use crate::tls::{TlsStream, Transport};
use crate::wire::messages::PathKind;

/// An agreed session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionFacts {
    /// The peer that signed the agreement, whoever terminates the TLS.
    pub peer: PeerIdentity,
    /// Whoever terminates the TLS.
    pub tls_peer: PeerIdentity,
    /// The way that both hosts' policies say the connection runs.
    pub path: PathKind,
    /// TLS cipher suite.
    pub suite: String,
    /// Key agreement group of the TLS connection.
    pub group: String,
    /// A hash of this TLS connection's exporter (RFC 9266); on a direct path the same at both ends.
    pub exporter_sha256: [u8; 32],
    /// Who does the bulk cryptography at this end.
    pub provider: Provider,
}

impl SessionFacts {
    pub(crate) fn of<T: Transport>(
        tls: &TlsStream<T>,
        peer: &PeerIdentity,
        path: PathKind,
        provider: Provider,
    ) -> Result<Self, SessionError> {
        Ok(Self {
            peer: peer.clone(),
            tls_peer: tls.peer().clone(),
            path,
            suite: tls.suite(),
            group: tls.group(),
            exporter_sha256: channel_binding(tls)?,
            provider,
        })
    }
}
