//! The same bytes without page seals: over TLS, or in the clear. Only for comparison; no migration uses it.
//!
//! Every piece is the address, the length, then the bytes; a length of zero ends.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use casemate_crypto_migrate::tls::TlsStream;

use super::BenchError;
use super::memory::{BenchMemory, CHUNK};

/// A byte stream, protected or not.
pub enum Pipe {
    /// TCP.
    Clear(TcpStream),
    /// TLS 1.3 over TCP, mutual.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Pipe {
    /// What is left in `bytes` is of no use.
    fn send(&mut self, bytes: &mut Vec<u8>) -> Result<(), BenchError> {
        match self {
            Pipe::Clear(stream) => stream.write_all(bytes).map_err(BenchError::system("send")),
            Pipe::Tls(stream) => Ok(stream.write_all(bytes, deadline())?),
        }
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<(), BenchError> {
        match self {
            Pipe::Clear(stream) => stream
                .read_exact(into)
                .map_err(BenchError::system("receive")),
            Pipe::Tls(stream) => Ok(stream.read_exact(into, deadline(), &|| false)?),
        }
    }
}

/// Sends all memory, each piece over whichever pipe is free; returns the time from the last piece to the other end's word
/// that all is placed.
pub fn send(pipes: Vec<Pipe>, memory: &BenchMemory) -> Result<Duration, BenchError> {
    let next = AtomicU64::new(0);
    let sent = each(pipes, |pipe| send_some(pipe, &next, memory))?;
    Ok(sent
        .into_iter()
        .max()
        .map_or(Duration::ZERO, |sent| sent.elapsed()))
}

/// Places all that is sent over all of them.
pub fn receive(pipes: Vec<Pipe>, memory: &BenchMemory) -> Result<(), BenchError> {
    each(pipes, |pipe| receive_some(pipe, memory)).map(drop)
}

/// A thread for each pipe; one alone needs none.
fn each<R: Send>(
    mut pipes: Vec<Pipe>,
    work: impl Fn(&mut Pipe) -> Result<R, BenchError> + Sync,
) -> Result<Vec<R>, BenchError> {
    if let [pipe] = pipes.as_mut_slice() {
        return Ok(vec![work(pipe)?]);
    }
    let work = &work;
    std::thread::scope(|scope| {
        let pipes = pipes.iter_mut();
        let threads: Vec<_> = pipes.map(|pipe| scope.spawn(move || work(pipe))).collect();
        let failed = |_| BenchError::Engine("a connection's thread has failed".to_owned());
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|result| result.map_err(failed)?).collect()
    })
}

fn send_some(
    pipe: &mut Pipe,
    next: &AtomicU64,
    memory: &BenchMemory,
) -> Result<Instant, BenchError> {
    let mut piece = Vec::with_capacity(HEADER + CHUNK + 1);
    loop {
        let at = next.fetch_add(CHUNK as u64, Ordering::Relaxed);
        let left = memory.size().saturating_sub(at);
        let length = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
        if length == 0 {
            break;
        }
        piece.resize(HEADER + length, 0);
        let (header, body) = piece.split_at_mut(HEADER);
        put_header(header, at, length);
        memory.guest.read(at, body)?;
        pipe.send(&mut piece)?;
    }
    let sent = Instant::now();
    pipe.send(&mut vec![0; HEADER])?;
    pipe.receive(&mut [0])?;
    Ok(sent)
}

fn receive_some(pipe: &mut Pipe, memory: &BenchMemory) -> Result<(), BenchError> {
    let mut body = vec![0; CHUNK];
    loop {
        let mut header = [0; HEADER];
        pipe.receive(&mut header)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3] = header;
        let at = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length == 0 {
            return pipe.send(&mut vec![1]);
        }
        let piece = usize::try_from(length)
            .ok()
            .and_then(|length| body.get_mut(..length))
            .ok_or_else(|| BenchError::Peer(format!("a piece of {length} bytes")))?;
        pipe.receive(piece)?;
        memory.guest.write(at, piece)?;
    }
}

const HEADER: usize = 12;

fn put_header(header: &mut [u8], at: u64, length: usize) {
    let length = u32::try_from(length).unwrap_or(0);
    let fields = at.to_le_bytes().into_iter().chain(length.to_le_bytes());
    header.iter_mut().zip(fields).for_each(|(h, f)| *h = f);
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}
