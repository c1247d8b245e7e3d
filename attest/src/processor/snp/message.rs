//! Guest messages: how a guest and the firmware talk past the host. Publication 56860, "Guest
//! Messages".
//!
//! Each message is a header of 0x60 bytes and an AES-256-GCM ciphertext under one of four keys
//! (VMPCK), which the secrets page gave to the guest. The sequence number is the nonce, so a
//! message that comes twice, or out of order, is refused: it would tell what a key stream hides.
//! Both ends are here: [`GuestChannel`] is the guest's.

use super::super::FirmwareError;
use super::pages::{PageBytes, vmpck_of};
use crate::bytes;
use crate::report::REPORT_LEN;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::{Zeroize, Zeroizing};

/// The length of a message's header.
pub const MESSAGE_HEADER_LEN: usize = 0x60;
/// The longest message: one page.
pub const MESSAGE_MAX: usize = 4096;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageType {
    /// Asks for a derived key.
    KeyRequest = 3,
    /// Holds a derived key.
    KeyResponse = 4,
    /// Asks for a report.
    ReportRequest = 5,
    /// Holds a report.
    ReportResponse = 6,
}

/// Which key is to sign a report, or to be the root of a derived key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeySelect {
    /// The VLEK where one is loaded, else the VCEK.
    #[default]
    Any = 0,
    /// The VCEK.
    Vcek = 1,
    /// The VLEK.
    Vlek = 2,
}

/// The guest's end of the channel to the firmware.
pub struct GuestChannel {
    vmpck: u8,
    key: MessageKey,
    /// How many messages have gone back and forth.
    count: u64,
}

/// What a guest asks to have mixed into a derived key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyRequest {
    /// Derive from the guest's own VM root key instead of an endorsement key: the key dies with
    /// the guest.
    pub from_vmrk: bool,
    /// Which endorsement key otherwise.
    pub key: KeySelect,
    /// Bits of GUEST_FIELD_SELECT: policy 0, image id 1, family id 2, measurement 3, guest SVN 4,
    /// TCB version 5, launch mitigation vector 6.
    pub fields: u64,
    /// The privilege level that the key is for.
    pub vmpl: u32,
    /// At most the guest's own.
    pub guest_svn: u32,
    /// At most the committed one, part by part.
    pub tcb: [u8; 8],
    /// At most the mitigations at launch; with a value the request is of version 2.
    pub launch_mitigations: Option<u64>,
}

/// Why a reply is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Not a reply to the last request, or changed on the way.
    #[error("the reply is not the firmware's answer to this request; the host changed it")]
    NotTheReply,
    /// The firmware refused. 0x16: invalid parameters; 0x27: no such key.
    #[error("the firmware refused the request with status {0:#x}")]
    Status(u32),
    /// The secrets page has no such key.
    #[error("there are VMPCK 0 to 3, not {0}")]
    Vmpck(u8),
    /// The counter is used up.
    #[error("the message counter is used up; the guest has to be launched anew")]
    Overflow,
}

impl GuestChannel {
    /// The channel under VMPCK 0 to 3 of a secrets page, before the first message.
    pub fn new(secrets: &PageBytes, vmpck: u8) -> Result<Self, MessageError> {
        let raw = vmpck_of(secrets, vmpck).ok_or(MessageError::Vmpck(vmpck))?;
        let raw = Zeroizing::new(raw);
        let key = MessageKey::new(&raw).map_err(|_| MessageError::Vmpck(vmpck))?;
        Ok(Self {
            vmpck,
            key,
            count: 0,
        })
    }

    /// A sealed MSG_REPORT_REQ.
    pub fn report_request(
        &self,
        report_data: &[u8; 64],
        vmpl: u32,
        key: KeySelect,
    ) -> Result<Vec<u8>, MessageError> {
        let mut payload = [0; REPORT_REQUEST_LEN];
        let fields = report_data.iter().copied();
        let fields = fields
            .chain(vmpl.to_le_bytes())
            .chain((key as u32).to_le_bytes());
        for (to, from) in payload.iter_mut().zip(fields) {
            *to = from;
        }
        self.request(MessageType::ReportRequest, 1, &payload)
    }

    /// The report in the reply to the last request.
    pub fn report(&mut self, reply: &[u8]) -> Result<[u8; REPORT_LEN], MessageError> {
        let payload = self.reply(MessageType::ReportResponse, reply)?;
        status(&payload)?;
        bytes::array(&payload, RESPONSE_HEAD_LEN).ok_or(MessageError::NotTheReply)
    }

    /// A sealed MSG_KEY_REQ.
    pub fn key_request(&self, request: &KeyRequest) -> Result<Vec<u8>, MessageError> {
        let mut payload = Vec::with_capacity(KEY_REQUEST_LEN_V2);
        let select = u32::from(request.from_vmrk) | (request.key as u32) << 1;
        payload.extend(select.to_le_bytes());
        payload.extend([0; 4]);
        payload.extend(request.fields.to_le_bytes());
        payload.extend(request.vmpl.to_le_bytes());
        payload.extend(request.guest_svn.to_le_bytes());
        payload.extend(request.tcb);
        let version = match request.launch_mitigations {
            None => 1,
            Some(vector) => {
                payload.extend(vector.to_le_bytes());
                2
            }
        };
        self.request(MessageType::KeyRequest, version, &payload)
    }

    /// The key in the reply to the last request.
    pub fn key(&mut self, reply: &[u8]) -> Result<Zeroizing<[u8; 32]>, MessageError> {
        let payload = self.reply(MessageType::KeyResponse, reply)?;
        status(&payload)?;
        let key = bytes::array(&payload, RESPONSE_HEAD_LEN).ok_or(MessageError::NotTheReply)?;
        Ok(Zeroizing::new(key))
    }

    /// Any request, sealed with the next sequence number. Until its reply is taken, another
    /// request has the same number: send one at a time, and after a lost reply use no more.
    pub fn request(
        &self,
        msg_type: MessageType,
        version: u8,
        payload: &[u8],
    ) -> Result<Vec<u8>, MessageError> {
        let seqno = self.count.checked_add(1).ok_or(MessageError::Overflow)?;
        let header = Header {
            seqno,
            msg_type: msg_type as u8,
            version,
            size: payload.len(),
            vmpck: self.vmpck,
        };
        self.key
            .seal(&header, payload)
            .map_err(|_| MessageError::Overflow)
    }

    /// Any reply to the last request.
    pub fn reply(
        &mut self,
        msg_type: MessageType,
        reply: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, MessageError> {
        let expected = self.count.checked_add(2).ok_or(MessageError::Overflow)?;
        let header = Header::parse(reply).map_err(|_| MessageError::NotTheReply)?;
        let fits = header.seqno == expected
            && header.msg_type == msg_type as u8
            && header.vmpck == self.vmpck;
        if !fits {
            return Err(MessageError::NotTheReply);
        }
        let payload = self
            .key
            .open(&header, reply)
            .map_err(|_| MessageError::NotTheReply)?;
        self.count = expected;
        Ok(payload)
    }

    /// Goes on after `count` messages back and forth: what a guest has kept of an earlier channel
    /// under the same key, as Linux does in the secrets page (`struct secrets_os_area`). A count
    /// that is too low makes two requests with one nonce: never, unless they are the same bytes.
    pub fn start_at(&mut self, count: u64) {
        self.count = count;
    }

    /// The sequence number of a request that was sealed under this channel's key; `None` for
    /// any other bytes.
    pub fn sequence_number(&self, request: &[u8]) -> Option<u64> {
        let header = Header::parse(request).ok()?;
        let ours = header.vmpck == self.vmpck && self.key.open(&header, request).is_ok();
        ours.then_some(header.seqno)
    }
}

/// A header, read; what it says is not authenticated yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) seqno: u64,
    pub(super) msg_type: u8,
    pub(super) version: u8,
    pub(super) size: usize,
    pub(super) vmpck: u8,
}

impl Header {
    /// Reads a message's header, and checks that its payload is there.
    pub(super) fn parse(message: &[u8]) -> Result<Self, FirmwareError> {
        let raw: [u8; MESSAGE_HEADER_LEN] =
            bytes::array(message, 0).ok_or(FirmwareError::InvalidLength {
                needed: MESSAGE_HEADER_LEN as u32,
            })?;
        let [algorithm, header_version, msg_type, version, vmpck] =
            [0x30, 0x31, 0x34, 0x35, 0x3c].map(|at| raw.get(at).copied().unwrap_or_default());
        let number = |at| {
            bytes::array(&raw, at)
                .map(u16::from_le_bytes)
                .map(usize::from)
        };
        let (Some(header_len), Some(size)) = (number(0x32), number(0x36)) else {
            return Err(FirmwareError::InvalidParam);
        };
        let reserved = [0x10..0x20, 0x28..0x30, 0x38..0x3c, 0x3d..0x60];
        let clean = reserved.into_iter().all(|range| {
            let part = raw.get(range).unwrap_or_default();
            part.iter().all(|byte| *byte == 0)
        });
        let known = algorithm == AES_256_GCM_ALGORITHM
            && header_version == 1
            && header_len == MESSAGE_HEADER_LEN
            && vmpck < 4
            && clean;
        let needed = MESSAGE_HEADER_LEN.saturating_add(size);
        if !known || needed > MESSAGE_MAX {
            return Err(FirmwareError::InvalidParam);
        }
        if message.len() < needed {
            let needed = u32::try_from(needed).unwrap_or(u32::MAX);
            return Err(FirmwareError::InvalidLength { needed });
        }
        Ok(Self {
            seqno: bytes::array(&raw, 0x20).map_or(0, u64::from_le_bytes),
            msg_type,
            version,
            size,
            vmpck,
        })
    }

    /// The header without its tag.
    fn encode(&self) -> Result<[u8; MESSAGE_HEADER_LEN], FirmwareError> {
        let size = u16::try_from(self.size).map_err(|_| FirmwareError::InvalidParam)?;
        let mut raw = [0; MESSAGE_HEADER_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in raw.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        put(0x20, &self.seqno.to_le_bytes());
        put(0x30, &[AES_256_GCM_ALGORITHM, 1]);
        put(0x32, &(MESSAGE_HEADER_LEN as u16).to_le_bytes());
        put(0x34, &[self.msg_type, self.version]);
        put(0x36, &size.to_le_bytes());
        put(0x3c, &[self.vmpck]);
        Ok(raw)
    }

    /// The sequence number, zeros behind.
    fn nonce(&self) -> Nonce {
        let mut nonce = [0; 12];
        for (to, from) in nonce.iter_mut().zip(self.seqno.to_le_bytes()) {
            *to = from;
        }
        Nonce::assume_unique_for_key(nonce)
    }
}

/// One VMPCK.
pub(super) struct MessageKey(LessSafeKey);

impl MessageKey {
    pub(super) fn new(key: &[u8; 32]) -> Result<Self, FirmwareError> {
        let key = UnboundKey::new(&AES_256_GCM, key).map_err(|_| FirmwareError::InvalidKey)?;
        Ok(Self(LessSafeKey::new(key)))
    }

    /// The whole message. No two with the same sequence number, unless they are the same.
    pub(super) fn seal(&self, header: &Header, payload: &[u8]) -> Result<Vec<u8>, FirmwareError> {
        let mut message = header.encode()?.to_vec();
        let mut text = payload.to_vec();
        let aad = Aad::from(message.get(AAD_AT..).unwrap_or_default());
        let tag = self
            .0
            .seal_in_place_separate_tag(header.nonce(), aad, &mut text)
            .map_err(|_| FirmwareError::InvalidParam)?;
        for (to, from) in message.iter_mut().zip(tag.as_ref()) {
            *to = *from;
        }
        message.extend(text);
        Ok(message)
    }

    /// The payload of the message that `header` was read from.
    pub(super) fn open(
        &self,
        header: &Header,
        message: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, FirmwareError> {
        let end = MESSAGE_HEADER_LEN.saturating_add(header.size);
        let parts = (
            message.get(..TAG_LEN),
            message.get(AAD_AT..MESSAGE_HEADER_LEN),
            message.get(MESSAGE_HEADER_LEN..end),
        );
        let (Some(tag), Some(aad), Some(text)) = parts else {
            return Err(FirmwareError::InvalidParam);
        };
        let mut sealed = [text, tag].concat();
        let opened = self
            .0
            .open_in_place(header.nonce(), Aad::from(aad), &mut sealed)
            .map(|text| Zeroizing::new(text.to_vec()))
            .map_err(|_| FirmwareError::BadMeasurement);
        sealed.zeroize();
        opened
    }
}

fn status(payload: &[u8]) -> Result<(), MessageError> {
    match bytes::le32(payload, 0) {
        Some(0) => Ok(()),
        Some(status) => Err(MessageError::Status(status)),
        None => Err(MessageError::NotTheReply),
    }
}

pub(super) const REPORT_REQUEST_LEN: usize = 96;
pub(super) const KEY_REQUEST_LEN: usize = 32;
pub(super) const KEY_REQUEST_LEN_V2: usize = 40;
/// Status, and for a report its length, and room.
pub(super) const RESPONSE_HEAD_LEN: usize = 32;
const AES_256_GCM_ALGORITHM: u8 = 1;
const AAD_AT: usize = 0x30;
const TAG_LEN: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    /// Opened with nothing but the specification's offsets.
    #[test]
    fn a_message_lies_on_the_wire_as_the_table_says() {
        let mut page = [0; 4096];
        page[0x60..0x80].fill(7);
        let guest = GuestChannel::new(&page, 2).unwrap();
        let mut message = guest
            .report_request(&[0xda; 64], 3, KeySelect::Vlek)
            .unwrap();
        assert_eq!(message.len(), 0x60 + 96);
        assert_eq!(message[0x10..0x20], [0; 16]);
        assert_eq!(
            message[0x20..0x30],
            [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        let fields = [1, 1, 0x60, 0, 5, 1, 96, 0, 0, 0, 0, 0, 2, 0, 0, 0];
        assert_eq!(message[0x30..0x40], fields);
        assert_eq!(message[0x40..0x60], [0; 32]);

        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[7; 32]).unwrap());
        let iv = Nonce::assume_unique_for_key([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let (tag, aad) = (message[..16].to_vec(), message[0x30..0x60].to_vec());
        let mut sealed = message.split_off(0x60);
        sealed.extend(tag);
        let text = key.open_in_place(iv, Aad::from(aad), &mut sealed).unwrap();
        assert_eq!(text[..64], [0xda; 64]);
        assert_eq!(text[64..72], [3, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(text[72..], [0; 24]);
    }

    #[test]
    fn a_request_is_known_again_by_its_key_alone() {
        let [mut guest, other] = [7, 8].map(|key| GuestChannel::new(&[key; 4096], 0).unwrap());
        guest.start_at(6);
        let request = guest.report_request(&[1; 64], 0, KeySelect::Any).unwrap();
        assert_eq!(guest.sequence_number(&request), Some(7));
        assert_eq!(other.sequence_number(&request), None);
        let second = GuestChannel::new(&[7; 4096], 1).unwrap();
        assert_eq!(second.sequence_number(&request), None);
        for at in [0, 0x20, 0x36, 0x60, request.len() - 1] {
            let mut changed = request.clone();
            changed[at] ^= 1;
            assert_eq!(guest.sequence_number(&changed), None, "{at:#x}");
        }
        assert_eq!(guest.sequence_number(&request[..191]), None);
    }

    #[test]
    fn arbitrary_messages_never_panic() {
        use proptest::prelude::*;
        let strategy = proptest::collection::vec(any::<u8>(), 0..200);
        proptest!(ProptestConfig::with_cases(256), |(raw in strategy)| {
            let _ = Header::parse(&raw);
            let mut guest = GuestChannel::new(&[0; 4096], 0).unwrap();
            prop_assert!(guest.report(&raw).is_err());
        });
    }
}
