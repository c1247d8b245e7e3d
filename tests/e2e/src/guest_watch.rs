//! Watches one guest from outside: its console wherever it runs, and its own checks through vsock.
//!
//! The console is one stream of bytes, whichever host's file it goes on in: a line may begin at the source and end at
//! the destination. The counter on it must never skip or repeat.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{E2eError, OnFile, Result, io};
use crate::site::tail;

/// What is known of the guest from its console.
#[derive(Debug)]
pub struct GuestWatch {
    file: PathBuf,
    read: BTreeMap<PathBuf, u64>,
    line: Vec<u8>,
    recent: String,
    /// The last number counted.
    pub last_tick: Option<u64>,
    /// Ticks seen.
    pub ticks: u64,
    /// The secret's SHA-256 as the guest printed it.
    pub secret_sha256: Option<String>,
    /// Whether it said `ready`.
    pub ready: bool,
    /// Gaps, repetitions, and errors that the guest reported.
    pub problems: Vec<String>,
}

/// The guest's answer to `verify`.
#[derive(Clone, Debug, Deserialize)]
pub struct Verified {
    /// Whether all was right, now and ever.
    pub ok: bool,
    /// Memory pages checked just now.
    pub pages_checked: u64,
    /// Disk blocks checked just now.
    pub blocks_checked: u64,
}

impl GuestWatch {
    /// Watches the console at `file` from its beginning.
    pub fn new(file: &Path) -> Self {
        Self {
            file: file.to_owned(),
            read: BTreeMap::new(),
            line: Vec::new(),
            recent: String::new(),
            last_tick: None,
            ticks: 0,
            secret_sha256: None,
            ready: false,
            problems: Vec::new(),
        }
    }

    /// Reads what is new.
    pub fn update(&mut self) -> Result<()> {
        let mut file = match File::open(&self.file) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            other => other.on("open", &self.file)?,
        };
        let offset = self.read.entry(self.file.clone()).or_default();
        let mut fresh = Vec::new();
        file.seek(SeekFrom::Start(*offset))
            .and_then(|_| file.read_to_end(&mut fresh))
            .on("read", &self.file)?;
        *offset += fresh.len() as u64;
        fresh.into_iter().for_each(|byte| self.take(byte));
        Ok(())
    }

    /// The guest runs elsewhere now: the rest of the old file, then the new one. A file it has been in before goes on
    /// where it was left.
    pub fn moved_to(&mut self, file: &Path) -> Result<()> {
        self.update()?;
        self.file = file.to_owned();
        self.update()
    }

    /// Waits until `done` holds.
    pub fn wait(&mut self, what: &str, time: Duration, done: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + time;
        loop {
            self.update()?;
            if done(self) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let more = format!("; the console ends: {}", tail(&self.recent));
                return Err(E2eError::TimedOut {
                    what: what.to_owned(),
                    seconds: time.as_secs(),
                    more,
                });
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the guest has counted on by `more`: it lives.
    pub fn wait_ticks(&mut self, more: u64, time: Duration) -> Result<()> {
        self.update()?;
        let goal = self.ticks + more;
        self.wait(&format!("{more} further ticks of the guest"), time, |w| {
            w.ticks >= goal
        })
    }

    fn take(&mut self, byte: u8) {
        if byte != b'\n' {
            return self.line.push(byte);
        }
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line))
            .trim_end_matches('\r')
            .to_owned();
        self.judge(&line);
        self.recent.push_str(&line);
        self.recent.push('\n');
        let surplus = self.recent.len().saturating_sub(RECENT);
        if let Some(cut) = self
            .recent
            .get(surplus..)
            .and_then(|rest| rest.find('\n'))
            .filter(|_| surplus > 0)
        {
            self.recent.drain(..=surplus + cut);
        }
    }

    fn judge(&mut self, line: &str) {
        if ["Kernel panic", "Oops", "BUG:"]
            .iter()
            .any(|bad| line.contains(bad))
        {
            self.problems.push(line.to_owned());
        }
        let Some((_, said)) = line.split_once("guest: ") else {
            return;
        };
        if let Some(digest) = said.strip_prefix("secret sha256=") {
            self.secret_sha256 = Some(digest.to_owned());
        } else if said == "ready" {
            self.ready = true;
        } else if let Some(counted) = said.strip_prefix("tick ") {
            self.count(counted);
        } else if ["PATTERN ERROR", "DISK ERROR", "FATAL"]
            .iter()
            .any(|bad| said.starts_with(bad))
        {
            self.problems.push(said.to_owned());
        }
    }

    fn count(&mut self, counted: &str) {
        let Some(number) = counted
            .split(' ')
            .next()
            .and_then(|n| n.parse::<u64>().ok())
        else {
            return self
                .problems
                .push(format!("a tick that cannot be read: {counted:?}"));
        };
        if let Some(last) = self.last_tick
            && number != last + 1
        {
            self.problems
                .push(format!("tick {number} follows tick {last}"));
        }
        self.last_tick = Some(number);
        self.ticks += 1;
    }
}

impl Drop for GuestWatch {
    fn drop(&mut self) {
        if thread::panicking() {
            // A test fails already; this only helps to see why.
            let _ = self.update();
            eprintln!("the guest's console ends:\n{}", tail(&self.recent));
        }
    }
}

/// Has the guest check all its memory and every block of its disk now.
pub fn verify(vsock: &Path) -> Result<Verified> {
    ask(vsock, "verify")
}

/// Sends one request to the guest's control port and reads its answer.
pub fn ask<T: DeserializeOwned>(vsock: &Path, request: &str) -> Result<T> {
    let failed = || io("ask the guest through vsock");
    let stream = UnixStream::connect(vsock).map_err(failed())?;
    stream.set_read_timeout(Some(VERIFY)).map_err(failed())?;
    let mut reader = BufReader::new(&stream);
    let mut exchange = |line: &str| -> Result<String> {
        (&stream).write_all(line.as_bytes()).map_err(failed())?;
        let mut answer = String::new();
        reader.read_line(&mut answer).map_err(failed())?;
        Ok(answer)
    };
    let greeting = exchange("CONNECT 1024\n")?;
    if !greeting.starts_with("OK ") {
        return Err(E2eError::Answer(format!(
            "vsock port 1024 of the guest: {greeting:?}"
        )));
    }
    let answer = exchange(&format!("{request}\n"))?;
    serde_json::from_str(&answer).map_err(|e| {
        E2eError::Answer(format!(
            "the guest's answer to {request:?}, {answer:?}: {e}"
        ))
    })
}

const VERIFY: Duration = Duration::from_secs(60);
const RECENT: usize = 4096;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn consoles() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        (folder, a, b)
    }

    #[test]
    fn a_line_may_begin_here_and_end_there() {
        let (_folder, a, b) = consoles();
        fs::write(
            &a,
            "guest: secret sha256=ab\r\nguest: ready\r\nguest: tick 1 10\r\nguest: ti",
        )
        .unwrap();
        let mut watch = GuestWatch::new(&a);
        watch.update().unwrap();
        fs::write(&b, "ck 2 20\r\nguest: tick 3 30\r\n").unwrap();
        watch.moved_to(&b).unwrap();
        assert!(watch.ready && watch.secret_sha256.as_deref() == Some("ab"));
        assert_eq!((watch.last_tick, watch.ticks), (Some(3), 3));
        // Back, to a file that goes on.
        let old = fs::read(&a).unwrap();
        fs::write(&a, [old, b"guest: tick 4 40\n".to_vec()].concat()).unwrap();
        watch.moved_to(&a).unwrap();
        assert_eq!((watch.last_tick, watch.problems.len()), (Some(4), 0));
    }

    #[test]
    fn gaps_repetitions_and_errors_are_problems() {
        let cases = [
            "guest: tick 1 1\nguest: tick 3 2\n",
            "guest: tick 1 1\nguest: tick 1 2\n",
            "guest: tick x\n",
        ];
        for text in cases.into_iter().chain([
            "guest: PATTERN ERROR page 7\n",
            "[ 1.0] Kernel panic - not syncing\n",
        ]) {
            let (_folder, a, _) = consoles();
            fs::write(&a, text).unwrap();
            let mut watch = GuestWatch::new(&a);
            watch.update().unwrap();
            assert_eq!(watch.problems.len(), 1, "{text}");
        }
    }

    #[test]
    fn what_does_not_come_is_an_error_in_time() {
        let (_folder, a, _) = consoles();
        fs::write(&a, "guest: tick 1 1\n").unwrap();
        let error = GuestWatch::new(&a)
            .wait_ticks(1, Duration::ZERO)
            .unwrap_err()
            .to_string();
        assert!(error.contains("tick 1 1"), "{error}");
    }
}
