//! AMD's secure processor behind Linux: KVM's encryption commands for a guest, `/dev/sev` for the platform.
//!
//! **Not yet met silicon.** No machine with an AMD secure processor was at hand. Layouts are compared with
//! Linux 6.12's headers, and `tests/double` plays the kernel for this very code, with the software secure
//! processor behind it; what only the hardware decides (encrypted page tables, caches, the RMP) is untested.
//!
//! The VMM launches and moves SEV guests by it. SEV-ES and SEV-SNP guests are refused (`FIRMWARE_NEEDED`): stock Linux
//! needs a firmware there to start application processors and to accept memory, and kernels are booted directly; of
//! their commands only the double has seen the use.
//!
//! Numbers and rules are Linux's `include/uapi/linux/psp-sev.h`, `arch/x86/include/uapi/asm/kvm.h` and
//! `arch/x86/kvm/svm/sev.c` of 6.12, with the older INIT for kernels before 6.10.

mod code;
mod command;
mod device;
mod error;
#[cfg(test)]
mod layout;
mod sev;
mod snp;
mod structs;
mod vm;

pub use code::FirmwareCode;
pub use command::{ATTEMPTS, SevVm};
pub use device::{
    DeviceStatus, PATH as DEVICE_PATH, PlatformCertificates, SevDevice, SnpConfig, SnpStatus,
};
pub use error::SevError;
pub use sev::{GuestStatus, KvmSev, RealSev};
pub use snp::{
    RealSnp, SnpFinish, SnpIdBlock, SnpInitialised, SnpLaunching, SnpPage, SnpRefused, SnpRunning,
    SnpVm,
};
pub use structs::VLEK_WRAPPED;
pub use vm::{GuestKind, Initialise, create_vm, real_kind};
