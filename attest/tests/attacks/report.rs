//! Reports that a real key signed and that say the wrong thing, and signatures that are none.

use super::*;
use casemate_attest::processor::snp::EndorsementKey;
use casemate_attest::processor::snp::forge::Signer;
use casemate_attest::report::{REPORT_LEN, Report};
use casemate_attest::verify::CheckResult;
use x509_cert::Certificate;
use x509_cert::der::{Decode as _, Encode as _};

const R_AT: usize = 0x2a0;
const S_AT: usize = 0x2e8;

/// The key of the emulated chip, its evidence, and the report before it was signed.
fn signer() -> (EndorsementKey, Evidence, [u8; REPORT_LEN]) {
    let identity = Authority::shared().identity();
    let tcb = forge::tcb(Product::Milan);
    let key = identity.vcek(Product::Milan, tcb).unwrap();
    let raw = fields(Product::Milan, ReportVersion::V5, VCEK).to_unsigned_bytes();
    let evidence = Evidence {
        report: key.sign_bytes(raw).unwrap().to_vec(),
        leaf: key.certificate().to_vec(),
        certificates: chain_of(Authority::shared()),
        crl: None,
    };
    (key, evidence, raw)
}

#[test]
fn signatures_that_are_no_numbers_of_the_group() {
    let (_, good, _) = signer();
    good.accepted("");
    let attack = |change: &dyn Fn(&mut [u8])| {
        let mut attack = good.clone();
        change(&mut attack.report);
        attack
    };
    let malformed = &["REPORT_SIGNATURE_MALFORMED"];
    attack(&|report| report[R_AT..R_AT + 144].fill(0)).refused("", malformed);
    for at in [R_AT, S_AT] {
        let order = |report: &mut [u8]| report[at..at + 48].copy_from_slice(&little(&ORDER));
        attack(&order).refused("", &["REPORT_SIGNATURE_INVALID"]);
        // The same number modulo the order, one byte longer.
        let wrapped = |report: &mut [u8]| {
            let number = big(&report[at..at + 48]);
            let (sum, carry) = added(&number, &ORDER);
            report[at..at + 48].copy_from_slice(&little(&sum));
            report[at + 48] = u8::from(carry);
        };
        let attack = attack(&wrapped);
        // Where the number is so small that the sum fits, it is out of range instead.
        let fits = attack.report[at + 48] == 0;
        let code = if fits { "INVALID" } else { "MALFORMED" };
        attack.refused("", &[&format!("REPORT_SIGNATURE_{code}")]);
    }
    // As most libraries write them: big-endian.
    let swapped = |report: &mut [u8]| {
        report[R_AT..R_AT + 48].reverse();
        report[S_AT..S_AT + 48].reverse();
    };
    attack(&swapped).refused("", &["REPORT_SIGNATURE_INVALID"]);
}

/// `(R, n - S)` is a second signature that the holder of the first can write without the key. It
/// says nothing new: what is signed is the same to the bit, so it is accepted, and whoever wants
/// to know a report again must not go by the bytes of its signature.
#[test]
fn the_other_signature_of_the_same_report() {
    let (_, good, _) = signer();
    good.accepted("");
    let mut other = good.clone();
    let negated = subtracted(&ORDER, &big(&good.report[S_AT..S_AT + 48]));
    other.report[S_AT..S_AT + 48].copy_from_slice(&little(&negated));
    assert_ne!(other.report, good.report);
    other.accepted("");
    let signed = |evidence: &Evidence| {
        let report = Report::parse(&evidence.report).unwrap();
        report.signed_bytes().to_vec()
    };
    assert_eq!(signed(&other), signed(&good));
    other.report[0x50] ^= 1;
    other.refused("", &["REPORT_SIGNATURE_INVALID"]);
}

#[test]
fn a_report_of_a_version_that_nobody_knows_yet() {
    let (key, good, raw) = signer();
    good.accepted("");
    // The last one is 5 to whoever reads only the first byte or half of the field.
    for version in [0u32, 1, 6, 0x0001_0005] {
        let mut raw = raw;
        raw[..4].copy_from_slice(&version.to_le_bytes());
        let mut attack = good.clone();
        attack.report = key.sign_bytes(raw).unwrap().to_vec();
        let verdict = attack.verdict(&allowing(""), None);
        assert_eq!(verdict.overall, Outcome::Rejected);
        let format = check(&verdict, "report_format").code.as_deref();
        assert_eq!(format, Some("REPORT_VERSION_UNSUPPORTED"));
        let debug = check(&verdict, "debug_forbidden");
        assert_eq!(debug.result, CheckResult::CannotVerify);
    }
}

#[test]
fn words_behind_the_signature() {
    let (_, good, _) = signer();
    good.accepted("");
    for at in [0x330, 0x333, 0x400, REPORT_LEN - 1] {
        let mut attack = good.clone();
        attack.report[at] = 1;
        let verdict = attack.verdict(&allowing(""), None);
        assert_eq!(verdict.overall, Outcome::Rejected);
        let format = check(&verdict, "report_format").code.as_deref();
        assert_eq!(format, Some("REPORT_TRAILING_BYTES"));
    }
}

#[test]
fn the_report_of_another_session() {
    let session = [0xa5; 32];
    let mut data = [0; 64];
    data[..32].copy_from_slice(&session);
    let good = milan(|fields| fields.report_data = data);
    let judge = |evidence: &Evidence, nonce: &[u8]| evidence.verdict(&allowing(""), Some(nonce));
    assert!(judge(&good, &session).accepted());
    let replayed = milan(|fields| fields.report_data = [0x5a; 64]);
    let tail = milan(|fields| {
        fields.report_data = data;
        fields.report_data[63] = 1;
    });
    let longer = [session.as_slice(), &[1]].concat();
    for (attack, nonce) in [
        (&replayed, session.as_slice()),
        (&tail, &session),
        (&good, &session[..31]),
        (&good, &longer),
    ] {
        let verdict = judge(attack, nonce);
        assert_eq!(codes(&verdict), ["REPORT_DATA_MISMATCH"]);
        assert_eq!(verdict.overall, Outcome::Rejected);
    }
}

#[test]
fn the_fields_of_a_later_version_in_an_earlier_report() {
    let (key, good, mut raw) = signer();
    let mitigations = "[mitigations]\nlaunch = 1\ncurrent = 1";
    good.accepted(mitigations);
    // The vectors stand where V5 has them; V2 to V4 have nothing there.
    for version in 2..=4 {
        raw[0] = version;
        let mut attack = good.clone();
        attack.report = key.sign_bytes(raw).unwrap().to_vec();
        attack.accepted("");
        attack.refused(
            mitigations,
            &["MITIGATIONS_UNREPORTED", "MITIGATIONS_UNREPORTED"],
        );
    }
}

/// One key with a leaf for another product, whose TCB version has another layout. A V2 report
/// names no product, so that its chip and its TCB are all that tell.
#[test]
fn the_same_key_with_another_products_leaf() {
    let authority = Authority::shared();
    let (key, good, _) = signer();
    let leaf = Certificate::from_der(key.certificate()).unwrap();
    let public = leaf.tbs_certificate.subject_public_key_info;
    let turin = LeafSpec::vcek(
        Product::Turin,
        forge::tcb(Product::Turin),
        &chip(Product::Turin)[..8],
    );
    let turin = authority.certificate(Signer::Ask, &turin.certificate, &public.to_der().unwrap());
    for version in [ReportVersion::V2, ReportVersion::V3] {
        let mut attack = good.clone();
        let fields = fields(Product::Milan, version, VCEK);
        attack.report = key.sign_report(&fields).unwrap().to_vec();
        attack.accepted("");
        attack.leaf.clone_from(&turin);
        let verdict = attack.verdict(&allowing(""), None);
        assert_eq!(verdict.overall, Outcome::Rejected);
        let mut expected = vec!["LEAF_CHIP_MISMATCH", "LEAF_TCB_MISMATCH"];
        if version == ReportVersion::V3 {
            expected.push("PRODUCT_MISMATCH");
        }
        assert_eq!(codes(&verdict), expected);
    }
    evidence_of(Product::Milan, ReportVersion::V3, |leaf| leaf, |_| {})
        .accepted("min_report_version = 3");
    evidence_of(Product::Milan, ReportVersion::V2, |leaf| leaf, |_| {})
        .refused("min_report_version = 3", &["REPORT_VERSION_TOO_OLD"]);
}

#[test]
fn a_product_that_the_processor_does_not_name() {
    milan(|_| {}).accepted("");
    for (family, model) in [(0, 0), (0x19, 0xff), (0x1b, 0x01), (0xff, 0xff)] {
        let attack = milan(|fields| {
            fields.cpuid.family = family;
            fields.cpuid.model = model;
        });
        attack.refused("", &["PRODUCT_UNKNOWN"]);
    }
}

#[test]
fn a_report_from_another_privilege_level() {
    milan(|_| {}).accepted("");
    for level in 1..=3 {
        let attack = milan(|fields| fields.vmpl = level);
        attack.refused("", &["VMPL_NOT_ALLOWED"]);
        attack.accepted(&format!("vmpl = [{level}]"));
    }
    // The host's own, under a policy that allows all there is to allow.
    let host = milan(|fields| fields.vmpl = u32::MAX);
    host.refused(
        "vmpl = [0, 1, 2, 3]",
        &["VMPL_HOST_REQUESTED", "VMPL_NOT_ALLOWED"],
    );
}

/// No agent is all ones; all zeros and one bit off are agents.
#[test]
fn a_migration_agent_that_looks_like_none() {
    milan(|_| {}).accepted("");
    let mut close = [0xff; 32];
    close[31] = 0xfe;
    for agent in [close, [0; 32]] {
        let attack = milan(|fields| fields.report_id_ma = agent);
        attack.refused("", &["MIGRATION_AGENT_BOUND"]);
    }
}

type Number = [u8; 48];

/// The order of P-384's group, big-endian. SEC 2, 2.5.1.
const ORDER: Number = {
    let mut order = [0xff; 48];
    let low = [
        0xc7, 0x63, 0x4d, 0x81, 0xf4, 0x37, 0x2d, 0xdf, 0x58, 0x1a, 0x0d, 0xb2, 0x48, 0xb0, 0xa7,
        0x7a, 0xec, 0xec, 0x19, 0x6a, 0xcc, 0xc5, 0x29, 0x73,
    ];
    let mut at = 0;
    while at < 24 {
        order[24 + at] = low[at];
        at += 1;
    }
    order
};

fn big(little: &[u8]) -> Number {
    let mut number: Number = little.try_into().unwrap();
    number.reverse();
    number
}

fn little(big: &Number) -> Number {
    let mut number = *big;
    number.reverse();
    number
}

fn added(a: &Number, b: &Number) -> (Number, bool) {
    let mut sum = [0; 48];
    let mut carry = 0;
    for at in (0..48).rev() {
        let digit = u16::from(a[at]) + u16::from(b[at]) + carry;
        sum[at] = digit as u8;
        carry = digit >> 8;
    }
    (sum, carry != 0)
}

fn subtracted(a: &Number, b: &Number) -> Number {
    let mut difference = [0; 48];
    let mut borrow = 0;
    for at in (0..48).rev() {
        let digit = i16::from(a[at]) - i16::from(b[at]) - borrow;
        difference[at] = digit.rem_euclid(256) as u8;
        borrow = i16::from(digit < 0);
    }
    difference
}
