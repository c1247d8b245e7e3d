//! What can go wrong while the two sites are set up and driven.

use std::io;
use std::path::Path;

/// A failure of the harness, or of a command that had to succeed.
#[derive(Debug, thiserror::Error)]
pub enum E2eError {
    /// A file, a process or a socket.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A namespace, a link or an address.
    #[error(
        "network: {step}: {reason}; the demo needs root, and the modules tun, veth, bridge, af_packet"
    )]
    Network {
        /// What was tried.
        step: String,
        /// Why it failed.
        reason: String,
    },
    /// A `casemate` command that had to succeed.
    #[error("`casemate {command}` ended with status {status}: {said}")]
    Command {
        /// Its arguments.
        command: String,
        /// Exit status, -1 for a signal.
        status: i32,
        /// The end of its stderr.
        said: String,
    },
    /// An answer that is not what it should be.
    #[error("{0}")]
    Answer(String),
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s{more}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
        /// What is known instead.
        more: String,
    },
    /// Certificates.
    #[error("certificates: {0}")]
    Identity(#[from] casemate_crypto_migrate::identity::IdentityError),
    /// The emulated platform.
    #[error("emulated platform: {0}")]
    Platform(String),
    /// A signal came; nothing new is started.
    #[error("interrupted")]
    Interrupted,
}

/// Short for this crate's results.
pub type Result<T> = std::result::Result<T, E2eError>;

/// Names what was tried on a file.
pub trait OnFile<T> {
    /// As `E2eError::Io`, naming the path.
    fn on(self, verb: &str, path: &Path) -> Result<T>;
}

impl<T> OnFile<T> for io::Result<T> {
    fn on(self, verb: &str, path: &Path) -> Result<T> {
        self.map_err(|source| E2eError::Io {
            what: format!("{verb} {}", path.display()),
            source,
        })
    }
}

/// Names what was tried.
pub fn io(what: &str) -> impl FnOnce(io::Error) -> E2eError + '_ {
    move |source| E2eError::Io {
        what: what.to_owned(),
        source,
    }
}
