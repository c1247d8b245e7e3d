//! The filter of the software secure processor: channels, memory handed in, its own state.

use super::common::{F_DUPFD_CLOEXEC, F_GET_SEALS};
use super::rule::{Cond, Rule, permit};

/// The processor's only thread.
pub(super) const PSP: &[Rule] = &[
    permit!(SYS_pread64, "its own state"),
    permit!(SYS_pwrite64, "its own state"),
    permit!(SYS_fdatasync, "its own state must survive"),
    permit!(SYS_ftruncate, "its own state may shrink"),
    permit!(
        SYS_fcntl,
        [Cond::Among(1, &[F_DUPFD_CLOEXEC, F_GET_SEALS])],
        "second handles; seals of memory handed in"
    ),
];
