//! The virtio disk (specification section 5.2): a raw or qcow2 image, one queue. Requests of a raw image are many under way
//! at once where the kernel gives an io_uring, and one at a time on the device thread where it does not.
//!
//! The guest writes every request; nothing in it is believed. Data moves straight between the image and guest memory,
//! so that no request makes this process allocate in proportion to its length.

mod image;
mod medium;
mod qcow2;
mod request;
mod uring;
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
use self::uring::Uring;
use self::written::Written;
use super::limit::Limiter;
use super::ring::{Active, RING_FEATURES, Ring};
use super::{Activation, GuestRam, RestoreError, VirtioDevice, saved};
use crate::machine::plan::DiskFormat;
use crate::machine::plan::devices::{DeviceChange, DeviceStatus, Limits};

/// A virtio disk on an image.
///
/// The disk serves nothing before [`VirtioDevice::acquire`] and after [`VirtioDevice::release`]: requests stay in the
/// queue and are served by whoever acquires the disk next, here or on another host.
pub struct Block {
    disk: Disk,
    uring: Option<Uring>,
    /// Why there is no ring although one was wanted.
    no_uring: Option<String>,
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
            ring_writes: false,
            written: Written::default(),
        };
        Ok(Block {
            disk,
            uring: None,
            no_uring: None,
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

    /// Has the requests of a raw image done by a ring of the kernel's, from now on. Before there is a filter. The
    /// descriptor is the one that the filter must let threads enter. Without a ring the disk is what it was.
    ///
    /// Without `writes`, these are done at once: they end in the page cache, and most file systems would have the ring hand
    /// each of them to a worker.
    ///
    /// # Errors
    ///
    /// If the image is not raw, or the kernel has no io_uring or gives this process none.
    pub fn use_uring(&mut self, writes: bool) -> io::Result<RawFd> {
        let made = match self.disk.image.raw_file() {
            Some(file) => Uring::new(file),
            None => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "only raw images are read and written by io_uring",
            )),
        };
        self.disk.ring_writes = writes;
        match made {
            Ok(uring) => Ok(self.uring.insert(uring).fd()),
            Err(error) => {
                self.no_uring = Some(error.to_string());
                Err(error)
            }
        }
    }

    fn serve(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let ram = active.ram.clone();
        let Some(ring) = active.rings.first_mut() else {
            return;
        };
        let interrupt = active.interrupt.as_ref();
        loop {
            while self.uring.as_ref().is_none_or(Uring::has_room) && self.limiter.admits() {
                let Some(chain) = ring.pop(&ram, CHAIN_MAX) else {
                    break;
                };
                self.limiter.charge(chain.data_len());
                if let Some(served) = self.disk.begin(&chain, self.uring.as_mut()) {
                    give_back(ring, &ram, chain.head(), &served);
                    if self.uring.is_none() {
                        ring.signal(&ram, interrupt);
                    }
                }
            }
            if let Some(uring) = &mut self.uring {
                uring.submit();
                while let Some((flight, result)) = uring.take_done() {
                    let served = self.disk.end(&flight, result, &ram);
                    give_back(ring, &ram, flight.head, &served);
                }
                ring.signal(&ram, interrupt);
            }
            let full = self.uring.as_ref().is_some_and(|uring| !uring.has_room());
            if full || self.limiter.poll_fd().is_some() || !ring.listen(&ram) {
                break;
            }
        }
    }

    /// Answers all that is under way.
    fn finish(&mut self) {
        let Some(uring) = self.uring.as_mut().filter(|uring| uring.is_busy()) else {
            return;
        };
        let Some(active) = self.active.as_mut() else {
            return;
        };
        let ram = active.ram.clone();
        let Some(ring) = active.rings.first_mut() else {
            return;
        };
        uring.finish_all(&mut |flight, result| {
            let served = self.disk.end(&flight, result, &ram);
            give_back(ring, &ram, flight.head, &served);
        });
        ring.signal(&ram, active.interrupt.as_ref());
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
        if let Some(uring) = &mut self.uring {
            uring.attach(activation.ram.clone());
        }
        self.active = Some(Active::new(activation));
    }

    fn reset(&mut self) {
        self.finish();
        self.active = None;
    }

    fn drain(&mut self) {
        self.finish();
    }

    fn poll_fds(&self) -> Vec<(RawFd, u32)> {
        let timer = self.limiter.poll_fd().map(|fd| (fd, TIMER));
        let uring = self.uring.as_ref().map(|uring| (uring.fd(), URING));
        timer.into_iter().chain(uring).collect()
    }

    fn queue_event(&mut self, _index: u16) {
        self.serve();
    }

    fn fd_event(&mut self, token: u32) {
        if token == TIMER {
            self.limiter.expired();
        }
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
        self.finish();
        self.held = false;
        if !self.disk.read_only {
            self.disk.image.flush()?;
        }
        self.disk.image.unlock()
    }

    fn hand_on(&mut self) -> io::Result<()> {
        self.finish();
        match (&mut self.disk.image, self.disk.read_only) {
            // Its tables are in this process; of a raw image the kernel has everything.
            (image @ Medium::Qcow2(_), false) => image.flush(),
            _ => Ok(()),
        }
    }

    fn take_up(&mut self) -> io::Result<()> {
        self.disk.image.lock(self.disk.read_only, &self.disk.name)
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

    fn service(&self) -> Option<String> {
        Some(match (&self.uring, &self.no_uring) {
            (Some(_), _) if self.disk.ring_writes => "io_uring".to_owned(),
            (Some(_), _) => "io_uring, writes by threads".to_owned(),
            (None, None) => "threads".to_owned(),
            (None, Some(why)) => format!("threads, for there is no io_uring: {why}"),
        })
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus {
            size: self.disk.image.sectors() * image::SECTOR,
            ..DeviceStatus::default()
        }
    }
}

fn give_back(ring: &mut Ring, ram: &GuestRam, head: u16, served: &Served) {
    if served.fault {
        ring.fault();
    }
    ring.push_head(ram, head, served.written);
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
/// Tokens of what is polled.
const TIMER: u32 = 0;
const URING: u32 = 1;

#[cfg(test)]
mod tests;
