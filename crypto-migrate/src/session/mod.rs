//! Who offers what to whom, and the keys that only these two ends share.
//!
//! ```text
//! source                                              destination
//!   Offer   { ephemeral, chain, path, binding, guest } + signature  →    policy decides
//!   ←  Accept { ephemeral, chain, path, binding, evidence } + signature   (or Refuse)
//!   Confirm { MAC }  →
//!   ←  Confirm { MAC }
//! ```
//!
//! Each host signs the hash of the whole transcript up to and including its own part, under a context string
//! of its role. Both verify the other's certificate against the site authority and the allow-list, whoever
//! terminates the TLS. The secret is X25519 ‖ owner key (if any) ‖ TLS exporter (direct path only), through
//! HKDF-SHA-384 with the transcript's hash as salt; every key's info names label, session, VM, path,
//! direction, stream and epoch.
//!
//! On a direct path each part carries a hash of its end's TLS channel binding (RFC 9266) inside what is
//! signed: a relay that terminates the TLS, even with a stolen TLS key, is told apart from every other failure.
//! A gateway that policy names sees the offer and the accept (name, size, description, platform evidence), the
//! clear headers of pages, sizes and times; nothing else.

mod facts;
mod join;
mod keys;

#[cfg(test)]
pub(crate) use self::join::example_join;
#[cfg(test)]
pub(crate) use self::keys::example_keys;

use std::time::Instant;

use rustls_pki_types::CertificateDer;
use serde_bytes::ByteBuf;

pub use self::facts::SessionFacts;
pub(crate) use self::join::{Gate, Membership, Times, join};
pub use self::join::{JoinError, MAX_STREAMS};
pub use self::keys::OwnerKey;
use self::keys::{Facts, ForFurther, Keys, Role, Transcript, secret};
use crate::channel::{Channel, ChannelError, ControlKeys};
use crate::code::Code;
use crate::crypto::{self, CryptoError, EphemeralKey, KeyChain, MacKey};
use crate::guest::{Admission, GuestOffer, Refusal};
use crate::identity::{AllowedPeer, IdentityError, Local, MAX_CHAIN, Path, PeerIdentity, Usage};
use crate::page::Binding;
use crate::preamble::Ticket;
use crate::tls::{TlsError, TlsStream, Transport};
use crate::transcript::check_memory;
use crate::wire::messages::{AcceptBody, Confirm, OfferBody, Party, PathKind, Purpose, Signed};
use crate::wire::{FrameKind, WireError};

/// Version of the session protocol.
pub const SESSION_VERSION: u16 = 4;
/// Bytes of description an offer may carry.
pub const MAX_DESCRIPTION: usize = 64 * 1024;
/// Bytes of platform evidence an accept may carry.
pub const MAX_EVIDENCE: usize = 64 * 1024;

/// An agreement that failed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The channel, or the peer's refusal.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The peer's identity or signature.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A primitive failed.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// Local policy names no such peer.
    #[error("no peer named {0:?} in the allow-list")]
    UnknownPeer(String),
    /// Somebody else terminates the TLS.
    #[error(
        "on a direct path somebody other than {0:?} terminates the TLS; if it is meant to, name it as gateway"
    )]
    ChannelBinding(String),
    /// The policies differ.
    #[error(
        "this host's policy says the path is {ours:?}, the peer's says {theirs:?}; make them agree"
    )]
    Path {
        /// Here.
        ours: PathKind,
        /// There.
        theirs: PathKind,
    },
    /// Another version.
    #[error("the peer speaks session version {0}, this host {SESSION_VERSION}")]
    Version(u16),
    /// A field of offer or accept is out of bounds.
    #[error("the {0} is out of bounds")]
    Offer(&'static str),
    /// The two ends derived different keys.
    #[error(
        "key confirmation failed: the ends hold different keys; is the owner key the same at both?"
    )]
    Confirmation,
    /// Local policy refuses.
    #[error("offer refused: {0}")]
    Refused(Refusal),
}

impl SessionError {
    /// Whether the peer gave up (and needs not be told).
    pub fn by_peer(&self) -> bool {
        matches!(self, SessionError::Channel(error) if error.by_peer())
    }

    /// The stable code.
    pub fn code(&self) -> &str {
        match self {
            SessionError::Channel(error) => error.code(),
            SessionError::Identity(error) => error.code().as_str(),
            SessionError::Crypto(error) => Code::from(*error).as_str(),
            SessionError::UnknownPeer(_) => Code::PeerNotAllowed.as_str(),
            SessionError::ChannelBinding(_) => Code::ChannelBindingMismatch.as_str(),
            SessionError::Path { .. } => Code::PathMismatch.as_str(),
            SessionError::Version(_) => Code::VersionUnsupported.as_str(),
            SessionError::Offer(_) => Code::OfferInvalid.as_str(),
            SessionError::Confirmation => Code::KeyConfirmation.as_str(),
            SessionError::Refused(refusal) => &refusal.code,
        }
    }
}

impl From<WireError> for SessionError {
    fn from(error: WireError) -> Self {
        SessionError::Channel(error.into())
    }
}

impl From<TlsError> for SessionError {
    fn from(error: TlsError) -> Self {
        SessionError::Channel(error.into())
    }
}

/// The keys and facts of an agreed session.
pub(crate) struct Session {
    pub(crate) peer: PeerIdentity,
    pub(crate) path: PathKind,
    pub(crate) binding: Binding,
    pub(crate) page_keys: KeyChain,
    pub(crate) offer_hash: [u8; 32],
    /// Platform evidence of the destination.
    pub(crate) evidence: Vec<u8>,
    /// Connections that the move has, this one included.
    pub(crate) streams: u16,
    /// What the further ones name.
    pub(crate) ticket: Ticket,
    /// What they prove.
    pub(crate) membership: Membership,
}

/// What an offer asks for.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) purpose: Purpose,
    /// Connections, the first included.
    pub(crate) streams: u16,
}

impl From<Purpose> for Wanted {
    fn from(purpose: Purpose) -> Self {
        let streams = 1;
        Self { purpose, streams }
    }
}

/// What the destination gives for further connections.
#[derive(Clone, Copy)]
pub(crate) struct Granted {
    /// Connections at most, the first included.
    pub(crate) streams: u16,
    pub(crate) ticket: Ticket,
}

/// The source's side: offers the guest to the peer that policy calls `peer_name`.
pub(crate) fn offer<T: Transport>(
    channel: &mut Channel<T>,
    local: &Local,
    peer_name: &str,
    owner_key: Option<&OwnerKey>,
    guest: &GuestOffer,
    wanted: impl Into<Wanted>,
    deadline: Instant,
) -> Result<Session, SessionError> {
    let Wanted { purpose, streams } = wanted.into();
    let allowed = local
        .allow
        .by_name(peer_name)
        .ok_or_else(|| SessionError::UnknownPeer(peer_name.to_owned()))?;
    check_offer(guest, purpose)?;
    check_tls_peer(channel.tls(), allowed)?;
    let ephemeral = EphemeralKey::generate()?;
    let session_id = crypto::random()?;
    let source = party(channel.tls(), local, &allowed.path, &ephemeral)?;
    let path = source.path;
    let body = OfferBody {
        source,
        purpose,
        session_id,
        owner_key: owner_key.is_some(),
        streams,
        guest: guest.clone(),
    };
    let mut transcript = Transcript::default();
    let offer = transcript.sign(encode(&body)?, Role::Source, &local.identity)?;
    let offer_hash = crypto::sha256(&[&offer]);
    channel.send_raw(FrameKind::Offer, offer)?;

    let payload = match channel.receive(deadline)? {
        (FrameKind::Accept, payload) => payload.to_vec(),
        (got, _) => {
            return Err(ChannelError::Unexpected {
                got,
                wanted: "Accept",
            }
            .into());
        }
    };
    let signed: Signed = decode(&payload)?;
    let accept: AcceptBody = decode(&signed.body)?;
    let peer = verify_party(&accept.destination, local, Usage::Server)?;
    transcript.verify(&signed, Role::Destination, &peer)?;
    if !allowed.identity.matches(&peer) {
        return Err(SessionError::ChannelBinding(allowed.name.clone()));
    }
    check_path(channel.tls(), &accept.destination, path, allowed)?;
    if accept.session_id != session_id || accept.evidence.len() > MAX_EVIDENCE {
        return Err(SessionError::Offer("accept"));
    }
    check_streams(accept.streams, streams)?;

    let facts = Facts {
        session_id,
        guest,
        path,
        offer_hash,
    };
    let secret = secret(
        channel.tls(),
        ephemeral,
        &accept.destination.ephemeral,
        owner_key,
        path,
    )?;
    let keys = Keys::derive(&transcript.hash(), &secret, &facts, local.provider)?;
    channel.send(&Confirm {
        mac: keys.confirm_source.mac(&transcript.hash()),
    })?;
    let theirs: Confirm = channel.receive_message("Confirm", deadline)?;
    verify_confirm(&keys.confirm_destination, &transcript, &theirs)?;
    channel.seal_with(ControlKeys {
        send: keys.control_source,
        receive: keys.control_destination,
    });
    let further = ForFurther {
        streams: accept.streams,
        ticket: accept.ticket,
        membership: membership(channel.tls(), &facts, keys.join, &transcript, local),
    };
    Ok(facts.session(peer, keys.pages, accept.evidence, further))
}

/// What [`accept`] leaves behind besides the session.
pub(crate) struct Accepted {
    pub(crate) session: Session,
    pub(crate) guest: GuestOffer,
    pub(crate) purpose: Purpose,
}

/// The destination's side. `admit` asks local policy; when it has said yes, whatever it built must be
/// abandoned if this fails later.
pub(crate) fn accept<T: Transport>(
    channel: &mut Channel<T>,
    local: &Local,
    owner_key: Option<&OwnerKey>,
    granted: Granted,
    deadline: Instant,
    admit: &mut dyn FnMut(Purpose, &GuestOffer, &SessionFacts) -> Result<Admission, Refusal>,
) -> Result<Accepted, SessionError> {
    let payload = match channel.receive(deadline)? {
        (FrameKind::Offer, payload) => payload.to_vec(),
        (got, _) => {
            return Err(ChannelError::Unexpected {
                got,
                wanted: "Offer",
            }
            .into());
        }
    };
    let signed: Signed = decode(&payload)?;
    let offer: OfferBody = decode(&signed.body)?;
    let peer = verify_party(&offer.source, local, Usage::Client)?;
    let mut transcript = Transcript::default();
    transcript.verify(&signed, Role::Source, &peer)?;
    let allowed = local.allow.find(&peer)?;
    check_tls_peer(channel.tls(), allowed)?;
    let path = path_kind(&allowed.path);
    check_path(channel.tls(), &offer.source, path, allowed)?;
    check_offer(&offer.guest, offer.purpose)?;
    check_streams(offer.streams, MAX_STREAMS)?;
    let streams = offer.streams.min(granted.streams.max(1));
    if offer.owner_key != owner_key.is_some() {
        return Err(SessionError::Confirmation);
    }

    let session = SessionFacts::of(channel.tls(), &peer, path, local.provider)?;
    let Admission { evidence } =
        admit(offer.purpose, &offer.guest, &session).map_err(SessionError::Refused)?;
    if evidence.len() > MAX_EVIDENCE {
        return Err(SessionError::Offer("platform evidence"));
    }
    let ephemeral = EphemeralKey::generate()?;
    let destination = party(channel.tls(), local, &allowed.path, &ephemeral)?;
    let body = AcceptBody {
        destination,
        session_id: offer.session_id,
        streams,
        ticket: granted.ticket,
        evidence: evidence.clone(),
    };
    let accept = transcript.sign(encode(&body)?, Role::Destination, &local.identity)?;
    channel.send_raw(FrameKind::Accept, accept)?;

    let offer_hash = crypto::sha256(&[&payload]);
    let facts = Facts {
        session_id: offer.session_id,
        guest: &offer.guest,
        path,
        offer_hash,
    };
    let secret = secret(
        channel.tls(),
        ephemeral,
        &offer.source.ephemeral,
        owner_key,
        path,
    )?;
    let keys = Keys::derive(&transcript.hash(), &secret, &facts, local.provider)?;
    let theirs: Confirm = channel.receive_message("Confirm", deadline)?;
    verify_confirm(&keys.confirm_source, &transcript, &theirs)?;
    channel.send(&Confirm {
        mac: keys.confirm_destination.mac(&transcript.hash()),
    })?;
    channel.seal_with(ControlKeys {
        send: keys.control_destination,
        receive: keys.control_source,
    });
    let further = ForFurther {
        streams,
        ticket: granted.ticket,
        membership: membership(channel.tls(), &facts, keys.join, &transcript, local),
    };
    let session = facts.session(peer, keys.pages, evidence, further);
    Ok(Accepted {
        session,
        guest: offer.guest,
        purpose: offer.purpose,
    })
}

/// Bounds of an offer; the same at both ends. A question about a guest brings nothing of it.
pub fn check_offer(guest: &GuestOffer, purpose: Purpose) -> Result<(), SessionError> {
    let name_ok = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    if guest.name.is_empty() || guest.name.len() > 64 || !guest.name.bytes().all(name_ok) {
        return Err(SessionError::Offer("guest's name"));
    }
    if guest.description.len() > MAX_DESCRIPTION {
        return Err(SessionError::Offer("machine description"));
    }
    if guest.epoch == u64::MAX {
        return Err(SessionError::Offer("ownership epoch"));
    }
    let memory = match purpose {
        Purpose::Settle => guest.memory.is_empty(),
        Purpose::Move | Purpose::Assess => check_memory(&guest.memory).is_ok(),
    };
    match memory {
        true => Ok(()),
        false => Err(SessionError::Offer("guest's memory")),
    }
}

fn check_streams(streams: u16, most: u16) -> Result<(), SessionError> {
    match (1..=most).contains(&streams) {
        true => Ok(()),
        false => Err(SessionError::Offer("number of connections")),
    }
}

fn membership<T: Transport>(
    tls: &TlsStream<T>,
    facts: &Facts<'_>,
    secret: zeroize::Zeroizing<[u8; 48]>,
    transcript: &Transcript,
    local: &Local,
) -> Membership {
    Membership {
        transcript: transcript.hash(),
        secret,
        binding: facts.binding(),
        path: facts.path,
        provider: local.provider,
        tls_peer: tls.peer().clone(),
    }
}

fn party<T: Transport>(
    tls: &TlsStream<T>,
    local: &Local,
    path: &Path,
    ephemeral: &EphemeralKey,
) -> Result<Party, SessionError> {
    let path = path_kind(path);
    let channel_binding = if path == PathKind::Direct {
        Some(channel_binding(tls)?)
    } else {
        None
    };
    let chain = local
        .identity
        .chain()
        .iter()
        .map(|der| ByteBuf::from(der.to_vec()))
        .collect();
    Ok(Party {
        version: SESSION_VERSION,
        path,
        channel_binding,
        ephemeral: *ephemeral.public(),
        chain,
    })
}

/// The certificate chain of the peer itself, whoever terminates the TLS: authority, then allow-list.
fn verify_party(party: &Party, local: &Local, usage: Usage) -> Result<PeerIdentity, SessionError> {
    if party.version != SESSION_VERSION {
        return Err(SessionError::Version(party.version));
    }
    if party.chain.len() > MAX_CHAIN {
        return Err(SessionError::Offer("certificate chain"));
    }
    let chain: Vec<_> = party
        .chain
        .iter()
        .map(|der| CertificateDer::from(der.as_slice()))
        .collect();
    let peer = local.anchors.verify(&chain, usage)?;
    local.allow.find(&peer)?;
    Ok(peer)
}

/// Whoever terminates the TLS must be the one that policy names for this very peer.
fn check_tls_peer<T: Transport>(
    tls: &TlsStream<T>,
    allowed: &AllowedPeer,
) -> Result<(), SessionError> {
    match &allowed.path {
        Path::Direct if allowed.identity.matches(tls.peer()) => Ok(()),
        Path::Direct => Err(SessionError::ChannelBinding(allowed.name.clone())),
        Path::Gateway(gateway) if gateway.matches(tls.peer()) => Ok(()),
        Path::Gateway(_) => {
            let (san, spki) = (tls.peer().san.clone(), hex::encode(tls.peer().spki_sha256));
            Err(IdentityError::NotAllowed { san, spki }.into())
        }
    }
}

fn check_path<T: Transport>(
    tls: &TlsStream<T>,
    party: &Party,
    ours: PathKind,
    allowed: &AllowedPeer,
) -> Result<(), SessionError> {
    if party.path != ours {
        return Err(SessionError::Path {
            ours,
            theirs: party.path,
        });
    }
    let expected = if ours == PathKind::Direct {
        Some(channel_binding(tls)?)
    } else {
        None
    };
    if party.channel_binding != expected {
        return Err(SessionError::ChannelBinding(allowed.name.clone()));
    }
    Ok(())
}

fn verify_confirm(
    key: &MacKey,
    transcript: &Transcript,
    confirm: &Confirm,
) -> Result<(), SessionError> {
    key.verify(&transcript.hash(), &confirm.mac)
        .map_err(|_| SessionError::Confirmation)
}

fn channel_binding<T: Transport>(tls: &TlsStream<T>) -> Result<[u8; 32], SessionError> {
    let exporter = tls.exporter(b"EXPORTER-Channel-Binding")?; // RFC 9266
    Ok(crypto::sha256(&[
        b"casemate-migrate/1 channel binding",
        exporter.as_slice(),
    ]))
}

fn path_kind(path: &Path) -> PathKind {
    match path {
        Path::Direct => PathKind::Direct,
        Path::Gateway(_) => PathKind::Gateway,
    }
}

fn encode<M: serde::Serialize>(message: &M) -> Result<Vec<u8>, SessionError> {
    Ok(postcard::to_stdvec(message)
        .map_err(|_| WireError::Malformed("offer or accept cannot be encoded"))?)
}

fn decode<'a, M: serde::Deserialize<'a>>(bytes: &'a [u8]) -> Result<M, SessionError> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        _ => Err(WireError::Malformed("offer or accept does not parse").into()),
    }
}
