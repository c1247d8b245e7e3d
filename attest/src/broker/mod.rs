//! The owner's key broker: a secret leaves only for a guest that proved itself, encrypted to a key
//! that the proof binds.
//!
//! [`Broker`] is the CoCo key broker protocol (see [`protocol`]) without its transport: bodies in,
//! answers or a [`Refusal`] out. Storage, judgement, clock and ledger are traits. Everything that
//! arrives is untrusted until a [`Verdict`] accepts it.
//!
//! **What must hold before a secret leaves.** The session is attested, which takes: its nonce, not
//! answered before; a report whose report_data is the hash of that nonce and of the key (compared
//! here, whatever the judge says); an accepted verdict. Then the resource's *own* policy must
//! accept the same evidence again, now, with report_data and launch measurement really checked,
//! and the decision must be recorded.
//!
//! **Replay.** See [`Epoch`] and the argument in `session.rs`.

mod decision;
pub mod evidence;
mod jwe;
mod key;
pub mod protocol;
mod refusal;
mod resource;
mod session;
#[cfg(test)]
mod tests;
mod token;

pub use decision::{Decision, DecisionLog, LogOnly, NotRecorded, Step};
pub use evidence::GuestEvidence;
pub use jwe::{FlattenedJwe, GuestKey, JweError, MAX_SECRET_LEN};
pub use key::{Curve, KeyError, TeePublicKey, WrappingKey};
pub use refusal::Refusal;
pub use resource::{PathError, ResourcePath, ResourceStore, StoreError};
pub use session::Epoch;
pub use token::{EphemeralIssuer, TokenIssuer, TokenSubject};

use crate::verify::{CheckResult, Verdict};
use protocol::{Attestation, Challenge, Request, TokenResponse};
use session::{Attested, Sessions};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use subtle::ConstantTimeEq;

/// The key broker. Its methods may block on the store and are called from any thread.
pub struct Broker {
    parts: Parts,
    limits: Limits,
    sessions: Mutex<Sessions>,
}

/// What a broker is made of.
#[derive(Clone)]
pub struct Parts {
    /// Judges evidence.
    pub appraiser: Arc<dyn Appraiser>,
    /// Keeps the secrets.
    pub store: Arc<dyn ResourceStore>,
    /// Signs attestation results.
    pub tokens: Arc<dyn TokenIssuer>,
    /// Records decisions.
    pub log: Arc<dyn DecisionLog>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
}

/// How much is kept, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most sessions that are open at once, attested or not.
    pub sessions: usize,
    /// How long a challenge waits for its answer.
    pub challenge: Duration,
    /// How long an attested session may ask for resources.
    pub attested: Duration,
}

/// Judges evidence under the owner's policies.
pub trait Appraiser: Send + Sync {
    /// The verdict over `evidence` for `scope` at `now`, with `report_data` as the expected value.
    /// `None` where no policy covers the scope: nobody is then accepted.
    fn appraise(
        &self,
        scope: Scope<'_>,
        evidence: &GuestEvidence,
        report_data: &[u8; 64],
        now: SystemTime,
    ) -> Option<Verdict>;
}

/// What evidence is judged for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope<'a> {
    /// To open a session.
    Session,
    /// To release one resource.
    Resource(&'a ResourcePath),
}

/// Tells the time, for two purposes that must not be confused.
pub trait Clock: Send + Sync {
    /// Never goes back: sessions end by it.
    fn monotonic(&self) -> Duration;
    /// The calendar's: certificates and records go by it.
    fn wall(&self) -> SystemTime;
}

/// A session that was opened.
#[derive(Debug, Clone)]
pub struct Opened {
    /// Its name, for the cookie. Whoever knows it is the session.
    pub session: String,
    /// The challenge.
    pub challenge: Challenge,
    /// How long it waits for its answer.
    pub lifetime: Duration,
}

/// A guest that was accepted.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// Its token.
    pub response: TokenResponse,
    /// Whether it runs on a software secure processor.
    pub emulated: bool,
    /// How long it may ask for resources.
    pub lifetime: Duration,
}

/// A secret on its way.
#[derive(Debug, Clone)]
pub struct Released {
    /// Encrypted to the guest's key.
    pub jwe: FlattenedJwe,
    /// Whether the guest runs on a software secure processor.
    pub emulated: bool,
}

/// The check that binds the evidence to the session, by its name in a verdict.
pub const REPORT_DATA_CHECK: &str = "report_data";
/// The check of the launch digest, by its name in a verdict.
pub const MEASUREMENT_CHECK: &str = "measurement";

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions: 1000,
            challenge: Duration::from_secs(60),
            attested: Duration::from_secs(300),
        }
    }
}

impl Broker {
    /// A broker without sessions. `epoch` must be durable; see [`Epoch`].
    pub fn new(parts: Parts, limits: Limits, epoch: Epoch) -> Self {
        Self {
            parts,
            limits,
            sessions: Mutex::new(Sessions::new(epoch, limits)),
        }
    }

    /// `POST /kbs/v0/auth`: a challenge for whoever asks.
    pub fn auth(&self, body: &[u8]) -> Result<Opened, Refusal> {
        let result = Request::parse(body).and_then(|request| self.open(request));
        let session = result.as_ref().ok().map(|opened| opened.session.as_str());
        let decision = Decision::new(Step::Auth, session, self.parts.clock.wall());
        self.conclude(decision, result)
    }

    /// `POST /kbs/v0/attest`: judges evidence and ends the session unless it is accepted.
    pub fn attest(&self, session: Option<&str>, body: &[u8]) -> Result<Accepted, Refusal> {
        let mut decision = Decision::new(Step::Attest, session, self.parts.clock.wall());
        let result = self.judge(session, body, &mut decision);
        let result = self.conclude(decision, result);
        match result {
            Ok((accepted, attested)) => {
                let now = self.parts.clock.monotonic();
                if let Some(name) = session {
                    self.sessions().judged(name, Some(attested), now);
                }
                Ok(accepted)
            }
            Err(Refusal::NonceUsed) => Err(Refusal::NonceUsed),
            Err(refusal) => {
                let now = self.parts.clock.monotonic();
                if let Some(name) = session {
                    self.sessions().judged(name, None, now);
                }
                Err(refusal)
            }
        }
    }

    /// `GET /kbs/v0/resource/{path}`: releases a secret, or says why not.
    pub fn resource(&self, session: Option<&str>, path: &str) -> Result<Released, Refusal> {
        let mut decision = Decision::new(Step::Release, session, self.parts.clock.wall());
        let result = self.release(session, path, &mut decision);
        let (attested, secret) = self.conclude(decision, result)?;
        let jwe = FlattenedJwe::seal(&secret.text, &attested.key).map_err(|_| Refusal::Internal)?;
        let emulated = secret.emulated;
        Ok(Released { jwe, emulated })
    }

    /// How many sessions are open.
    pub fn open_sessions(&self) -> usize {
        let now = self.parts.clock.monotonic();
        self.sessions().count(now)
    }

    fn open(&self, request: Request) -> Result<Opened, Refusal> {
        let now = self.parts.clock.monotonic();
        let (session, nonce) = self.sessions().open(request.clone(), now)?;
        Ok(Opened {
            session,
            challenge: Challenge::new(nonce, &request),
            lifetime: self.limits.challenge,
        })
    }

    fn judge(
        &self,
        session: Option<&str>,
        body: &[u8],
        decision: &mut Decision,
    ) -> Result<(Accepted, Attested), Refusal> {
        let name = session.ok_or(Refusal::NoSession)?;
        let taken = self.sessions().take(name, self.parts.clock.monotonic())?;
        let attestation = Attestation::parse(body, taken.request.version)?;
        if attestation
            .nonce
            .as_ref()
            .is_some_and(|nonce| *nonce != taken.nonce)
        {
            return Err(Refusal::NonceMismatch);
        }
        let key = WrappingKey::new(&attestation.key)?;
        let evidence = GuestEvidence::parse(&attestation.evidence)?;
        decision.measurement = Some(hex::encode(evidence.report.measurement()));
        let report_data = attestation.report_data(&taken.nonce);
        if !bool::from(evidence.report.report_data().ct_eq(&report_data)) {
            return Err(Refusal::ReportDataMismatch);
        }
        let at = self.parts.clock.wall();
        let appraiser = &self.parts.appraiser;
        let verdict = appraiser
            .appraise(Scope::Session, &evidence, &report_data, at)
            .ok_or(Refusal::NoPolicy)?;
        decision.emulated = verdict.emulated;
        let failed = unproven(&verdict, &[REPORT_DATA_CHECK]);
        let token = self.parts.tokens.issue(&TokenSubject {
            verdict: &verdict,
            key: &attestation.key,
            at,
            lifetime: self.limits.attested,
        });
        let emulated = verdict.emulated;
        decision.verdict = Some(verdict);
        if let Some(failed) = failed {
            return Err(Refusal::NotAccepted(failed));
        }
        let token = token.ok_or(Refusal::Internal)?;
        let accepted = Accepted {
            response: TokenResponse { token },
            emulated,
            lifetime: self.limits.attested,
        };
        let attested = Attested {
            evidence,
            report_data,
            key,
        };
        Ok((accepted, attested))
    }

    fn release(
        &self,
        session: Option<&str>,
        path: &str,
        decision: &mut Decision,
    ) -> Result<(Attested, Secret), Refusal> {
        let name = session.ok_or(Refusal::NoSession)?;
        let now = self.parts.clock.monotonic();
        let attested = self.sessions().attested(name, now)?;
        decision.measurement = Some(hex::encode(attested.evidence.report.measurement()));
        let path: ResourcePath = path.parse()?;
        *decision = decision.clone().about(&path);
        let at = self.parts.clock.wall();
        let verdict = self
            .parts
            .appraiser
            .appraise(
                Scope::Resource(&path),
                &attested.evidence,
                &attested.report_data,
                at,
            )
            .ok_or(Refusal::NoPolicy)?;
        decision.emulated = verdict.emulated;
        let emulated = verdict.emulated;
        let failed = unproven(&verdict, &[REPORT_DATA_CHECK, MEASUREMENT_CHECK]);
        decision.verdict = Some(verdict);
        if let Some(failed) = failed {
            return Err(Refusal::PolicyDenied(failed));
        }
        // Only who may have a secret learns whether there is one.
        match self.parts.store.get(&path) {
            Ok(Some(text)) => Ok((attested, Secret { text, emulated })),
            Ok(None) => Err(Refusal::NotFound),
            Err(error) => {
                tracing::error!(resource = %path, %error, "resource store");
                Err(Refusal::Store)
            }
        }
    }

    /// Logs and records a decision before it takes effect.
    fn conclude<T>(
        &self,
        mut decision: Decision,
        result: Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        if let Err(refusal) = &result {
            decision.granted = false;
            decision.code = Some(refusal.code());
        }
        decision.log();
        match self.parts.log.record(&decision) {
            Ok(()) => result,
            Err(error) => {
                tracing::error!(%error, "decision log");
                result.and(Err(Refusal::NotRecorded))
            }
        }
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        // Every change to the table is whole before the next can fail.
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Secret {
    text: zeroize::Zeroizing<Vec<u8>>,
    emulated: bool,
}

/// Why `verdict` is not enough: what failed, or which of `needed` was not really checked. `None`
/// where it is.
fn unproven(verdict: &Verdict, needed: &[&str]) -> Option<String> {
    let mut failed: Vec<String> = verdict
        .failures()
        .map(|check| check.code.clone().unwrap_or_else(|| check.name.clone()))
        .collect();
    for name in needed {
        let mut named = verdict.checks.iter().filter(|check| check.name == *name);
        if !named.any(|check| check.result == CheckResult::Accepted) {
            failed.push(format!("{name} was not checked"));
        }
    }
    if verdict.accepted() && failed.is_empty() {
        return None;
    }
    if failed.is_empty() {
        failed.push("a required check is missing".to_owned());
    }
    failed.dedup();
    Some(failed.join(", "))
}
