//! What the ledger says of one move, at either end: the decision about its session, each phase, the target's evidence.
//!
//! Phases while the guest runs are written as they are reached; what cannot be written cancels the move. Those of its
//! pause are kept until the outcome is known and written with it, each with its moment: a pause is no time for the disk.

use std::sync::Mutex;

use casemate_policy::claims::SessionClaims;
use casemate_policy::ledger::Entry;
use casemate_policy::ledger::events::Migration;
use casemate_policy::{Action, Fingerprint, HostPolicy, Identity};

use crate::agent::Agent;
use crate::agent::api::Failure;
use crate::agent::authority::Caller;
use crate::agent::decision::Facts;
use crate::agent::vmm_process::lock;
use crate::mover::protocol::{MoveReport, MoveVerification, MoverEvent, PeerName, SessionText};

/// What is known of a move under way.
pub struct MoveRecords<'a> {
    agent: &'a Agent,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    guest: String,
    peer: String,
    emulated: bool,
    session: Option<SessionText>,
    phase: String,
    /// Phases of the pause, not written yet.
    kept: Vec<Entry>,
}

impl<'a> MoveRecords<'a> {
    /// Of a guest that is not known yet, from a peer that is not.
    pub fn arriving(agent: &'a Agent) -> Self {
        let unknown = || "unknown".to_owned();
        let state = State {
            guest: unknown(),
            peer: unknown(),
            ..State::default()
        };
        Self {
            agent,
            state: Mutex::new(state),
        }
    }

    /// Of a guest that leaves.
    pub fn leaving(agent: &'a Agent, guest: &str, peer: &str, emulated: bool) -> Self {
        let records = Self::arriving(agent);
        records.is(guest, peer, emulated);
        records
    }

    /// Who it is, once that is known.
    pub fn is(&self, guest: &str, peer: &str, emulated: bool) {
        let mut state = lock(&self.state);
        (state.guest, state.peer) = (guest.to_owned(), peer.to_owned());
        state.emulated = emulated;
    }

    /// The session was agreed on.
    pub fn agreed(&self, session: SessionText) {
        lock(&self.state).session = Some(session);
    }

    /// The session in the policy's words.
    pub fn claims(&self, policy: &HostPolicy) -> Option<SessionClaims> {
        let state = lock(&self.state);
        let session = state.session.as_ref()?;
        Some(SessionClaims {
            peer: identity(&session.peer, policy)?,
            tls: identity(&session.tls, policy)?,
            path: session.path.clone(),
            suite: session.suite.clone(),
            group: session.group.clone(),
            provider: session.provider.clone(),
        })
    }

    /// Takes an event of the mover's; an error where it had to be written and could not be.
    pub fn see(&self, event: &MoverEvent) -> Result<(), Failure> {
        match event {
            MoverEvent::Progress(progress) => self.reached(&progress.phase, progress.elapsed_ms),
            MoverEvent::TargetVerified {
                emulated,
                pdh,
                evidence_sha256,
            } => self.judged(evidence_sha256, Ok(pdh), *emulated),
            MoverEvent::TargetRefused {
                code,
                evidence_sha256,
            } => self.judged(evidence_sha256, Err(code), false),
            MoverEvent::Ready
            | MoverEvent::Outcome(_)
            | MoverEvent::Running { .. }
            | MoverEvent::PageLost { .. } => Ok(()),
        }
    }

    fn reached(&self, phase: &str, elapsed_ms: u64) -> Result<(), Failure> {
        let mut state = lock(&self.state);
        if state.phase == phase {
            return Ok(());
        }
        phase.clone_into(&mut state.phase);
        let entry = state.entry(phase).with("elapsed_ms", elapsed_ms);
        if PAUSED.contains(&phase) || !state.kept.is_empty() {
            state.kept.push(entry);
            return Ok(());
        }
        self.agent.evidence.record(entry)
    }

    fn judged(
        &self,
        evidence: &str,
        verdict: Result<&String, &String>,
        emulated: bool,
    ) -> Result<(), Failure> {
        let state = lock(&self.state);
        let code = verdict.err().map_or("", String::as_str);
        let entry = Entry::attested("mover", &state.peer, evidence, verdict.is_ok(), code)
            .emulated(emulated || state.emulated)
            .with("of", "the platform that a guest is sent to")
            .with("guest", state.guest.as_str());
        let entry = match verdict {
            Ok(pdh) => entry.with("pdh_sha256", pdh.as_str()),
            Err(_) => entry,
        };
        self.agent.evidence.record(entry)
    }

    /// What is to be written before the outcome: the phases of the pause.
    pub fn kept(&self) -> Vec<Entry> {
        std::mem::take(&mut lock(&self.state).kept)
    }

    /// An outcome, with everything that is known of the move.
    pub fn outcome(&self, entry: Entry, report: Option<&MoveReport>) -> Entry {
        lock(&self.state).with(entry, report)
    }
}

impl State {
    fn entry(&self, phase: &str) -> Entry {
        let known = self.session.as_ref().map(Known::of);
        let migration = self.migration(known.as_ref(), None);
        Entry::migration_phase(&self.guest, phase, &migration).emulated(self.emulated)
    }

    fn with(&self, entry: Entry, report: Option<&MoveReport>) -> Entry {
        let known = self.session.as_ref().map(Known::of);
        let entry = entry.migration(&self.migration(known.as_ref(), report));
        let entry = match report {
            Some(report) => verified(entry, &report.verified),
            None => entry,
        };
        match &self.session {
            Some(session) => entry
                .with("path", session.path.as_str())
                .with("provider", session.provider.as_str()),
            None => entry,
        }
    }

    fn migration<'a>(
        &'a self,
        known: Option<&'a Known<'a>>,
        report: Option<&'a MoveReport>,
    ) -> Migration<'a> {
        Migration {
            peer: &self.peer,
            suite: known.map(|known| known.session.suite.as_str()),
            group: known.map(|known| known.session.group.as_str()),
            exporter_sha256: known.map(|known| known.exporter.as_str()),
            manifest_root: report.map(|report| report.manifest_root.as_str()),
            downtime_us: report.map(|report| (report.downtime_ms * 1e3) as u64),
        }
    }
}

/// What both ends compared, besides the manifest's root.
fn verified(entry: Entry, verified: &MoveVerification) -> Entry {
    let entry = entry
        .with("pages", verified.pages)
        .with("seals_sha256", verified.seals_sha256.as_str())
        .with("state_sha256", verified.state_sha256.as_str())
        .with("announced", verified.announced)
        .with("streams", verified.streams.len() as u64)
        .with("stream_pages", stream_pages(verified));
    match &verified.content_sha256 {
        Some(digest) => entry.with("content_sha256", digest.as_str()),
        None => entry,
    }
}

/// Pages that each connection carried, the first one's first.
fn stream_pages(verified: &MoveVerification) -> String {
    let pages = verified.streams.iter().map(|count| count.pages.to_string());
    pages.collect::<Vec<_>>().join(" ")
}

/// A session with its hash in hex.
struct Known<'a> {
    session: &'a SessionText,
    exporter: String,
}

impl<'a> Known<'a> {
    fn of(session: &'a SessionText) -> Self {
        let exporter = hex::encode(session.exporter_sha256);
        Self { session, exporter }
    }
}

impl Agent {
    /// Decides, at the source, whether a guest goes on over this session.
    pub(super) fn decide_session(
        &self,
        caller: &Caller,
        guest: &crate::agent::guest::Guest,
        to: &str,
        records: &MoveRecords<'_>,
    ) -> Result<(), Failure> {
        let action = Action::MigrateSession {
            technology: guest.plan.technology.in_policy(),
            emulated: guest.plan.technology.emulated(),
            peer_name: to.to_owned(),
        };
        let facts = Facts {
            session: records.claims(&self.policy()),
            ..Facts::default()
        };
        self.decide_knowing(caller, &guest.plan.name, &action, facts)
    }

    /// What was allowed and did not come about, where nothing else says so.
    pub(super) fn record_undone(&self, actor: &str, action: &str, object: &str, failure: &Failure) {
        let entry = Entry::failed(actor, action, object, &failure.code, &failure.error);
        if let Err(unrecorded) = self.evidence.record(entry) {
            tracing::error!(code = unrecorded.code, "{}", unrecorded.error);
        }
    }
}

/// A certificate as the policy names it; one that it does not name, by the first name that could stand there.
fn identity(name: &PeerName, policy: &HostPolicy) -> Option<Identity> {
    let spki = Fingerprint::from_bytes(name.spki_sha256);
    let mut named = policy
        .peers()
        .iter()
        .flat_map(|peer| [&peer.identity, peer.tls_identity()]);
    let known = named
        .find(|known| known.spki == spki && name.san.iter().any(|san| san == known.san.as_str()));
    let first = || name.san.iter().find_map(|san| san.parse().ok());
    known
        .cloned()
        .or_else(|| first().map(|san| Identity { san, spki }))
}

/// The phases in which the guest does not run, at either end.
const PAUSED: [&str; 5] = ["final", "manifest", "commit", "running", "done"];
