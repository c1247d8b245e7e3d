//! The kernel's interfaces, as `casemate_attest::evidence` speaks them.

use casemate_attest::broker::evidence::{CertificateKind, GuestCertificate};
use casemate_attest::evidence::table::{self, TableCertificate};
use casemate_attest::evidence::{Evidence, sev_guest, tsm::TsmReports};

use super::{GuestReport, ReportSource, SourceError, bound};

/// `/sys/kernel/config/tsm/report`, Linux 6.7 and later.
pub struct Tsm {
    vmpl: Option<u8>,
}

/// `/dev/sev-guest`.
pub struct SevGuestDevice {
    vmpl: Option<u8>,
}

impl Tsm {
    /// For privilege level `vmpl`, or the kernel's own.
    pub const fn new(vmpl: Option<u8>) -> Self {
        Self { vmpl }
    }
}

impl SevGuestDevice {
    /// For privilege level `vmpl`, or 0.
    pub const fn new(vmpl: Option<u8>) -> Self {
        Self { vmpl }
    }
}

impl ReportSource for Tsm {
    fn report(&mut self, report_data: &[u8; 64]) -> Result<GuestReport, SourceError> {
        let evidence = TsmReports::system()
            .report(report_data, self.vmpl)
            .map_err(|e| SourceError::Tsm(e.to_string()))?;
        guest_report(&evidence, report_data)
    }
}

impl ReportSource for SevGuestDevice {
    fn report(&mut self, report_data: &[u8; 64]) -> Result<GuestReport, SourceError> {
        let evidence = sev_guest::report(report_data, self.vmpl)
            .map_err(|e| SourceError::SevGuest(e.to_string()))?;
        guest_report(&evidence, report_data)
    }
}

fn guest_report(evidence: &Evidence, report_data: &[u8; 64]) -> Result<GuestReport, SourceError> {
    Ok(GuestReport {
        report: bound(&evidence.report, report_data)?,
        certificates: certificates(&evidence.certificates),
        emulated: false,
    })
}

/// Those certificates that a broker can use.
pub(super) fn certificates(table: &[TableCertificate]) -> Vec<GuestCertificate> {
    let known = table.iter().filter_map(|entry| {
        let kind = match entry.kind {
            table::CertificateKind::Vcek => CertificateKind::Vcek,
            table::CertificateKind::Vlek => CertificateKind::Vlek,
            table::CertificateKind::Ask => CertificateKind::Ask,
            table::CertificateKind::Ark => CertificateKind::Ark,
            table::CertificateKind::Crl => CertificateKind::Crl,
            table::CertificateKind::Other(_) => return None,
        };
        Some(GuestCertificate {
            kind,
            bytes: entry.bytes.clone(),
        })
    });
    known.collect()
}
