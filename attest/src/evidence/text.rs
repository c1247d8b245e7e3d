//! Reports as text: hex and base64.

use super::Encoding;
use base64::Engine as _;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

/// Why text is no evidence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// A PEM file: a certificate, most likely.
    #[error("this is a PEM file, and a report is none; a certificate is given as the leaf")]
    Pem,
    /// Half a byte.
    #[error("{0} hex digits are not whole bytes; the text was cut")]
    OddHex(usize),
    /// Something that neither alphabet has, or text that was cut.
    #[error("the text is neither hex nor base64: {0}")]
    Base64(#[from] base64::DecodeError),
    /// Nothing but white space.
    #[error("the text is only white space")]
    Blank,
}

/// Whether there are only printable characters and white space, as in no report.
pub(super) fn is_text(bytes: &[u8]) -> bool {
    bytes
        .iter()
        .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
}

/// Decodes text. Only hex digits mean hex: base64 of 1184 bytes that happens to have no other
/// character does not occur.
pub(super) fn decode(text: &[u8]) -> Result<(Encoding, Vec<u8>), TextError> {
    if text.trim_ascii_start().starts_with(b"-----") {
        return Err(TextError::Pem);
    }
    let text: Vec<u8> = text
        .iter()
        .copied()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    if text.is_empty() {
        return Err(TextError::Blank);
    }
    if text.iter().all(u8::is_ascii_hexdigit) {
        let bytes = hex::decode(&text).map_err(|_| TextError::OddHex(text.len()))?;
        return Ok((Encoding::Hex, bytes));
    }
    let url_safe = text.iter().any(|byte| matches!(byte, b'-' | b'_'));
    let alphabet = if url_safe { &URL_SAFE } else { &STANDARD };
    Ok((
        Encoding::Base64,
        GeneralPurpose::new(alphabet, CONFIG).decode(&text)?,
    ))
}

/// Tools differ in whether they pad; bits behind the last byte have to be zero all the same.
const CONFIG: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
