//! The counter: ten lines a second, `guest: tick N <monotonic ms>`, N without a gap.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::console::say;
use crate::state::State;
use crate::supervise;

pub(crate) fn spawn(state: &Arc<State>) {
    let state = Arc::clone(state);
    supervise::spawn("ticker", move || {
        let mut deadline = Instant::now();
        loop {
            let now = Instant::now();
            deadline = next_deadline(deadline, now);
            thread::sleep(deadline.saturating_duration_since(now));
            let ms = clock_gettime(ClockId::CLOCK_MONOTONIC)
                .map_or(0, |time| Duration::from(time).as_millis());
            say!("tick {} {ms}", state.counter.add(1));
        }
    });
}

/// The time of the next tick: on the grid of the last one, so that the rate holds and a short pause is caught up; after
/// a long pause or a jump of the clock from now on, so that no flood follows. Numbers are never skipped.
fn next_deadline(last: Instant, now: Instant) -> Instant {
    let next = last + PERIOD;
    if now.saturating_duration_since(next) > CATCH_UP {
        now
    } else {
        next
    }
}

const PERIOD: Duration = Duration::from_millis(100);
const CATCH_UP: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_delays_are_caught_up_and_long_ones_are_not() {
        let start = Instant::now();
        let ms = |n| start + Duration::from_millis(n);
        assert_eq!(next_deadline(start, ms(10)), ms(100));
        assert_eq!(next_deadline(start, ms(900)), ms(100));
        assert_eq!(next_deadline(start, ms(5000)), ms(5000));
    }
}
