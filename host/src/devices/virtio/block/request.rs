//! One disk request: parsed from the chain, checked, done, answered.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::Bytes;

use super::super::ring::{Chain, Segments};
use super::image::SECTOR;
use super::medium::{Extent, Medium};
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

impl Disk {
    /// Does what the chain asks, and writes the status byte.
    pub(super) fn serve(&mut self, chain: &Chain<'_>) -> Served {
        let result = if chain.broken {
            Err(Refusal::Fault)
        } else {
            self.run(chain)
        };
        let (status, data, fault) = match result {
            Ok(data) => (VIRTIO_BLK_S_OK, data, false),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0, false),
            Err(Refusal::Fault) => (VIRTIO_BLK_S_IOERR, 0, true),
            Err(Refusal::Io(error)) => {
                tracing::warn!(disk = self.name, %error, "disk request failed");
                (VIRTIO_BLK_S_IOERR, 0, false)
            }
        };
        match &chain.tail {
            // A broken chain has been counted by the queue already.
            Some(tail) => match tail.write_obj(status as u8, 0) {
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

    /// How many bytes of data were written to the guest.
    fn run(&mut self, chain: &Chain<'_>) -> Result<u32, Refusal> {
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
            VIRTIO_BLK_T_IN => {
                let extent = self.extent_of(sector, &into)?;
                self.image.read(extent, &into)?;
                u32::try_from(into.len()).map_err(|_| Refusal::Fault)
            }
            VIRTIO_BLK_T_OUT => {
                self.writable()?;
                let extent = self.extent_of(sector, &out)?;
                let done = self.image.write(extent, &out);
                self.written(extent, done)
            }
            VIRTIO_BLK_T_FLUSH if self.read_only => Ok(0),
            VIRTIO_BLK_T_FLUSH => Ok(self.image.flush().map(|()| 0)?),
            VIRTIO_BLK_T_GET_ID => Ok(into.write_at(0, &self.serial) as u32),
            VIRTIO_BLK_T_DISCARD => {
                let (extent, flags) = self.range(&out)?;
                if flags != 0 {
                    return Err(Refusal::Unsupported);
                }
                let done = self.image.discard(extent);
                self.written(extent, done)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let (extent, flags) = self.range(&out)?;
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(Refusal::Unsupported);
                }
                let done = self.image.zero(extent, flags != 0);
                self.written(extent, done)
            }
            _ => Err(Refusal::Unsupported),
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

/// Type, reserved, sector.
const HEADER: usize = 16;
/// Sector, count, flags.
const RANGE: usize = 16;
