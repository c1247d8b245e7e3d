//! Why the broker refused, as the guest and the log see it.

use super::key::KeyError;
use super::protocol::ErrorInformation;
use super::resource::PathError;

/// A refusal. The text names the remedy and nothing that the guest does not know; what a policy
/// expects is written to the log only.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A body longer than its bound.
    #[error("the body is longer than {0} bytes")]
    TooLarge(usize),
    /// Not the JSON it should be.
    #[error("the {0} cannot be read: {1}")]
    Malformed(&'static str, String),
    /// A version that is not spoken here.
    #[error("protocol version {0} is not spoken here; 0.2.0, 0.3.0 and 0.4.0 are")]
    ProtocolVersion(String),
    /// A TEE that is not verified here.
    #[error("evidence of `{0}` is not verified here; `snp` is")]
    UnknownTee(String),
    /// The guest knows no hash algorithm that is used here.
    #[error("the guest lists no hash algorithm that is used here; sha384 is")]
    NoCommonHash,
    /// Evidence of a device.
    #[error("evidence of additional devices is not verified here; send none")]
    AdditionalEvidence,
    /// No session cookie, or one that names no session (since the broker's last start).
    #[error("there is no such session; begin with POST /kbs/v0/auth")]
    NoSession,
    /// The session has ended.
    #[error("the session has expired; begin again with POST /kbs/v0/auth")]
    SessionExpired,
    /// The session's challenge was answered before.
    #[error("this challenge has been answered before; a nonce serves once")]
    NonceUsed,
    /// The attestation names another nonce than the session's.
    #[error("the nonce is not the one of this session's challenge")]
    NonceMismatch,
    /// A key that cannot be encrypted to.
    #[error("tee-pubkey: {0}")]
    Key(#[from] KeyError),
    /// The report was not made for this nonce and this key.
    #[error("report_data is not the hash of this session's nonce and this key")]
    ReportDataMismatch,
    /// The evidence was not accepted.
    #[error("the evidence is not accepted: {0}")]
    NotAccepted(String),
    /// A resource was asked for before the guest was accepted.
    #[error("this session is not attested; send the evidence to POST /kbs/v0/attest")]
    NotAttested,
    /// No policy says who may have the resource.
    #[error("no policy allows this resource to anybody")]
    NoPolicy,
    /// The resource's own policy does not accept the guest.
    #[error("the policy of this resource does not accept the guest: {0}")]
    PolicyDenied(String),
    /// The path names no resource.
    #[error(transparent)]
    Path(#[from] PathError),
    /// There is nothing at the path.
    #[error("there is no such resource")]
    NotFound,
    /// As many sessions are open as there may be.
    #[error("too many sessions are open; try again in a minute")]
    TooManySessions,
    /// The resource store failed.
    #[error("the resource store is out of reach; try again later")]
    Store,
    /// The decision could not be recorded.
    #[error("the decision could not be recorded, so nothing was released; try again later")]
    NotRecorded,
    /// A fault of the broker's own.
    #[error("the broker failed; its log says more")]
    Internal,
}

impl Refusal {
    /// Stable.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "BODY_TOO_LARGE",
            Self::Malformed(..) => "MALFORMED",
            Self::ProtocolVersion(_) => "PROTOCOL_VERSION",
            Self::UnknownTee(_) => "UNKNOWN_TEE",
            Self::NoCommonHash => "NO_COMMON_HASH",
            Self::AdditionalEvidence => "ADDITIONAL_EVIDENCE",
            Self::NoSession => "NO_SESSION",
            Self::SessionExpired => "SESSION_EXPIRED",
            Self::NonceUsed => "NONCE_USED",
            Self::NonceMismatch => "NONCE_MISMATCH",
            Self::Key(_) => "KEY_REFUSED",
            Self::ReportDataMismatch => "REPORT_DATA_MISMATCH",
            Self::NotAccepted(_) => "EVIDENCE_NOT_ACCEPTED",
            Self::NotAttested => "NOT_ATTESTED",
            Self::NoPolicy => "NO_POLICY",
            Self::PolicyDenied(_) => "POLICY_DENIED",
            Self::Path(_) => "BAD_RESOURCE_PATH",
            Self::NotFound => "NO_RESOURCE",
            Self::TooManySessions => "TOO_MANY_SESSIONS",
            Self::Store => "STORE_UNAVAILABLE",
            Self::NotRecorded => "NOT_RECORDED",
            Self::Internal => "INTERNAL",
        }
    }

    /// The HTTP status. Guests begin anew on 401 and give up on the others.
    pub const fn status(&self) -> u16 {
        match self {
            Self::Malformed(..) => 400,
            Self::NoPolicy | Self::PolicyDenied(_) => 403,
            Self::Path(_) | Self::NotFound => 404,
            Self::TooLarge(_) => 413,
            Self::Internal => 500,
            Self::TooManySessions | Self::Store | Self::NotRecorded => 503,
            _ => 401,
        }
    }

    /// As sent.
    pub fn information(&self) -> ErrorInformation {
        ErrorInformation {
            error_type: format!("urn:casemate:broker:{}", self.code()),
            detail: self.to_string(),
        }
    }
}
