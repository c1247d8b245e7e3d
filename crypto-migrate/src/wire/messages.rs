//! The content of the frames, as typed messages (postcard).

use serde::{Deserialize, Serialize};

use super::{FrameKind, WireError};
use crate::guest::GuestOffer;
use crate::preamble::Ticket;

/// A message and the frame that carries it.
pub trait Message: Serialize + for<'de> Deserialize<'de> {
    /// The frame's type.
    const KIND: FrameKind;

    /// Its bytes.
    fn encode(&self) -> Result<Vec<u8>, WireError> {
        postcard::to_stdvec(self).map_err(|_| WireError::Malformed("message cannot be encoded"))
    }

    /// Parses exactly one message.
    fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        match postcard::take_from_bytes(bytes) {
            Ok((message, [])) => Ok(message),
            Ok(_) => Err(WireError::Malformed("bytes after the message")),
            Err(_) => Err(WireError::Malformed("message does not parse")),
        }
    }
}

/// Which way a host's policy says the connection runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathKind {
    /// TLS ends at the peer.
    Direct,
    /// TLS ends at a gateway.
    Gateway,
}

/// The body of an offer or an accept and the host's signature over the transcript up to it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Signed {
    /// An encoded [`OfferBody`] or [`AcceptBody`].
    #[serde(with = "serde_bytes")]
    pub body: Vec<u8>,
    /// ECDSA P-256.
    #[serde(with = "serde_bytes")]
    pub signature: Vec<u8>,
}

/// What both ends say of themselves.
#[derive(Debug, Serialize, Deserialize)]
pub struct Party {
    /// Version of the session protocol.
    pub version: u16,
    /// The way the connection runs, by this end's policy.
    pub path: PathKind,
    /// On a direct path: hash of this end's TLS channel binding (RFC 9266).
    pub channel_binding: Option<[u8; 32]>,
    /// Ephemeral X25519 public key.
    pub ephemeral: [u8; 32],
    /// The host's certificates, leaf first.
    pub chain: Vec<serde_bytes::ByteBuf>,
}

/// What an offer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// The guest is to move.
    Move,
    /// Only to know whether it could, and how: nothing of the guest travels.
    Assess,
    /// To know who has it, after a commit that was not answered: nothing of the guest travels.
    Settle,
}

/// The source's part.
#[derive(Debug, Serialize, Deserialize)]
pub struct OfferBody {
    /// The source.
    pub source: Party,
    /// What for.
    pub purpose: Purpose,
    /// Chosen at random by the source.
    pub session_id: [u8; 16],
    /// Whether an owner key is part of the keys.
    pub owner_key: bool,
    /// Connections that the move would like to have, the first included.
    pub streams: u16,
    /// The guest.
    pub guest: GuestOffer,
}

/// The destination's part.
#[derive(Debug, Serialize, Deserialize)]
pub struct AcceptBody {
    /// The destination.
    pub destination: Party,
    /// As offered.
    pub session_id: [u8; 16],
    /// Connections that it shall have, at most as many as offered.
    pub streams: u16,
    /// What further connections name to whoever accepts them; no secret.
    pub ticket: Ticket,
    /// Platform evidence for the source's firmware.
    #[serde(with = "serde_bytes")]
    pub evidence: Vec<u8>,
}

/// Key confirmation.
#[derive(Debug, Serialize, Deserialize)]
pub struct Confirm {
    /// MAC over the transcript.
    pub mac: [u8; 32],
}

/// A further connection belongs to this session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The session.
    pub session_id: [u8; 16],
    /// Its number in it, from 1.
    pub stream: u16,
    /// Fresh for every join.
    pub nonce: [u8; 16],
    /// On a direct path: hash of this connection's TLS channel binding (RFC 9266).
    pub channel_binding: Option<[u8; 32]>,
    /// MAC over all that, under a key of this session, stream and (on a direct path) TLS connection.
    pub mac: [u8; 32],
}

/// The destination has seen that it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// MAC over what was joined, under the destination's key.
    pub mac: [u8; 32],
}

/// Bytes that mean nothing.
#[derive(Debug, Serialize, Deserialize)]
pub struct Probe {
    /// Whether it is the last one.
    pub last: bool,
    /// The bytes.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// How many bytes of probes came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeAck {
    /// In all.
    pub bytes: u64,
}

/// The firmware's send context.
#[derive(Debug, Serialize, Deserialize)]
pub struct Begin {
    /// Opaque.
    #[serde(with = "serde_bytes")]
    pub start: Vec<u8>,
}

/// The round is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundEnd {
    /// The round.
    pub round: u32,
    /// Pages sent in it, zero pages included.
    pub pages: u64,
    /// Number of the next seal.
    pub next_sequence: u64,
    /// Whether the guest is paused and no round follows.
    pub last: bool,
}

/// The round's pages are placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundAck {
    /// The round.
    pub round: u32,
    /// Pages received in it.
    pub pages: u64,
}

/// A piece of the machine state.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// Bytes in all, the same in every piece.
    pub total: u32,
    /// Where this piece starts.
    pub offset: u32,
    /// The piece.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// Everything verified; the destination's own manifest root.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Verified {
    /// First half of the root.
    pub root_hi: [u8; 24],
    /// Second half.
    pub root_lo: [u8; 24],
}

/// The source has given the guest up.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Commit {
    /// The epoch that the destination holds from now on.
    pub epoch: u64,
}

/// The destination runs the guest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Running {
    /// The epoch it holds.
    pub epoch: u64,
    /// Of how many network cards the addresses were announced there.
    pub announced: u32,
}

/// The sender gives up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abort {
    /// Stable code.
    pub code: String,
    /// For people.
    pub text: String,
}

impl Abort {
    /// Bounds both strings; control characters become spaces, for they will be printed.
    pub fn new(code: &str, text: &str) -> Self {
        Self {
            code: printable(code, 64), // characters, of up to four bytes
            text: printable(text, 512),
        }
    }

    /// Bounds what a peer sent.
    pub fn bounded(&self) -> Self {
        Self::new(&self.code, &self.text)
    }
}

macro_rules! kinds {
    ($($message:ident: $kind:ident,)*) => {
        $(impl Message for $message { const KIND: FrameKind = FrameKind::$kind; })*
    };
}

kinds! {
    Confirm: Confirm,
    Join: Join,
    Joined: Joined,
    Probe: Probe,
    ProbeAck: ProbeAck,
    Begin: Begin,
    RoundEnd: RoundEnd,
    RoundAck: RoundAck,
    State: State,
    Verified: Verified,
    Commit: Commit,
    Running: Running,
    Abort: Abort,
}

fn printable(text: &str, max: usize) -> String {
    text.chars()
        .take(max)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn messages_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = postcard::from_bytes::<Signed>(&bytes);
            let _ = postcard::from_bytes::<OfferBody>(&bytes);
            let _ = postcard::from_bytes::<AcceptBody>(&bytes);
            let _ = State::decode(&bytes);
            let _ = Join::decode(&bytes);
            if let Ok(abort) = Abort::decode(&bytes) {
                prop_assert!(abort.bounded().encode().unwrap().len() + 16 <= FrameKind::Abort.max_length());
            }
        }
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = Commit { epoch: 7 }.encode().unwrap();
        bytes.push(0);
        assert!(Commit::decode(&bytes).is_err());
    }
}
