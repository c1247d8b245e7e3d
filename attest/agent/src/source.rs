//! Where a report comes from: the kernel's configfs-tsm, `/dev/sev-guest`, or an emulated
//! processor, behind a socket or the guest's own messages, which says so wherever it is used.

mod emulated;
mod live;
mod messages;

pub use emulated::EmulatedSocket;
pub use live::{SevGuestDevice, Tsm};
pub use messages::{GuestMessages, MessagesError, Places, Stream};

use casemate_attest::broker::evidence::GuestCertificate;
use casemate_attest::report::{Report, ReportError};
use std::io;
use std::path::Path;

/// A report, and what goes with it to the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestReport {
    /// The report's 1184 bytes.
    pub report: Vec<u8>,
    /// Certificates that the host supplied.
    pub certificates: Vec<GuestCertificate>,
    /// Whether it is a software secure processor's.
    pub emulated: bool,
}

/// Gives reports.
pub trait ReportSource {
    /// A report over `report_data`.
    fn report(&mut self, report_data: &[u8; 64]) -> Result<GuestReport, SourceError>;
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Neither interface of the kernel is there.
    #[error(
        "no report: this is no SNP guest, or its kernel lacks the module sev-guest ({tsm}; {device})"
    )]
    None {
        /// What configfs-tsm said.
        tsm: String,
        /// What the device said.
        device: String,
    },
    /// configfs-tsm failed.
    #[error("configfs-tsm gave no report: {0}")]
    Tsm(String),
    /// `/dev/sev-guest` failed.
    #[error("/dev/sev-guest gave no report: {0}")]
    SevGuest(String),
    /// The emulated processor's socket failed.
    #[error("the emulated processor at {0} gave no report: {1}")]
    Socket(String, io::Error),
    /// An emulated guest's own messages failed.
    #[error("the EMULATED processor gave no report: {0}")]
    Messages(#[from] MessagesError),
    /// The emulated processor refused.
    #[error("the emulated processor refused with status {0:#x}")]
    Status(u32),
    /// What came is no report.
    #[error("what came is no report: {0}")]
    Report(#[from] ReportError),
    /// What came with it is no certificate table.
    #[error("what came with the report is no certificate table: {0}")]
    Certificates(String),
    /// A report over something else.
    #[error("the report is not over what was asked for")]
    NotBound,
}

/// What this guest has: the kernel's configfs-tsm where it is, else its device; where the kernel has
/// neither, the messages of a guest that is emulated and says so.
pub struct Live {
    vmpl: Option<u8>,
}

impl Live {
    /// For privilege level `vmpl`, or the kernel's own.
    pub const fn new(vmpl: Option<u8>) -> Self {
        Self { vmpl }
    }
}

impl ReportSource for Live {
    fn report(&mut self, report_data: &[u8; 64]) -> Result<GuestReport, SourceError> {
        let real = match self.kernels(report_data) {
            Ok(report) => return Ok(report),
            Err(error) => error,
        };
        // A device of AMD's has the last word: what a host writes on the command line is no way
        // round it.
        let mut emulated = GuestMessages::system(self.vmpl);
        if Path::new(SEV_GUEST).exists() || !emulated.is_named() {
            return Err(real);
        }
        emulated.report(report_data)
    }
}

impl Live {
    fn kernels(&self, report_data: &[u8; 64]) -> Result<GuestReport, SourceError> {
        let tsm = match Tsm::new(self.vmpl).report(report_data) {
            Ok(report) => return Ok(report),
            Err(error) => error,
        };
        if Path::new(TSM).exists() {
            return Err(tsm);
        }
        SevGuestDevice::new(self.vmpl)
            .report(report_data)
            .map_err(|device| SourceError::None {
                tsm: tsm.to_string(),
                device: device.to_string(),
            })
    }
}

/// `raw`, if it is a report over `report_data`.
fn bound(raw: &[u8], report_data: &[u8; 64]) -> Result<Vec<u8>, SourceError> {
    let report = Report::parse(raw)?;
    if report.report_data() != *report_data {
        return Err(SourceError::NotBound);
    }
    Ok(raw.to_vec())
}

const TSM: &str = "/sys/kernel/config/tsm/report";
const SEV_GUEST: &str = "/dev/sev-guest";
