//! Plays the kernel for a child process, so that the real SEV ioctl code runs where there is no AMD processor.
//!
//! The child runs under a seccomp filter that sends its `open("/dev/sev")` and its SEV ioctls here
//! (`SECCOMP_RET_USER_NOTIF`), everything else goes to the real kernel, real `/dev/kvm` included. What arrives
//! is checked as Linux 6.12's `arch/x86/kvm/svm/sev.c` and `drivers/crypto/ccp/sev-dev.c` check it (order,
//! lengths, addresses, pinned memory, the descriptor of `/dev/sev`), and where they do not look (padding), a
//! fault is a [complaint](Double::finish). Then the software secure processor of `casemate-attest` carries it
//! out on the child's memory. `KVM_CREATE_VM` passes its type by value, so that ptrace rewrites SEV types to the
//! default one (`SECCOMP_RET_TRACE`).
//!
//! What it is not: guest memory stays in clear, registers of a SEV-ES guest are not taken away from the VMM, and
//! the save areas that are measured are the double's own pages, not what Linux would build from the vCPUs.

mod child;
mod error;
mod filter;
mod kernel;
mod memory;
mod script;
mod sys;
mod tracer;

pub mod protocol;
pub mod relay;

pub use child::{Config, Double, Snp};
pub use error::DoubleError;
pub use kernel::vmsa;
pub use script::Fault;
