//! SNP evidence as guests send it: `{"attestation_report": …, "cert_chain": […] | null}`.
//!
//! The guest components of Confidential Containers send the report as the fields of the `sev`
//! crate's `AttestationReport` (its names before and since version 6 are both read), others the
//! 1184 bytes themselves: base64, hex, or a list of numbers. Fields are written back to where the
//! firmware had them; what the `sev` crate does not carry is reserved and zero in every report of
//! AMD's, and if it were not, the signature would not fit: a lossy form can only be refused.

use super::Refusal;
use crate::report::{REPORT_LEN, Report};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

/// A report and the certificates that came with it. Nothing in it is believed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestEvidence {
    /// The report.
    pub report: Report,
    /// The certificates, in the order they came.
    pub certificates: Vec<GuestCertificate>,
}

/// A certificate that a guest sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestCertificate {
    /// What it is meant to be.
    pub kind: CertificateKind,
    /// Its bytes: DER, or PEM.
    pub bytes: Vec<u8>,
}

/// What the host's certificate table says a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CertificateKind {
    /// AMD's root key.
    Ark,
    /// AMD's intermediate key.
    Ask,
    /// The chip's key.
    Vcek,
    /// The provider's key.
    Vlek,
    /// A revocation list.
    Crl,
}

impl GuestEvidence {
    /// Reads evidence.
    pub fn parse(evidence: &Value) -> Result<Self, Refusal> {
        let members = evidence
            .as_object()
            .ok_or_else(|| malformed("evidence is no object"))?;
        let report = members
            .get("attestation_report")
            .ok_or_else(|| malformed("`attestation_report` is missing"))?;
        let raw = match report {
            Value::Object(fields) => report_of_fields(fields)?,
            other => blob(other, REPORT_LEN, "attestation_report")?,
        };
        let report = Report::parse(&raw).map_err(|e| malformed(&e.to_string()))?;
        let certificates = match members.get("cert_chain") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(entries)) => certificates(entries)?,
            Some(_) => return Err(malformed("`cert_chain` is no list")),
        };
        Ok(Self {
            report,
            certificates,
        })
    }

    /// Evidence as the agent of this project sends it: the report in base64.
    pub fn message(report: &[u8], certificates: &[GuestCertificate]) -> Value {
        let entries = certificates.iter().map(|certificate| {
            let bytes = STANDARD.encode(&certificate.bytes);
            serde_json::json!({ "cert_type": certificate.kind.name(), "data": bytes })
        });
        serde_json::json!({
            "attestation_report": STANDARD.encode(report),
            "cert_chain": entries.collect::<Vec<_>>(),
        })
    }

    /// The first certificate of a kind.
    pub fn certificate(&self, kind: CertificateKind) -> Option<&[u8]> {
        let mut found = self.certificates.iter().filter(|c| c.kind == kind);
        found.next().map(|c| c.bytes.as_slice())
    }
}

impl CertificateKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Ark, Self::Ask, Self::Vcek, Self::Vlek, Self::Crl];

    /// As the `sev` crate names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ark => "ARK",
            Self::Ask => "ASK",
            Self::Vcek => "VCEK",
            Self::Vlek => "VLEK",
            Self::Crl => "CRL",
        }
    }
}

fn certificates(entries: &[Value]) -> Result<Vec<GuestCertificate>, Refusal> {
    if entries.len() > MAX_CERTIFICATES {
        return Err(malformed("`cert_chain` has more than 8 entries"));
    }
    let mut parsed = Vec::new();
    for entry in entries {
        let name = entry.get("cert_type").and_then(Value::as_str);
        // Entries of kinds that prove nothing here (`Empty`, `OTHER`) are left out.
        let kind = CertificateKind::ALL
            .into_iter()
            .find(|kind| Some(kind.name()) == name);
        let Some(kind) = kind else { continue };
        let data = entry
            .get("data")
            .ok_or_else(|| malformed("a certificate has no `data`"))?;
        let bytes = bytes_of(data, MAX_CERTIFICATE_LEN)
            .ok_or_else(|| malformed("a certificate's `data` is no bytes, or too long"))?;
        parsed.push(GuestCertificate { kind, bytes });
    }
    Ok(parsed)
}

/// The firmware's layout from the `sev` crate's fields. Publication 56860, ATTESTATION_REPORT.
fn report_of_fields(fields: &Map<String, Value>) -> Result<Vec<u8>, Refusal> {
    let mut report = Fields {
        fields,
        raw: vec![0; REPORT_LEN],
    };
    report.number(0x000, 4, &["version"])?;
    report.number(0x004, 4, &["guest_svn"])?;
    report.number(0x008, 8, &["policy"])?;
    report.bytes(0x010, 16, "family_id")?;
    report.bytes(0x020, 16, "image_id")?;
    report.number(0x030, 4, &["vmpl"])?;
    report.number(0x034, 4, &["sig_algo"])?;
    report.tcb(0x038, "current_tcb")?;
    report.number(0x040, 8, &["plat_info"])?;
    report.number(0x048, 4, &["key_info", "_author_key_en", "author_key_en"])?;
    report.bytes(0x050, 64, "report_data")?;
    report.bytes(0x090, 48, "measurement")?;
    report.bytes(0x0c0, 32, "host_data")?;
    report.bytes(0x0e0, 48, "id_key_digest")?;
    report.bytes(0x110, 48, "author_key_digest")?;
    report.bytes(0x140, 32, "report_id")?;
    report.bytes(0x160, 32, "report_id_ma")?;
    report.tcb(0x180, "reported_tcb")?;
    for (at, name) in [
        (0x188, "cpuid_fam_id"),
        (0x189, "cpuid_mod_id"),
        (0x18a, "cpuid_step"),
    ] {
        report.optional(at, 1, name)?;
    }
    report.bytes(0x1a0, 64, "chip_id")?;
    report.tcb(0x1e0, "committed_tcb")?;
    report.firmware(0x1e8, "current")?;
    report.firmware(0x1ec, "committed")?;
    report.tcb(0x1f0, "launch_tcb")?;
    report.optional(0x1f8, 8, "launch_mit_vector")?;
    report.optional(0x200, 8, "current_mit_vector")?;
    report.signature()?;
    Ok(report.raw)
}

struct Fields<'a> {
    fields: &'a Map<String, Value>,
    raw: Vec<u8>,
}

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Result<&'a Value, Refusal> {
        self.fields
            .get(name)
            .ok_or_else(|| malformed(&format!("the report has no `{name}`")))
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        let place = self.raw.iter_mut().skip(at);
        for (to, from) in place.zip(bytes) {
            *to = *from;
        }
    }

    /// A little-endian number under the first of `names` that is there.
    fn number(&mut self, at: usize, len: usize, names: &[&str]) -> Result<(), Refusal> {
        let value = names.iter().find_map(|name| self.fields.get(*name));
        let first = names.first().copied().unwrap_or_default();
        let bytes = value
            .and_then(|value| little_endian(value, len))
            .ok_or_else(|| malformed(&format!("the report's `{first}` is missing or no number")))?;
        self.put(at, &bytes);
        Ok(())
    }

    fn optional(&mut self, at: usize, len: usize, name: &str) -> Result<(), Refusal> {
        match self.fields.get(name) {
            None | Some(Value::Null) => Ok(()),
            Some(_) => self.number(at, len, &[name]),
        }
    }

    fn bytes(&mut self, at: usize, len: usize, name: &str) -> Result<(), Refusal> {
        let bytes = blob(self.get(name)?, len, name)?;
        self.put(at, &bytes);
        Ok(())
    }

    /// `fmc` is there on Turin, whose order of the parts is another.
    fn tcb(&mut self, at: usize, name: &str) -> Result<(), Refusal> {
        let tcb = self.get(name)?;
        let part = |part: &str| little_endian(tcb.get(part)?, 1)?.first().copied();
        let bad = || malformed(&format!("the report's `{name}` is no TCB version"));
        let bootloader = part("bootloader").ok_or_else(bad)?;
        let tee = part("tee").ok_or_else(bad)?;
        let snp = part("snp").ok_or_else(bad)?;
        let microcode = part("microcode").ok_or_else(bad)?;
        let bytes = match tcb.get("fmc") {
            None | Some(Value::Null) => [bootloader, tee, 0, 0, 0, 0, snp, microcode],
            Some(_) => {
                let fmc = part("fmc").ok_or_else(bad)?;
                [fmc, bootloader, tee, snp, 0, 0, 0, microcode]
            }
        };
        self.put(at, &bytes);
        Ok(())
    }

    /// `{major, minor, build}` under `name`, or three members with the name in front.
    fn firmware(&mut self, at: usize, name: &str) -> Result<(), Refusal> {
        let nested = self.fields.get(name);
        for (offset, part) in ["build", "minor", "major"].into_iter().enumerate() {
            let flat = format!("{name}_{part}");
            let value = match nested {
                Some(version) => version.get(part),
                None => self.fields.get(&flat),
            };
            let bytes = value
                .and_then(|value| little_endian(value, 1))
                .ok_or_else(|| malformed(&format!("the report has no `{flat}`")))?;
            self.put(at + offset, &bytes);
        }
        Ok(())
    }

    fn signature(&mut self) -> Result<(), Refusal> {
        let signature = self.get("signature")?;
        for (at, part) in [(0x2a0, "r"), (0x2a0 + SCALAR_LEN, "s")] {
            let value = signature
                .get(part)
                .ok_or_else(|| malformed("the report's `signature` has no r and s"))?;
            let bytes = blob(value, SCALAR_LEN, "signature")?;
            self.put(at, &bytes);
        }
        Ok(())
    }
}

fn little_endian(value: &Value, len: usize) -> Option<Vec<u8>> {
    let bytes = value.as_u64()?.to_le_bytes();
    let (low, high) = bytes.split_at_checked(len)?;
    high.iter().all(|byte| *byte == 0).then(|| low.to_vec())
}

/// Exactly `len` bytes.
fn blob(value: &Value, len: usize, name: &str) -> Result<Vec<u8>, Refusal> {
    bytes_of(value, len)
        .filter(|bytes| bytes.len() == len)
        .ok_or_else(|| malformed(&format!("`{name}` is not {len} bytes")))
}

/// Bytes as a list of numbers, hex or base64, at most `limit` of them.
fn bytes_of(value: &Value, limit: usize) -> Option<Vec<u8>> {
    match value {
        Value::Array(numbers) if numbers.len() <= limit => numbers
            .iter()
            .map(|number| u8::try_from(number.as_u64()?).ok())
            .collect(),
        Value::String(text) if text.len() <= 2 * limit => {
            let bytes = hex::decode(text)
                .ok()
                .or_else(|| STANDARD.decode(text).ok())
                .or_else(|| URL_SAFE_NO_PAD.decode(text).ok())?;
            (bytes.len() <= limit).then_some(bytes)
        }
        _ => None,
    }
}

fn malformed(detail: &str) -> Refusal {
    Refusal::Malformed("evidence", detail.to_owned())
}

const SCALAR_LEN: usize = 72;
const MAX_CERTIFICATES: usize = 8;
const MAX_CERTIFICATE_LEN: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use sev::firmware::guest::AttestationReport;
    use sev::parser::ByteParser;

    fn vectors() -> Vec<(String, Vec<u8>)> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors");
        let mut found = Vec::new();
        collect(std::path::Path::new(folder), &mut found);
        assert!(found.len() >= 3, "only {} reports of AMD's", found.len());
        found
    }

    fn collect(folder: &std::path::Path, found: &mut Vec<(String, Vec<u8>)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, found);
            } else if let Ok(bytes) = std::fs::read(&path)
                && Report::parse(&bytes).is_ok()
            {
                found.push((path.display().to_string(), bytes));
            }
        }
    }

    #[test]
    fn the_sev_crates_json_becomes_the_firmwares_bytes_again() {
        let mut signed_alike = 0;
        for (name, raw) in vectors() {
            let Ok(report) = AttestationReport::from_bytes(&raw) else {
                continue;
            };
            let json = json!({ "attestation_report": report, "cert_chain": null });
            let text = serde_json::to_string(&json).unwrap();
            let parsed = GuestEvidence::parse(&serde_json::from_str(&text).unwrap());
            assert_eq!(parsed.unwrap().report.as_bytes(), &raw[..], "{name}");
            signed_alike += 1;
        }
        assert!(
            signed_alike >= 3,
            "only {signed_alike} reports were compared"
        );
    }

    #[test]
    fn every_raw_form_is_the_same_report() {
        let (_, raw) = vectors().remove(0);
        for form in [
            json!(raw),
            json!(hex::encode(&raw)),
            json!(STANDARD.encode(&raw)),
            json!(URL_SAFE_NO_PAD.encode(&raw)),
        ] {
            let parsed = GuestEvidence::parse(&json!({ "attestation_report": form })).unwrap();
            assert_eq!(parsed.report.as_bytes(), &raw[..]);
        }
    }

    #[test]
    fn certificates_are_read_by_kind_and_bounded() {
        let (_, raw) = vectors().remove(0);
        let evidence = |chain: Value| {
            GuestEvidence::parse(&json!({ "attestation_report": raw, "cert_chain": chain }))
        };
        let other = json!({ "cert_type": { "OTHER": "0" }, "data": [1] });
        let vcek = json!({ "cert_type": "VCEK", "data": [1, 2] });
        let parsed = evidence(json!([other, vcek])).unwrap();
        assert_eq!(parsed.certificates.len(), 1);
        assert_eq!(parsed.certificate(CertificateKind::Vcek), Some(&[1, 2][..]));
        assert_eq!(parsed.certificate(CertificateKind::Vlek), None);
        for bad in [
            json!([vcek, vcek, vcek, vcek, vcek, vcek, vcek, vcek, vcek]),
            json!([{ "cert_type": "VCEK", "data": [256] }]),
            json!([{ "cert_type": "VCEK", "data": vec![0; MAX_CERTIFICATE_LEN + 1] }]),
            json!([{ "cert_type": "VCEK" }]),
            json!("VCEK"),
        ] {
            assert!(evidence(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_field_that_is_missing_or_too_wide_is_named() {
        let raw = vectors()
            .into_iter()
            .find_map(|(_, raw)| AttestationReport::from_bytes(&raw).ok())
            .unwrap();
        let whole = serde_json::to_value(raw).unwrap();
        for (field, value) in [
            ("vmpl", json!(1_u64 << 32)),
            ("measurement", json!([1, 2, 3])),
            ("reported_tcb", json!({ "snp": 300 })),
            ("committed", json!({ "major": 1 })),
            ("signature", json!({ "r": [] })),
            ("policy", Value::Null),
        ] {
            let mut report = whole.clone();
            report[field] = value;
            let refused = GuestEvidence::parse(&json!({ "attestation_report": report }));
            let text = refused.unwrap_err().to_string();
            assert!(text.contains(field), "{field}: {text}");
        }
    }
}
