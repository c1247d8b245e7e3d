//! Requests past the page cache (`O_DIRECT`), so many under way at once, by io_uring.

#![expect(
    unsafe_code,
    reason = "the kernel reads and writes our buffers while requests are under way"
)]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types::Fd};

use super::{Figure, quantile};

/// All of the disk's figures: MiB/s of long requests, and of 4 KiB requests how many a second, and microseconds each.
pub(super) fn measure() -> io::Result<Vec<Figure>> {
    let mut disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
        .open("/dev/vda")?;
    let size = disk.seek(SeekFrom::End(0))?;
    let mut figures = Vec::new();
    for write in [false, true] {
        let what = if write { "write" } else { "read" };
        let load = Load {
            write,
            bytes: LONG,
            depth: LONG_DEPTH,
            random: false,
        };
        let done = load.run(&disk, size)?;
        let mib = done.count() as f64 * LONG as f64 / (1 << 20) as f64;
        figures.push((format!("seq_{what}_mib_s"), mib / done.seconds));
        for depth in [1, 16] {
            let load = Load {
                write,
                bytes: SHORT,
                depth,
                random: true,
            };
            let done = load.run(&disk, size)?;
            let name = |figure: &str| format!("rand_{what}_qd{depth}_{figure}");
            figures.push((name("iops"), done.count() as f64 / done.seconds));
            figures.push((name("median_us"), quantile(&done.micros, 0.5)));
            figures.push((name("p99_us"), quantile(&done.micros, 0.99)));
        }
    }
    Ok(figures)
}

/// One kind of load.
struct Load {
    write: bool,
    bytes: usize,
    depth: usize,
    random: bool,
}

/// What became of it.
struct Done {
    seconds: f64,
    /// How long each request took, sorted.
    micros: Vec<u64>,
}

impl Done {
    fn count(&self) -> usize {
        self.micros.len()
    }
}

impl Load {
    fn run(&self, disk: &File, size: u64) -> io::Result<Done> {
        let mut ring = IoUring::new(32)?;
        // Never freed: after an error the kernel may still write to them.
        let mut buffers: Vec<&'static mut [Block]> = (0..self.depth)
            .map(|_| vec![Block([0x5a; SHORT]); self.bytes / SHORT].leak())
            .collect();
        let mut begun = vec![Instant::now(); self.depth];
        let mut place = Place {
            next: 0x9e37_79b9_7f4a_7c15,
            slots: (size / self.bytes as u64).max(1),
            random: self.random,
        };
        let mut micros = Vec::new();
        let start = Instant::now();
        let mut under_way = 0;
        let mut free: Vec<usize> = (0..self.depth).collect();
        loop {
            let over = start.elapsed() >= LONG_ENOUGH;
            while let Some(index) = free.pop().filter(|_| !over) {
                let (Some(buffer), Some(begun)) = (buffers.get_mut(index), begun.get_mut(index))
                else {
                    break;
                };
                *begun = Instant::now();
                self.submit(&mut ring, disk, buffer, place.take(self.bytes), index)?;
                under_way += 1;
            }
            if under_way == 0 {
                break;
            }
            ring.submit_and_wait(1)?;
            for answer in ring.completion() {
                under_way -= 1;
                let index = answer.user_data() as usize;
                if answer.result() != self.bytes as i32 {
                    return Err(io::Error::other(format!("a request: {}", answer.result())));
                }
                if let Some(begun) = begun.get(index) {
                    micros.push(begun.elapsed().as_micros() as u64);
                }
                free.push(index);
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        micros.sort_unstable();
        Ok(Done { seconds, micros })
    }

    fn submit(
        &self,
        ring: &mut IoUring,
        disk: &File,
        buffer: &mut &'static mut [Block],
        offset: u64,
        index: usize,
    ) -> io::Result<()> {
        let (fd, at) = (Fd(disk.as_raw_fd()), buffer.as_mut_ptr().cast::<u8>());
        let bytes = self.bytes as u32;
        let entry = match self.write {
            true => opcode::Write::new(fd, at, bytes).offset(offset).build(),
            false => opcode::Read::new(fd, at, bytes).offset(offset).build(),
        };
        // SAFETY: the buffer has `bytes` bytes, is never freed, and is not touched before the ring has answered.
        unsafe { ring.submission().push(&entry.user_data(index as u64)) }
            .map_err(|_| io::Error::other("the ring is full"))
    }
}

/// Where the next request goes.
struct Place {
    next: u64,
    slots: u64,
    random: bool,
}

impl Place {
    fn take(&mut self, bytes: usize) -> u64 {
        let slot = if self.random {
            // xorshift64
            self.next ^= self.next << 13;
            self.next ^= self.next >> 7;
            self.next ^= self.next << 17;
            self.next
        } else {
            self.next = self.next.wrapping_add(1);
            self.next
        };
        slot % self.slots * bytes as u64
    }
}

/// Aligned as `O_DIRECT` wants it.
#[derive(Clone)]
#[repr(align(4096))]
struct Block(#[expect(dead_code, reason = "the kernel reads and writes it")] [u8; SHORT]);

const SHORT: usize = 4096;
const LONG: usize = 1 << 20;
const LONG_DEPTH: usize = 4;
const LONG_ENOUGH: Duration = Duration::from_millis(1500);
