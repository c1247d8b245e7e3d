//! vCPUs that get only a part of their time, so that a guest writes less than a mover can send.
//!
//! As in QEMU, each vCPU runs for a slice and then rests for as long as its share says; the control thread keeps the time.

use std::time::{Duration, Instant};

use nix::poll::PollTimeout;

use super::super::protocol::{MAX_THROTTLE, MachineState, MoverReply, RoleError};
use super::Control;

/// A throttle that is on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Throttle {
    percent: u8,
    /// When the vCPUs rest next.
    next: Instant,
}

impl Throttle {
    /// How long the vCPUs rest after each [`SLICE`].
    fn rest(self) -> Duration {
        let share = f64::from(self.percent.min(MAX_THROTTLE)) / 100.0;
        SLICE.mul_f64(share / (1.0 - share))
    }
}

impl Control {
    /// Puts the throttle on, changes it, or takes it off.
    pub(super) fn throttle(&mut self, percent: u8) -> Result<MoverReply, RoleError> {
        self.expect(&[MachineState::Running], "throttling")?;
        if percent > MAX_THROTTLE {
            return Err(RoleError::new(
                "BAD_THROTTLE",
                format!("{percent} percent; at most {MAX_THROTTLE}"),
            ));
        }
        let next = Instant::now();
        self.moving.throttle = (percent > 0).then_some(Throttle { percent, next });
        Ok(MoverReply::Done)
    }

    /// How long the control thread may wait.
    pub(super) fn patience(&self) -> PollTimeout {
        let Some(throttle) = self.moving.throttle else {
            return PollTimeout::NONE;
        };
        let left = throttle.next.saturating_duration_since(Instant::now());
        // Up, so that it does not wake before the time.
        let milliseconds = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        PollTimeout::from(milliseconds)
    }

    /// Lets the vCPUs rest when it is time.
    pub(super) fn keep_throttle(&mut self) {
        let now = Instant::now();
        let running = self.state == MachineState::Running;
        let Some(throttle) = self.moving.throttle.as_mut().filter(|t| now >= t.next) else {
            return;
        };
        let rest = throttle.rest();
        throttle.next = now + rest + SLICE;
        if running && let Err(e) = self.machine.rest(rest) {
            tracing::error!("the vCPUs cannot be throttled: {e}");
            self.moving.throttle = None;
        }
    }
}

/// How long a throttled vCPU runs at a time.
const SLICE: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_leave_the_share_that_is_due() {
        let next = Instant::now();
        for (percent, milliseconds) in [(0, 0), (20, 2), (50, 10), (90, 90), (99, 990), (255, 990)]
        {
            let rest = Throttle { percent, next }.rest();
            let off = rest.as_secs_f64() * 1e3 - f64::from(milliseconds);
            assert!(off.abs() < 0.51, "{percent}: {rest:?}");
        }
    }
}
