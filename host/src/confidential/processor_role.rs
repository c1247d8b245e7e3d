//! The `psp` role: the software secure processor behind a poll loop, one thread, no path, no network.
//!
//! It stands for AMD's secure processor where there is none, and protects nothing from the host's root. Its
//! clients are VMMs, and a VMM may have been broken into: a client is known by its channel, reaches its own
//! guest and its own memory only, and is dropped, its guest decommissioned, when it breaks the protocol.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use casemate_attest::legacy::TrustAnchors;
use casemate_attest::processor::snp::{
    Personality, SnpGuestHandle, SnpIdentity, SnpIdentityError, SnpProcessor,
};
use casemate_attest::processor::{Identity, ProcessorConfig, SecureProcessor};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zeroize::Zeroizing;

use crate::confidential::platform_order;
use crate::confidential::processor_guest::GuestClient;
use crate::confidential::protocol::{
    ControlOutcome, ControlReply, GuestOutcome, GuestRequest, PlatformEvidence, PlatformStatus,
    ProcessorControl,
};
use crate::ipc::{Channel, IpcError, Received};
use crate::role::Cell;
use crate::sandbox::Role;
use crate::vmm::protocol::RoleError;

/// Main of the `psp` role: enters the jail, then [`run`].
pub fn main() -> Result<(), RoleError> {
    let (channel, cell) = crate::role::enter(Role::Psp)?;
    run(channel, cell)
}

/// Runs the role until the agent closes its channel. The cell closes before the first message is read.
pub fn run(channel: Channel, mut cell: Box<dyn Cell + Send>) -> Result<(), RoleError> {
    cell.close()?;
    let mut processor = Processor {
        control: channel,
        cell,
        platforms: None,
        clients: Vec::new(),
    };
    loop {
        let ready = processor.wait()?;
        if !processor.serve_clients(&ready) && ready.contains(&Source::Control) {
            match processor.serve_control() {
                Ok(()) => {}
                Err(IpcError::Closed) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

struct Processor {
    control: Channel,
    cell: Box<dyn Cell + Send>,
    platforms: Option<Platforms>,
    clients: Vec<GuestClient>,
}

/// The two halves of the processor.
pub(super) struct Platforms {
    /// SEV and SEV-ES.
    pub(super) sev: SecureProcessor,
    snp: Option<SnpProcessor>,
}

impl Platforms {
    /// SEV-SNP, if this installation has it.
    pub(super) fn snp(&mut self) -> Result<&mut SnpProcessor, RoleError> {
        self.snp.as_mut().ok_or_else(no_snp)
    }

    /// Forgets a SEV-SNP guest.
    pub(super) fn decommission_snp(&mut self, handle: SnpGuestHandle) {
        // Every state that a handle can have allows it.
        let _ = self.snp.as_mut().map(|snp| snp.decommission(handle));
    }
}

/// Who has something to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Control,
    /// Requests of the client with this index.
    Requests(usize),
    /// Messages of its guest.
    Messages(usize),
}

impl Processor {
    fn wait(&self) -> Result<Vec<Source>, RoleError> {
        let (sources, mut fds): (Vec<Source>, Vec<PollFd<'_>>) = self
            .descriptors()
            .map(|(source, fd)| (source, PollFd::new(fd, PollFlags::POLLIN)))
            .unzip();
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(RoleError::new("INTERNAL", format!("poll: {e}"))),
            }
        }
        let ready = sources.into_iter().zip(fds);
        Ok(ready
            .filter(|(_, fd)| fd.any().unwrap_or(true))
            .map(|(source, _)| source)
            .collect())
    }

    fn descriptors(&self) -> impl Iterator<Item = (Source, BorrowedFd<'_>)> {
        let clients = self.clients.iter().enumerate().flat_map(|(at, client)| {
            let messages = client.messages.as_ref();
            std::iter::once((Source::Requests(at), client.channel.as_fd()))
                .chain(messages.map(|socket| (Source::Messages(at), socket.as_fd())))
        });
        std::iter::once((Source::Control, self.control.as_fd())).chain(clients)
    }

    /// One message of each client that has one; whether a client had to go (indices have changed then).
    fn serve_clients(&mut self, ready: &[Source]) -> bool {
        let mut gone = Vec::new();
        let Some(platforms) = self.platforms.as_mut() else {
            return false;
        };
        for (index, client) in self.clients.iter_mut().enumerate() {
            if ready.contains(&Source::Messages(index)) && client.serve_message(platforms).is_err()
            {
                client.messages = None;
            }
            if ready.contains(&Source::Requests(index)) && serve_client(platforms, client).is_err()
            {
                gone.push(index);
            }
        }
        for &index in gone.iter().rev() {
            self.clients.swap_remove(index).decommission(platforms);
        }
        !gone.is_empty()
    }

    fn serve_control(&mut self) -> Result<(), IpcError> {
        let outcome: ControlOutcome = match self.control.recv(Some(Duration::ZERO)) {
            Ok(Received { body, handles }) => self.control(body, handles),
            Err(error @ (IpcError::Decode(_) | IpcError::TrailingBytes(_))) => Err(error.into()),
            Err(IpcError::Deadline(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        self.control.send(&outcome)
    }

    fn control(&mut self, request: ProcessorControl, handles: Vec<OwnedFd>) -> ControlOutcome {
        match request {
            ProcessorControl::Generate => {
                let identity = Identity::generate().map_err(identity_error)?;
                let bytes = identity.to_bytes().to_vec();
                Ok(ControlReply::Generated { identity: bytes })
            }
            ProcessorControl::GenerateSnp => {
                let identity = SnpIdentity::generate().map_err(snp_identity_error)?;
                let bytes = identity.to_bytes().map_err(snp_identity_error)?.to_vec();
                Ok(ControlReply::Generated { identity: bytes })
            }
            ProcessorControl::Initialise {
                identity,
                snp,
                peer_roots,
            } => {
                let snp = snp.map(|bytes| Zeroizing::new(bytes.into_vec()));
                self.initialise(Zeroizing::new(identity), snp, &peer_roots)
            }
            ProcessorControl::Connect => self.connect(handles),
            ProcessorControl::Status => {
                let status = self.platform()?.status();
                Ok(ControlReply::Status(PlatformStatus {
                    api: (status.api.major, status.api.minor, status.build),
                    state: status.state as u8,
                    owned: status.owned,
                    es: status.config_es,
                    guests: status.guest_count,
                    emulated: status.emulated,
                }))
            }
            ProcessorControl::Evidence => {
                Ok(ControlReply::Evidence(platform_evidence(self.platform()?)?))
            }
            ProcessorControl::SnpStatus => {
                let snp = self.platforms.as_mut().and_then(|both| both.snp.as_mut());
                platform_order::snp_status(snp)
            }
            ProcessorControl::SnpCertificates => {
                let snp = self.platforms.as_mut().and_then(|both| both.snp.as_mut());
                platform_order::snp_certificates(snp)
            }
            ProcessorControl::Order(order) => {
                let both = self.platforms.as_mut().ok_or_else(no_identity)?;
                platform_order::carry_out(&mut both.sev, both.snp.as_mut(), order)
            }
            ProcessorControl::Restore { identity } => {
                let both = self.platforms.as_mut().ok_or_else(no_identity)?;
                platform_order::restore(&mut both.sev, &Zeroizing::new(identity))
            }
            ProcessorControl::SandboxReport => Ok(ControlReply::Report(self.cell.report()?)),
            ProcessorControl::SandboxProbe => Ok(ControlReply::Probe(self.cell.probe()?)),
        }
    }

    fn initialise(
        &mut self,
        identity: Zeroizing<Vec<u8>>,
        snp: Option<Zeroizing<Vec<u8>>>,
        peer_roots: &[[u8; 32]],
    ) -> ControlOutcome {
        if self.platforms.is_some() {
            return Err(RoleError::new(
                "PLATFORM_STATE",
                "the platform is initialised already; start a new psp for another identity",
            ));
        }
        let mut peers = TrustAnchors::amd();
        for root in peer_roots {
            peers = peers
                .with_emulated_root(*root)
                .map_err(|e| RoleError::new("PLATFORM_PEERS", e))?;
        }
        let identity = Identity::from_bytes(&identity).map_err(identity_error)?;
        let config = ProcessorConfig {
            max_guests: MAX_CLIENTS,
            peers,
        };
        let mut sev = SecureProcessor::new(identity, config).with_sev_es();
        sev.init().map_err(firmware_error)?;
        let snp = snp.map(|identity| snp_platform(&identity)).transpose()?;
        self.platforms = Some(Platforms { sev, snp });
        Ok(ControlReply::Done)
    }

    fn connect(&mut self, handles: Vec<OwnedFd>) -> ControlOutcome {
        self.platform()?;
        let mut handles = handles.into_iter();
        let (Some(channel), messages, None) = (handles.next(), handles.next(), handles.next())
        else {
            return Err(RoleError::new(
                "BAD_REQUEST",
                "Connect comes with one descriptor or two",
            ));
        };
        let asid = (1..=MAX_CLIENTS)
            .find(|asid| self.clients.iter().all(|client| client.asid() != *asid))
            .ok_or_else(|| {
                RoleError::new(
                    "RESOURCE_LIMIT",
                    format!("{MAX_CLIENTS} guests at most; end one first"),
                )
            })?;
        self.clients
            .push(GuestClient::new(Channel::from_fd(channel), messages, asid));
        Ok(ControlReply::Done)
    }

    fn platform(&self) -> Result<&SecureProcessor, RoleError> {
        let platforms = self.platforms.as_ref().ok_or_else(no_identity)?;
        Ok(&platforms.sev)
    }
}

pub(super) fn no_snp() -> RoleError {
    RoleError::new(
        "SNP_NOT_ENABLED",
        "this host's emulated processor has no SEV-SNP identity; allow \"sev-snp\" in the policy's \
         technologies and start the agent again",
    )
}

fn no_identity() -> RoleError {
    RoleError::new(
        "PLATFORM_STATE",
        "the platform has no identity yet; the agent must initialise it",
    )
}

/// One request of a client; an error ends the client.
fn serve_client(platforms: &mut Platforms, client: &mut GuestClient) -> Result<(), IpcError> {
    let received = client.channel.recv::<GuestRequest>(Some(Duration::ZERO));
    let (outcome, broken): (GuestOutcome, _) = match received {
        Ok(Received { body, handles }) => (client.serve(platforms, body, handles), None),
        Err(error @ (IpcError::Decode(_) | IpcError::TrailingBytes(_))) => {
            (Err(RoleError::new("BAD_REQUEST", &error)), Some(error))
        }
        Err(error) => return Err(error),
    };
    client.channel.send(&outcome)?;
    broken.map_or(Ok(()), Err)
}

/// The certificates of a platform.
pub(super) fn platform_evidence(platform: &SecureProcessor) -> Result<PlatformEvidence, RoleError> {
    let chain = platform.pdh_cert_export().map_err(firmware_error)?;
    Ok(PlatformEvidence {
        pdh: chain.pdh.as_bytes().to_vec(),
        platform: chain.platform_certs(),
        amd: chain.amd_certs(),
    })
}

/// A refusal of the firmware, under the firmware's own name for it.
pub(super) fn firmware_error(error: casemate_attest::processor::FirmwareError) -> RoleError {
    RoleError::new(error.name(), error)
}

fn snp_platform(identity: &[u8]) -> Result<SnpProcessor, RoleError> {
    let identity = SnpIdentity::from_bytes(identity).map_err(snp_identity_error)?;
    let mut platform = SnpProcessor::new(identity, Personality::genoa())
        .map_err(snp_identity_error)?
        .with_max_guests(MAX_CLIENTS);
    platform.init().map_err(firmware_error)?;
    Ok(platform)
}

fn snp_identity_error(error: SnpIdentityError) -> RoleError {
    RoleError::new("PLATFORM_IDENTITY", error)
}

pub(super) fn identity_error(error: casemate_attest::processor::IdentityError) -> RoleError {
    RoleError::new("PLATFORM_IDENTITY", error)
}

/// Most guests at once.
const MAX_CLIENTS: u32 = 64;
