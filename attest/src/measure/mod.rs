//! What a description leads to: launch digests computed without any platform's help.
//!
//! ```text
//! OVMF image ─▶ Ovmf ─▶ Firmware ─────────┐
//! kernel, initrd, append ─▶ KernelHashes ─┼─▶ GuestDescription ─▶ GuestDigest
//! vCPU count, type, SEV features, VMM ────┘
//! ```

pub mod guest;
pub mod id_block;
pub mod kernel_hashes;
pub mod ovmf;
mod sev;
pub mod snp;
pub mod vcpu;
pub mod vmsa;

pub use sev::{DigestError, LaunchDigest, LaunchDigester};
