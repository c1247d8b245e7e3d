//! A watchdog as a PCI function: Intel's 6300ESB, for which Linux (`i6300esb`), BSD and Windows have drivers. Virtio has
//! none. The guest feeds it; when it does not, the host acts.
//!
//! Two timers in a row, as in the chip (Intel 300641, chapter 15): the second one's end is the alarm. The first one's
//! interrupt is not there; drivers do not use it. Time stands while the guest is paused or on the road.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vmm::pci::PciFunction;
use crate::vmm::pci::config::{ConfigSpace, Identity};

/// The watchdog of one machine.
pub struct Watchdog {
    config: Mutex<ConfigSpace>,
    inner: Mutex<Inner>,
    /// Wakes the device thread, which minds the time.
    wake: EventFd,
    alarm: EventFd,
}

impl Watchdog {
    /// A watchdog that sleeps, its registers at `bar`.
    ///
    /// # Errors
    ///
    /// If the kernel gives no event.
    pub fn new(bar: u32, wake: EventFd) -> io::Result<Self> {
        let mut config = ConfigSpace::new(IDENTITY);
        config.set_bar(bar, BAR_SIZE);
        Ok(Self {
            config: Mutex::new(config),
            inner: Mutex::new(Inner {
                saved: WatchdogStateV1::power_on(),
                ends: None,
                running: false,
            }),
            wake,
            alarm: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Makes the place of its registers the guest's to choose.
    pub fn with_movable_bar(self) -> Self {
        self.space().set_movable_bar(BAR_SIZE);
        self
    }

    /// How far into its movable BAR an address is.
    pub fn in_placed_bar(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.space().placed_bar()?)?;
        (offset < u64::from(BAR_SIZE)).then_some(offset)
    }

    /// Reads its registers.
    pub fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let inner = self.lock();
        if let (RELOAD, true, [_, high, ..]) = (offset, inner.saved.alarmed, data) {
            *high = (TIMED_OUT >> 8) as u8;
        }
    }

    /// Writes them. Each write but that of the first key needs both keys before it, and uses them up.
    pub fn bar_write(&self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        value
            .iter_mut()
            .zip(data)
            .for_each(|(to, from)| *to = *from);
        let value = u32::from_le_bytes(value);
        let mut inner = self.lock();
        match (offset, value, inner.saved.keys) {
            (RELOAD, KEY_1, _) => inner.saved.keys = 1,
            (RELOAD, KEY_2, 1) => inner.saved.keys = 2,
            (_, _, 2) => {
                inner.saved.keys = 0;
                self.unlocked_write(&mut inner, offset, value, data.len());
            }
            _ => {}
        }
    }

    /// Device thread: the guest runs, so does the time.
    pub fn go(&self) {
        let mut inner = self.lock();
        inner.running = true;
        inner.ends = inner
            .saved
            .left_us
            .map(|left| Instant::now() + Duration::from_micros(left));
    }

    /// Device thread: the guest stands, so does the time.
    pub fn stand(&self) {
        let mut inner = self.lock();
        inner.note_time_left();
        inner.running = false;
        inner.ends = None;
    }

    /// When the device thread must look again.
    pub fn next(&self) -> Option<Instant> {
        self.lock().ends
    }

    /// Device thread: acts if it is time.
    pub fn look(&self) {
        let mut inner = self.lock();
        if inner.ends.is_none_or(|ends| ends > Instant::now()) {
            return;
        }
        if inner.saved.stage == 1 {
            inner.start(2);
            return;
        }
        if inner.saved.config & NO_REBOOT == 0 {
            inner.saved.alarmed = true;
            // The counter cannot overflow by one write.
            let _ = self.alarm.write(1);
        }
        inner.halt();
    }

    /// Readable when the guest was not fed in time.
    #[expect(unsafe_code, reason = "EventFd lends its descriptor as a number only")]
    pub fn alarm(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the event's own and open as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.alarm.as_raw_fd()) }
    }

    /// Whether there was an alarm since the last call.
    pub fn take_alarm(&self) -> bool {
        self.alarm.read().is_ok()
    }

    /// State of a machine that stands.
    pub fn save(&self) -> WatchdogStateV1 {
        let mut inner = self.lock();
        inner.note_time_left();
        WatchdogStateV1 {
            space: self.space().save(),
            ..inner.saved.clone()
        }
    }

    /// Puts it back; nothing if no watchdog was ever in that state.
    pub fn restore(&self, saved: WatchdogStateV1) -> Option<()> {
        let timers = saved.preload.iter().all(|preload| *preload <= PRELOAD_MAX);
        let longest = ticks(PRELOAD_MAX, 0).as_micros();
        let left = saved.left_us.is_none_or(|left| u128::from(left) <= longest);
        if !timers || !left || !(1..=2).contains(&saved.stage) || saved.keys > 2 {
            return None;
        }
        self.space().restore(&saved.space);
        self.lock().saved = saved;
        Some(())
    }

    fn unlocked_write(&self, inner: &mut Inner, offset: u64, value: u32, length: usize) {
        match (offset, length) {
            (TIMER_1, 4) => inner.saved.preload[0] = value & PRELOAD_MAX,
            (TIMER_2, 4) => inner.saved.preload[1] = value & PRELOAD_MAX,
            (RELOAD, _) => {
                if value & TIMED_OUT != 0 {
                    inner.saved.alarmed = false;
                }
                if value & FEED != 0 && inner.saved.lock & ENABLE != 0 {
                    inner.start(1);
                    self.wake_if_sooner();
                }
            }
            _ => {}
        }
    }

    fn write_lock(&self, value: u8) {
        let mut inner = self.lock();
        if inner.saved.lock & LOCKED != 0 {
            return;
        }
        let was = inner.saved.lock & ENABLE != 0;
        inner.saved.lock = value & (LOCKED | ENABLE | FREE_RUN);
        match (was, value & ENABLE != 0) {
            (false, true) => {
                inner.start(1);
                self.wake_if_sooner();
            }
            (true, false) => inner.halt(),
            _ => {}
        }
    }

    /// The device thread may sleep longer than until the new end: it looks again.
    fn wake_if_sooner(&self) {
        // The counter cannot overflow by one write.
        let _ = self.wake.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for Watchdog {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.space().read(offset, data);
        let inner = self.lock();
        let [low, high] = inner.saved.config.to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            match at {
                CONFIG => *byte = low,
                CONFIG_HIGH => *byte = high,
                LOCK => *byte = inner.saved.lock,
                _ => {}
            }
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        self.space().write(offset, data);
        for (at, byte) in (offset..).zip(data) {
            match at {
                CONFIG => {
                    self.lock().saved.config = u16::from(*byte) & (NO_REBOOT | FAST | INTERRUPT)
                }
                LOCK => self.write_lock(*byte),
                _ => {}
            }
        }
    }
}

/// Registers of the watchdog, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogStateV1 {
    space: Vec<u8>,
    config: u16,
    lock: u8,
    preload: [u32; 2],
    keys: u8,
    stage: u8,
    left_us: Option<u64>,
    alarmed: bool,
}

impl WatchdogStateV1 {
    fn power_on() -> Self {
        Self {
            space: Vec::new(),
            config: 0,
            lock: 0,
            preload: [PRELOAD_MAX; 2],
            keys: 0,
            stage: 1,
            left_us: None,
            alarmed: false,
        }
    }
}

struct Inner {
    saved: WatchdogStateV1,
    /// When the stage ends, while the guest runs.
    ends: Option<Instant>,
    running: bool,
}

impl Inner {
    fn start(&mut self, stage: u8) {
        let preload = match stage {
            1 => self.saved.preload[0],
            _ => self.saved.preload[1],
        };
        let whole = ticks(preload, self.saved.config);
        self.saved.stage = stage;
        self.saved.left_us = u64::try_from(whole.as_micros()).ok();
        self.ends = self.running.then(|| Instant::now() + whole);
    }

    fn halt(&mut self) {
        self.saved.lock &= !ENABLE;
        self.saved.stage = 1;
        self.saved.left_us = None;
        self.ends = None;
    }

    fn note_time_left(&mut self) {
        if let Some(ends) = self.ends {
            let left = ends.saturating_duration_since(Instant::now());
            self.saved.left_us = u64::try_from(left.as_micros()).ok();
        }
    }
}

/// A stage's time: units of 32,768 cycles (some 1 ms) or, fast, of 32 (some 1 µs), of the 33 MHz PCI clock.
fn ticks(preload: u32, config: u16) -> Duration {
    let shift = if config & FAST != 0 { 5 } else { 15 };
    let cycles = u64::from(preload) << shift;
    Duration::from_nanos(cycles * 1000 / 33)
}

const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x25ab,
    class: 0x08_8000,
    revision: 0,
    subsystem: (0x1af4, 0x1100),
};
/// A page: what a guest maps.
const BAR_SIZE: u32 = 0x1000;
const TIMER_1: u64 = 0x0;
const TIMER_2: u64 = 0x4;
const RELOAD: u64 = 0xc;
const KEY_1: u32 = 0x80;
const KEY_2: u32 = 0x86;
const FEED: u32 = 0x100;
const TIMED_OUT: u32 = 0x200;
const PRELOAD_MAX: u32 = 0xf_ffff;
// configuration space
const CONFIG: usize = 0x60;
const CONFIG_HIGH: usize = 0x61;
const LOCK: usize = 0x68;
const INTERRUPT: u16 = 0x03;
const FAST: u16 = 1 << 2;
const NO_REBOOT: u16 = 1 << 5;
const LOCKED: u8 = 1;
const ENABLE: u8 = 1 << 1;
const FREE_RUN: u8 = 1 << 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn watchdog() -> Watchdog {
        let watchdog = Watchdog::new(0xe000_8000, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
        watchdog.go();
        watchdog
    }

    /// A register write behind both keys, as Linux's driver does it.
    fn write(watchdog: &Watchdog, offset: u64, bytes: &[u8]) {
        watchdog.bar_write(RELOAD, &[0x80, 0]);
        watchdog.bar_write(RELOAD, &[0x86, 0]);
        watchdog.bar_write(offset, bytes);
    }

    /// So many milliseconds a stage, the second half the whole.
    fn arm(watchdog: &Watchdog, stage: u32) {
        watchdog.config_write(CONFIG, &0x0003u16.to_le_bytes());
        write(watchdog, TIMER_1, &stage.to_le_bytes());
        write(watchdog, TIMER_2, &stage.to_le_bytes());
        write(watchdog, RELOAD, &[0, 1]);
        watchdog.config_write(LOCK, &[ENABLE]);
    }

    fn wait(watchdog: &Watchdog, limit: Duration) -> Option<Duration> {
        let begun = Instant::now();
        while begun.elapsed() < limit {
            watchdog.look();
            if watchdog.take_alarm() {
                return Some(begun.elapsed());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    #[test]
    fn an_unfed_guest_is_noticed_after_both_stages() {
        let watchdog = watchdog();
        arm(&watchdog, 30);
        let took = wait(&watchdog, Duration::from_secs(5)).unwrap();
        assert!(took >= Duration::from_millis(58), "{took:?}");
        let mut word = [0; 2];
        watchdog.bar_read(RELOAD, &mut word);
        assert_eq!(word, [0, 2], "it says that it was it");
        write(&watchdog, RELOAD, &[0, 2]);
        watchdog.bar_read(RELOAD, &mut word);
        assert_eq!(word, [0, 0]);
        assert!(watchdog.next().is_none(), "it barks once");
    }

    #[test]
    fn a_fed_one_is_not_and_food_without_keys_is_none() {
        let watchdog = watchdog();
        arm(&watchdog, 100);
        for _ in 0..20 {
            write(&watchdog, RELOAD, &[0, 1]);
            assert!(wait(&watchdog, Duration::from_millis(20)).is_none());
        }
        watchdog.config_write(LOCK, &[0]);
        assert!(watchdog.next().is_none(), "switched off");
        arm(&watchdog, 20);
        let begun = Instant::now();
        while !watchdog.take_alarm() {
            assert!(begun.elapsed() < Duration::from_secs(5), "it sleeps");
            watchdog.bar_write(RELOAD, &[0, 1]);
            watchdog.look();
        }
    }

    #[test]
    fn a_locked_one_cannot_be_switched_off() {
        let watchdog = watchdog();
        arm(&watchdog, 10);
        watchdog.config_write(LOCK, &[ENABLE | LOCKED]);
        watchdog.config_write(LOCK, &[0]);
        let mut lock = [0];
        watchdog.config_read(LOCK, &mut lock);
        assert_eq!(lock, [ENABLE | LOCKED]);
        assert!(wait(&watchdog, Duration::from_secs(5)).is_some());
    }

    #[test]
    fn one_that_may_not_reboot_keeps_quiet() {
        let watchdog = watchdog();
        arm(&watchdog, 5);
        watchdog.config_write(CONFIG, &NO_REBOOT.to_le_bytes());
        assert!(wait(&watchdog, Duration::from_millis(60)).is_none());
    }

    #[test]
    fn time_stands_in_a_pause_and_in_a_move() {
        let watchdog = watchdog();
        arm(&watchdog, 40);
        watchdog.stand();
        std::thread::sleep(Duration::from_millis(120));
        assert!(wait(&watchdog, Duration::from_millis(5)).is_none());
        let saved = watchdog.save();
        let bytes = postcard::to_allocvec(&saved).unwrap();
        let arrived = self::watchdog();
        arrived.stand();
        arrived
            .restore(postcard::from_bytes(&bytes).unwrap())
            .unwrap();
        assert_eq!(arrived.save(), saved);
        assert!(arrived.next().is_none());
        arrived.go();
        let took = wait(&arrived, Duration::from_secs(5)).unwrap();
        assert!(took >= Duration::from_millis(60), "{took:?}");
        for spoil in [
            |s: &mut WatchdogStateV1| s.stage = 3,
            |s: &mut WatchdogStateV1| s.left_us = Some(u64::MAX),
            |s: &mut WatchdogStateV1| s.preload[1] = u32::MAX,
            |s: &mut WatchdogStateV1| s.keys = 9,
        ] {
            let mut bad = saved.clone();
            spoil(&mut bad);
            assert!(self::watchdog().restore(bad).is_none());
        }
    }

    #[test]
    fn linux_finds_it() {
        let watchdog = watchdog();
        let mut id = [0; 4];
        watchdog.config_read(0, &mut id);
        assert_eq!(id, [0x86, 0x80, 0xab, 0x25]);
        watchdog.config_write(0x10, &[0xff; 4]);
        watchdog.config_read(0x10, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0xffff_f000);
    }

    #[test]
    fn a_movable_place_is_the_guests_to_choose() {
        let watchdog = watchdog().with_movable_bar();
        assert_eq!(watchdog.in_placed_bar(0xe000_8000), None);
        watchdog.config_write(0x10, &0xc000_0000u32.to_le_bytes());
        assert_eq!(watchdog.in_placed_bar(0xc000_0000), None);
        watchdog.config_write(0x04, &[2, 0]);
        assert_eq!(watchdog.in_placed_bar(0xc000_000c), Some(RELOAD));
        assert_eq!(watchdog.in_placed_bar(0xc000_1000), None);
    }
}
