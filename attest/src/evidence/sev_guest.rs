//! A live report from `/dev/sev-guest`, for kernels without configfs-tsm. Feature `sev-guest`.
//!
//! The one place that uses the `sev` crate's device. It asks for the report alone: the crate
//! reads a host's certificate table through raw pointers and without its length, so the
//! certificates are left to configfs-tsm and the key service.

use super::{Container, Encoding, Evidence, EvidenceError};
use sev::firmware::guest::Firmware;
use std::io;

/// Why the device gives no report.
#[derive(Debug, thiserror::Error)]
pub enum SevGuestError {
    /// It cannot be opened.
    #[error(
        "/dev/sev-guest cannot be opened: {0}; a live report needs root in an SNP guest with the \
         module sev-guest (modprobe sev-guest)"
    )]
    Open(#[source] io::Error),
    /// Kernel, host or firmware refused.
    #[error("/dev/sev-guest refused the request: {0}")]
    Refused(String),
    /// What came is no report.
    #[error("what /dev/sev-guest handed out is not usable: {0}")]
    Evidence(#[from] EvidenceError),
    /// The report answers another request.
    #[error("the report does not carry the data that was asked for; ask again")]
    NotBound,
}

/// Asks for a report over `report_data`, for privilege level `vmpl` (0 where none is given).
pub fn report(report_data: &[u8; 64], vmpl: Option<u8>) -> Result<Evidence, SevGuestError> {
    let mut device = Firmware::open().map_err(SevGuestError::Open)?;
    let report = device
        .get_report(None, Some(*report_data), vmpl.map(u32::from))
        .map_err(|error| SevGuestError::Refused(error.to_string()))?;
    let evidence = Evidence::of_report(&report, Encoding::Binary, Container::SevGuestDevice)
        .ok_or(EvidenceError::Unknown(report.len()))?;
    if evidence.report.get(super::REPORT_DATA) == Some(report_data.as_slice()) {
        Ok(evidence)
    } else {
        Err(SevGuestError::NotBound)
    }
}
