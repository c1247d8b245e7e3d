//! A small guest driver for the tests of the devices: queues in real guest memory, no device model of its own.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Activation, GuestRam, Interrupt};

/// A guest with `count` queues.
pub(super) struct Driver {
    pub(super) ram: GuestRam,
    pub(super) interrupts: Arc<Interrupts>,
    rings: RefCell<Vec<Progress>>,
    size: u16,
}

#[derive(Clone, Default)]
struct Progress {
    next_descriptor: u16,
    avail: u16,
    used: u16,
}

/// Counts interrupts.
#[derive(Default)]
pub(super) struct Interrupts {
    queues: Mutex<Vec<u16>>,
    config: AtomicU32,
}

impl Interrupt for Interrupts {
    fn queue(&self, index: u16) {
        self.queues.lock().expect("no panics").push(index);
    }
    fn config(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }
}

impl Interrupts {
    /// How often the configuration changed.
    pub(super) fn config_changes(&self) -> u32 {
        self.config.load(Ordering::Relaxed)
    }

    /// Which queues have interrupted since the last call.
    pub(super) fn take(&self) -> Vec<u16> {
        std::mem::take(&mut *self.queues.lock().expect("no panics"))
    }
}

/// One descriptor to be written.
#[derive(Clone, Debug)]
pub(super) struct Buffer {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
    content: Vec<u8>,
}

impl Buffer {
    /// Written by the driver.
    pub(super) fn read(addr: u64, content: &[u8]) -> Buffer {
        Buffer {
            addr,
            len: content.len() as u32,
            flags: 0,
            next: 0,
            content: content.to_vec(),
        }
    }
    /// To be written by the device.
    pub(super) fn write(addr: u64, len: u32) -> Buffer {
        Buffer {
            addr,
            len,
            flags: WRITE,
            next: 0,
            content: vec![],
        }
    }
    /// A descriptor with any fields.
    pub(super) fn raw(addr: u64, len: u32, flags: u16, next: u16) -> Buffer {
        Buffer {
            addr,
            len,
            flags,
            next,
            content: vec![],
        }
    }
}

impl Driver {
    /// Bytes of guest memory.
    pub(super) const RAM: u64 = 0x40_0000;

    pub(super) fn new(count: usize) -> Driver {
        Driver::with_size(count, 64)
    }

    pub(super) fn with_size(count: usize, size: u16) -> Driver {
        let ram =
            GuestRam::from_ranges(&[(GuestAddress(0), Driver::RAM as usize)]).expect("memory");
        Driver {
            ram,
            interrupts: Arc::default(),
            rings: RefCell::new(vec![Progress::default(); count]),
            size,
        }
    }

    /// What the transport would give the device.
    pub(super) fn activation(&self, features: u64) -> Activation {
        let queues = (0..self.rings.borrow().len())
            .map(|index| self.queue(index))
            .collect();
        Activation {
            ram: self.ram.clone(),
            queues,
            interrupt: self.interrupts.clone(),
            features,
        }
    }

    pub(super) fn queue(&self, index: usize) -> Queue {
        let mut queue = Queue::new(self.size).expect("a power of two");
        queue.set_desc_table_address(Some(table(index) as u32), Some(0));
        queue.set_avail_ring_address(Some(avail(index) as u32), Some(0));
        queue.set_used_ring_address(Some(used(index) as u32), Some(0));
        queue.set_ready(true);
        queue
    }

    /// Makes one chain of these buffers available.
    pub(super) fn offer(&self, queue: usize, buffers: &[Buffer]) -> u16 {
        let first = self.rings.borrow()[queue].next_descriptor;
        let mut chain = buffers.to_vec();
        let last = chain.len() - 1;
        for (position, buffer) in chain.iter_mut().enumerate().take(last) {
            buffer.flags |= NEXT;
            buffer.next = (first + position as u16 + 1) % self.size;
        }
        self.offer_as_is(queue, &chain)
    }

    /// Makes the chain that starts at the first of these descriptors available; flags and links are the caller's.
    pub(super) fn offer_as_is(&self, queue: usize, buffers: &[Buffer]) -> u16 {
        let progress = &mut self.rings.borrow_mut()[queue];
        let head = progress.next_descriptor;
        for buffer in buffers {
            let mut bytes = buffer.addr.to_le_bytes().to_vec();
            bytes.extend(buffer.len.to_le_bytes());
            bytes.extend(buffer.flags.to_le_bytes());
            bytes.extend(buffer.next.to_le_bytes());
            self.put(
                table(queue) + 16 * u64::from(progress.next_descriptor),
                &bytes,
            );
            if !buffer.content.is_empty() {
                self.put(buffer.addr, &buffer.content);
            }
            progress.next_descriptor = (progress.next_descriptor + 1) % self.size;
        }
        self.put(
            avail(queue) + 4 + 2 * u64::from(progress.avail % self.size),
            &head.to_le_bytes(),
        );
        progress.avail = progress.avail.wrapping_add(1);
        self.put(avail(queue) + 2, &progress.avail.to_le_bytes());
        head
    }

    /// Takes the next used chain: head and bytes written.
    pub(super) fn used(&self, queue: usize) -> Option<(u16, u32)> {
        let progress = &mut self.rings.borrow_mut()[queue];
        let index = u16::from_le_bytes(
            self.bytes(used(queue) + 2, 2)
                .try_into()
                .expect("two bytes"),
        );
        if index == progress.used {
            return None;
        }
        let element = self.bytes(
            used(queue) + 4 + 8 * u64::from(progress.used % self.size),
            8,
        );
        progress.used = progress.used.wrapping_add(1);
        // For EVENT_IDX: interrupt again when the next one is used.
        self.put(
            avail(queue) + 4 + 2 * u64::from(self.size),
            &progress.used.to_le_bytes(),
        );
        let (head, len) = element.split_at(4);
        Some((
            u32::from_le_bytes(head.try_into().expect("four")) as u16,
            u32::from_le_bytes(len.try_into().expect("four")),
        ))
    }

    pub(super) fn set_avail_index(&self, queue: usize, index: u16) {
        self.put(avail(queue) + 2, &index.to_le_bytes());
    }

    pub(super) fn put(&self, addr: u64, bytes: &[u8]) {
        self.ram
            .write_slice(bytes, GuestAddress(addr))
            .expect("in guest memory");
    }

    pub(super) fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram
            .read_slice(&mut bytes, GuestAddress(addr))
            .expect("in guest memory");
        bytes
    }

    pub(super) fn clear_dirty(&self) {
        self.ram
            .iter()
            .for_each(|region| (**region).bitmap().reset());
    }

    /// Addresses of the pages the device has written since [`Driver::clear_dirty`].
    pub(super) fn dirty(&self) -> Vec<u64> {
        let region = self.ram.iter().next().expect("one region");
        (0..Driver::RAM)
            .step_by(4096)
            .filter(|page| region.bitmap().dirty_at(*page as usize))
            .collect()
    }
}

/// Where the rings of a queue are: each on a page of its own.
pub(super) fn table(queue: usize) -> u64 {
    0x30_0000 + 0x4000 * queue as u64
}
pub(super) fn avail(queue: usize) -> u64 {
    table(queue) + 0x1000
}
pub(super) fn used(queue: usize) -> u64 {
    table(queue) + 0x2000
}

/// Descriptor flags.
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
