//! A connected VMM's SEV-SNP guest: its launch, page by page, and the messages it then sends itself.
//!
//! Messages come past a VMM that cannot read them; what opens under the guest's key is the guest's.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;

use casemate_attest::evidence::table;
use casemate_attest::evidence::{CertificateKind, TableCertificate};
use casemate_attest::measure::snp::{PageType, VMSA_GPA};
use casemate_attest::processor::FirmwareError;
use casemate_attest::processor::snp::request_frame::{
    REQUEST_FRAME_LEN, ReplyFrame, RequestFrame, RequestKind, RequestStatus,
};
use casemate_attest::processor::snp::{
    IdBlockParameters, LaunchPage, PageBytes, SnpGuestHandle, SnpLaunchFinish, SnpLaunchStart,
    SnpProcessor,
};
use casemate_attest::report::{SigningKey, SnpPolicy};
use casemate_crypto_migrate::guest::PAGE_SIZE;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, UnixAddr, recvmsg, sendmsg};

use crate::confidential::launch::SpecialPage;
use crate::confidential::processor_guest::{GuestClient, Handle, bad_request};
use crate::confidential::processor_role::{Platforms, firmware_error};
use crate::confidential::protocol::{GuestOutcome, GuestReply, GuestRequest, LAUNCH_CHUNK};
use crate::vmm::protocol::{RoleError, SnpBinding};

impl GuestClient {
    /// Carries out a request that is one to the SNP half; `None` if it is for the other.
    pub(super) fn serve_snp(
        &mut self,
        platforms: &mut Platforms,
        request: &GuestRequest,
    ) -> Option<GuestOutcome> {
        if let GuestRequest::SnpStart { policy } = request {
            return Some(self.snp_start(platforms, *policy));
        }
        let handle = self.snp_handle()?;
        let platform = match platforms.snp() {
            Ok(platform) => platform,
            Err(error) => return Some(Err(error)),
        };
        Some(match request {
            GuestRequest::LaunchUpdate { gpa, length } => {
                self.snp_update(platform, handle, *gpa, *length)
            }
            GuestRequest::SnpPage { gpa, page } => self.snp_special(platform, handle, *gpa, *page),
            GuestRequest::LaunchVmsa { page } => snp_vmsa(platform, handle, page),
            GuestRequest::SnpFinish { binding } => snp_finish(platform, handle, binding),
            _ => return None,
        })
    }

    fn snp_start(&mut self, platforms: &mut Platforms, policy: u64) -> GuestOutcome {
        self.vacant()?;
        let asid = self.asid();
        let platform = platforms.snp()?;
        let handle = platform.gctx_create().map_err(firmware_error)?;
        self.name(Handle::Snp(handle));
        let start = SnpLaunchStart {
            policy: SnpPolicy(policy),
            desired_tsc_khz: 0,
            gosvw: [0; 16],
        };
        platform
            .launch_start(handle, start)
            .map_err(firmware_error)?;
        platform.activate(handle, asid).map_err(firmware_error)?;
        Ok(GuestReply::Done)
    }

    fn snp_update(
        &self,
        platform: &mut SnpProcessor,
        handle: SnpGuestHandle,
        gpa: u64,
        length: u64,
    ) -> GuestOutcome {
        let whole = PAGE_SIZE as u64;
        if length > LAUNCH_CHUNK || !length.is_multiple_of(whole) {
            return Err(bad_request(
                "a run to measure is whole pages, and not too many",
            ));
        }
        let memory = &self.memory()?.guest;
        let guest = platform.guest(handle).map_err(firmware_error)?;
        let mut contents: PageBytes = [0; PAGE_SIZE];
        for at in (0..length)
            .step_by(PAGE_SIZE)
            .map(|offset| gpa.saturating_add(offset))
        {
            memory.read(at, &mut contents)?;
            guest
                .launch_update(LaunchPage::new(PageType::Normal, at), &mut contents)
                .map_err(firmware_error)?;
        }
        Ok(GuestReply::Done)
    }

    /// The firmware fills the secrets page. A CPUID page that it corrects is given to it once more: what it then
    /// takes is what the guest reads.
    fn snp_special(
        &self,
        platform: &mut SnpProcessor,
        handle: SnpGuestHandle,
        gpa: u64,
        page: SpecialPage,
    ) -> GuestOutcome {
        let memory = &self.memory()?.guest;
        let mut contents: PageBytes = [0; PAGE_SIZE];
        memory.read(gpa, &mut contents)?;
        let guest = platform.guest(handle).map_err(firmware_error)?;
        let kind = match page {
            SpecialPage::Zero => PageType::Zero,
            SpecialPage::Secrets => PageType::Secrets,
            SpecialPage::Cpuid => PageType::Cpuid,
        };
        let launch = LaunchPage::new(kind, gpa);
        let given = contents;
        let mut taken = guest.launch_update(launch, &mut contents);
        if taken.is_err() && contents != given {
            taken = guest.launch_update(launch, &mut contents);
        }
        taken.map_err(firmware_error)?;
        memory.write(gpa, &contents)?;
        Ok(GuestReply::Done)
    }
}

impl GuestClient {
    /// Answers one message of the guest, with the certificates of the key that signs its reports where it asks for
    /// them. An error ends the way of messages: the VMM's end closed, or does not read.
    pub(super) fn serve_message(&mut self, platforms: &mut Platforms) -> Result<(), Errno> {
        let Some(socket) = &self.messages else {
            return Ok(());
        };
        let mut frame = [0u8; REQUEST_FRAME_LEN + 1];
        // Descriptors that a VMM might send along have no room, so the kernel drops them.
        let received = recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut [IoSliceMut::new(&mut frame)],
            None,
            MsgFlags::MSG_DONTWAIT,
        )?
        .bytes;
        if received == 0 {
            return Err(Errno::EPIPE);
        }
        let request = frame.get(..received).unwrap_or_default();
        let reply = match (self.snp_handle(), platforms.snp()) {
            (Some(handle), Ok(platform)) => answer(platform, handle, request),
            _ => ReplyFrame::refused(RequestStatus::firmware(FirmwareError::InvalidGuest.code())),
        };
        let sent = sendmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &[IoSlice::new(&reply.to_bytes())],
            &[],
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            None,
        );
        sent.map(drop)
    }
}

fn answer(platform: &mut SnpProcessor, handle: SnpGuestHandle, request: &[u8]) -> ReplyFrame {
    let Ok(request) = RequestFrame::parse(request) else {
        return ReplyFrame::refused(RequestStatus::vmm(GENERIC_VMM_ERROR));
    };
    let refused = |error: FirmwareError| ReplyFrame::refused(RequestStatus::firmware(error.code()));
    let message = match platform.guest_request(handle, request.page()) {
        Ok(message) => message,
        Err(error) => return refused(error),
    };
    let certificates = match request.kind() {
        RequestKind::Plain => Vec::new(),
        RequestKind::Extended => certificates(platform),
    };
    ReplyFrame::answered(&message, certificates)
        .unwrap_or_else(|_| ReplyFrame::refused(RequestStatus::vmm(GENERIC_VMM_ERROR)))
}

/// The certificate table that a host keeps for its guests: the leaf that signs reports now, and what is above it.
fn certificates(platform: &mut SnpProcessor) -> Vec<u8> {
    let signing = match platform.status().vlek_loaded {
        true => SigningKey::Vlek,
        false => SigningKey::Vcek,
    };
    let (leaf_kind, issuer) = match signing {
        SigningKey::Vcek => (
            CertificateKind::Vcek,
            &platform.identity().certificates().ask,
        ),
        SigningKey::Vlek => (
            CertificateKind::Vlek,
            &platform.identity().certificates().asvk,
        ),
    };
    let above = [
        (CertificateKind::Ask, issuer.clone()),
        (
            CertificateKind::Ark,
            platform.identity().certificates().ark.clone(),
        ),
    ];
    let leaf = platform.endorsement(signing).ok();
    let leaf = leaf.map(|key| (leaf_kind, key.certificate().to_vec()));
    let all: Vec<TableCertificate> = leaf
        .into_iter()
        .chain(above)
        .map(|(kind, bytes)| TableCertificate { kind, bytes })
        .collect();
    // A guest that gets no table looks for the certificates elsewhere.
    table::encode(&all).unwrap_or_default()
}

fn snp_vmsa(platform: &mut SnpProcessor, handle: SnpGuestHandle, page: &[u8]) -> GuestOutcome {
    let mut contents = PageBytes::try_from(page)
        .map_err(|_| bad_request("the registers of a vCPU are one page"))?;
    let guest = platform.guest(handle).map_err(firmware_error)?;
    guest
        .launch_update(LaunchPage::new(PageType::Vmsa, VMSA_GPA), &mut contents)
        .map_err(firmware_error)?;
    Ok(GuestReply::Done)
}

fn snp_finish(
    platform: &mut SnpProcessor,
    handle: SnpGuestHandle,
    binding: &SnpBinding,
) -> GuestOutcome {
    let id = binding.id.as_ref().map(|id| {
        Ok::<_, RoleError>(IdBlockParameters {
            block: id
                .block
                .as_slice()
                .try_into()
                .map_err(|_| bad_request("an ID block has 96 bytes"))?,
            auth: id
                .auth
                .as_slice()
                .try_into()
                .map_err(|_| bad_request("an ID authentication page has 4096 bytes"))?,
            author_key_en: id.author_key,
        })
    });
    let finish = SnpLaunchFinish {
        id: id.transpose()?,
        host_data: binding.host_data,
        vcek_disabled: binding.vcek_disabled,
    };
    let digest = platform
        .launch_finish(handle, &finish)
        .map_err(firmware_error)?;
    Ok(GuestReply::SnpLaunched {
        digest: digest.as_bytes().to_vec(),
    })
}

/// SNP_GUEST_VMM_ERR_GENERIC of publication 56421.
const GENERIC_VMM_ERROR: u32 = 0xffff_ffff;
