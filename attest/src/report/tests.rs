//! Reports from real hardware, field by field, and what is refused.

use super::*;
use crate::tcb::TcbVersion;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

fn vectors() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors")
}

fn cases() -> Vec<(Value, Report)> {
    let text = fs::read_to_string(vectors().join("expected.json")).unwrap();
    let all: Vec<Value> = serde_json::from_str(&text).unwrap();
    let read = |case: Value| {
        let path = vectors().join(case["report"].as_str().unwrap());
        let report = Report::parse(&fs::read(path).unwrap()).unwrap();
        (case, report)
    };
    all.into_iter().map(read).collect()
}

fn genoa() -> Vec<u8> {
    fs::read(vectors().join("reports/genoa-v5/report.bin")).unwrap()
}

fn tcb_of(value: &Value) -> TcbVersion {
    serde_json::from_value(value.clone()).unwrap()
}

fn hex_number(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}

#[test]
fn every_field_of_the_hardware_reports_is_read() {
    let cases = cases();
    assert_eq!(cases.len(), 6);
    for (case, report) in cases {
        let fields = &case["fields"];
        let product: Product = case["product"].as_str().unwrap().parse().unwrap();
        assert_eq!(report.version() as u64, case["version"].as_u64().unwrap());
        assert_eq!(report.signing_key().to_string(), case["leaf_kind"]);
        assert_eq!(u64::from(report.guest_svn()), fields["guest_svn"]);
        assert_eq!(report.policy().0, hex_number(&fields["policy"]));
        assert_eq!(
            report.policy().has(SnpPolicyBit::Debug),
            fields["policy_debug"]
        );
        assert_eq!(report.policy().has(SnpPolicyBit::Smt), fields["policy_smt"]);
        assert_eq!(u64::from(report.vmpl()), fields["vmpl"]);
        assert_eq!(
            report.platform_info().0,
            hex_number(&fields["platform_info"])
        );
        for (name, found) in [
            ("report_data", report.report_data().to_vec()),
            ("measurement", report.measurement().to_vec()),
            ("host_data", report.host_data().to_vec()),
            ("id_key_digest", report.id_key_digest().to_vec()),
            ("author_key_digest", report.author_key_digest().to_vec()),
            ("report_id", report.report_id().to_vec()),
            ("report_id_ma", report.report_id_ma().to_vec()),
            ("family_id", report.family_id().to_vec()),
            ("image_id", report.image_id().to_vec()),
            ("chip_id", report.chip_id().to_vec()),
        ] {
            assert_eq!(fields[name], hex::encode(found), "{name} of {}", case["id"]);
        }
        for (name, found) in [
            ("current_tcb", report.current_tcb()),
            ("reported_tcb", report.reported_tcb()),
            ("committed_tcb", report.committed_tcb()),
            ("launch_tcb", report.launch_tcb()),
        ] {
            assert_eq!(found.of(product), tcb_of(&fields[name]), "{name}");
        }
        for (name, found) in [
            ("current_build_minor_major", report.current_firmware()),
            ("committed_build_minor_major", report.committed_firmware()),
        ] {
            let found = [found.build, found.minor, found.major];
            assert_eq!(fields[name], serde_json::json!(found), "{name}");
        }
        for (name, found) in [
            ("launch_mit_vector", report.launch_mitigations()),
            ("current_mit_vector", report.current_mitigations()),
        ] {
            let expected = (!fields[name].is_null()).then(|| hex_number(&fields[name]));
            assert_eq!(found, expected, "{name}");
        }
        let cpuid = report.cpuid().map(|c| [c.family, c.model, c.stepping]);
        let expected = fields["cpuid_family_model_stepping"].as_str();
        assert_eq!(cpuid.map(hex::encode).as_deref(), expected);
        assert_eq!(report.product(), cpuid.map(|_| product));
        assert!(report.signature().is_some());
        assert!(!report.has_migration_agent() && !report.has_author_key());
    }
}

#[test]
fn only_the_exact_length_is_a_report() {
    let good = genoa();
    let long = [good.as_slice(), &[0]].concat();
    for bytes in [&good[..REPORT_LEN - 1], &long, &[]] {
        assert_eq!(
            Report::parse(bytes).err(),
            Some(ReportError::Length(bytes.len()))
        );
    }
}

#[test]
fn versions_and_keys_that_are_not_known_are_refused() {
    for version in [0, 1, 6, 255, u32::MAX] {
        let mut bytes = genoa();
        bytes[..4].copy_from_slice(&version.to_le_bytes());
        assert_eq!(
            Report::parse(&bytes).err(),
            Some(ReportError::Version(version))
        );
    }
    let mut bytes = genoa();
    bytes[SIGNATURE_ALGORITHM_AT] = 2;
    assert_eq!(
        Report::parse(&bytes).err(),
        Some(ReportError::SignatureAlgorithm(2))
    );
    let mut bytes = genoa();
    bytes[KEY_INFO_AT] = 7 << 2;
    assert_eq!(
        Report::parse(&bytes).err(),
        Some(ReportError::SigningKey(7))
    );
}

#[test]
fn bytes_behind_the_signature_must_be_zero() {
    for at in SIGNATURE_END..REPORT_LEN {
        let mut bytes = genoa();
        bytes[at] = 1;
        assert_eq!(Report::parse(&bytes).err(), Some(ReportError::Trailing(at)));
    }
}

#[test]
fn a_signature_with_a_zero_or_an_oversized_half_is_none() {
    for half in [SIGNATURE_AT, SIGNATURE_AT + SCALAR_FIELD_LEN] {
        let mut zero = genoa();
        zero[half..half + SCALAR_FIELD_LEN].fill(0);
        assert_eq!(Report::parse(&zero).unwrap().signature(), None);
        let mut wide = genoa();
        wide[half + SCALAR_LEN] = 1;
        assert_eq!(Report::parse(&wide).unwrap().signature(), None);
    }
}
