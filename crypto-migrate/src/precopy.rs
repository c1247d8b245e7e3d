//! When to stop copying behind the guest's back: rounds, measurement, the forecast of the pause.
//!
//! After each round the pause is forecast as `bytes still dirty / throughput + round trip + allowance for the
//! state`. The guest is paused when the forecast fits the limit. When rounds no longer help, its vCPUs are throttled, by
//! 20 % and then by 10 % more a step, so that it writes less than can be sent; only where that is not allowed, or the
//! rounds are used up, is it paused for longer than asked for.

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
    /// Rounds without progress before the guest is throttled, or paused in any case.
    pub patience: u32,
    /// How far its vCPUs may be throttled, in percent of their time; 0 for not at all, 99 at most.
    pub throttle: u8,
    /// The whole move; one that takes longer is given up, unless it is committed already.
    pub total: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            max_rounds: 30,
            patience: 3,
            throttle: MAX_THROTTLE,
            total: None,
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
    /// Rounds no longer help: the guest dirties memory as fast as it is sent, throttled as far as is allowed.
    NoProgress,
    /// The operator said so.
    Proceeded,
}

/// One finished round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Round {
    /// Bytes of frames sent.
    pub bytes: u64,
    /// From the first read to the destination's acknowledgement.
    pub duration: Duration,
    /// How much of it was waited to keep within the bandwidth; the pause is not slowed by that.
    pub paced: Duration,
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
    throttle: u8,
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
            throttle: 0,
        }
    }

    /// Takes a finished round and decides.
    pub fn finish(&mut self, round: Round) -> Next {
        self.rounds += 1;
        let seconds = round.duration.as_secs_f64().max(1e-6);
        let sending = round.duration.saturating_sub(round.paced);
        let measured = round.bytes as f64 / sending.as_secs_f64().max(1e-6);
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
        } else if self.stalled < self.patience() {
            Next::Round
        } else if self.throttle_more() {
            self.best_dirty = round.dirty_pages;
            self.stalled = 0;
            Next::Round
        } else {
            Next::Pause(Convergence::NoProgress)
        }
    }

    /// Once throttled, each round shows what the last step gave.
    fn patience(&self) -> u32 {
        match self.throttle {
            0 => self.limits.patience.max(1),
            _ => 1,
        }
    }

    fn throttle_more(&mut self) -> bool {
        let step = match self.throttle {
            0 => FIRST_THROTTLE,
            held => held.saturating_add(THROTTLE_STEP),
        };
        let next = step.min(self.limits.throttle).min(MAX_THROTTLE);
        let more = next > self.throttle;
        self.throttle = next.max(self.throttle);
        more
    }

    /// How far the vCPUs are to be throttled now, in percent.
    pub fn throttle(&self) -> u8 {
        self.throttle
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

/// What is expected of a move, before or while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// Rounds, the last included.
    pub rounds: u32,
    /// Everything, in milliseconds.
    pub total_ms: f64,
    /// The pause, in milliseconds.
    pub downtime_ms: f64,
    /// Why the guest would be paused.
    pub convergence: Convergence,
    /// How far its vCPUs would be throttled, in percent.
    pub throttle_percent: u8,
}

/// What was measured before a move.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Pages that hold anything.
    pub pages: u64,
    /// Distinct pages written per second.
    pub dirty_rate: f64,
    /// Bytes per second that the way carries.
    pub throughput: f64,
    /// Round trip.
    pub round_trip: Duration,
}

impl Forecast {
    /// Runs the rounds of a move on paper, by the very decisions that the move will make.
    pub fn of(measured: &Measured, limits: Limits, bandwidth: Option<u64>) -> Self {
        let mut estimator = Estimator::new(limits);
        let page = (PAGE_SIZE + OVERHEAD) as f64;
        let seconds = |s: f64| Duration::try_from_secs_f64(s).unwrap_or(Duration::MAX);
        let (mut to_send, mut total) = (measured.pages, Duration::ZERO);
        loop {
            let bytes = to_send as f64 * page;
            let sending = seconds(bytes / measured.throughput.max(1.0));
            let paced = bandwidth.map_or(sending, |limit| seconds(bytes / limit.max(1) as f64));
            let duration = paced.max(sending).saturating_add(measured.round_trip);
            let share = f64::from(100 - estimator.throttle().min(100)) / 100.0;
            let written = measured.dirty_rate * share * duration.as_secs_f64();
            let dirty_pages = (written as u64).min(measured.pages);
            total = total.saturating_add(duration);
            let next = estimator.finish(Round {
                bytes: bytes as u64,
                duration,
                paced: paced.saturating_sub(sending),
                acknowledged_after: measured.round_trip,
                dirty_pages,
            });
            if let Next::Pause(convergence) = next {
                let downtime = estimator.estimated_downtime().unwrap_or_default();
                return Self {
                    rounds: estimator.rounds + 1,
                    total_ms: total.saturating_add(downtime).as_secs_f64() * 1e3,
                    downtime_ms: downtime.as_secs_f64() * 1e3,
                    convergence,
                    throttle_percent: estimator.throttle(),
                };
            }
            to_send = dirty_pages;
        }
    }
}

/// vCPUs that do not run at all never come to their pause.
pub const MAX_THROTTLE: u8 = 99;
const FIRST_THROTTLE: u8 = 20;
const THROTTLE_STEP: u8 = 10;
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
            paced: Duration::ZERO,
            acknowledged_after: Duration::ZERO,
            dirty_pages,
        }
    }

    const UNTHROTTLED: Limits = Limits {
        downtime: Duration::from_millis(300),
        max_rounds: 30,
        patience: 3,
        throttle: 0,
        total: None,
    };

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
        let mut estimator = Estimator::new(UNTHROTTLED);
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

    #[test]
    fn a_guest_that_writes_too_much_is_throttled_by_steps_until_it_is_allowed_no_further() {
        let mut estimator = Estimator::new(Limits {
            throttle: 35,
            ..UNTHROTTLED
        });
        let mut seen = Vec::new();
        let end = loop {
            match estimator.finish(round(5_000, 5_000)) {
                Next::Round => seen.push(estimator.throttle()),
                end => break end,
            }
        };
        assert_eq!(seen, [0, 0, 0, 20, 30, 35]);
        assert_eq!(end, Next::Pause(Convergence::NoProgress));
    }

    #[test]
    fn while_a_step_helps_no_other_follows() {
        let mut estimator = Estimator::new(Limits::default());
        for _ in 0..4 {
            estimator.finish(round(5_000, 5_000));
        }
        assert_eq!(estimator.throttle(), 20);
        for dirty in [4_000, 3_000, 2_000] {
            assert_eq!(estimator.finish(round(5_000, dirty)), Next::Round);
            assert_eq!(estimator.throttle(), 20);
        }
        assert_eq!(estimator.finish(round(2_000, 1_950)), Next::Round);
        assert_eq!(estimator.throttle(), 30);
    }

    #[test]
    fn waits_for_the_bandwidth_do_not_make_the_link_look_slow() {
        let mut estimator = Estimator::new(Limits::default());
        let slow = Round {
            paced: Duration::from_millis(9_000),
            ..round(10_000, 100)
        };
        estimator.finish(slow);
        assert!((estimator.throughput() - 41.44e6).abs() < 1e3);
        assert!((estimator.dirty_rate() - 10.0).abs() < 0.01);
    }

    fn measured(dirty_rate: f64) -> Measured {
        Measured {
            pages: 100_000,
            dirty_rate,
            throughput: 414.4e6, // 100 000 pages a second
            round_trip: Duration::from_millis(1),
        }
    }

    #[test]
    fn a_forecast_follows_the_same_decisions() {
        let idle = Forecast::of(&measured(0.0), Limits::default(), None);
        assert_eq!((idle.rounds, idle.convergence), (2, Convergence::Converged));
        assert!(
            idle.total_ms > 1_000.0 && idle.total_ms < 1_050.0,
            "{idle:?}"
        );
        let half = Forecast::of(&measured(50_000.0), Limits::default(), None);
        assert_eq!(half.convergence, Convergence::Converged);
        assert!(
            (3..=5).contains(&half.rounds) && half.throttle_percent == 0,
            "{half:?}"
        );
        let busy = Forecast::of(&measured(120_000.0), Limits::default(), None);
        assert_eq!(busy.convergence, Convergence::Converged, "{busy:?}");
        assert!(
            busy.throttle_percent >= 20 && busy.downtime_ms <= 300.0,
            "{busy:?}"
        );
        let stuck = Forecast::of(&measured(120_000.0), UNTHROTTLED, None);
        assert_eq!(stuck.convergence, Convergence::NoProgress);
        assert!(stuck.downtime_ms > 900.0, "{stuck:?}");
        let slow = Forecast::of(&measured(0.0), Limits::default(), Some(41_440_000));
        assert!(
            slow.total_ms > 9_500.0 && slow.downtime_ms < 50.0,
            "{slow:?}"
        );
    }
}
