//! The secure processor as the agent sees it: AMD's behind `/dev/sev` ([`super::amd_processor`]), or the software
//! one, a jailed process with its identity kept on the disk.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use casemate_attest::legacy::CaCertificate;
use casemate_policy::Fingerprint;
use zeroize::Zeroizing;

use crate::agent::api::Failure;
use crate::agent::evidence::{replace_secret, write_secret};
use crate::agent::vmm_process::lock;
use crate::confidential::control::{GuestLink, Ordered, ProcessorLink};
use crate::confidential::protocol::{
    PlatformEvidence, PlatformOrder, PlatformStatus, SnpCertificates, SnpStatus,
};
use crate::ipc::Channel;
use crate::machine::plan::{MachinePlan, Technology};
use crate::sandbox::jail::RoleProcess;
use crate::sandbox::report::{ProbeReport, SandboxReport};
use crate::vmm::protocol::RoleError;

/// A secure processor as the platform's operator deals with it.
pub trait OperatedProcessor {
    /// Whether it is the software one.
    fn emulated(&self) -> bool;
    /// PLATFORM_STATUS.
    fn status(&self) -> Result<PlatformStatus, Failure>;
    /// PDH_CERT_EXPORT, and ASK ‖ ARK where they are known (else empty).
    fn certificates(&self) -> Result<PlatformEvidence, Failure>;
    /// SNP_PLATFORM_STATUS; none where there is no SNP.
    fn snp_status(&self) -> Result<Option<SnpStatus>, Failure>;
    /// The certificates of SNP reports, where the host has them.
    fn snp_certificates(&self) -> Result<Option<SnpCertificates>, Failure>;
    /// Carries out an order; what it gives, if anything.
    fn order(&self, order: &PlatformOrder) -> Result<Option<Vec<u8>>, Failure>;
}

/// The running processor.
pub struct Processor {
    link: Mutex<ProcessorLink>,
    file: PathBuf,
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
        let file = state_dir.join("processor.identity");
        let identity = kept_or_new(&file, || link.generate())?;
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
        Ok(Self {
            link: Mutex::new(link),
            file,
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

    /// State of the processor's sandbox.
    pub fn sandbox_report(&self) -> Result<SandboxReport, Failure> {
        Ok(lock(&self.link).sandbox_report()?)
    }

    /// A probe from inside.
    pub fn probe(&self) -> Result<ProbeReport, Failure> {
        Ok(lock(&self.link).sandbox_probe()?)
    }
}

/// Whether the guest's own messages need a way to the software processor; refused where there is none for them.
pub fn needs_messages(plan: &MachinePlan) -> Result<bool, Failure> {
    match (plan.technology, plan.vsock_cid) {
        (Technology::SevSnp { emulated: true, .. }, None) => Err(Failure::new(
            "VSOCK_NEEDED",
            format!(
                "{} has no vsock, and under the emulated processor a SEV-SNP guest gets its reports through it; add \
                 [vsock] with a cid to its description",
                plan.name
            ),
        )),
        (technology, _) => Ok(matches!(
            technology,
            Technology::SevSnp { emulated: true, .. }
        )),
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

impl OperatedProcessor for Processor {
    fn emulated(&self) -> bool {
        true
    }

    fn status(&self) -> Result<PlatformStatus, Failure> {
        Ok(lock(&self.link).status()?)
    }

    fn certificates(&self) -> Result<PlatformEvidence, Failure> {
        Ok(lock(&self.link).evidence()?)
    }

    fn snp_status(&self) -> Result<Option<SnpStatus>, Failure> {
        Ok(lock(&self.link).snp_status()?)
    }

    fn snp_certificates(&self) -> Result<Option<SnpCertificates>, Failure> {
        let link = lock(&self.link);
        match link.snp_status()? {
            Some(_) => Ok(Some(link.snp_certificates()?)),
            None => Ok(None),
        }
    }

    fn order(&self, order: &PlatformOrder) -> Result<Option<Vec<u8>>, Failure> {
        let link = lock(&self.link);
        match link.order(order)? {
            Ordered::Done => Ok(None),
            Ordered::Bytes(bytes) => Ok(Some(bytes)),
            Ordered::Changed(identity) => self.keep(&link, &identity).map(|()| None),
        }
    }
}

impl Processor {
    /// Keeps a changed identity in place of the old one, or has the processor go back to that.
    fn keep(&self, link: &ProcessorLink, identity: &[u8]) -> Result<(), Failure> {
        let Err(error) = replace_secret(&self.file, identity) else {
            return Ok(());
        };
        let file = self.file.display();
        let back = std::fs::read(&self.file)
            .map(Zeroizing::new)
            .map_err(|e| e.to_string())
            .and_then(|kept| link.restore(&kept).map_err(|e| e.to_string()));
        let now = match back {
            Ok(()) => "the processor is what it was; make room and try again".to_owned(),
            Err(e) => format!("nor could it go back ({e}); start the agent again"),
        };
        Err(Failure::new(
            "PROCESSOR_IDENTITY",
            format!("{file} cannot be replaced: {error}; {now}"),
        ))
    }
}

/// Fingerprint of the root, the second of the two CA certificates: what policies name.
pub(super) fn root_of(evidence: &PlatformEvidence) -> Result<Fingerprint, Failure> {
    let broken =
        |e: casemate_attest::legacy::CaError| Failure::new("PROCESSOR_IDENTITY", e.to_string());
    let (_ask, rest) = CaCertificate::parse_first(&evidence.amd).map_err(broken)?;
    let root = CaCertificate::parse(rest).map_err(broken)?;
    Ok(Fingerprint::from_bytes(root.fingerprint()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confidential::tests::plan;

    #[test]
    fn an_emulated_snp_guest_without_vsock_is_refused_and_told_why() {
        let snp = |vsock_cid| {
            let technology = Technology::SevSnp {
                emulated: true,
                policy: 0x3_0000,
            };
            needs_messages(&MachinePlan {
                vsock_cid,
                ..plan(technology)
            })
        };
        let refused = snp(None).unwrap_err();
        assert_eq!(refused.code, "VSOCK_NEEDED");
        assert!(refused.error.contains("[vsock]"), "{}", refused.error);
        assert!(snp(Some(3)).unwrap());
        assert!(!needs_messages(&plan(Technology::None)).unwrap());
    }
}
