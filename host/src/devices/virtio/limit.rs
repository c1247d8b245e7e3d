//! How much a device may do in a time: token buckets for bytes and operations, refilled by the clock.
//!
//! A request is let through while its bucket is not in debt, and may bring it there: so a request of any length passes
//! once, and what it cost beyond the burst is waited off before the next.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::machine::plan::devices::{Limits, Rate};

/// The limits of one device, and the timer that says when it may go on.
pub(super) struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    timer: TimerFd,
    waiting: bool,
    /// How often the device had to wait.
    waits: u64,
}

impl Limiter {
    /// Makes the timer: before the filter closes, for later no thread may.
    pub(super) fn new(limits: Limits) -> io::Result<Limiter> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let mut limiter = Limiter {
            bytes: None,
            operations: None,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            waiting: false,
            waits: 0,
        };
        limiter.set(limits);
        Ok(limiter)
    }

    /// New limits from now on; the buckets begin full.
    pub(super) fn set(&mut self, limits: Limits) {
        let now = Instant::now();
        self.bytes = limits.bytes.map(|rate| Bucket::new(rate, now));
        self.operations = limits.operations.map(|rate| Bucket::new(rate, now));
        self.waiting = false;
    }

    /// Whether the next request may be served. If not, the timer is set.
    pub(super) fn admits(&mut self) -> bool {
        if self.bytes.is_none() && self.operations.is_none() {
            return true;
        }
        let now = Instant::now();
        let buckets = [&mut self.bytes, &mut self.operations];
        let wait = buckets.into_iter().flatten().map(|b| b.wait(now)).max();
        match wait.filter(|wait| !wait.is_zero()) {
            None => {
                self.waiting = false;
                true
            }
            Some(wait) => {
                self.waits += u64::from(!self.waiting);
                self.waiting = self.arm(wait);
                // Without a timer the device would stand for ever; then rather too fast.
                !self.waiting
            }
        }
    }

    /// A request of so many bytes was served.
    pub(super) fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
    }

    /// The timer, while somebody waits for it.
    pub(super) fn poll_fd(&self) -> Option<RawFd> {
        self.waiting.then(|| self.timer.as_fd().as_raw_fd())
    }

    /// The timer is readable.
    pub(super) fn expired(&mut self) {
        // Whether it has expired is the buckets' to say.
        let _ = nix::unistd::read(&self.timer, &mut [0; 8]);
        self.waiting = false;
    }

    /// How often the device had to wait.
    #[cfg(test)]
    pub(super) fn waits(&self) -> u64 {
        self.waits
    }

    fn arm(&self, wait: Duration) -> bool {
        let wait = wait.clamp(Duration::from_micros(100), LONGEST_WAIT);
        let when = Expiration::OneShot(TimeSpec::from_duration(wait));
        self.timer.set(when, TimerSetTimeFlags::empty()).is_ok()
    }
}

/// Tokens, in units of one byte or operation times a nanosecond's share, so that no fraction is lost.
struct Bucket {
    rate: u64,
    burst: u64,
    /// Tokens times 10^9; below zero is debt.
    level: i128,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Bucket {
        let rate = Rate {
            per_second: rate.per_second.max(1),
            burst: rate.burst.max(1),
        };
        Bucket {
            rate: rate.per_second,
            burst: rate.burst,
            level: i128::from(rate.burst) * NANOS,
            filled: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_nanos();
        let gained = i128::try_from(elapsed).unwrap_or(i128::MAX) * i128::from(self.rate);
        self.level = (self.level.saturating_add(gained)).min(i128::from(self.burst) * NANOS);
        self.filled = now;
    }

    /// How long until there is a whole token.
    fn wait(&mut self, now: Instant) -> Duration {
        self.fill(now);
        let missing = (NANOS - self.level).max(0);
        let nanos = missing.unsigned_abs().div_ceil(u128::from(self.rate));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * NANOS);
    }
}

const NANOS: i128 = 1_000_000_000;
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(per_second: u64, burst: u64) -> (Bucket, Instant) {
        let now = Instant::now();
        (Bucket::new(Rate { per_second, burst }, now), now)
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let (mut bucket, start) = bucket(1000, 10);
        for _ in 0..10 {
            assert_eq!(bucket.wait(start), Duration::ZERO);
            bucket.take(1);
        }
        assert_eq!(bucket.wait(start), Duration::from_millis(1));
        let mut passed = 0;
        for micros in (0..1_000_000).step_by(100) {
            if bucket.wait(start + Duration::from_micros(micros)).is_zero() {
                bucket.take(1);
                passed += 1;
            }
        }
        assert_eq!(passed, 999, "a second's worth");
    }

    #[test]
    fn a_long_request_passes_once_and_is_waited_off() {
        let (mut bucket, start) = bucket(1 << 20, 4096);
        bucket.take(1 << 20);
        let wait = bucket.wait(start);
        assert!(
            (Duration::from_millis(995)..Duration::from_millis(1000)).contains(&wait),
            "{wait:?}"
        );
        assert_eq!(bucket.wait(start + wait), Duration::ZERO);
    }

    #[test]
    fn nothing_is_saved_up_beyond_the_burst_and_nothing_overflows() {
        let (mut bucket, start) = bucket(u64::MAX, u64::MAX);
        bucket.take(u64::MAX);
        bucket.take(u64::MAX);
        bucket.wait(start + Duration::from_secs(1 << 30));
        assert_eq!(bucket.level, i128::from(u64::MAX) * NANOS);
        let (mut bucket, start) = self::bucket(5, 2);
        let later = start + Duration::from_secs(3600);
        bucket.wait(later);
        bucket.take(2);
        assert!(!bucket.wait(later).is_zero());
    }

    #[test]
    fn the_timer_says_when() {
        let rate = Rate {
            per_second: 100,
            burst: 1,
        };
        let limits = Limits {
            operations: Some(rate),
            ..Limits::default()
        };
        let mut limiter = Limiter::new(limits).unwrap();
        assert!(limiter.admits() && limiter.poll_fd().is_none());
        limiter.charge(4096);
        assert!(!limiter.admits() && !limiter.admits());
        assert_eq!(limiter.waits(), 1);
        assert!(limiter.poll_fd().is_some());
        let begun = Instant::now();
        while !limiter.admits() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(begun.elapsed() >= Duration::from_millis(8));
        limiter.expired();
        assert!(limiter.poll_fd().is_none());
        limiter.charge(1);
        limiter.set(Limits::default());
        assert!(limiter.admits(), "limits are lifted at once");
    }
}
