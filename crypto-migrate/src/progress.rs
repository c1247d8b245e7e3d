//! What an observer of a migration sees: the same words as in the log, the metrics and the documents.

use serde::Serialize;

/// The phases of a migration, in order, at either end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// TLS handshake.
    Connect,
    /// Offer, policy decision, accept, key confirmation.
    Agree,
    /// Only in an assessment: way and guest are measured, and nothing moves.
    Assess,
    /// The firmware contexts are opened.
    Begin,
    /// The guest runs; pages are copied round by round.
    Rounds,
    /// The guest is paused; the last pages and the state travel.
    Final,
    /// Both ends compare what they hold.
    Manifest,
    /// The source has given the guest up.
    Commit,
    /// The destination runs the guest.
    Running,
    /// The source has destroyed its copy.
    Done,
}

impl Phase {
    /// The phase's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Connect => "connect",
            Phase::Agree => "agree",
            Phase::Assess => "assess",
            Phase::Begin => "begin",
            Phase::Rounds => "rounds",
            Phase::Final => "final",
            Phase::Manifest => "manifest",
            Phase::Commit => "commit",
            Phase::Running => "running",
            Phase::Done => "done",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One progress event. Counts are of the current round unless said otherwise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Progress {
    /// Where the migration is.
    pub phase: Phase,
    /// The round, from 1; 0 before the first.
    pub round: u32,
    /// Pages of this round sent or received so far (zero pages included).
    pub pages: u64,
    /// Pages this round has to move; 0 where unknown (destination).
    pub pages_total: u64,
    /// Zero pages among `pages`.
    pub zero_pages: u64,
    /// Bytes of frames on the wire since the start (before TLS).
    pub bytes: u64,
    /// Pages that were dirty again at the end of the round.
    pub dirty_pages: u64,
    /// Pages dirtied per second during the round.
    pub dirty_rate: f64,
    /// Bytes per second over the round.
    pub throughput: f64,
    /// What the pause would last now, in milliseconds; absent before the first measurement.
    pub estimated_downtime_ms: Option<f64>,
    /// How far the vCPUs are throttled, in percent.
    pub throttle_percent: u8,
    /// Since the start, in milliseconds.
    pub elapsed_ms: u64,
}

impl Progress {
    pub(crate) fn new(phase: Phase, started: std::time::Instant) -> Self {
        Self {
            phase,
            round: 0,
            pages: 0,
            pages_total: 0,
            zero_pages: 0,
            bytes: 0,
            dirty_pages: 0,
            dirty_rate: 0.0,
            throughput: 0.0,
            estimated_downtime_ms: None,
            throttle_percent: 0,
            elapsed_ms: millis(started.elapsed()),
        }
    }
}

pub(crate) fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
