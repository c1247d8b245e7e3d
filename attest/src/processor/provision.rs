//! Who the platform belongs to and which keys it has: PEK_GEN, PEK_CSR, PEK_CERT_IMPORT, PDH_GEN,
//! FACTORY_RESET, GET_ID. Publication 55766, chapter 5; what a command may meet is the table of
//! AMD's `sev-tool`, `src/sevapi.h`, chapter 5.1.2, and what it renews is what its tests expect.
//!
//! ```text
//! self-owned ── PEK_CSR ▶ the owner's CA signs ▶ PEK_CERT_IMPORT ── owned
//!      ▲                                                              │
//!      └──────────────── PEK_GEN, FACTORY_RESET ──────────────────────┘
//! ```
//!
//! Certificates come from whoever holds the device. The PEK that is imported has to be this
//! platform's own request, signed by the certificate beside it, which has to sign itself; that the
//! latter is the *right* owner's is not the firmware's business, but that of whoever verifies the
//! chain afterwards, and of the guest policy bit DOMAIN.

use super::platform::{PlatformState, SecureProcessor};
use super::{FirmwareError, Identity, IdentityError};
use crate::legacy::certificate::{SevCertificate, Usage};
use ring::digest;
use zeroize::Zeroizing;

/// The commands that depend on the platform's state alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the specification's command table")]
pub enum PlatformCommand {
    Init,
    Shutdown,
    FactoryReset,
    PlatformStatus,
    PekGen,
    PekCsr,
    PekCertImport,
    PdhGen,
    PdhCertExport,
    GetId,
}

impl PlatformState {
    /// Whether the specification allows `command` in this state.
    pub const fn allows(self, command: PlatformCommand) -> bool {
        use PlatformCommand::*;
        match command {
            Init | FactoryReset => matches!(self, Self::Uninit),
            PekGen | PekCsr | PekCertImport => matches!(self, Self::Init),
            Shutdown | PdhGen | PdhCertExport => !matches!(self, Self::Uninit),
            PlatformStatus | GetId => true,
        }
    }
}

impl SecureProcessor {
    /// PEK_CSR: the PEK's certificate for its owner to sign; [`OwnerAuthority::sign_pek`] does.
    ///
    /// [`OwnerAuthority::sign_pek`]: super::OwnerAuthority::sign_pek
    pub fn pek_csr(&self) -> Result<SevCertificate, FirmwareError> {
        self.require(PlatformCommand::PekCsr)?;
        Ok(self.identity.signing_request())
    }

    /// PEK_CERT_IMPORT: takes an owner, `oca`, that signed this platform's request, `pek`. There is
    /// a new PDH afterwards.
    pub fn pek_cert_import(&mut self, pek: &[u8], oca: &[u8]) -> Result<(), FirmwareError> {
        self.require(PlatformCommand::PekCertImport)?;
        if self.identity.owned() {
            return Err(FirmwareError::AlreadyOwned);
        }
        let (pek, oca) = (SevCertificate::parse(pek)?, SevCertificate::parse(oca)?);
        let request = self.identity.signing_request();
        // Stricter than a comparison of keys: what the CEK endorses is what the platform wrote.
        if oca.usage() != Usage::Oca || pek.body() != request.body() {
            return Err(FirmwareError::InvalidCertificate);
        }
        oca.verify_signed_by(&oca)?;
        pek.verify_signed_by(&oca)?;
        self.identity.adopt(&pek, &oca).map_err(failed)
    }

    /// PEK_GEN: the platform owns itself again, with a new PEK and a new PDH. Sessions that were
    /// made for the old ones fail.
    pub fn pek_gen(&mut self) -> Result<(), FirmwareError> {
        self.require(PlatformCommand::PekGen)?;
        self.identity.own_itself().map_err(failed)
    }

    /// PDH_GEN: a new PDH. Sessions that were made for the old one fail; guests go on.
    pub fn pdh_gen(&mut self) -> Result<(), FirmwareError> {
        self.require(PlatformCommand::PdhGen)?;
        self.identity.renew_pdh().map_err(failed)
    }

    /// FACTORY_RESET, also PLATFORM_RESET: forgets owner, PEK and PDH. The chip's key stays, and
    /// with it the root.
    pub fn factory_reset(&mut self) -> Result<(), FirmwareError> {
        self.require(PlatformCommand::FactoryReset)?;
        self.identity.own_itself().map_err(failed)
    }

    /// GET_ID: names the chip, whatever becomes of its other keys. One socket.
    pub fn get_id(&self) -> [u8; CHIP_ID_LEN] {
        let mut text = digest::Context::new(&digest::SHA512);
        text.update(b"casemate emulated chip");
        text.update(self.identity.chain().cek.body());
        let mut id = [0; CHIP_ID_LEN];
        id.copy_from_slice(text.finish().as_ref());
        id
    }

    /// The identity as it is now, to be kept: the commands above change it. Secret.
    pub fn identity_bytes(&self) -> Zeroizing<Vec<u8>> {
        self.identity.to_bytes()
    }

    /// Goes back to an identity that was kept, where a newer one could not be. The same chip's only.
    pub fn restore_identity(&mut self, kept: Identity) -> Result<(), IdentityError> {
        if kept.chain().cek != self.identity.chain().cek {
            return Err(IdentityError::NotKept("another chip's"));
        }
        self.identity = kept;
        Ok(())
    }
}

/// What is left when all checks have passed: signing, and that for lack of randomness.
fn failed(_: IdentityError) -> FirmwareError {
    FirmwareError::HardwarePlatform
}

/// Length of a chip's id.
pub const CHIP_ID_LEN: usize = 64;

#[cfg(test)]
mod tests {
    use super::PlatformCommand::*;
    use super::*;

    /// `sev-tool`, `src/sevapi.h`, "Allowed Platform Commands".
    #[test]
    fn the_state_table_is_the_specifications() {
        let all = [
            Init,
            Shutdown,
            FactoryReset,
            PlatformStatus,
            PekGen,
            PekCsr,
            PekCertImport,
            PdhGen,
            PdhCertExport,
            GetId,
        ];
        let allowed = |state: PlatformState| {
            let commands = all.iter().filter(|command| state.allows(**command));
            commands.copied().collect::<Vec<_>>()
        };
        assert_eq!(
            allowed(PlatformState::Uninit),
            [Init, FactoryReset, PlatformStatus, GetId]
        );
        assert_eq!(
            allowed(PlatformState::Init),
            [
                Shutdown,
                PlatformStatus,
                PekGen,
                PekCsr,
                PekCertImport,
                PdhGen,
                PdhCertExport,
                GetId
            ]
        );
        assert_eq!(
            allowed(PlatformState::Working),
            [Shutdown, PlatformStatus, PdhGen, PdhCertExport, GetId]
        );
    }
}
