use std::os::fd::RawFd;
use std::sync::Mutex;

use vm_memory::GuestAddress;

use super::*;
use crate::devices::virtio::RestoreError;
use crate::vmm::irq::{MsiMessage, MsiRouter};

/// What the model was told.
#[derive(Default)]
pub(crate) struct Log {
    active: Vec<(u64, Vec<bool>)>,
    resets: u32,
    faults: u64,
    pub events: Vec<u16>,
    pub announced: u32,
    interrupt: Option<Arc<dyn Interrupt>>,
    restored: Vec<u8>,
}

struct Model(Arc<Mutex<Log>>);

impl VirtioDevice for Model {
    fn device_type(&self) -> u32 {
        2
    }
    fn features(&self) -> u64 {
        0x20
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn activate(&mut self, activation: Activation) {
        let mut log = self.0.lock().unwrap();
        let ready = activation.queues.iter().map(QueueT::ready).collect();
        log.active.push((activation.features, ready));
        log.interrupt = Some(activation.interrupt);
    }
    fn reset(&mut self) {
        let mut log = self.0.lock().unwrap();
        log.resets += 1;
        log.faults = 0;
    }
    fn poll_fds(&self) -> Vec<(RawFd, u32)> {
        vec![]
    }
    fn queue_event(&mut self, index: u16) {
        self.0.lock().unwrap().events.push(index);
    }
    fn fd_event(&mut self, _: u32) {}
    fn queues(&self) -> Vec<Queue> {
        vec![]
    }
    fn save(&self) -> Vec<u8> {
        b"model".to_vec()
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        self.0.lock().unwrap().restored = state.to_vec();
        Ok(())
    }
    fn release(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    fn acquire(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    fn announce(&mut self) {
        self.0.lock().unwrap().announced += 1;
    }
    fn faults(&self) -> u64 {
        self.0.lock().unwrap().faults
    }
}

struct NoRoutes;

impl MsiRouter for NoRoutes {
    fn route(&self, _: u32, _: MsiMessage) {}
}

pub(crate) struct Bench {
    pub function: VirtioPci,
    pub log: Arc<Mutex<Log>>,
    pub wake: EventFd,
    lines: Vec<EventFd>,
}

pub(crate) fn bench() -> Bench {
    let log = Arc::new(Mutex::new(Log::default()));
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let wake = EventFd::new(EFD_NONBLOCK).unwrap();
    let lines: Vec<EventFd> = (0..3)
        .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
        .collect();
    let pairs = lines
        .iter()
        .enumerate()
        .map(|(n, line)| (24 + n as u32, line.try_clone().unwrap()))
        .collect();
    let msix = Arc::new(Msix::new(pairs, Arc::new(NoRoutes)));
    let place = Placement {
        bar: 0xe000_0000,
        ram,
        wake: wake.try_clone().unwrap(),
        access_platform: true,
    };
    let function = VirtioPci::new(Box::new(Model(Arc::clone(&log))), msix, place).unwrap();
    Bench {
        function,
        log,
        wake,
        lines,
    }
}

/// Some function, for whom it does not matter which.
pub(crate) fn any_function() -> Arc<VirtioPci> {
    Arc::new(bench().function)
}

impl Bench {
    pub fn read(&self, offset: u64, length: usize) -> u64 {
        let mut bytes = [0; 8];
        self.function.bar_read(offset, &mut bytes[..length]);
        u64::from_le_bytes(bytes)
    }

    pub fn write(&self, offset: u64, value: u64, length: usize) {
        self.function
            .bar_write(offset, &value.to_le_bytes()[..length]);
    }

    fn negotiate(&self, features: u64) {
        self.write(0x14, 1, 1);
        self.write(0x14, 3, 1);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(0x08, select, 4);
            self.write(0x0c, half, 4);
        }
        self.write(0x14, 0xb, 1);
    }

    fn set_queue(&self, index: u64, base: u64) {
        self.write(0x16, index, 2);
        self.write(0x1a, index + 1, 2);
        self.write(0x20, base, 8);
        self.write(0x28, (base + 0x1000) & 0xffff_ffff, 4);
        self.write(0x2c, 0, 4);
        self.write(0x30, base + 0x2000, 8);
        self.write(0x1c, 1, 2);
    }

    pub fn say_driver_ok(&self) {
        self.negotiate(GOOD);
        self.set_queue(0, 0x1000);
        self.write(0x14, 0xf, 1);
    }

    fn start(&self) {
        self.say_driver_ok();
        self.function.service();
    }
}

const GOOD: u64 = F_VERSION_1 | F_ACCESS_PLATFORM | 0x20;

#[test]
fn a_driver_that_follows_the_rules_gets_its_device() {
    let bench = bench();
    assert_eq!(bench.read(0x12, 2), 2);
    bench.start();
    assert_eq!(bench.wake.read().unwrap(), 1);
    assert_eq!(
        bench.log.lock().unwrap().active,
        [(GOOD, vec![true, false])]
    );
    assert_eq!(bench.read(0x14, 1), 0xf);
    bench.function.queue_event(0);
    assert_eq!(bench.log.lock().unwrap().events, [0]);
}

#[test]
fn features_that_were_not_offered_or_left_out_are_refused() {
    for bad in [GOOD | 0x40, GOOD & !F_VERSION_1, GOOD & !F_ACCESS_PLATFORM] {
        let bench = bench();
        bench.negotiate(bad);
        assert_eq!(bench.read(0x14, 1), 3, "{bad:#x}");
        bench.write(0x14, 0xf, 1);
        bench.function.service();
        assert!(bench.log.lock().unwrap().active.is_empty());
    }
}

#[test]
fn a_queue_outside_memory_needs_a_reset_and_counts_as_a_fault() {
    let bench = bench();
    bench.negotiate(GOOD);
    bench.set_queue(0, 0xf_f000);
    bench.write(0x14, 0xf, 1);
    bench.function.service();
    assert!(bench.log.lock().unwrap().active.is_empty());
    assert_eq!(bench.read(0x14, 1), 0x4f);
    assert_eq!(bench.function.faults(), 1);
}

#[test]
fn a_reset_is_seen_only_when_the_device_thread_has_done_it() {
    let bench = bench();
    bench.start();
    bench.write(0x14, 0, 1);
    assert_ne!(bench.read(0x14, 1), 0);
    bench.function.service();
    assert_eq!(bench.read(0x14, 1), 0);
    assert_eq!(bench.log.lock().unwrap().resets, 1);
    bench.function.queue_event(0);
    assert!(bench.log.lock().unwrap().events.is_empty());
    bench.start();
    assert_eq!(bench.log.lock().unwrap().active.len(), 2);
}

#[test]
fn faults_are_not_forgotten_by_a_reset() {
    let bench = bench();
    bench.start();
    bench.log.lock().unwrap().faults = 5;
    bench.write(0x14, 0, 1);
    bench.function.service();
    assert_eq!(bench.function.faults(), 5);
    bench.start();
    bench.log.lock().unwrap().faults = 2;
    assert_eq!(bench.function.faults(), 7);
}

#[test]
fn interrupts_reach_the_vector_the_driver_chose() {
    let bench = bench();
    bench.start();
    let mut capability = [0; 4];
    let at = bench.function.msix_control;
    bench.function.config_read(at, &mut capability[..2]);
    assert_eq!(u16::from_le_bytes([capability[0], capability[1]]), 2);
    for vector in 0..3 {
        bench.write(0x4000 + vector * 16 + 12, 0, 4);
    }
    bench.function.config_write(at, &0x8000u16.to_le_bytes());
    bench
        .log
        .lock()
        .unwrap()
        .interrupt
        .as_ref()
        .unwrap()
        .queue(0);
    assert_eq!(bench.lines[1].read().unwrap(), 1);
    assert_eq!(bench.read(0x1000, 1), 1);
    assert_eq!(bench.read(0x1000, 1), 0);
    bench.write(0x16, 1, 2);
    bench.write(0x1a, 99, 2);
    assert_eq!(bench.read(0x1a, 2), 0xffff);
}

#[test]
fn queue_sizes_are_bounded_and_fixed_once_enabled() {
    let bench = bench();
    bench.write(0x16, 1, 2);
    for bad in [0u64, 65, 128, 63] {
        bench.write(0x18, bad, 2);
        assert_eq!(bench.read(0x18, 2), 64);
    }
    bench.write(0x18, 32, 2);
    bench.write(0x1c, 1, 2);
    bench.write(0x18, 16, 2);
    assert_eq!(bench.read(0x18, 2), 32);
    bench.write(0x16, 2, 2);
    assert_eq!(bench.read(0x18, 2), 0);
}

#[test]
fn the_configuration_window_reaches_the_bar() {
    let bench = bench();
    let window = bench.function.window;
    bench
        .function
        .config_write(window + 8, &0x12u32.to_le_bytes());
    bench
        .function
        .config_write(window + 12, &2u32.to_le_bytes());
    let mut count = [0; 2];
    bench.function.config_read(window + 16, &mut count);
    assert_eq!(u16::from_le_bytes(count), 2);
}

#[test]
fn a_state_goes_round_and_starts_the_device() {
    let bench = bench();
    bench.start();
    let bytes = postcard::to_stdvec(&bench.function.save()).unwrap();
    let other = self::bench();
    other
        .function
        .restore(postcard::from_bytes(&bytes).unwrap())
        .unwrap();
    assert_eq!(postcard::to_stdvec(&other.function.save()).unwrap(), bytes);
    let log = other.log.lock().unwrap();
    assert_eq!(log.active, [(GOOD, vec![true, false])]);
    assert_eq!(log.restored, b"model");
}

#[test]
fn a_state_of_another_machine_is_refused() {
    let bench = bench();
    bench.start();
    let bytes = postcard::to_stdvec(&bench.function.save()).unwrap();
    let state = || postcard::from_bytes::<VirtioStateV1>(&bytes).unwrap();
    let other = self::bench();
    other.lock().setups.pop();
    assert!(other.function.restore(state()).is_err());
    let other = self::bench();
    other.lock().offered = F_VERSION_1;
    assert!(other.function.restore(state()).is_err());
    assert!(other.log.lock().unwrap().active.is_empty());
}

impl Bench {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.function.lock()
    }
}

/// Doorbells placed now, and how many each place got.
#[derive(Default)]
struct Bells(Mutex<Vec<u64>>);

impl Doorbells for Bells {
    fn place(&self, _: &EventFd, address: u64) {
        self.0.lock().unwrap().push(address);
    }
    fn remove(&self, _: &EventFd, address: u64) {
        let mut placed = self.0.lock().unwrap();
        let at = placed.iter().position(|have| *have == address).unwrap();
        placed.remove(at);
    }
}

#[test]
fn doorbells_follow_a_bar_that_the_guest_moves_and_the_move_to_another_machine() {
    let movable = || {
        let bells = Arc::new(Bells::default());
        let bench = bench();
        let doorbells = Arc::clone(&bells) as Arc<dyn Doorbells>;
        (bench.function.with_movable_bar(doorbells), bells)
    };
    let (function, bells) = movable();
    let rung = |bells: &Bells| bells.0.lock().unwrap().clone();
    let at = |base: u64| {
        [0, 1]
            .map(|queue| base + VirtioPci::notify_offset(queue))
            .to_vec()
    };
    assert_eq!((function.in_placed_bar(0), rung(&bells)), (None, vec![]));
    // Sized and placed while it does not answer, as firmware does; then told to answer.
    function.config_write(0x10, &[0xff; 4]);
    function.config_write(0x10, &0xfb00_0000u32.to_le_bytes());
    assert!(rung(&bells).is_empty());
    function.config_write(0x04, &[6, 0]);
    assert_eq!(rung(&bells), at(0xfb00_0000));
    assert_eq!(function.in_placed_bar(0xfb00_0014), Some(0x14));
    assert_eq!(function.in_placed_bar(0xfb00_7fff), Some(0x7fff));
    for outside in [0xfaff_ffff, 0xfb00_8000, 0xe000_0000] {
        assert_eq!(function.in_placed_bar(outside), None);
    }
    function.config_write(0x10, &0xc000_8000u32.to_le_bytes());
    assert_eq!(rung(&bells), at(0xc000_8000));
    let (other, others) = movable();
    other.restore(function.save()).unwrap();
    assert_eq!(rung(&others), at(0xc000_8000));
    assert_eq!(other.in_placed_bar(0xc000_8000), Some(0));
    function.config_write(0x04, &[4, 0]);
    assert_eq!(
        (function.in_placed_bar(0xc000_8000), rung(&bells)),
        (None, vec![])
    );
}
