//! The filters of the VMM: control thread, vCPU threads, device thread.

use super::common::{
    F_ADD_SEALS, F_DUPFD_CLOEXEC, F_GET_SEALS, F_GETFL, F_OFD_GETLK, F_OFD_SETLK, F_SETFL, FIONBIO,
};
use super::kvm;
use super::rule::{Cond, Rule, permit};

/// Control thread: the agent's and the mover's requests, save and restore.
pub(super) const CONTROL: &[Rule] = &[
    permit!(
        SYS_ioctl,
        [Cond::Among(1, kvm::VM_STATE)],
        "state of the interrupt controllers and clock"
    ),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, kvm::VM_MEMORY)],
        "dirty log, and switching it on per slot"
    ),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, kvm::VM_INTERRUPTS)],
        "interrupt routes of restored devices"
    ),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, kvm::SEV_GUEST)],
        "a SEV guest is launched, sent and received"
    ),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, kvm::SEV_PLATFORM)],
        "API version and certificates of the platform, for its owner and for a source"
    ),
    permit!(
        SYS_madvise,
        [Cond::Among(2, &[HUGEPAGE, POPULATE_READ, POPULATE_WRITE])],
        "guest memory is prepared at once, in huge pages"
    ),
    permit!(
        SYS_fcntl,
        [Cond::Among(1, &[F_ADD_SEALS])],
        "guest memory is sealed against writing before a mover gets it"
    ),
    permit!(
        SYS_eventfd2,
        [Cond::Among(0, &[0]), Cond::Among(1, &[EFD_NONBLOCK])],
        "a device that is attached: its queues' notifications and its interrupts"
    ),
    permit!(
        SYS_timerfd_create,
        [
            Cond::Among(0, &[CLOCK_MONOTONIC]),
            Cond::Among(1, &[TFD_FLAGS])
        ],
        "a device that is attached: the timer of its limits"
    ),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, &[TUNSETVNETHDRSZ])],
        "a card that is attached: the header before its tap's frames"
    ),
];

/// What a device does with what was opened for it: tap, disk, vsock connections. The device thread does it, and
/// the control thread while that one is stopped.
pub(super) const DEVICE_IO: &[Rule] = &[
    permit!(SYS_readv, "tap: a frame; disk"),
    permit!(SYS_writev, "tap: a frame; disk"),
    permit!(SYS_pread64, "disk; kernel and initramfs"),
    permit!(SYS_pwrite64, "disk"),
    permit!(SYS_preadv, "disk"),
    permit!(SYS_pwritev, "disk"),
    permit!(SYS_preadv2, "disk"),
    permit!(SYS_pwritev2, "disk"),
    permit!(SYS_fdatasync, "disk: flush that means it"),
    permit!(SYS_fsync, "disk: flush after a change of size"),
    permit!(
        SYS_fallocate,
        "disk: discard and write-zeroes; balloon: pages back to the host"
    ),
    permit!(
        SYS_fcntl,
        [Cond::Among(1, &[F_OFD_SETLK, F_OFD_GETLK])],
        "the disk's lock: given up and taken over in a move"
    ),
    permit!(
        SYS_fcntl,
        [Cond::Among(
            1,
            &[F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GET_SEALS]
        )],
        "non-blocking descriptors, second handles, seals of memory"
    ),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, &[FIONBIO])],
        "std's way to make a socket non-blocking"
    ),
    permit!(
        SYS_io_uring_enter,
        [Cond::Ring(0), Cond::Among(3, &[0, ENTER_GETEVENTS])],
        "disk: requests, through a ring that does READV, WRITEV, FSYNC and FALLOCATE on its image and nothing else"
    ),
    permit!(SYS_accept4, "vsock, console: a host program connects"),
    permit!(
        SYS_recvfrom,
        "vsock: bytes from a host program; the secure processor's replies to the guest"
    ),
    permit!(
        SYS_sendto,
        "vsock: bytes to a host program; the guest's requests to the secure processor"
    ),
    permit!(SYS_shutdown, "vsock: half-closed connections"),
    permit!(SYS_epoll_ctl, "descriptors come and go with connections"),
    permit!(
        SYS_epoll_wait,
        "the device thread's loop; vsock looks at its own set"
    ),
    permit!(SYS_epoll_pwait, "the same, as newer libraries do it"),
    permit!(SYS_timerfd_settime, "rate limits: when a device may go on"),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, &[TUNSETOFFLOAD])],
        "tap: what of a frame's work the guest's driver does itself, at its start and reset"
    ),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, &[TUNSETQUEUE])],
        "tap: which of its queues get frames, as the guest's driver asks"
    ),
];

/// Device thread: waits, besides [`DEVICE_IO`].
pub(super) const DEVICE: &[Rule] = &[
    permit!(SYS_poll, "waiting for one descriptor"),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, kvm::VM_INTERRUPTS)],
        "interrupts of the devices"
    ),
];

/// vCPU threads: the guest runs here, so next to nothing else does.
pub(super) const VCPU: &[Rule] = &[
    permit!(SYS_ioctl, [Cond::Among(1, kvm::VCPU_RUN)], "the guest runs"),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, kvm::VCPU_STATE)],
        "state of a stopped vCPU, saved and restored"
    ),
    permit!(
        SYS_ioctl,
        [Cond::Among(1, kvm::VM_INTERRUPTS)],
        "the guest programs MSI-X and queues by MMIO, which ends here"
    ),
];

/// `_IOW('T', 208, unsigned int)`.
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETQUEUE: u64 = 0x4004_54d9;
/// `IORING_ENTER_GETEVENTS`.
const ENTER_GETEVENTS: u64 = 1;
/// `_IOW('T', 216, int)`.
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const EFD_NONBLOCK: u64 = libc::EFD_NONBLOCK as u64;
const CLOCK_MONOTONIC: u64 = libc::CLOCK_MONOTONIC as u64;
const TFD_FLAGS: u64 = (libc::TFD_NONBLOCK | libc::TFD_CLOEXEC) as u64;
const HUGEPAGE: u64 = libc::MADV_HUGEPAGE as u64;
const POPULATE_READ: u64 = libc::MADV_POPULATE_READ as u64;
const POPULATE_WRITE: u64 = libc::MADV_POPULATE_WRITE as u64;
