//! What the parts know of each other: counters, and the two workloads for a check on request.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::Disk;
use crate::memory::Region;
use crate::options::Exit;

/// Shared by all threads.
pub(crate) struct State {
    /// The last tick printed.
    pub(crate) counter: Counter,
    pub(crate) pattern_errors: Counter,
    pub(crate) pattern_rounds: Counter,
    pub(crate) pages_dirtied: Counter,
    pub(crate) disk_writes: Counter,
    pub(crate) disk_errors: Counter,
    /// SHA-256 of the launch secret, in hex.
    pub(crate) secret_sha256: Option<String>,
    pub(crate) exit: Exit,
    /// There once the memory workload has filled it.
    pub(crate) region: Mutex<Option<Region>>,
    /// There if the guest has a disk.
    pub(crate) disk: Mutex<Option<Disk>>,
}

impl State {
    pub(crate) fn new(secret_sha256: Option<String>, exit: Exit) -> Self {
        Self {
            counter: Counter::default(),
            pattern_errors: Counter::default(),
            pattern_rounds: Counter::default(),
            pages_dirtied: Counter::default(),
            disk_writes: Counter::default(),
            disk_errors: Counter::default(),
            secret_sha256,
            exit,
            region: Mutex::new(None),
            disk: Mutex::new(None),
        }
    }

    /// The answer to `status`, one line of JSON.
    pub(crate) fn status(&self) -> String {
        let secret = self
            .secret_sha256
            .as_ref()
            .map_or_else(|| "null".to_owned(), |digest| format!("\"{digest}\""));
        format!(
            "{{\"counter\":{},\"pattern_errors\":{},\"pattern_rounds\":{},\"pages_dirtied\":{},\"disk_writes\":{},\
             \"disk_errors\":{},\"secret_sha256\":{secret}}}",
            self.counter.get(),
            self.pattern_errors.get(),
            self.pattern_rounds.get(),
            self.pages_dirtied.get(),
            self.disk_writes.get(),
            self.disk_errors.get(),
        )
    }
}

/// A number that only grows.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds, and returns the sum.
    pub(crate) fn add(&self, n: u64) -> u64 {
        self.0.fetch_add(n, Ordering::Relaxed).wrapping_add(n)
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
