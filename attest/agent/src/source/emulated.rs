//! An EMULATED secure processor behind a Unix socket, for machines without AMD's.
//!
//! One exchange a connection. The guest sends MSG_REPORT_REQ as the firmware takes it (96 bytes:
//! report_data, VMPL, key selection, zeros); it gets MSG_REPORT_RSP (status, size, 24 bytes of
//! zeros, the report), then a certificate table as the hypervisor would give it: its length in
//! four bytes, little-endian, and its bytes. Publication 56860, MSG_REPORT_REQ; 56421 for the table.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_attest::evidence::table;
use casemate_attest::report::REPORT_LEN;

use super::live::certificates;
use super::{GuestReport, ReportSource, SourceError, bound};

/// The socket of an emulated secure processor. What comes from it proves nothing about hardware.
pub struct EmulatedSocket {
    path: PathBuf,
    vmpl: u32,
}

impl EmulatedSocket {
    /// The socket at `path`, for privilege level `vmpl`.
    pub fn new(path: &Path, vmpl: Option<u8>) -> Self {
        Self {
            path: path.to_owned(),
            vmpl: vmpl.unwrap_or_default().into(),
        }
    }

    fn exchange(&self, report_data: &[u8; 64]) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let mut stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut request = report_data.to_vec();
        request.extend(self.vmpl.to_le_bytes());
        request.resize(REQUEST_LEN, 0);
        stream.write_all(&request)?;
        let mut head = [0; RESPONSE_HEAD_LEN];
        stream.read_exact(&mut head)?;
        if head.iter().take(4).any(|byte| *byte != 0) {
            return Ok((head.to_vec(), Vec::new()));
        }
        let mut report = vec![0; REPORT_LEN];
        stream.read_exact(&mut report)?;
        let mut len = [0; 4];
        stream.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len);
        if len as usize > table::MAX_TABLE {
            let text = "its certificate table is too long";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let mut certificates = vec![0; len as usize];
        stream.read_exact(&mut certificates)?;
        report.splice(..0, head);
        Ok((report, certificates))
    }
}

impl ReportSource for EmulatedSocket {
    fn report(&mut self, report_data: &[u8; 64]) -> Result<GuestReport, SourceError> {
        let (response, table) = self
            .exchange(report_data)
            .map_err(|e| SourceError::Socket(self.path.display().to_string(), e))?;
        if let Some((status, _)) = response.split_first_chunk::<4>()
            && *status != [0; 4]
        {
            return Err(SourceError::Status(u32::from_le_bytes(*status)));
        }
        let report = response.get(RESPONSE_HEAD_LEN..).unwrap_or_default();
        let table = table::parse(&table).map_err(|e| SourceError::Certificates(e.to_string()))?;
        Ok(GuestReport {
            report: bound(report, report_data)?,
            certificates: certificates(&table),
            emulated: true,
        })
    }
}

const REQUEST_LEN: usize = 96;
const RESPONSE_HEAD_LEN: usize = 32;
const PATIENCE: Duration = Duration::from_secs(10);
