//! Frames: a fixed header, a type, a bounded payload. The parser is pure over bytes.
//!
//! Not yet believed: every byte. A header names at most the maximum of its type before anything is
//! allocated; whether the frame was sent by the peer is decided later, by the seals.
//!
//! `WIRE.md` has it all in tables.
//!
//! | Bytes | Field | |
//! | --- | --- | --- |
//! | 0 | version | [`VERSION`] |
//! | 1 | type | [`FrameKind`] |
//! | 2..4 | stream | little endian; 0 is the first connection |
//! | 4..8 | length | of the payload, little endian, at most [`FrameKind::max_length`] |
//! | 8..16 | sequence | per direction, from 0, little endian |
//!
//! After the key agreement every payload but that of a page batch is sealed as a whole (16 bytes longer);
//! the header is its associated data. A page batch carries seals of its own: see [`batch`].

pub mod batch;
#[cfg(test)]
mod document;
pub mod messages;

use crate::code::Code;

/// Version of the protocol: the first byte of every frame.
pub const VERSION: u8 = 0xC1;
/// Size of a frame header in bytes.
pub const HEADER_SIZE: usize = 16;
/// Machine state travels in pieces of at most this size.
pub const STATE_CHUNK: usize = 256 * 1024;
/// Machine state in all.
pub const MAX_STATE: usize = 64 * 1024 * 1024;

/// Bytes that are not a frame of this protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Another version.
    #[error(
        "the peer speaks version {0:#04x} of the protocol, this host {VERSION:#04x}; update the older one"
    )]
    Version(u8),
    /// Unknown type.
    #[error("frame of unknown type {0:#04x}")]
    Unknown(u8),
    /// Length over the maximum of the type.
    #[error("frame {kind:?} of {length} bytes exceeds its maximum of {max}")]
    TooLarge {
        /// The type.
        kind: FrameKind,
        /// The claimed length.
        length: usize,
        /// The maximum.
        max: usize,
    },
    /// The content does not parse.
    #[error("frame content does not parse: {0}")]
    Malformed(&'static str),
    /// A batch without pages: no end sends one.
    #[error("page batch without pages; they are missing")]
    Empty,
    /// A batch ends before what it announced.
    #[error("page batch ends before the {0} entries that it announced")]
    Truncated(u16),
}

impl WireError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            WireError::Version(_) => Code::VersionUnsupported,
            WireError::Unknown(_) => Code::FrameUnknown,
            WireError::TooLarge { .. } => Code::FrameTooLarge,
            WireError::Malformed(_) => Code::FrameMalformed,
            WireError::Empty => Code::PageMissing,
            WireError::Truncated(_) => Code::StreamTruncated,
        }
    }
}

/// The frame types. `→` from source to destination, `←` back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// → who the source is, what it offers; signed.
    Offer = 0x01,
    /// ← who the destination is, platform evidence; signed.
    Accept = 0x02,
    /// ← the offer is refused (code and text), in clear.
    Refuse = 0x03,
    /// ↔ MAC over the transcript under the new keys.
    Confirm = 0x04,
    /// → bytes that mean nothing, in an assessment: how fast is the way?
    Probe = 0x05,
    /// ← all of them came.
    ProbeAck = 0x06,
    /// → a further connection belongs to this session: number and proof, in clear.
    Join = 0x07,
    /// ← it does; proof of the destination, in clear.
    Joined = 0x08,
    /// → the firmware's send context.
    Begin = 0x10,
    /// → sealed pages.
    PageBatch = 0x11,
    /// → the round is complete.
    RoundEnd = 0x12,
    /// ← the round's pages are placed.
    RoundAck = 0x13,
    /// → a piece of the machine state.
    State = 0x14,
    /// → the authenticated manifest.
    Manifest = 0x20,
    /// ← everything verified, state restored, vCPUs stopped.
    Verified = 0x21,
    /// → the source has given the guest up.
    Commit = 0x22,
    /// ← the destination runs the guest.
    Running = 0x23,
    /// ↔ the sender gives up (code and text).
    Abort = 0x30,
}

impl FrameKind {
    /// Every frame type.
    pub const ALL: &'static [FrameKind] = &[
        FrameKind::Offer,
        FrameKind::Accept,
        FrameKind::Refuse,
        FrameKind::Confirm,
        FrameKind::Probe,
        FrameKind::ProbeAck,
        FrameKind::Join,
        FrameKind::Joined,
        FrameKind::Begin,
        FrameKind::PageBatch,
        FrameKind::RoundEnd,
        FrameKind::RoundAck,
        FrameKind::State,
        FrameKind::Manifest,
        FrameKind::Verified,
        FrameKind::Commit,
        FrameKind::Running,
        FrameKind::Abort,
    ];

    /// The largest payload, seal included.
    pub const fn max_length(self) -> usize {
        match self {
            FrameKind::Offer | FrameKind::Accept => 256 * 1024,
            FrameKind::Begin => 64 * 1024,
            FrameKind::PageBatch => batch::MAX_PAYLOAD,
            FrameKind::State | FrameKind::Probe => STATE_CHUNK + 64,
            FrameKind::Refuse | FrameKind::Abort => 4096,
            FrameKind::Manifest => 1024,
            FrameKind::Confirm
            | FrameKind::ProbeAck
            | FrameKind::Join
            | FrameKind::Joined
            | FrameKind::RoundEnd
            | FrameKind::RoundAck
            | FrameKind::Verified
            | FrameKind::Commit
            | FrameKind::Running => 512,
        }
    }
}

impl TryFrom<u8> for FrameKind {
    type Error = WireError;

    fn try_from(byte: u8) -> Result<Self, WireError> {
        Self::ALL
            .iter()
            .copied()
            .find(|kind| *kind as u8 == byte)
            .ok_or(WireError::Unknown(byte))
    }
}

/// A parsed header: the type is known and the length within its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The type.
    pub kind: FrameKind,
    /// The stream.
    pub stream: u16,
    /// Bytes of payload.
    pub length: u32,
    /// The frame's number in its direction.
    pub sequence: u64,
}

impl Header {
    /// A header for a payload of `length` bytes.
    pub fn new(
        kind: FrameKind,
        stream: u16,
        sequence: u64,
        length: usize,
    ) -> Result<Self, WireError> {
        let max = kind.max_length();
        match u32::try_from(length) {
            Ok(short) if length <= max => Ok(Self {
                kind,
                stream,
                length: short,
                sequence,
            }),
            _ => Err(WireError::TooLarge { kind, length, max }),
        }
    }

    /// Parses the 16 bytes of a header.
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Result<Self, WireError> {
        let [version, kind, s0, s1, l0, l1, l2, l3, sequence @ ..] = *bytes;
        if version != VERSION {
            return Err(WireError::Version(version));
        }
        let kind = FrameKind::try_from(kind)?;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let stream = u16::from_le_bytes([s0, s1]);
        Self::new(
            kind,
            stream,
            u64::from_le_bytes(sequence),
            usize::try_from(length).unwrap_or(usize::MAX),
        )
    }

    /// The 16 bytes.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let [s0, s1] = self.stream.to_le_bytes();
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        let [q0, q1, q2, q3, q4, q5, q6, q7] = self.sequence.to_le_bytes();
        [
            VERSION,
            self.kind as u8,
            s0,
            s1,
            l0,
            l1,
            l2,
            l3,
            q0,
            q1,
            q2,
            q3,
            q4,
            q5,
            q6,
            q7,
        ]
    }
}

/// A whole frame, as a gateway sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The type.
    pub kind: FrameKind,
    /// The stream.
    pub stream: u16,
    /// The number in its direction.
    pub sequence: u64,
    /// The payload; sealed after the key agreement.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Parses a frame that fills `bytes` exactly.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let (header, payload) = bytes
            .split_first_chunk::<HEADER_SIZE>()
            .ok_or(WireError::Malformed("shorter than a header"))?;
        let header = Header::parse(header)?;
        if usize::try_from(header.length) != Ok(payload.len()) {
            return Err(WireError::Malformed("length and payload differ"));
        }
        let Header {
            kind,
            stream,
            sequence,
            ..
        } = header;
        Ok(Self {
            kind,
            stream,
            sequence,
            payload: payload.to_vec(),
        })
    }

    /// Header and payload.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let header = Header::new(self.kind, self.stream, self.sequence, self.payload.len())?;
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(&self.payload);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn header_parser_never_panics_and_bounds_length(bytes: [u8; HEADER_SIZE]) {
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert!(header.length as usize <= header.kind.max_length());
                prop_assert_eq!(header.encode(), bytes);
            }
        }

        #[test]
        fn valid_headers_round_trip(kind in 0..FrameKind::ALL.len(), stream: u16, sequence: u64, length in 0usize..600) {
            let kind = FrameKind::ALL[kind];
            let header = Header::new(kind, stream, sequence, length);
            prop_assert_eq!(header.is_ok(), length <= kind.max_length());
            if let Ok(header) = header {
                prop_assert_eq!(Header::parse(&header.encode()), Ok(header));
            }
        }

        #[test]
        fn frame_parser_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(frame) = Frame::parse(&bytes) {
                prop_assert_eq!(frame.encode().unwrap(), bytes);
            }
        }
    }

    #[test]
    fn each_fault_has_its_code() {
        let mut bytes = Header::new(FrameKind::Commit, 0, 0, 8).unwrap().encode();
        bytes[0] = 0;
        assert_eq!(
            Header::parse(&bytes).unwrap_err().code(),
            Code::VersionUnsupported
        );
        bytes[0] = VERSION;
        bytes[1] = 0x7f;
        assert_eq!(
            Header::parse(&bytes).unwrap_err().code(),
            Code::FrameUnknown
        );
        bytes[1] = FrameKind::Commit as u8;
        bytes[7] = 0xff;
        assert_eq!(
            Header::parse(&bytes).unwrap_err().code(),
            Code::FrameTooLarge
        );
    }
}
