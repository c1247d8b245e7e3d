//! Authenticate, attest, ask: the guest's side of the CoCo key broker protocol, version 0.4.0.

use std::time::{Duration, Instant};

use casemate_attest::broker::protocol::{
    Attestation, Challenge, ErrorInformation, PATH_PREFIX, Request, SESSION_COOKIE, TokenResponse,
    report_data,
};
use casemate_attest::broker::{FlattenedJwe, GuestEvidence, GuestKey, JweError, ResourcePath};
use zeroize::Zeroizing;

use crate::endpoint::Endpoint;
use crate::http::{Answer, HttpError, Outgoing, exchange};
use crate::source::{ReportSource, SourceError};

/// A guest towards one broker, with a key of its own.
pub struct Client {
    endpoint: Endpoint,
    key: GuestKey,
    patience: Duration,
    session: Option<String>,
}

/// What a guest learns from being accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// An attestation result, a signed JWT.
    pub token: String,
    /// Whether the report came from a software secure processor.
    pub emulated: bool,
}

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error("{0} cannot be reached: {1}")]
    Unreachable(Endpoint, std::io::Error),
    /// No answer.
    #[error("{0}: {1}")]
    Http(Endpoint, HttpError),
    /// The broker said no.
    #[error("the broker refused ({status} {code}): {detail}")]
    Refused {
        /// The status.
        status: u16,
        /// The last part of the error's type.
        code: String,
        /// In words.
        detail: String,
    },
    /// The broker is busy, or its store is out of reach.
    #[error("the broker cannot answer now ({status} {code}): {detail}")]
    Busy {
        /// The status.
        status: u16,
        /// The last part of the error's type.
        code: String,
        /// In words.
        detail: String,
    },
    /// An answer that makes no sense.
    #[error("the broker's {0} cannot be read")]
    Answer(&'static str),
    /// The broker wants another hash.
    #[error("the broker asks for a hash algorithm other than SHA-384")]
    Hash,
    /// No report.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The secret does not decrypt.
    #[error(transparent)]
    Secret(#[from] JweError),
}

impl ClientError {
    /// Whether it may be otherwise in a moment.
    pub fn passes(&self) -> bool {
        matches!(
            self,
            Self::Unreachable(..) | Self::Http(_, HttpError::Io(_)) | Self::Busy { .. }
        )
    }

    /// Whether the broker decided against this guest.
    pub fn refused(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

impl Client {
    /// A guest with a new key. `patience` is how long one exchange may take.
    pub fn new(endpoint: Endpoint, patience: Duration) -> Self {
        Self {
            endpoint,
            key: GuestKey::generate(),
            patience,
            session: None,
        }
    }

    /// Proves this guest: asks for a challenge, gets a report over it and the key, and sends it.
    pub fn attest(&mut self, source: &mut dyn ReportSource) -> Result<Accepted, ClientError> {
        self.session = None;
        let request = Request::message().to_string();
        let answer = self.ask("POST", "/auth", request.as_bytes())?;
        let challenge: Challenge =
            serde_json::from_slice(&answer.body).map_err(|_| ClientError::Answer("challenge"))?;
        if challenge.selects_other_hash() {
            return Err(ClientError::Hash);
        }
        self.session = Some(session_of(&answer).ok_or(ClientError::Answer("session cookie"))?);
        let bound = report_data(&challenge.nonce, &self.key.public(), Some(""));
        let report = source.report(&bound)?;
        let evidence = GuestEvidence::message(&report.report, &report.certificates);
        let body = Attestation::message(&challenge.nonce, &self.key.public(), &evidence);
        let answer = self.ask("POST", "/attest", body.to_string().as_bytes())?;
        let response: TokenResponse =
            serde_json::from_slice(&answer.body).map_err(|_| ClientError::Answer("token"))?;
        Ok(Accepted {
            token: response.token,
            emulated: report.emulated,
        })
    }

    /// Asks for a secret in an attested session.
    pub fn resource(&self, path: &ResourcePath) -> Result<Zeroizing<Vec<u8>>, ClientError> {
        let answer = self.ask("GET", &format!("/resource/{path}"), b"")?;
        let jwe: FlattenedJwe =
            serde_json::from_slice(&answer.body).map_err(|_| ClientError::Answer("secret"))?;
        Ok(self.key.open(&jwe)?)
    }

    fn ask(&self, method: &str, path: &str, body: &[u8]) -> Result<Answer, ClientError> {
        let mut connection = self
            .endpoint
            .connect(self.patience)
            .map_err(|e| ClientError::Unreachable(self.endpoint.clone(), e))?;
        let cookie = self
            .session
            .as_ref()
            .map(|session| format!("{SESSION_COOKIE}={session}"));
        let request = Outgoing {
            method,
            path: &format!("{PATH_PREFIX}{path}"),
            host: &self.endpoint.authority(),
            cookie: cookie.as_deref(),
            body,
        };
        let answer = exchange(&mut connection, &request)
            .map_err(|e| ClientError::Http(self.endpoint.clone(), e))?;
        if answer.status == 200 {
            return Ok(answer);
        }
        Err(refusal(&answer))
    }
}

/// Does `attempt` until it gives something, or fails for good, or `wait` is over: waits a quarter
/// of a second, then twice as long each time, five seconds at most.
pub fn patiently<T>(
    wait: Duration,
    mut waiting: impl FnMut(&ClientError, Duration),
    mut attempt: impl FnMut() -> Result<T, ClientError>,
) -> Result<T, ClientError> {
    let begun = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match attempt() {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        if !error.passes() || begun.elapsed() + pause > wait {
            return Err(error);
        }
        waiting(&error, pause);
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn refusal(answer: &Answer) -> ClientError {
    let status = answer.status;
    let information: Option<ErrorInformation> = serde_json::from_slice(&answer.body).ok();
    let (code, detail) = match &information {
        Some(information) => {
            let last = information.error_type.rsplit([':', '/']).next();
            (
                printable(last.unwrap_or_default()),
                printable(&information.detail),
            )
        }
        None => ("-".to_owned(), "it gave no reason".to_owned()),
    };
    if matches!(status, 429 | 502..=504) {
        return ClientError::Busy {
            status,
            code,
            detail,
        };
    }
    ClientError::Refused {
        status,
        code,
        detail,
    }
}

/// The session that the answer's cookie names.
fn session_of(answer: &Answer) -> Option<String> {
    let cookie = answer.header("set-cookie")?;
    let pair = cookie.split(';').next()?;
    let (name, value) = pair.trim().split_once('=')?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let good = name == SESSION_COOKIE
        && (1..=MAX_SESSION_LEN).contains(&value.len())
        && value.bytes().all(plain);
    good.then(|| value.to_owned())
}

/// What a broker wrote, fit for a terminal.
fn printable(text: &str) -> String {
    let shown = text.chars().filter(|c| !c.is_control());
    shown.take(MAX_SHOWN).collect()
}

const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const MAX_SESSION_LEN: usize = 128;
const MAX_SHOWN: usize = 300;
