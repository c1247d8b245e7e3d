//! What can go wrong with the lab itself; a failing program under test is not an error but an exit status.

use std::{io, path::Path, time::Duration};

/// Why the lab could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// An external command could not be started.
    #[error("cannot start `{command}`: {source}")]
    Start {
        /// The program.
        command: String,
        /// Why not.
        source: io::Error,
    },
    /// An external command failed.
    #[error("`{command}` failed ({status}){}", indented(.output))]
    Command {
        /// Program and arguments.
        command: String,
        /// How it ended.
        status: String,
        /// What it said.
        output: String,
    },
    /// The machine's package sources do not give what the lab needs.
    #[error("{0}")]
    Packages(String),
    /// A kernel image or module is not what it should be.
    #[error("{path}: {why}")]
    Kernel {
        /// The image or module.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// QEMU or the lab kernel did not come up, died, or talked nonsense.
    #[error("the lab {what}{}", indented(.console))]
    Machine {
        /// What happened.
        what: String,
        /// The end of the lab's console and of QEMU's own messages.
        console: String,
    },
    /// The program under test took too long.
    #[error("timed out after {} s (LAB_TIMEOUT)", .0.as_secs())]
    Timeout(Duration),
    /// A signal asked us to stop, or our parent is gone.
    #[error("interrupted")]
    Interrupted(i32),
    /// The command line or the environment asks for something impossible.
    #[error("{0}")]
    Usage(String),
}

/// The lab's result type.
pub type Result<T> = std::result::Result<T, Error>;

/// Adds what was tried, and on which file, to an I/O error.
pub trait OnFile<T> {
    /// `action` reads as in "cannot `action` `path`".
    fn on(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> OnFile<T> for io::Result<T> {
    fn on(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::File {
            action,
            path: path.display().to_string(),
            source,
        })
    }
}

fn indented(text: &str) -> String {
    text.lines()
        .fold(String::new(), |all, line| all + "\n    " + line)
}
