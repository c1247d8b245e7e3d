//! The verdict over a measured SEV or SEV-ES launch.
//!
//! All evidence comes from the host, which is what the owner does *not* trust: certificates,
//! version, policy and measure are claims until a check binds them. A floor that no expectation
//! can loosen: the chain ends at a pinned (or named emulated) root, debug is forbidden, and
//! emulated platforms are refused unless allowed. A verdict is accepted only if every check was
//! made and passed.

use super::verdict::{Check, Verdict};
use crate::legacy::chain::{ChainError, VerifiedChain};
use crate::legacy::measure::MeasureBlob;
use crate::legacy::policy::{ApiVersion, GuestPolicy, PolicyFlag};
use crate::legacy::session::OwnerSession;
use crate::measure::LaunchDigest;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// What the host shows for a measured launch.
#[derive(Debug, Clone)]
pub struct SevLaunchEvidence<'a> {
    /// The platform's chain, verified or not.
    pub platform: PlatformEvidence<'a>,
    /// What LAUNCH_MEASURE returned.
    pub measurement: MeasureBlob,
    /// The firmware API that the host reports.
    pub api: ApiVersion,
    /// The firmware build that the host reports.
    pub build: u8,
    /// The guest policy that the host reports.
    pub policy: GuestPolicy,
    /// What the host says it loaded, if it says so. Unproven: it only helps to word a mismatch.
    pub claimed_components: Vec<Component>,
}

/// How far the platform's chain has come.
#[derive(Debug, Clone, Copy)]
pub enum PlatformEvidence<'a> {
    /// The chain verified.
    Verified(&'a VerifiedChain),
    /// The chain did not verify.
    Failed(&'a ChainError),
    /// The host showed no chain.
    Missing,
}

/// What the owner expects of a launch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SevLaunchExpected {
    /// The launch digest that the description leads to.
    pub digest: LaunchDigest,
    /// The pieces the digest is made of, in load order.
    #[serde(default)]
    pub components: Vec<Component>,
    /// The policy the guest must run under.
    pub policy: GuestPolicy,
    /// The lowest firmware API that is accepted.
    pub min_api: ApiVersion,
    /// Whether a software secure processor is accepted.
    #[serde(default)]
    pub allow_emulated: bool,
}

/// One loaded piece: firmware, kernel, initrd, command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Component {
    /// What it is.
    pub name: String,
    /// SHA-256 of its bytes as loaded.
    pub digest: LaunchDigest,
}

/// Judges a measured SEV launch for the owner of `session`.
pub fn verify_sev_launch(
    evidence: &SevLaunchEvidence<'_>,
    expected: &SevLaunchExpected,
    session: &OwnerSession,
) -> Verdict {
    let checks = vec![
        check_chain(evidence.platform),
        check_emulated(evidence.platform, expected.allow_emulated),
        check_session_platform(evidence.platform, session),
        check_api(evidence, expected),
        check_policy(evidence, expected, session),
        check_debug(evidence.policy),
        check_measurement(evidence, expected, session),
    ];
    // What cannot be verified counts as emulated only where it is known to be.
    let emulated =
        matches!(evidence.platform, PlatformEvidence::Verified(chain) if chain.emulated());
    Verdict::of(checks, &REQUIRED, emulated)
}

pub(super) fn check_chain(platform: PlatformEvidence<'_>) -> Check {
    let expected = "every signature up to a pinned AMD root or a named emulated root";
    match platform {
        PlatformEvidence::Verified(chain) => Check::accepted(
            PLATFORM_CHAIN,
            expected,
            format!("verified, root {:?}", chain.root()),
        ),
        PlatformEvidence::Failed(error) => {
            let code = match error {
                ChainError::UntrustedRoot { .. } => "PLATFORM_ROOT_UNTRUSTED",
                _ => "PLATFORM_CHAIN_INVALID",
            };
            Check::rejected(PLATFORM_CHAIN, expected, error.to_string(), code)
        }
        PlatformEvidence::Missing => {
            Check::cannot_verify(PLATFORM_CHAIN, expected, NO_CHAIN, PLATFORM_UNKNOWN)
        }
    }
}

pub(super) fn check_emulated(platform: PlatformEvidence<'_>, allowed: bool) -> Check {
    let expected = if allowed {
        "AMD's secure processor, or a software one (allowed)"
    } else {
        "AMD's secure processor"
    };
    match platform {
        PlatformEvidence::Verified(chain) if !chain.emulated() => {
            Check::accepted(EMULATED, expected, "AMD's secure processor")
        }
        PlatformEvidence::Verified(_) if allowed => {
            Check::accepted(EMULATED, expected, "a software secure processor: emulated")
        }
        PlatformEvidence::Verified(_) => Check::rejected(
            EMULATED,
            expected,
            "a software secure processor: emulated; it protects nothing from its host",
            "EMULATED_NOT_ALLOWED",
        ),
        _ => Check::cannot_verify(EMULATED, expected, NO_CHAIN, PLATFORM_UNKNOWN),
    }
}

fn check_session_platform(platform: PlatformEvidence<'_>, session: &OwnerSession) -> Check {
    let expected = format!("PDH {}", hex::encode(session.platform()));
    match platform {
        PlatformEvidence::Verified(chain) => {
            let found = chain.pdh().fingerprint();
            let text = format!("PDH {}", hex::encode(found));
            if found == session.platform() {
                Check::accepted(SESSION_PLATFORM, &expected, text)
            } else {
                Check::rejected(
                    SESSION_PLATFORM,
                    &expected,
                    text,
                    "SESSION_PLATFORM_MISMATCH",
                )
            }
        }
        _ => Check::cannot_verify(SESSION_PLATFORM, &expected, NO_CHAIN, PLATFORM_UNKNOWN),
    }
}

fn check_api(evidence: &SevLaunchEvidence<'_>, expected: &SevLaunchExpected) -> Check {
    let least = expected.min_api.max(expected.policy.min_api());
    let text = format!("firmware API of at least {least}");
    let found = format!("{} build {}", evidence.api, evidence.build);
    if evidence.api >= least {
        Check::accepted(FIRMWARE_API, &text, found)
    } else {
        Check::rejected(FIRMWARE_API, &text, found, "FIRMWARE_API_TOO_OLD")
    }
}

fn check_policy(
    evidence: &SevLaunchEvidence<'_>,
    expected: &SevLaunchExpected,
    session: &OwnerSession,
) -> Check {
    let (text, found) = (expected.policy.to_string(), evidence.policy.to_string());
    if evidence.policy != expected.policy {
        return Check::rejected(GUEST_POLICY, &text, found, "GUEST_POLICY_MISMATCH");
    }
    if session.policy() != expected.policy {
        let found = format!("the session was opened for {}", session.policy());
        return Check::rejected(GUEST_POLICY, &text, found, "SESSION_POLICY_MISMATCH");
    }
    Check::accepted(GUEST_POLICY, &text, found)
}

pub(super) fn check_debug(policy: GuestPolicy) -> Check {
    let expected = "debugging forbidden (NODBG)";
    if policy.has(PolicyFlag::NoDebug) {
        Check::accepted(DEBUG, expected, policy.to_string())
    } else {
        let found = format!("{policy}: the host may read guest memory with debug commands");
        Check::rejected(DEBUG, expected, found, "DEBUG_ALLOWED")
    }
}

fn check_measurement(
    evidence: &SevLaunchEvidence<'_>,
    expected: &SevLaunchExpected,
    session: &OwnerSession,
) -> Check {
    let (api, build) = (evidence.api, evidence.build);
    let measured = &evidence.measurement;
    let wanted = session.expected_measure(&expected.digest, api, build, &measured.mnonce);
    let mut text = format!(
        "measure {} of digest {}",
        hex::encode(wanted),
        expected.digest
    );
    for component in &expected.components {
        let _ = write!(text, "; {} {}", component.name, component.digest);
    }
    let mut found = format!("measure {}", hex::encode(measured.measure));
    if session.measure_fits(&expected.digest, api, build, measured) {
        return Check::accepted(LAUNCH_MEASUREMENT, &text, found);
    }
    found.push_str(
        "; a keyed measure does not show which bytes differ, only that something does: what was \
         loaded or in which order, the firmware version, the policy, or the platform",
    );
    found.push_str(&differing_claims(
        &expected.components,
        &evidence.claimed_components,
    ));
    Check::rejected(
        LAUNCH_MEASUREMENT,
        &text,
        found,
        "LAUNCH_MEASUREMENT_MISMATCH",
    )
}

/// What the host itself admits to have loaded otherwise.
fn differing_claims(expected: &[Component], claimed: &[Component]) -> String {
    let mut text = String::new();
    for want in expected {
        let same_name = claimed.iter().find(|claim| claim.name == want.name);
        if let Some(claim) = same_name.filter(|claim| claim.digest != want.digest) {
            let _ = write!(
                text,
                "; the host says (unproven) that its {} is {}, expected {}",
                want.name, claim.digest, want.digest
            );
        }
    }
    text
}

pub(super) const PLATFORM_CHAIN: &str = "platform_chain";
pub(super) const EMULATED: &str = "emulated";
const SESSION_PLATFORM: &str = "session_platform";
const FIRMWARE_API: &str = "firmware_api";
pub(super) const GUEST_POLICY: &str = "guest_policy";
pub(super) const DEBUG: &str = "debug_forbidden";
const LAUNCH_MEASUREMENT: &str = "launch_measurement";
const REQUIRED: [&str; 7] = [
    PLATFORM_CHAIN,
    EMULATED,
    SESSION_PLATFORM,
    FIRMWARE_API,
    GUEST_POLICY,
    DEBUG,
    LAUNCH_MEASUREMENT,
];
pub(super) const PLATFORM_UNKNOWN: &str = "PLATFORM_UNKNOWN";
pub(super) const NO_CHAIN: &str = "no verified platform chain";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::TrustAnchors;
    use crate::verify::Outcome;

    use crate::legacy::measure::launch_measure;
    use crate::legacy::session::OwnerSession;
    use crate::processor::testing;

    struct Case {
        chain: VerifiedChain,
        session: OwnerSession,
        expected: SevLaunchExpected,
    }

    const API: ApiVersion = ApiVersion::new(1, 55);

    fn chain_of(identity: &crate::processor::Identity) -> VerifiedChain {
        let trust = TrustAnchors::amd()
            .with_emulated_root(identity.root_fingerprint())
            .unwrap();
        identity.chain().verify(&trust).unwrap()
    }

    fn case(flags: &[PolicyFlag]) -> Case {
        let chain = chain_of(testing::identity());
        let policy = GuestPolicy::new(flags, ApiVersion::new(1, 0));
        let (_, session) = OwnerSession::create(&chain, policy).unwrap();
        let kernel = Component {
            name: "kernel".into(),
            digest: LaunchDigest::of(b"kernel"),
        };
        let expected = SevLaunchExpected {
            digest: kernel.digest,
            components: vec![kernel],
            policy,
            min_api: ApiVersion::new(1, 51),
            allow_emulated: true,
        };
        Case {
            chain,
            session,
            expected,
        }
    }

    impl Case {
        fn evidence(&self) -> SevLaunchEvidence<'_> {
            let policy = self.session.policy();
            let mnonce = [5; 16];
            let measure = self
                .session
                .expected_measure(&self.expected.digest, API, 1, &mnonce);
            SevLaunchEvidence {
                platform: PlatformEvidence::Verified(&self.chain),
                measurement: MeasureBlob { measure, mnonce },
                api: API,
                build: 1,
                policy,
                claimed_components: Vec::new(),
            }
        }

        fn judge(&self, evidence: &SevLaunchEvidence<'_>) -> Verdict {
            verify_sev_launch(evidence, &self.expected, &self.session)
        }
    }

    fn codes(verdict: &Verdict) -> Vec<&str> {
        verdict
            .failures()
            .filter_map(|check| check.code.as_deref())
            .collect()
    }

    #[test]
    fn the_expected_launch_is_accepted_and_says_emulated() {
        let case = case(&[PolicyFlag::NoDebug]);
        let verdict = case.judge(&case.evidence());
        assert!(verdict.accepted(), "{verdict:?}");
        assert!(verdict.emulated);
        assert_eq!(verdict.checks.len(), REQUIRED.len());
        let json = serde_json::to_value(&verdict).unwrap();
        assert_eq!(json["overall"], "accepted");
        assert_eq!(json["emulated"], true);
    }

    #[test]
    fn emulated_is_refused_unless_allowed() {
        let mut case = case(&[PolicyFlag::NoDebug]);
        case.expected.allow_emulated = false;
        let verdict = case.judge(&case.evidence());
        assert_eq!(verdict.overall, Outcome::Rejected);
        assert_eq!(codes(&verdict), ["EMULATED_NOT_ALLOWED"]);
    }

    #[test]
    fn debug_is_refused_even_where_it_is_expected() {
        let case = case(&[PolicyFlag::NoSend]);
        assert_eq!(codes(&case.judge(&case.evidence())), ["DEBUG_ALLOWED"]);
    }

    #[test]
    fn another_kernel_is_named_as_far_as_it_can_be() {
        let case = case(&[PolicyFlag::NoDebug]);
        let mut evidence = case.evidence();
        evidence.measurement.measure[0] ^= 1;
        evidence.claimed_components = vec![Component {
            name: "kernel".into(),
            digest: LaunchDigest::of(b"kernel!"),
        }];
        let verdict = case.judge(&evidence);
        assert_eq!(verdict.overall, Outcome::Rejected);
        assert_eq!(codes(&verdict), ["LAUNCH_MEASUREMENT_MISMATCH"]);
        let check = verdict.failures().next().unwrap();
        assert!(
            check
                .expected
                .contains(&hex::encode(case.evidence().measurement.measure))
        );
        assert!(check.found.contains("its kernel is"), "{}", check.found);
    }

    #[test]
    fn every_claim_in_the_measure_counts() {
        type Change = fn(&mut SevLaunchEvidence<'_>);
        let case = case(&[PolicyFlag::NoDebug]);
        let changes: [(&str, Change); 4] = [
            ("nonce", |evidence| evidence.measurement.mnonce[0] ^= 1),
            ("api", |evidence| evidence.api.minor += 1),
            ("build", |evidence| evidence.build += 1),
            ("measure", |evidence| {
                evidence.measurement.measure[31] ^= 0x80
            }),
        ];
        for (name, change) in changes {
            let mut evidence = case.evidence();
            change(&mut evidence);
            assert_eq!(
                codes(&case.judge(&evidence)),
                ["LAUNCH_MEASUREMENT_MISMATCH"],
                "{name}"
            );
        }
    }

    #[test]
    fn old_firmware_and_other_policies_are_refused() {
        let mut case = case(&[PolicyFlag::NoDebug]);
        case.expected.min_api = ApiVersion::new(1, 56);
        assert_eq!(
            codes(&case.judge(&case.evidence())),
            ["FIRMWARE_API_TOO_OLD"]
        );

        case.expected.min_api = API;
        let mut evidence = case.evidence();
        evidence.policy = GuestPolicy::new(&[], ApiVersion::new(1, 0));
        assert_eq!(
            codes(&case.judge(&evidence)),
            ["GUEST_POLICY_MISMATCH", "DEBUG_ALLOWED"]
        );

        let mut expected = case.expected.clone();
        expected.policy = GuestPolicy::new(
            &[PolicyFlag::NoDebug, PolicyFlag::NoSend],
            ApiVersion::new(1, 0),
        );
        evidence.policy = expected.policy;
        let verdict = verify_sev_launch(&evidence, &expected, &case.session);
        assert_eq!(codes(&verdict), ["SESSION_POLICY_MISMATCH"]);
    }

    #[test]
    fn without_a_good_chain_nothing_is_accepted() {
        let case = case(&[PolicyFlag::NoDebug]);
        let mut evidence = case.evidence();
        evidence.platform = PlatformEvidence::Missing;
        let verdict = case.judge(&evidence);
        assert_eq!(verdict.overall, Outcome::CannotVerify);

        let error = case
            .chain
            .certificates()
            .verify(&TrustAnchors::amd())
            .unwrap_err();
        evidence.platform = PlatformEvidence::Failed(&error);
        let verdict = case.judge(&evidence);
        assert_eq!(verdict.overall, Outcome::Rejected);
        assert!(codes(&verdict).contains(&"PLATFORM_ROOT_UNTRUSTED"));
    }

    #[test]
    fn another_platforms_chain_cannot_stand_in() {
        let case = case(&[PolicyFlag::NoDebug]);
        let other = chain_of(testing::other_identity());
        let mut evidence = case.evidence();
        evidence.platform = PlatformEvidence::Verified(&other);
        assert_eq!(codes(&case.judge(&evidence)), ["SESSION_PLATFORM_MISMATCH"]);
    }

    #[test]
    fn nothing_is_accepted_by_omission() {
        let case = case(&[PolicyFlag::NoDebug]);
        let verdict = case.judge(&case.evidence());
        let of = |checks| Verdict::of(checks, &REQUIRED, false).overall;
        assert_eq!(of(verdict.checks.clone()), Outcome::Accepted);
        for left_out in 0..verdict.checks.len() {
            let mut checks = verdict.checks.clone();
            checks.remove(left_out);
            assert_eq!(of(checks), Outcome::CannotVerify);
        }
    }

    #[test]
    fn a_host_that_makes_up_a_measure_is_refused() {
        let case = case(&[PolicyFlag::NoDebug]);
        let tik = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &[0; 16]);
        let mut evidence = case.evidence();
        let digest = &case.expected.digest;
        let mnonce = evidence.measurement.mnonce;
        evidence.measurement.measure =
            launch_measure(&tik, API, 1, evidence.policy, digest, &mnonce);
        assert_eq!(
            codes(&case.judge(&evidence)),
            ["LAUNCH_MEASUREMENT_MISMATCH"]
        );
    }
}
