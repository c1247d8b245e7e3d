//! The software secure processor as the agent sees it: one jailed process, its identity kept on the disk.

use std::path::Path;
use std::sync::Mutex;

use casemate_attest::legacy::CaCertificate;
use casemate_policy::Fingerprint;

use crate::agent::api::Failure;
use crate::agent::evidence::write_secret;
use crate::agent::vmm_process::lock;
use crate::confidential::control::ProcessorLink;
use crate::confidential::protocol::{PlatformEvidence, PlatformStatus};
use crate::ipc::Channel;
use crate::sandbox::jail::RoleProcess;
use crate::sandbox::report::{ProbeReport, SandboxReport};

/// The running processor.
pub struct Processor {
    link: Mutex<ProcessorLink>,
    evidence: PlatformEvidence,
    root: Fingerprint,
    _process: Mutex<RoleProcess>,
}

impl Processor {
    /// Starts as the platform whose identity lies in `state_dir`, or as a new one. `peer_roots` are the other
    /// emulated roots that guests may be sent to.
    pub fn start(
        process: RoleProcess,
        channel: Channel,
        state_dir: &Path,
        peer_roots: &[[u8; 32]],
    ) -> Result<Self, Failure> {
        let link = ProcessorLink::new(channel);
        let file = state_dir.join("processor.identity");
        let unusable = |e: std::io::Error| {
            Failure::new("PROCESSOR_IDENTITY", format!("{}: {e}", file.display()))
        };
        match std::fs::read(&file) {
            Ok(identity) => link.initialise(&identity, peer_roots)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let identity = link.generate()?;
                write_secret(&file, &identity).map_err(unusable)?;
                link.initialise(&identity, peer_roots)?;
            }
            Err(e) => return Err(unusable(e)),
        }
        let evidence = link.evidence()?;
        let root = root_of(&evidence)?;
        Ok(Self {
            link: Mutex::new(link),
            evidence,
            root,
            _process: Mutex::new(process),
        })
    }

    /// A channel for one VMM.
    pub fn connect(&self) -> Result<Channel, Failure> {
        Ok(lock(&self.link).connect()?)
    }

    /// PLATFORM_STATUS.
    pub fn status(&self) -> Result<PlatformStatus, Failure> {
        Ok(lock(&self.link).status()?)
    }

    /// The platform's certificates.
    pub fn evidence(&self) -> &PlatformEvidence {
        &self.evidence
    }

    /// Fingerprint of the root: what policies name.
    pub fn root(&self) -> Fingerprint {
        self.root
    }

    /// State of the processor's sandbox.
    pub fn sandbox_report(&self) -> Result<SandboxReport, Failure> {
        Ok(lock(&self.link).sandbox_report()?)
    }

    /// A probe from inside.
    pub fn probe(&self) -> Result<ProbeReport, Failure> {
        Ok(lock(&self.link).sandbox_probe()?)
    }
}

/// The root is the second of the two CA certificates.
fn root_of(evidence: &PlatformEvidence) -> Result<Fingerprint, Failure> {
    let broken =
        |e: casemate_attest::legacy::CaError| Failure::new("PROCESSOR_IDENTITY", e.to_string());
    let (_ask, rest) = CaCertificate::parse_first(&evidence.amd).map_err(broken)?;
    let root = CaCertificate::parse(rest).map_err(broken)?;
    Ok(Fingerprint::from_bytes(root.fingerprint()))
}
