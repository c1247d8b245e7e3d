//! The messages of the CoCo key broker protocol (`kbs_attestation_protocol.md` of the Confidential
//! Containers project): Request → Challenge → Attestation → Response.
//!
//! | Version | Attestation | Hashed into report_data (SHA-384 of canonical JSON, zero-padded) |
//! | --- | --- | --- |
//! | 0.2.0 | `tee-pubkey`, `tee-evidence` | `{nonce, tee-pubkey}` |
//! | 0.3.0 | `tee-pubkey`, `tee-evidence: {primary_evidence, additional_evidence}` | `{additional-evidence, nonce, tee-pubkey}` |
//! | 0.4.0 | `runtime-data: {nonce, tee-pubkey}`, `tee-evidence` as in 0.3.0, `init-data` | as in 0.3.0 |
//!
//! 0.1.x is refused: its guests know no key wrapping but RSA PKCS #1 v1.5.

use super::Refusal;
use super::key::TeePublicKey;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The longest Request that is read.
pub const MAX_REQUEST_LEN: usize = 16 * 1024;
/// The longest Attestation that is read: a report and its certificates, written as JSON numbers.
pub const MAX_ATTESTATION_LEN: usize = 256 * 1024;
/// The cookie that names a session.
pub const SESSION_COOKIE: &str = "kbs-session-id";
/// The path all of the protocol lies under.
pub const PATH_PREFIX: &str = "/kbs/v0";

/// A protocol version that is spoken here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProtocolVersion {
    /// 0.2.0: JWE as RFC 7516 has it.
    V0_2,
    /// 0.3.0: evidence of more than one device.
    V0_3,
    /// 0.4.0: the runtime data as a member of its own.
    V0_4,
}

/// What a guest opens with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The version it speaks; the session keeps to it.
    pub version: ProtocolVersion,
    /// Whether it listed the hash algorithms it knows (SHA-384 is then one of them).
    pub lists_hashes: bool,
}

/// The broker's challenge, as sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// Goes into the evidence.
    pub nonce: String,
    /// `{"selected-hash-algorithm": "sha384"}`, or empty.
    #[serde(rename = "extra-params", default)]
    pub extra_params: Value,
}

/// What a guest proves itself with. Nothing in it is believed yet.
#[derive(Debug, Clone)]
pub struct Attestation {
    /// The nonce it says it used; versions before 0.4.0 do not say.
    pub nonce: Option<String>,
    /// The key that secrets are to be encrypted to.
    pub key: TeePublicKey,
    /// The evidence of the processor.
    pub evidence: Value,
    /// The evidence of devices, as the very text that was hashed; absent before 0.3.0.
    pub additional: Option<String>,
}

/// An answer to an Attestation that was accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenResponse {
    /// An attestation result, a signed JWT.
    pub token: String,
}

/// A refusal, after RFC 7807.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorInformation {
    /// `urn:casemate:broker:` and the stable code.
    #[serde(rename = "type")]
    pub error_type: String,
    /// In words.
    pub detail: String,
}

impl ProtocolVersion {
    /// The newest.
    pub const NEWEST: Self = Self::V0_4;

    /// As messages write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_2 => "0.2.0",
            Self::V0_3 => "0.3.0",
            Self::V0_4 => "0.4.0",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::V0_2, Self::V0_3, Self::V0_4]
            .into_iter()
            .find(|version| version.as_str() == text)
    }
}

impl Request {
    /// Reads a Request. Only `snp` is spoken here.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        if body.len() > MAX_REQUEST_LEN {
            return Err(Refusal::TooLarge(MAX_REQUEST_LEN));
        }
        let wire: WireRequest = serde_json::from_slice(body)
            .map_err(|e| Refusal::Malformed("Request", e.to_string()))?;
        let version = ProtocolVersion::parse(&wire.version)
            .ok_or_else(|| Refusal::ProtocolVersion(shortened(&wire.version)))?;
        if wire.tee != TEE_SNP {
            return Err(Refusal::UnknownTee(shortened(&wire.tee)));
        }
        check_metadata(&wire.extra_params)?;
        let lists_hashes = match wire.extra_params.get(SUPPORTED_HASHES) {
            None => false,
            Some(Value::Array(names)) if names.iter().any(is_sha384) => true,
            Some(_) => return Err(Refusal::NoCommonHash),
        };
        Ok(Self {
            version,
            lists_hashes,
        })
    }

    /// The message of a guest that speaks the newest version.
    pub fn message() -> Value {
        json!({
            "version": ProtocolVersion::NEWEST.as_str(),
            "tee": TEE_SNP,
            "extra-params": { SUPPORTED_HASHES: [SHA384] },
        })
    }
}

impl Challenge {
    /// The challenge for one who asked with `request`.
    pub fn new(nonce: String, request: &Request) -> Self {
        let extra_params = if request.lists_hashes {
            json!({ SELECTED_HASH: SHA384 })
        } else {
            Value::String(String::new())
        };
        Self {
            nonce,
            extra_params,
        }
    }

    /// Whether the broker asks for a hash other than SHA-384, the default.
    pub fn selects_other_hash(&self) -> bool {
        self.extra_params
            .get(SELECTED_HASH)
            .is_some_and(|name| !is_sha384(name))
    }
}

impl Attestation {
    /// Reads an Attestation in the shape of `version`.
    pub fn parse(body: &[u8], version: ProtocolVersion) -> Result<Self, Refusal> {
        if body.len() > MAX_ATTESTATION_LEN {
            return Err(Refusal::TooLarge(MAX_ATTESTATION_LEN));
        }
        let parsed = match version {
            ProtocolVersion::V0_2 => serde_json::from_slice(body).map(Self::from_v0_2),
            ProtocolVersion::V0_3 => serde_json::from_slice(body).map(Self::from_v0_3),
            ProtocolVersion::V0_4 => serde_json::from_slice(body).map(Self::from_v0_4),
        };
        let parsed = parsed.map_err(|e| Refusal::Malformed("Attestation", e.to_string()))?;
        // A device's evidence that nobody appraises must not look as if somebody had.
        match parsed.additional.as_deref().map(str::trim) {
            None | Some("" | "{}") => Ok(parsed),
            Some(_) => Err(Refusal::AdditionalEvidence),
        }
    }

    /// The message of a guest that speaks the newest version.
    pub fn message(nonce: &str, key: &TeePublicKey, evidence: &Value) -> Value {
        json!({
            "runtime-data": { "nonce": nonce, "tee-pubkey": key },
            "tee-evidence": { "primary_evidence": evidence, "additional_evidence": "" },
        })
    }

    /// The report_data that evidence for `nonce` must carry.
    pub fn report_data(&self, nonce: &str) -> [u8; 64] {
        report_data(nonce, &self.key, self.additional.as_deref())
    }

    fn from_v0_2(wire: WireAttestation2) -> Self {
        Self {
            nonce: None,
            key: wire.tee_pubkey,
            evidence: wire.tee_evidence,
            additional: None,
        }
    }

    fn from_v0_3(wire: WireAttestation3) -> Self {
        Self {
            nonce: None,
            key: wire.tee_pubkey,
            evidence: wire.tee_evidence.primary_evidence,
            additional: Some(wire.tee_evidence.additional_evidence),
        }
    }

    fn from_v0_4(wire: WireAttestation4) -> Self {
        Self {
            nonce: Some(wire.runtime_data.nonce),
            key: wire.runtime_data.tee_pubkey,
            evidence: wire.tee_evidence.primary_evidence,
            additional: Some(wire.tee_evidence.additional_evidence),
        }
    }
}

/// SHA-384 over the canonical JSON (RFC 8785) of the runtime data, zero-padded to 64 bytes.
/// `additional` is the text of the devices' evidence, `None` before version 0.3.0.
pub fn report_data(nonce: &str, key: &TeePublicKey, additional: Option<&str>) -> [u8; 64] {
    let mut runtime = BTreeMap::from([
        ("nonce", Canonical::Text(nonce)),
        ("tee-pubkey", Canonical::Object(key.members())),
    ]);
    if let Some(text) = additional {
        runtime.insert("additional-evidence", Canonical::Text(text));
    }
    // Sorted names, no blanks, and serde_json's escapes, which for strings are RFC 8785's. Maps of
    // strings cannot fail to serialise; if they did, the hash of nothing would match no report.
    let text = serde_json::to_vec(&runtime).unwrap_or_default();
    let digest = ring::digest::digest(&ring::digest::SHA384, &text);
    let mut padded = [0; 64];
    for (to, from) in padded.iter_mut().zip(digest.as_ref()) {
        *to = *from;
    }
    padded
}

/// Where the metadata names a primary TEE, it has to be the one of the Request.
fn check_metadata(extra: &Value) -> Result<(), Refusal> {
    let primary = extra
        .get("tee-metadata")
        .and_then(|metadata| metadata.get("primary_tee"))
        .and_then(|primary| primary.get("tee"));
    match primary {
        None => Ok(()),
        Some(tee) if tee.as_str() == Some(TEE_SNP) => Ok(()),
        Some(tee) => Err(Refusal::UnknownTee(shortened(&tee.to_string()))),
    }
}

fn is_sha384(name: &Value) -> bool {
    name.as_str()
        .is_some_and(|name| name.eq_ignore_ascii_case(SHA384))
}

/// What a peer wrote, short and printable enough for a message and the log.
fn shortened(text: &str) -> String {
    let printable = |c: char| if c.is_ascii_graphic() { c } else { '?' };
    text.chars().take(SHOWN_CHARS).map(printable).collect()
}

#[derive(Serialize)]
#[serde(untagged)]
enum Canonical<'a> {
    Text(&'a str),
    Object(BTreeMap<&'static str, &'a str>),
}

#[derive(Deserialize)]
struct WireRequest {
    version: String,
    tee: String,
    #[serde(rename = "extra-params", default)]
    extra_params: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireAttestation2 {
    tee_pubkey: TeePublicKey,
    tee_evidence: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireAttestation3 {
    tee_pubkey: TeePublicKey,
    tee_evidence: WireEvidence,
}

// `init-data` is not read: it proves nothing by itself, and the policy's `host_data` says which
// may be measured into a guest.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireAttestation4 {
    runtime_data: WireRuntimeData,
    tee_evidence: WireEvidence,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireRuntimeData {
    nonce: String,
    tee_pubkey: TeePublicKey,
}

#[derive(Deserialize)]
struct WireEvidence {
    primary_evidence: Value,
    additional_evidence: String,
}

const TEE_SNP: &str = "snp";
const SUPPORTED_HASHES: &str = "supported-hash-algorithms";
const SELECTED_HASH: &str = "selected-hash-algorithm";
const SHA384: &str = "sha384";
const SHOWN_CHARS: usize = 32;
