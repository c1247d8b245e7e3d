//! The console: whole lines, each beginning with `guest: `.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Prints one line on the console.
macro_rules! say {
    ($($text:tt)*) => { $crate::console::line(format_args!($($text)*)) };
}
pub(crate) use say;

/// Opens `/dev/console`; until then, and if that fails, lines go to standard output.
pub(crate) fn open() {
    let opened = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open("/dev/console");
    if let Ok(file) = opened {
        let _ = CONSOLE.set(Mutex::new(file));
    }
}

/// Writes one line with one system call, so that lines of different threads never mix.
pub(crate) fn line(text: std::fmt::Arguments<'_>) {
    let text = format!("guest: {text}\n");
    // There is nobody to tell that the console is gone.
    let _ = match CONSOLE.get() {
        Some(console) => console
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(text.as_bytes()),
        None => std::io::stdout().write_all(text.as_bytes()),
    };
}

static CONSOLE: OnceLock<Mutex<File>> = OnceLock::new();
