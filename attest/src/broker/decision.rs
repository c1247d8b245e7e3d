//! What the broker decided, for the log and for a ledger.

use super::resource::ResourcePath;
use crate::verify::Verdict;
use serde::Serialize;
use std::time::SystemTime;

/// One decision: a session opened, a guest accepted, a secret released, or any of it refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// Which step of the protocol.
    pub step: Step,
    /// Whether it was granted.
    pub granted: bool,
    /// Why it was not; stable, and absent where it was.
    pub code: Option<&'static str>,
    /// SHA-256 of the session's name, in hex: tells sessions apart and opens none.
    pub session: Option<String>,
    /// The resource asked for.
    pub resource: Option<String>,
    /// The launch digest in the evidence, in hex. Proven only where the verdict says so.
    pub measurement: Option<String>,
    /// Whether the evidence is a software secure processor's.
    pub emulated: bool,
    /// Every check behind it.
    pub verdict: Option<Verdict>,
    /// Seconds since 1970.
    pub at: u64,
}

/// A step of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Request and challenge.
    Auth,
    /// Evidence.
    Attest,
    /// A resource.
    Release,
}

/// Takes every decision before it takes effect.
pub trait DecisionLog: Send + Sync {
    /// Records `decision`. Where it cannot, nothing is granted.
    fn record(&self, decision: &Decision) -> Result<(), NotRecorded>;
}

/// A decision could not be recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the decision could not be recorded: {0}")]
pub struct NotRecorded(pub String);

/// Records nowhere but in the log, where every decision goes anyway.
#[derive(Debug, Clone, Copy, Default)]
pub struct LogOnly;

impl DecisionLog for LogOnly {
    fn record(&self, _: &Decision) -> Result<(), NotRecorded> {
        Ok(())
    }
}

impl Decision {
    pub(super) fn new(step: Step, session: Option<&str>, at: SystemTime) -> Self {
        let digest = |name: &str| {
            let digest = ring::digest::digest(&ring::digest::SHA256, name.as_bytes());
            hex::encode(digest)
        };
        let since = at.duration_since(SystemTime::UNIX_EPOCH);
        Self {
            step,
            granted: true,
            code: None,
            session: session.map(digest),
            resource: None,
            measurement: None,
            emulated: false,
            verdict: None,
            at: since.map_or(0, |since| since.as_secs()),
        }
    }

    pub(super) fn about(mut self, resource: &ResourcePath) -> Self {
        self.resource = Some(resource.to_string());
        self
    }

    /// Writes the one line a decision has in the log.
    pub(super) fn log(&self) {
        let failed: Vec<&str> = self
            .verdict
            .iter()
            .flat_map(Verdict::failures)
            .filter_map(|check| check.code.as_deref())
            .collect();
        let overall = self.verdict.as_ref().map(|verdict| verdict.overall);
        tracing::info!(
            step = ?self.step,
            granted = self.granted,
            code = self.code.unwrap_or("-"),
            session = self.session.as_deref().unwrap_or("-"),
            resource = self.resource.as_deref().unwrap_or("-"),
            measurement = self.measurement.as_deref().unwrap_or("-"),
            emulated = self.emulated,
            verdict = ?overall,
            failed = ?failed,
            "broker decision",
        );
    }
}
