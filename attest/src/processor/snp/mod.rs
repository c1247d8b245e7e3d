//! SEV-SNP in the software secure processor: AMD's SNP firmware commands, states and checks with
//! real cryptography, for machines that have no AMD secure processor.
//!
//! **Emulated: it protects nothing from its host.** Guest memory stays in clear; only formats,
//! keys, states and refusals are the real ones. Its root is `ARK-EMULATED`, "NOT AMD", made anew
//! for each installation, and it is in no trust store but its owner's.
//!
//! ```text
//! SnpProcessor::init ▶ gctx_create ▶ launch_start ▶ activate ▶ guest.launch_update… ▶ launch_finish
//!                                                          guest: GuestChannel ◀▶ guest_request
//! ```
//!
//! Left out, and refused where it could be asked for: migration agents, swapping pages out and in,
//! debug commands, 2 MiB pages, and the flush that must come before an ASID is used again.

mod guest;
mod id_block;
mod identity;
mod key;
mod message;
mod pages;
mod personality;
mod platform;
mod report;
mod request;
pub mod request_frame;
mod vlek;
mod x509;

#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod forge;

pub use guest::{
    LaunchPage, SnpCommand, SnpGuest, SnpGuestHandle, SnpGuestState, SnpGuestStatus, SnpLaunchStart,
};
pub use identity::{SnpCertificates, SnpIdentity, SnpIdentityError};
pub use key::EndorsementKey;
pub use message::{
    GuestChannel, KeyRequest, KeySelect, MESSAGE_HEADER_LEN, MESSAGE_MAX, MessageError, MessageType,
};
pub use pages::PageBytes;
pub use personality::{FirmwareLevel, Personality};
pub use platform::{
    DEFAULT_MAX_GUESTS, IdBlockParameters, SnpConfig, SnpLaunchFinish, SnpPlatformStatus,
    SnpProcessor,
};
pub use report::ReportFields;
pub use vlek::WRAPPED_VLEK_LEN;
pub use x509::CaKeySize;
