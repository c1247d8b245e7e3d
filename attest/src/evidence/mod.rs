//! Where SNP evidence comes from, and the forms it is carried in.
//!
//! Whatever a guest, a cloud or a file hands over is decoded to exactly one report of 1184 raw
//! bytes and what came along with it. Decoding believes nothing: it says what the bytes are, and
//! [`verify`](crate::verify) decides whether anybody should trust them.
//!
//! | Form | Recognised by |
//! | --- | --- |
//! | raw report | 1184 bytes |
//! | MSG_REPORT_RSP payload | 1216 bytes, or 4000 (the kernel's response buffer, zero-filled) |
//! | Azure HCL blob | starts with `HCLA` |
//! | hex of any of these | only hex digits and white space |
//! | base64 of any of these | any other printable text; both alphabets, padding may be missing |
//!
//! A report and each container hold zero bytes, so nothing is text and binary at once.

pub mod azure;
mod message;
#[cfg(feature = "sev-guest")]
pub mod sev_guest;
pub mod table;
mod text;
pub mod tsm;

pub use azure::{AzureError, AzureRuntimeData};
pub use message::MessageError;
pub use table::{CertificateKind, TableCertificate, TableError};
pub use text::TextError;
pub use tsm::{TsmError, TsmReports};

use crate::report::REPORT_LEN;
use std::fmt;
use std::ops::Range;

/// The longest input that is looked at, in bytes.
pub const MAX_INPUT: usize = 1 << 20;

/// One report, raw, and what came with it. Nothing in it is believed yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Evidence {
    /// The report, byte for byte; for [`Report::parse`](crate::report::Report::parse).
    pub report: [u8; REPORT_LEN],
    /// The form it came in.
    pub source_format: SourceFormat,
    /// The certificates that the host supplied with it; often none.
    pub certificates: Vec<TableCertificate>,
    /// What an Azure blob carries besides.
    pub azure: Option<AzureRuntimeData>,
}

/// The form that evidence came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SourceFormat {
    /// How the bytes were written down.
    pub encoding: Encoding,
    /// What the bytes were.
    pub container: Container,
}

/// How bytes were written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// As they are.
    Binary,
    /// Two hex digits a byte.
    Hex,
    /// RFC 4648, either alphabet.
    Base64,
}

/// What a report was carried in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Container {
    /// Nothing: the report itself.
    Report,
    /// A guest message payload of firmware.
    MessageResponse,
    /// What an Azure guest reads from its vTPM.
    AzureHcl,
    /// A configfs-tsm entry.
    ConfigfsTsm,
    /// The device `/dev/sev-guest`.
    SevGuestDevice,
}

/// Why bytes are no evidence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceError {
    /// Nothing there.
    #[error("the evidence is empty; a report has {REPORT_LEN} bytes")]
    Empty,
    /// More than is looked at.
    #[error("the evidence has {0} bytes; at most {MAX_INPUT} are looked at")]
    TooLong(usize),
    /// A length that no known form has.
    #[error(
        "{0} bytes are neither a report ({REPORT_LEN}), a MSG_REPORT_RSP nor an Azure HCL blob; \
         give the report as its tool wrote it, raw, in hex or in base64"
    )]
    Unknown(usize),
    /// Text that is neither hex nor base64.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A guest message that carries no report.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A damaged Azure blob.
    #[error(transparent)]
    Azure(#[from] AzureError),
    /// A damaged certificate table.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// Decodes the bytes of a file or a message, in whichever of the forms above they are.
pub fn decode(bytes: &[u8]) -> Result<Evidence, EvidenceError> {
    match bytes.len() {
        0 => return Err(EvidenceError::Empty),
        len if len > MAX_INPUT => return Err(EvidenceError::TooLong(len)),
        _ => {}
    }
    if text::is_text(bytes) {
        let (encoding, decoded) = text::decode(bytes)?;
        decode_binary(&decoded, encoding)
    } else {
        decode_binary(bytes, Encoding::Binary)
    }
}

impl Evidence {
    /// The same with the certificates of a table that came beside it: the `auxblob` of
    /// configfs-tsm, or the second answer to SNP_GET_EXT_REPORT.
    pub fn with_certificate_table(mut self, raw: &[u8]) -> Result<Self, EvidenceError> {
        self.certificates = table::parse(raw)?;
        Ok(self)
    }

    /// The first certificate of that kind, DER as the host supplied it.
    pub fn certificate(&self, kind: CertificateKind) -> Option<&[u8]> {
        let mut all = self.certificates.iter();
        all.find(|found| found.kind == kind)
            .map(|found| found.bytes.as_slice())
    }

    fn of_report(report: &[u8], encoding: Encoding, container: Container) -> Option<Self> {
        Some(Self {
            report: report.try_into().ok()?,
            source_format: SourceFormat {
                encoding,
                container,
            },
            certificates: Vec::new(),
            azure: None,
        })
    }
}

impl EvidenceError {
    /// The stable code.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Empty => "EVIDENCE_EMPTY",
            Self::TooLong(_) => "EVIDENCE_TOO_LONG",
            Self::Unknown(_) => "EVIDENCE_UNKNOWN_FORMAT",
            Self::Text(_) => "EVIDENCE_TEXT_INVALID",
            Self::Message(_) => "EVIDENCE_MESSAGE_INVALID",
            Self::Azure(_) => "EVIDENCE_AZURE_INVALID",
            Self::Table(_) => "EVIDENCE_TABLE_INVALID",
        }
    }
}

impl fmt::Display for SourceFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.encoding {
            Encoding::Binary => "",
            Encoding::Hex => "hex of ",
            Encoding::Base64 => "base64 of ",
        })?;
        f.write_str(match self.container {
            Container::Report => "a raw report",
            Container::MessageResponse => "a MSG_REPORT_RSP",
            Container::AzureHcl => "an Azure HCL blob",
            Container::ConfigfsTsm => "a configfs-tsm entry",
            Container::SevGuestDevice => "/dev/sev-guest",
        })
    }
}

fn decode_binary(bytes: &[u8], encoding: Encoding) -> Result<Evidence, EvidenceError> {
    let of = |report: &[u8], container| {
        Evidence::of_report(report, encoding, container).ok_or(EvidenceError::Unknown(report.len()))
    };
    if bytes.starts_with(&azure::MAGIC) {
        let (report, runtime) = azure::decode(bytes)?;
        let mut evidence = of(report, Container::AzureHcl)?;
        evidence.azure = Some(runtime);
        return Ok(evidence);
    }
    if message::LENGTHS.contains(&bytes.len()) {
        return of(message::decode(bytes)?, Container::MessageResponse);
    }
    of(bytes, Container::Report)
}

/// Where a report carries what was asked for.
const REPORT_DATA: Range<usize> = 0x50..0x90;

#[cfg(test)]
mod tests;
