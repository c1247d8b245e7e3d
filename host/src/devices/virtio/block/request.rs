//! One disk request: parsed from the chain, checked, done at once or put under way, answered.
#![expect(
    unsafe_code,
    reason = "requests under way point into guest memory by address"
)]

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use super::super::GuestRam;
use super::super::ring::{Chain, Segments, Slice};
use super::image::{SECTOR, vectors};
use super::medium::{Extent, Medium};
use super::uring::{Action, Flight, Uring};
use super::written::Written;
use super::{SEG_MAX, SIZE_MAX};

/// The disk as requests see it.
pub(super) struct Disk {
    pub(super) image: Medium,
    pub(super) name: String,
    pub(super) serial: [u8; 20],
    pub(super) read_only: bool,
    /// Every write is flushed.
    pub(super) write_through: bool,
    /// A ring does writes too.
    pub(super) ring_writes: bool,
    /// Blocks written while a mover copies it.
    pub(super) written: Written,
}

/// What became of a request.
pub(super) struct Served {
    /// Bytes written to the guest, for the used ring.
    pub(super) written: u32,
    /// The request broke the rules.
    pub(super) fault: bool,
}

/// Why a request is answered with something else than OK.
enum Refusal {
    /// The guest asked for what no disk can do.
    Fault,
    /// The guest asked for what this disk cannot do.
    Unsupported,
    /// The image failed.
    Io(io::Error),
}

/// What a request asks for; checked, not done.
enum Order<'a> {
    /// Nothing: there is nothing to flush.
    Nothing,
    Read(Extent, Segments<'a>),
    Write(Extent, Segments<'a>),
    Flush,
    Name(Segments<'a>),
    Discard(Extent),
    /// Whether holes will do.
    Zero(Extent, bool),
}

impl Disk {
    /// Starts what the chain asks in `ring`, or does it and writes the status byte.
    pub(super) fn begin(&mut self, chain: &Chain<'_>, ring: Option<&mut Uring>) -> Option<Served> {
        let order = self.parse(chain);
        let by_ring = match &order {
            Ok(Order::Write(..)) => self.ring_writes && !self.write_through,
            _ => !self.write_through,
        };
        let ring = ring.filter(|_| by_ring);
        if let (Ok(order), Some(tail), Some(ring)) = (&order, &chain.tail, ring)
            && let Some(flight) = flight(order, chain.head(), tail)
        {
            // SAFETY: the vectors are slices of the chain's memory, which is the one attached at activation.
            if unsafe { ring.start(flight) }.is_ok() {
                return None;
            }
        }
        let result = order.and_then(|order| self.perform(order));
        Some(self.serve(chain, result))
    }

    /// Answers a request that was under way: `result` is what the kernel says.
    pub(super) fn end(&mut self, flight: &Flight, result: i32, ram: &GuestRam) -> Served {
        let outcome = self.outcome(flight, result);
        match flight.action {
            // Also after an error, which may have come in the middle.
            Action::Read => flight.vectors.iter().for_each(|vector| {
                let (address, len) = vector.place();
                mark(ram, address, len);
            }),
            Action::Write | Action::Discard | Action::Zero => self.written.note(Extent {
                offset: flight.offset,
                len: flight.len,
            }),
            Action::Flush => {}
        }
        let read = if flight.action == Action::Read {
            // Bounded by `extent_of`.
            u32::try_from(flight.len).unwrap_or(u32::MAX)
        } else {
            0
        };
        let (status, data, _) = self.status(outcome.map(|()| read).map_err(Refusal::from));
        let told = write_at(ram, flight.status, status);
        Served {
            written: if told { data.saturating_add(1) } else { 0 },
            fault: !told,
        }
    }

    /// Finishes what the kernel left undone.
    fn outcome(&self, flight: &Flight, result: i32) -> io::Result<()> {
        let write = flight.action == Action::Write;
        let rest = |done: usize| {
            let vectors = flight.vectors.clone();
            // SAFETY: the flight's memory is the one attached, which is mapped while the disk is activated.
            unsafe { self.image.go_on(write, flight.offset, vectors, done) }
        };
        match (flight.action, result) {
            (Action::Read | Action::Write, 0) => Err(io::ErrorKind::UnexpectedEof.into()),
            (Action::Read | Action::Write, done @ 1..) => match done.unsigned_abs() as usize {
                done if done as u64 >= flight.len => Ok(()),
                done => rest(done),
            },
            (Action::Read | Action::Write, interrupted)
                if [-libc::EINTR, -libc::EAGAIN].contains(&interrupted) =>
            {
                rest(0)
            }
            // A file system without this (tmpfs) can still make the content zero.
            (Action::Zero, error) if error == -libc::EOPNOTSUPP => {
                self.image.discard_raw(flight.offset, flight.len)
            }
            (_, error) if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            _ => Ok(()),
        }
    }

    /// Writes the status byte of a request that was done at once.
    fn serve(&self, chain: &Chain<'_>, result: Result<u32, Refusal>) -> Served {
        let (status, data, fault) = self.status(result);
        match &chain.tail {
            // A broken chain has been counted by the queue already.
            Some(tail) => match tail.write_obj(status, 0) {
                Ok(()) => Served {
                    written: data.saturating_add(1),
                    fault: fault && !chain.broken,
                },
                Err(_) => Served {
                    written: 0,
                    fault: true,
                },
            },
            None => Served {
                written: 0,
                fault: !chain.broken,
            },
        }
    }

    /// The status, the bytes of data written to the guest, and whether the request broke the rules.
    fn status(&self, result: Result<u32, Refusal>) -> (u8, u32, bool) {
        let (status, data, fault) = match result {
            Ok(data) => (VIRTIO_BLK_S_OK, data, false),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0, false),
            Err(Refusal::Fault) => (VIRTIO_BLK_S_IOERR, 0, true),
            Err(Refusal::Io(error)) => {
                tracing::warn!(disk = self.name, %error, "disk request failed");
                (VIRTIO_BLK_S_IOERR, 0, false)
            }
        };
        (status as u8, data, fault)
    }

    fn parse<'a>(&self, chain: &Chain<'a>) -> Result<Order<'a>, Refusal> {
        if chain.broken {
            return Err(Refusal::Fault);
        }
        let mut header = [0; HEADER];
        if chain.readable.read_at(0, &mut header) != HEADER {
            return Err(Refusal::Fault);
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let out = chain
            .readable
            .range(HEADER, chain.readable.len() - HEADER)
            .ok_or(Refusal::Fault)?;
        // The last writable byte is the status.
        let room = chain.writable.len().checked_sub(1).ok_or(Refusal::Fault)?;
        let into = chain.writable.range(0, room).ok_or(Refusal::Fault)?;
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            VIRTIO_BLK_T_IN => Ok(Order::Read(self.extent_of(sector, &into)?, into)),
            VIRTIO_BLK_T_OUT => {
                self.writable()?;
                Ok(Order::Write(self.extent_of(sector, &out)?, out))
            }
            VIRTIO_BLK_T_FLUSH if self.read_only => Ok(Order::Nothing),
            VIRTIO_BLK_T_FLUSH => Ok(Order::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Order::Name(into)),
            VIRTIO_BLK_T_DISCARD => match self.range(&out)? {
                (extent, 0) => Ok(Order::Discard(extent)),
                _ => Err(Refusal::Unsupported),
            },
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let (extent, flags) = self.range(&out)?;
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(Refusal::Unsupported);
                }
                Ok(Order::Zero(extent, flags != 0))
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Does it at once. How many bytes of data were written to the guest.
    fn perform(&mut self, order: Order<'_>) -> Result<u32, Refusal> {
        match order {
            Order::Nothing => Ok(0),
            Order::Read(extent, into) => {
                self.image.read(extent, &into)?;
                u32::try_from(into.len()).map_err(|_| Refusal::Fault)
            }
            Order::Write(extent, out) => {
                let done = self.image.write(extent, &out);
                self.written(extent, done)
            }
            Order::Flush => Ok(self.image.flush().map(|()| 0)?),
            Order::Name(into) => Ok(into.write_at(0, &self.serial) as u32),
            Order::Discard(extent) => {
                let done = self.image.discard(extent);
                self.written(extent, done)
            }
            Order::Zero(extent, may_unmap) => {
                let done = self.image.zero(extent, may_unmap);
                self.written(extent, done)
            }
        }
    }

    fn extent_of(&self, sector: u64, data: &Segments<'_>) -> Result<Extent, Refusal> {
        let bytes = data.len() as u64;
        if bytes > u64::from(SEG_MAX) * u64::from(SIZE_MAX) {
            return Err(Refusal::Fault);
        }
        self.image.extent(sector, bytes).ok_or(Refusal::Fault)
    }

    /// The one range of a discard or write-zeroes request, and its flags.
    fn range(&self, out: &Segments<'_>) -> Result<(Extent, u32), Refusal> {
        self.writable()?;
        let mut bytes = [0; RANGE];
        if out.len() != RANGE || out.read_at(0, &mut bytes) != RANGE {
            return Err(Refusal::Fault);
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([n0, n1, n2, n3]);
        if count > self.image.clear_max() {
            return Err(Refusal::Fault);
        }
        let extent = self
            .image
            .extent(sector, u64::from(count) * SECTOR)
            .ok_or(Refusal::Fault)?;
        Ok((extent, u32::from_le_bytes(flags)))
    }

    fn writable(&self) -> Result<(), Refusal> {
        if self.read_only {
            Err(Refusal::Fault)
        } else {
            Ok(())
        }
    }

    /// What failed may have changed something all the same.
    fn written(&mut self, extent: Extent, done: io::Result<()>) -> Result<u32, Refusal> {
        self.written.note(extent);
        done?;
        if self.write_through {
            self.image.flush()?;
        }
        Ok(0)
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Refusal {
        if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
            Refusal::Unsupported
        } else {
            Refusal::Io(error)
        }
    }
}

/// What a ring can do of it: nothing of what is done in no time.
fn flight(order: &Order<'_>, head: u16, tail: &Slice<'_>) -> Option<Flight> {
    let (action, extent, data) = match order {
        Order::Read(extent, into) => (Action::Read, *extent, Some(into)),
        Order::Write(extent, out) => (Action::Write, *extent, Some(out)),
        Order::Flush => (Action::Flush, Extent { offset: 0, len: 0 }, None),
        Order::Discard(extent) | Order::Zero(extent, true) => (Action::Discard, *extent, None),
        Order::Zero(extent, false) => (Action::Zero, *extent, None),
        Order::Nothing | Order::Name(_) => return None,
    };
    if extent.len == 0 && action != Action::Flush {
        return None;
    }
    let vectors = data.map(vectors).unwrap_or_default();
    (vectors.len() <= VECTORS_MAX).then(|| Flight {
        head,
        status: tail.ptr_guard_mut().as_ptr().addr(),
        action,
        offset: extent.offset,
        len: extent.len,
        vectors,
    })
}

/// Marks what the kernel wrote in the dirty bitmap.
fn mark(ram: &GuestRam, address: usize, len: usize) {
    if let Some((region, offset)) = region_of(ram, address) {
        region.bitmap().mark_dirty(offset, len);
    }
}

/// Writes one byte of guest memory, marked.
fn write_at(ram: &GuestRam, address: usize, byte: u8) -> bool {
    region_of(ram, address).is_some_and(|(region, offset)| {
        let at = MemoryRegionAddress(offset as u64);
        region.write_obj(byte, at).is_ok()
    })
}

/// The region that is mapped at an address of this process, and how far into it the address is.
fn region_of(ram: &GuestRam, address: usize) -> Option<(&GuestRegionMmap<AtomicBitmap>, usize)> {
    ram.iter().find_map(|region| {
        let offset = address.checked_sub(region.as_ptr().addr())?;
        (offset < region.size()).then_some((region, offset))
    })
}

/// Type, reserved, sector.
const HEADER: usize = 16;
/// Sector, count, flags.
const RANGE: usize = 16;
/// The kernel's IOV_MAX.
const VECTORS_MAX: usize = 1024;
