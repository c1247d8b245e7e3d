//! Reports from real hardware: their verdicts, and the verdicts over damaged copies.

use super::*;

#[test]
fn reports_from_hardware_have_the_verdicts_they_should() {
    let nothing: [&str; 0] = [];
    for (id, policy, expected) in [
        ("milan-v2-debug", "", &["DEBUG_ALLOWED"][..]),
        ("milan-v2", "", &["PROVISIONAL_FIRMWARE"]),
        ("milan-v2", "provisional_firmware = \"allow\"", &nothing),
        ("milan-v2-b", "", &nothing),
        (
            "milan-v3-vlek",
            "",
            &["LEAF_EXPIRED", "PROVISIONAL_FIRMWARE", "VMPL_NOT_ALLOWED"],
        ),
        (
            "milan-v3-vlek",
            "provisional_firmware = \"allow\"\nvmpl = [1]",
            &["LEAF_EXPIRED"],
        ),
        ("genoa-v3", "", &nothing),
        ("genoa-v5", "", &nothing),
    ] {
        let mut given = vector(id);
        let verdict = given.verdict(&Against::policy(policy));
        assert_eq!(codes(&verdict), expected, "{id}: {verdict:?}");
        let overall = match expected {
            [] => Outcome::Accepted,
            _ => Outcome::Rejected,
        };
        assert_eq!((verdict.overall, verdict.emulated), (overall, false));
        // AMD's intermediates come with the crate.
        given.certificates.clear();
        assert_eq!(given.verdict(&Against::policy(policy)), verdict);
    }
    let mut then = Against::policy("provisional_firmware = \"allow\"\nvmpl = [1]");
    then.clock = at("2025-06-01T00:00:00Z");
    assert!(vector("milan-v3-vlek").verdict(&then).accepted());
}

#[test]
fn what_nobody_asked_for_is_listed_as_not_checked() {
    let verdict = vector("genoa-v5").verdict(&Against::default());
    let data = check(&verdict, "report_data");
    assert_eq!(data.result, CheckResult::NotChecked);
    assert!(data.found.contains("without a nonce"), "{data:?}");
    let revocation = check(&verdict, "revocation");
    assert_eq!(revocation.result, CheckResult::NotChecked);
    assert_eq!(revocation.found, "no CRL given: revocation was not checked");
    assert_eq!(
        check(&verdict, "measurement").result,
        CheckResult::NotChecked
    );
}

#[test]
fn every_single_bit_counts() {
    let verifier = SnpVerifier::new(OwnerPolicy::default());
    let given = vector("genoa-v5");
    let expectation = Expectation {
        nonce: None,
        references: &[],
        clock: at("2026-11-22T00:00:00Z"),
    };
    assert!(verifier.verify(&given.evidence(), &expectation).accepted());
    let mut damaged = given.clone();
    for bit in 0..0x2a0 * 8 {
        damaged.report.clone_from(&given.report);
        damaged.report[bit / 8] ^= 1 << (bit % 8);
        let verdict = verifier.verify(&damaged.evidence(), &expectation);
        assert_eq!(verdict.overall, Outcome::Rejected, "bit {bit}");
        let found = ["report_format", "report_signature"].map(|name| check(&verdict, name).result);
        assert!(found.contains(&CheckResult::Rejected), "bit {bit}");
    }
}

#[test]
fn signatures_that_are_no_numbers_of_the_group_are_refused() {
    let order = "ffffffffffffffffffffffffffffffffffffffffffffffff\
                 c7634d81f4372ddf581a0db248b0a77aecec196accc52973";
    let mut order = hex::decode(order).unwrap();
    order.reverse();
    for at in [0x2a0, 0x2e8] {
        let mut given = vector("genoa-v5");
        given.report[at..at + 72].fill(0);
        let against = Against::default();
        assert_eq!(given.codes(&against), ["REPORT_SIGNATURE_MALFORMED"]);
        given.report[at..at + 48].copy_from_slice(&order);
        assert_eq!(given.codes(&against), ["REPORT_SIGNATURE_INVALID"]);
        given.report[at..at + 72].fill(0xff);
        assert_eq!(given.codes(&against), ["REPORT_SIGNATURE_MALFORMED"]);
    }
}

#[test]
fn what_is_no_report_is_rejected_with_the_reason() {
    let mut versions = [0u32, 1, 6, 255].map(|version| {
        let mut report = vector("genoa-v5").report;
        report[..4].copy_from_slice(&version.to_le_bytes());
        (report, "REPORT_VERSION_UNSUPPORTED")
    });
    let good = vector("genoa-v5").report;
    let patched = |at: usize, byte: u8| {
        let mut report = good.clone();
        report[at] = byte;
        report
    };
    let mut cases = vec![
        (good[..1183].to_vec(), "REPORT_LENGTH"),
        ([good.as_slice(), &[0]].concat(), "REPORT_LENGTH"),
        (Vec::new(), "REPORT_LENGTH"),
        (vec![0; 1 << 20], "REPORT_LENGTH"),
        (patched(0x34, 2), "REPORT_SIGNATURE_ALGORITHM"),
        (patched(0x48, 7 << 2), "REPORT_SIGNING_KEY_UNKNOWN"),
        (patched(0x330, 1), "REPORT_TRAILING_BYTES"),
        (patched(0x49f, 1), "REPORT_TRAILING_BYTES"),
    ];
    cases.extend(versions.iter_mut().map(|case| (case.0.clone(), case.1)));
    for (report, code) in cases {
        let mut given = vector("genoa-v5");
        given.report = report;
        let verdict = given.verdict(&Against::default());
        assert_eq!(verdict.overall, Outcome::Rejected);
        assert_eq!(check(&verdict, "report_format").code.as_deref(), Some(code));
        assert_eq!(
            check(&verdict, "certificate_chain").result,
            CheckResult::Accepted
        );
        let signature = check(&verdict, "report_signature");
        assert_eq!(signature.result, CheckResult::CannotVerify);
        assert_eq!(verdict.checks.len(), table::CHECKS);
    }
    // A V5 report that calls itself V4 is of a known layout, and its signature tells.
    let mut given = vector("genoa-v5");
    given.report[0] = 4;
    assert_eq!(
        given.codes(&Against::default()),
        ["REPORT_SIGNATURE_INVALID"]
    );
}

#[test]
fn chains_and_leaves_of_others_are_refused() {
    let against = Against::default();
    let mut foreign_chain = vector("milan-v2-b");
    foreign_chain.certificates = vector("genoa-v5").certificates;
    assert_eq!(
        foreign_chain.codes(&against),
        ["CHAIN_UNVERIFIED", "CHAIN_UNVERIFIED", "PRODUCT_MISMATCH"]
    );
    // Both leaves are chain-valid; neither the key nor the chip is the report's.
    let mut swapped = vector("milan-v2-b");
    swapped.leaf = vector("milan-v2").leaf;
    assert_eq!(
        swapped.codes(&against),
        ["LEAF_CHIP_MISMATCH", "REPORT_SIGNATURE_INVALID"]
    );
    let mut other_kind = vector("milan-v3-vlek");
    other_kind.certificates = vector("milan-v2").certificates;
    let codes = other_kind.codes(&against);
    assert!(
        codes.contains(&"WRONG_INTERMEDIATE".to_owned()),
        "{codes:?}"
    );
    let mut vlek_for_vcek = vector("milan-v2-b");
    vlek_for_vcek.leaf = vector("milan-v3-vlek").leaf;
    vlek_for_vcek.certificates.clear();
    let codes = vlek_for_vcek.codes(&against);
    for code in [
        "SIGNING_KEY_MISMATCH",
        "LEAF_TCB_MISMATCH",
        "REPORT_SIGNATURE_INVALID",
    ] {
        assert!(codes.contains(&code.to_owned()), "{codes:?}");
    }
    let mut other_product = vector("genoa-v5");
    other_product.leaf = vector("milan-v2").leaf;
    other_product.certificates.clear();
    let codes = other_product.codes(&against);
    assert!(codes.contains(&"PRODUCT_MISMATCH".to_owned()), "{codes:?}");
    for leaf in ["vcek-invalid-legacy.der", "vcek-invalid-new.der"] {
        let mut invalid = vector("milan-v2-b");
        invalid.leaf = read(&format!("certs-only/{leaf}"));
        let verdict = invalid.verdict(&against);
        assert_eq!(verdict.overall, Outcome::Rejected);
        assert_ne!(
            check(&verdict, "certificate_chain").result,
            CheckResult::Accepted
        );
    }
}

#[test]
fn leaves_that_cannot_be_read_are_rejected_without_a_panic() {
    let good = vector("genoa-v5");
    for len in (0..good.leaf.len()).step_by(37) {
        let mut given = good.clone();
        given.leaf.truncate(len);
        let verdict = given.verdict(&Against::default());
        assert_eq!(verdict.overall, Outcome::Rejected, "{len}");
        assert_eq!(check(&verdict, "leaf_format").result, CheckResult::Rejected);
        for name in ["product", "report_signature", "leaf_tcb", "leaf_chip"] {
            assert_eq!(check(&verdict, name).result, CheckResult::CannotVerify);
            assert_eq!(
                check(&verdict, name).code.as_deref(),
                Some("LEAF_UNREADABLE")
            );
        }
        assert_eq!(verdict.checks.len(), table::CHECKS);
    }
    let mut many = good.clone();
    many.certificates = vec![good.certificates[0].clone(); 17];
    assert!(
        many.codes(&Against::default())
            .contains(&"TOO_MANY_CERTIFICATES".to_owned())
    );
    let mut large = good.clone();
    large.leaf = vec![0x30; 1 << 20];
    large.certificates = vec![vec![0x30; 1 << 20]];
    large.crl = Some(vec![0x30; 2 << 20]);
    let codes = large.codes(&Against::default());
    assert!(
        codes.contains(&"CERTIFICATE_TOO_LARGE".to_owned()),
        "{codes:?}"
    );
    assert!(codes.contains(&"CRL_TOO_LARGE".to_owned()), "{codes:?}");
}

#[test]
fn dates_are_a_check_of_their_own() {
    let given = vector("genoa-v5");
    for (clock, code) in [
        ("2026-02-17T23:01:35Z", "LEAF_NOT_YET_VALID"),
        ("2033-02-17T23:01:37Z", "LEAF_EXPIRED"),
    ] {
        let against = Against::default().with_clock(at(clock));
        let verdict = given.verdict(&against);
        assert_eq!(codes(&verdict), [code]);
        assert_eq!(
            check(&verdict, "certificate_dates").code.as_deref(),
            Some(code)
        );
        assert_eq!(
            check(&verdict, "certificate_chain").result,
            CheckResult::Accepted
        );
    }
    for clock in ["2026-02-17T23:01:36Z", "2033-02-17T23:01:36Z"] {
        let against = Against::default().with_clock(at(clock));
        assert!(given.verdict(&against).accepted(), "{clock}");
    }
    let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
    let against = Against::default().with_clock(before);
    assert_eq!(given.verdict(&against).overall, Outcome::Rejected);
}

#[test]
fn the_nonce_is_all_of_report_data() {
    let given = vector("genoa-v5");
    let with = |nonce: &[u8]| {
        let against = Against::default().with_nonce(nonce);
        given.codes(&against)
    };
    assert!(with(b"hello-attestation").is_empty());
    assert!(with(b"hello-attestation\0\0").is_empty());
    for nonce in [
        &b"hello-attestatio"[..],
        b"hello-attestation!",
        b"h",
        &[0; 64],
    ] {
        assert_eq!(with(nonce), ["REPORT_DATA_MISMATCH"], "{nonce:?}");
    }
    // A tail behind the nonce: the first 32 bytes are right.
    let long = vector("milan-v2-b");
    let against = Against::default().with_nonce(&long.report[0x50..0x70]);
    assert_eq!(long.codes(&against), ["REPORT_DATA_MISMATCH"]);
    let against = Against::default().with_nonce(&long.report[0x50..0x90]);
    assert!(long.verdict(&against).accepted());
    assert!(Nonce::new(&[]).is_err() && Nonce::new(&[0; 65]).is_err());
}
