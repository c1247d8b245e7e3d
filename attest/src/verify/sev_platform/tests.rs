use super::*;
use crate::measure::LaunchDigest;
use crate::processor::{Identity, testing};
use crate::verify::{CheckResult, Outcome};
use std::fs;
use std::path::Path;

/// A folder of the vectors, as far as it is filled.
fn platform(generation: &str) -> SevPlatform {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/legacy");
    let read = |name: &str| fs::read(folder.join(generation).join(name)).ok();
    let ca = |name| match read(name) {
        Some(raw) => Place::parsed(CaCertificate::parse(&raw)),
        None => Place::Missing,
    };
    let sev = |name| match read(name) {
        Some(raw) => Place::parsed(SevCertificate::parse(&raw)),
        None => Place::Missing,
    };
    SevPlatform {
        ark: ca("ark.cert"),
        ask: ca("ask.cert"),
        cek: sev("cek.cert"),
        oca: sev("oca.cert"),
        pek: sev("pek.cert"),
        pdh: sev("pdh.cert"),
    }
}

fn judge(platform: &SevPlatform) -> Verdict {
    verify_sev_platform(platform, &TrustAnchors::amd(), None)
}

fn named(identity: &Identity) -> TrustAnchors {
    TrustAnchors::amd()
        .with_emulated_root(identity.root_fingerprint())
        .unwrap()
}

/// The checks that did not pass, with their codes.
fn failures(verdict: &Verdict) -> Vec<(&str, &str)> {
    let failures = verdict.failures();
    failures
        .filter_map(|check| Some((check.name.as_str(), check.code.as_deref()?)))
        .collect()
}

#[test]
fn complete_real_platforms_are_accepted() {
    for generation in ["naples", "rome"] {
        let verdict = judge(&platform(generation));
        assert_eq!(verdict.overall, Outcome::Accepted, "{verdict:?}");
        assert_eq!(verdict.checks.len(), REQUIRED.len());
        assert!(!verdict.emulated);
    }
}

#[test]
fn amds_certificates_alone_hold_but_prove_no_platform() {
    for generation in ["milan", "genoa", "turin"] {
        let verdict = judge(&platform(generation));
        assert_eq!(verdict.overall, Outcome::CannotVerify);
        let accepted: Vec<_> = verdict
            .checks
            .iter()
            .filter(|check| check.result == CheckResult::Accepted)
            .map(|check| check.name.as_str())
            .collect();
        assert_eq!(accepted, [PLATFORM_ROOT, EMULATED, ARK_SELF, ASK_BY_ARK]);
        assert!(
            failures(&verdict)
                .iter()
                .all(|(_, code)| *code == "CERTIFICATE_MISSING")
        );
    }
}

#[test]
fn the_naples_root_without_its_signature_is_rejected() {
    let mut platform = platform("naples");
    let bad = include_bytes!("../../../tests/vectors/legacy/naples/ark.cert.bad");
    platform.ark = Place::parsed(CaCertificate::parse(bad));
    let verdict = judge(&platform);
    assert_eq!(verdict.overall, Outcome::Rejected);
    let malformed = "CERTIFICATE_MALFORMED";
    for name in [PLATFORM_ROOT, ARK_SELF, ASK_BY_ARK] {
        assert!(failures(&verdict).contains(&(name, malformed)), "{name}");
    }
    assert!(verdict.checks[0].found.contains("832"));
}

#[test]
fn each_signature_is_its_own_check() {
    type Damage = fn(&mut SevPlatform);
    fn sev(place: &mut Place<SevCertificate>, at: usize) {
        let mut raw = place.get().unwrap().as_bytes().to_vec();
        raw[at] ^= 1;
        *place = Place::parsed(SevCertificate::parse(&raw));
    }
    fn ca(place: &mut Place<CaCertificate>) {
        let mut raw = place.get().unwrap().as_bytes().to_vec();
        raw[600] ^= 1;
        *place = Place::parsed(CaCertificate::parse(&raw));
    }
    let damages: [(&str, Damage); 7] = [
        (ARK_SELF, |p| ca(&mut p.ark)),
        (ASK_BY_ARK, |p| ca(&mut p.ask)),
        (CEK_BY_ASK, |p| sev(&mut p.cek, 1060)),
        (OCA_SELF, |p| sev(&mut p.oca, 1060)),
        (PEK_BY_OCA, |p| sev(&mut p.pek, 1060)),
        (PEK_BY_CEK, |p| sev(&mut p.pek, 1580)),
        (PDH_BY_PEK, |p| sev(&mut p.pdh, 1060)),
    ];
    for (name, damage) in damages {
        let mut platform = platform("naples");
        damage(&mut platform);
        let verdict = judge(&platform);
        assert_eq!(verdict.overall, Outcome::Rejected, "{name}");
        assert_eq!(
            failures(&verdict),
            [(name, "CERTIFICATE_SIGNATURE_INVALID")]
        );
    }
}

#[test]
fn each_missing_or_misplaced_certificate_is_said() {
    let mut missing = platform("rome");
    missing.oca = Place::Missing;
    let verdict = judge(&missing);
    assert_eq!(verdict.overall, Outcome::CannotVerify);
    let code = "CERTIFICATE_MISSING";
    assert_eq!(failures(&verdict), [(OCA_SELF, code), (PEK_BY_OCA, code)]);

    let mut misplaced = platform("rome");
    misplaced.pdh = misplaced.pek.clone();
    let verdict = judge(&misplaced);
    assert_eq!(verdict.overall, Outcome::Rejected);
    assert_eq!(failures(&verdict), [(PDH_BY_PEK, "CERTIFICATE_MISPLACED")]);

    let mut foreign = platform("rome");
    foreign.ark = platform("naples").ark;
    assert_eq!(judge(&foreign).overall, Outcome::Rejected);
}

#[test]
fn an_emulated_root_counts_only_when_named_and_is_always_marked() {
    let identity = testing::identity();
    let platform = SevPlatform::from(identity.chain().clone());
    let verdict = judge(&platform);
    assert_eq!(verdict.overall, Outcome::Rejected);
    assert!(failures(&verdict).contains(&(PLATFORM_ROOT, "PLATFORM_ROOT_UNTRUSTED")));
    assert!(verdict.emulated);

    let verdict = verify_sev_platform(&platform, &named(identity), None);
    assert_eq!(verdict.overall, Outcome::Accepted, "{verdict:?}");
    assert!(verdict.emulated);

    let other = verify_sev_platform(&platform, &named(testing::other_identity()), None);
    assert_eq!(other.overall, Outcome::Rejected);
}

#[test]
fn a_report_is_judged_under_the_platform_that_made_it() {
    let identity = testing::identity();
    let policy = crate::legacy::GuestPolicy::from_raw(1).unwrap();
    let digest = LaunchDigest::of(b"guest");
    let report = SevReport::sign(identity.pek_key(), &[3; 16], &digest, policy).unwrap();
    let expected = SevReportExpected {
        nonce: [3; 16],
        digest,
        policy: None,
        allow_emulated: true,
    };
    let judge = |platform: &SevPlatform, expected: &SevReportExpected| {
        let trust = named(identity)
            .with_emulated_root(testing::other_identity().root_fingerprint())
            .unwrap();
        verify_sev_platform(platform, &trust, Some((&report, expected)))
    };
    let platform = SevPlatform::from(identity.chain().clone());
    assert_eq!(judge(&platform, &expected).overall, Outcome::Accepted);

    let forbidden = SevReportExpected {
        allow_emulated: false,
        ..expected.clone()
    };
    assert_eq!(
        failures(&judge(&platform, &forbidden)),
        [(EMULATED, "EMULATED_NOT_ALLOWED")]
    );
    let other = SevPlatform::from(testing::other_identity().chain().clone());
    assert_eq!(
        failures(&judge(&other, &expected)),
        [("report_signature", "SEV_REPORT_SIGNATURE_INVALID")]
    );
    let mut partial = platform.clone();
    partial.cek = Place::Missing;
    let verdict = judge(&partial, &expected);
    assert_eq!(verdict.overall, Outcome::CannotVerify);
    assert!(failures(&verdict).contains(&("report_signature", "PLATFORM_UNKNOWN")));
}
