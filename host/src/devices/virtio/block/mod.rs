//! The virtio disk (specification section 5.2): a raw or qcow2 image, one queue, one request at a time on the device thread.
//!
//! The guest writes every request; nothing in it is believed. Data moves straight between the image and guest memory,
//! so that no request makes this process allocate in proportion to its length.

mod image;
mod medium;
mod qcow2;
mod request;
mod written;

use std::fs::File;
use std::io;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::Queue;

use self::medium::Medium;
use self::request::{Disk, Served};
use self::written::Written;
use super::limit::Limiter;
use super::ring::{Active, RING_FEATURES};
use super::{Activation, RestoreError, VirtioDevice, saved};
use crate::machine::plan::DiskFormat;
use crate::machine::plan::devices::{DeviceChange, DeviceStatus, Limits};

/// A virtio disk on an image.
///
/// The disk serves nothing before [`VirtioDevice::acquire`] and after [`VirtioDevice::release`]: requests stay in the
/// queue and are served by whoever acquires the disk next, here or on another host.
pub struct Block {
    disk: Disk,
    limiter: Limiter,
    active: Option<Active>,
    held: bool,
}

impl Block {
    /// A disk on the raw image `file`, which is open for writing unless `read_only`. A last, incomplete sector is not part
    /// of it.
    ///
    /// `id` is what the guest sees as the serial number (its first 20 bytes).
    ///
    /// # Errors
    ///
    /// If the size of the image cannot be found.
    pub fn new(file: File, id: &str, read_only: bool) -> io::Result<Block> {
        Block::open(file, DiskFormat::Raw, id, read_only)
    }

    /// The same on an image of any format.
    ///
    /// # Errors
    ///
    /// If the image is not of that format, or of a kind of it that is not supported; the error says which.
    pub fn open(file: File, format: DiskFormat, id: &str, read_only: bool) -> io::Result<Block> {
        let image = Medium::open(file, format, read_only)?;
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        serial
            .iter_mut()
            .zip(id.bytes())
            .for_each(|(to, from)| *to = from);
        let disk = Disk {
            image,
            name: id.to_owned(),
            serial,
            read_only,
            write_through: false,
            written: Written::default(),
        };
        Ok(Block {
            disk,
            limiter: Limiter::new(Limits::default())?,
            active: None,
            held: false,
        })
    }

    /// How much it may read and write; to be said before the guest runs.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Block {
        self.limiter.set(limits);
        self
    }

    /// Looks how large the image is now, and tells the guest if that has changed.
    fn resize(&mut self) -> Result<(), String> {
        let before = self.disk.image.sectors();
        let look = self.disk.image.look_at_size();
        look.map_err(|e| format!("disk `{}`: its size cannot be found: {e}", self.disk.name))?;
        if self.disk.image.sectors() != before
            && let Some(active) = &self.active
        {
            active.interrupt.config();
        }
        Ok(())
    }

    fn serve(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let ram = active.ram.clone();
        let Some(ring) = active.rings.first_mut() else {
            return;
        };
        loop {
            while self.limiter.admits() {
                let Some(chain) = ring.pop(&ram, CHAIN_MAX) else {
                    break;
                };
                self.limiter.charge(chain.data_len());
                let Served { written, fault } = self.disk.serve(&chain);
                if fault {
                    ring.fault();
                }
                ring.push(&ram, &chain, written);
                ring.signal(&ram, active.interrupt.as_ref());
            }
            if self.limiter.poll_fd().is_some() || !ring.listen(&ram) {
                break;
            }
        }
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let sectors_max = self.disk.image.clear_max();
        let mut config = [0; CONFIG_LEN];
        let mut set = |offset: usize, bytes: &[u8]| {
            config
                .iter_mut()
                .skip(offset)
                .zip(bytes)
                .for_each(|(to, from)| *to = *from);
        };
        set(0, &self.disk.image.sectors().to_le_bytes());
        set(8, &SIZE_MAX.to_le_bytes());
        set(12, &SEG_MAX.to_le_bytes());
        set(20, &(image::SECTOR as u32).to_le_bytes());
        set(36, &sectors_max.to_le_bytes()); // max_discard_sectors
        set(40, &1u32.to_le_bytes()); // max_discard_seg
        set(44, &8u32.to_le_bytes()); // discard_sector_alignment: a page of the image's file system
        set(48, &sectors_max.to_le_bytes()); // max_write_zeroes_sectors
        set(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
        set(56, &[1]); // write_zeroes_may_unmap
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let always = RING_FEATURES
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        match self.disk.read_only {
            true => always | 1 << VIRTIO_BLK_F_RO,
            false => always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_from(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        // A driver that cannot flush expects that what is written is on the disk (specification 5.2.6.2).
        self.disk.write_through = activation.features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        self.active = Some(Active::new(activation));
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn poll_fds(&self) -> Vec<(RawFd, u32)> {
        let timer = self.limiter.poll_fd();
        timer.map(|fd| (fd, 0)).into_iter().collect()
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

    fn save(&self) -> Vec<u8> {
        saved::encode(
            STATE_VERSION,
            &State {
                sectors: self.disk.image.sectors(),
                read_only: self.disk.read_only,
            },
        )
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let found: State = saved::decode("block", STATE_VERSION, state)?;
        let here = State {
            sectors: self.disk.image.sectors(),
            read_only: self.disk.read_only,
        };
        if found != here {
            let reason = format!(
                "the guest's disk `{}` is {found:?}, the one here is {here:?}; give this host the same image",
                self.disk.name
            );
            return Err(RestoreError {
                device: "block",
                reason,
            });
        }
        Ok(())
    }

    fn release(&mut self) -> io::Result<()> {
        self.held = false;
        if !self.disk.read_only {
            self.disk.image.flush()?;
        }
        self.disk.image.unlock()
    }

    fn acquire(&mut self) -> io::Result<()> {
        self.disk.image.lock(self.disk.read_only, &self.disk.name)?;
        self.held = true;
        self.serve();
        Ok(())
    }

    fn track_writes(&mut self) -> io::Result<Vec<u64>> {
        self.disk
            .written
            .start(self.disk.image.sectors() * image::SECTOR);
        self.disk.image.allocated()
    }

    fn take_written(&mut self) -> Option<Vec<u64>> {
        self.disk.written.take()
    }

    fn forget_writes(&mut self) {
        self.disk.written.stop();
    }

    fn faults(&self) -> u64 {
        self.active.as_ref().map_or(0, Active::faults)
    }

    fn change(&mut self, change: &DeviceChange) -> Result<(), String> {
        match change {
            DeviceChange::Limits(limits) if limits.are_usable() => {
                self.limiter.set(*limits);
                Ok(())
            }
            DeviceChange::Resized => self.resize(),
            other => Err(super::not_for("disk", other)),
        }
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus {
            size: self.disk.image.sectors() * image::SECTOR,
            ..DeviceStatus::default()
        }
    }
}

/// What must be the same at both ends of a move. Version 1.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    sectors: u64,
    read_only: bool,
}

const STATE_VERSION: u8 = 1;
const QUEUE_SIZES: [u16; 1] = [256];
/// Data buffers in a request, and the length of each. Their product bounds a request at 63 MiB.
const SEG_MAX: u32 = 126;
const SIZE_MAX: u32 = 512 << 10;
/// A request: header, data, status.
const CHAIN_MAX: usize = SEG_MAX as usize + 2;
const CONFIG_LEN: usize = 60;

#[cfg(test)]
mod tests;
