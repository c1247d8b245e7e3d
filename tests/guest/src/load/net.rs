//! One TCP connection for each figure; its first byte tells the host which one it is for.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::time::{Duration, Instant};

use super::{Figure, quantile};

/// MiB/s to the host and from it, and microseconds for one byte there and back.
pub(super) fn measure(host: Ipv4Addr) -> io::Result<Vec<Figure>> {
    let mut figures = vec![
        ("net_send_mib_s".to_owned(), send(host)?),
        ("net_receive_mib_s".to_owned(), receive(host)?),
    ];
    let mut micros = round_trips(host)?;
    micros.sort_unstable();
    figures.push((
        "net_round_trip_median_us".to_owned(),
        quantile(&micros, 0.5),
    ));
    figures.push(("net_round_trip_p99_us".to_owned(), quantile(&micros, 0.99)));
    Ok(figures)
}

fn send(host: Ipv4Addr) -> io::Result<f64> {
    let mut stream = connect(host, b's')?;
    let bytes = vec![0x5a; CHUNK];
    let start = Instant::now();
    let mut sent = 0usize;
    while start.elapsed() < LONG_ENOUGH {
        stream.write_all(&bytes)?;
        sent += bytes.len();
    }
    // The host says when it has all of it.
    stream.shutdown(Shutdown::Write)?;
    let mut told = [0; 8];
    stream.read_exact(&mut told)?;
    if u64::from_le_bytes(told) != sent as u64 {
        return Err(io::Error::other("bytes were lost on the way"));
    }
    Ok(mib_per_second(sent, start))
}

fn receive(host: Ipv4Addr) -> io::Result<f64> {
    let mut stream = connect(host, b'r')?;
    let mut bytes = vec![0; CHUNK];
    let start = Instant::now();
    let mut received = 0;
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(mib_per_second(received, start)),
            count => received += count,
        }
    }
}

fn round_trips(host: Ipv4Addr) -> io::Result<Vec<u64>> {
    let mut stream = connect(host, b'e')?;
    stream.set_nodelay(true)?;
    let start = Instant::now();
    let mut micros = Vec::new();
    while start.elapsed() < LONG_ENOUGH {
        let begun = Instant::now();
        let mut byte = [0x5a];
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        micros.push(begun.elapsed().as_micros() as u64);
    }
    Ok(micros)
}

fn connect(host: Ipv4Addr, figure: u8) -> io::Result<TcpStream> {
    let limit = Instant::now() + PATIENCE;
    let mut stream = loop {
        // The card may not be up yet.
        match TcpStream::connect((host, PORT)) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > limit => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[figure])?;
    Ok(stream)
}

fn mib_per_second(bytes: usize, start: Instant) -> f64 {
    bytes as f64 / (1 << 20) as f64 / start.elapsed().as_secs_f64()
}

/// Where the host listens.
const PORT: u16 = 5201;
const CHUNK: usize = 64 << 10;
const LONG_ENOUGH: Duration = Duration::from_millis(1500);
const PATIENCE: Duration = Duration::from_secs(10);
