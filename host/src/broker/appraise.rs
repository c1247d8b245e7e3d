//! Evidence under the owner's policy files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use casemate_attest::broker::evidence::CertificateKind;
use casemate_attest::broker::{Appraiser, GuestEvidence, ResourcePath, Scope};
use casemate_attest::chain::split_pem;
use casemate_attest::verify::policy::PolicyError;
use casemate_attest::verify::{
    Check, Expectation, Nonce, OwnerPolicy, SnpEvidence, SnpVerifier, Verdict,
};

use super::config::{BrokerConfig, CertificatesConfig};
use super::files::{self, FileError};

/// One verifier for sessions and one for each resource.
pub struct OwnerPolicies {
    session: SnpVerifier,
    resources: BTreeMap<ResourcePath, SnpVerifier>,
    own: OwnCertificates,
}

/// Why the policies cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PoliciesError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is none.
    #[error("policy {0} is not there")]
    Missing(PathBuf),
    /// Not a policy.
    #[error("{0}: {1}")]
    Policy(PathBuf, PolicyError),
    /// A policy that lets any launch have a secret.
    #[error("policy {0} of {1} names no launch: give `measurements`, or nobody is ever accepted")]
    NoLaunch(PathBuf, ResourcePath),
}

/// Certificates of the owner's own, for guests that bring none.
#[derive(Default)]
struct OwnCertificates {
    leaves: Vec<Vec<u8>>,
    chain: Vec<Vec<u8>>,
    crls: Vec<Vec<u8>>,
}

impl OwnerPolicies {
    /// Reads every policy that `config` names.
    pub fn load(config: &BrokerConfig) -> Result<Self, PoliciesError> {
        let session = SnpVerifier::new(policy(&config.session.policy)?);
        let mut resources = BTreeMap::new();
        for (name, file) in &config.resources {
            let policy = policy(file)?;
            if policy.rules().measurements.is_none() {
                return Err(PoliciesError::NoLaunch(file.clone(), name.0.clone()));
            }
            resources.insert(name.0.clone(), SnpVerifier::new(policy));
        }
        Ok(Self {
            session,
            resources,
            own: OwnCertificates::load(&config.certificates)?,
        })
    }
}

impl Appraiser for OwnerPolicies {
    fn appraise(
        &self,
        scope: Scope<'_>,
        evidence: &GuestEvidence,
        report_data: &[u8; 64],
        now: SystemTime,
    ) -> Option<Verdict> {
        let verifier = match scope {
            Scope::Session => &self.session,
            Scope::Resource(path) => self.resources.get(path)?,
        };
        let nonce = Nonce::new(report_data).ok()?;
        let expectation = Expectation {
            nonce: Some(&nonce),
            references: &[],
            clock: now,
        };
        let mut certificates: Vec<Vec<u8>> = [CertificateKind::Ask, CertificateKind::Ark]
            .into_iter()
            .filter_map(|kind| evidence.certificate(kind))
            .map(<[u8]>::to_vec)
            .collect();
        certificates.extend(self.own.chain.iter().cloned());
        let brought = evidence
            .certificate(CertificateKind::Vcek)
            .or_else(|| evidence.certificate(CertificateKind::Vlek));
        let mut leaves: Vec<&[u8]> = brought.into_iter().collect();
        if leaves.is_empty() {
            leaves.extend(self.own.leaves.iter().map(Vec::as_slice));
        }
        let mut lists: Vec<Option<&[u8]>> = self
            .own
            .crls
            .iter()
            .map(|crl| Some(crl.as_slice()))
            .collect();
        if lists.is_empty() {
            lists.push(evidence.certificate(CertificateKind::Crl));
        }
        // Which of the owner's own certificates fits shows only in the verdict.
        let mut last = None;
        for leaf in leaves
            .iter()
            .copied()
            .chain(leaves.is_empty().then_some(&[][..]))
        {
            let evidence = SnpEvidence {
                report: evidence.report.as_bytes(),
                leaf,
                certificates: &certificates,
                crl: None,
            };
            let verdict = with_lists(verifier, evidence, &lists, &expectation)?;
            if verdict.accepted() {
                return Some(verdict);
            }
            last = Some(verdict);
        }
        last
    }
}

impl OwnCertificates {
    fn load(config: &CertificatesConfig) -> Result<Self, PoliciesError> {
        let all = |files: &[PathBuf]| -> Result<Vec<Vec<u8>>, PoliciesError> {
            files.iter().map(|file| required(file)).collect()
        };
        let mut chain = Vec::new();
        for bytes in all(&config.chain)? {
            match split_pem(&bytes) {
                Ok(parts) if !parts.is_empty() => chain.extend(parts),
                _ => chain.push(bytes),
            }
        }
        Ok(Self {
            leaves: all(&config.leaves)?,
            chain,
            crls: all(&config.crls)?,
        })
    }
}

/// The verdict with the list that fits. Where one of them revokes, an older one that still holds
/// does not take it back. `None` without any list or the absence of one.
fn with_lists<'a>(
    verifier: &SnpVerifier,
    evidence: SnpEvidence<'a>,
    lists: &[Option<&'a [u8]>],
    expectation: &Expectation<'_>,
) -> Option<Verdict> {
    let mut best: Option<Verdict> = None;
    for crl in lists {
        let evidence = SnpEvidence {
            crl: *crl,
            ..evidence
        };
        let verdict = verifier.verify(&evidence, expectation);
        let revokes = |check: &Check| check.code.as_deref() == Some(REVOKED);
        if verdict.failures().any(revokes) {
            return Some(verdict);
        }
        if !best.as_ref().is_some_and(Verdict::accepted) {
            best = Some(verdict);
        }
    }
    best
}

fn policy(file: &Path) -> Result<OwnerPolicy, PoliciesError> {
    OwnerPolicy::parse(&required(file)?).map_err(|e| PoliciesError::Policy(file.to_owned(), e))
}

fn required(file: &Path) -> Result<Vec<u8>, PoliciesError> {
    files::read_if_there(file, MAX_FILE_LEN)?.ok_or_else(|| PoliciesError::Missing(file.to_owned()))
}

/// The code of a list that is the root's own and names a certificate of the path.
const REVOKED: &str = "CRL_REVOKED";
const MAX_FILE_LEN: u64 = 1 << 20;
