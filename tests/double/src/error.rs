//! What can go wrong with the double itself.

use nix::errno::Errno;

/// Why the double could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum DoubleError {
    /// The kernel refused the filter with its listener.
    #[error(
        "the child cannot run under the double: {0}; the kernel needs seccomp user notification \
         (CONFIG_SECCOMP_FILTER, Linux 5.19), the caller ptrace, and no other filter with a listener may stand \
         above (run this natively, not inside a container's own seccomp supervisor)"
    )]
    Start(String),
    /// A system call of the supervisor failed.
    #[error("{what}: {errno}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        errno: Errno,
    },
    /// The child does not answer any more.
    #[error("the child under the double is gone: {0}")]
    Gone(String),
    /// What the child did was let pass by Linux, but is wrong.
    #[error("the child used the kernel wrongly: {0:#?}")]
    Complaints(Vec<String>),
    /// The processor of a configuration cannot be made.
    #[error("no software secure processor: {0}")]
    Processor(String),
}

impl DoubleError {
    pub(crate) fn system(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::System { what, errno }
    }
}
