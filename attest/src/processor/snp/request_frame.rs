//! How a guest request travels where no GHCB carries it: between an emulated SNP guest and the
//! software secure processor, past a VMM that looks into neither frame.
//!
//! On hardware the guest puts an exit code and the addresses of two pages into its GHCB, and gets
//! EXITINFO2 and, for an extended request, the host's certificates. Publication 56421 (GHCB),
//! "SNP Guest Request" and "SNP Extended Guest Request". Here the same goes as bytes:
//!
//! ```text
//! request  exit code 8 | message page 4096
//! reply    EXITINFO2 8 | message page 4096 | length of the table 4 | certificate table
//! ```
//!
//! Numbers are little-endian. Whether the page holds a good message is for those who have the key
//! ([`GuestChannel`](super::GuestChannel), [`SnpProcessor`](super::SnpProcessor)), whether the
//! table is one for [`table`](crate::evidence::table): neither is believed here.

use super::message::MESSAGE_MAX;
use super::pages::PageBytes;
use crate::bytes;
use std::io::{self, Read, Write};

/// The host's vsock port (CID 2) for guest requests: "SNP". One request and one reply in turn,
/// any number a connection.
pub const GUEST_REQUEST_PORT: u32 = 0x53_4e50;
/// The length of every request.
pub const REQUEST_FRAME_LEN: usize = 8 + MESSAGE_MAX;
/// The longest reply.
pub const REPLY_FRAME_MAX: usize = REPLY_HEAD_LEN + CERTIFICATES_MAX;
/// The longest certificate table in a reply.
pub const CERTIFICATES_MAX: usize = 64 << 10;

/// What a guest asks its host for: the exit codes of publication 56421, table "List of Supported
/// Non-Automatic Events".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum RequestKind {
    /// SNP Guest Request: the firmware's answer.
    Plain = 0x8000_0011,
    /// SNP Extended Guest Request: the host's certificates too.
    Extended = 0x8000_0012,
}

/// A guest's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestFrame {
    kind: RequestKind,
    page: Box<PageBytes>,
}

/// The host's reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyFrame {
    status: RequestStatus,
    page: Box<PageBytes>,
    certificates: Vec<u8>,
}

/// SW_EXITINFO2 after a guest request; 0 where the message page holds an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RequestStatus(pub u64);

/// Why bytes are no frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Too few or too many bytes.
    #[error("a {frame} frame has {expected} bytes, not {found}")]
    Length {
        /// `request` or `reply`.
        frame: &'static str,
        /// How many there must be; for a reply, as its own table's length says.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// No exit code of a guest request.
    #[error("exit code {0:#x} is no guest request; there are 0x80000011 and 0x80000012")]
    ExitCode(u64),
    /// A message that no page holds.
    #[error("a guest message has at most {MESSAGE_MAX} bytes, not {0}")]
    Message(usize),
    /// A certificate table that no frame holds.
    #[error("the certificate table has {0} bytes; a reply takes at most {CERTIFICATES_MAX}")]
    Certificates(usize),
    /// The stream ended or failed.
    #[error("the guest request's connection failed: {0}")]
    Io(#[from] io::Error),
}

impl RequestFrame {
    /// A request with a sealed message; zeros fill the page.
    pub fn new(kind: RequestKind, message: &[u8]) -> Result<Self, FrameError> {
        Ok(Self {
            kind,
            page: page(message)?,
        })
    }

    /// Reads all of `frame`.
    pub fn parse(frame: &[u8]) -> Result<Self, FrameError> {
        let exact = || FrameError::Length {
            frame: "request",
            expected: REQUEST_FRAME_LEN,
            found: frame.len(),
        };
        let (code, message) = frame.split_first_chunk::<8>().ok_or_else(exact)?;
        let page: &PageBytes = message.try_into().map_err(|_| exact())?;
        Ok(Self {
            kind: RequestKind::from_exit_code(u64::from_le_bytes(*code))?,
            page: Box::new(*page),
        })
    }

    /// Reads one request from a stream, and nothing behind it.
    pub fn read_from(stream: &mut impl Read) -> Result<Self, FrameError> {
        let mut frame = vec![0; REQUEST_FRAME_LEN];
        stream.read_exact(&mut frame)?;
        Self::parse(&frame)
    }

    /// Its bytes, [`REQUEST_FRAME_LEN`] of them.
    pub fn to_bytes(&self) -> Vec<u8> {
        [&(self.kind as u64).to_le_bytes(), self.page.as_slice()].concat()
    }

    /// Writes it to a stream.
    pub fn write_to(&self, stream: &mut impl Write) -> io::Result<()> {
        stream.write_all(&self.to_bytes())?;
        stream.flush()
    }

    /// What is asked for.
    pub fn kind(&self) -> RequestKind {
        self.kind
    }

    /// The message page.
    pub fn page(&self) -> &PageBytes {
        &self.page
    }
}

impl ReplyFrame {
    /// The firmware's answer, with the host's certificate table where the request is extended and
    /// the host has one.
    pub fn answered(message: &[u8], certificates: Vec<u8>) -> Result<Self, FrameError> {
        if certificates.len() > CERTIFICATES_MAX {
            return Err(FrameError::Certificates(certificates.len()));
        }
        Ok(Self {
            status: RequestStatus::OK,
            page: page(message)?,
            certificates,
        })
    }

    /// No answer, and why: no message and no certificates.
    pub fn refused(status: RequestStatus) -> Self {
        Self {
            status,
            page: Box::new([0; MESSAGE_MAX]),
            certificates: Vec::new(),
        }
    }

    /// Reads all of `frame`.
    pub fn parse(frame: &[u8]) -> Result<Self, FrameError> {
        let length = |expected| FrameError::Length {
            frame: "reply",
            expected,
            found: frame.len(),
        };
        let Some((head, certificates)) = frame.split_first_chunk::<REPLY_HEAD_LEN>() else {
            return Err(length(REPLY_HEAD_LEN));
        };
        let head = ReplyHead::parse(head)?;
        if certificates.len() != head.certificates_len {
            return Err(length(REPLY_HEAD_LEN.saturating_add(head.certificates_len)));
        }
        Ok(head.with(certificates.to_vec()))
    }

    /// Reads one reply from a stream, and nothing behind it.
    pub fn read_from(stream: &mut impl Read) -> Result<Self, FrameError> {
        let mut head = [0; REPLY_HEAD_LEN];
        stream.read_exact(&mut head)?;
        let head = ReplyHead::parse(&head)?;
        let mut certificates = vec![0; head.certificates_len];
        stream.read_exact(&mut certificates)?;
        Ok(head.with(certificates))
    }

    /// Its bytes, at most [`REPLY_FRAME_MAX`].
    pub fn to_bytes(&self) -> Vec<u8> {
        // At most CERTIFICATES_MAX, which all ways to a frame check.
        let len = self.certificates.len() as u32;
        [
            &self.status.0.to_le_bytes(),
            self.page.as_slice(),
            &len.to_le_bytes(),
            &self.certificates,
        ]
        .concat()
    }

    /// Writes it to a stream.
    pub fn write_to(&self, stream: &mut impl Write) -> io::Result<()> {
        stream.write_all(&self.to_bytes())?;
        stream.flush()
    }

    /// Whether the page holds an answer, and else why not.
    pub fn status(&self) -> RequestStatus {
        self.status
    }

    /// The message page.
    pub fn page(&self) -> &PageBytes {
        &self.page
    }

    /// The host's certificate table, not looked into; empty where it has none.
    pub fn certificates(&self) -> &[u8] {
        &self.certificates
    }
}

impl RequestKind {
    fn from_exit_code(code: u64) -> Result<Self, FrameError> {
        [Self::Plain, Self::Extended]
            .into_iter()
            .find(|kind| *kind as u64 == code)
            .ok_or(FrameError::ExitCode(code))
    }
}

impl RequestStatus {
    /// The message page holds the firmware's answer.
    pub const OK: Self = Self(0);
    /// The VMM is busy; the guest sends the very same request again (SNP_GUEST_VMM_ERR_BUSY).
    pub const BUSY: Self = Self(2 << 32);

    /// The firmware refused with this status ([`FirmwareError`](super::super::FirmwareError)).
    pub const fn firmware(error: u32) -> Self {
        Self(error as u64)
    }

    /// The VMM refused with this error.
    pub const fn vmm(error: u32) -> Self {
        Self((error as u64) << 32)
    }

    /// Bits 0 to 31; 0 where the firmware did not refuse.
    pub const fn firmware_error(self) -> u32 {
        self.0 as u32
    }

    /// Bits 32 to 63; 0 where the VMM did not refuse.
    pub const fn vmm_error(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// What lies before the certificates.
struct ReplyHead {
    status: RequestStatus,
    page: Box<PageBytes>,
    certificates_len: usize,
}

impl ReplyHead {
    fn parse(head: &[u8; REPLY_HEAD_LEN]) -> Result<Self, FrameError> {
        let length = FrameError::Length {
            frame: "reply",
            expected: REPLY_HEAD_LEN,
            found: head.len(),
        };
        let fields = bytes::array(head, 0)
            .zip(bytes::array(head, 8))
            .zip(bytes::le32(head, 8 + MESSAGE_MAX));
        let ((status, page), certificates_len) = fields.ok_or(length)?;
        let certificates_len = certificates_len as usize;
        if certificates_len > CERTIFICATES_MAX {
            return Err(FrameError::Certificates(certificates_len));
        }
        Ok(Self {
            status: RequestStatus(u64::from_le_bytes(status)),
            page: Box::new(page),
            certificates_len,
        })
    }

    fn with(self, certificates: Vec<u8>) -> ReplyFrame {
        ReplyFrame {
            status: self.status,
            page: self.page,
            certificates,
        }
    }
}

fn page(message: &[u8]) -> Result<Box<PageBytes>, FrameError> {
    let mut page = Box::new([0; MESSAGE_MAX]);
    let room = page.get_mut(..message.len());
    room.ok_or(FrameError::Message(message.len()))?
        .copy_from_slice(message);
    Ok(page)
}

const REPLY_HEAD_LEN: usize = 8 + MESSAGE_MAX + 4;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_lies_on_the_wire_as_the_table_says() {
        let frame = RequestFrame::new(RequestKind::Extended, b"sealed").unwrap();
        let bytes = frame.to_bytes();
        assert_eq!(bytes.len(), 4104);
        assert_eq!(bytes[..8], [0x12, 0, 0, 0x80, 0, 0, 0, 0]);
        assert_eq!(bytes[8..14], *b"sealed");
        assert_eq!(bytes[14..], [0; 4090]);
        assert_eq!(RequestFrame::parse(&bytes).unwrap(), frame);
        let plain = RequestFrame::new(RequestKind::Plain, &[1; 4096]).unwrap();
        assert_eq!(plain.to_bytes()[0], 0x11);
        assert_eq!(plain.page(), &[1; 4096]);
        assert!(matches!(
            RequestFrame::new(RequestKind::Plain, &[1; 4097]),
            Err(FrameError::Message(4097))
        ));
    }

    #[test]
    fn a_reply_lies_on_the_wire_as_the_table_says() {
        let frame = ReplyFrame::answered(b"sealed", b"table".to_vec()).unwrap();
        let bytes = frame.to_bytes();
        assert_eq!(bytes.len(), 8 + 4096 + 4 + 5);
        assert_eq!(bytes[..8], [0; 8]);
        assert_eq!(bytes[8..14], *b"sealed");
        assert_eq!(bytes[4104..], *b"\x05\0\0\0table");
        assert_eq!(ReplyFrame::parse(&bytes).unwrap(), frame);

        let refused = ReplyFrame::refused(RequestStatus::firmware(0x16));
        assert_eq!(refused.to_bytes()[..8], [0x16, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(refused.to_bytes().len(), 4108);
        let status = RequestStatus(0x0000_0002_0000_0016);
        assert_eq!((status.vmm_error(), status.firmware_error()), (2, 0x16));
        assert_eq!(RequestStatus::BUSY, RequestStatus::vmm(2));
    }

    #[test]
    fn wrong_lengths_and_exit_codes_are_refused() {
        let good = RequestFrame::new(RequestKind::Plain, b"m")
            .unwrap()
            .to_bytes();
        for wrong in [&good[..7], &good[..4103], &[good.as_slice(), &[0]].concat()] {
            let refused = RequestFrame::parse(wrong).unwrap_err();
            assert!(
                matches!(refused, FrameError::Length { found, .. } if found == wrong.len()),
                "{refused}"
            );
        }
        for (at, byte) in [(0, 0x13), (0, 0x10), (7, 1), (3, 0)] {
            let mut wrong = good.clone();
            wrong[at] = byte;
            assert!(matches!(
                RequestFrame::parse(&wrong),
                Err(FrameError::ExitCode(_))
            ));
        }
        let good = ReplyFrame::answered(b"m", vec![7; 30]).unwrap().to_bytes();
        for wrong in [&good[..0], &good[..4107], &good[..4108], &good[..4137]] {
            assert!(matches!(
                ReplyFrame::parse(wrong),
                Err(FrameError::Length { .. })
            ));
        }
        let long = [good.as_slice(), &[0]].concat();
        assert!(ReplyFrame::parse(&long).is_err());
    }

    #[test]
    fn a_reply_has_at_most_64_kib_of_certificates() {
        let full = ReplyFrame::answered(b"m", vec![7; 64 << 10]).unwrap();
        assert_eq!(full.to_bytes().len(), REPLY_FRAME_MAX);
        assert_eq!(ReplyFrame::parse(&full.to_bytes()).unwrap(), full);
        assert!(ReplyFrame::answered(b"m", vec![7; (64 << 10) + 1]).is_err());
        // Nothing is read, or made room for, that is longer than allowed.
        let mut long = full.to_bytes();
        long[4104..4108].copy_from_slice(&u32::MAX.to_le_bytes());
        let refused = ReplyFrame::read_from(&mut long.as_slice()).unwrap_err();
        assert!(matches!(refused, FrameError::Certificates(_)), "{refused}");
        assert!(matches!(
            ReplyFrame::parse(&long),
            Err(FrameError::Certificates(_))
        ));
    }

    #[test]
    fn streams_carry_frame_after_frame_and_end_in_between_only() {
        let first = RequestFrame::new(RequestKind::Plain, b"one").unwrap();
        let second = RequestFrame::new(RequestKind::Extended, b"two").unwrap();
        let mut wire = Vec::new();
        first.write_to(&mut wire).unwrap();
        second.write_to(&mut wire).unwrap();
        let mut rest = wire.as_slice();
        assert_eq!(RequestFrame::read_from(&mut rest).unwrap(), first);
        assert_eq!(RequestFrame::read_from(&mut rest).unwrap(), second);
        assert!(rest.is_empty());
        let cut = RequestFrame::read_from(&mut &wire[..4103]).unwrap_err();
        assert!(matches!(cut, FrameError::Io(_)), "{cut}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_built_comes_back(
            message in prop::collection::vec(any::<u8>(), 0..=4096usize),
            certificates in prop::collection::vec(any::<u8>(), 0..3000usize),
            behind in prop::collection::vec(any::<u8>(), 0..40usize),
        ) {
            let request = RequestFrame::new(RequestKind::Extended, &message).unwrap();
            prop_assert_eq!(&RequestFrame::parse(&request.to_bytes()).unwrap(), &request);
            prop_assert_eq!(&request.page()[..message.len()], message.as_slice());
            let reply = ReplyFrame::answered(&message, certificates).unwrap();
            let wire = [reply.to_bytes(), behind.clone()].concat();
            let mut rest = wire.as_slice();
            prop_assert_eq!(&ReplyFrame::read_from(&mut rest).unwrap(), &reply);
            prop_assert_eq!(rest, behind.as_slice());
            prop_assert_eq!(ReplyFrame::parse(&wire).is_ok(), behind.is_empty());
        }

        /// Whatever comes: no panic, and what is read is what the bytes say.
        #[test]
        fn arbitrary_bytes_are_refused_or_read_whole(
            head in any::<[u8; 8]>(),
            len in prop_oneof![0..80u32, any::<u32>()],
            tail in prop::collection::vec(any::<u8>(), 0..80usize),
        ) {
            let raw = [head.as_slice(), &[3; 4096], &len.to_le_bytes(), &tail].concat();
            match ReplyFrame::parse(&raw) {
                Ok(reply) => prop_assert_eq!(&reply.to_bytes(), &raw),
                Err(_) => prop_assert_ne!(len as usize, tail.len()),
            }
            prop_assert!(RequestFrame::parse(&raw).is_err());
        }
    }
}
