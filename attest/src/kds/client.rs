//! Asking a key service over HTTP: one question, a bounded answer, a deadline, and patience with a
//! service that is busy.
//!
//! AMD's service turns callers away with 429 after a few requests. The client waits as long as the
//! service asks, else longer each time and by chance a little more or less, so that many hosts that
//! start together do not come back together.

use super::request::{BaseUrl, Request};
use super::{Event, Progress, deadline};
use ring::rand::{SecureRandom as _, SystemRandom};
use std::sync::Arc;
use std::time::Duration;
use ureq::http::{HeaderMap, Uri, header::RETRY_AFTER};
use ureq::tls::{RootCerts, TlsConfig, TlsProvider};
use ureq::unversioned::resolver::DefaultResolver;

/// A client of one key service. It may be used by many threads.
pub struct Client {
    agent: ureq::Agent,
    base: BaseUrl,
    limits: Limits,
    pace: Box<dyn Pace>,
}

/// How long the client bears with a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For one question and its whole answer, from the connection on.
    pub deadline: Duration,
    /// How often one question is asked before the client gives up; at least once.
    pub attempts: u32,
    /// The first wait; each further one is twice as long.
    pub first_wait: Duration,
    /// The longest wait, also where the service asks for a longer one: the client gives up then.
    pub longest_wait: Duration,
}

/// What waiting needs; tests have their own.
pub trait Pace: Send + Sync {
    /// Waits.
    fn sleep(&self, wait: Duration);

    /// A number that other clients do not have.
    fn random(&self) -> u64;
}

/// Waits for real.
#[derive(Debug, Default)]
pub struct SystemPace;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error(
        "{base} cannot be reached: {why}; if this machine is not connected, import a bundle made on one that is"
    )]
    Unreachable {
        /// The service.
        base: BaseUrl,
        /// The reason.
        why: String,
    },
    /// The service did not prove who it is.
    #[error(
        "{base} did not prove its name: {why}; a proxy that opens TLS cannot be used, a mirror can (--base-url)"
    )]
    Tls {
        /// The service.
        base: BaseUrl,
        /// The reason.
        why: String,
    },
    /// Too slow.
    #[error("{base} did not answer in full within {}; try again later", humantime::format_duration(*.deadline))]
    Deadline {
        /// The service.
        base: BaseUrl,
        /// The deadline.
        deadline: Duration,
    },
    /// The connection broke, or what came was not HTTP.
    #[error("the answer of {base} broke off: {why}; try again")]
    Interrupted {
        /// The service.
        base: BaseUrl,
        /// The reason.
        why: String,
    },
    /// More than such an answer can have.
    #[error(
        "the answer of {base} is longer than {max} bytes and was not read; it is no key service"
    )]
    TooLong {
        /// The service.
        base: BaseUrl,
        /// The bound.
        max: usize,
    },
    /// It sent the client elsewhere.
    #[error("{base} redirects ({status}), which a key service does not; give the address it is at")]
    Redirect {
        /// The service.
        base: BaseUrl,
        /// The HTTP status.
        status: u16,
    },
    /// There is no such certificate.
    #[error("{base} has no {request}; check the product, the chip id and the TCB version")]
    NotFound {
        /// The service.
        base: BaseUrl,
        /// What was asked for.
        request: Box<Request>,
    },
    /// Another status.
    #[error("{base} answered {status}; check the address and what is asked for")]
    Status {
        /// The service.
        base: BaseUrl,
        /// The HTTP status.
        status: u16,
    },
    /// It stayed busy.
    #[error(
        "{base} is busy ({status}) after {attempts} attempts; try again later{}",
        wanted_wait(*.retry_after)
    )]
    Busy {
        /// The service.
        base: BaseUrl,
        /// The last HTTP status.
        status: u16,
        /// How often it was asked.
        attempts: u32,
        /// The wait it asked for last.
        retry_after: Option<Duration>,
    },
}

impl Client {
    /// A client of the service at `base`. Behind a proxy named in the environment
    /// (`HTTPS_PROXY`, `NO_PROXY`) it uses that, but never for a service on this machine.
    pub fn new(base: BaseUrl, limits: Limits) -> Self {
        Self::with_pace(base, limits, Box::new(SystemPace))
    }

    /// The same, waiting as `pace` does.
    pub fn with_pace(base: BaseUrl, limits: Limits, pace: Box<dyn Pace>) -> Self {
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::WebPki)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let mut config = ureq::Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_response_header_size(MAX_HEADER_LEN)
            .timeout_connect(Some(limits.deadline.min(CONNECT_DEADLINE)))
            .timeout_global(Some(limits.deadline))
            // A connection has one deadline, so it serves one question.
            .max_idle_connections(0)
            .user_agent(USER_AGENT);
        if is_local(&base) {
            config = config.proxy(None);
        }
        Self {
            agent: ureq::Agent::with_parts(
                config.build(),
                deadline::connector(limits.deadline),
                DefaultResolver::default(),
            ),
            base,
            limits,
            pace,
        }
    }

    /// The service.
    pub const fn base(&self) -> &BaseUrl {
        &self.base
    }

    /// Asks for one thing, again where the service is busy or the connection breaks. The answer is
    /// no longer than [`Request::max_len`] and otherwise unchecked.
    pub fn get(&self, request: &Request, progress: &Progress<'_>) -> Result<Vec<u8>, ClientError> {
        let url = self.base.join(request);
        let mut attempt = 1;
        loop {
            progress(&Event::Asking { url: &url, attempt });
            let refusal = match self.ask(&url, request) {
                Ok(body) => return Ok(body),
                Err(refusal) => refusal,
            };
            let (reason, retry_after) = match refusal {
                Refusal::Final(error) => return Err(error),
                Refusal::Again(reason, retry_after) => (reason, retry_after),
            };
            let wait = self.limits.wait(attempt, retry_after, self.pace.random());
            let Some(wait) = wait.filter(|_| attempt < self.limits.attempts) else {
                return Err(reason.after(attempt));
            };
            progress(&Event::Waiting {
                reason: &reason,
                wait,
            });
            self.pace.sleep(wait);
            attempt = attempt.saturating_add(1);
        }
    }

    fn ask(&self, url: &str, request: &Request) -> Result<Vec<u8>, Refusal> {
        let max = request.max_len();
        let mut response = self
            .agent
            .get(url)
            .call()
            .map_err(|error| self.failed(error, max))?;
        let base = || self.base.clone();
        match response.status().as_u16() {
            200 => response
                .body_mut()
                .with_config()
                .limit(max as u64)
                .read_to_vec()
                .map_err(|error| self.failed(error, max)),
            status @ 300..=399 => Err(Refusal::Final(ClientError::Redirect {
                base: base(),
                status,
            })),
            404 => Err(Refusal::Final(ClientError::NotFound {
                base: base(),
                request: Box::new(request.clone()),
            })),
            status @ (429 | 500..=599) => {
                let retry_after = retry_after(response.headers());
                let busy = ClientError::Busy {
                    base: base(),
                    status,
                    attempts: 0,
                    retry_after,
                };
                Err(Refusal::Again(busy, retry_after))
            }
            status => Err(Refusal::Final(ClientError::Status {
                base: base(),
                status,
            })),
        }
    }

    /// What ureq's error says to the caller. A broken connection may hold the next time; a name that
    /// does not resolve, or a port where nobody listens, tells an unconnected machine at once.
    fn failed(&self, error: ureq::Error, max: usize) -> Refusal {
        use std::io::ErrorKind;
        let base = self.base.clone();
        let why = error.to_string();
        match error {
            ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::ConnectProxyFailed(_)
            | ureq::Error::InvalidProxyUrl => {
                Refusal::Final(ClientError::Unreachable { base, why })
            }
            ureq::Error::Timeout(_) => Refusal::Final(ClientError::Deadline {
                base,
                deadline: self.limits.deadline,
            }),
            ureq::Error::BodyExceedsLimit(_) => Refusal::Final(ClientError::TooLong { base, max }),
            ureq::Error::Tls(_) | ureq::Error::TlsRequired | ureq::Error::Rustls(_) => {
                Refusal::Final(ClientError::Tls { base, why })
            }
            ureq::Error::Io(io)
                if io
                    .get_ref()
                    .is_some_and(|inner| inner.is::<rustls::Error>()) =>
            {
                Refusal::Final(ClientError::Tls { base, why })
            }
            ureq::Error::Io(io)
                if matches!(
                    io.kind(),
                    ErrorKind::ConnectionReset
                        | ErrorKind::ConnectionAborted
                        | ErrorKind::BrokenPipe
                        | ErrorKind::UnexpectedEof
                ) =>
            {
                Refusal::Again(ClientError::Interrupted { base, why }, None)
            }
            ureq::Error::Io(_) => Refusal::Final(ClientError::Unreachable { base, why }),
            _ => Refusal::Again(ClientError::Interrupted { base, why }, None),
        }
    }
}

impl Limits {
    /// The wait after the `attempt`th attempt: half of a time that doubles, or as long as the
    /// service asks where that is more, and by `random` up to the other half on top. `None` where
    /// the service asks for more than the client waits.
    fn wait(&self, attempt: u32, retry_after: Option<Duration>, random: u64) -> Option<Duration> {
        let doublings = attempt.saturating_sub(1).min(MAX_DOUBLINGS);
        let full = self
            .first_wait
            .saturating_mul(1 << doublings)
            .min(self.longest_wait);
        let half = full / 2;
        let share = u32::try_from(random % u64::from(SHARES)).unwrap_or(0);
        let spread = half / SHARES * share;
        match retry_after {
            Some(asked) if asked > self.longest_wait => None,
            asked => Some(asked.unwrap_or_default().max(half).saturating_add(spread)),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            attempts: 6,
            first_wait: Duration::from_secs(2),
            longest_wait: Duration::from_secs(60),
        }
    }
}

impl Pace for SystemPace {
    fn sleep(&self, wait: Duration) {
        std::thread::sleep(wait);
    }

    fn random(&self) -> u64 {
        let mut bytes = [0; 8];
        // Without randomness the waits are only less spread.
        let _ = SystemRandom::new().fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }
}

impl ClientError {
    /// A stable name for machines.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "KDS_UNREACHABLE",
            Self::Tls { .. } => "KDS_TLS",
            Self::Deadline { .. } => "KDS_DEADLINE",
            Self::Interrupted { .. } => "KDS_INTERRUPTED",
            Self::TooLong { .. } => "KDS_ANSWER_TOO_LONG",
            Self::Redirect { .. } => "KDS_REDIRECT",
            Self::NotFound { .. } => "KDS_NOT_FOUND",
            Self::Status { .. } => "KDS_STATUS",
            Self::Busy { .. } => "KDS_BUSY",
        }
    }

    fn after(mut self, attempt: u32) -> Self {
        if let Self::Busy { attempts, .. } = &mut self {
            *attempts = attempt;
        }
        self
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("base", &self.base)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// What an attempt that failed means for the next.
enum Refusal {
    Final(ClientError),
    Again(ClientError, Option<Duration>),
}

/// `Retry-After` in seconds. The form with a date is left alone: the client's own waits are used.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().map(Duration::from_secs).ok()
}

fn wanted_wait(retry_after: Option<Duration>) -> String {
    retry_after.map_or_else(String::new, |wait| {
        format!(" (it asks to wait {})", humantime::format_duration(wait))
    })
}

/// Whether the service is on this machine, where no proxy has any business.
fn is_local(base: &BaseUrl) -> bool {
    let host = base.as_str().parse::<Uri>().ok();
    let host = host.as_ref().and_then(Uri::host).unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

/// Connecting takes less than this, or will not succeed.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// The service sends a few lines.
const MAX_HEADER_LEN: usize = 16 << 10;

/// Longer than any wait that is allowed.
const MAX_DOUBLINGS: u32 = 16;

/// Into how many parts a wait is divided to vary it.
const SHARES: u32 = 1024;

const USER_AGENT: &str = concat!("casemate/", env!("CARGO_PKG_VERSION"));

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn waits_double_vary_and_end() {
        let limits = Limits::default();
        let half = |attempt| limits.wait(attempt, None, 0).unwrap();
        assert_eq!([half(1), half(2), half(3)], [secs(1), secs(2), secs(4)]);
        assert_eq!(half(40), secs(30));
        let most = limits.wait(1, None, u64::from(SHARES) - 1).unwrap();
        assert!(most > half(1) && most < secs(2), "{most:?}");
        let vast = Limits {
            first_wait: Duration::MAX,
            ..limits
        };
        assert_eq!(vast.wait(u32::MAX, None, 0), Some(secs(30)));
    }

    #[test]
    fn a_service_is_heard_but_not_waited_for_without_end() {
        let limits = Limits::default();
        assert_eq!(limits.wait(1, Some(secs(17)), 0), Some(secs(17)));
        assert_eq!(limits.wait(1, Some(secs(0)), 0), Some(secs(1)));
        assert_eq!(limits.wait(1, Some(secs(61)), 0), None);
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(read(" 12 "), Some(secs(12)));
        assert_eq!(read("-1"), None);
        assert_eq!(read("99999999999999999999999"), None);
        assert_eq!(read("Wed, 21 Oct 2026 07:28:00 GMT"), None);
    }

    #[test]
    fn a_service_on_this_machine_is_asked_directly() {
        for (base, local) in [
            ("http://127.0.0.1:1", true),
            ("http://[::1]:80", true),
            ("http://localhost", true),
            ("http://10.0.0.1", false),
            ("https://localhost.example", false),
        ] {
            assert_eq!(is_local(&base.parse().unwrap()), local, "{base}");
        }
    }
}
