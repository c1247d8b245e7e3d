//! When to stop copying behind the guest's back: rounds, measurement, the forecast of the pause.
//!
//! After each round the pause is forecast as `bytes still dirty / throughput + round trip + allowance for the
//! state`. The guest is paused when the forecast fits the limit, when the rounds are used up, or when rounds
//! no longer help. The latter two pause a guest for longer than asked for: throttling it instead is not built.

use std::time::Duration;

use serde::Serialize;

use crate::guest::PAGE_SIZE;

/// What the operator allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// The longest pause to aim for.
    pub downtime: Duration,
    /// Rounds before the guest is paused in any case.
    pub max_rounds: u32,
    /// Rounds without progress before the guest is paused in any case.
    pub patience: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            max_rounds: 30,
            patience: 3,
        }
    }
}

/// Why the guest was paused when it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Convergence {
    /// The forecast fits the limit.
    Converged,
    /// The rounds are used up.
    MaxRounds,
    /// Rounds no longer help: the guest dirties memory as fast as it is sent.
    NoProgress,
}

/// One finished round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Round {
    /// Bytes of frames sent.
    pub bytes: u64,
    /// From the first read to the destination's acknowledgement.
    pub duration: Duration,
    /// From the end of the round to the acknowledgement: round trip and placing.
    pub acknowledged_after: Duration,
    /// Pages that are dirty again.
    pub dirty_pages: u64,
}

/// What follows a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another round, the guest running.
    Round,
    /// The pause.
    Pause(Convergence),
}

/// Measures rounds and forecasts the pause.
#[derive(Debug)]
pub struct Estimator {
    limits: Limits,
    rounds: u32,
    throughput: f64,
    dirty_rate: f64,
    estimate: Option<Duration>,
    best_dirty: u64,
    stalled: u32,
}

impl Estimator {
    /// Nothing measured yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            rounds: 0,
            throughput: 0.0,
            dirty_rate: 0.0,
            estimate: None,
            best_dirty: u64::MAX,
            stalled: 0,
        }
    }

    /// Takes a finished round and decides.
    pub fn finish(&mut self, round: Round) -> Next {
        self.rounds += 1;
        let seconds = round.duration.as_secs_f64().max(1e-6);
        let measured = round.bytes as f64 / seconds;
        // A short round is mostly round trip; it must not make the link look slow.
        let blended = if self.rounds == 1 {
            measured
        } else {
            0.5 * self.throughput + 0.5 * measured
        };
        self.throughput = measured.max(blended);
        self.dirty_rate = round.dirty_pages as f64 / seconds;
        let left = round.dirty_pages as f64 * (PAGE_SIZE + OVERHEAD) as f64;
        let copy =
            Duration::try_from_secs_f64(left / self.throughput.max(1.0)).unwrap_or(Duration::MAX);
        let estimate = copy
            .saturating_add(round.acknowledged_after)
            .saturating_add(STATE_ALLOWANCE);
        self.estimate = Some(estimate);
        if estimate <= self.limits.downtime || round.dirty_pages == 0 {
            return Next::Pause(Convergence::Converged);
        }
        if round.dirty_pages < self.best_dirty / 10 * 9 {
            self.best_dirty = round.dirty_pages;
            self.stalled = 0;
        } else {
            self.stalled += 1;
        }
        if self.rounds >= self.limits.max_rounds {
            Next::Pause(Convergence::MaxRounds)
        } else if self.stalled >= self.limits.patience.max(1) {
            Next::Pause(Convergence::NoProgress)
        } else {
            Next::Round
        }
    }

    /// Bytes per second.
    pub fn throughput(&self) -> f64 {
        self.throughput
    }

    /// Pages dirtied per second of the last round.
    pub fn dirty_rate(&self) -> f64 {
        self.dirty_rate
    }

    /// The forecast after the last round.
    pub fn estimated_downtime(&self) -> Option<Duration> {
        self.estimate
    }
}

const OVERHEAD: usize = 48; // clear header and tag of an entry
const STATE_ALLOWANCE: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn round(pages: u64, dirty_pages: u64) -> Round {
        let duration = Duration::from_millis(pages); // 4 MB/s
        Round {
            bytes: pages * 4144,
            duration,
            acknowledged_after: Duration::ZERO,
            dirty_pages,
        }
    }

    #[test]
    fn converges_when_the_forecast_fits() {
        let mut estimator = Estimator::new(Limits::default());
        assert_eq!(estimator.finish(round(10_000, 1_000)), Next::Round);
        assert_eq!(
            estimator.finish(round(1_000, 100)),
            Next::Pause(Convergence::Converged)
        );
        let estimate = estimator.estimated_downtime().unwrap();
        assert!(
            estimate > Duration::from_millis(100) && estimate < Duration::from_millis(130),
            "{estimate:?}"
        );
    }

    #[test]
    fn gives_up_when_rounds_do_not_help() {
        let mut estimator = Estimator::new(Limits::default());
        assert_eq!(estimator.finish(round(10_000, 5_000)), Next::Round);
        assert_eq!(estimator.finish(round(5_000, 5_000)), Next::Round);
        assert_eq!(estimator.finish(round(5_000, 5_000)), Next::Round);
        assert_eq!(
            estimator.finish(round(5_000, 5_000)),
            Next::Pause(Convergence::NoProgress)
        );
    }

    #[test]
    fn rounds_are_limited() {
        let mut estimator = Estimator::new(Limits {
            max_rounds: 2,
            ..Limits::default()
        });
        assert_eq!(estimator.finish(round(10_000, 5_000)), Next::Round);
        assert_eq!(
            estimator.finish(round(5_000, 2_000)),
            Next::Pause(Convergence::MaxRounds)
        );
    }
}
