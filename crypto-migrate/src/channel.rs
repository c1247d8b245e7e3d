//! One connection as a sequence of frames: numbered, bounded, sealed once the keys are agreed.
//!
//! Not yet believed: every frame, until its number is the next one and its seal opens. A page batch is the
//! exception: its seals are its own, and the caller opens them.

use std::time::{Duration, Instant};

use crate::code::Code;
use crate::crypto::{AeadKey, CryptoError, TAG_SIZE};
use crate::tls::{TlsError, TlsStream, Transport};
use crate::wire::batch::BatchBuilder;
use crate::wire::messages::{Abort, Message};
use crate::wire::{FrameKind, HEADER_SIZE, Header, WireError};

/// A frame that could not be sent or is refused.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The frame does not parse.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A primitive failed.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// The seal of a control frame does not open.
    #[error("the seal of a {0:?} frame does not open; it was changed on the way")]
    Authentication(FrameKind),
    /// A number that was there before.
    #[error("frame {0:?} was sent again")]
    Replayed(FrameKind),
    /// A number is left out.
    #[error("before this {0:?} frame, at least one frame is missing")]
    Gap(FrameKind),
    /// Another stream.
    #[error("frame {0:?} belongs to another stream")]
    Stream(FrameKind),
    /// No place in this phase.
    #[error("frame {got:?} has no place here, {wanted} was due")]
    Unexpected {
        /// What came.
        got: FrameKind,
        /// What was due.
        wanted: &'static str,
    },
    /// The peer gave up.
    #[error("the peer gave up: {}: {}", .0.code, .0.text)]
    Aborted(Abort),
}

impl ChannelError {
    /// Whether the peer gave up (and needs not be told).
    pub fn by_peer(&self) -> bool {
        matches!(self, ChannelError::Aborted(_))
    }

    /// The stable code; that of the peer where the peer gave up.
    pub fn code(&self) -> &str {
        match self {
            ChannelError::Tls(error) => error.code().as_str(),
            ChannelError::Wire(error) => error.code().as_str(),
            ChannelError::Crypto(error) => Code::from(*error).as_str(),
            ChannelError::Authentication(_) => Code::ControlAuthentication.as_str(),
            ChannelError::Replayed(FrameKind::PageBatch) => Code::PageReplayed.as_str(),
            ChannelError::Replayed(_) => Code::FrameReplayed.as_str(),
            ChannelError::Gap(_) => Code::SequenceGap.as_str(),
            ChannelError::Stream(_) => Code::SessionMismatch.as_str(),
            ChannelError::Unexpected { .. } => Code::FrameUnexpected.as_str(),
            ChannelError::Aborted(abort) => &abort.code,
        }
    }
}

/// The keys of the control frames.
pub(crate) struct ControlKeys {
    pub(crate) send: AeadKey,
    pub(crate) receive: AeadKey,
}

/// A connection that carries frames.
pub(crate) struct Channel<T> {
    tls: TlsStream<T>,
    keys: Option<ControlKeys>,
    sent: u64,
    received: u64,
    bytes: u64,
    inbox: Vec<u8>,
    frame_time: Duration,
    cancelled: Box<dyn Fn() -> bool + Send>,
    /// Its stream; `None` until the first frame has named it.
    stream: Option<u16>,
}

impl<T: Transport> Channel<T> {
    /// `frame_time` bounds the writing of one frame.
    pub(crate) fn new(
        tls: TlsStream<T>,
        frame_time: Duration,
        cancelled: Box<dyn Fn() -> bool + Send>,
    ) -> Self {
        Self {
            tls,
            keys: None,
            sent: 0,
            received: 0,
            bytes: 0,
            inbox: Vec::new(),
            frame_time,
            cancelled,
            stream: Some(STREAM),
        }
    }

    /// A further connection of that number.
    pub(crate) fn of_stream(mut self, stream: u16) -> Self {
        self.stream = Some(stream);
        self
    }

    /// A further connection whose first frame says which it is.
    pub(crate) fn of_any_stream(mut self) -> Self {
        self.stream = None;
        self
    }

    /// Its stream, once it is known.
    pub(crate) fn stream(&self) -> Option<u16> {
        self.stream
    }

    pub(crate) fn tls(&self) -> &TlsStream<T> {
        &self.tls
    }

    /// Bytes of frames in both directions, before TLS.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// From here on every frame but a page batch is sealed.
    pub(crate) fn seal_with(&mut self, keys: ControlKeys) {
        self.keys = Some(keys);
    }

    pub(crate) fn send<M: Message>(&mut self, message: &M) -> Result<(), ChannelError> {
        self.send_raw(M::KIND, message.encode()?)
    }

    pub(crate) fn send_raw(
        &mut self,
        kind: FrameKind,
        mut payload: Vec<u8>,
    ) -> Result<(), ChannelError> {
        let tag_size = if self.keys.is_some() { TAG_SIZE } else { 0 };
        let header = Header::new(
            kind,
            self.stream.unwrap_or(STREAM),
            self.sent,
            payload.len() + tag_size,
        )?
        .encode();
        if let Some(keys) = &self.keys {
            let tag = keys.send.seal(self.sent, &header, &mut payload)?;
            payload.extend_from_slice(&tag);
        }
        let mut frame = [header.as_slice(), &payload, &[0]].concat();
        self.write(&mut frame)
    }

    /// Sends the batch, if it has any entry, and empties it.
    pub(crate) fn send_batch(&mut self, batch: &mut BatchBuilder) -> Result<(), ChannelError> {
        if batch.entries() > 0 {
            let header = Header::new(
                FrameKind::PageBatch,
                self.stream.unwrap_or(STREAM),
                self.sent,
                batch.payload_length(),
            )?
            .encode();
            self.write(batch.finish(&header))?;
            batch.clear();
        }
        Ok(())
    }

    /// The next frame, opened; an abort of the peer is an error.
    pub(crate) fn receive(
        &mut self,
        deadline: Instant,
    ) -> Result<(FrameKind, &mut [u8]), ChannelError> {
        self.receive_until(deadline, None)
    }

    /// The same, for one of several connections: `given_up` is asked, too, about ten times a second.
    pub(crate) fn receive_until(
        &mut self,
        deadline: Instant,
        given_up: Option<&dyn Fn() -> bool>,
    ) -> Result<(FrameKind, &mut [u8]), ChannelError> {
        let mut header_bytes = [0; HEADER_SIZE];
        let cancelled = &self.cancelled;
        let cancelled = &|| cancelled() || given_up.is_some_and(|given_up| given_up());
        self.tls
            .read_exact(&mut header_bytes, deadline, cancelled)?;
        let header = Header::parse(&header_bytes)?;
        check(&mut self.stream, self.received, &header)?;
        let length = usize::try_from(header.length).unwrap_or(usize::MAX); // at most the type's maximum
        if self.inbox.len() < length {
            self.inbox.resize(length, 0);
        }
        let payload = self.inbox.get_mut(..length).unwrap_or_default();
        self.tls.read_exact(payload, deadline, cancelled)?;
        self.bytes += (HEADER_SIZE + length) as u64;
        self.received += 1;
        let payload = match &self.keys {
            Some(keys) if header.kind != FrameKind::PageBatch => keys
                .receive
                .open(header.sequence, &header_bytes, payload)
                .map_err(|_| ChannelError::Authentication(header.kind))?,
            None if header.kind == FrameKind::PageBatch => {
                return Err(ChannelError::Unexpected {
                    got: header.kind,
                    wanted: "the key agreement",
                });
            }
            _ => payload,
        };
        if matches!(header.kind, FrameKind::Abort | FrameKind::Refuse) {
            return Err(ChannelError::Aborted(Abort::decode(payload)?.bounded()));
        }
        Ok((header.kind, payload))
    }

    /// The next frame, which must be an `M`.
    pub(crate) fn receive_message<M: Message>(
        &mut self,
        wanted: &'static str,
        deadline: Instant,
    ) -> Result<M, ChannelError> {
        match self.receive(deadline)? {
            (kind, payload) if kind == M::KIND => Ok(M::decode(payload)?),
            (got, _) => Err(ChannelError::Unexpected { got, wanted }),
        }
    }

    /// From here on a wait ends only by an answer or its deadline.
    pub(crate) fn ignore_cancel(&mut self) {
        self.cancelled = Box::new(|| false);
    }

    /// Takes the buffer that the last frame's payload lies in, from its start on; the next frame gets this one.
    pub(crate) fn swap_inbox(&mut self, other: Vec<u8>) -> Vec<u8> {
        std::mem::replace(&mut self.inbox, other)
    }

    /// Looks, without waiting, whether the peer has given up. Anything else it says now is out of place.
    pub(crate) fn check_abort(&mut self) -> Result<(), ChannelError> {
        if !self.tls.readable()? {
            return Ok(());
        }
        let (got, _) = self.receive(Instant::now() + self.frame_time)?;
        Err(ChannelError::Unexpected {
            got,
            wanted: "nothing",
        })
    }

    /// After a failed write: what the peer may have said before it closed.
    pub(crate) fn last_words(&mut self) -> Option<ChannelError> {
        let deadline = Instant::now() + LAST_WORDS_TIME;
        match self.receive(deadline) {
            Err(error @ ChannelError::Aborted(_)) => Some(error),
            _ => None,
        }
    }

    /// Ends a failed connection: tells the peer why, unless it was the peer that gave up.
    pub(crate) fn give_up(&mut self, kind: FrameKind, by_peer: bool, code: &str, text: &str) {
        if by_peer {
            self.tls.close()
        } else {
            self.abort(kind, code, text)
        }
    }

    /// Tells the peer why, as far as it listens, and closes.
    fn abort(&mut self, kind: FrameKind, code: &str, text: &str) {
        self.frame_time = LAST_WORDS_TIME;
        let told = Abort::new(code, text).encode().map_err(ChannelError::from);
        match told.and_then(|payload| self.send_raw(kind, payload)) {
            Ok(()) => self.close(LINGER_TIME),
            Err(error) => {
                tracing::debug!(%error, "the peer could not be told");
                self.tls.close();
            }
        }
    }

    /// Says that nothing follows and waits, for `time`, that the peer has read it.
    pub(crate) fn close(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        if self.tls.finish(deadline).is_ok() {
            self.tls.linger(deadline);
        } else {
            self.tls.close();
        }
    }

    /// Writes a frame and nothing of the byte behind it.
    fn write(&mut self, frame: &mut [u8]) -> Result<(), ChannelError> {
        self.tls
            .write_but_last(frame, Instant::now() + self.frame_time)?;
        self.sent += 1;
        self.bytes += frame.len().saturating_sub(1) as u64;
        Ok(())
    }
}

/// A header's place: of this stream, and the next one.
fn check(stream: &mut Option<u16>, received: u64, header: &Header) -> Result<(), ChannelError> {
    if header.stream != *stream.get_or_insert(header.stream) {
        return Err(ChannelError::Stream(header.kind));
    }
    match header.sequence.cmp(&received) {
        std::cmp::Ordering::Less => Err(ChannelError::Replayed(header.kind)),
        std::cmp::Ordering::Greater => Err(ChannelError::Gap(header.kind)),
        std::cmp::Ordering::Equal => Ok(()),
    }
}

/// The stream of the first connection: further ones come with their own numbers.
pub(crate) const STREAM: u16 = 0;
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);
const LINGER_TIME: Duration = Duration::from_secs(2);
