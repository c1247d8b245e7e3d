//! The clock of a PC and its 128 bytes of memory (Motorola's MC146818), as far as firmware needs them: it reads the
//! time, and how much memory there is. The time is the host's; there is no alarm and no interrupt.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The clock and its memory.
pub struct Cmos(Mutex<CmosStateV1>);

/// Which register is selected and what the guest wrote, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosStateV1 {
    index: u8,
    memory: Vec<u8>,
}

impl Cmos {
    /// Of a machine with so much memory below and above 4 GiB.
    pub fn new(low: u64, high: u64) -> Self {
        let mut memory = vec![0; SIZE];
        let mut set = |at: usize, bytes: &[u8]| {
            let slots = memory.iter_mut().skip(at);
            slots.zip(bytes).for_each(|(to, from)| *to = *from);
        };
        let units = low.saturating_sub(16 << 20) >> 16;
        set(ABOVE_16_MIB, &(units.min(0xffff) as u16).to_le_bytes());
        let [a, b, c, ..] = (high >> 16).to_le_bytes();
        set(ABOVE_4_GIB, &[a, b, c]);
        Self(Mutex::new(CmosStateV1 { index: 0, memory }))
    }

    /// `in`: `offset` 0 is the index port, 1 the data port.
    pub fn port_read(&self, offset: u16, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset {
            0 => state.index,
            _ => state.read(SystemTime::now()),
        };
        data.fill(value);
    }

    /// `out`.
    pub fn port_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            // The highest bit holds back NMIs on a real board.
            (0, [index, ..]) => state.index = index & 0x7f,
            (_, [value, ..]) => state.write(*value),
            _ => {}
        }
    }

    /// State to be saved.
    pub fn save(&self) -> CmosStateV1 {
        self.lock().clone()
    }

    /// Puts a state back; nothing if it is none.
    pub fn restore(&self, saved: CmosStateV1) -> Option<()> {
        let fits = saved.memory.len() == SIZE && usize::from(saved.index) < SIZE;
        fits.then(|| *self.lock() = saved)
    }

    fn lock(&self) -> MutexGuard<'_, CmosStateV1> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CmosStateV1 {
    fn read(&self, now: SystemTime) -> u8 {
        let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (year, month, day) = civil(seconds / DAY);
        let time = seconds % DAY;
        match self.index {
            0x00 => bcd(time % 60),
            0x02 => bcd(time / 60 % 60),
            0x04 => bcd(time / 3600),
            // 1 January 1970 was a Thursday, and Sunday is 1.
            0x06 => bcd((seconds / DAY + 4) % 7 + 1),
            0x07 => bcd(day),
            0x08 => bcd(month),
            0x09 => bcd(year % 100),
            0x32 => bcd(year / 100),
            REGISTER_A => DIVIDER,
            REGISTER_B => HOURS_OF_24,
            REGISTER_C => 0,
            REGISTER_D => BATTERY_GOOD,
            index => self.memory.get(usize::from(index)).copied().unwrap_or(0xff),
        }
    }

    /// What is the clock's does not change: it is the host's.
    fn write(&mut self, value: u8) {
        let own = self.index <= REGISTER_D || self.index == 0x32;
        if let Some(slot) = self.memory.get_mut(usize::from(self.index))
            && !own
        {
            *slot = value;
        }
    }
}

fn bcd(value: u64) -> u8 {
    ((value / 10 % 10) << 4 | (value % 10)) as u8
}

/// Year, month, day of a day since 1 January 1970 (Howard Hinnant's `civil_from_days`, for days that are not negative).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

const SIZE: usize = 128;
const DAY: u64 = 86_400;
/// Memory from 16 MiB to 4 GiB and above 4 GiB, in units of 64 KiB.
const ABOVE_16_MIB: usize = 0x34;
const ABOVE_4_GIB: usize = 0x5b;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// 32,768 Hz, 1,024 interrupts a second if there were any; no update under way.
const DIVIDER: u8 = 0x26;
const HOURS_OF_24: u8 = 1 << 1;
const BATTERY_GOOD: u8 = 1 << 7;

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(index: u8, seconds: u64) -> u8 {
        let state = CmosStateV1 {
            index,
            memory: vec![0; SIZE],
        };
        state.read(UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn the_time_is_told_in_decimal_digits() {
        // 2024-02-29 23:59:58, a Thursday; then 2100-03-01, a Monday, after no leap day.
        for (seconds, expect) in [
            (
                1_709_251_198,
                [0x58, 0x59, 0x23, 0x05, 0x29, 0x02, 0x24, 0x20],
            ),
            (
                4_107_542_400,
                [0x00, 0x00, 0x00, 0x02, 0x01, 0x03, 0x00, 0x21],
            ),
        ] {
            let registers = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32];
            assert_eq!(registers.map(|index| at(index, seconds)), expect);
        }
        let modes = [REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D];
        assert_eq!(modes.map(|index| at(index, 1)), [0x26, 0x02, 0x00, 0x80]);
    }

    #[test]
    fn memory_sizes_are_there_and_only_memory_is_the_guests_to_write() {
        let cmos = Cmos::new(2 << 30, 5 << 30);
        let read = |index: u8| {
            cmos.port_write(0, &[index | 0x80]);
            let mut data = [0; 1];
            cmos.port_read(1, &mut data);
            data[0]
        };
        assert_eq!([0x34, 0x35].map(read), 0x7f00u16.to_le_bytes());
        assert_eq!([0x5b, 0x5c, 0x5d].map(read), [0, 0x40, 1]);
        for index in [0x0f, REGISTER_D, 0x32] {
            cmos.port_write(0, &[index]);
            cmos.port_write(1, &[0x5a]);
        }
        assert_eq!((read(0x0f), read(REGISTER_D)), (0x5a, BATTERY_GOOD));
        assert_ne!(read(0x32), 0x5a);
        let other = Cmos::new(64 << 20, 0);
        other.restore(cmos.save()).unwrap();
        assert_eq!(other.save(), cmos.save());
        let short = CmosStateV1 {
            index: 0,
            memory: vec![0; 3],
        };
        assert_eq!(other.restore(short), None);
    }
}
