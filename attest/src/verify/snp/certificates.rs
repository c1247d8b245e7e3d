//! The certificates that come with a report: which of them form a chain, whether its dates hold,
//! and what is known of revocation, told apart so that each is a check of its own.

use super::SnpEvidence;
use crate::chain::{
    self, ChainError, Crl, CrlOutcome, Intermediate, Leaf, Revocation, SnpTrust,
    TrustedIntermediate, VerifiedLeaf,
};
use crate::verify::floor::LEAF_FORMAT;
use crate::verify::policy::{CrlMode, Fingerprint, OwnerPolicy};
use crate::verify::verdict::Check;
use ring::digest::{Context, SHA256, digest};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A verifier for one policy, which keeps what it has found out of certificates and lists: whose
/// signature is good. Dates, ages and revocation are checked anew for every verdict. One serves any number of threads.
pub struct SnpVerifier {
    policy: OwnerPolicy,
    named_roots: Vec<[u8; 32]>,
    trust: Mutex<SnpTrust>,
    intermediates: Kept<TrustedIntermediate>,
    paths: Kept<VerifiedLeaf>,
    lists: Kept<Arc<Crl>>,
}

/// What the certificates amount to.
pub(in crate::verify) struct ChainFinding {
    /// Signatures, names and contents; the text names the path.
    pub(in crate::verify) path: Result<String, Fault>,
    /// Whether the root is a software secure processor's; false where there is no path.
    pub(in crate::verify) emulated: bool,
    pub(in crate::verify) dates: DateFinding,
    /// The time of the dates.
    pub(in crate::verify) clock: String,
    pub(in crate::verify) revocation: Check,
}

/// A reason, in words and as a code.
#[derive(Debug, Clone)]
pub(in crate::verify) struct Fault {
    pub(in crate::verify) text: String,
    pub(in crate::verify) code: &'static str,
}

/// Whether each certificate is in force.
pub(in crate::verify) enum DateFinding {
    InForce(String),
    Outside(Fault),
    /// There is no path whose dates could be checked.
    Unknown,
}

/// Things that were checked, by the SHA-256 of their bytes. Evidence cannot make it grow without
/// bound: when it is full it begins anew.
struct Kept<T>(Mutex<HashMap<[u8; 32], T>>);

impl SnpVerifier {
    /// A verifier that has seen nothing yet.
    pub fn new(policy: OwnerPolicy) -> Self {
        let named_roots = policy.emulated_roots().map(|root| root.0).collect();
        Self {
            policy,
            named_roots,
            trust: Mutex::new(SnpTrust::amd()),
            intermediates: Kept::new(),
            paths: Kept::new(),
            lists: Kept::new(),
        }
    }

    /// Its policy.
    pub fn policy(&self) -> &OwnerPolicy {
        &self.policy
    }

    /// Reads the leaf, and says whether it could be read.
    pub(super) fn leaf(&self, evidence: &SnpEvidence<'_>) -> (Check, Option<Leaf>) {
        let expected = "a well-formed VCEK or VLEK certificate";
        let known = self.paths.get(&path_key(evidence));
        let leaf = match known {
            Some(verified) => Ok((*verified).clone()),
            None => Leaf::parse(evidence.leaf),
        };
        match leaf {
            Ok(leaf) => {
                let name = leaf.product_name();
                let found = format!("{} for {name}, {}", leaf.kind(), leaf.tcb());
                (Check::accepted(LEAF_FORMAT, expected, found), Some(leaf))
            }
            Err(error) => {
                let code = error.code();
                let check = Check::rejected(LEAF_FORMAT, expected, error.to_string(), code);
                (check, None)
            }
        }
    }

    pub(super) fn chain(
        &self,
        leaf: Option<&Leaf>,
        evidence: &SnpEvidence<'_>,
        clock: SystemTime,
    ) -> ChainFinding {
        let verified = match leaf {
            Some(leaf) => self.known_path(leaf, evidence, clock),
            None => Err(Fault {
                text: "the leaf cannot be read".to_owned(),
                code: "LEAF_UNREADABLE",
            }),
        };
        let clock_text = rfc3339(clock);
        match verified {
            Ok((verified, dates)) => ChainFinding {
                path: Ok(path_text(&verified)),
                emulated: verified.emulated(),
                dates,
                clock: clock_text,
                revocation: self.revocation(&verified, evidence.crl, clock),
            },
            Err(fault) => ChainFinding {
                path: Err(fault),
                emulated: false,
                dates: DateFinding::Unknown,
                clock: clock_text,
                revocation: self.revocation_without_path(evidence.crl),
            },
        }
    }

    /// The path as it was found for the same certificates before, with its dates at `clock`.
    fn known_path(
        &self,
        leaf: &Leaf,
        evidence: &SnpEvidence<'_>,
        clock: SystemTime,
    ) -> Result<(VerifiedLeaf, DateFinding), Fault> {
        let key = path_key(evidence);
        let Some(verified) = self.paths.get(&key) else {
            let found = self.path(leaf, evidence.certificates, clock)?;
            self.paths.put(key, found.0.clone());
            return Ok(found);
        };
        // Revocation is a check of its own; what is left of this one are the dates.
        let dates = match verified.recheck(&ANY, clock) {
            Ok(_) => in_force(&verified),
            Err(error) => DateFinding::Outside(fault(&error)),
        };
        Ok((verified, dates))
    }

    /// The best path from the leaf to a root, and its dates at `clock`. Where only the dates do
    /// not hold, the path is found at a time when they do.
    fn path(
        &self,
        leaf: &Leaf,
        certificates: &[Vec<u8>],
        clock: SystemTime,
    ) -> Result<(VerifiedLeaf, DateFinding), Fault> {
        let mut worst: Option<ChainError> = None;
        for candidate in self.intermediates(leaf, certificates)? {
            let outside = match self.verify_leaf(leaf, &candidate, clock) {
                Ok(verified) => {
                    let dates = in_force(&verified);
                    return Ok((verified, dates));
                }
                Err(error @ (ChainError::Expired(_) | ChainError::NotYetValid(_))) => error,
                Err(error) => {
                    note(&mut worst, error);
                    continue;
                }
            };
            match self.verify_outside(leaf, &candidate) {
                Ok(verified) => return Ok((verified, DateFinding::Outside(fault(&outside)))),
                Err(error) => note(&mut worst, error),
            }
        }
        let none = || Fault {
            text: "there is no intermediate certificate".to_owned(),
            code: "INTERMEDIATE_MISSING",
        };
        Err(worst.map_or_else(none, |error| fault(&error)))
    }

    /// The intermediates to try: those that came with the evidence, and only where there are none,
    /// AMD's.
    fn intermediates(
        &self,
        leaf: &Leaf,
        certificates: &[Vec<u8>],
    ) -> Result<Vec<Intermediate>, Fault> {
        if certificates.len() > MAX_CERTIFICATES {
            return Err(Fault {
                text: format!("more than {MAX_CERTIFICATES} certificates came with the report"),
                code: "TOO_MANY_CERTIFICATES",
            });
        }
        let mut found = Vec::new();
        for bytes in certificates {
            if self.recognise_root(bytes).map_err(|error| fault(&error))? {
                continue;
            }
            found.push(Intermediate::parse(bytes).map_err(|error| fault(&error))?);
        }
        if found.is_empty() {
            let amd = Intermediate::amd(leaf.product(), leaf.kind());
            found.push(amd.map_err(|error| fault(&error))?);
        }
        Ok(found)
    }

    /// Whether this is a root that counts. An emulated one counts from here on if it is named.
    fn recognise_root(&self, bytes: &[u8]) -> Result<bool, ChainError> {
        let mut trust = lock(&self.trust);
        match trust.recognise(bytes) {
            Ok(_) => return Ok(true),
            Err(ChainError::RootNotPinned(_)) => {}
            Err(error) => return Err(error),
        }
        match trust.clone().with_emulated_root(bytes, &self.named_roots) {
            Ok(wider) => {
                *trust = wider;
                Ok(true)
            }
            Err(ChainError::RootNotPinned(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn verify_leaf(
        &self,
        leaf: &Leaf,
        intermediate: &Intermediate,
        clock: SystemTime,
    ) -> Result<VerifiedLeaf, ChainError> {
        let key = intermediate.fingerprint();
        let issuer = match self.intermediates.get(&key) {
            Some(issuer) => issuer,
            None => {
                let trust = lock(&self.trust).clone();
                let issuer = trust.trust_intermediate(intermediate, clock)?;
                self.intermediates.put(key, issuer.clone());
                issuer
            }
        };
        chain::verify(leaf, &issuer, &ANY, clock)
    }

    /// The path at the leaf's first moment; or at its last, if what is above it came later.
    fn verify_outside(
        &self,
        leaf: &Leaf,
        intermediate: &Intermediate,
    ) -> Result<VerifiedLeaf, ChainError> {
        let period = leaf.validity();
        self.verify_leaf(leaf, intermediate, period.not_before)
            .or_else(|_| self.verify_leaf(leaf, intermediate, period.not_after))
    }

    fn revocation(&self, verified: &VerifiedLeaf, crl: Option<&[u8]>, clock: SystemTime) -> Check {
        let Some(bytes) = crl else {
            return self.no_list();
        };
        let expected = self.revocation_expected();
        let list = match self.list(bytes) {
            Ok(list) => list,
            Err(fault) => return Check::rejected(REVOCATION, &expected, fault.text, fault.code),
        };
        let days = self.policy.rules().crl.max_age_days;
        let revocation = Revocation {
            mode: chain::CrlMode::Required,
            crl: Some(&list),
            max_age: days.map(|days| Duration::from_secs(u64::from(days) * DAY)),
        };
        let outcome = revocation.outcome(verified, verified.issuer(), clock);
        match &outcome {
            CrlOutcome::Good { .. } => Check::accepted(REVOCATION, &expected, outcome.to_string()),
            bad => Check::rejected(REVOCATION, &expected, bad.to_string(), bad.code()),
        }
    }

    /// A list says nothing of a path that is none; but a list that is none is a fault all the same.
    fn revocation_without_path(&self, crl: Option<&[u8]>) -> Check {
        let Some(bytes) = crl else {
            return self.no_list();
        };
        let expected = self.revocation_expected();
        match self.list(bytes) {
            Ok(_) => Check::cannot_verify(
                REVOCATION,
                &expected,
                "the certificates do not form a chain",
                "CHAIN_UNVERIFIED",
            ),
            Err(fault) => Check::rejected(REVOCATION, &expected, fault.text, fault.code),
        }
    }

    fn no_list(&self) -> Check {
        let found = "no CRL given: revocation was not checked";
        match self.policy.rules().crl.mode {
            CrlMode::Required => {
                Check::cannot_verify(REVOCATION, "a CRL is required", found, "CRL_MISSING")
            }
            CrlMode::IfPresent => {
                Check::not_checked(REVOCATION, "a CRL is checked if there is one", found)
            }
        }
    }

    fn list(&self, bytes: &[u8]) -> Result<Arc<Crl>, Fault> {
        let key = sha256(bytes);
        if let Some(list) = self.lists.get(&key) {
            return Ok(list);
        }
        let list = Crl::parse(bytes).map(Arc::new).map_err(|error| Fault {
            text: error.to_string(),
            code: error.code(),
        })?;
        self.lists.put(key, Arc::clone(&list));
        Ok(list)
    }

    fn revocation_expected(&self) -> String {
        let text = "no certificate revoked by a fresh CRL of the root";
        match self.policy.rules().crl.max_age_days {
            Some(days) => format!("{text}, at most {days} days old"),
            None => text.to_owned(),
        }
    }
}

impl<T: Clone> Kept<T> {
    fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    fn get(&self, key: &[u8; 32]) -> Option<T> {
        lock(&self.0).get(key).cloned()
    }

    fn put(&self, key: [u8; 32], value: T) {
        let mut kept = lock(&self.0);
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(key, value);
    }
}

/// Keeps the error that came furthest: one over a path that exists says more than one over a
/// certificate that is only not the right one.
fn note(worst: &mut Option<ChainError>, error: ChainError) {
    let rank = |error: &ChainError| match error {
        ChainError::RootNotPinned(_) => 0,
        ChainError::WrongIntermediate { .. } | ChainError::ProductMismatch { .. } => 1,
        _ => 2,
    };
    if worst.as_ref().is_none_or(|old| rank(old) < rank(&error)) {
        *worst = Some(error);
    }
}

fn fault(error: &ChainError) -> Fault {
    Fault {
        text: error.to_string(),
        code: error.code(),
    }
}

fn path_text(verified: &VerifiedLeaf) -> String {
    let issuer = verified.issuer();
    let root = if verified.emulated() {
        "emulated root"
    } else {
        "AMD's root"
    };
    format!(
        "{} under {root} {}",
        verified.kind(),
        Fingerprint(issuer.root_fingerprint())
    )
}

/// Names these certificates, in this order, byte for byte.
fn path_key(evidence: &SnpEvidence<'_>) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    let others = evidence.certificates.iter().map(Vec::as_slice);
    for certificate in std::iter::once(evidence.leaf).chain(others) {
        context.update(&sha256(certificate));
    }
    let mut key = [0; 32];
    key.copy_from_slice(context.finish().as_ref());
    key
}

fn in_force(verified: &VerifiedLeaf) -> DateFinding {
    DateFinding::InForce(format!("until {}", rfc3339(last_moment(verified))))
}

/// When the first certificate of the path expires.
fn last_moment(verified: &VerifiedLeaf) -> SystemTime {
    let issuer = verified.issuer();
    let ends = [
        issuer.root_validity().not_after,
        issuer.validity().not_after,
    ];
    ends.into_iter()
        .fold(verified.validity().not_after, SystemTime::min)
}

/// A clock may be set to a year that has no RFC 3339 form.
fn rfc3339(time: SystemTime) -> String {
    let mut text = String::new();
    if time >= UNIX_EPOCH && write!(text, "{}", humantime::format_rfc3339_seconds(time)).is_ok() {
        return text;
    }
    "a time outside the years 1970 to 9999".to_owned()
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

/// A thread that panicked while it held the lock left a cache behind, which is whole all the same.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(in crate::verify) const REVOCATION: &str = "revocation";

/// Revocation is a check of its own.
const ANY: Revocation<'static> = Revocation {
    mode: chain::CrlMode::IfPresent,
    crl: None,
    max_age: None,
};
/// Certificates that are read besides the leaf.
const MAX_CERTIFICATES: usize = 16;
/// Entries of a cache.
const MAX_KEPT: usize = 256;
const DAY: u64 = 24 * 3600;
