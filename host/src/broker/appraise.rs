//! Evidence under the owner's policy files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use casemate_attest::broker::evidence::CertificateKind;
use casemate_attest::broker::{Appraiser, GuestEvidence, ResourcePath, Scope};
use casemate_attest::chain::split_pem;
use casemate_attest::reference::{ReferenceError, ReferenceValues, SignatureFileError, Signatures};
use casemate_attest::verify::policy::PolicyError;
use casemate_attest::verify::{
    Check, Expectation, Nonce, OwnerPolicy, SnpEvidence, SnpVerifier, Verdict,
};

use super::config::{BrokerConfig, CertificatesConfig};
use super::files::{self, FileError};

/// One verifier for sessions and one for each resource.
pub struct OwnerPolicies {
    session: Rule,
    resources: BTreeMap<ResourcePath, Rule>,
    own: OwnCertificates,
}

/// A policy, and the reference values that its own signers signed.
struct Rule {
    verifier: SnpVerifier,
    /// Whether it names any launch at all.
    names_launches: bool,
    references: Vec<ReferenceValues>,
}

/// Why the policies cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PoliciesError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is none.
    #[error("{0} is not there")]
    Missing(PathBuf),
    /// Not a policy.
    #[error("{0}: {1}")]
    Policy(PathBuf, PolicyError),
    /// A file of signatures.
    #[error("{0}: {1}")]
    Signatures(PathBuf, SignatureFileError),
    /// Reference values that no policy here believes, as the last one that names signers saw them.
    #[error("references {0}: {1}")]
    Reference(PathBuf, ReferenceError),
    /// Reference values, and nobody who may sign them.
    #[error(
        "references {0}: no policy here has `reference_signers`, so they would count for nothing"
    )]
    NoSigners(PathBuf),
    /// A policy that lets any launch have a secret.
    #[error(
        "policy {0} of {1} names no launch: give `measurements`, or `reference_signers` here and what they signed under `references` in the configuration"
    )]
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
    /// Reads every policy that `config` names, and the reference values, which must be in force at `now`.
    pub fn load(config: &BrokerConfig, now: SystemTime) -> Result<Self, PoliciesError> {
        let mut documents = Documents::read(&config.references, now)?;
        let session = documents.rule(policy(&config.session.policy)?);
        let mut resources = BTreeMap::new();
        for (name, file) in &config.resources {
            let rule = documents.rule(policy(file)?);
            if !rule.names_launches {
                documents.all_counted()?;
                return Err(PoliciesError::NoLaunch(file.clone(), name.0.clone()));
            }
            resources.insert(name.0.clone(), rule);
        }
        documents.all_counted()?;
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
        let rule = match scope {
            Scope::Session => &self.session,
            Scope::Resource(path) => self.resources.get(path)?,
        };
        let nonce = Nonce::new(report_data).ok()?;
        let expectation = Expectation {
            nonce: Some(&nonce),
            references: &rule.references,
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
            let verdict = with_lists(&rule.verifier, evidence, &lists, &expectation)?;
            if verdict.accepted() {
                return Some(verdict);
            }
            last = Some(verdict);
        }
        last
    }
}

/// The files under `references`, and whether any policy believes them.
struct Documents {
    all: Vec<Document>,
    now: SystemTime,
}

struct Document {
    file: PathBuf,
    bytes: Vec<u8>,
    signatures: Signatures,
    counts: bool,
    refused: Option<ReferenceError>,
}

impl Documents {
    fn read(files: &[PathBuf], now: SystemTime) -> Result<Self, PoliciesError> {
        let all = files.iter().map(|file| {
            let mut name = file.as_os_str().to_owned();
            name.push(".sig");
            let name = PathBuf::from(name);
            Ok(Document {
                file: file.clone(),
                bytes: required(file)?,
                signatures: Signatures::parse(&required(&name)?)
                    .map_err(|e| PoliciesError::Signatures(name, e))?,
                counts: false,
                refused: None,
            })
        });
        let all = all.collect::<Result<_, PoliciesError>>()?;
        Ok(Self { all, now })
    }

    /// A policy with those documents that its signers signed. Whether they are in force is looked at again with
    /// each piece of evidence.
    fn rule(&mut self, policy: OwnerPolicy) -> Rule {
        let mut references = Vec::new();
        let rules = policy.rules();
        if let Some(signers) = &rules.reference_signers {
            let threshold = rules.reference_threshold();
            for document in &mut self.all {
                let (bytes, signatures) = (&document.bytes, &document.signatures);
                match ReferenceValues::open(bytes, signatures, signers, threshold, self.now) {
                    Ok(values) => {
                        document.counts = true;
                        references.push(values);
                    }
                    Err(error) => document.refused = Some(error),
                }
            }
        }
        Rule {
            names_launches: rules.measurements.is_some() || !references.is_empty(),
            verifier: SnpVerifier::new(policy),
            references,
        }
    }

    /// A document that counts for nobody is a mistake of the owner's.
    fn all_counted(&mut self) -> Result<(), PoliciesError> {
        let Some(lost) = self.all.iter_mut().find(|document| !document.counts) else {
            return Ok(());
        };
        let file = lost.file.clone();
        Err(match lost.refused.take() {
            Some(error) => PoliciesError::Reference(file, error),
            None => PoliciesError::NoSigners(file),
        })
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
