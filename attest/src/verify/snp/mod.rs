//! The verdict over an SNP report.
//!
//! Everything that comes with a report comes from the host, which is what the owner does not
//! trust: report, leaf, intermediates and revocation list are bytes until a check says otherwise.
//! [`SnpVerifier::verify`] never fails: bytes that are no report or no certificate lead to a
//! verdict that rejects them, with the reason.
//!
//! Each check is listed in each verdict, once, with what was expected and what was found:
//!
//! | Check | Floor | Codes where it does not pass |
//! | --- | --- | --- |
//! | `report_format` | yes | `REPORT_LENGTH` `REPORT_VERSION_UNSUPPORTED` `REPORT_SIGNATURE_ALGORITHM` `REPORT_SIGNING_KEY_UNKNOWN` `REPORT_TRAILING_BYTES` |
//! | `leaf_format` | yes | those of [`LeafError::code`](crate::chain::LeafError::code) |
//! | `certificate_chain` | yes | `LEAF_UNREADABLE` `INTERMEDIATE_MISSING` `TOO_MANY_CERTIFICATES` and those of [`ChainError::code`](crate::chain::ChainError::code) |
//! | `certificate_dates` | yes | `CHAIN_UNVERIFIED` and those of [`ChainError::code`](crate::chain::ChainError::code) for dates |
//! | `emulated` | yes | `EMULATED_NOT_ALLOWED` `CHAIN_UNVERIFIED` |
//! | `product` | yes | `PRODUCT_MISMATCH` `PRODUCT_UNKNOWN` `LEAF_UNREADABLE` `REPORT_UNREADABLE` |
//! | `signing_key` | yes | `SIGNING_KEY_MISMATCH` |
//! | `report_signature` | yes | `REPORT_SIGNATURE_MALFORMED` `REPORT_SIGNATURE_INVALID` |
//! | `leaf_tcb` | yes | `LEAF_TCB_MISMATCH` |
//! | `leaf_chip` | yes | `LEAF_CHIP_MISMATCH` `LEAF_CHIP_MISSING` |
//! | `debug_forbidden` | yes | `DEBUG_ALLOWED` |
//! | `guest_policy_reserved` | yes | `GUEST_POLICY_RESERVED_CLEAR` `GUEST_POLICY_UNKNOWN_BITS` |
//! | `vmpl_range` | yes | `VMPL_OUT_OF_RANGE` `VMPL_HOST_REQUESTED` |
//! | `tcb_order` | yes | `REPORTED_ABOVE_COMMITTED` `COMMITTED_ABOVE_CURRENT` `PRODUCT_UNKNOWN` |
//! | `chip_key_mask` | yes | `CHIP_KEY_MASKED` |
//! | `revocation` | – | `CRL_MISSING` `CHAIN_UNVERIFIED` and those of [`CrlError::code`](crate::chain::CrlError::code) and [`CrlOutcome::code`](crate::chain::CrlOutcome::code) |
//! | `report_data` | – | `REPORT_DATA_MISMATCH` |
//! | `measurement` | – | `MEASUREMENT_NOT_ALLOWED` `REFERENCE_KEY_MISMATCH` |
//! | `vmpl` | – | `VMPL_NOT_ALLOWED` |
//! | `report_version` | – | `REPORT_VERSION_TOO_OLD` |
//! | `product_allowed` | – | `PRODUCT_NOT_ALLOWED` |
//! | `signing_key_allowed` | – | `SIGNING_KEY_NOT_ALLOWED` |
//! | `csp_id` | – | `CSP_ID_NOT_ALLOWED` |
//! | `chip_id` | – | `CHIP_ID_MASKED` `CHIP_ID_NOT_ALLOWED` |
//! | `tcb_reported` | – | `TCB_REPORTED_TOO_OLD` `TCB_PRODUCT_UNLISTED` `PRODUCT_UNKNOWN` |
//! | `tcb_committed` | – | `TCB_COMMITTED_TOO_OLD` `TCB_PRODUCT_UNLISTED` `PRODUCT_UNKNOWN` |
//! | `tcb_current` | – | `TCB_CURRENT_TOO_OLD` `TCB_PRODUCT_UNLISTED` `PRODUCT_UNKNOWN` |
//! | `tcb_launch` | – | `TCB_LAUNCH_TOO_OLD` `TCB_PRODUCT_UNLISTED` `PRODUCT_UNKNOWN` |
//! | `firmware_current` | – | `FIRMWARE_CURRENT_TOO_OLD` |
//! | `firmware_committed` | – | `FIRMWARE_COMMITTED_TOO_OLD` |
//! | `provisional_firmware` | – | `PROVISIONAL_FIRMWARE` |
//! | `mitigations_launch` | – | `MITIGATIONS_LAUNCH_MISSING` `MITIGATIONS_UNREPORTED` |
//! | `mitigations_current` | – | `MITIGATIONS_CURRENT_MISSING` `MITIGATIONS_UNREPORTED` |
//! | `guest_policy_bits` | – | `GUEST_POLICY_BIT_MISSING` `GUEST_POLICY_BIT_FORBIDDEN` |
//! | `guest_policy_abi` | – | `GUEST_POLICY_ABI_TOO_LOW` |
//! | `platform_bits` | – | `PLATFORM_BIT_MISSING` `PLATFORM_BIT_FORBIDDEN` |
//! | `migration_agent` | – | `MIGRATION_AGENT_BOUND` |
//! | `host_data` | – | `HOST_DATA_NOT_ALLOWED` |
//! | `family_id` | – | `FAMILY_ID_NOT_ALLOWED` |
//! | `image_id` | – | `IMAGE_ID_NOT_ALLOWED` |
//! | `guest_svn` | – | `GUEST_SVN_TOO_LOW` |
//! | `id_key` | – | `ID_KEY_MISSING` `ID_KEY_NOT_ALLOWED` |
//! | `author_key` | – | `AUTHOR_KEY_MISSING` `AUTHOR_KEY_NOT_ALLOWED` |
//!
//! What needs the leaf, or the report, and has none says `LEAF_UNREADABLE` or `REPORT_UNREADABLE`.
//! Below the floor, a check that the policy does not ask for is listed as not checked.

mod certificates;
mod measurement;
mod owner;

pub use certificates::SnpVerifier;
pub(super) use certificates::{ChainFinding, DateFinding};

use super::floor;
use super::policy::OwnerPolicy;
use super::verdict::{Check, Verdict};
use crate::reference::ReferenceValues;
use crate::report::{Report, ReportError};
use owner::Owner;
use std::time::SystemTime;

/// What came from the host.
#[derive(Debug, Clone, Copy)]
pub struct SnpEvidence<'a> {
    /// The report, 1184 bytes.
    pub report: &'a [u8],
    /// The VCEK or VLEK certificate, DER or PEM.
    pub leaf: &'a [u8],
    /// Certificates above the leaf, DER or PEM, in any order: ASK or ASVK, and for an emulated
    /// platform its root. Without an intermediate among them AMD's own are taken, which come with
    /// this crate.
    pub certificates: &'a [Vec<u8>],
    /// A revocation list of the root, DER or PEM.
    pub crl: Option<&'a [u8]>,
}

/// What a report is held against, besides the policy.
#[derive(Debug, Clone, Copy)]
pub struct Expectation<'a> {
    /// What report_data must be; without one, freshness is not checked and the verdict says so.
    pub nonce: Option<&'a Nonce>,
    /// Reference values that were believed when they were opened. They count only where the policy
    /// names enough of their signers.
    pub references: &'a [ReferenceValues],
    /// The time at which certificates and lists must be in force.
    pub clock: SystemTime,
}

/// What a verifier sent and wants to find in report_data: 1 to 64 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce {
    padded: [u8; 64],
    len: usize,
}

/// Why bytes are no nonce.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a nonce has 1 to 64 bytes, this one has {0}")]
pub struct NonceError(usize);

/// The verdict over `evidence`, with nothing kept from earlier ones. [`SnpVerifier`] keeps what
/// does not change.
pub fn verify_snp(
    evidence: &SnpEvidence<'_>,
    policy: &OwnerPolicy,
    expectation: &Expectation<'_>,
) -> Verdict {
    SnpVerifier::new(policy.clone()).verify(evidence, expectation)
}

impl SnpVerifier {
    /// The verdict over `evidence`.
    pub fn verify(&self, evidence: &SnpEvidence<'_>, expectation: &Expectation<'_>) -> Verdict {
        let (leaf_format, leaf) = self.leaf(evidence);
        let leaf = leaf.as_ref();
        let chain = self.chain(leaf, evidence, expectation.clock);
        let report = match Report::parse(evidence.report) {
            Ok(report) => report,
            Err(error) => return self.unreadable(&error, leaf_format, &chain),
        };
        let rules = self.policy().rules();
        let mut checks = floor::checks(&report, leaf, &chain, rules.allow_emulated);
        checks.insert(1, leaf_format);
        checks.push(chain.revocation);
        let owner = Owner {
            report: &report,
            product: floor::product_of(&report, leaf),
            leaf,
            policy: self.policy(),
            references: expectation.references,
            nonce: expectation.nonce,
            clock: expectation.clock,
        };
        checks.extend(owner.checks());
        Verdict::of(checks, &floor::FLOOR, chain.emulated)
    }

    /// The verdict over something that is no report: what could be checked, and each other check
    /// as not made.
    fn unreadable(&self, error: &ReportError, leaf: Check, chain: &ChainFinding) -> Verdict {
        let mut checks = floor::without_report(error, chain, self.policy().rules().allow_emulated);
        checks.insert(1, leaf);
        checks.push(chain.revocation.clone());
        let untouched = |name: &&str| Check::not_checked(name, "a report", "there is no report");
        checks.extend(owner::NAMES.iter().map(untouched));
        Verdict::of(checks, &floor::FLOOR, chain.emulated)
    }
}

impl Nonce {
    /// A nonce of 1 to 64 bytes; report_data must be these, and zeros behind.
    pub fn new(bytes: &[u8]) -> Result<Self, NonceError> {
        let mut padded = [0; 64];
        match padded.get_mut(..bytes.len()) {
            Some(start) if !bytes.is_empty() => start.copy_from_slice(bytes),
            _ => return Err(NonceError(bytes.len())),
        }
        Ok(Self {
            padded,
            len: bytes.len(),
        })
    }

    /// As it was given.
    pub fn as_bytes(&self) -> &[u8] {
        self.padded.get(..self.len).unwrap_or_default()
    }

    /// As report_data must be.
    pub fn padded(&self) -> [u8; 64] {
        self.padded
    }
}

/// A check that holds, or is rejected with `code`.
pub(super) fn judge(name: &str, holds: bool, expected: &str, found: String, code: &str) -> Check {
    if holds {
        Check::accepted(name, expected, found)
    } else {
        Check::rejected(name, expected, found, code)
    }
}

#[cfg(test)]
mod tests;
