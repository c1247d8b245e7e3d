//! The fixed power management registers of the chipset (ICH9, section 13.8.3) that firmware uses: the timer by which
//! it measures time, and the control register by which it switches the machine off.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The registers of one machine.
pub struct PowerManagement(Mutex<Inner>);

struct Inner {
    enable: u16,
    control: u16,
    /// When the timer was zero.
    since: Instant,
}

/// Registers, version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerStateV1 {
    enable: u16,
    control: u16,
    timer_us: u64,
}

impl PowerManagement {
    /// At power-on.
    pub fn new() -> Self {
        Self(Mutex::new(Inner {
            enable: 0,
            control: 0,
            since: Instant::now(),
        }))
    }

    /// Reads at `offset` of the block.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let inner = self.lock();
        let registers = inner.registers(inner.since.elapsed());
        data.fill(0);
        data.iter_mut()
            .zip(registers.iter().skip(usize::from(offset)))
            .for_each(|(to, from)| *to = *from);
    }

    /// Writes; true if the machine is to be switched off.
    pub fn write(&self, offset: u16, data: &[u8]) -> bool {
        let mut inner = self.lock();
        let value = match data {
            [low, high, ..] => u16::from_le_bytes([*low, *high]),
            [low] => u16::from(*low),
            [] => return false,
        };
        match offset {
            ENABLE => inner.enable = value & ENABLE_BITS,
            CONTROL => {
                inner.control = value & CONTROL_BITS;
                return value & (SLEEP_ENABLE | SLEEP_TYPE) == SLEEP_ENABLE;
            }
            _ => {}
        }
        false
    }

    /// State to be saved.
    pub fn save(&self) -> PowerStateV1 {
        let inner = self.lock();
        PowerStateV1 {
            enable: inner.enable,
            control: inner.control,
            timer_us: u64::try_from(inner.since.elapsed().as_micros()).unwrap_or(0),
        }
    }

    /// Puts it back; the timer goes on from where it was, as near as this host's clock reaches.
    pub fn restore(&self, saved: PowerStateV1) {
        let now = Instant::now();
        let ago = Duration::from_micros(saved.timer_us);
        *self.lock() = Inner {
            enable: saved.enable & ENABLE_BITS,
            control: saved.control & CONTROL_BITS,
            since: now.checked_sub(ago).unwrap_or(now),
        };
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Status, enable, control, and the timer of 24 bits at 3.579545 MHz.
    fn registers(&self, elapsed: Duration) -> [u8; BLOCK] {
        let ticks = elapsed.as_nanos() * TIMER_HZ / 1_000_000_000;
        let timer = (ticks & 0xff_ffff) as u32;
        let [en_low, en_high] = self.enable.to_le_bytes();
        let [c_low, c_high] = self.control.to_le_bytes();
        let [a, b, c, d] = timer.to_le_bytes();
        [0, 0, en_low, en_high, c_low, c_high, 0, 0, a, b, c, d]
    }
}

/// Bytes of the block that are there.
pub const BLOCK: usize = 12;

const ENABLE: u16 = 2;
const CONTROL: u16 = 4;
const ENABLE_BITS: u16 = 0x0721;
/// Sleep type stays, the enable bit reads as zero; SCI enable is firmware's to set.
const CONTROL_BITS: u16 = 0x1c01;
const SLEEP_TYPE: u16 = 7 << 10;
const SLEEP_ENABLE: u16 = 1 << 13;
const TIMER_HZ: u128 = 3_579_545;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_counts_and_wraps_at_24_bits() {
        let power = PowerManagement::new();
        let timer = |seconds| {
            let block = power.lock().registers(Duration::from_secs(seconds));
            u32::from_le_bytes([block[8], block[9], block[10], block[11]])
        };
        assert_eq!([timer(0), timer(1)], [0, 3_579_545]);
        assert_eq!(timer(5), (5 * 3_579_545) & 0xff_ffff);
        let read = || {
            let mut data = [0; 4];
            power.read(8, &mut data);
            u32::from_le_bytes(data)
        };
        let first = read();
        std::thread::sleep(Duration::from_millis(2));
        assert!(read().wrapping_sub(first) & 0xff_ffff >= 7000);
    }

    #[test]
    fn only_sleep_of_type_0_with_the_enable_bit_switches_off() {
        let power = PowerManagement::new();
        let control = || {
            let mut data = [0; 2];
            power.read(CONTROL, &mut data);
            u16::from_le_bytes(data)
        };
        for quiet in [1, 5 << 10, SLEEP_ENABLE | (5 << 10)] {
            assert!(!power.write(CONTROL, &quiet.to_le_bytes()));
            assert_eq!(control(), quiet & CONTROL_BITS);
        }
        assert!(!power.write(ENABLE, &SLEEP_ENABLE.to_le_bytes()));
        assert!(!power.write(CONTROL, &[]));
        assert!(power.write(CONTROL, &(SLEEP_ENABLE | 1).to_le_bytes()));
        assert_eq!(control(), 1);
    }

    #[test]
    fn the_registers_travel() {
        let (from, to) = (PowerManagement::new(), PowerManagement::new());
        from.write(CONTROL, &[1, 0]);
        from.write(ENABLE, &[0xff, 0xff]);
        let saved = PowerStateV1 {
            timer_us: 77_000_000,
            ..from.save()
        };
        to.restore(saved);
        let there = to.save();
        assert_eq!((there.control, there.enable), (1, ENABLE_BITS));
        assert!(there.timer_us >= 77_000_000);
    }
}
