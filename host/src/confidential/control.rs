//! The `psp` role as the agent uses it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use zeroize::Zeroizing;

use crate::confidential::protocol::{
    ControlOutcome, ControlReply, PlatformEvidence, PlatformOrder, PlatformStatus,
    ProcessorControl, SnpCertificates, SnpStatus,
};
use crate::ipc::{Channel, IpcError};
use crate::sandbox::report::{ProbeReport, SandboxReport};
use crate::vmm::protocol::{HandleKind, RoleError};

/// What an order of the platform's operator led to.
pub enum Ordered {
    /// Nothing more to say.
    Done,
    /// What was asked for.
    Bytes(Vec<u8>),
    /// The platform's identity is another one now: secret, to be kept in place of the old one.
    Changed(Zeroizing<Vec<u8>>),
}

impl std::fmt::Debug for Ordered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Done => f.write_str("Done"),
            Self::Bytes(bytes) => f.debug_tuple("Bytes").field(bytes).finish(),
            // The identity is secret.
            Self::Changed(_) => f.write_str("Changed"),
        }
    }
}

/// The agent's end of the control channel. The psp ends when this is dropped.
#[derive(Debug)]
pub struct ProcessorLink {
    channel: Channel,
}

/// The VMM's ends of a guest's connection to the psp.
#[derive(Debug)]
pub struct GuestLink {
    /// The guest's commands.
    pub channel: Channel,
    /// The guest's own messages, one packet each; of a SEV-SNP guest.
    pub messages: Option<OwnedFd>,
}

impl GuestLink {
    /// As the VMM gets them.
    pub fn into_handles(self) -> Vec<(HandleKind, OwnedFd)> {
        let messages = self.messages.map(|fd| (HandleKind::GuestMessages, fd));
        let channel = (HandleKind::Processor, self.channel.into_fd());
        [channel].into_iter().chain(messages).collect()
    }
}

impl ProcessorLink {
    /// Over the channel whose other end the psp runs on.
    pub fn new(channel: Channel) -> Self {
        Self { channel }
    }

    /// Makes a new platform identity. It is secret: to be stored with mode 0600, and to be given to
    /// [`ProcessorLink::initialise`]. Takes seconds (RSA keys).
    pub fn generate(&self) -> Result<Zeroizing<Vec<u8>>, RoleError> {
        match self.call(&ProcessorControl::Generate, &[])? {
            ControlReply::Generated { identity } => Ok(Zeroizing::new(identity)),
            _ => Err(unexpected()),
        }
    }

    /// The same for an SNP platform. Takes ten seconds and more.
    pub fn generate_snp(&self) -> Result<Zeroizing<Vec<u8>>, RoleError> {
        match self.call(&ProcessorControl::GenerateSnp, &[])? {
            ControlReply::Generated { identity } => Ok(Zeroizing::new(identity)),
            _ => Err(unexpected()),
        }
    }

    /// Becomes the platform of these identities. `peer_roots` are the other emulated roots that guests may be
    /// sent to.
    pub fn initialise(
        &self,
        identity: &[u8],
        snp: Option<&[u8]>,
        peer_roots: &[[u8; 32]],
    ) -> Result<(), RoleError> {
        let request = ProcessorControl::Initialise {
            identity: identity.to_vec(),
            snp: snp.map(|bytes| serde_bytes::ByteBuf::from(bytes.to_vec())),
            peer_roots: peer_roots.to_vec(),
        };
        match self.call(&request, &[])? {
            ControlReply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// A new guest's connection; with `messages` also the socket on which a SEV-SNP guest's messages go.
    pub fn connect(&self, messages: bool) -> Result<GuestLink, RoleError> {
        let (for_vmm, for_psp) = Channel::pair()?;
        let mut link = GuestLink {
            channel: for_vmm,
            messages: None,
        };
        let mut theirs = vec![for_psp.into_fd()];
        if messages {
            let (ours, psp) = Channel::pair()?;
            link.messages = Some(ours.into_fd());
            theirs.push(psp.into_fd());
        }
        for descriptor in &theirs {
            // A VMM that does not read its replies must not hold up the psp's other guests. The flag belongs to
            // the psp's end and travels with it; the psp's own filter has no call to set it.
            fcntl(descriptor, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(IpcError::Socket)?;
        }
        let handles: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
        match self.call(&ProcessorControl::Connect, &handles)? {
            ControlReply::Done => Ok(link),
            _ => Err(unexpected()),
        }
    }

    /// PLATFORM_STATUS.
    pub fn status(&self) -> Result<PlatformStatus, RoleError> {
        match self.call(&ProcessorControl::Status, &[])? {
            ControlReply::Status(status) => Ok(status),
            _ => Err(unexpected()),
        }
    }

    /// The platform's certificates: for an owner, and to learn the fingerprint of the emulated root.
    pub fn evidence(&self) -> Result<PlatformEvidence, RoleError> {
        match self.call(&ProcessorControl::Evidence, &[])? {
            ControlReply::Evidence(evidence) => Ok(evidence),
            _ => Err(unexpected()),
        }
    }

    /// SNP_PLATFORM_STATUS; none where there is no SNP.
    pub fn snp_status(&self) -> Result<Option<SnpStatus>, RoleError> {
        match self.call(&ProcessorControl::SnpStatus, &[])? {
            ControlReply::SnpStatus(status) => Ok(status),
            _ => Err(unexpected()),
        }
    }

    /// The certificates of SNP reports.
    pub fn snp_certificates(&self) -> Result<SnpCertificates, RoleError> {
        match self.call(&ProcessorControl::SnpCertificates, &[])? {
            ControlReply::SnpCertificates(certificates) => Ok(certificates),
            _ => Err(unexpected()),
        }
    }

    /// Carries out an order of the platform's operator.
    pub fn order(&self, order: &PlatformOrder) -> Result<Ordered, RoleError> {
        match self.call(&ProcessorControl::Order(order.clone()), &[])? {
            ControlReply::Done => Ok(Ordered::Done),
            ControlReply::Bytes { bytes } => Ok(Ordered::Bytes(bytes)),
            ControlReply::Changed { identity } => Ok(Ordered::Changed(Zeroizing::new(identity))),
            _ => Err(unexpected()),
        }
    }

    /// Becomes again the platform of an older identity of the same chip.
    pub fn restore(&self, identity: &[u8]) -> Result<(), RoleError> {
        let identity = identity.to_vec();
        match self.call(&ProcessorControl::Restore { identity }, &[])? {
            ControlReply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// State of the psp's sandbox.
    pub fn sandbox_report(&self) -> Result<SandboxReport, RoleError> {
        match self.call(&ProcessorControl::SandboxReport, &[])? {
            ControlReply::Report(report) => Ok(report),
            _ => Err(unexpected()),
        }
    }

    /// Tries from inside the psp what must be refused.
    pub fn sandbox_probe(&self) -> Result<ProbeReport, RoleError> {
        match self.call(&ProcessorControl::SandboxProbe, &[])? {
            ControlReply::Probe(report) => Ok(report),
            _ => Err(unexpected()),
        }
    }

    fn call(
        &self,
        request: &ProcessorControl,
        handles: &[std::os::fd::BorrowedFd<'_>],
    ) -> ControlOutcome {
        self.channel.send_with(request, handles)?;
        self.channel
            .recv::<ControlOutcome>(Some(PROCESSOR_DEADLINE))?
            .body
    }
}

fn unexpected() -> RoleError {
    RoleError::new("ROLE_PROTOCOL", "the psp's reply has no place here")
}

/// How long the psp may take; making an identity is the longest.
const PROCESSOR_DEADLINE: Duration = Duration::from_secs(60);
