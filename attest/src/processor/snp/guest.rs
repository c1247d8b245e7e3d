//! One SNP guest as the firmware sees it: its context (GCTX), its launch, its keys.
//! Publication 56860, chapter "Launch".
//!
//! Pages, blocks and messages come from an untrusted VMM. A refused command changes nothing, but
//! for a CPUID page, which comes back corrected.

use super::super::FirmwareError;
use super::id_block::GuestIdentity;
use super::message::MessageKey;
use super::pages::{PageBytes, SecretsPage, check_cpuid};
use crate::measure::snp::{PageInfo, PageType, SnpLaunchDigester};
use crate::report::SnpPolicy;
use crate::tcb::RawTcb;
use rand_core::{OsRng, RngCore as _};
use ring::digest::{SHA384, digest};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// Names a guest context to the firmware, in the place of its page's address. Never zero, never
/// used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnpGuestHandle(pub u32);

/// A guest context's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum SnpGuestState {
    /// Created, not started.
    Init = 0,
    /// Being loaded and measured.
    Launch = 1,
    /// Running.
    Running = 2,
}

/// The commands that depend on a guest's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the specification")]
pub enum SnpCommand {
    LaunchStart,
    LaunchUpdate,
    LaunchFinish,
    Activate,
    GuestRequest,
    GuestStatus,
    Decommission,
}

/// What LAUNCH_START is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnpLaunchStart {
    /// What the guest's owner allows.
    pub policy: SnpPolicy,
    /// The guest's TSC frequency in kHz; 0 for the platform's own.
    pub desired_tsc_khz: u32,
    /// Guest OS visible workarounds, handed on in the secrets page.
    pub gosvw: [u8; 16],
}

/// What LAUNCH_UPDATE is given, beside the page itself. Pages are 4 KiB: KVM launches no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchPage {
    /// What to do with the page.
    pub page_type: PageType,
    /// Where it lies in the guest, as the reverse map says.
    pub gpa: u64,
    /// Whether it belongs to an initial migration image; refused, there are none.
    pub imi: bool,
    /// What VMPL 1, 2 and 3 may do with it.
    pub vmpl_permissions: [u8; 3],
}

/// What GUEST_STATUS says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnpGuestStatus {
    /// The guest.
    pub handle: SnpGuestHandle,
    /// Its state.
    pub state: SnpGuestState,
    /// Its policy; 0 before it is started.
    pub policy: SnpPolicy,
    /// Its ASID, once it is active.
    pub asid: Option<u32>,
    /// Its TSC frequency in kHz.
    pub desired_tsc_khz: u32,
    /// Whether its reports may not be signed with the VCEK.
    pub vcek_disabled: bool,
}

/// One guest context and its keys, which nobody else can read.
pub struct SnpGuest {
    pub(super) handle: SnpGuestHandle,
    pub(super) state: SnpGuestState,
    pub(super) asid: Option<u32>,
    pub(super) start: SnpLaunchStart,
    pub(super) digester: SnpLaunchDigester,
    pub(super) secrets: Option<GuestSecrets>,
    pub(super) identity: GuestIdentity,
    pub(super) host_data: [u8; 32],
    pub(super) vcek_disabled: bool,
    pub(super) launch_tcb: RawTcb,
    pub(super) launch_mitigations: u64,
    /// CPUID function 1, EAX.
    fms: u32,
}

/// What is drawn at LAUNCH_START.
pub(super) struct GuestSecrets {
    pub(super) report_id: [u8; 32],
    /// The VM root key, for derived keys that die with the guest.
    pub(super) vmrk: Zeroizing<[u8; 32]>,
    vmpcks: Zeroizing<[[u8; 32]; 4]>,
    /// How many messages went back and forth under each VMPCK.
    pub(super) counts: [u64; 4],
}

impl SnpGuestState {
    /// Whether the specification allows `command` in this state.
    pub const fn allows(self, command: SnpCommand) -> bool {
        use SnpCommand::*;
        match command {
            LaunchStart => matches!(self, Self::Init),
            LaunchUpdate | LaunchFinish => matches!(self, Self::Launch),
            Activate => matches!(self, Self::Launch | Self::Running),
            GuestRequest => matches!(self, Self::Running),
            GuestStatus | Decommission => true,
        }
    }
}

impl SnpGuest {
    pub(super) fn new(handle: SnpGuestHandle, fms: u32) -> Self {
        Self {
            handle,
            state: SnpGuestState::Init,
            asid: None,
            start: SnpLaunchStart {
                policy: SnpPolicy(0),
                desired_tsc_khz: 0,
                gosvw: [0; 16],
            },
            digester: SnpLaunchDigester::new(),
            secrets: None,
            identity: GuestIdentity::NONE,
            host_data: [0; 32],
            vcek_disabled: false,
            launch_tcb: RawTcb([0; 8]),
            launch_mitigations: 0,
            fms,
        }
    }

    /// GUEST_STATUS.
    pub fn status(&self) -> SnpGuestStatus {
        SnpGuestStatus {
            handle: self.handle,
            state: self.state,
            policy: self.start.policy,
            asid: self.asid,
            desired_tsc_khz: self.start.desired_tsc_khz,
            vcek_disabled: self.vcek_disabled,
        }
    }

    /// LAUNCH_UPDATE: takes one page into the guest and its digest. A ZERO page is cleared, a
    /// SECRETS page filled; a CPUID page with features that no guest may have is corrected and
    /// refused, and may then be given again.
    pub fn launch_update(
        &mut self,
        page: LaunchPage,
        contents: &mut PageBytes,
    ) -> Result<(), FirmwareError> {
        self.require(SnpCommand::LaunchUpdate)?;
        let secrets = self.secrets.as_ref();
        let secrets = secrets.ok_or(FirmwareError::InvalidGuestState)?;
        self.asid.ok_or(FirmwareError::Inactive)?;
        if page.imi {
            return Err(FirmwareError::InvalidParam);
        }
        if !page.gpa.is_multiple_of(contents.len() as u64) || page.gpa >> GPA_BITS != 0 {
            return Err(FirmwareError::InvalidAddress);
        }
        let measured = match page.page_type {
            PageType::Normal | PageType::Vmsa => sha384(contents),
            PageType::Zero => {
                contents.fill(0);
                UNMEASURED
            }
            PageType::Unmeasured => UNMEASURED,
            PageType::Secrets => {
                let filled = SecretsPage {
                    fms: self.fms,
                    gosvw: &self.start.gosvw,
                    vmpcks: &secrets.vmpcks,
                };
                filled.fill(contents);
                UNMEASURED
            }
            PageType::Cpuid => {
                check_cpuid(contents)?;
                UNMEASURED
            }
        };
        self.digester.update(&PageInfo {
            contents: measured,
            page_type: page.page_type,
            imi: false,
            vmpl_permissions: page.vmpl_permissions,
            gpa: page.gpa,
        });
        Ok(())
    }

    pub(super) fn require(&self, command: SnpCommand) -> Result<(), FirmwareError> {
        if self.state.allows(command) {
            Ok(())
        } else {
            Err(FirmwareError::InvalidGuestState)
        }
    }
}

impl LaunchPage {
    /// A page as KVM launches it: no migration image, no permissions for lower privilege levels.
    pub const fn new(page_type: PageType, gpa: u64) -> Self {
        Self {
            page_type,
            gpa,
            imi: false,
            vmpl_permissions: [0; 3],
        }
    }
}

impl GuestSecrets {
    pub(super) fn draw() -> Result<Self, FirmwareError> {
        let mut secrets = Self {
            report_id: [0; 32],
            vmrk: Zeroizing::new([0; 32]),
            vmpcks: Zeroizing::new([[0; 32]; 4]),
            counts: [0; 4],
        };
        let keys = secrets.vmpcks.iter_mut();
        for bytes in keys.chain([&mut *secrets.vmrk, &mut secrets.report_id]) {
            OsRng
                .try_fill_bytes(bytes)
                .map_err(|_| FirmwareError::HardwarePlatform)?;
        }
        Ok(secrets)
    }

    /// A VMPCK; its index is at most 3.
    pub(super) fn message_key(&self, vmpck: u8) -> Result<MessageKey, FirmwareError> {
        let key = self.vmpcks.get(usize::from(vmpck));
        MessageKey::new(key.ok_or(FirmwareError::InvalidParam)?)
    }
}

fn sha384(bytes: &[u8]) -> [u8; 48] {
    let mut hash = [0; 48];
    hash.copy_from_slice(digest(&SHA384, bytes).as_ref());
    hash
}

const UNMEASURED: [u8; 48] = [0; 48];
/// The width of a guest physical address.
const GPA_BITS: u32 = 52;

#[cfg(test)]
mod tests {
    use super::*;

    /// Written the other way round from `allows`.
    #[test]
    fn each_state_allows_exactly_its_commands() {
        use SnpCommand::*;
        let always = vec![GuestStatus, Decommission];
        let table = [
            (SnpGuestState::Init, vec![LaunchStart]),
            (
                SnpGuestState::Launch,
                vec![LaunchUpdate, LaunchFinish, Activate],
            ),
            (SnpGuestState::Running, vec![Activate, GuestRequest]),
        ];
        for (state, allowed) in table {
            let allowed = [allowed, always.clone()].concat();
            for command in [
                LaunchStart,
                LaunchUpdate,
                LaunchFinish,
                Activate,
                GuestRequest,
                GuestStatus,
                Decommission,
            ] {
                let expected = allowed.contains(&command);
                assert_eq!(state.allows(command), expected, "{state:?} {command:?}");
            }
        }
    }
}
