//! What each part of the stream costs alone, in the same run: copies, seals, TLS, the socket.
//!
//! Processor time of the threads that do them, so that other load disturbs little; the least of [`ROUNDS`] counts.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use casemate_crypto_migrate::Provider;
use casemate_crypto_migrate::parts::{PIECE, Parts};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::BenchError;
use super::memory::BenchMemory;
use super::migrate::Protect;

/// Processor seconds per GB (10^9 bytes) of each part at one end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct End {
    /// Between guest memory and a buffer in the cache.
    pub copy: f64,
    /// Seals of extents of 64 KiB; 0 where there are none.
    pub seals: f64,
    /// Records of TLS; 0 where there are none.
    pub tls: f64,
    /// The socket: system calls, the kernel's copy, its TCP.
    pub socket: f64,
}

impl End {
    fn sum(self) -> f64 {
        self.copy + self.seals + self.tls + self.socket
    }
}

/// The parts of both ends, measured by the source on its machine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sum {
    /// The source's.
    pub source: End,
    /// The destination's.
    pub destination: End,
    /// Processor seconds per GB of all of them.
    pub cpu_s_per_gb: f64,
    /// What the move took of the processor, both ends, as a multiple of this sum.
    pub cpu_measured: f64,
    /// How long the move took, as a multiple of the slower end's sum: the ends work at the same time.
    pub wall_measured: f64,
}

impl Sum {
    /// Compares a move that took so much per GB with the parts.
    pub fn measure(
        memory: &BenchMemory,
        protect: Protect,
        provider: Provider,
        cpu_s_per_gb: f64,
        seconds_per_gb: f64,
    ) -> Result<Self, BenchError> {
        let mut ends = [End::default(); 2];
        let least = |to: &mut f64, found: f64| {
            *to = if *to == 0.0 { found } else { to.min(found) };
        };
        let other = BenchMemory::populated(BYTES.min(memory.size()))?;
        for _ in 0..ROUNDS {
            let [source, destination] = &mut ends;
            let (read, written) = copies(memory, &other)?;
            least(&mut source.copy, read);
            least(&mut destination.copy, written);
            let (sent, received) = socket()?;
            least(&mut source.socket, sent);
            least(&mut destination.socket, received);
            let (sealed, opened, protected, unprotected) = cryptography(provider)?;
            if protect == Protect::TlsMac {
                least(&mut source.seals, sealed);
                least(&mut destination.seals, opened);
            }
            if protect != Protect::None {
                least(&mut source.tls, protected);
                least(&mut destination.tls, unprotected);
            }
        }
        let [source, destination] = ends;
        let sum = source.sum() + destination.sum();
        Ok(Self {
            source,
            destination,
            cpu_s_per_gb: sum,
            cpu_measured: cpu_s_per_gb / sum,
            wall_measured: seconds_per_gb / source.sum().max(destination.sum()),
        })
    }
}

/// Out of memory that is in no cache, and into such.
fn copies(memory: &BenchMemory, other: &BenchMemory) -> Result<(f64, f64), BenchError> {
    let mut stage = vec![0; PIECE];
    let bytes = memory.size().min(other.size());
    let pieces = || (0..bytes / PIECE as u64).map(|number| number * PIECE as u64);
    let read = timed(|| {
        for at in pieces() {
            memory.guest.read(at, &mut stage)?;
        }
        Ok(())
    })?;
    let written = timed(|| {
        for at in pieces() {
            other.guest.write(at, &stage)?;
        }
        Ok(())
    })?;
    let moved = bytes.max(PIECE as u64) as f64 / 1e9;
    Ok((read / moved, written / moved))
}

fn cryptography(provider: Provider) -> Result<(f64, f64, f64, f64), BenchError> {
    let failed =
        |e: casemate_crypto_migrate::CryptoError| BenchError::Engine(format!("a part: {e}"));
    let mut parts = Parts::new(provider).map_err(failed)?;
    let piece = Box::new([0x5a; PIECE]);
    let count = BYTES / PIECE as u64;
    let mut each = |work: &mut dyn FnMut(&mut Parts) -> Result<(), _>| {
        timed(|| (0..count).try_for_each(|_| work(&mut parts).map_err(failed)))
    };
    let sealed = each(&mut |parts| parts.seal(&piece))?;
    let opened = each(&mut |parts| parts.seal(&piece).and_then(|()| parts.open()))?;
    let records = each(&mut |parts| {
        parts.seal_records()?;
        parts.open_records()
    })?;
    let mut alone = Parts::new(provider).map_err(failed)?;
    let protected = timed(|| (0..count).try_for_each(|_| alone.seal_records().map_err(failed)))?;
    let moved = BYTES as f64 / 1e9;
    Ok((
        sealed / moved,
        (opened - sealed).max(0.0) / moved,
        protected / moved,
        (records - protected).max(0.0) / moved,
    ))
}

/// Sends from one buffer to another over loopback.
fn socket() -> Result<(f64, f64), BenchError> {
    let failed = BenchError::system("a part: loopback");
    let listener = TcpListener::bind("127.0.0.1:0").map_err(&failed)?;
    let address = listener.local_addr().map_err(&failed)?;
    let mut near = TcpStream::connect(address).map_err(&failed)?;
    let (mut far, _) = listener.accept().map_err(&failed)?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut buffer = vec![0; PIECE];
            timed(|| {
                while far
                    .read(&mut buffer)
                    .map_err(BenchError::system("a part: receive"))?
                    > 0
                {}
                Ok(())
            })
        });
        let buffer = vec![0; PIECE / 2];
        let sent = timed(|| {
            for _ in 0..2 * BYTES / PIECE as u64 {
                near.write_all(&buffer)
                    .map_err(BenchError::system("a part: send"))?;
            }
            Ok(())
        });
        drop(near);
        let received = receiver
            .join()
            .map_err(|_| BenchError::Engine("a part: the receiving thread failed".to_owned()))?;
        let moved = BYTES as f64 / 1e9;
        Ok((sent? / moved, received? / moved))
    })
}

/// Processor seconds of this thread.
fn timed(mut work: impl FnMut() -> Result<(), BenchError>) -> Result<f64, BenchError> {
    let begun = now()?;
    work()?;
    Ok(now()? - begun)
}

fn now() -> Result<f64, BenchError> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_err(|e| BenchError::System("CLOCK_THREAD_CPUTIME_ID", e.into()))?;
    Ok(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
}

/// How often each part is measured.
const ROUNDS: usize = 3;
/// Bytes of each.
const BYTES: u64 = 128 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_of_the_parts_that_the_protection_has() {
        let memory = BenchMemory::random(1 << 22).unwrap();
        let provider = Provider::default();
        let of = |protect| Sum::measure(&memory, protect, provider, 2.0, 1.0).unwrap();
        let (none, tls, all) = (of(Protect::None), of(Protect::Tls), of(Protect::TlsMac));
        assert_eq!((none.source.seals, none.source.tls), (0.0, 0.0));
        assert_eq!((tls.destination.seals, all.source.seals > 0.0), (0.0, true));
        assert!(tls.source.tls > 0.0 && all.destination.tls > 0.0);
        let sum = all.source.sum() + all.destination.sum();
        assert!((all.cpu_measured * sum - 2.0).abs() < 1e-9);
    }
}
