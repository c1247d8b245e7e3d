//! The virtio balloon (specification section 5.5): pages that the guest gives up, or says it does not use, go back to
//! the host.
//!
//! Page numbers and ranges are the guest's. Each is checked against guest memory, and what is taken is that guest's own:
//! at worst it takes a page from itself, which then reads as zeros.

mod pages;

use std::io;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::Queue;

use self::pages::{PAGE, give_back, runs_of};
use super::ring::{Active, Chain, RING_FEATURES};
use super::{Activation, GuestRam, Interrupt, RestoreError, VirtioDevice, saved};
use crate::machine::plan::devices::{BalloonPlan, DeviceChange, DeviceStatus};

/// A balloon.
pub struct Balloon {
    plan: BalloonPlan,
    queues: Vec<u16>,
    /// Guest memory in bytes: the balloon holds less than all of it.
    memory: u64,
    active: Option<Active>,
    held: bool,
    /// Pages the guest shall give up.
    target: u32,
    /// Pages it says it has given up.
    actual: u32,
    returned: u64,
}

impl Balloon {
    /// An empty balloon in a guest with so much memory.
    pub fn new(plan: BalloonPlan, memory: u64) -> Balloon {
        let mut queues = vec![QUEUE_SIZE; 2];
        if plan.free_page_reporting {
            queues.push(QUEUE_SIZE);
        }
        Balloon {
            plan,
            queues,
            memory,
            active: None,
            held: false,
            target: 0,
            actual: 0,
            returned: 0,
        }
    }

    fn serve(&mut self, index: u16) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let ram = active.ram.clone();
        let Some(ring) = active.rings.get_mut(usize::from(index)) else {
            return;
        };
        loop {
            while let Some(chain) = ring.pop(&ram, CHAIN_MAX) {
                if !chain.broken {
                    match take(index, &chain, &ram) {
                        Some(bytes) => self.returned = self.returned.saturating_add(bytes),
                        None => ring.fault(),
                    }
                }
                ring.push(&ram, &chain, 0);
            }
            ring.signal(&ram, active.interrupt.as_ref());
            if !ring.listen(&ram) {
                break;
            }
        }
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let [a, b, c, d] = self.target.to_le_bytes();
        let [e, f, g, h] = self.actual.to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }

    fn set_target(&mut self, bytes: u64) -> Result<(), String> {
        if bytes >= self.memory {
            return Err(format!(
                "the balloon cannot hold {bytes} bytes: the guest has {}",
                self.memory
            ));
        }
        self.target = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        if let Some(active) = &self.active {
            let interrupt: &dyn Interrupt = active.interrupt.as_ref();
            interrupt.config();
        }
        Ok(())
    }
}

/// What one request gives back, in bytes; nothing for one that makes no sense.
fn take(queue: u16, chain: &Chain<'_>, ram: &GuestRam) -> Option<u64> {
    match queue {
        INFLATE => {
            let runs = runs_of(&chain.readable)?;
            let mut bytes = 0;
            for (first, count) in runs {
                bytes += give_back(ram, u64::from(first) * PAGE, u64::from(count) * PAGE)?;
            }
            Some(bytes)
        }
        // The page is the guest's again by its first touch; there is nothing to do but to check what it says.
        DEFLATE => runs_of(&chain.readable).map(|_| 0),
        REPORT => pages::give_back_slices(ram, &chain.writable),
        _ => None,
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        let offered = |wanted: bool, bit: u32| u64::from(wanted) << bit;
        RING_FEATURES
            | offered(self.plan.deflate_on_oom, VIRTIO_BALLOON_F_DEFLATE_ON_OOM)
            | offered(self.plan.free_page_reporting, VIRTIO_BALLOON_F_REPORTING)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queues
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_from(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The guest says how much it has given up; only that, and only whole.
        if let (ACTUAL, Ok(bytes)) = (offset, data.try_into()) {
            self.actual = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&mut self, activation: Activation) {
        self.active = Some(Active::new(activation));
    }

    fn reset(&mut self) {
        self.active = None;
        self.actual = 0;
    }

    fn poll_fds(&self) -> Vec<(RawFd, u32)> {
        Vec::new()
    }

    fn queue_event(&mut self, index: u16) {
        self.serve(index);
    }

    fn fd_event(&mut self, _token: u32) {}

    fn queues(&self) -> Vec<Queue> {
        self.active.as_ref().map(Active::queues).unwrap_or_default()
    }

    fn save(&self) -> Vec<u8> {
        let state = State {
            target: self.target,
            actual: self.actual,
        };
        saved::encode(STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let State { target, actual } = saved::decode("balloon", STATE_VERSION, state)?;
        if u64::from(target) * PAGE >= self.memory {
            return Err(RestoreError {
                device: "balloon",
                reason: format!("{target} pages are not less than all there are"),
            });
        }
        (self.target, self.actual) = (target, actual);
        Ok(())
    }

    fn release(&mut self) -> io::Result<()> {
        self.held = false;
        Ok(())
    }

    fn acquire(&mut self) -> io::Result<()> {
        self.held = true;
        for index in 0..self.queues.len() {
            self.serve(u16::try_from(index).unwrap_or(u16::MAX));
        }
        Ok(())
    }

    fn faults(&self) -> u64 {
        self.active.as_ref().map_or(0, Active::faults)
    }

    fn change(&mut self, change: &DeviceChange) -> Result<(), String> {
        match change {
            DeviceChange::Balloon(bytes) => self.set_target(*bytes),
            other => Err(super::not_for("balloon", other)),
        }
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus {
            size: u64::from(self.target) * PAGE,
            held: u64::from(self.actual) * PAGE,
            returned: self.returned,
            ..DeviceStatus::default()
        }
    }
}

/// Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    target: u32,
    actual: u32,
}

// linux/virtio_balloon.h; the crate of constants lacks them
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;
const STATE_VERSION: u8 = 1;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Queues that are not offered have no number: there are neither statistics nor hints before this one.
const REPORT: u16 = 2;
const QUEUE_SIZE: u16 = 128;
/// Linux reports 32 ranges at once.
const CHAIN_MAX: usize = 64;
const CONFIG_LEN: usize = 8;
const ACTUAL: u64 = 4;

#[cfg(test)]
mod tests;
