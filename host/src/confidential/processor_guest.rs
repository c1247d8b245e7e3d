//! One VMM's connection to the `psp` role: its guest's handle, its memory, the commands it may give.
//!
//! Not believed: every address, length, certificate and packet in a request; the memory itself, which the
//! guest may be writing. Pages and packets are copied before they are sealed or checked.

use std::os::fd::{AsFd, OwnedFd};

use casemate_attest::legacy::{
    GuestPolicy, LegacyChain, PacketHeader, SessionBlob, SevCertificate,
};
use casemate_attest::processor::snp::SnpGuestHandle;
use casemate_attest::processor::{Guest, GuestHandle, SecureProcessor};
use casemate_crypto_migrate::guest::PAGE_SIZE;

use crate::confidential::processor_role::{Platforms, firmware_error, platform_evidence};
use crate::confidential::protocol::{
    GuestOutcome, GuestReply, GuestRequest, LAUNCH_CHUNK, PlatformEvidence,
};
use crate::confidential::shared::{Access, Exchange, GuestMemory, MemoryLayout, MemoryRun};
use crate::ipc::Channel;
use crate::vmm::protocol::{EXCHANGE_PAGES, OwnerSession, RoleError};

/// A connected VMM.
pub(super) struct GuestClient {
    /// Its channel.
    pub(super) channel: Channel,
    /// Where a SEV-SNP guest's own messages come, past the VMM.
    pub(super) messages: Option<OwnedFd>,
    asid: u32,
    handle: Option<Handle>,
    memory: Option<Attached>,
}

/// The firmware's name for the guest.
#[derive(Clone, Copy)]
pub(super) enum Handle {
    Sev(GuestHandle),
    Snp(SnpGuestHandle),
}

pub(super) struct Attached {
    pub(super) guest: GuestMemory,
    exchange: Exchange,
}

impl GuestClient {
    pub(super) fn new(channel: Channel, messages: Option<OwnedFd>, asid: u32) -> Self {
        Self {
            channel,
            messages,
            asid,
            handle: None,
            memory: None,
        }
    }

    pub(super) fn asid(&self) -> u32 {
        self.asid
    }

    /// Carries out one request.
    pub(super) fn serve(
        &mut self,
        platforms: &mut Platforms,
        request: GuestRequest,
        handles: Vec<OwnedFd>,
    ) -> GuestOutcome {
        if let Some(outcome) = self.serve_snp(platforms, &request) {
            return outcome;
        }
        let platform = &mut platforms.sev;
        match request {
            GuestRequest::Attach { runs } => self.attach(runs, handles)?,
            GuestRequest::LaunchStart { policy, session } => {
                self.launch_start(platform, policy, session)?;
            }
            GuestRequest::LaunchUpdate { gpa, length } => {
                self.launch_update(platform, gpa, length)?;
            }
            GuestRequest::LaunchMeasure => return self.launch_measure(platform),
            GuestRequest::LaunchSecret {
                header,
                ciphertext,
                gpa,
            } => self.launch_secret(platform, &header, &ciphertext, gpa)?,
            GuestRequest::LaunchFinish => {
                let guest = self.guest(platform)?;
                guest.launch_finish().map_err(firmware_error)?;
            }
            GuestRequest::SendStart { target } => return self.send_start(platform, &target),
            GuestRequest::SendPages { gpas } => self.send_pages(platform, &gpas)?,
            GuestRequest::SendFinish => {
                let guest = self.guest(platform)?;
                guest.send_finish().map_err(firmware_error)?;
            }
            GuestRequest::SendCancel => {
                let guest = self.guest(platform)?;
                guest.send_cancel().map_err(firmware_error)?;
            }
            GuestRequest::Evidence => {
                return Ok(GuestReply::Evidence(platform_evidence(platform)?));
            }
            GuestRequest::ReceiveStart {
                policy,
                source_pdh,
                session,
            } => self.receive_start(platform, policy, &source_pdh, &session)?,
            GuestRequest::ReceivePages { gpas } => self.receive_pages(platform, &gpas)?,
            GuestRequest::ReceiveFinish => {
                let guest = self.guest(platform)?;
                guest.receive_finish().map_err(firmware_error)?;
            }
            GuestRequest::LaunchVmsa { page } => {
                let guest = self.guest(platform)?;
                guest.launch_update_vmsa(&page).map_err(firmware_error)?;
            }
            GuestRequest::Decommission => self.decommission(platforms),
            GuestRequest::SnpStart { .. }
            | GuestRequest::SnpPage { .. }
            | GuestRequest::SnpFinish { .. } => {
                return Err(bad_request("this guest is not one of SEV-SNP"));
            }
        }
        Ok(GuestReply::Done)
    }

    /// Forgets the guest and its keys.
    pub(super) fn decommission(&mut self, platforms: &mut Platforms) {
        // Every state that a handle can have allows it; DEACTIVATE is implied.
        match self.handle.take() {
            Some(Handle::Sev(handle)) => drop(platforms.sev.decommission(handle)),
            Some(Handle::Snp(handle)) => platforms.decommission_snp(handle),
            None => {}
        }
    }

    fn attach(&mut self, runs: Vec<MemoryRun>, handles: Vec<OwnedFd>) -> Result<(), RoleError> {
        if self.memory.is_some() {
            return Err(bad_request("memory is attached already"));
        }
        let [guest, exchange] = <[OwnedFd; 2]>::try_from(handles)
            .map_err(|_| bad_request("Attach comes with two descriptors"))?;
        let layout = MemoryLayout::new(runs)?;
        self.memory = Some(Attached {
            guest: GuestMemory::map(guest.as_fd(), layout, Access::ReadWrite)?,
            exchange: Exchange::map(exchange.as_fd())?,
        });
        Ok(())
    }

    fn launch_start(
        &mut self,
        platform: &mut SecureProcessor,
        policy: u32,
        session: Option<OwnerSession>,
    ) -> Result<(), RoleError> {
        let policy = self.startable(policy)?;
        let owner = session
            .map(|session| parse_session(&session.certificate, &session.blob))
            .transpose()?;
        let handle = platform
            .launch_start(policy, owner.as_ref().map(|(dh, blob)| (dh, blob)))
            .map_err(firmware_error)?;
        self.adopt(platform, handle)
    }

    fn receive_start(
        &mut self,
        platform: &mut SecureProcessor,
        policy: u32,
        source_pdh: &[u8],
        session: &[u8],
    ) -> Result<(), RoleError> {
        let policy = self.startable(policy)?;
        let (source, session) = parse_session(source_pdh, session)?;
        let handle = platform
            .receive_start(policy, &source, &session)
            .map_err(firmware_error)?;
        self.adopt(platform, handle)
    }

    /// One guest a connection, with its memory attached before it exists.
    pub(super) fn vacant(&self) -> Result<(), RoleError> {
        self.memory()?;
        if self.handle.is_some() {
            return Err(bad_request("this connection has its guest already"));
        }
        Ok(())
    }

    fn startable(&self, policy: u32) -> Result<GuestPolicy, RoleError> {
        self.vacant()?;
        GuestPolicy::try_from(policy).map_err(|e| RoleError::new("POLICY_FAILURE", e))
    }

    fn adopt(
        &mut self,
        platform: &mut SecureProcessor,
        handle: GuestHandle,
    ) -> Result<(), RoleError> {
        self.handle = Some(Handle::Sev(handle));
        platform.activate(handle, self.asid).map_err(firmware_error)
    }

    fn launch_update(
        &mut self,
        platform: &mut SecureProcessor,
        gpa: u64,
        length: u64,
    ) -> Result<(), RoleError> {
        if length > LAUNCH_CHUNK {
            return Err(bad_request("a run to measure is too long"));
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        self.memory()?.guest.read(gpa, &mut bytes)?;
        let guest = self.guest(platform)?;
        guest.launch_update_data(&bytes).map_err(firmware_error)
    }

    fn launch_measure(&mut self, platform: &mut SecureProcessor) -> GuestOutcome {
        let status = platform.status();
        let guest = self.guest(platform)?;
        let policy = guest.status().map_err(firmware_error)?.policy;
        let blob = guest.launch_measure().map_err(firmware_error)?;
        Ok(GuestReply::Measured {
            blob: blob.to_bytes().to_vec(),
            api: (status.api.major, status.api.minor, status.build),
            policy: policy.into(),
        })
    }

    fn launch_secret(
        &mut self,
        platform: &mut SecureProcessor,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<(), RoleError> {
        if ciphertext.len() > PAGE_SIZE {
            return Err(bad_request("a secret is one page at most"));
        }
        let header = parse_header(header)?;
        // The place is checked before the packet is opened: a refused command changes nothing.
        let mut plain = zeroize::Zeroizing::new(vec![0; ciphertext.len()]);
        self.memory()?.guest.read(gpa, &mut plain)?;
        let guest = self.guest(platform)?;
        guest
            .launch_secret(&header, ciphertext, &mut plain)
            .map_err(firmware_error)?;
        Ok(self.memory()?.guest.write(gpa, &plain)?)
    }

    fn send_start(
        &mut self,
        platform: &mut SecureProcessor,
        target: &PlatformEvidence,
    ) -> GuestOutcome {
        let handle = self.handle()?;
        let target = LegacyChain::parse(&target.pdh, &target.platform, &target.amd)
            .map_err(|e| RoleError::new("INVALID_CERTIFICATE", e))?;
        let sent = platform
            .send_start(handle, &target)
            .map_err(firmware_error)?;
        let chain = platform.pdh_cert_export().map_err(firmware_error)?;
        Ok(GuestReply::SendStarted {
            policy: sent.policy.into(),
            source_pdh: chain.pdh.as_bytes().to_vec(),
            session: sent.session.to_bytes(),
        })
    }

    fn send_pages(
        &mut self,
        platform: &mut SecureProcessor,
        gpas: &[u64],
    ) -> Result<(), RoleError> {
        bounded(gpas)?;
        let handle = self.handle()?;
        let memory = self.memory()?;
        let guest = platform.guest(handle).map_err(firmware_error)?;
        let (mut page, mut sealed) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        for (slot, &gpa) in gpas.iter().enumerate() {
            memory.guest.read(whole_page(gpa)?, &mut page)?;
            let header = guest
                .send_update_data_into(&page, &mut sealed)
                .map_err(firmware_error)?;
            memory
                .exchange
                .put_packet(slot, &header.to_bytes(), &sealed)?;
        }
        Ok(())
    }

    fn receive_pages(
        &mut self,
        platform: &mut SecureProcessor,
        gpas: &[u64],
    ) -> Result<(), RoleError> {
        bounded(gpas)?;
        let handle = self.handle()?;
        let memory = self.memory()?;
        let guest = platform.guest(handle).map_err(firmware_error)?;
        let mut page = [0; PAGE_SIZE];
        for (slot, &gpa) in gpas.iter().enumerate() {
            let packet = memory.exchange.packet(slot)?;
            guest
                .receive_update_data(&parse_header(&packet.header)?, &packet.data, &mut page)
                .map_err(firmware_error)?;
            memory.guest.write(whole_page(gpa)?, &page)?;
        }
        Ok(())
    }

    fn guest<'a>(&self, platform: &'a mut SecureProcessor) -> Result<&'a mut Guest, RoleError> {
        platform.guest(self.handle()?).map_err(firmware_error)
    }

    fn handle(&self) -> Result<GuestHandle, RoleError> {
        match self.handle {
            Some(Handle::Sev(handle)) => Ok(handle),
            Some(Handle::Snp(_)) => Err(RoleError::new(
                "UNSUPPORTED",
                "this command is not one for a SEV-SNP guest",
            )),
            None => Err(RoleError::new(
                "INVALID_GUEST",
                "this connection has no guest",
            )),
        }
    }

    pub(super) fn snp_handle(&self) -> Option<SnpGuestHandle> {
        match self.handle {
            Some(Handle::Snp(handle)) => Some(handle),
            Some(Handle::Sev(_)) | None => None,
        }
    }

    pub(super) fn name(&mut self, handle: Handle) {
        self.handle = Some(handle);
    }

    pub(super) fn memory(&self) -> Result<&Attached, RoleError> {
        self.memory
            .as_ref()
            .ok_or_else(|| bad_request("no memory is attached"))
    }
}

fn parse_session(
    certificate: &[u8],
    blob: &[u8],
) -> Result<(SevCertificate, SessionBlob), RoleError> {
    let certificate =
        SevCertificate::parse(certificate).map_err(|e| RoleError::new("INVALID_CERTIFICATE", e))?;
    let blob = SessionBlob::parse(blob).map_err(|e| RoleError::new("BAD_MEASUREMENT", e))?;
    Ok((certificate, blob))
}

fn parse_header(header: &[u8]) -> Result<PacketHeader, RoleError> {
    PacketHeader::from_bytes(header).map_err(|e| RoleError::new("INVALID_LEN", e))
}

fn whole_page(gpa: u64) -> Result<u64, RoleError> {
    if gpa.is_multiple_of(PAGE_SIZE as u64) {
        Ok(gpa)
    } else {
        Err(bad_request("a page's address is not page aligned"))
    }
}

fn bounded(gpas: &[u64]) -> Result<(), RoleError> {
    if gpas.len() > EXCHANGE_PAGES {
        return Err(bad_request("more pages than an exchange holds"));
    }
    Ok(())
}

pub(super) fn bad_request(text: &str) -> RoleError {
    RoleError::new("BAD_REQUEST", text)
}
