//! Revocation lists that are withheld, old, or somebody else's.

use super::*;
use casemate_attest::processor::snp::forge::{DAY, Signer, ago};

const REQUIRED: &str = "[crl]\nmode = \"required\"\nmax_age_days = 7";

fn with_list(crl: Vec<u8>) -> Evidence {
    let mut evidence = milan(|_| {});
    evidence.crl = Some(crl);
    evidence
}

#[test]
fn a_list_withheld_where_it_is_required() {
    with_list(Authority::shared().crl(|_| {})).accepted(REQUIRED);
    let verdict = milan(|_| {}).verdict(&allowing(REQUIRED), None);
    assert_eq!(codes(&verdict), ["CRL_MISSING"]);
    assert_eq!(verdict.overall, Outcome::CannotVerify);
    // An empty file is no list, and not the absence of one.
    with_list(Vec::new()).refused("", &["CRL_MALFORMED"]);
}

#[test]
fn the_list_of_another_products_root() {
    with_list(Authority::shared().crl(|_| {})).accepted(REQUIRED);
    let other = Authority::shared().crl(|spec| {
        spec.issuer = spec.issuer.replace("ARK-EMULATED", "ARK-Genoa");
    });
    with_list(other).refused(REQUIRED, &["CRL_WRONG_ISSUER"]);
    // A list of a good name by the ASVK's key.
    let by_asvk = Authority::shared().crl_by(Signer::Asvk, |_| {});
    with_list(by_asvk).refused(REQUIRED, &["CRL_SIGNATURE"]);
}

/// A revocation stays one although the list that says it is out of date.
#[test]
fn a_revoking_list_that_was_left_to_age() {
    let authority = Authority::shared();
    with_list(authority.crl(|_| {})).accepted(REQUIRED);
    for revoked in [Signer::Ark, Signer::Ask] {
        let aged = authority.crl(|spec| {
            spec.this_update = ago(60 * DAY);
            spec.next_update = Some(ago(30 * DAY));
            spec.revoked.push(revoked.serial());
        });
        with_list(aged).refused("", &["CRL_REVOKED"]);
    }
    // The ASVK's revocation is none of a VCEK's.
    let other = authority.crl(|spec| spec.revoked.push(Signer::Asvk.serial()));
    with_list(other).accepted("");
}

/// A verifier that keeps what it has checked is given an older list, and a revoking one.
#[test]
fn a_verifier_that_believed_a_good_list_before() {
    let authority = Authority::shared();
    let verifier = SnpVerifier::new(allowing(REQUIRED));
    let judge = |evidence: &Evidence| {
        let expectation = Expectation {
            nonce: None,
            references: &[],
            clock: SystemTime::now(),
        };
        verifier.verify(&evidence.evidence(), &expectation)
    };
    let good = with_list(authority.crl(|_| {}));
    let old = with_list(authority.crl(|spec| spec.this_update = ago(8 * DAY)));
    let revoking = with_list(authority.crl(|spec| spec.revoked.push(Signer::Ask.serial())));
    for _ in 0..2 {
        assert!(judge(&good).accepted());
        assert_eq!(codes(&judge(&old)), ["CRL_TOO_OLD"]);
        assert_eq!(codes(&judge(&revoking)), ["CRL_REVOKED"]);
        assert_eq!(codes(&judge(&milan(|_| {}))), ["CRL_MISSING"]);
    }
}
