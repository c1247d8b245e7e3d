//! The filter of the mover: guest memory and connected sockets in, nothing else.

use super::common::{F_DUPFD_CLOEXEC, F_GET_SEALS, F_GETFL, F_SETFL, FIONBIO, SOL_SOCKET};
use super::rule::{Cond, Rule, permit};
use crate::userfault::{UFFDIO_COPY, UFFDIO_UNREGISTER, UFFDIO_WAKE};

/// All threads of the mover; the streams' threads inherit it.
pub(super) const MOVER: &[Rule] = &[
    permit!(SYS_recvfrom, "bytes from the peer"),
    permit!(SYS_sendto, "bytes to the peer"),
    permit!(SYS_readv, "the same, as rustls does it"),
    permit!(SYS_writev, "the same, as rustls does it"),
    permit!(SYS_shutdown, "an orderly end of a stream"),
    permit!(SYS_pread64, "pages and state out of shared memory"),
    permit!(SYS_pwrite64, "pages and state into shared memory"),
    permit!(
        SYS_fdatasync,
        "a disk that has come is on its medium before its guest runs"
    ),
    permit!(
        SYS_setsockopt,
        [
            Cond::Among(1, &[SOL_SOCKET]),
            Cond::Among(2, &[libc::SO_RCVTIMEO as u64, libc::SO_SNDTIMEO as u64])
        ],
        "every read and write has a deadline"
    ),
    permit!(
        SYS_setsockopt,
        [
            Cond::Among(1, &[libc::IPPROTO_TCP as u64]),
            Cond::Among(
                2,
                &[libc::TCP_NODELAY as u64, libc::TCP_USER_TIMEOUT as u64]
            )
        ],
        "small control frames at once; a dead peer is noticed"
    ),
    permit!(
        SYS_getsockopt,
        [
            Cond::Among(1, &[SOL_SOCKET]),
            Cond::Among(
                2,
                &[
                    libc::SO_RCVTIMEO as u64,
                    libc::SO_SNDTIMEO as u64,
                    libc::SO_ERROR as u64
                ]
            )
        ],
        "what the deadlines are; why a connection failed"
    ),
    permit!(SYS_getpeername, "the peer's address for the log"),
    permit!(SYS_getsockname, "the same of this end"),
    permit!(
        SYS_fcntl,
        [Cond::Among(
            1,
            &[F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GET_SEALS]
        )],
        "second handle of a socket for the other direction; seals of memory"
    ),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, &[FIONBIO])],
        "std's way to make a socket non-blocking"
    ),
    permit!(
        SYS_ioctl,
        [Cond::Among(
            1,
            &[UFFDIO_COPY, UFFDIO_WAKE, UFFDIO_UNREGISTER]
        )],
        "a guest restored on demand gets the pages that it waits for"
    ),
    permit!(
        SYS_madvise,
        [Cond::Among(
            2,
            &[
                libc::MADV_POPULATE_READ as u64,
                libc::MADV_POPULATE_WRITE as u64
            ]
        )],
        "guest memory is faulted in ahead of the stream"
    ),
];
