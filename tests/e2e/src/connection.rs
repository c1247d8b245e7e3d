//! A TCP connection to the guest, held open from outside while the guest moves.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{E2eError, Result, io};
use crate::network::Namespace;

/// The open connection; a line goes out every 100 ms and must come back.
pub struct Connection {
    state: Arc<Mutex<Held>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// How it fares.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// Lines that came back right.
    pub lines: u64,
    /// The longest time from a line to its echo.
    pub longest: Duration,
    /// Why it broke; it is not opened again.
    pub broken: Option<String>,
}

impl Connection {
    /// Connects from `namespace` and begins to talk.
    pub fn open(namespace: &Arc<Namespace>, guest: Ipv4Addr) -> Result<Self> {
        let address = SocketAddr::from((guest, PORT));
        let stream = namespace
            .run(|| connect(address))?
            .map_err(io("connect to the guest"))?;
        let state = Arc::new(Mutex::new(Held::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, ended) = (Arc::clone(&state), Arc::clone(&stop));
        let talk = move || {
            if let Err(reason) = hold(&stream, &shared, &ended) {
                lock(&shared).broken = Some(reason);
            }
        };
        let thread = thread::Builder::new()
            .name("connection".into())
            .spawn(talk)
            .map_err(io("start a thread"))?;
        Ok(Self {
            state,
            stop,
            thread: Some(thread),
        })
    }

    /// How it fares.
    pub fn held(&self) -> Held {
        lock(&self.state).clone()
    }

    /// Forgets the longest stall so far.
    pub fn measure_anew(&self) {
        lock(&self.state).longest = Duration::ZERO;
    }

    /// Waits until `more` lines have come back: it is alive.
    pub fn wait_lines(&self, more: u64, time: Duration) -> Result<()> {
        let (goal, deadline) = (self.held().lines + more, Instant::now() + time);
        loop {
            let held = self.held();
            if held.lines >= goal {
                return Ok(());
            }
            if held.broken.is_some() || Instant::now() > deadline {
                let more = held
                    .broken
                    .map(|reason| format!("; it broke: {reason}"))
                    .unwrap_or_default();
                return Err(E2eError::TimedOut {
                    what: "the guest's echo".into(),
                    seconds: time.as_secs(),
                    more,
                });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// The guest's network comes up at its own time.
fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let deadline = Instant::now() + CONNECT;
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(100)),
            other => return other,
        }
    }
}

fn hold(
    stream: &TcpStream,
    state: &Mutex<Held>,
    stop: &AtomicBool,
) -> std::result::Result<(), String> {
    let failed = |e: std::io::Error| e.to_string();
    stream
        .set_nodelay(true)
        .and_then(|()| stream.set_read_timeout(Some(SILENCE)))
        .map_err(failed)?;
    let mut reader = BufReader::new(stream);
    let mut last_counter = 0;
    for number in 1u64.. {
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let sent = Instant::now();
        let mut writer = stream;
        writer
            .write_all(format!("line {number}\n").as_bytes())
            .map_err(failed)?;
        let mut echo = String::new();
        reader.read_line(&mut echo).map_err(failed)?;
        let counter = counter_of(&echo, number)
            .ok_or_else(|| format!("line {number} came back as {echo:?}"))?;
        if counter < last_counter {
            return Err(format!(
                "the guest's counter went back from {last_counter} to {counter}"
            ));
        }
        last_counter = counter;
        let mut held = lock(state);
        held.lines += 1;
        held.longest = held.longest.max(sent.elapsed());
        drop(held);
        thread::sleep(PERIOD.saturating_sub(sent.elapsed()));
    }
    Ok(())
}

fn counter_of(echo: &str, number: u64) -> Option<u64> {
    echo.strip_prefix(&format!("line {number} "))?
        .strip_suffix('\n')?
        .parse()
        .ok()
}

fn lock(state: &Mutex<Held>) -> std::sync::MutexGuard<'_, Held> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

const PORT: u16 = 7000;
const PERIOD: Duration = Duration::from_millis(100);
const CONNECT: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn talk(answer: fn(u64) -> String) -> (u64, Option<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let stream = listener.accept().unwrap().0;
            for (line, number) in BufReader::new(&stream).lines().zip(1..4) {
                let text = format!("{} {}\n", line.unwrap(), answer(number));
                (&stream).write_all(text.as_bytes()).unwrap();
            }
        });
        let stream = TcpStream::connect(address).unwrap();
        let state = Mutex::new(Held::default());
        let reason = hold(&stream, &state, &AtomicBool::new(false)).err();
        drop(stream);
        server.join().unwrap();
        (lock(&state).lines, reason)
    }

    #[test]
    fn a_wrong_echo_breaks_it_and_a_closed_one_too() {
        let (lines, reason) = talk(|n| n.to_string());
        assert_eq!(lines, 3);
        assert!(reason.is_some());
        let (lines, reason) = talk(|n| (10 - n).to_string());
        assert_eq!(lines, 1);
        assert!(reason.unwrap().contains("went back"));
        assert_eq!(talk(|_| "x".into()).0, 0);
    }
}
