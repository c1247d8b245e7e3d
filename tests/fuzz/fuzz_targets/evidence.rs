//! What carries reports, and SEV's own formats: any bytes are taken or refused, and what was read is written as it was.
//! Nothing that is not AMD's verifies.
#![no_main]

use std::collections::HashSet;

use casemate_attest::evidence::{self, Encoding, table};
use casemate_attest::legacy::{
    CaCertificate, LegacyChain, MeasureBlob, OwnerSession, PacketHeader, SessionBlob,
    SevCertificate, SevReport, TrustAnchors,
};
use casemate_attest::processor::snp::request_frame::{REPLY_FRAME_MAX, ReplyFrame};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(found) = evidence::decode(bytes) {
        carried(bytes, &found);
    }
    if let Ok(found) = table::parse(bytes) {
        let kinds: HashSet<_> = found.iter().map(|entry| entry.kind).collect();
        assert_eq!(kinds.len(), found.len());
        // Entries share no bytes, so that they cannot be more than the table.
        let all: usize = found.iter().map(|entry| entry.bytes.len()).sum();
        assert!(found.is_empty() || all < bytes.len());
        assert!(found.iter().all(|entry| !entry.bytes.is_empty()));
        let written = table::encode(&found).unwrap();
        assert_eq!(table::parse(&written).unwrap(), found);
    }
    replies(bytes);
    sessions(bytes);
    certificates(bytes);
    if let Some((pdh, rest)) = bytes.split_at_checked(CERTIFICATE)
        && let Some((platform, amd)) = rest.split_at_checked(3 * CERTIFICATE)
    {
        chain(pdh, platform, amd);
    }
});

/// A report that came in some form comes again from its own bytes and from their hex.
fn carried(bytes: &[u8], found: &evidence::Evidence) {
    let hex: String = found
        .report
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    for (again, encoding) in [
        (&found.report[..], Encoding::Binary),
        (hex.as_bytes(), Encoding::Hex),
    ] {
        // A report of nothing but printable bytes reads as text.
        if let Ok(again) = evidence::decode(again)
            && again.source_format.encoding == encoding
        {
            assert_eq!(again.report, found.report);
        }
    }
    if found.source_format.encoding == Encoding::Binary {
        assert!(
            bytes
                .windows(found.report.len())
                .any(|window| window == found.report)
        );
    }
    assert!(found.certificates.is_empty());
}

/// A guest request's reply, as the bytes are and with a length that fits.
fn replies(bytes: &[u8]) {
    if let Ok(reply) = ReplyFrame::parse(bytes) {
        assert_eq!(reply.to_bytes(), bytes);
    }
    let mut wire = vec![0; 8 + 4096];
    wire.extend(bytes);
    let mut rest = wire.as_slice();
    if let Ok(reply) = ReplyFrame::read_from(&mut rest) {
        let read = wire.len() - rest.len();
        assert!(read <= REPLY_FRAME_MAX);
        assert_eq!(reply.to_bytes(), wire[..read]);
        assert_eq!(ReplyFrame::parse(&wire).is_ok(), rest.is_empty());
        // Either it is a table or it is refused.
        let _ = table::parse(reply.certificates());
    }
}

fn sessions(bytes: &[u8]) {
    if let Ok(blob) = SessionBlob::parse(bytes) {
        assert_eq!(blob.to_bytes(), bytes);
    }
    if let Ok(session) = OwnerSession::from_bytes(bytes) {
        assert_eq!(session.to_bytes().as_slice(), bytes);
    }
    if let Ok(measure) = MeasureBlob::from_bytes(bytes) {
        assert_eq!(measure.to_bytes().as_slice(), bytes);
    }
    if let Ok(header) = PacketHeader::from_bytes(bytes) {
        assert_eq!(header.to_bytes().as_slice(), bytes);
    }
}

fn certificates(bytes: &[u8]) {
    if let Ok(report) = SevReport::parse(bytes) {
        assert_eq!(report.as_bytes().as_slice(), bytes);
        // Nobody but the platform can sign.
        assert!(
            report
                .verify_signed_by(&SevCertificate::parse(NAPLES_PEK).unwrap())
                .is_err()
        );
    }
    if let Ok(certificate) = SevCertificate::parse(bytes) {
        assert_eq!(certificate.as_bytes(), bytes);
    }
    if let Ok((first, rest)) = CaCertificate::parse_first(bytes) {
        assert_eq!([first.as_bytes(), rest].concat(), bytes);
        assert_eq!(CaCertificate::parse(bytes).is_ok(), rest.is_empty());
    }
}

/// PDH, then PEK, OCA and CEK, then ASK and ARK.
fn chain(pdh: &[u8], platform: &[u8], amd: &[u8]) {
    let Ok(chain) = LegacyChain::parse(pdh, platform, amd) else {
        return;
    };
    assert_eq!(chain.platform_certs(), platform);
    assert_eq!(chain.amd_certs(), amd);
    if let Ok(verified) = chain.verify(&TrustAnchors::amd()) {
        assert!(!verified.emulated());
        let known =
            [NAPLES_PDH, ROME_PDH].map(|pdh| SevCertificate::parse(pdh).unwrap().fingerprint());
        assert!(known.contains(&verified.pdh().fingerprint()));
    }
}

const CERTIFICATE: usize = NAPLES_PDH.len();
const NAPLES_PDH: &[u8] = include_bytes!("../../../attest/tests/vectors/legacy/naples/pdh.cert");
const NAPLES_PEK: &[u8] = include_bytes!("../../../attest/tests/vectors/legacy/naples/pek.cert");
const ROME_PDH: &[u8] = include_bytes!("../../../attest/tests/vectors/legacy/rome/pdh.cert");
