//! Tokens that are believed, and those that are not.

use super::*;
use crate::verify::Check;

const NOW: Duration = Duration::from_secs(1_800_000_000);
const HOUR: Duration = Duration::from_secs(3600);

/// A P-384 key, PKCS#8.
fn p384() -> Vec<u8> {
    use ring::signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair};
    let random = ring::rand::SystemRandom::new();
    let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, &random);
    document.unwrap().as_ref().to_vec()
}

fn ed25519() -> EarKey {
    EarKey::from_pkcs8(&EarKey::generate().unwrap()).unwrap()
}

fn then() -> SystemTime {
    UNIX_EPOCH + NOW
}

fn ear(emulated: bool, more: Vec<Check>) -> Ear {
    let nonce = Nonce::new(b"a nonce of some length").unwrap();
    let names = ["report_signature", "certificate_chain", "measurement"];
    let mut checks: Vec<_> = names.map(|name| Check::accepted(name, "", "")).to_vec();
    checks.extend(more);
    let verdict = Verdict::of(checks, &names, emulated);
    let policy = OwnerPolicy::parse(b"vmpl = [0]").unwrap();
    Ear::of(&verdict, &policy, Some(&nonce), then(), HOUR).unwrap()
}

fn statuses(ear: &Ear) -> (Tier, TrustVector) {
    (ear.status, ear.appraisal().unwrap().vector)
}

#[test]
fn both_kinds_of_keys_sign_and_verify() {
    for key in [ed25519(), EarKey::from_pkcs8(&p384()).unwrap()] {
        let made = ear(false, Vec::new());
        let token = made.sign(&key).unwrap();
        let read = Ear::verify(&token, &key.verifier(), then()).unwrap();
        assert_eq!(read, made);
        let public = EarVerifier::from_public(key.verifier().public()).unwrap();
        assert_eq!(public, key.verifier());
    }
    let token = ear(false, Vec::new()).sign(&ed25519()).unwrap();
    for (other, error) in [
        (ed25519(), TokenError::Signature),
        (
            EarKey::from_pkcs8(&p384()).unwrap(),
            TokenError::Algorithm("ES384"),
        ),
    ] {
        let read = Ear::verify(&token, &other.verifier(), then());
        assert_eq!(read.err(), Some(error));
    }
    let pem = format!(
        "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
        base64::engine::general_purpose::STANDARD.encode(p384())
    );
    assert!(EarKey::from_pkcs8(pem.as_bytes()).is_ok());
    for bad in [&b""[..], b"-----BEGIN PRIVATE KEY-----", &[0x30; 64]] {
        assert!(matches!(EarKey::from_pkcs8(bad), Err(TokenError::Key(_))));
    }
}

#[test]
fn the_claims_are_those_of_the_profile() {
    let json = serde_json::to_value(ear(false, Vec::new())).unwrap();
    assert_eq!(json["eat_profile"], "tag:github.com,2023:veraison/ear");
    assert_eq!(json["iat"], NOW.as_secs());
    assert_eq!(json["exp"], NOW.as_secs() + 3600);
    assert_eq!(json["ear.status"], "affirming");
    assert_eq!(json["eat_nonce"], "YSBub25jZSBvZiBzb21lIGxlbmd0aA");
    assert!(json["ear.verifier-id"]["developer"].is_string());
    assert!(json["ear.verifier-id"]["build"].is_string());
    let cpu = &json["submods"]["cpu0"];
    assert_eq!(cpu["ear.status"], "affirming");
    assert_eq!(cpu["ear.trustworthiness-vector"]["instance-identity"], 2);
    assert_eq!(cpu["ear.trustworthiness-vector"]["executables"], 3);
    assert_eq!(cpu["ear.trustworthiness-vector"]["runtime-opaque"], 2);
    let policy = OwnerPolicy::parse(b"vmpl = [0]").unwrap();
    assert_eq!(
        cpu["ear.appraisal-policy-id"],
        format!("sha384:{}", hex::encode(policy.digest()))
    );
    assert_eq!(cpu["casemate.verdict"]["overall"], "accepted");
    assert_eq!(cpu["casemate.verdict"]["emulated"], false);
    assert_eq!(
        cpu["casemate.verdict"]["policy_sha384"],
        hex::encode(policy.digest())
    );
}

#[test]
fn the_status_is_never_better_than_the_verdict_or_the_vector() {
    let (status, vector) = statuses(&ear(true, Vec::new()));
    assert_eq!((status, vector.hardware), (Tier::Warning, 32));
    assert_eq!(vector.runtime_opaque, 0);
    assert!(ear(true, Vec::new()).appraisal().unwrap().verdict.emulated);
    for (name, claim) in [
        ("report_signature", 99),
        ("revocation", 99),
        ("leaf_chip", 99),
        ("debug_forbidden", 96),
        ("measurement_of_something_else", 0),
        ("certificate_dates", 97),
        ("tcb_reported", 32),
        ("vmpl", 32),
        ("product_allowed", 97),
    ] {
        let failed = Check::rejected(name, "", "", "CODE");
        let (status, vector) = statuses(&ear(false, vec![failed]));
        assert_eq!(status, Tier::Contraindicated, "{name}");
        let worst = [
            vector.instance_identity,
            vector.configuration,
            vector.executables,
            vector.hardware,
            vector.runtime_opaque,
        ];
        let found = worst.into_iter().max();
        assert_eq!(found, Some(claim.max(3)), "{name}");
    }
    let names = ["report_signature", "certificate_chain"];
    let mut checks = names.map(|name| Check::accepted(name, "", "")).to_vec();
    checks.push(Check::not_checked("measurement", "", ""));
    let unmeasured = Verdict::of(checks, &names, false);
    assert!(unmeasured.accepted());
    let unmeasured = Ear::of(&unmeasured, &OwnerPolicy::default(), None, then(), HOUR).unwrap();
    let (status, vector) = statuses(&unmeasured);
    assert_eq!((status, vector.executables), (Tier::None, 0));
    let open = Check::cannot_verify("something", "", "", "CODE");
    assert_eq!(statuses(&ear(false, vec![open])).0, Tier::None);
    let nothing = Verdict::of(Vec::new(), &["report_signature"], false);
    let empty = Ear::of(&nothing, &OwnerPolicy::default(), None, then(), HOUR).unwrap();
    assert_eq!(statuses(&empty).0, Tier::Contraindicated);
    let json = serde_json::to_value(empty).unwrap();
    assert!(json.get("eat_nonce").is_none());
}

#[test]
fn every_check_of_a_verdict_has_its_place_in_the_vector() {
    let names: Vec<_> = [
        &CRYPTOGRAPHIC[..],
        &INSTANCE,
        &CONFIGURATION,
        &HARDWARE,
        &[
            "debug_forbidden",
            "measurement",
            "product",
            "product_allowed",
            "emulated",
        ],
    ]
    .concat();
    let evidence = crate::verify::SnpEvidence {
        report: &[],
        leaf: &[],
        certificates: &[],
        crl: None,
    };
    let expectation = crate::verify::Expectation {
        nonce: None,
        references: &[],
        clock: then(),
    };
    let verdict = crate::verify::verify_snp(&evidence, &OwnerPolicy::default(), &expectation);
    for check in &verdict.checks {
        let places = names.iter().filter(|name| **name == check.name).count();
        assert_eq!(places, 1, "{}", check.name);
    }
    assert_eq!(verdict.checks.len(), names.len());
}

#[test]
fn tokens_that_were_changed_are_not_believed() {
    let key = ed25519();
    let made = ear(false, Vec::new());
    let token = made.sign(&key).unwrap();
    let believe = |token: &str, now| Ear::verify(token, &key.verifier(), now);
    assert!(believe(&token, then()).is_ok());
    for at in 0..token.len() {
        let mut bytes = token.clone().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(bytes).unwrap();
        assert!(believe(&changed, then()).is_err(), "byte {at}");
    }
    let parts: Vec<_> = token.split('.').collect();
    let with_header = |header: &str| {
        let header = URL_SAFE_NO_PAD.encode(header);
        believe(&[&header, parts[1], parts[2]].join("."), then()).err()
    };
    assert_eq!(
        with_header(r#"{"alg":"none","typ":"JWT","kid":""}"#),
        Some(TokenError::Algorithm("EdDSA"))
    );
    assert!(matches!(
        with_header(r#"{"alg":"EdDSA","typ":"JWT","kid":"","crit":["b64"]}"#),
        Some(TokenError::Malformed(_))
    ));
    assert!(matches!(believe("", then()), Err(TokenError::Malformed(_))));
    assert!(matches!(
        believe(&format!("{token}."), then()),
        Err(TokenError::Malformed(_))
    ));
    let long = "a".repeat(MAX_TOKEN_LEN + 1);
    assert!(matches!(
        believe(&long, then()),
        Err(TokenError::Malformed(_))
    ));
}

#[test]
fn dates_profile_and_nonce_are_checked() {
    let key = ed25519();
    let made = ear(false, Vec::new());
    let token = made.sign(&key).unwrap();
    let at = |now| Ear::verify(&token, &key.verifier(), now).err();
    assert_eq!(at(then() + HOUR - Duration::from_secs(1)), None);
    assert_eq!(at(then() + HOUR), Some(TokenError::Expired));
    assert_eq!(at(then() - Duration::from_secs(60)), None);
    assert_eq!(
        at(then() - Duration::from_secs(61)),
        Some(TokenError::NotYetValid)
    );
    let mut other = made.clone();
    other.eat_profile = "tag:example.com,2026:other".to_owned();
    let token = other.sign(&key).unwrap();
    assert_eq!(
        Ear::verify(&token, &key.verifier(), then()).err(),
        Some(TokenError::Profile)
    );
    let verdict = Verdict::of(Vec::new(), &[], false);
    let short = Nonce::new(b"short").unwrap();
    assert_eq!(
        Ear::of(
            &verdict,
            &OwnerPolicy::default(),
            Some(&short),
            then(),
            HOUR
        )
        .err(),
        Some(TokenError::NonceTooShort(5))
    );
}
