//! One virtqueue as a device uses it: buffers out, buffers back, an interrupt when the driver wants one.
//!
//! The rings and every descriptor are the guest's own writing. A chain is taken apart once, into slices that are
//! checked to lie in guest memory; what breaks the rules is a *fault*, counted and never fatal.

use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{Bytes, GuestMemory, Permissions, VolatileSlice};

use super::{Activation, GuestRam, Interrupt};

/// A piece of guest memory whose writes are marked in the dirty bitmap.
pub(super) type Slice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// What a device holds from activation to reset.
pub(super) struct Active {
    /// Guest memory.
    pub(super) ram: GuestRam,
    /// The queues in the order of the specification.
    pub(super) rings: Vec<Ring>,
    /// Interrupts.
    pub(super) interrupt: Arc<dyn Interrupt>,
}

impl Active {
    /// Takes the queues over as they are; a queue whose rings are not in guest memory is never used.
    pub(super) fn new(activation: Activation) -> Active {
        let Activation {
            ram,
            queues,
            interrupt,
            features,
        } = activation;
        let event_idx = features & EVENT_IDX != 0;
        let rings = queues
            .into_iter()
            .zip(0..)
            .map(|(queue, index)| Ring::new(queue, index, event_idx, &ram));
        Active {
            rings: rings.collect(),
            ram,
            interrupt,
        }
    }

    /// Copies of the queues, to be saved.
    pub(super) fn queues(&self) -> Vec<Queue> {
        self.rings
            .iter()
            .map(|ring| Queue::try_from(ring.queue.state()).unwrap_or_default())
            .collect()
    }

    /// Faults in all queues since activation.
    pub(super) fn faults(&self) -> u64 {
        self.rings.iter().map(|ring| ring.faults).sum()
    }
}

/// One queue.
pub(super) struct Ring {
    queue: Queue,
    index: u16,
    usable: bool,
    unsignalled: bool,
    faults: u64,
}

impl Ring {
    fn new(mut queue: Queue, index: u16, event_idx: bool, ram: &GuestRam) -> Ring {
        queue.set_event_idx(event_idx);
        let valid = queue.ready() && queue.is_valid(ram);
        let faults = u64::from(queue.ready() && !valid);
        Ring {
            usable: valid,
            queue,
            index,
            unsignalled: false,
            faults,
        }
    }

    /// The next chain the driver has made available, of at most `limit` descriptors.
    pub(super) fn pop<'a>(&mut self, ram: &'a GuestRam, limit: usize) -> Option<Chain<'a>> {
        if !self.usable {
            return None;
        }
        let descriptors = match self.queue.iter(ram) {
            Ok(mut available) => available.next()?,
            // The driver claims more buffers than the queue has. Nothing on this queue can be trusted any more.
            Err(_) => {
                self.usable = false;
                self.faults += 1;
                return None;
            }
        };
        let chain = Chain::parse(descriptors, ram, limit);
        self.faults += u64::from(chain.broken);
        Some(chain)
    }

    /// Puts the chain that was taken last back, untouched.
    pub(super) fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back, with `written` bytes written to it.
    pub(super) fn push(&mut self, ram: &GuestRam, chain: &Chain<'_>, written: u32) {
        self.push_head(ram, chain.head, written);
    }

    /// The same of a chain that was taken earlier, by its head.
    pub(super) fn push_head(&mut self, ram: &GuestRam, head: u16, written: u32) {
        match self.queue.add_used(ram, head, written) {
            Ok(()) => self.unsignalled = true,
            Err(_) => self.faults += 1,
        }
    }

    /// Tells the driver about the chains given back since the last call, if it wants to know.
    pub(super) fn signal(&mut self, ram: &GuestRam, interrupt: &dyn Interrupt) {
        if std::mem::take(&mut self.unsignalled)
            && self.queue.needs_notification(ram).unwrap_or(true)
        {
            interrupt.queue(self.index);
        }
    }

    /// Asks the driver to notify us of the next chain; true if one came meanwhile.
    pub(super) fn listen(&mut self, ram: &GuestRam) -> bool {
        self.usable && self.queue.enable_notification(ram).unwrap_or(false)
    }

    /// Counts a request that breaks the rules of the device rather than those of the queue.
    pub(super) fn fault(&mut self) {
        self.faults += 1;
    }
}

/// One request: what the driver wants read, and where it wants answers.
pub(super) struct Chain<'a> {
    head: u16,
    /// Written by the driver, read by the device.
    pub(super) readable: Segments<'a>,
    /// Written by the device.
    pub(super) writable: Segments<'a>,
    /// The last writable byte, if it exists: where a block device answers even a broken request.
    pub(super) tail: Option<Slice<'a>>,
    /// The chain loops, is too long, points outside guest memory, or has readable buffers behind writable ones.
    pub(super) broken: bool,
}

impl<'a> Chain<'a> {
    fn parse(
        descriptors: DescriptorChain<&'a GuestRam>,
        ram: &'a GuestRam,
        limit: usize,
    ) -> Chain<'a> {
        let head = descriptors.head_index();
        let mut chain = Chain {
            head,
            readable: Segments(vec![]),
            writable: Segments(vec![]),
            tail: None,
            broken: false,
        };
        // A chain that ends although its last descriptor names a successor was cut off: a loop, a bad index, or bad memory.
        let mut unfinished = true;
        for (count, descriptor) in descriptors.enumerate() {
            unfinished = descriptor.has_next();
            if count >= limit {
                unfinished = true;
                break;
            }
            chain.add(descriptor, ram);
        }
        if unfinished {
            chain.broken = true;
            chain.tail = None;
        }
        chain
    }

    /// By which it is given back.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Bytes in both directions, as the driver claims.
    pub(super) fn data_len(&self) -> u64 {
        (self.readable.len() as u64).saturating_add(self.writable.len() as u64)
    }

    fn add(&mut self, descriptor: Descriptor, ram: &'a GuestRam) {
        let (segments, access) = if descriptor.is_write_only() {
            (&mut self.writable, Permissions::Write)
        } else {
            self.broken |= !self.writable.0.is_empty();
            (&mut self.readable, Permissions::Read)
        };
        let count = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let mapped = ram
            .get_slices(descriptor.addr(), count, access)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>);
        match mapped {
            Ok(slices) => segments.0.extend(slices),
            Err(_) => {
                self.broken = true;
                self.tail = None;
                return;
            }
        }
        self.tail = match segments.0.last() {
            Some(last) if descriptor.is_write_only() && count > 0 => {
                last.offset(last.len().saturating_sub(1)).ok()
            }
            _ => None,
        };
    }
}

/// A run of bytes scattered over guest memory.
#[derive(Clone)]
pub(super) struct Segments<'a>(Vec<Slice<'a>>);

impl<'a> Segments<'a> {
    /// Bytes in all.
    pub(super) fn len(&self) -> usize {
        self.0.iter().map(VolatileSlice::len).sum()
    }

    /// The slices, in order.
    pub(super) fn slices(&self) -> &[Slice<'a>] {
        &self.0
    }

    /// The `count` bytes from `offset` on, or nothing if there are not that many.
    pub(super) fn range(&self, offset: usize, count: usize) -> Option<Segments<'a>> {
        let (mut skip, mut want) = (offset, count);
        let mut slices = Vec::new();
        for slice in &self.0 {
            if want == 0 {
                break;
            }
            let from = skip.min(slice.len());
            let take = want.min(slice.len() - from);
            if take > 0 {
                slices.push(slice.subslice(from, take).ok()?);
            }
            skip -= from;
            want -= take;
        }
        (want == 0).then_some(Segments(slices))
    }

    /// Copies bytes from `offset` on into `buffer`; how many there were.
    pub(super) fn read_at(&self, offset: usize, buffer: &mut [u8]) -> usize {
        let (mut skip, mut done) = (offset, 0);
        for slice in &self.0 {
            let from = skip.min(slice.len());
            skip -= from;
            let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            if from < slice.len() {
                done += slice.read(rest, from).unwrap_or(0);
            }
        }
        done
    }

    /// Copies `bytes` to `offset` on; how many found room.
    pub(super) fn write_at(&self, offset: usize, bytes: &[u8]) -> usize {
        let (mut skip, mut done) = (offset, 0);
        for slice in &self.0 {
            let from = skip.min(slice.len());
            skip -= from;
            let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            if from < slice.len() {
                done += slice.write(rest, from).unwrap_or(0);
            }
        }
        done
    }
}

/// Features of the queues that most devices here offer.
pub(super) const RING_FEATURES: u64 = EVENT_IDX | INDIRECT;
/// Chains may be tables of their own.
pub(super) const INDIRECT: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
const EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

#[cfg(test)]
mod tests {
    use super::super::driver::{Buffer, Driver};
    use super::*;

    fn ring(driver: &Driver) -> Ring {
        Ring::new(driver.queue(0), 0, false, &driver.ram)
    }

    #[test]
    fn segments_cross_slices() {
        let driver = Driver::new(1);
        driver.offer(
            0,
            &[
                Buffer::read(0x8000, b"hello "),
                Buffer::read(0x9000, b"world"),
                Buffer::write(0xa000, 3),
                Buffer::write(0xb000, 5),
            ],
        );
        let chain = ring(&driver).pop(&driver.ram, 8).expect("a chain");
        assert!(!chain.broken);
        assert_eq!((chain.readable.len(), chain.writable.len()), (11, 8));
        let mut text = [0; 7];
        assert_eq!(chain.readable.read_at(4, &mut text), 7);
        assert_eq!(&text, b"o world");
        assert_eq!(chain.readable.read_at(9, &mut text), 2);
        assert_eq!(chain.writable.write_at(2, b"abcdefgh"), 6);
        assert_eq!(driver.bytes(0xa002, 1), b"a");
        assert_eq!(driver.bytes(0xb000, 5), b"bcdef");
        let middle = chain.readable.range(5, 3).expect("in range");
        let mut piece = [0; 8];
        assert_eq!(middle.read_at(0, &mut piece), 3);
        assert_eq!(&piece[..3], b" wo");
        assert!(chain.readable.range(9, 3).is_none());
        assert_eq!(chain.readable.range(11, 0).map(|none| none.len()), Some(0));
        let tail = chain.tail.expect("ends in a writable byte");
        tail.write(b"!", 0).expect("one byte");
        assert_eq!(driver.bytes(0xb004, 1), b"!");
    }

    #[test]
    fn broken_chains_are_faults() {
        for (what, buffers, limit) in [
            (
                "outside memory",
                vec![Buffer::raw(0xffff_0000, 16, 0, 0)],
                8,
            ),
            (
                "across the end",
                vec![Buffer::raw(Driver::RAM - 8, 16, 0, 0)],
                8,
            ),
            ("wraps", vec![Buffer::raw(u64::MAX - 7, 16, 0, 0)], 8),
            ("loop", vec![Buffer::raw(0x8000, 16, 1, 0)], 64),
            ("bad successor", vec![Buffer::raw(0x8000, 16, 1, 999)], 8),
            (
                "too long",
                vec![
                    Buffer::raw(0x8000, 1, 3, 1),
                    Buffer::raw(0x8000, 1, 3, 2),
                    Buffer::raw(0x8000, 1, 2, 0),
                ],
                2,
            ),
            (
                "readable last",
                vec![Buffer::raw(0x8000, 1, 3, 1), Buffer::raw(0x8000, 1, 0, 0)],
                8,
            ),
            ("indirect, uneven", vec![Buffer::raw(0x8000, 17, 4, 0)], 8),
            (
                "indirect, outside",
                vec![Buffer::raw(0xffff_0000, 32, 4, 0)],
                8,
            ),
        ] {
            let driver = Driver::new(1);
            driver.offer_as_is(0, &buffers);
            let mut ring = ring(&driver);
            let chain = ring.pop(&driver.ram, limit).expect(what);
            assert!(chain.broken, "{what}");
            assert_eq!(ring.faults, 1, "{what}");
        }
    }

    #[test]
    fn too_many_buffers_stop_the_queue() {
        let driver = Driver::new(1);
        let mut ring = ring(&driver);
        driver.set_avail_index(0, 1000);
        assert!(ring.pop(&driver.ram, 8).is_none());
        assert!(!ring.listen(&driver.ram));
        driver.set_avail_index(0, 1);
        assert!(ring.pop(&driver.ram, 8).is_none());
        assert_eq!(ring.faults, 1);
    }

    #[test]
    fn rings_outside_memory_are_not_used() {
        let driver = Driver::new(1);
        let mut queue = driver.queue(0);
        queue.set_used_ring_address(Some(0xffff_0000), Some(0));
        let mut ring = Ring::new(queue, 0, false, &driver.ram);
        driver.offer(0, &[Buffer::write(0x8000, 1)]);
        assert!(ring.pop(&driver.ram, 8).is_none());
        assert_eq!(ring.faults, 1);
    }
}
