//! A failure over HTTP: a problem document (RFC 9457) with the failure's own stable code.

use hyper::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Failure;

/// The media type.
pub const PROBLEM: &str = "application/problem+json";

/// What a client gets of a request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// `about:blank`: the code says it all.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// Stable code.
    pub code: String,
    /// Object, reason and remedy.
    pub detail: String,
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        let status = failure.status();
        Self {
            kind: "about:blank".to_owned(),
            title: status.canonical_reason().unwrap_or_default().to_owned(),
            status: status.as_u16(),
            code: failure.code,
            detail: failure.error,
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::new(&problem.code, problem.detail)
    }
}

impl Failure {
    /// The HTTP status of its code: 500 for what a host cannot do and nobody outside can mend.
    pub fn status(&self) -> StatusCode {
        match self.code.as_str() {
            "BAD_REQUEST" => StatusCode::BAD_REQUEST,
            "NO_SUCH_PATH" | "NO_SUCH_GUEST" | "NO_SUCH_TASK" => StatusCode::NOT_FOUND,
            "METHOD_NOT_ALLOWED" => StatusCode::METHOD_NOT_ALLOWED,
            "REQUEST_TIMEOUT" => StatusCode::REQUEST_TIMEOUT,
            "TOO_LARGE" => StatusCode::PAYLOAD_TOO_LARGE,
            "MEDIA_TYPE" => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "NOT_PERMITTED" => StatusCode::FORBIDDEN,
            "NAME_TAKEN" | "ALREADY_MOVING" | "UPGRADING" | "NOT_MOVING" | "NOT_OWNER"
            | "NOT_RUNNING" | "NOT_WAITING" | "NOT_CANCELLABLE" => StatusCode::CONFLICT,
            "DESCRIPTION" | "BASE64" | "OWNER_SESSION" | "ID_BLOCK" | "POLICY" => {
                StatusCode::UNPROCESSABLE_ENTITY
            }
            "BUSY" | "AGENT_ENDING" | "NO_PROCESSOR" | "KVM_UNAVAILABLE" => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            code if code.starts_with("POLICY_") => StatusCode::FORBIDDEN,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_goes_there_and_back_with_its_code() {
        let failure = Failure::new("NO_SUCH_GUEST", "no guest a");
        let problem = Problem::from(failure.clone());
        assert_eq!((problem.status, problem.title.as_str()), (404, "Not Found"));
        assert_eq!(Failure::from(problem), failure);
        assert_eq!(Failure::new("POLICY_PERSON_UNKNOWN", "").status(), 403);
        assert_eq!(Failure::new("EVIDENCE", "").status(), 500);
    }
}
