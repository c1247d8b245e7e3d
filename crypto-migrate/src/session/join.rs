//! Further connections of a session: each its own TLS, its own proof that it belongs, its own keys.
//!
//! ```text
//! source                                             destination
//!   TLS 1.3, the same two ends as the first connection
//!   Join { session, stream, nonce, binding, MAC }  →    once a stream, until all have joined
//!   ←  Joined { MAC }                                   (or Refuse)
//! ```
//!
//! The keys come of a secret of the session and, on a direct path, of this very connection's TLS exporter: a join that is
//! put on another connection does not verify. Not yet believed: every field of a join, until its MAC has been compared.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::keys::{Role, append, key_info};
use super::{SessionError, channel_binding};
use crate::channel::{Channel, ChannelError, ControlKeys};
use crate::code::Code;
use crate::crypto::{self, CryptoError, KeyChain, KeySchedule, MacKey, Provider};
use crate::identity::{Local, PeerIdentity};
use crate::page::Binding;
use crate::tls::{self, TlsError, TlsStream, Transport};
use crate::wire::FrameKind;
use crate::wire::messages::{Join, Joined, PathKind};

/// Connections one move may have, the first included.
pub const MAX_STREAMS: u16 = 16;

/// A further connection that could not be made, or is refused.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The connection below TLS.
    #[error("a further connection cannot be made: {0}")]
    Dial(#[source] std::io::Error),
    /// TLS.
    #[error("a further connection: {0}")]
    Connect(#[source] TlsError),
    /// The frames, or the peer's refusal.
    #[error("a further connection: {0}")]
    Channel(#[from] ChannelError),
    /// A primitive failed.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// Another peer than that of the first connection.
    #[error("a further connection leads to another peer than the first one")]
    Peer,
    /// Another session.
    #[error("a further connection wants to join another session")]
    Session,
    /// A number that was not agreed on.
    #[error("a further connection wants to be stream {0}, which was not agreed on")]
    OutOfRange(u16),
    /// This very join was there before.
    #[error("a join was sent again")]
    Replayed,
    /// The stream has joined.
    #[error("stream {0} wants to join twice")]
    Doubled(u16),
    /// The join names another TLS connection.
    #[error("a join was made for another TLS connection: somebody else terminates this one")]
    ChannelBinding,
    /// The MAC is another.
    #[error("the proof of a further connection does not verify")]
    Authentication,
    /// Not all came in time.
    #[error("{joined} of {due} further connections joined in time")]
    Late {
        /// How many did.
        joined: u16,
        /// How many were agreed on.
        due: u16,
    },
}

impl JoinError {
    /// The stable code; that of the peer where it refused.
    pub fn code(&self) -> &str {
        match self {
            JoinError::Dial(_) | JoinError::Late { .. } => Code::JoinLate.as_str(),
            JoinError::Connect(error) => error.code().as_str(),
            JoinError::Channel(error) => error.code(),
            JoinError::Crypto(error) => Code::from(*error).as_str(),
            JoinError::Peer => Code::JoinPeer.as_str(),
            JoinError::Session => Code::JoinSession.as_str(),
            JoinError::OutOfRange(_) => Code::JoinOutOfRange.as_str(),
            JoinError::Replayed => Code::JoinReplayed.as_str(),
            JoinError::Doubled(_) => Code::JoinDoubled.as_str(),
            JoinError::ChannelBinding => Code::ChannelBindingMismatch.as_str(),
            JoinError::Authentication => Code::JoinAuthentication.as_str(),
        }
    }
}

/// What further connections of a session prove that they belong to.
pub(crate) struct Membership {
    pub(super) transcript: [u8; 48],
    pub(super) secret: Zeroizing<[u8; 48]>,
    pub(super) binding: Binding,
    pub(super) path: PathKind,
    pub(super) provider: Provider,
    /// Whoever terminates the TLS of the first connection.
    pub(super) tls_peer: PeerIdentity,
}

/// A connection that has joined.
pub(crate) struct Further<T> {
    pub(crate) channel: Channel<T>,
    pub(crate) page_keys: KeyChain,
    pub(crate) binding: Binding,
}

/// How long the steps of a join may take.
#[derive(Clone, Copy)]
pub(crate) struct Times {
    pub(crate) connect: Duration,
    pub(crate) frame: Duration,
    pub(crate) agree: Duration,
}

/// Asked while a connection waits.
pub(crate) type Cancelled = Box<dyn Fn() -> bool + Send>;

/// The source's side: makes of a transport the session's stream of that number.
pub(crate) fn join<T: Transport>(
    transport: T,
    local: &Local,
    membership: &Membership,
    stream: u16,
    times: Times,
    cancelled: Cancelled,
) -> Result<Further<T>, JoinError> {
    let tls = tls::connect(transport, local, times.connect).map_err(JoinError::Connect)?;
    membership.check_peer(&tls)?;
    let keys = membership.keys(&tls, stream)?;
    let mut join = Join {
        session_id: membership.binding.session_id,
        stream,
        nonce: crypto::random()?,
        channel_binding: membership.channel_binding(&tls)?,
        mac: [0; 32],
    };
    let joined = claim(&join);
    join.mac = keys.join.mac(&joined);
    let mut channel = Channel::new(tls, times.frame, cancelled).of_stream(stream);
    channel.send(&join)?;
    let deadline = Instant::now() + times.agree;
    let Joined { mac } = channel.receive_message("Joined", deadline)?;
    keys.joined
        .verify(&joined, &mac)
        .map_err(|_| JoinError::Authentication)?;
    channel.seal_with(ControlKeys {
        send: keys.control_source,
        receive: keys.control_destination,
    });
    Ok(Further {
        channel,
        page_keys: keys.pages,
        binding: membership.of_stream(stream),
    })
}

/// The destination's side: what has joined so far.
pub(crate) struct Gate<'a, T> {
    membership: &'a Membership,
    streams: u16,
    nonces: BTreeSet<[u8; 16]>,
    joined: Vec<Option<Further<T>>>,
}

impl<'a, T: Transport> Gate<'a, T> {
    /// For a session of so many connections, the first included.
    pub(crate) fn new(membership: &'a Membership, streams: u16) -> Self {
        Self {
            membership,
            streams,
            nonces: BTreeSet::new(),
            joined: (1..streams).map(|_| None).collect(),
        }
    }

    /// How many are still missing.
    pub(crate) fn missing(&self) -> u16 {
        let missing = self.joined.iter().filter(|one| one.is_none()).count();
        u16::try_from(missing).unwrap_or(u16::MAX)
    }

    /// Those that were to join, and did not.
    pub(crate) fn late(&self) -> JoinError {
        let due = self.streams.saturating_sub(1);
        JoinError::Late {
            joined: due.saturating_sub(self.missing()),
            due,
        }
    }

    /// Lets a connection in, or tells it why not; a refusal changes nothing here.
    pub(crate) fn admit(
        &mut self,
        transport: T,
        local: &Local,
        times: Times,
        cancelled: Cancelled,
    ) -> Result<(), JoinError> {
        let tls = tls::accept(transport, local, times.connect).map_err(JoinError::Connect)?;
        let mut channel = Channel::new(tls, times.frame, cancelled).of_any_stream();
        match self.check(&mut channel, times) {
            Ok((join, keys)) => {
                let mac = keys.joined.mac(&claim(&join));
                channel.send(&Joined { mac })?;
                channel.seal_with(ControlKeys {
                    send: keys.control_destination,
                    receive: keys.control_source,
                });
                self.nonces.insert(join.nonce);
                let binding = self.membership.of_stream(join.stream);
                if let Some(place) = self.place(join.stream) {
                    *place = Some(Further {
                        channel,
                        page_keys: keys.pages,
                        binding,
                    });
                }
                Ok(())
            }
            Err(error) => {
                let text = error.to_string();
                channel.give_up(FrameKind::Refuse, false, error.code(), &text);
                Err(error)
            }
        }
    }

    /// All of them, in the order of their numbers.
    pub(crate) fn open(self) -> Vec<Further<T>> {
        self.joined.into_iter().flatten().collect()
    }

    fn check(
        &mut self,
        channel: &mut Channel<T>,
        times: Times,
    ) -> Result<(Join, JoinKeys), JoinError> {
        let deadline = Instant::now() + times.connect;
        let join: Join = channel.receive_message("Join", deadline)?;
        self.membership.check_peer(channel.tls())?;
        if join.session_id != self.membership.binding.session_id {
            return Err(JoinError::Session);
        }
        let stream = join.stream;
        let taken = match self.place(stream) {
            Some(place) if channel.stream() == Some(stream) => place.is_some(),
            _ => return Err(JoinError::OutOfRange(stream)),
        };
        if self.nonces.contains(&join.nonce) {
            return Err(JoinError::Replayed);
        }
        if taken {
            return Err(JoinError::Doubled(stream));
        }
        if join.channel_binding != self.membership.channel_binding(channel.tls())? {
            return Err(JoinError::ChannelBinding);
        }
        let keys = self.membership.keys(channel.tls(), stream)?;
        keys.join
            .verify(&claim(&join), &join.mac)
            .map_err(|_| JoinError::Authentication)?;
        Ok((join, keys))
    }

    fn place(&mut self, stream: u16) -> Option<&mut Option<Further<T>>> {
        let index = usize::from(stream).checked_sub(1)?;
        self.joined.get_mut(index)
    }
}

impl Membership {
    fn of_stream(&self, stream: u16) -> Binding {
        Binding {
            stream,
            ..self.binding.clone()
        }
    }

    /// Name and key of whoever terminates the TLS are those of the first connection.
    fn check_peer<T: Transport>(&self, tls: &TlsStream<T>) -> Result<(), JoinError> {
        let (first, this) = (&self.tls_peer, tls.peer());
        match first.spki_sha256 == this.spki_sha256 && first.san == this.san {
            true => Ok(()),
            false => Err(JoinError::Peer),
        }
    }

    fn channel_binding<T: Transport>(
        &self,
        tls: &TlsStream<T>,
    ) -> Result<Option<[u8; 32]>, JoinError> {
        match self.path {
            PathKind::Direct => channel_binding(tls).map(Some).map_err(plain),
            PathKind::Gateway => Ok(None),
        }
    }

    fn keys<T: Transport>(&self, tls: &TlsStream<T>, stream: u16) -> Result<JoinKeys, JoinError> {
        let exporter = match self.path {
            PathKind::Direct => Some(
                tls.exporter(b"EXPORTER-casemate-migrate-1")
                    .map_err(JoinError::Connect)?,
            ),
            PathKind::Gateway => None,
        };
        let exporter = exporter.as_ref().map_or(&[][..], |e| e.as_slice());
        Ok(self.derive(exporter, stream)?)
    }

    fn derive(&self, exporter: &[u8], stream: u16) -> Result<JoinKeys, CryptoError> {
        let mut secret = Zeroizing::new(Vec::with_capacity(128)); // never reallocated: nothing is left behind
        append(&mut secret, self.secret.as_slice());
        append(&mut secret, exporter);
        let schedule = KeySchedule::extract(&self.transcript, &secret);
        let binding = self.of_stream(stream);
        let info = |label, role| key_info(label, role, &binding, self.path);
        let aead = |role| schedule.aead(self.provider, &info("control", role));
        Ok(JoinKeys {
            join: schedule.mac(&info("confirm", Role::Source))?,
            joined: schedule.mac(&info("confirm", Role::Destination))?,
            control_source: aead(Role::Source)?,
            control_destination: aead(Role::Destination)?,
            pages: schedule.chain(self.provider, &info("page", Role::Source))?,
        })
    }
}

/// The keys of one further connection.
struct JoinKeys {
    join: MacKey,
    joined: MacKey,
    control_source: crypto::AeadKey,
    control_destination: crypto::AeadKey,
    pages: KeyChain,
}

/// What both MACs are over; every field with its length.
fn claim(join: &Join) -> Vec<u8> {
    let mut out = b"casemate-migrate/1 join".to_vec();
    append(&mut out, &join.session_id);
    append(&mut out, &join.stream.to_le_bytes());
    append(&mut out, &join.nonce);
    append(
        &mut out,
        join.channel_binding.as_ref().map_or(&[][..], |b| b),
    );
    out
}

fn plain(error: SessionError) -> JoinError {
    match error {
        SessionError::Channel(error) => JoinError::Channel(error),
        _ => JoinError::ChannelBinding,
    }
}

/// For the document: what is MACed of a join, and what the keys of stream 2 of an example session, under the nonce 0, make of
/// a known text.
#[cfg(test)]
pub(crate) fn example_join(exporter: &[u8]) -> (Join, Vec<u8>, [Vec<u8>; 4]) {
    let identity = crate::dev_ca::DevCa::new("example").unwrap();
    let tls_peer = identity.issue("example").unwrap().identity().unwrap();
    let membership = Membership {
        transcript: [9; 48],
        secret: Zeroizing::new([8; 48]),
        binding: Binding {
            session_id: [1; 16],
            vm_id: [2; 16],
            epoch: 3,
            stream: 0,
        },
        path: PathKind::Direct,
        provider: Provider::default(),
        tls_peer: tls_peer.as_peer().clone(),
    };
    let mut keys = membership.derive(exporter, 2).unwrap();
    let seal = |key: &crypto::AeadKey| {
        let mut data = b"probe".to_vec();
        let tag = key.seal(0, b"", &mut data).unwrap();
        [data.as_slice(), &tag].concat()
    };
    let pages = seal(keys.pages.of(0).unwrap());
    let join = Join {
        session_id: [1; 16],
        stream: 2,
        nonce: [5; 16],
        channel_binding: Some([6; 32]),
        mac: [7; 32],
    };
    let made = [
        keys.join.mac(b"probe").to_vec(),
        keys.joined.mac(b"probe").to_vec(),
        [seal(&keys.control_source), seal(&keys.control_destination)].concat(),
        pages,
    ];
    let claimed = claim(&join);
    (join, claimed, made)
}
