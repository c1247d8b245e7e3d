//! The blob that an Azure confidential VM reads from its vTPM, NV index 0x01400001.
//!
//! On Azure the paravisor asks for the report, before the guest runs, and the guest finds it
//! wrapped: a 32-byte header, the report, a 20-byte header and *runtime data*, a JSON text with
//! the vTPM's attestation key. The report binds that text: `report_data` is its SHA-256 and 32
//! zeros. A nonce is therefore not in `report_data`; it is in the text's `user-data`, or in a
//! vTPM quote by the attestation key.
//!
//! Layout: Microsoft's OpenHCL sources (`igvm_attest`) and the `az-cvm-vtpm` crate. Only the
//! report is signed: headers and text are claims until [`AzureRuntimeData::check`] binds the
//! text.

use crate::bytes;
use crate::legacy::certificate::sha256;
use crate::report::{REPORT_LEN, Report};
use crate::verify::Check;
use serde_json::Value;

/// What comes with the report: claims of the paravisor.
#[derive(Debug, Clone, PartialEq)]
pub struct AzureRuntimeData {
    json: Vec<u8>,
    claims: Value,
}

/// Why a blob that starts like an Azure one is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AzureError {
    /// Ends too soon.
    #[error(
        "the Azure blob ends at {found} bytes, before byte {needed}; read the whole NV index 0x01400001"
    )]
    Truncated {
        /// How long it would have to be.
        needed: usize,
        /// How long it is.
        found: usize,
    },
    /// An unknown header version.
    #[error("version {0} of the Azure blob is not known here; 1 and 2 are")]
    Version(u32),
    /// The paravisor could not get a report.
    #[error("the Azure blob says that its request failed with status {0:#x}; restart the guest")]
    Status(u32),
    /// Another technology's evidence.
    #[error("the Azure blob carries evidence of type {0}, not an SNP report (2)")]
    ReportType(u32),
    /// The text is bound with another hash.
    #[error("the Azure runtime data is bound with hash type {0}, not SHA-256 (1)")]
    HashType(u32),
    /// The two lengths of the runtime data contradict each other, or are unreasonable.
    #[error("the Azure runtime data announces {data} bytes in all and {text} of text")]
    Sizes {
        /// The length with its header.
        data: u32,
        /// The length of the text.
        text: u32,
    },
    /// Something stands behind the end.
    #[error("byte {0:#x} lies behind the Azure runtime data and should be zero")]
    Trailing(usize),
    /// The text is no JSON object.
    #[error("the Azure runtime data is not a JSON object")]
    NotJson,
}

impl AzureRuntimeData {
    /// The text, byte for byte as it is hashed.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// The text as a JSON object: `keys` (with the vTPM's attestation key `HCLAkPub`),
    /// `vm-configuration`, `user-data`. Claims until [`check`](Self::check) accepts.
    pub fn claims(&self) -> &Value {
        &self.claims
    }

    /// What the guest put into NV index 0x01400002 before it asked, for instance a nonce.
    pub fn user_data(&self) -> Option<[u8; 64]> {
        let text = self.claims.get("user-data")?.as_str()?;
        hex::decode(text).ok()?.try_into().ok()
    }

    /// Whether `report` binds this text: `report_data` is its SHA-256 and zeros. It says nothing
    /// of the report itself, which has to verify as any other.
    pub fn check(&self, report: &Report) -> Check {
        let hash = sha256(&self.json);
        let expected = format!("report_data {} and 32 zero bytes", hex::encode(hash));
        let carried = report.report_data();
        let found = format!("report_data {}", hex::encode(carried));
        let (digest, rest) = carried.split_at(hash.len());
        if digest == hash && rest.iter().all(|byte| *byte == 0) {
            Check::accepted(AZURE_RUNTIME_DATA, &expected, found)
        } else {
            Check::rejected(
                AZURE_RUNTIME_DATA,
                &expected,
                found,
                "AZURE_RUNTIME_DATA_NOT_BOUND",
            )
        }
    }
}

/// What such a blob starts with.
pub(super) const MAGIC: [u8; 4] = *b"HCLA";

/// The report and the runtime data of a blob.
pub(super) fn decode(blob: &[u8]) -> Result<(&[u8], AzureRuntimeData), AzureError> {
    let truncated = |needed| AzureError::Truncated {
        needed,
        found: blob.len(),
    };
    let field = |at| bytes::le32(blob, at).ok_or(truncated(TEXT_AT));
    match field(4)? {
        1 | 2 => {}
        other => return Err(AzureError::Version(other)),
    }
    match field(16)? {
        0 => {}
        other => return Err(AzureError::Status(other)),
    }
    let (data, text) = (field(RUNTIME_AT)?, field(RUNTIME_AT + 16)?);
    match field(RUNTIME_AT + 8)? {
        REPORT_TYPE_SNP => {}
        other => return Err(AzureError::ReportType(other)),
    }
    match field(RUNTIME_AT + 12)? {
        HASH_TYPE_SHA256 => {}
        other => return Err(AzureError::HashType(other)),
    }
    if text > MAX_TEXT || text.checked_add(RUNTIME_HEADER_LEN) != Some(data) {
        return Err(AzureError::Sizes { data, text });
    }
    let end = usize::try_from(text)
        .ok()
        .and_then(|len| len.checked_add(TEXT_AT))
        .unwrap_or(usize::MAX);
    let json = blob.get(TEXT_AT..end).ok_or(truncated(end))?;
    let mut behind = blob.iter().enumerate().skip(end);
    if let Some((at, _)) = behind.find(|(_, byte)| **byte != 0) {
        return Err(AzureError::Trailing(at));
    }
    let claims: Value = serde_json::from_slice(json).map_err(|_| AzureError::NotJson)?;
    if !claims.is_object() {
        return Err(AzureError::NotJson);
    }
    let report = blob.get(REPORT_AT..RUNTIME_AT).ok_or(truncated(TEXT_AT))?;
    let json = json.to_vec();
    Ok((report, AzureRuntimeData { json, claims }))
}

/// The check's name.
const AZURE_RUNTIME_DATA: &str = "azure_runtime_data";

const REPORT_AT: usize = 32;
const RUNTIME_AT: usize = REPORT_AT + REPORT_LEN;
const RUNTIME_HEADER_LEN: u32 = 20;
const TEXT_AT: usize = RUNTIME_AT + RUNTIME_HEADER_LEN as usize;
/// The NV index has 2600 bytes; room for a larger one.
const MAX_TEXT: u32 = 64 << 10;
const REPORT_TYPE_SNP: u32 = 2;
const HASH_TYPE_SHA256: u32 = 1;
