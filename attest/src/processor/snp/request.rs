//! What firmware answers to a guest's messages: reports and derived keys. Publication 56860,
//! SNP_GUEST_REQUEST, MSG_REPORT_REQ and MSG_KEY_REQ.
//!
//! A message that does not open under its VMPCK, or has not the next sequence number, is refused
//! as a command, and the count stays. One that opens is answered, if only with a status.

use super::super::FirmwareError;
use super::guest::{GuestSecrets, SnpCommand, SnpGuest, SnpGuestHandle};
use super::key;
use super::message::{
    Header, KEY_REQUEST_LEN, KEY_REQUEST_LEN_V2, KeySelect, MessageType, REPORT_REQUEST_LEN,
    RESPONSE_HEAD_LEN,
};
use super::platform::SnpProcessor;
use super::report::ReportFields;
use crate::bytes;
use crate::report::{REPORT_LEN, SigningKey};
use crate::tcb::RawTcb;
use zeroize::Zeroizing;

impl SnpProcessor {
    /// GUEST_REQUEST: opens the guest's message, and seals the answer.
    pub fn guest_request(
        &mut self,
        handle: SnpGuestHandle,
        message: &[u8],
    ) -> Result<Vec<u8>, FirmwareError> {
        let guest = self.guest(handle)?;
        guest.require(SnpCommand::GuestRequest)?;
        let header = Header::parse(message)?;
        let secrets = secrets(guest)?;
        let count = secrets.counts.get(usize::from(header.vmpck)).copied();
        let count = count.ok_or(FirmwareError::InvalidParam)?;
        let answered = count.checked_add(2).ok_or(FirmwareError::AeadOverflow)?;
        if header.seqno != count.saturating_add(1) {
            return Err(FirmwareError::InvalidParam);
        }
        let key = secrets.message_key(header.vmpck)?;
        let payload = key.open(&header, message)?;

        let (msg_type, answer) = match header.msg_type {
            REPORT_REQUEST => {
                let answer = self.answer_report(handle, &header, &payload)?;
                (MessageType::ReportResponse, Zeroizing::new(answer))
            }
            KEY_REQUEST => {
                let answer = self.answer_key(handle, &header, &payload)?;
                (MessageType::KeyResponse, answer)
            }
            // CPUID, and what only migration agents ask.
            1..=14 => return Err(FirmwareError::Unsupported),
            _ => return Err(FirmwareError::InvalidParam),
        };
        let reply = Header {
            seqno: answered,
            msg_type: msg_type as u8,
            version: 1,
            size: answer.len(),
            vmpck: header.vmpck,
        };
        let sealed = key.seal(&reply, &answer)?;
        let counts = &mut secrets_mut(self.guest(handle)?)?.counts;
        if let Some(count) = counts.get_mut(usize::from(header.vmpck)) {
            *count = answered;
        }
        Ok(sealed)
    }

    /// The payload of a MSG_REPORT_RSP.
    fn answer_report(
        &mut self,
        handle: SnpGuestHandle,
        header: &Header,
        payload: &[u8],
    ) -> Result<Vec<u8>, FirmwareError> {
        let report = match ReportRequest::parse(header, payload) {
            Ok(request) => self.report(handle, &request)?,
            Err(status) => Err(status),
        };
        let mut answer = vec![0; RESPONSE_HEAD_LEN];
        let (status, len) = match report {
            Ok(report) => {
                answer.extend(report);
                (0, REPORT_LEN as u32)
            }
            Err(status) => {
                answer.extend([0; REPORT_LEN]);
                (status as u32, 0)
            }
        };
        let head = status.to_le_bytes().into_iter().chain(len.to_le_bytes());
        for (to, from) in answer.iter_mut().zip(head) {
            *to = from;
        }
        Ok(answer)
    }

    fn report(
        &mut self,
        handle: SnpGuestHandle,
        request: &ReportRequest,
    ) -> Result<Result<[u8; REPORT_LEN], Status>, FirmwareError> {
        let vcek_disabled = self.guest(handle)?.vcek_disabled;
        let kind = match self.select(request.key, vcek_disabled) {
            Ok(kind) => kind,
            Err(status) => return Ok(Err(status)),
        };
        // A masked chip key signs nothing: the report says so, and its signature is zero.
        let signs = !(kind == SigningKey::Vcek && self.mask_chip_key);
        let mut fields = self.fields(handle)?;
        fields.signing_key = kind;
        fields.unsigned = !signs;
        fields.report_data = request.report_data;
        fields.vmpl = request.vmpl;
        if !signs {
            return Ok(Ok(fields.to_unsigned_bytes()));
        }
        self.endorsement(kind)?
            .sign_report(&fields)
            .map(Ok)
            .map_err(|_| FirmwareError::HardwarePlatform)
    }

    /// Everything that does not depend on the request.
    fn fields(&mut self, handle: SnpGuestHandle) -> Result<ReportFields, FirmwareError> {
        let personality = self.personality.clone();
        let [current, committed, reported] =
            [self.current.tcb, self.committed.tcb, self.reported].map(|tcb| personality.raw(tcb));
        let (current_firmware, committed_firmware) = (self.current.version, self.committed.version);
        let chip_id = match self.mask_chip_id {
            true => [0; 64],
            false => self.chip_id,
        };
        let masks_chip_key = self.mask_chip_key;
        let guest = self.guest(handle)?;
        let identity = guest.identity;
        Ok(ReportFields {
            version: personality.report_version,
            guest_svn: identity.guest_svn,
            policy: guest.start.policy,
            family_id: identity.family_id,
            image_id: identity.image_id,
            vmpl: 0,
            current_tcb: current,
            platform_info: personality.platform_info,
            has_author_key: identity.has_author_key,
            masks_chip_key,
            signing_key: SigningKey::Vcek,
            unsigned: false,
            report_data: [0; 64],
            measurement: *guest.digester.clone().finish().as_bytes(),
            host_data: guest.host_data,
            id_key_digest: identity.id_key_digest,
            author_key_digest: identity.author_key_digest,
            report_id: secrets(guest)?.report_id,
            report_id_ma: [0xff; 32],
            reported_tcb: reported,
            cpuid: personality.cpuid,
            chip_id,
            committed_tcb: committed,
            current_firmware,
            committed_firmware,
            launch_tcb: guest.launch_tcb,
            launch_mitigations: guest.launch_mitigations,
            current_mitigations: personality.mitigations,
        })
    }

    /// The payload of a MSG_KEY_RSP.
    fn answer_key(
        &mut self,
        handle: SnpGuestHandle,
        header: &Header,
        payload: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, FirmwareError> {
        let key = match DerivedKeyRequest::parse(header, payload) {
            Ok(request) => self.derived_key(handle, &request)?,
            Err(status) => Err(status),
        };
        let mut answer = Zeroizing::new(vec![0; RESPONSE_HEAD_LEN + DERIVED_KEY_LEN]);
        let (status, key) = match key {
            Ok(key) => (0, key),
            Err(status) => (status as u32, Zeroizing::new([0; DERIVED_KEY_LEN])),
        };
        for (to, from) in answer.iter_mut().zip(status.to_le_bytes()) {
            *to = from;
        }
        for (to, from) in answer.iter_mut().skip(RESPONSE_HEAD_LEN).zip(&*key) {
            *to = *from;
        }
        Ok(answer)
    }

    fn derived_key(
        &mut self,
        handle: SnpGuestHandle,
        request: &DerivedKeyRequest,
    ) -> Result<Result<Zeroizing<[u8; DERIVED_KEY_LEN]>, Status>, FirmwareError> {
        let failed = |_| FirmwareError::HardwarePlatform;
        let Ok(tcb) = self.tcb_of(request.tcb) else {
            return Ok(Err(Status::InvalidParameters));
        };
        let vcek_disabled = self.guest(handle)?.vcek_disabled;
        let root: Zeroizing<Vec<u8>> = if request.from_vmrk {
            Zeroizing::new(secrets(self.guest(handle)?)?.vmrk.to_vec())
        } else {
            let csp_id = match self.select(request.key, vcek_disabled) {
                Ok(SigningKey::Vcek) => None,
                Ok(SigningKey::Vlek) => self.csp_id.as_deref(),
                Err(status) => return Ok(Err(status)),
            };
            let product = self.personality.product;
            let root = self.identity.derived_key_root(product, csp_id);
            Zeroizing::new(root.map_err(failed)?.to_vec())
        };
        let too_new = !self.committed.tcb.shortfalls(&tcb).is_empty();
        let guest = self.guest(handle)?;
        if too_new
            || request.guest_svn > guest.identity.guest_svn
            || request.launch_mitigations & !guest.launch_mitigations != 0
        {
            return Ok(Err(Status::InvalidParameters));
        }
        let mixed = request.mix(guest);
        let mut derived = Zeroizing::new([0; DERIVED_KEY_LEN]);
        key::derive(&root, &[b"derived key", &mixed], &mut *derived).map_err(failed)?;
        Ok(Ok(derived))
    }

    /// Which key a request means, if it can be had.
    fn select(&self, key: KeySelect, vcek_disabled: bool) -> Result<SigningKey, Status> {
        let kind = match (key, &self.csp_id) {
            (KeySelect::Any | KeySelect::Vlek, Some(_)) => SigningKey::Vlek,
            (KeySelect::Vlek, None) => return Err(Status::InvalidKey),
            (KeySelect::Any | KeySelect::Vcek, _) => SigningKey::Vcek,
        };
        match kind {
            SigningKey::Vcek if vcek_disabled => Err(Status::InvalidKey),
            kind => Ok(kind),
        }
    }
}

/// What stands in a reply where no report or key does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    InvalidParameters = 0x16,
    InvalidKey = 0x27,
}

struct ReportRequest {
    report_data: [u8; 64],
    vmpl: u32,
    key: KeySelect,
}

impl ReportRequest {
    fn parse(header: &Header, payload: &[u8]) -> Result<Self, Status> {
        let reserved = payload.iter().skip(72).any(|byte| *byte != 0);
        let select = bytes::le32(payload, 68).ok_or(Status::InvalidParameters)?;
        if header.version != 1 || payload.len() != REPORT_REQUEST_LEN || reserved {
            return Err(Status::InvalidParameters);
        }
        Ok(Self {
            report_data: bytes::array(payload, 0).ok_or(Status::InvalidParameters)?,
            vmpl: vmpl(header, payload, 64)?,
            key: key_select(select)?,
        })
    }
}

struct DerivedKeyRequest {
    from_vmrk: bool,
    key: KeySelect,
    fields: u64,
    vmpl: u32,
    guest_svn: u32,
    tcb: RawTcb,
    launch_mitigations: u64,
}

impl DerivedKeyRequest {
    fn parse(header: &Header, payload: &[u8]) -> Result<Self, Status> {
        let (len, known) = match header.version {
            1 => (KEY_REQUEST_LEN, FIELDS_V1),
            2 => (KEY_REQUEST_LEN_V2, FIELDS_V2),
            _ => return Err(Status::InvalidParameters),
        };
        let number = |at| bytes::le32(payload, at).ok_or(Status::InvalidParameters);
        let (select, reserved) = (number(0)?, number(4)?);
        let fields = bytes::array(payload, 8).map_or(0, u64::from_le_bytes);
        if payload.len() != len || reserved != 0 || fields & !known != 0 {
            return Err(Status::InvalidParameters);
        }
        Ok(Self {
            from_vmrk: select & 1 != 0,
            key: key_select(select >> 1)?,
            fields,
            vmpl: vmpl(header, payload, 16)?,
            guest_svn: number(20)?,
            tcb: RawTcb(bytes::array(payload, 24).ok_or(Status::InvalidParameters)?),
            launch_mitigations: bytes::array(payload, 32).map_or(0, u64::from_le_bytes),
        })
    }

    /// The selected fields in a fixed layout; those that are not selected are zero.
    fn mix(&self, guest: &SnpGuest) -> Vec<u8> {
        let identity = &guest.identity;
        let digest = guest.digester.clone().finish();
        let fields: [&[u8]; 7] = [
            &guest.start.policy.0.to_le_bytes(),
            &identity.image_id,
            &identity.family_id,
            digest.as_bytes(),
            &self.guest_svn.to_le_bytes(),
            &self.tcb.0,
            &self.launch_mitigations.to_le_bytes(),
        ];
        let mut mixed = Vec::with_capacity(256);
        mixed.extend(self.fields.to_le_bytes());
        mixed.extend(self.vmpl.to_le_bytes());
        for (bit, field) in fields.into_iter().enumerate() {
            match self.fields >> bit & 1 {
                0 => mixed.resize(mixed.len().saturating_add(field.len()), 0),
                _ => mixed.extend(field),
            }
        }
        mixed
    }
}

/// A message under VMPCK n speaks for VMPL n and those below it, which have higher numbers.
fn vmpl(header: &Header, payload: &[u8], at: usize) -> Result<u32, Status> {
    bytes::le32(payload, at)
        .filter(|vmpl| (u32::from(header.vmpck)..4).contains(vmpl))
        .ok_or(Status::InvalidParameters)
}

fn key_select(raw: u32) -> Result<KeySelect, Status> {
    match raw {
        0 => Ok(KeySelect::Any),
        1 => Ok(KeySelect::Vcek),
        2 => Ok(KeySelect::Vlek),
        _ => Err(Status::InvalidParameters),
    }
}

fn secrets(guest: &SnpGuest) -> Result<&GuestSecrets, FirmwareError> {
    guest
        .secrets
        .as_ref()
        .ok_or(FirmwareError::InvalidGuestState)
}

fn secrets_mut(guest: &mut SnpGuest) -> Result<&mut GuestSecrets, FirmwareError> {
    guest
        .secrets
        .as_mut()
        .ok_or(FirmwareError::InvalidGuestState)
}

const KEY_REQUEST: u8 = MessageType::KeyRequest as u8;
const REPORT_REQUEST: u8 = MessageType::ReportRequest as u8;
const DERIVED_KEY_LEN: usize = 32;
const FIELDS_V1: u64 = 0x3f;
const FIELDS_V2: u64 = 0x7f;

#[cfg(test)]
mod tests {
    use super::super::forge::Authority;
    use super::super::message::GuestChannel;
    use super::super::{LaunchPage, Personality, SnpLaunchFinish, SnpLaunchStart};
    use super::*;
    use crate::measure::snp::PageType;
    use crate::report::SnpPolicy;

    #[test]
    fn a_counter_that_is_used_up_ends_the_channel() {
        let identity = Authority::shared().identity_again();
        let mut processor = SnpProcessor::new(identity, Personality::milan()).unwrap();
        processor.init().unwrap();
        let handle = processor.gctx_create().unwrap();
        let start = SnpLaunchStart {
            policy: SnpPolicy(0x3_0000),
            desired_tsc_khz: 0,
            gosvw: [0; 16],
        };
        processor.launch_start(handle, start).unwrap();
        processor.activate(handle, 1).unwrap();
        let mut page = [0; 4096];
        let guest = processor.guest(handle).unwrap();
        let secrets = LaunchPage::new(PageType::Secrets, 0x1000);
        guest.launch_update(secrets, &mut page).unwrap();
        let finish = SnpLaunchFinish {
            id: None,
            host_data: [0; 32],
            vcek_disabled: false,
        };
        processor.launch_finish(handle, &finish).unwrap();

        let mut channel = GuestChannel::new(&page, 0).unwrap();
        let mut at = |count: u64| {
            let guest = processor.guest(handle).unwrap();
            secrets_mut(guest).unwrap().counts[0] = count;
            channel.start_at(count);
            let request = channel.report_request(&[0; 64], 0, KeySelect::Any).unwrap();
            let reply = processor.guest_request(handle, &request)?;
            channel.report(&reply).unwrap();
            Ok(())
        };
        assert_eq!(at(u64::MAX - 2), Ok(()));
        assert_eq!(at(u64::MAX - 1), Err(FirmwareError::AeadOverflow));
        channel.start_at(u64::MAX);
        assert!(channel.report_request(&[0; 64], 0, KeySelect::Any).is_err());
    }
}
