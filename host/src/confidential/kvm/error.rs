//! Why Linux or the secure processor refused a command, with the remedy.

use nix::errno::Errno;

use super::code::FirmwareCode;
use crate::confidential::shared::SharedError;
use crate::vmm::protocol::RoleError;

/// A command that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum SevError {
    /// The firmware said no.
    #[error("{command} refused by the secure processor, {code}")]
    Firmware {
        /// The command, as the specification names it.
        command: &'static str,
        /// The firmware's code.
        code: FirmwareCode,
    },
    /// The kernel said no before or instead of the firmware.
    #[error("{command} refused by the kernel ({errno}): {}", remedy(*errno))]
    Kernel {
        /// The command, as the specification names it.
        command: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// Put off over and over.
    #[error(
        "{command} was put off or interrupted {times} times ({errno}); the secure processor is busy with other \
         guests' commands, try again later"
    )]
    Busy {
        /// The command, as the specification names it.
        command: &'static str,
        /// The last error.
        errno: Errno,
        /// How often it was tried.
        times: u32,
    },
    /// Refused because guests run.
    #[error(
        "{command} refused by the kernel: the secure processor holds confidential guests; end them first"
    )]
    GuestsRunning {
        /// The command, as the specification names it.
        command: &'static str,
    },
    /// The kernel answered with something it must not.
    #[error("{command}: the kernel's answer has no sense ({what}); update the kernel")]
    Answer {
        /// The command, as the specification names it.
        command: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// Asked for what no kernel does.
    #[error("{0}")]
    Unsupported(&'static str),
    /// A parameter that is wrong whatever the machine.
    #[error("{0}")]
    Request(String),
    /// An address outside the guest's memory.
    #[error(transparent)]
    Memory(#[from] SharedError),
}

impl SevError {
    /// Stable code: the firmware's own name where the firmware refused.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Firmware { code, .. } => code.name(),
            Self::Kernel { errno, .. } => kernel_code(*errno),
            Self::Busy { .. } => "SEV_BUSY",
            Self::GuestsRunning { .. } => "GUESTS_RUNNING",
            Self::Answer { .. } => "SEV_KERNEL_ANSWER",
            Self::Unsupported(_) => "SEV_NOT_SUPPORTED",
            Self::Request(_) => "BAD_REQUEST",
            Self::Memory(_) => "BAD_MEMORY",
        }
    }
}

impl From<SevError> for RoleError {
    fn from(error: SevError) -> Self {
        Self::new(error.code(), &error)
    }
}

fn kernel_code(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOTTY | Errno::ENODEV => "SEV_NOT_AVAILABLE",
        Errno::EBADF => "SEV_BAD_DEVICE",
        Errno::EBUSY => "SEV_NO_ASID",
        Errno::ENOMEM => "SEV_MEMORY_LOCK",
        Errno::ETIMEDOUT => "SEV_DEAD",
        _ => "SEV_REFUSED",
    }
}

/// What an errno of these ioctls means, after `arch/x86/kvm/svm/sev.c` and `drivers/crypto/ccp/sev-dev.c` of 6.12.
fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOTTY => {
            "SEV is off here, or this machine is of another kind; enable it in the BIOS settings and with \
             kvm_amd.sev=1 (sev_es=1, sev_snp=1), see `casemate doctor`"
        }
        Errno::ENODEV => "there is no AMD secure processor, or the ccp module is not loaded",
        Errno::EBADF => "the descriptor handed in is not /dev/sev",
        Errno::EBUSY => {
            "no ASID is free; end a confidential guest, or give this kind more ASIDs in the BIOS settings"
        }
        Errno::ENOMEM => {
            "guest memory could not be pinned; raise RLIMIT_MEMLOCK of the VMM to the guest's memory and more"
        }
        Errno::EFAULT => "an address is not mapped; report this as a fault of casemate",
        Errno::EPERM => {
            "/dev/sev is open without write permission, or the command is none for an SNP guest"
        }
        Errno::ETIMEDOUT => {
            "the secure processor does not answer any more; restart the host, its guests' keys are lost"
        }
        Errno::EIO => "the secure processor failed without a code; see the kernel's log for ccp",
        Errno::EINVAL => {
            "a parameter or the order of commands is wrong for this kernel, or it is older than 6.11; see \
             `casemate doctor`"
        }
        Errno::EEXIST => "a page was given to the guest before; launch it anew",
        _ => "see the kernel's log",
    }
}
