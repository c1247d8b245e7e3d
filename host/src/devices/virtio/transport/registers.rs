//! The register blocks in BAR 0 and the capabilities that point to them.

use std::sync::atomic::Ordering;

use super::{Inner, Signals, VirtioPci};
use crate::vmm::pci::config::ConfigSpace;

impl VirtioPci {
    /// Reads BAR 0.
    pub fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match offset {
            COMMON..COMMON_END => self.read_common(offset - COMMON, data),
            ISR => {
                let isr = self.signals.isr.swap(0, Ordering::SeqCst);
                if let Some(byte) = data.first_mut() {
                    *byte = isr;
                }
            }
            DEVICE..DEVICE_END => {
                data.fill(0);
                self.lock().device.read_config(offset - DEVICE, data);
            }
            TABLE..TABLE_END => self.msix.read_table((offset - TABLE) as usize, data),
            PENDING..PENDING_END => self.msix.read_pending((offset - PENDING) as usize, data),
            _ => {}
        }
    }

    /// Writes BAR 0.
    pub fn bar_write(&self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..COMMON_END => self.write_common(offset - COMMON, data),
            DEVICE..DEVICE_END => self.lock().device.write_config(offset - DEVICE, data),
            // Reached only where KVM does not take the notification itself.
            NOTIFY..NOTIFY_END => {
                let index = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                if let Some(kick) = self.kicks.get(index as usize) {
                    let _ = kick.write(1);
                }
            }
            TABLE..TABLE_END => self.msix.write_table((offset - TABLE) as usize, data),
            _ => {}
        }
    }

    /// Offset in the BAR of an access through the configuration window (section 4.1.4.9), if it is one.
    pub(super) fn window_access(&self, offset: usize, length: usize) -> Option<u64> {
        if offset != self.window + WINDOW_DATA || !matches!(length, 1 | 2 | 4) {
            return None;
        }
        let mut target = [0u8; 8];
        self.config().read(self.window + WINDOW_OFFSET, &mut target);
        let [a, b, c, d, rest @ ..] = target;
        (u32::from_le_bytes(rest) as usize == length)
            .then(|| u64::from(u32::from_le_bytes([a, b, c, d])))
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        let value = common_value(&inner, &self.signals, offset);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0u8; 8];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u64::from_le_bytes(bytes);
        let mut inner = self.lock();
        if set_common(&mut inner, &self.signals, offset, value, data.len()) {
            // The counter cannot overflow by one write.
            let _ = self.wake.write(1);
        }
    }
}

/// Appends all capabilities; returns the offsets of the window capability and of MSI-X's control word.
pub(super) fn add_capabilities(
    config: &mut ConfigSpace,
    vectors: u16,
    queues: usize,
) -> Option<(usize, usize)> {
    let notify_length = queues as u32 * NOTIFY_MULTIPLIER;
    add(config, 1, COMMON, (COMMON_END - COMMON) as u32, &[])?;
    add(
        config,
        2,
        NOTIFY,
        notify_length,
        &NOTIFY_MULTIPLIER.to_le_bytes(),
    )?;
    add(config, 3, ISR, 1, &[])?;
    add(config, 4, DEVICE, (DEVICE_END - DEVICE) as u32, &[])?;
    let window = add(config, 5, 0, 0, &[0; 4])?;
    let mut msix = Vec::with_capacity(10);
    msix.extend_from_slice(&vectors.saturating_sub(1).to_le_bytes());
    msix.extend_from_slice(&(TABLE as u32).to_le_bytes());
    msix.extend_from_slice(&(PENDING as u32).to_le_bytes());
    let table = config.add_capability(CAP_MSIX, &msix, &[])?;
    Some((window, table + 2))
}

/// One vendor capability of kind `kind`; of the window the guest may write all that points.
fn add(
    config: &mut ConfigSpace,
    kind: u8,
    offset: u64,
    length: u32,
    extra: &[u8],
) -> Option<usize> {
    let size = 16 + extra.len() as u8;
    let mut body = vec![size, kind, 0, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&length.to_le_bytes());
    body.extend_from_slice(extra);
    let mut writable = vec![0u8; body.len()];
    if kind == KIND_WINDOW {
        writable.iter_mut().skip(2).for_each(|mask| *mask = 0xff);
    }
    config.add_capability(CAP_VENDOR, &body, &writable)
}

fn common_value(inner: &Inner, signals: &Signals, offset: u64) -> u64 {
    let queue = inner.setups.get(usize::from(inner.queue_select));
    let half = |features: u64, select: u32| match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    };
    match offset {
        0x00 => u64::from(inner.device_feature_select),
        0x04 => half(inner.offered, inner.device_feature_select),
        0x08 => u64::from(inner.driver_feature_select),
        0x0c => half(inner.driver_features, inner.driver_feature_select),
        0x10 => u64::from(signals.config_vector.load(Ordering::SeqCst)),
        0x12 => inner.setups.len() as u64,
        0x14 => u64::from(inner.status),
        0x15 => u64::from(signals.generation.load(Ordering::SeqCst)),
        0x16 => u64::from(inner.queue_select),
        0x18 => queue.map_or(0, |q| u64::from(q.size)),
        0x1a => signals
            .queue_vectors
            .get(usize::from(inner.queue_select))
            .map_or(u64::from(super::NO_VECTOR), |v| {
                u64::from(v.load(Ordering::SeqCst))
            }),
        0x1c => queue.map_or(0, |q| u64::from(q.enabled)),
        0x1e => u64::from(inner.queue_select),
        0x20 => queue.map_or(0, |q| q.desc),
        0x24 => queue.map_or(0, |q| q.desc >> 32),
        0x28 => queue.map_or(0, |q| q.avail),
        0x2c => queue.map_or(0, |q| q.avail >> 32),
        0x30 => queue.map_or(0, |q| q.used),
        0x34 => queue.map_or(0, |q| q.used >> 32),
        _ => u64::MAX,
    }
}

/// Sets a common register; true if the device thread has work.
fn set_common(
    inner: &mut Inner,
    signals: &Signals,
    offset: u64,
    value: u64,
    length: usize,
) -> bool {
    let low = (value & 0xffff_ffff) as u32;
    let short = (value & 0xffff) as u16;
    match offset {
        0x00 => inner.device_feature_select = low,
        0x08 => inner.driver_feature_select = low,
        0x0c if inner.status & super::FEATURES_OK == 0 => set_features(inner, low),
        0x10 => signals
            .config_vector
            .store(signals.accept(short), Ordering::SeqCst),
        0x14 => return inner.set_status((value & 0xff) as u8, signals),
        0x16 => inner.queue_select = short,
        0x1a => {
            if let Some(vector) = signals.queue_vectors.get(usize::from(inner.queue_select)) {
                vector.store(signals.accept(short), Ordering::SeqCst);
            }
        }
        // A queue is set up before the driver runs, and enabled once.
        0x18 | 0x1c | 0x20..=0x34 if inner.status & super::DRIVER_OK == 0 => {
            set_queue(inner, offset, value, length);
        }
        _ => {}
    }
    false
}

fn set_features(inner: &mut Inner, word: u32) {
    let keep = inner.driver_features;
    match inner.driver_feature_select {
        0 => inner.driver_features = (keep & !0xffff_ffff) | u64::from(word),
        1 => inner.driver_features = (keep & 0xffff_ffff) | (u64::from(word) << 32),
        _ => {}
    }
}

fn set_queue(inner: &mut Inner, offset: u64, value: u64, length: usize) {
    let Some(queue) = inner.selected() else {
        return;
    };
    if queue.enabled {
        return;
    }
    match offset {
        0x18 => {
            let size = (value & 0xffff) as u16;
            if size.is_power_of_two() && size <= queue.max {
                queue.size = size;
            }
        }
        0x1c => queue.enabled = value & 0xffff == 1,
        0x20 => set_address(&mut queue.desc, value, length, false),
        0x24 => set_address(&mut queue.desc, value, length, true),
        0x28 => set_address(&mut queue.avail, value, length, false),
        0x2c => set_address(&mut queue.avail, value, length, true),
        0x30 => set_address(&mut queue.used, value, length, false),
        0x34 => set_address(&mut queue.used, value, length, true),
        _ => {}
    }
}

fn set_address(address: &mut u64, value: u64, length: usize, high: bool) {
    let low_word = value & 0xffff_ffff;
    match (length, high) {
        (8, false) => *address = value,
        (4, false) => *address = (*address & !0xffff_ffff) | low_word,
        (4, true) => *address = (*address & 0xffff_ffff) | (low_word << 32),
        _ => {}
    }
}

/// Size of the BAR.
pub(super) const BAR_SIZE: u32 = crate::vmm::layout::VIRTIO_BAR_SIZE as u32;
/// Notification addresses, one for each queue.
pub(super) const NOTIFY: u64 = 0x3000;
/// Bytes between them.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
const NOTIFY_END: u64 = 0x4000;
const COMMON: u64 = 0x0000;
const COMMON_END: u64 = 0x38;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DEVICE_END: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const TABLE_END: u64 = 0x5000;
const PENDING: u64 = 0x5000;
const PENDING_END: u64 = 0x6000;
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const KIND_WINDOW: u8 = 5;
// within the window capability
const WINDOW_OFFSET: usize = 8;
const WINDOW_DATA: usize = 16;
