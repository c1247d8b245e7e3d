//! The software secure processor: AMD's SEV firmware commands, states and checks, with real
//! cryptography, for machines that have no AMD secure processor. Its SNP half is in [`snp`].
//!
//! **It protects nothing from its host.** Guest memory stays in clear; only the formats, keys,
//! states and refusals are the real ones. Its root therefore names itself `ARK-EMULATED`, is
//! made anew for each installation, and no verdict over it lacks `emulated: true`.
//!
//! Commands arrive from a VMM that is not trusted with keys: a certificate, session or packet is
//! refused with the firmware's own code, and a command in the wrong state changes nothing.

mod asid;
mod error;
mod guest;
mod identity;
mod migrate;
mod platform;
mod provision;
pub mod snp;

pub use error::FirmwareError;
pub use guest::{Command, Guest, GuestHandle, GuestState, GuestStatus};
#[cfg(test)]
pub(crate) use identity::Profile;
pub use identity::{Identity, IdentityError, OwnerAuthority};
pub use migrate::SendSession;
pub use platform::{PlatformState, PlatformStatus, ProcessorConfig, SecureProcessor};
pub use provision::{CHIP_ID_LEN, PlatformCommand};

/// Identities for unit tests, made once: RSA keys take a while.
#[cfg(test)]
pub(crate) mod testing {
    use super::Identity;
    use std::sync::LazyLock;

    static FIRST: LazyLock<Identity> = LazyLock::new(|| Identity::generate().unwrap());
    static SECOND: LazyLock<Identity> = LazyLock::new(|| Identity::generate().unwrap());

    pub(crate) fn identity() -> &'static Identity {
        &FIRST
    }

    pub(crate) fn other_identity() -> &'static Identity {
        &SECOND
    }
}
