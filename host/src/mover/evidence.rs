//! What travels beside the pages of a SEV guest: the target's certificates one way, the send context the other.
//!
//! The target's certificates come from the peer. Nothing is sent to a platform whose chain does not end at one
//! of AMD's pinned roots, or at an emulated root that policy names.

use casemate_attest::legacy::{LegacyChain, TrustAnchors};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::confidential::protocol::PlatformEvidence;
use crate::vmm::protocol::RoleError;

/// What RECEIVE_START needs of the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendContext {
    /// Guest policy.
    pub policy: u32,
    /// The source's PDH, 2084 bytes.
    #[serde(with = "serde_bytes")]
    pub source_pdh: Vec<u8>,
    /// Session, 128 bytes.
    #[serde(with = "serde_bytes")]
    pub session: Vec<u8>,
}

/// A target that was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its certificates, in order.
    pub evidence: PlatformEvidence,
    /// Whether it is a software secure processor.
    pub emulated: bool,
    /// SHA-256 of its PDH certificate.
    pub pdh: [u8; 32],
}

/// Verifies a peer's evidence up to a trusted root. `emulated` is the technology of the guest itself: a guest
/// of a real processor goes to no software one, whatever policy names.
pub fn verify_target(
    bytes: &[u8],
    emulated_roots: &[[u8; 32]],
    emulated: bool,
) -> Result<Target, RoleError> {
    let refuse = |e: &dyn std::fmt::Display| RoleError::new("TARGET_UNTRUSTED", e);
    let evidence: PlatformEvidence = decode(bytes, "platform evidence")?;
    let chain = LegacyChain::parse(&evidence.pdh, &evidence.platform, &evidence.amd)
        .map_err(|e| refuse(&e))?;
    let mut trust = TrustAnchors::amd();
    for root in emulated_roots {
        trust = trust.with_emulated_root(*root).map_err(|e| refuse(&e))?;
    }
    let verified = chain.verify(&trust).map_err(|e| refuse(&e))?;
    if verified.emulated() && !emulated {
        return Err(refuse(
            &"the target is a software secure processor and the guest is a real SEV guest; it stays",
        ));
    }
    Ok(Target {
        emulated: verified.emulated(),
        pdh: verified.pdh().fingerprint(),
        evidence,
    })
}

/// Writes a blob for the peer.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, RoleError> {
    postcard::to_stdvec(value).map_err(|e| RoleError::new("INTERNAL", e))
}

/// Reads a peer's blob: bounded, and nothing behind it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, RoleError> {
    if bytes.len() > MAX_BLOB {
        return Err(RoleError::new(
            "EVIDENCE_MALFORMED",
            format!("{what} of {} bytes, {MAX_BLOB} at most", bytes.len()),
        ));
    }
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(RoleError::new(
            "EVIDENCE_MALFORMED",
            format!("{} bytes behind the {what}", rest.len()),
        )),
        Err(e) => Err(RoleError::new("EVIDENCE_MALFORMED", format!("{what}: {e}"))),
    }
}

/// Most bytes of a blob; the largest evidence has about 12 KiB.
const MAX_BLOB: usize = 32 * 1024;
