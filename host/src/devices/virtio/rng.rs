//! The virtio entropy device (specification section 5.4): one queue, filled from the host kernel's generator, so much a
//! second and no more.

use std::io;
use std::os::fd::RawFd;

use ring::rand::{SecureRandom, SystemRandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Queue;

use super::limit::Limiter;
use super::ring::{Active, RING_FEATURES};
use super::{Activation, RestoreError, VirtioDevice, saved};
use crate::machine::plan::devices::{Limits, RngPlan};

/// A source of random numbers.
pub struct Rng {
    source: SystemRandom,
    limiter: Limiter,
    active: Option<Active>,
    held: bool,
}

impl Rng {
    /// A source with the plan's limit.
    ///
    /// # Errors
    ///
    /// If the kernel gives no timer.
    pub fn new(plan: RngPlan) -> io::Result<Rng> {
        let limits = Limits {
            bytes: Some(plan.bytes),
            operations: None,
        };
        Ok(Rng {
            source: SystemRandom::new(),
            limiter: Limiter::new(limits)?,
            active: None,
            held: false,
        })
    }

    fn serve(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let ram = active.ram.clone();
        let Some(ring) = active.rings.first_mut() else {
            return;
        };
        let mut bytes = [0; REQUEST_MAX];
        loop {
            while self.limiter.admits() {
                let Some(chain) = ring.pop(&ram, CHAIN_MAX) else {
                    break;
                };
                let mut written = 0;
                if chain.broken {
                    // Counted by the queue.
                } else if let Some(random) = bytes.get_mut(..chain.writable.len().min(REQUEST_MAX))
                    && self.source.fill(random).is_ok()
                {
                    written = chain.writable.write_at(0, random);
                }
                self.limiter.charge(written as u64);
                ring.push(&ram, &chain, u32::try_from(written).unwrap_or(0));
            }
            ring.signal(&ram, active.interrupt.as_ref());
            if self.limiter.poll_fd().is_some() || !ring.listen(&ram) {
                break;
            }
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) {
        self.active = Some(Active::new(activation));
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn poll_fds(&self) -> Vec<(RawFd, u32)> {
        self.limiter
            .poll_fd()
            .map(|fd| (fd, 0))
            .into_iter()
            .collect()
    }

    fn queue_event(&mut self, _index: u16) {
        self.serve();
    }

    fn fd_event(&mut self, _token: u32) {
        self.limiter.expired();
        self.serve();
    }

    fn queues(&self) -> Vec<Queue> {
        self.active.as_ref().map(Active::queues).unwrap_or_default()
    }

    /// Nothing travels: what was drawn is gone, and the other host has a generator of its own.
    fn save(&self) -> Vec<u8> {
        saved::encode(STATE_VERSION, &())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        saved::decode("rng", STATE_VERSION, state)
    }

    fn release(&mut self) -> io::Result<()> {
        self.held = false;
        Ok(())
    }

    fn acquire(&mut self) -> io::Result<()> {
        self.held = true;
        self.serve();
        Ok(())
    }

    fn faults(&self) -> u64 {
        self.active.as_ref().map_or(0, Active::faults)
    }
}

const STATE_VERSION: u8 = 1;
const QUEUE_SIZES: [u16; 1] = [64];
const CHAIN_MAX: usize = 16;
/// Most bytes for one request; a driver takes what it gets and asks again.
const REQUEST_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::super::driver::{Buffer, Driver};
    use super::*;
    use crate::machine::plan::devices::Rate;

    const DATA: u64 = 0x10_0000;

    fn rig(per_second: u64, burst: u64) -> (Driver, Rng) {
        let driver = Driver::new(1);
        let bytes = Rate { per_second, burst };
        let mut rng = Rng::new(RngPlan { bytes }).unwrap();
        rng.activate(driver.activation(u64::MAX));
        rng.acquire().unwrap();
        (driver, rng)
    }

    #[test]
    fn fills_what_it_is_given_and_never_twice_the_same() {
        let (driver, mut rng) = rig(1 << 20, 1 << 20);
        driver.offer(
            0,
            &[Buffer::write(DATA, 40), Buffer::write(DATA + 4096, 24)],
        );
        driver.offer(0, &[Buffer::write(DATA + 8192, 64)]);
        driver.offer(0, &[Buffer::write(DATA + 0x4000, 9000)]);
        driver.offer(0, &[Buffer::read(DATA + 0x8000, &[7; 64])]);
        rng.queue_event(0);
        let written: Vec<_> = std::iter::from_fn(|| driver.used(0).map(|(_, n)| n)).collect();
        assert_eq!(written, [64, 64, 4096, 0]);
        let one = [driver.bytes(DATA, 40), driver.bytes(DATA + 4096, 24)].concat();
        let two = driver.bytes(DATA + 8192, 64);
        assert!(one != two && one != [0; 64] && two != [0; 64]);
        assert_eq!(driver.bytes(DATA + 40, 8), [0; 8], "beyond the buffer");
        assert_eq!(
            driver.bytes(DATA + 0x8000, 64),
            [7; 64],
            "not ours to write"
        );
        assert_eq!(driver.interrupts.take(), [0]);
    }

    #[test]
    fn gives_no_more_than_its_rate_and_goes_on_by_itself() {
        let (driver, mut rng) = rig(10, 64);
        for n in 0..3 {
            driver.offer(0, &[Buffer::write(DATA + n * 64, 64)]);
        }
        rng.queue_event(0);
        assert_eq!(driver.used(0), Some((0, 64)));
        assert_eq!(driver.used(0), None);
        let [(timer, 0)] = rng.poll_fds()[..] else {
            panic!("it waits for nothing")
        };
        assert!(timer >= 0);
        std::thread::sleep(std::time::Duration::from_millis(110));
        rng.fd_event(0);
        assert_eq!(driver.used(0), Some((1, 64)));
        assert_eq!(driver.used(0), None);
    }

    #[test]
    fn serves_only_who_holds_it_and_forgets_nothing_in_a_move() {
        let (driver, mut rng) = rig(1 << 20, 1 << 20);
        rng.release().unwrap();
        driver.offer(0, &[Buffer::write(DATA, 8)]);
        rng.queue_event(0);
        assert_eq!(driver.used(0), None);
        assert_eq!(rng.save(), [1], "the released format of version 1");
        let bytes = Rate {
            per_second: 1000,
            burst: 1000,
        };
        let mut arrived = Rng::new(RngPlan { bytes }).unwrap();
        assert!(arrived.restore(&[2]).is_err() && arrived.restore(&[1, 0]).is_err());
        arrived.restore(&rng.save()).unwrap();
        arrived.activate(Activation {
            queues: rng.queues(),
            ..driver.activation(u64::MAX)
        });
        arrived.acquire().unwrap();
        assert_eq!(driver.used(0), Some((0, 8)));
    }

    #[test]
    fn broken_chains_are_given_back_and_counted() {
        let (driver, mut rng) = rig(1 << 20, 1 << 20);
        driver.offer(0, &[Buffer::write(Driver::RAM - 4, 64)]);
        rng.queue_event(0);
        assert_eq!(driver.used(0), Some((0, 0)));
        assert_eq!(rng.faults(), 1);
    }
}
