//! The same bytes without page seals: over TLS, or in the clear. Only for comparison; no migration uses it.
//!
//! Every piece is the address, the length, then the bytes; a length of zero ends.

use std::io::{Read, Write};
use std::net::TcpStream;
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

/// Sends all memory; returns the time from the last piece to the other end's word that it is placed.
pub fn send(pipe: &mut Pipe, memory: &BenchMemory) -> Result<Duration, BenchError> {
    let mut piece = Vec::with_capacity(HEADER + CHUNK + 1);
    memory.each_chunk(|at, length| {
        piece.resize(HEADER + length, 0);
        let (header, body) = piece.split_at_mut(HEADER);
        put_header(header, at, length);
        memory.guest.read(at, body)?;
        pipe.send(&mut piece)
    })?;
    let sent = Instant::now();
    pipe.send(&mut vec![0; HEADER])?;
    pipe.receive(&mut [0])?;
    Ok(sent.elapsed())
}

/// Places all that is sent.
pub fn receive(pipe: &mut Pipe, memory: &BenchMemory) -> Result<(), BenchError> {
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
