//! What is said of a move before it is made, and after its end was lost.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a move would be like; nothing has moved.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct MovePlan {
    /// The guest.
    pub name: String,
    /// Where to.
    pub to: String,
    /// What was found to be in order, and by whom.
    pub checks: Vec<PlanCheck>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// How much of it holds anything, in KiB.
    pub populated_kib: u64,
    /// How much the guest wrote in a second, each page counted once, in KiB.
    pub dirty_kib_per_s: u64,
    /// What the way carries, in KiB a second.
    pub throughput_kib_per_s: u64,
    /// Round trip, in milliseconds.
    pub round_trip_ms: f64,
    /// Rounds to be expected, the last included.
    pub rounds: u32,
    /// How long it would take, in milliseconds.
    pub total_ms: f64,
    /// The pause to be expected, in milliseconds.
    pub downtime_ms: f64,
    /// The longest that is asked for, in milliseconds.
    pub downtime_limit_ms: u64,
    /// Connections that would carry memory; what the way carries was measured over one.
    #[serde(default)]
    pub streams: u16,
    /// Why the guest would be paused: `converged`, or `max-rounds`, or `no-progress`.
    pub convergence: String,
    /// How far its vCPUs would be throttled, in percent.
    pub throttle_percent: u8,
}

/// One thing that a move needs.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PlanCheck {
    /// What.
    pub check: String,
    /// What was found.
    pub found: String,
}

/// What became of a move whose commit was not answered, as the peer says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Settled {
    /// The guest.
    pub name: String,
    /// Who was asked.
    pub peer: String,
    /// Whether the peer took the guest over: the copy here has ended.
    pub peer_has_it: bool,
    /// Whether it runs on here; if neither, it ended here with its agent, and may be started anew.
    pub runs_here: bool,
    /// The epoch of whoever has it.
    pub epoch: u64,
}
