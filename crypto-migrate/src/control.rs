//! What an operator may change while a guest is on its way: the bandwidth, and to switch now.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Shared between the engine and whoever hears the operator.
#[derive(Debug, Default)]
pub struct Controls {
    bandwidth: AtomicU64,
    proceed: AtomicBool,
}

impl Controls {
    /// Limits what the rounds send, in bytes a second; 0 lifts the limit. The pause is never slowed.
    pub fn set_bandwidth(&self, bytes_per_second: u64) {
        self.bandwidth.store(bytes_per_second, Ordering::Relaxed);
    }

    /// The limit, if there is one.
    pub fn bandwidth(&self) -> Option<u64> {
        Some(self.bandwidth.load(Ordering::Relaxed)).filter(|limit| *limit > 0)
    }

    /// Pause the guest now and switch, whatever is left to send.
    pub fn proceed(&self) {
        self.proceed.store(true, Ordering::Relaxed);
    }

    /// Whether to switch now.
    pub fn shall_proceed(&self) -> bool {
        self.proceed.load(Ordering::Relaxed)
    }
}

/// Keeps what is sent within the bandwidth.
#[derive(Debug, Default)]
pub(crate) struct Pacer {
    /// The limit it counts by, and when what was sent so far may have been sent.
    due: Option<(u64, Instant)>,
    waited: Duration,
}

impl Pacer {
    /// Accounts for `bytes` and waits until they may have been sent. `attend` is called at least every [`SLICE`], and
    /// says whether to wait on; a limit that changes meanwhile counts from then on.
    pub(crate) fn pace(
        &mut self,
        bytes: u64,
        controls: &Controls,
        mut attend: impl FnMut() -> bool,
    ) {
        let begun = Instant::now();
        let Some(limit) = controls.bandwidth() else {
            self.due = None;
            return;
        };
        let from = match self.due {
            Some((counted_by, due)) if counted_by == limit => due.max(begun),
            _ => begun,
        };
        let cost = Duration::try_from_secs_f64(bytes as f64 / limit as f64).unwrap_or(SLICE);
        let due = from + cost;
        self.due = Some((limit, due));
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() || controls.bandwidth() != Some(limit) || !attend() {
                break;
            }
            std::thread::sleep(left.min(SLICE));
        }
        self.waited += begun.elapsed();
    }

    /// How long it has waited since this was asked last.
    pub(crate) fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}

const SLICE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_keeps_within_the_limit_and_the_wait_is_counted() {
        let (controls, mut pacer) = (Controls::default(), Pacer::default());
        controls.set_bandwidth(1_000_000);
        let begun = Instant::now();
        for _ in 0..10 {
            pacer.pace(20_000, &controls, || true);
        }
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(195), "{took:?}");
        let waited = pacer.take_waited();
        assert!(
            waited >= Duration::from_millis(190) && waited <= took,
            "{waited:?}"
        );
        assert_eq!(pacer.take_waited(), Duration::ZERO);
    }

    #[test]
    fn a_limit_that_is_lifted_or_a_wait_that_is_ended_holds_nobody() {
        let (controls, mut pacer) = (Controls::default(), Pacer::default());
        controls.set_bandwidth(1);
        let begun = Instant::now();
        pacer.pace(1 << 20, &controls, || {
            controls.set_bandwidth(0);
            true
        });
        controls.set_bandwidth(1);
        pacer.pace(1 << 20, &controls, || false);
        assert!(begun.elapsed() < Duration::from_secs(1));
        controls.set_bandwidth(0);
        pacer.pace(u64::MAX, &controls, || true);
        assert!(begun.elapsed() < Duration::from_secs(1));
    }
}
