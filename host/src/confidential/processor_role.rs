//! The `psp` role: the software secure processor behind a poll loop, one thread, no path, no network.
//!
//! It stands for AMD's secure processor where there is none, and protects nothing from the host's root. Its
//! clients are VMMs, and a VMM may have been broken into: a client is known by its channel, reaches its own
//! guest and its own memory only, and is dropped, its guest decommissioned, when it breaks the protocol.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use casemate_attest::legacy::TrustAnchors;
use casemate_attest::processor::{Identity, ProcessorConfig, SecureProcessor};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zeroize::Zeroizing;

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
        platform: None,
        clients: Vec::new(),
    };
    loop {
        let ready = processor.wait()?;
        if !processor.serve_clients(&ready.clients) && ready.control {
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
    platform: Option<SecureProcessor>,
    clients: Vec<GuestClient>,
}

/// What has something to read.
struct Ready {
    control: bool,
    clients: Vec<bool>,
}

impl Processor {
    fn wait(&self) -> Result<Ready, RoleError> {
        let channels = self.clients.iter().map(|client| &client.channel);
        let mut fds: Vec<PollFd<'_>> = std::iter::once(&self.control)
            .chain(channels)
            .map(|channel| PollFd::new(channel.as_fd(), PollFlags::POLLIN))
            .collect();
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(RoleError::new("INTERNAL", format!("poll: {e}"))),
            }
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(true));
        Ok(Ready {
            control: ready.next().unwrap_or(true),
            clients: ready.collect(),
        })
    }

    /// One message of each client that has one; whether a client had to go (indices have changed then).
    fn serve_clients(&mut self, ready: &[bool]) -> bool {
        let mut gone = Vec::new();
        let Some(platform) = self.platform.as_mut() else {
            return false;
        };
        for (index, client) in self.clients.iter_mut().enumerate() {
            if ready.get(index) == Some(&true) && serve_client(platform, client).is_err() {
                gone.push(index);
            }
        }
        for &index in gone.iter().rev() {
            self.clients.swap_remove(index).decommission(platform);
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
            ProcessorControl::Initialise {
                identity,
                peer_roots,
            } => self.initialise(Zeroizing::new(identity), &peer_roots),
            ProcessorControl::Connect => self.connect(handles),
            ProcessorControl::Status => {
                let status = self.platform()?.status();
                Ok(ControlReply::Status(PlatformStatus {
                    api: (status.api.major, status.api.minor, status.build),
                    guests: status.guest_count,
                    emulated: status.emulated,
                }))
            }
            ProcessorControl::Evidence => {
                Ok(ControlReply::Evidence(platform_evidence(self.platform()?)?))
            }
            ProcessorControl::SandboxReport => Ok(ControlReply::Report(self.cell.report()?)),
            ProcessorControl::SandboxProbe => Ok(ControlReply::Probe(self.cell.probe()?)),
        }
    }

    fn initialise(
        &mut self,
        identity: Zeroizing<Vec<u8>>,
        peer_roots: &[[u8; 32]],
    ) -> ControlOutcome {
        if self.platform.is_some() {
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
        let mut platform = SecureProcessor::new(identity, config);
        platform.init().map_err(firmware_error)?;
        self.platform = Some(platform);
        Ok(ControlReply::Done)
    }

    fn connect(&mut self, handles: Vec<OwnedFd>) -> ControlOutcome {
        self.platform()?;
        let [fd] = <[OwnedFd; 1]>::try_from(handles)
            .map_err(|_| RoleError::new("BAD_REQUEST", "Connect comes with one descriptor"))?;
        let asid = (1..=MAX_CLIENTS)
            .find(|asid| self.clients.iter().all(|client| client.asid() != *asid))
            .ok_or_else(|| {
                RoleError::new(
                    "RESOURCE_LIMIT",
                    format!("{MAX_CLIENTS} guests at most; end one first"),
                )
            })?;
        self.clients
            .push(GuestClient::new(Channel::from_fd(fd), asid));
        Ok(ControlReply::Done)
    }

    fn platform(&self) -> Result<&SecureProcessor, RoleError> {
        self.platform.as_ref().ok_or_else(|| {
            RoleError::new(
                "PLATFORM_STATE",
                "the platform has no identity yet; the agent must initialise it",
            )
        })
    }
}

/// One request of a client; an error ends the client.
fn serve_client(platform: &mut SecureProcessor, client: &mut GuestClient) -> Result<(), IpcError> {
    let received = client.channel.recv::<GuestRequest>(Some(Duration::ZERO));
    let (outcome, broken): (GuestOutcome, _) = match received {
        Ok(Received { body, handles }) => (client.serve(platform, body, handles), None),
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

fn identity_error(error: casemate_attest::processor::IdentityError) -> RoleError {
    RoleError::new("PLATFORM_IDENTITY", error)
}

/// Most guests at once.
const MAX_CLIENTS: u32 = 64;
