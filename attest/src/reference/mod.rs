//! Reference values: which launch digests an owner stands behind, for how long, and what they were
//! computed from. A TOML document with a detached file of Ed25519 signatures.
//!
//! ```toml
//! version = 1
//! not_before = "2026-01-01T00:00:00Z"
//! expires = "2026-07-01T00:00:00Z"
//!
//! [[guest]]
//! name = "payments"
//! technology = "snp"
//!
//! [guest.inputs]
//! vmsa_profile = "qemu"
//! guest_features = "0x1"
//! cmdline_sha256 = "…"                     # with its terminating zero byte, as it is measured
//! firmware = { sha256 = "…", size = 4194304 }
//! kernel = { sha256 = "…", size = 11400704 }
//!
//! [[guest.launch]]
//! digest = "…"
//! vcpus = 4
//! vcpu_type = "EPYC-Milan"
//! vcpu_signature = "0xa00f11"
//! ```
//!
//! The document comes over any channel and is believed for its signatures alone: they are checked
//! over its bytes as they came, and before a single one of them is parsed.

mod document;
mod signature;

pub use document::{
    DocumentError, FileReference, Hash256, Inputs, Launch, ReferenceDocument, ReferenceGuest,
    Timestamp,
};
pub use signature::{
    KeyError, MAX_SIGNATURES_LEN, Signature, SignatureFileError, Signatures, SignerKey, SigningKey,
};

use crate::measure::guest::GuestDigest;
use ring::digest;
use std::time::SystemTime;

/// A document that enough trusted signers signed and whose time it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceValues {
    document: ReferenceDocument,
    signers: Vec<SignerKey>,
    sha256: Hash256,
}

/// Why a document is not believed.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// Too large.
    #[error("a reference value document has at most {MAX_DOCUMENT_LEN} bytes, this has {0}")]
    Length(usize),
    /// A threshold that would mean nothing, or can never be met.
    #[error(
        "{threshold} signatures are asked for and {trusted} keys are trusted; ask for 1 to {trusted}"
    )]
    Threshold {
        /// What the reader asks for.
        threshold: usize,
        /// How many different keys the reader trusts.
        trusted: usize,
    },
    /// A trusted signer's signature is not of this document.
    #[error(
        "the signature of {0} is not of this document; it was changed, or the files do not belong together"
    )]
    BadSignature(SignerKey),
    /// Not enough signers.
    #[error("{found} trusted signers signed, {threshold} are asked for")]
    TooFewSigners {
        /// Different trusted keys with a good signature.
        found: usize,
        /// What the reader asks for.
        threshold: usize,
    },
    /// The signed document is no reference value document.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// It is too early.
    #[error("these reference values hold from {0} on")]
    NotYetValid(Timestamp),
    /// It is too late.
    #[error("these reference values expired at {0}; get the owner's current ones")]
    Expired(Timestamp),
}

impl ReferenceError {
    /// A stable code.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Length(_) => "REFERENCE_TOO_LARGE",
            Self::Threshold { .. } => "REFERENCE_THRESHOLD",
            Self::BadSignature(_) => "REFERENCE_BAD_SIGNATURE",
            Self::TooFewSigners { .. } => "REFERENCE_TOO_FEW_SIGNERS",
            Self::Document(_) => "REFERENCE_MALFORMED",
            Self::NotYetValid(_) => "REFERENCE_NOT_YET_VALID",
            Self::Expired(_) => "REFERENCE_EXPIRED",
        }
    }
}

impl ReferenceValues {
    /// Believes `document` if at least `threshold` different keys of `trusted` signed it and
    /// `now` lies in its time. Signatures of other keys do not count, for or against; a bad one of
    /// a trusted key refuses the document.
    pub fn open(
        document: &[u8],
        signatures: &Signatures,
        trusted: &[SignerKey],
        threshold: usize,
        now: SystemTime,
    ) -> Result<Self, ReferenceError> {
        if document.len() > MAX_DOCUMENT_LEN {
            return Err(ReferenceError::Length(document.len()));
        }
        let signers = signers(document, signatures, trusted, threshold)?;
        let parsed = ReferenceDocument::parse(document)?;
        if now < parsed.not_before.time() {
            return Err(ReferenceError::NotYetValid(parsed.not_before));
        }
        if now >= parsed.expires.time() {
            return Err(ReferenceError::Expired(parsed.expires));
        }
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(digest::digest(&digest::SHA256, document).as_ref());
        Ok(Self {
            document: parsed,
            signers,
            sha256: Hash256(sha256),
        })
    }

    /// What the signers said.
    pub const fn document(&self) -> &ReferenceDocument {
        &self.document
    }

    /// Who signed, of those who are trusted.
    pub fn signers(&self) -> &[SignerKey] {
        &self.signers
    }

    /// SHA-256 of the document's bytes, for a record of what was relied on.
    pub const fn sha256(&self) -> Hash256 {
        self.sha256
    }

    /// The guest of that name.
    pub fn guest(&self, name: &str) -> Option<&ReferenceGuest> {
        self.document.guest.iter().find(|guest| guest.name == name)
    }

    /// The guests and launches that have this digest. More than one where descriptions differ in
    /// nothing that is measured.
    pub fn find(&self, digest: GuestDigest) -> impl Iterator<Item = (&ReferenceGuest, &Launch)> {
        self.document.guest.iter().flat_map(move |guest| {
            let same = guest.launch.iter().filter(move |l| l.digest == digest);
            same.map(move |launch| (guest, launch))
        })
    }
}

fn signers(
    document: &[u8],
    signatures: &Signatures,
    trusted: &[SignerKey],
    threshold: usize,
) -> Result<Vec<SignerKey>, ReferenceError> {
    let mut distinct = trusted.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    if threshold == 0 || threshold > distinct.len() {
        return Err(ReferenceError::Threshold {
            threshold,
            trusted: distinct.len(),
        });
    }
    let mut found = Vec::new();
    for signature in signatures.iter().filter(|s| distinct.contains(&s.key)) {
        if !signature.is_of(document) {
            return Err(ReferenceError::BadSignature(signature.key));
        }
        if !found.contains(&signature.key) {
            found.push(signature.key);
        }
    }
    if found.len() < threshold {
        return Err(ReferenceError::TooFewSigners {
            found: found.len(),
            threshold,
        });
    }
    Ok(found)
}

/// The largest document that is read, in bytes.
pub const MAX_DOCUMENT_LEN: usize = 4 << 20;

#[cfg(test)]
mod tests;
