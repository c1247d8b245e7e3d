//! Input that is only large, or deep.

use super::*;
use casemate_attest::verify::CheckResult;
use casemate_attest::verify::policy::{MAX_POLICY_LEN, PolicyError};

const MIB: usize = 1 << 20;

#[test]
fn a_mebibyte_in_each_place() {
    let good = milan(|_| {});
    good.accepted("");
    type Place = fn(&mut Evidence) -> &mut Vec<u8>;
    let places: [(Place, &str, &str); 4] = [
        (|e| &mut e.report, "report_format", "REPORT_LENGTH"),
        (|e| &mut e.leaf, "leaf_format", "CERTIFICATE_TOO_LARGE"),
        (
            |e| &mut e.certificates[1],
            "certificate_chain",
            "CERTIFICATE_TOO_LARGE",
        ),
        (
            |e| e.crl.get_or_insert_default(),
            "revocation",
            "CRL_TOO_LARGE",
        ),
    ];
    for (place, name, code) in places {
        // The good bytes, and zeros, opened sequences or blanks behind.
        for filler in [0, 0x30, b' '] {
            let mut attack = good.clone();
            place(&mut attack).resize(MIB + 1, filler);
            let verdict = attack.verdict(&allowing(""), None);
            assert_eq!(verdict.overall, Outcome::Rejected);
            assert_eq!(check(&verdict, name).code.as_deref(), Some(code));
            assert_eq!(check(&verdict, name).result, CheckResult::Rejected);
        }
    }
}

#[test]
fn a_list_as_large_as_may_be_that_is_none() {
    let mut attack = milan(|_| {});
    attack.accepted("");
    // Sequences in sequences: a parser that follows each one down runs out of stack.
    attack.crl = Some([0x30, 0x80].repeat(MIB / 2));
    attack.refused("", &["CRL_MALFORMED"]);
    attack.crl = Some([b"-----BEGIN X509 CRL-----\n".as_slice(), &[b'A'; MIB - 64]].concat());
    attack.refused("", &["CRL_MALFORMED"]);
}

#[test]
fn a_policy_file_too_long_or_too_deep() {
    let long = [b"#".as_slice(), &vec![b'x'; MAX_POLICY_LEN]].concat();
    assert!(OwnerPolicy::parse(&long[..MAX_POLICY_LEN]).is_ok());
    let refused = OwnerPolicy::parse(&long);
    assert!(matches!(refused, Err(PolicyError::TooLong(_))));
    for (open, close) in [("[", "]"), ("{a=", "}")] {
        let half = MAX_POLICY_LEN / 8;
        let deep = format!("vmpl = {}{}", open.repeat(half), close.repeat(half));
        let refused = OwnerPolicy::parse(deep.as_bytes());
        assert!(matches!(refused, Err(PolicyError::Toml(_))));
    }
}

#[test]
fn more_certificates_than_a_chain_has() {
    let mut attack = milan(|_| {});
    let spare = attack.certificates[2].clone();
    attack.certificates.resize(16, spare.clone());
    attack.accepted("");
    attack.certificates.push(spare);
    attack.refused(
        "",
        &[
            "CHAIN_UNVERIFIED",
            "CHAIN_UNVERIFIED",
            "TOO_MANY_CERTIFICATES",
        ],
    );
}
