//! Virtio devices: what the PCI transport needs of a device, and the devices.

pub mod balloon;
pub mod block;
pub mod console;
#[cfg(test)]
mod driver;
mod limit;
pub mod net;
mod ring;
pub mod rng;
mod saved;
pub mod transport;
pub mod vsock;

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

use crate::machine::plan::devices::{DeviceChange, DeviceStatus};

/// Guest memory with a bitmap of the pages that devices wrote (KVM's log sees only the vCPUs' writes).
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// How a device tells the guest: one MSI-X vector per queue, one for configuration changes.
pub trait Interrupt: Send + Sync {
    /// The queue has used buffers.
    fn queue(&self, index: u16);
    /// The configuration space changed.
    fn config(&self);
}

/// What a device is given when the driver sets DRIVER_OK (or when its state is restored).
pub struct Activation {
    /// Guest memory.
    pub ram: GuestRam,
    /// The queues the driver has set up; ready ones only are used.
    pub queues: Vec<Queue>,
    /// Interrupts.
    pub interrupt: Arc<dyn Interrupt>,
    /// Features both sides agreed on.
    pub features: u64,
}

/// A virtio device behind the PCI transport. All calls come from the device thread or, while it is
/// stopped, from the control thread; never two at once (the transport holds the lock).
pub trait VirtioDevice: Send {
    /// Virtio device id (specification section 5).
    fn device_type(&self) -> u32;
    /// Features offered, without `VIRTIO_F_VERSION_1`, which the transport adds.
    fn features(&self) -> u64;
    /// Maximum size of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// Reads the device configuration; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device configuration; most devices ignore it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready.
    fn activate(&mut self, activation: Activation);
    /// Back to the state before [`VirtioDevice::activate`].
    fn reset(&mut self);
    /// Descriptors the device thread polls for input on the device's behalf (tap, listening socket, …), with a token of the device's choice.
    fn poll_fds(&self) -> Vec<(RawFd, u32)>;
    /// The driver notified queue `index`.
    fn queue_event(&mut self, index: u16);
    /// A descriptor of [`VirtioDevice::poll_fds`] is readable. The transport asks for `poll_fds` again after each event.
    fn fd_event(&mut self, token: u32);
    /// The queues as they are now, to be saved; empty when not activated.
    fn queues(&self) -> Vec<Queue>;
    /// Device state beyond the queues (versioned by the device); called while the device thread is stopped and all
    /// requests in flight are complete.
    fn save(&self) -> Vec<u8>;
    /// What is restored next was another guest's: an address in it is not this device's. Most devices have none.
    fn expect_copy(&mut self) {}
    /// Restores what [`VirtioDevice::save`] gave; called before [`VirtioDevice::activate`].
    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError>;
    /// Waits for requests that are under way and answers them; the machine has been paused. Most devices never have any.
    fn drain(&mut self) {}
    /// The guest is about to leave: flush, give up locks.
    fn release(&mut self) -> std::io::Result<()>;
    /// The guest is about to run here: take locks. Fails if somebody else holds them.
    fn acquire(&mut self) -> std::io::Result<()>;
    /// The guest stands still, and another process is about to go on with the same descriptors: what only this one knows
    /// of the medium is written there. Locks stay as they are: they are the descriptors'. Most devices know nothing.
    fn hand_on(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    /// The other side of [`VirtioDevice::hand_on`]: whatever of [`VirtioDevice::acquire`] could fail, with no request
    /// served: until the guest runs, the other process can go on instead.
    fn take_up(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    /// The guest stays with this process after all: another one may have set what the descriptors share.
    fn kept(&mut self) {}
    /// The guest has just arrived by a move and runs: announce addresses, tell the driver that connections were reset.
    /// Called up to five times, with growing intervals. Most devices have nothing to say.
    fn announce(&mut self) {}
    /// Disk: notes from now on which blocks of 4 KiB are written; a bit for each block that holds anything now.
    fn track_writes(&mut self) -> std::io::Result<Vec<u64>> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    /// Disk: a bit for each block written since the last call; `None` if nobody keeps track.
    fn take_written(&mut self) -> Option<Vec<u64>> {
        None
    }
    /// Notes no writes any more.
    fn forget_writes(&mut self) {}
    /// How often the guest broke the rules of a queue since it was activated.
    fn faults(&self) -> u64;
    /// Changes what may change while the guest runs. The transport looks at the device's queues afterwards. Refused
    /// unless the device says otherwise; the text is for people.
    fn change(&mut self, change: &DeviceChange) -> Result<(), String> {
        Err(not_for("device", change))
    }
    /// Disk: who does its requests, and why not somebody else.
    fn service(&self) -> Option<String> {
        None
    }
    /// What the device says of itself; all zero if it has nothing to say.
    fn status(&self) -> DeviceStatus {
        DeviceStatus::default()
    }
}

fn not_for(device: &str, change: &DeviceChange) -> String {
    format!("a {device} has nothing to change by {change:?}")
}

/// A device state that is not what this version writes.
#[derive(Debug, thiserror::Error)]
#[error("state of virtio device {device}: {reason}")]
pub struct RestoreError {
    /// Which device.
    pub device: &'static str,
    /// What is wrong.
    pub reason: String,
}

/// Reads from a configuration space; bytes beyond its end are zero.
fn read_config_from(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
}
