//! MSG_REPORT_RSP, the firmware's answer to a report request: publication 56860, table 25.
//!
//! The host relays it under the guest's message key; here it is only taken apart.

use crate::bytes;
use crate::report::REPORT_LEN;

/// Why a guest message carries no report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Firmware refused the request.
    #[error(
        "firmware refused the report request with status {0:#x} ({reason}); ask again",
        reason = status_text(*.0)
    )]
    Status(u32),
    /// A report of another size.
    #[error("the message announces a report of {0} bytes instead of {REPORT_LEN}")]
    Size(u32),
    /// A reserved byte, or one behind the report, is set.
    #[error("byte {0:#x} of the message should be zero")]
    NotZero(usize),
}

/// The payload alone, and the kernel's buffer for it.
pub(super) const LENGTHS: [usize; 2] = [HEADER_LEN + REPORT_LEN, 4000];

/// The report of a message of one of the [`LENGTHS`].
pub(super) fn decode(message: &[u8]) -> Result<&[u8], MessageError> {
    let status = bytes::le32(message, 0).unwrap_or(u32::MAX);
    if status != 0 {
        return Err(MessageError::Status(status));
    }
    let size = bytes::le32(message, 4).unwrap_or_default();
    if usize::try_from(size) != Ok(REPORT_LEN) {
        return Err(MessageError::Size(size));
    }
    let report = HEADER_LEN..HEADER_LEN.saturating_add(REPORT_LEN);
    let outside = |at: usize| at >= RESERVED_AT && !report.contains(&at);
    let mut all = message.iter().enumerate();
    if let Some((at, _)) = all.find(|(at, byte)| outside(*at) && **byte != 0) {
        return Err(MessageError::NotZero(at));
    }
    Ok(message.get(report).unwrap_or_default())
}

fn status_text(status: u32) -> &'static str {
    match status {
        0x16 => "invalid parameters",
        0x27 => "invalid key selection",
        _ => "no meaning known here",
    }
}

const RESERVED_AT: usize = 8;
const HEADER_LEN: usize = 32;
