//! Threads that are started again when they panic: process 1 has to go on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::console::say;

/// Lets every panic be one console line: `guest: PANIC <thread>: <what and where>`.
pub(crate) fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = thread::current();
        let text = info.to_string().replace('\n', " ");
        say!("PANIC {}: {text}", thread.name().unwrap_or("?"));
    }));
}

/// Runs `part` on a thread of this name until it returns; after a panic once more, a second later.
pub(crate) fn spawn(name: &str, mut part: impl FnMut() + Send + 'static) {
    let spawned = thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(move || {
            while catch_unwind(AssertUnwindSafe(&mut part)).is_err() {
                thread::sleep(Duration::from_secs(1));
            }
        });
    if let Err(error) = spawned {
        say!("thread {name} not started: {error}");
    }
}

/// Locks, even if a thread panicked while it held the lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const STACK: usize = 256 << 10;
