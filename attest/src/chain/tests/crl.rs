//! Revocation lists of an emulated root, at a clock in the middle of their life.

use super::faults::{issuer, now};
use super::forge::*;
use super::{NO_LIST, at};
use crate::chain::*;
use crate::product::Product;
use crate::report::SigningKey;
use std::time::Duration;

fn outcome(list: &List, key: &CaKey) -> CrlOutcome {
    let crl = Crl::parse(&list.signed_by(key)).unwrap();
    let list = Revocation {
        crl: Some(&crl),
        ..Revocation::default()
    };
    list.outcome(&leaf(), &issuer(SigningKey::Vcek), now())
}

fn leaf() -> Leaf {
    let der = Template::leaf(Product::Milan, SigningKey::Vcek).signed_by(&ASK);
    Leaf::parse(&der).unwrap()
}

fn refusal(list: &List) -> &'static str {
    Crl::parse(&list.signed_by(&ROOT)).unwrap_err().code()
}

#[test]
fn a_good_list_says_what_it_covers() {
    let crl = Crl::parse(&List::empty().signed_by(&ROOT)).unwrap();
    let list = Revocation {
        crl: Some(&crl),
        ..Revocation::default()
    };
    let below = issuer(SigningKey::Vcek);
    let verified = verify(&leaf(), &below, &list, now()).unwrap();
    let good = CrlOutcome::Good {
        this_update: at("2026-01-01T00:00:00Z"),
        next_update: at("2026-02-01T00:00:00Z"),
        number: Some("7".into()),
        leaf_looked_up: false,
    };
    assert_eq!(verified.crl(), &good);
    // The second time the signature is known.
    assert_eq!(list.outcome(&leaf(), &below, now()), good);
    let numbered = Template {
        serial: vec![9],
        ..Template::leaf(Product::Milan, SigningKey::Vcek)
    };
    let numbered = Leaf::parse(&numbered.signed_by(&ASK)).unwrap();
    let CrlOutcome::Good { leaf_looked_up, .. } = list.outcome(&numbered, &below, now()) else {
        panic!("not good");
    };
    assert!(leaf_looked_up);
}

#[test]
fn absence_is_never_good() {
    let below = issuer(SigningKey::Vcek);
    let required = Revocation::default();
    let refused = verify(&leaf(), &below, &required, now()).unwrap_err();
    assert_eq!(refused, ChainError::Revocation(CrlOutcome::Absent));
    let verified = verify(&leaf(), &below, &NO_LIST, now()).unwrap();
    assert_eq!(verified.crl(), &CrlOutcome::Absent);
    let again = verified.recheck(&required, now()).unwrap_err();
    assert_eq!(again.code(), "CRL_ABSENT");
}

#[test]
fn a_list_that_is_there_has_to_be_good_in_either_mode() {
    let list = List {
        revoked: vec![vec![0x01, 0x00, 0x01]],
        ..List::empty()
    };
    let crl = Crl::parse(&list.signed_by(&ROOT)).unwrap();
    for mode in [CrlMode::Required, CrlMode::IfPresent] {
        let list = Revocation {
            mode,
            crl: Some(&crl),
            max_age: None,
        };
        let refused = verify(&leaf(), &issuer(SigningKey::Vcek), &list, now()).unwrap_err();
        assert_eq!(refused.code(), "CRL_REVOKED");
    }
}

#[test]
fn revoked_serials_are_found_at_each_link() {
    let with = |serial: &[u8]| {
        let list = List {
            revoked: vec![vec![5], serial.to_vec()],
            ..List::empty()
        };
        outcome(&list, &ROOT)
    };
    let since = at("2026-01-10T00:00:00Z");
    for (serial, link) in [(&[1, 0, 0], Link::Root), (&[1, 0, 1], Link::Intermediate)] {
        let CrlOutcome::Revoked {
            link: found,
            since: when,
            serial: number,
        } = with(serial)
        else {
            panic!("{link} not found");
        };
        assert_eq!((found, when), (link, since));
        assert_eq!(number.as_bytes(), serial);
    }
    assert_eq!(with(&[1, 0, 2]).code(), "CRL_GOOD");
    // An entry for 0 does not revoke every leaf there is.
    assert_eq!(with(&[0]).code(), "CRL_GOOD");
    let list = List {
        revoked: vec![vec![0, 0x99]],
        ..List::empty()
    };
    let crl = Crl::parse(&list.signed_by(&ROOT)).unwrap();
    let leaf = Template {
        serial: vec![0, 0x99],
        ..Template::leaf(Product::Milan, SigningKey::Vcek)
    };
    let leaf = Leaf::parse(&leaf.signed_by(&ASK)).unwrap();
    let list = Revocation {
        crl: Some(&crl),
        ..Revocation::default()
    };
    let found = list.outcome(&leaf, &issuer(SigningKey::Vcek), now());
    assert!(matches!(
        found,
        CrlOutcome::Revoked {
            link: Link::Leaf,
            ..
        }
    ));
}

#[test]
fn a_list_is_its_roots_own() {
    assert_eq!(outcome(&List::empty(), &STRANGER), CrlOutcome::BadSignature);
    let foreign = List {
        issuer: name("ARK-Milan", "Advanced Micro Devices"),
        ..List::empty()
    };
    assert_eq!(outcome(&foreign, &ROOT), CrlOutcome::WrongIssuer);
    let crl = Crl::parse(&List::empty().signed_by(&ROOT)).unwrap();
    assert!(!crl.is_signed_under(&SnpTrust::amd()));
    // Found good under one root, it is still not good under another of the same name.
    let list = Revocation {
        crl: Some(&crl),
        ..Revocation::default()
    };
    assert_eq!(
        list.outcome(&leaf(), &issuer(SigningKey::Vcek), now())
            .code(),
        "CRL_GOOD"
    );
    let other = Template {
        key: STRANGER.spki(),
        ..Template::root()
    }
    .signed_by(&STRANGER);
    let trust = SnpTrust::amd()
        .with_emulated_root(&other, &[x509::sha256(&other)])
        .unwrap();
    let below = Template::intermediate(SigningKey::Vcek).signed_by(&STRANGER);
    let below = trust.trust_intermediate(&Intermediate::parse(&below).unwrap(), now());
    let found = list.outcome(&leaf(), &below.unwrap(), now());
    assert_eq!(found, CrlOutcome::BadSignature);
}

#[test]
fn a_root_without_crl_sign_signs_no_lists() {
    let mut root = Template::root();
    root.extension(KEY_USAGE).value = vec![3, 2, 2, 4];
    let root = root.signed_by(&ROOT);
    let trust = SnpTrust::amd()
        .with_emulated_root(&root, &[x509::sha256(&root)])
        .unwrap();
    let below = Template::intermediate(SigningKey::Vcek).signed_by(&ROOT);
    let below = trust.trust_intermediate(&Intermediate::parse(&below).unwrap(), now());
    let crl = Crl::parse(&List::empty().signed_by(&ROOT)).unwrap();
    let list = Revocation {
        crl: Some(&crl),
        ..Revocation::default()
    };
    assert_eq!(
        list.outcome(&leaf(), &below.unwrap(), now()),
        CrlOutcome::WrongIssuer
    );
}

#[test]
fn freshness_is_judged_at_the_callers_clock() {
    let crl = Crl::parse(&List::empty().signed_by(&ROOT)).unwrap();
    let code = |clock: &str, max_age: Option<Duration>| {
        let list = Revocation {
            crl: Some(&crl),
            max_age,
            ..Revocation::default()
        };
        list.outcome(&leaf(), &issuer(SigningKey::Vcek), at(clock))
            .code()
    };
    const DAY: Duration = Duration::from_secs(86_400);
    assert_eq!(code("2025-12-31T23:59:59Z", None), "CRL_NOT_YET_VALID");
    assert_eq!(code("2026-01-01T00:00:00Z", None), "CRL_GOOD");
    assert_eq!(code("2026-02-01T00:00:00Z", None), "CRL_GOOD");
    assert_eq!(code("2026-02-01T00:00:01Z", None), "CRL_STALE");
    assert_eq!(code("2026-01-08T00:00:00Z", Some(7 * DAY)), "CRL_GOOD");
    assert_eq!(code("2026-01-08T00:00:01Z", Some(7 * DAY)), "CRL_TOO_OLD");
    assert_eq!(code("2026-02-01T00:00:01Z", Some(60 * DAY)), "CRL_STALE");
}

#[test]
fn half_a_list_is_refused() {
    let plus = |extension: Extension| {
        let mut list = List::empty();
        list.extensions.push(extension);
        list
    };
    assert_eq!(
        refusal(&plus(other(DELTA, true, &[2, 1, 1]))),
        "CRL_UNSUPPORTED"
    );
    assert_eq!(
        refusal(&plus(other(DELTA, false, &[2, 1, 1]))),
        "CRL_UNSUPPORTED"
    );
    // onlyContainsUserCerts, onlySomeReasons, indirectCRL, onlyContainsAttributeCerts.
    for scope in [
        &[0x81, 1, 0xff][..],
        &[0x83, 2, 1, 6],
        &[0x84, 1, 0xff],
        &[0x85, 1, 0xff],
    ] {
        let point = other(ISSUING_POINT, true, &tlv(0x30, scope));
        assert_eq!(refusal(&plus(point)), "CRL_UNSUPPORTED", "{scope:?}");
    }
    let authorities = other(ISSUING_POINT, true, &tlv(0x30, &[0x82, 1, 0xff]));
    assert_eq!(outcome(&plus(authorities), &ROOT).code(), "CRL_GOOD");
    let unknown = other(&[0x55, 0x1d, 0x63], true, &[5, 0]);
    assert_eq!(refusal(&plus(unknown.clone())), "CRL_UNSUPPORTED");
    assert_eq!(
        refusal(&plus(List::empty().extensions[0].clone())),
        "CRL_MALFORMED"
    );
    let mut many = List::empty();
    for high in 0..100 {
        for low in 0..100 {
            many.extensions
                .push(other(&[0x55, 0x1d, high, low], false, &[5, 0]));
        }
    }
    assert_eq!(refusal(&many), "CRL_MALFORMED");
    let entry = List {
        revoked: vec![vec![5]],
        entry_extensions: vec![unknown],
        ..List::empty()
    };
    assert_eq!(refusal(&entry), "CRL_UNSUPPORTED");
    let endless = List {
        dates: vec!["260101000000Z"],
        ..List::empty()
    };
    assert_eq!(refusal(&endless), "CRL_DATES");
    let backwards = List {
        dates: vec!["260201000000Z", "260101000000Z"],
        ..List::empty()
    };
    assert_eq!(refusal(&backwards), "CRL_DATES");
}

#[test]
fn lists_are_bounded_and_whole() {
    let der = List {
        revoked: vec![vec![5]],
        ..List::empty()
    }
    .signed_by(&ROOT);
    for len in 0..der.len() {
        assert!(Crl::parse(&der[..len]).is_err(), "{len}");
    }
    assert_eq!(
        Crl::parse(&[&der[..], &[0]].concat()).unwrap_err(),
        CrlError::Malformed
    );
    let big = vec![0x30; MAX_CRL_LEN + 1];
    assert_eq!(Crl::parse(&big).unwrap_err().code(), "CRL_TOO_LARGE");
    let text = pem("X509 CRL", &der);
    assert_eq!(
        Crl::parse(text.as_bytes()).unwrap().fingerprint(),
        x509::sha256(&der)
    );
    assert!(Crl::parse(pem("CERTIFICATE", &der).as_bytes()).is_err());
    let below = issuer(SigningKey::Vcek);
    for at in 0..der.len() {
        let mut der = der.clone();
        der[at] ^= 0x10;
        if let Ok(crl) = Crl::parse(&der) {
            let list = Revocation {
                crl: Some(&crl),
                ..Revocation::default()
            };
            assert_ne!(
                list.outcome(&leaf(), &below, now()).code(),
                "CRL_GOOD",
                "{at}"
            );
        }
    }
}
