//! State of a function and its device, saved and put back while nothing runs.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

use super::{VirtioPci, checked_queues};
use crate::devices::virtio::RestoreError;
use crate::vmm::pci::msix::MsixStateV1;

/// A function and its device, version 1.
#[derive(Debug, Serialize, Deserialize)]
pub struct VirtioStateV1 {
    device_type: u32,
    config: Vec<u8>,
    msix: MsixStateV1,
    status: u8,
    active: bool,
    driver_features: u64,
    selects: (u32, u32, u16),
    config_vector: u16,
    isr: u8,
    generation: u8,
    queues: Vec<QueueStateV1>,
    #[serde(with = "serde_bytes")]
    device: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
struct QueueStateV1 {
    vector: u16,
    max_size: u16,
    size: u16,
    ready: bool,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    desc: u64,
    avail: u64,
    used: u64,
}

/// Why a state cannot be put back.
#[derive(Debug, thiserror::Error)]
pub enum TransportStateError {
    /// The state is of another device, or impossible.
    #[error("state of virtio device type {device}: {what} does not match this machine")]
    Mismatch {
        /// Device type here.
        device: u32,
        /// What differs.
        what: &'static str,
    },
    /// The device model refused its part.
    #[error(transparent)]
    Device(#[from] RestoreError),
}

impl VirtioPci {
    /// Saves everything; the device thread and the vCPUs are stopped.
    pub fn save(&self) -> VirtioStateV1 {
        let inner = self.lock();
        let mut queues: Vec<QueueState> = inner
            .setups
            .iter()
            .map(|setup| setup.state(false))
            .collect();
        for (state, live) in queues.iter_mut().zip(inner.device.queues()) {
            *state = live.state();
        }
        let signals = &self.signals;
        VirtioStateV1 {
            device_type: inner.device.device_type(),
            config: self.config().save(),
            msix: self.msix.save(),
            status: inner.status,
            active: inner.active,
            driver_features: inner.driver_features,
            selects: (
                inner.device_feature_select,
                inner.driver_feature_select,
                inner.queue_select,
            ),
            config_vector: signals.config_vector.load(Ordering::SeqCst),
            isr: signals.isr.load(Ordering::SeqCst),
            generation: signals.generation.load(Ordering::SeqCst),
            queues: queues
                .iter()
                .zip(&signals.queue_vectors)
                .map(|(state, vector)| QueueStateV1::new(state, vector.load(Ordering::SeqCst)))
                .collect(),
            device: inner.device.save(),
        }
    }

    /// What is put back next was another guest's.
    pub fn expect_copy(&self) {
        self.lock().device.expect_copy();
    }

    /// Puts everything back into a function that nobody has used yet.
    pub fn restore(&self, saved: VirtioStateV1) -> Result<(), TransportStateError> {
        let mut inner = self.lock();
        let device = inner.device.device_type();
        let mismatch = |what| TransportStateError::Mismatch { device, what };
        if saved.device_type != device {
            return Err(mismatch("the type"));
        }
        if saved.queues.len() != inner.setups.len() {
            return Err(mismatch("the number of queues"));
        }
        if saved.active && saved.driver_features & !inner.offered != 0 {
            return Err(mismatch("a feature the driver uses"));
        }
        for (setup, queue) in inner.setups.iter_mut().zip(&saved.queues) {
            if queue.max_size != setup.max {
                return Err(mismatch("the size of a queue"));
            }
            (setup.size, setup.enabled) = (queue.size, queue.ready);
            (setup.desc, setup.avail, setup.used) = (queue.desc, queue.avail, queue.used);
        }
        let states: Vec<QueueState> = saved.queues.iter().map(QueueStateV1::state).collect();
        let queues = checked_queues(&states, &self.ram)
            .ok_or_else(|| mismatch("a queue's place in memory"))?;
        if !self.msix.restore(saved.msix) {
            return Err(mismatch("the number of interrupt vectors"));
        }
        {
            let mut config = self.config();
            config.restore(&saved.config);
            self.follow_bar(&config);
        }
        let signals = &self.signals;
        signals
            .config_vector
            .store(signals.accept(saved.config_vector), Ordering::SeqCst);
        for (slot, queue) in signals.queue_vectors.iter().zip(&saved.queues) {
            slot.store(signals.accept(queue.vector), Ordering::SeqCst);
        }
        signals.isr.store(saved.isr, Ordering::SeqCst);
        signals.generation.store(saved.generation, Ordering::SeqCst);
        inner.status = saved.status;
        inner.driver_features = saved.driver_features;
        (
            inner.device_feature_select,
            inner.driver_feature_select,
            inner.queue_select,
        ) = saved.selects;
        inner.device.restore(&saved.device)?;
        if saved.active {
            inner.start(queues, &self.ram, signals);
        }
        Ok(())
    }
}

impl QueueStateV1 {
    fn new(state: &QueueState, vector: u16) -> Self {
        Self {
            vector,
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            next_avail: state.next_avail,
            next_used: state.next_used,
            desc: state.desc_table,
            avail: state.avail_ring,
            used: state.used_ring,
        }
    }

    fn state(&self) -> QueueState {
        QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        }
    }
}
