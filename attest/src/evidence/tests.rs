use super::*;
use crate::report::Report;
use crate::verify::CheckResult;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use proptest::prelude::*;

const REPORT: &[u8] = include_bytes!("../../tests/vectors/reports/genoa-v3/report.bin");
const HCL: &[u8] = include_bytes!("../../tests/vectors/reports/genoa-v3/hcl.bin");
const V5: &[u8] = include_bytes!("../../tests/vectors/reports/genoa-v5/report.bin");
const VCEK: &[u8] = include_bytes!("../../tests/vectors/reports/genoa-v5/vcek.der");

const VCEK_GUID: &str = "63da758de6644564adc5f4b93be8accd";
const ASK_GUID: &str = "4ab7b379bbac4fe4a02f05aef327c782";

fn response(report: &[u8]) -> Vec<u8> {
    let mut message = vec![0; 32];
    message[4..8].copy_from_slice(&1184u32.to_le_bytes());
    message.extend(report);
    message
}

/// What an Azure guest would read, with `json` bound by nothing.
fn hcl(json: &[u8]) -> Vec<u8> {
    let mut blob = HCL[..1216].to_vec();
    let len = u32::try_from(json.len()).unwrap();
    for value in [len + 20, 1, 2, 1, len] {
        blob.extend(value.to_le_bytes());
    }
    blob.extend(json);
    blob
}

fn patched(bytes: &[u8], at: usize, value: u32) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// A table of GUIDs (hex), offsets and lengths, closed, with `data` behind.
fn raw_table(entries: &[(&str, u32, u32)], data: &[u8]) -> Vec<u8> {
    let mut table = Vec::new();
    for (guid, offset, length) in entries {
        table.extend(hex::decode(guid).unwrap());
        table.extend(offset.to_le_bytes());
        table.extend(length.to_le_bytes());
    }
    table.extend([0; 24]);
    table.extend(data);
    table
}

#[test]
fn a_table_is_written_as_it_is_read() {
    use table::{CertificateKind, TableCertificate, TableError};
    let entry = |kind, bytes: &[u8]| TableCertificate {
        kind,
        bytes: bytes.to_vec(),
    };
    let vcek = entry(CertificateKind::Vcek, b"leaf");
    let ask = entry(CertificateKind::Ask, b"signer");
    let written = table::encode(&[vcek.clone(), ask.clone()]).unwrap();
    let by_hand = raw_table(&[(VCEK_GUID, 72, 4), (ASK_GUID, 76, 6)], b"leafsigner");
    assert_eq!(written, by_hand);
    assert_eq!(table::encode(&[]).unwrap(), [0; 0]);
    let unwritable = [
        vec![vcek.clone(), ask, vcek.clone()],
        vec![entry(CertificateKind::Crl, b"")],
        vec![entry(CertificateKind::Other([0; 16]), b"closing")],
        vec![entry(CertificateKind::Ark, &vec![0; table::MAX_TABLE])],
    ];
    for certificates in &unwritable[..3] {
        assert!(table::encode(certificates).is_err());
    }
    let refused = table::encode(&unwritable[3]);
    assert!(matches!(refused, Err(TableError::TooLong(_))));
    for n in 1..18u8 {
        let many = (1..=n).map(|n| entry(CertificateKind::Other([n; 16]), &[n]));
        let many: Vec<_> = many.collect();
        let again = table::encode(&many).map(|table| table::parse(&table));
        assert_eq!(again == Ok(Ok(many)), n <= 16);
    }
}

#[test]
fn every_form_of_one_report_decodes_to_it() {
    let wide: Vec<u8> = {
        let mut message = response(REPORT);
        message.resize(4000, 0);
        message
    };
    let hex_lines: String = hex::encode(REPORT)
        .as_bytes()
        .chunks(64)
        .map(|line| format!("{}\n", String::from_utf8_lossy(line)))
        .collect();
    let forms: [(&str, Vec<u8>); 12] = [
        ("a raw report", REPORT.to_vec()),
        ("a MSG_REPORT_RSP", response(REPORT)),
        ("a MSG_REPORT_RSP", wide),
        ("an Azure HCL blob", HCL.to_vec()),
        ("hex of a raw report", hex_lines.clone().into_bytes()),
        ("hex of a raw report", hex_lines.to_uppercase().into_bytes()),
        (
            "hex of a MSG_REPORT_RSP",
            hex::encode(response(REPORT)).into(),
        ),
        ("base64 of a raw report", STANDARD.encode(REPORT).into()),
        (
            "base64 of a raw report",
            STANDARD_NO_PAD.encode(REPORT).into(),
        ),
        (
            "base64 of a raw report",
            URL_SAFE_NO_PAD.encode(REPORT).into(),
        ),
        ("base64 of an Azure HCL blob", URL_SAFE.encode(HCL).into()),
        ("hex of an Azure HCL blob", hex::encode(HCL).into()),
    ];
    for (format, bytes) in forms {
        let evidence = decode(&bytes).unwrap_or_else(|error| panic!("{format}: {error}"));
        assert_eq!(evidence.report, REPORT, "{format}");
        assert_eq!(evidence.source_format.to_string(), format);
        assert_eq!(evidence.azure.is_some(), format.ends_with("HCL blob"));
        assert!(evidence.certificates.is_empty());
    }
}

#[test]
fn text_that_is_no_report_is_named() {
    let cut = &hex::encode(REPORT)[1..];
    assert_eq!(decode(cut.as_bytes()), Err(TextError::OddHex(2367).into()));
    assert_eq!(
        decode(&hex::encode(REPORT).as_bytes()[2..]),
        Err(EvidenceError::Unknown(1183))
    );
    for text in ["(report)", "AAAA=AAA", "AA+/AA-_", "AAAAZ", "AZ=="] {
        let refused = decode(text.as_bytes());
        assert!(
            matches!(refused, Err(EvidenceError::Text(TextError::Base64(_)))),
            "{text}: {refused:?}"
        );
    }
    let pem = include_bytes!("../../tests/vectors/reports/genoa-v3/vcek.pem");
    assert_eq!(decode(pem), Err(TextError::Pem.into()));
    assert_eq!(decode(b" \n"), Err(TextError::Blank.into()));
}

#[test]
fn lengths_are_bounded() {
    assert_eq!(decode(&[]), Err(EvidenceError::Empty));
    assert_eq!(
        decode(&vec![0; MAX_INPUT + 1]),
        Err(EvidenceError::TooLong(MAX_INPUT + 1))
    );
    for len in [1, 1183, 1185, 1215, 1217, 3999, 4001, MAX_INPUT] {
        assert_eq!(decode(&vec![0; len]), Err(EvidenceError::Unknown(len)));
    }
    let long = vec![b'0'; MAX_INPUT];
    assert_eq!(decode(&long), Err(EvidenceError::Unknown(MAX_INPUT / 2)));
}

#[test]
fn a_message_without_a_report_is_refused() {
    let good = response(REPORT);
    assert_eq!(
        decode(&patched(&good, 0, 0x27)),
        Err(MessageError::Status(0x27).into())
    );
    assert_eq!(
        decode(&patched(&good, 4, 1183)),
        Err(MessageError::Size(1183).into())
    );
    for at in [8, 28] {
        assert_eq!(
            decode(&patched(&good, at, 1)),
            Err(MessageError::NotZero(at).into())
        );
    }
    let mut wide = good.clone();
    wide.resize(4000, 0);
    assert_eq!(
        decode(&patched(&wide, 1216, 1)),
        Err(MessageError::NotZero(1216).into())
    );
    let text = MessageError::Status(0x27).to_string();
    assert!(text.contains("invalid key selection"), "{text}");
}

#[test]
fn a_real_azure_blob_binds_its_runtime_data() {
    let evidence = decode(HCL).unwrap();
    let runtime = evidence.azure.unwrap();
    let report = Report::parse(&evidence.report).unwrap();
    let check = runtime.check(&report);
    assert_eq!(check.result, CheckResult::Accepted, "{check:?}");
    assert_eq!(runtime.json().len(), 1200);
    assert_eq!(runtime.claims()["keys"][0]["kid"], "HCLAkPub");
    assert_eq!(runtime.claims()["vm-configuration"]["secure-boot"], true);
    assert_eq!(runtime.user_data(), Some([0; 64]));
}

#[test]
fn azure_runtime_data_of_another_guest_is_not_bound() {
    let report = |bytes: &[u8]| Report::parse(bytes).unwrap();
    let runtime = decode(HCL).unwrap().azure.unwrap();
    assert_eq!(
        runtime.check(&report(V5)).code.as_deref(),
        Some("AZURE_RUNTIME_DATA_NOT_BOUND")
    );
    // One changed byte of the text.
    let mut blob = HCL.to_vec();
    blob[2430] = b'1';
    let changed = decode(&blob).unwrap().azure.unwrap();
    assert_eq!(changed.check(&report(REPORT)).result, CheckResult::Rejected);
    // The right hash, and something behind it.
    let mut tail = REPORT.to_vec();
    tail[0x8f] = 1;
    assert_eq!(runtime.check(&report(&tail)).result, CheckResult::Rejected);
}

#[test]
fn damaged_azure_blobs_are_named() {
    let good = hcl(b"{}");
    assert!(decode(&good).is_ok());
    let refused = |bytes: &[u8]| match decode(bytes) {
        Err(EvidenceError::Azure(error)) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&patched(&good, 4, 3)), AzureError::Version(3));
    assert_eq!(refused(&patched(&good, 16, 7)), AzureError::Status(7));
    assert_eq!(refused(&patched(&good, 1224, 4)), AzureError::ReportType(4));
    assert_eq!(refused(&patched(&good, 1228, 2)), AzureError::HashType(2));
    for (at, value, data, text) in [
        (1216, 23, 23, 2),
        (1232, 3, 22, 3),
        (1232, u32::MAX, 22, u32::MAX),
        (1216, u32::MAX, u32::MAX, 2),
    ] {
        assert_eq!(
            refused(&patched(&good, at, value)),
            AzureError::Sizes { data, text }
        );
    }
    let mut long = good.clone();
    long.extend([0, 0, 1]);
    assert_eq!(refused(&long), AzureError::Trailing(good.len() + 2));
    for json in [&b"[]"[..], b"{", b"", b"{}{}", b"\xff\xff"] {
        assert_eq!(refused(&hcl(json)), AzureError::NotJson);
    }
    for len in [5, 32, 1216, 1235, good.len() - 1] {
        assert!(
            matches!(refused(&good[..len]), AzureError::Truncated { found, .. } if found == len),
            "{len}"
        );
    }
    let big = hcl(&[b' '; (64 << 10) + 1]);
    assert!(matches!(refused(&big), AzureError::Sizes { .. }));
}

#[test]
fn certificate_tables_are_read() {
    let data = [VCEK, b"ask"].concat();
    let len = u32::try_from(VCEK.len()).unwrap();
    let mut raw = raw_table(&[(VCEK_GUID, 72, len), (ASK_GUID, 72 + len, 3)], &data);
    // Hosts fill whole pages.
    raw.resize(raw.len().next_multiple_of(4096), 0);
    let evidence = decode(V5).unwrap().with_certificate_table(&raw).unwrap();
    assert_eq!(evidence.certificates.len(), 2);
    assert_eq!(evidence.certificate(CertificateKind::Vcek), Some(VCEK));
    assert_eq!(
        evidence.certificate(CertificateKind::Ask),
        Some(&b"ask"[..])
    );
    assert_eq!(evidence.certificate(CertificateKind::Vlek), None);
    assert_eq!(table::parse(&[]), Ok(vec![]));
    assert_eq!(table::parse(&[0; 4096]), Ok(vec![]));
}

/// The `sev` crate, which others fill such tables with, writes the same bytes.
#[test]
fn the_sev_crate_names_the_kinds_alike() {
    use sev::firmware::host::CertType;
    for (theirs, ours) in [
        (CertType::VCEK, CertificateKind::Vcek),
        (CertType::VLEK, CertificateKind::Vlek),
        (CertType::ASK, CertificateKind::Ask),
        (CertType::ARK, CertificateKind::Ark),
        (CertType::CRL, CertificateKind::Crl),
    ] {
        let guid = hex::decode(theirs.to_string().replace('-', "")).unwrap();
        let guid: [u8; 16] = guid.try_into().unwrap();
        assert_eq!(CertificateKind::from_guid(guid), ours);
    }
    let other = CertificateKind::from_guid([1; 16]);
    assert_eq!(other, CertificateKind::Other([1; 16]));
}

#[test]
fn damaged_certificate_tables_are_named() {
    let parse = |entries: &[(&str, u32, u32)]| table::parse(&raw_table(entries, &[7; 100]));
    let out_of_range = |result| matches!(result, Err(TableError::OutOfRange { .. }));
    // One entry and the closing one: data starts at 48, ends at 148.
    assert!(parse(&[(VCEK_GUID, 48, 100)]).is_ok());
    for (offset, length) in [
        (48, 101),
        (147, 2),
        (148, 1),
        (47, 5),
        (0, 24),
        (48, 0),
        (u32::MAX, 1),
        (u32::MAX, u32::MAX),
        (48, u32::MAX),
    ] {
        assert!(
            out_of_range(parse(&[(VCEK_GUID, offset, length)])),
            "{offset} + {length}"
        );
    }
    // Two: data starts at 72.
    assert!(parse(&[(VCEK_GUID, 72, 50), (ASK_GUID, 122, 50)]).is_ok());
    assert!(parse(&[(VCEK_GUID, 122, 50), (ASK_GUID, 72, 50)]).is_ok());
    assert_eq!(
        parse(&[(VCEK_GUID, 72, 51), (ASK_GUID, 122, 50)]),
        Err(TableError::Overlap(
            CertificateKind::Vcek,
            CertificateKind::Ask
        ))
    );
    assert_eq!(
        parse(&[(VCEK_GUID, 72, 1), (VCEK_GUID, 73, 1)]),
        Err(TableError::Twice(CertificateKind::Vcek))
    );
    let guids: Vec<_> = (1..18).map(|n| format!("{n:032x}")).collect();
    let many: Vec<_> = (0..17)
        .zip(&guids)
        .map(|(n, g)| (&**g, 432 + n, 1))
        .collect();
    assert!(parse(&many[..16]).is_ok());
    assert_eq!(parse(&many), Err(TableError::TooManyEntries));
    let open = raw_table(&[(VCEK_GUID, 48, 1)], &[]);
    assert_eq!(table::parse(&open[..47]), Err(TableError::NotClosed));
    assert_eq!(table::parse(&[1; 5]), Err(TableError::NotClosed));
    assert_eq!(
        table::parse(&vec![0; table::MAX_TABLE + 1]),
        Err(TableError::TooLong(table::MAX_TABLE + 1))
    );
}

proptest! {
    #[test]
    fn any_bytes_are_taken_or_refused(raw in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let _ = decode(&raw);
        let _ = table::parse(&raw);
    }

    #[test]
    fn any_text_is_taken_or_refused(text in "[ -~\n]{0,3000}") {
        let _ = decode(text.as_bytes());
    }

    #[test]
    fn damaged_blobs_are_taken_or_refused(
        at in 0..HCL.len(),
        value: u8,
        len in 0..HCL.len(),
        cut: bool,
    ) {
        let mut blob = HCL.to_vec();
        blob[at] = value;
        if cut {
            blob.truncate(len);
        }
        if let Ok(evidence) = decode(&blob) {
            // What is taken is what stands there.
            prop_assert_eq!(evidence.report.as_slice(), &blob[32..1216]);
        }
    }

    #[test]
    fn a_table_is_taken_only_with_its_entries_inside(
        offset: u32,
        length in 0u32..200,
        near in 0u32..200,
        close: bool,
    ) {
        let offset = if close { near } else { offset };
        let raw = raw_table(&[(VCEK_GUID, offset, length)], &[7; 100]);
        let inside = length > 0 && offset >= 48 && u64::from(offset) + u64::from(length) <= 148;
        prop_assert_eq!(table::parse(&raw).is_ok(), inside);
    }

    #[test]
    fn every_report_survives_every_form(mut raw in proptest::collection::vec(any::<u8>(), 1184)) {
        // Reserved bytes are zero in all of them; no report is text.
        raw[3] = 0;
        let forms = [
            raw.clone(),
            response(&raw),
            hex::encode(&raw).into(),
            STANDARD.encode(&raw).into(),
            URL_SAFE.encode(&raw).into(),
        ];
        for bytes in forms {
            let evidence = decode(&bytes).unwrap();
            prop_assert_eq!(evidence.report.as_slice(), raw.as_slice());
        }
    }
}
