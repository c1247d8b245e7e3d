//! The verdict over a 208-byte SEV or SEV-ES attestation report.
//!
//! The host asks its firmware for the report and hands it on, so everything is a claim until the
//! PEK's signature, and the chain above it, bind it. The nonce makes it fresh; without nonce and
//! digest there is nothing to accept, so both are always expected.

use super::sev::{
    DEBUG, EMULATED, GUEST_POLICY, NO_CHAIN, PLATFORM_CHAIN, PLATFORM_UNKNOWN, PlatformEvidence,
    check_chain, check_debug, check_emulated,
};
use super::verdict::{Check, Verdict};
use crate::legacy::policy::GuestPolicy;
use crate::legacy::report::SevReport;
use crate::measure::LaunchDigest;
use subtle::ConstantTimeEq as _;

/// What the host shows for a running guest.
#[derive(Debug, Clone, Copy)]
pub struct SevReportEvidence<'a> {
    /// The platform's chain, verified or not.
    pub platform: PlatformEvidence<'a>,
    /// The report.
    pub report: &'a SevReport,
}

/// What the owner expects of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SevReportExpected {
    /// The nonce the owner chose for this report.
    pub nonce: [u8; 16],
    /// The launch digest that the description leads to.
    pub digest: LaunchDigest,
    /// The policy the guest must run under; not compared where there is none, but debugging is
    /// refused all the same.
    pub policy: Option<GuestPolicy>,
    /// Whether a software secure processor is accepted.
    pub allow_emulated: bool,
}

/// Judges a report.
pub fn verify_sev_report(
    evidence: &SevReportEvidence<'_>,
    expected: &SevReportExpected,
) -> Verdict {
    let platform = evidence.platform;
    let mut checks = vec![
        check_chain(platform),
        check_emulated(platform, expected.allow_emulated),
    ];
    checks.extend(report_checks(evidence, expected));
    let emulated = matches!(platform, PlatformEvidence::Verified(chain) if chain.emulated());
    let required = [&[PLATFORM_CHAIN, EMULATED][..], &REPORT_CHECKS].concat();
    Verdict::of(checks, &required, emulated)
}

/// What is to be said of the report itself.
pub(super) fn report_checks(
    evidence: &SevReportEvidence<'_>,
    expected: &SevReportExpected,
) -> Vec<Check> {
    let report = evidence.report;
    vec![
        check_signature(evidence),
        check_nonce(report, &expected.nonce),
        check_digest(report, &expected.digest),
        check_policy(report.policy(), expected.policy),
        check_debug(report.policy()),
    ]
}

fn check_signature(evidence: &SevReportEvidence<'_>) -> Check {
    let expected = "the signature of the verified platform's PEK";
    let PlatformEvidence::Verified(chain) = evidence.platform else {
        return Check::cannot_verify(REPORT_SIGNATURE, expected, NO_CHAIN, PLATFORM_UNKNOWN);
    };
    match evidence.report.verify_signed_by(chain.pek()) {
        Ok(()) => {
            let pek = hex::encode(chain.pek().fingerprint());
            Check::accepted(REPORT_SIGNATURE, expected, format!("signed by PEK {pek}"))
        }
        Err(error) => Check::rejected(REPORT_SIGNATURE, expected, error.to_string(), error.code()),
    }
}

fn check_nonce(report: &SevReport, nonce: &[u8; 16]) -> Check {
    let (expected, found) = (hex::encode(nonce), hex::encode(report.mnonce()));
    if bool::from(report.mnonce().ct_eq(nonce)) {
        Check::accepted(NONCE, &expected, found)
    } else {
        Check::rejected(NONCE, &expected, found, "NONCE_MISMATCH")
    }
}

fn check_digest(report: &SevReport, digest: &LaunchDigest) -> Check {
    let (expected, found) = (digest.to_string(), report.digest().to_string());
    if report.digest() == *digest {
        Check::accepted(LAUNCH_DIGEST, &expected, found)
    } else {
        Check::rejected(LAUNCH_DIGEST, &expected, found, "LAUNCH_DIGEST_MISMATCH")
    }
}

fn check_policy(found: GuestPolicy, expected: Option<GuestPolicy>) -> Check {
    let text = found.to_string();
    match expected {
        None => Check::not_checked(GUEST_POLICY, "no expectation was given", text),
        Some(policy) if policy == found => Check::accepted(GUEST_POLICY, &policy.to_string(), text),
        Some(policy) => Check::rejected(
            GUEST_POLICY,
            &policy.to_string(),
            text,
            "GUEST_POLICY_MISMATCH",
        ),
    }
}

const REPORT_SIGNATURE: &str = "report_signature";
const NONCE: &str = "nonce";
const LAUNCH_DIGEST: &str = "launch_digest";

/// The report's checks that have to pass.
pub(super) const REPORT_CHECKS: [&str; 4] = [REPORT_SIGNATURE, NONCE, LAUNCH_DIGEST, DEBUG];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::{ApiVersion, PolicyFlag, TrustAnchors, VerifiedChain};
    use crate::processor::testing;
    use crate::verify::Outcome;

    const NONCE_SENT: [u8; 16] = [9; 16];

    fn chain(identity: &crate::processor::Identity) -> VerifiedChain {
        let trust = TrustAnchors::amd()
            .with_emulated_root(identity.root_fingerprint())
            .unwrap();
        identity.chain().verify(&trust).unwrap()
    }

    fn policy(flags: &[PolicyFlag]) -> GuestPolicy {
        GuestPolicy::new(flags, ApiVersion::new(1, 55))
    }

    fn report(policy: GuestPolicy) -> SevReport {
        let key = testing::identity().pek_key();
        SevReport::sign(key, &NONCE_SENT, &LaunchDigest::of(b"kernel"), policy).unwrap()
    }

    fn expected() -> SevReportExpected {
        SevReportExpected {
            nonce: NONCE_SENT,
            digest: LaunchDigest::of(b"kernel"),
            policy: Some(policy(&[PolicyFlag::NoDebug])),
            allow_emulated: true,
        }
    }

    fn judge(report: &SevReport, expected: &SevReportExpected) -> Verdict {
        let chain = chain(testing::identity());
        let platform = PlatformEvidence::Verified(&chain);
        verify_sev_report(&SevReportEvidence { platform, report }, expected)
    }

    fn codes(verdict: &Verdict) -> Vec<&str> {
        let failures = verdict.failures();
        failures.filter_map(|check| check.code.as_deref()).collect()
    }

    #[test]
    fn the_expected_report_is_accepted_and_says_emulated() {
        let verdict = judge(&report(policy(&[PolicyFlag::NoDebug])), &expected());
        assert_eq!(verdict.overall, Outcome::Accepted, "{verdict:?}");
        assert!(verdict.emulated);
        assert_eq!(verdict.checks.len(), 7);
    }

    #[test]
    fn each_expectation_counts() {
        type Change = fn(&mut SevReportExpected);
        let report = report(policy(&[PolicyFlag::NoDebug]));
        let changes: [(&str, Change); 4] = [
            ("NONCE_MISMATCH", |e| e.nonce[15] ^= 1),
            ("LAUNCH_DIGEST_MISMATCH", |e| {
                e.digest = LaunchDigest::of(b"other");
            }),
            ("GUEST_POLICY_MISMATCH", |e| e.policy = Some(policy(&[]))),
            ("EMULATED_NOT_ALLOWED", |e| e.allow_emulated = false),
        ];
        for (code, change) in changes {
            let mut expected = expected();
            change(&mut expected);
            let verdict = judge(&report, &expected);
            assert_eq!(verdict.overall, Outcome::Rejected);
            assert_eq!(codes(&verdict), [code]);
        }
    }

    #[test]
    fn debug_is_refused_even_where_nobody_asks() {
        let mut expected = expected();
        expected.policy = None;
        let verdict = judge(&report(policy(&[])), &expected);
        assert_eq!(codes(&verdict), ["DEBUG_ALLOWED"]);
        let verdict = judge(&report(policy(&[PolicyFlag::NoDebug])), &expected);
        assert_eq!(verdict.overall, Outcome::Accepted);
        assert_eq!(verdict.not_checked().count(), 1);
    }

    #[test]
    fn another_platforms_report_is_refused() {
        let chain = chain(testing::other_identity());
        let report = report(policy(&[PolicyFlag::NoDebug]));
        let evidence = SevReportEvidence {
            platform: PlatformEvidence::Verified(&chain),
            report: &report,
        };
        let verdict = verify_sev_report(&evidence, &expected());
        assert_eq!(codes(&verdict), ["SEV_REPORT_SIGNATURE_INVALID"]);
    }

    #[test]
    fn without_a_chain_nothing_is_accepted() {
        let report = report(policy(&[PolicyFlag::NoDebug]));
        let evidence = SevReportEvidence {
            platform: PlatformEvidence::Missing,
            report: &report,
        };
        let verdict = verify_sev_report(&evidence, &expected());
        assert_eq!(verdict.overall, Outcome::CannotVerify);
        assert!(codes(&verdict).contains(&"PLATFORM_UNKNOWN"));
    }
}
