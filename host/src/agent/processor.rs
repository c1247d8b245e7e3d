//! The software secure processor as the agent sees it: one jailed process, its identity kept on the disk.

use std::path::Path;
use std::sync::Mutex;

use casemate_attest::legacy::CaCertificate;
use casemate_policy::Fingerprint;
use zeroize::Zeroizing;

use crate::agent::api::Failure;
use crate::agent::evidence::write_secret;
use crate::agent::vmm_process::lock;
use crate::confidential::control::{GuestLink, ProcessorLink};
use crate::confidential::protocol::{PlatformEvidence, PlatformStatus};
use crate::ipc::Channel;
use crate::sandbox::jail::RoleProcess;
use crate::sandbox::report::{ProbeReport, SandboxReport};
use crate::vmm::protocol::RoleError;

/// The running processor.
pub struct Processor {
    link: Mutex<ProcessorLink>,
    evidence: PlatformEvidence,
    root: Fingerprint,
    snp: bool,
    _process: Mutex<RoleProcess>,
}

impl Processor {
    /// Starts as the platform whose identities lie in `state_dir`, or as a new one; with SEV-SNP or without.
    /// `peer_roots` are the other emulated roots that guests may be sent to.
    pub fn start(
        process: RoleProcess,
        channel: Channel,
        state_dir: &Path,
        peer_roots: &[[u8; 32]],
        snp: bool,
    ) -> Result<Self, Failure> {
        let link = ProcessorLink::new(channel);
        let identity = kept_or_new(&state_dir.join("processor.identity"), || link.generate())?;
        let snp_identity = match snp {
            true => Some(kept_or_new(
                &state_dir.join("processor-snp.identity"),
                || {
                    tracing::info!("making the emulated SEV-SNP root; this takes a while, once");
                    link.generate_snp()
                },
            )?),
            false => None,
        };
        let snp_bytes = snp_identity.as_ref().map(|bytes| bytes.as_slice());
        link.initialise(&identity, snp_bytes, peer_roots)?;
        let evidence = link.evidence()?;
        let root = root_of(&evidence)?;
        Ok(Self {
            link: Mutex::new(link),
            evidence,
            root,
            snp,
            _process: Mutex::new(process),
        })
    }

    /// The descriptors for one VMM; a SEV-SNP guest gets the way of its messages too.
    pub fn connect(&self, snp: bool) -> Result<GuestLink, Failure> {
        Ok(lock(&self.link).connect(snp)?)
    }

    /// Whether it launches SEV-SNP guests.
    pub fn has_snp(&self) -> bool {
        self.snp
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

fn kept_or_new(
    file: &Path,
    make: impl FnOnce() -> Result<Zeroizing<Vec<u8>>, RoleError>,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let unusable =
        |e: std::io::Error| Failure::new("PROCESSOR_IDENTITY", format!("{}: {e}", file.display()));
    match std::fs::read(file) {
        Ok(identity) => Ok(Zeroizing::new(identity)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let identity = make()?;
            write_secret(file, &identity).map_err(unusable)?;
            Ok(identity)
        }
        Err(e) => Err(unusable(e)),
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
