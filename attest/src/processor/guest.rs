//! One guest as the firmware sees it: its state, what is allowed in it, and the launch commands.
//!
//! Lengths, headers and ciphertext come from an untrusted VMM. A refused command changes nothing.

use super::FirmwareError;
use super::identity::API;
use super::platform::BUILD;
use crate::legacy::measure::{MeasureBlob, launch_measure};
use crate::legacy::packet::{PacketCipher, PacketHeader, TransportKeys, random};
use crate::legacy::policy::{GuestPolicy, PolicyFlag};
use crate::legacy::secret::SecretPacket;
use crate::measure::{LaunchDigest, LaunchDigester};
use serde::{Deserialize, Serialize};

/// Names a guest to the firmware. Never zero, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GuestHandle(pub u32);

/// A guest's state. UNINIT guests have no handle yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum GuestState {
    /// Not started.
    Uninit = 0,
    /// Being loaded and measured.
    LUpdate = 1,
    /// Measured, waiting for secrets.
    LSecret = 2,
    /// Running.
    Running = 3,
    /// Its pages are being sent.
    SUpdate = 4,
    /// Its pages are being received.
    RUpdate = 5,
    /// Handed over; only its end is left.
    Sent = 6,
}

/// The commands that depend on a guest's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the specification's command table")]
pub enum Command {
    LaunchStart,
    LaunchUpdateData,
    LaunchUpdateVmsa,
    LaunchMeasure,
    LaunchSecret,
    LaunchFinish,
    AttestationReport,
    SendStart,
    SendUpdateData,
    SendFinish,
    SendCancel,
    ReceiveStart,
    ReceiveUpdateData,
    ReceiveFinish,
    Activate,
    Deactivate,
    GuestStatus,
    Decommission,
}

/// What GUEST_STATUS says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// The guest.
    pub handle: GuestHandle,
    /// Its policy.
    pub policy: GuestPolicy,
    /// Its state.
    pub state: GuestState,
    /// Its ASID, while it is active.
    pub asid: Option<u32>,
}

/// One guest and its keys, which nobody else can read.
pub struct Guest {
    pub(super) handle: GuestHandle,
    pub(super) policy: GuestPolicy,
    pub(super) state: GuestState,
    pub(super) asid: Option<u32>,
    /// The session it was launched or received with.
    pub(super) session: PacketCipher,
    /// The session it is being sent with.
    pub(super) outgoing: Option<PacketCipher>,
    digester: LaunchDigester,
    measure: Option<[u8; 32]>,
}

impl GuestState {
    /// Whether the specification allows `command` in this state.
    pub const fn allows(self, command: Command) -> bool {
        use Command::*;
        match command {
            LaunchStart | ReceiveStart => matches!(self, Self::Uninit),
            LaunchUpdateData | LaunchUpdateVmsa | LaunchMeasure => matches!(self, Self::LUpdate),
            LaunchSecret | LaunchFinish => matches!(self, Self::LSecret),
            SendStart | AttestationReport => matches!(self, Self::Running),
            SendUpdateData | SendFinish | SendCancel => matches!(self, Self::SUpdate),
            ReceiveUpdateData | ReceiveFinish => matches!(self, Self::RUpdate),
            Activate | Deactivate | GuestStatus => !matches!(self, Self::Uninit | Self::Sent),
            Decommission => !matches!(self, Self::Uninit),
        }
    }
}

impl Guest {
    pub(super) fn new(
        handle: GuestHandle,
        policy: GuestPolicy,
        state: GuestState,
        keys: &TransportKeys,
    ) -> Self {
        Self {
            handle,
            policy,
            state,
            asid: None,
            session: PacketCipher::new(keys),
            outgoing: None,
            digester: LaunchDigester::new(),
            measure: None,
        }
    }

    /// GUEST_STATUS.
    pub fn status(&self) -> Result<GuestStatus, FirmwareError> {
        self.require(Command::GuestStatus)?;
        Ok(GuestStatus {
            handle: self.handle,
            policy: self.policy,
            state: self.state,
            asid: self.asid,
        })
    }

    /// LAUNCH_UPDATE_DATA: measures `data`, a multiple of 16 bytes, as the guest's next memory.
    pub fn launch_update_data(&mut self, data: &[u8]) -> Result<(), FirmwareError> {
        self.require_active(Command::LaunchUpdateData)?;
        whole_blocks(data.len(), u32::MAX as usize)?;
        self.digester.update(data);
        Ok(())
    }

    /// LAUNCH_UPDATE_VMSA: measures one vCPU's save area, a page of a SEV-ES guest, as what comes next.
    pub fn launch_update_vmsa(&mut self, vmsa: &[u8]) -> Result<(), FirmwareError> {
        self.require_active(Command::LaunchUpdateVmsa)?;
        if !self.policy.has(PolicyFlag::EncryptedState) {
            return Err(FirmwareError::Unsupported);
        }
        if vmsa.len() != VMSA {
            return Err(FirmwareError::InvalidLength {
                needed: VMSA as u32,
            });
        }
        self.digester.update(vmsa);
        Ok(())
    }

    /// LAUNCH_MEASURE: closes the loading and proves what was loaded.
    pub fn launch_measure(&mut self) -> Result<MeasureBlob, FirmwareError> {
        self.require(Command::LaunchMeasure)?;
        let mut mnonce = [0; 16];
        random(&mut mnonce)?;
        let digest = self.digester.clone().finish();
        let measure = launch_measure(
            self.session.integrity(),
            API,
            BUILD,
            self.policy,
            &digest,
            &mnonce,
        );
        self.measure = Some(measure);
        self.state = GuestState::LSecret;
        Ok(MeasureBlob { measure, mnonce })
    }

    /// LAUNCH_SECRET: checks the owner's packet and writes the secret over `memory`, which is
    /// exactly as long.
    pub fn launch_secret(
        &mut self,
        header: &PacketHeader,
        ciphertext: &[u8],
        memory: &mut [u8],
    ) -> Result<(), FirmwareError> {
        self.require_active(Command::LaunchSecret)?;
        let measure = self.measure.ok_or(FirmwareError::InvalidGuestState)?;
        if memory.len() != ciphertext.len() {
            let needed = u32::try_from(ciphertext.len()).unwrap_or(u32::MAX);
            return Err(FirmwareError::InvalidLength { needed });
        }
        let secret = SecretPacket::open(&self.session, &measure, header, ciphertext)?;
        memory.copy_from_slice(&secret);
        Ok(())
    }

    /// LAUNCH_FINISH: the guest may run.
    pub fn launch_finish(&mut self) -> Result<(), FirmwareError> {
        self.require(Command::LaunchFinish)?;
        self.state = GuestState::Running;
        Ok(())
    }

    /// What ATTESTATION_REPORT signs. Only a guest that was launched here has a digest: what
    /// another platform measured is not carried along.
    pub(super) fn measured_digest(&self) -> Result<LaunchDigest, FirmwareError> {
        self.require(Command::AttestationReport)?;
        self.measure.ok_or(FirmwareError::InvalidGuestState)?;
        Ok(self.digester.clone().finish())
    }

    pub(super) fn require(&self, command: Command) -> Result<(), FirmwareError> {
        if self.state.allows(command) {
            Ok(())
        } else {
            Err(FirmwareError::InvalidGuestState)
        }
    }

    /// For commands that touch guest memory, and so need the guest's key in the controller.
    pub(super) fn require_active(&self, command: Command) -> Result<(), FirmwareError> {
        self.require(command)?;
        self.asid.map(|_| ()).ok_or(FirmwareError::Inactive)
    }
}

/// Firmware works on whole AES blocks, at least one.
pub(super) fn whole_blocks(len: usize, most: usize) -> Result<(), FirmwareError> {
    if len == 0 || len > most || !len.is_multiple_of(16) {
        let needed = len
            .min(most)
            .max(1)
            .div_ceil(16)
            .saturating_mul(16)
            .min(most);
        let needed = u32::try_from(needed).unwrap_or(u32::MAX);
        return Err(FirmwareError::InvalidLength { needed });
    }
    Ok(())
}

/// A save area fills a page.
const VMSA: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of `sevapi.h`, written the other way round from `allows`.
    #[test]
    fn each_state_allows_exactly_its_commands() {
        use Command::*;
        let always = [Activate, Deactivate, GuestStatus, Decommission];
        let table: [(GuestState, Vec<Command>); 7] = [
            (GuestState::Uninit, vec![LaunchStart, ReceiveStart]),
            (
                GuestState::LUpdate,
                [
                    vec![LaunchUpdateData, LaunchUpdateVmsa, LaunchMeasure],
                    always.into(),
                ]
                .concat(),
            ),
            (
                GuestState::LSecret,
                [vec![LaunchSecret, LaunchFinish], always.into()].concat(),
            ),
            (
                GuestState::Running,
                [vec![SendStart, AttestationReport], always.into()].concat(),
            ),
            (
                GuestState::SUpdate,
                [vec![SendUpdateData, SendFinish, SendCancel], always.into()].concat(),
            ),
            (
                GuestState::RUpdate,
                [vec![ReceiveUpdateData, ReceiveFinish], always.into()].concat(),
            ),
            (GuestState::Sent, vec![Decommission]),
        ];
        let commands = [
            LaunchStart,
            LaunchUpdateData,
            LaunchUpdateVmsa,
            LaunchMeasure,
            LaunchSecret,
            LaunchFinish,
            AttestationReport,
            SendStart,
            SendUpdateData,
            SendFinish,
            SendCancel,
            ReceiveStart,
            ReceiveUpdateData,
            ReceiveFinish,
            Activate,
            Deactivate,
            GuestStatus,
            Decommission,
        ];
        for (state, allowed) in table {
            for command in commands {
                assert_eq!(
                    state.allows(command),
                    allowed.contains(&command),
                    "{state:?} {command:?}"
                );
            }
        }
    }

    #[test]
    fn lengths_are_whole_blocks_and_the_error_says_which() {
        assert_eq!(whole_blocks(4096, 4096), Ok(()));
        for (len, needed) in [(0, 16), (1, 16), (17, 32), (4095, 4096), (4112, 4096)] {
            assert_eq!(
                whole_blocks(len, 4096),
                Err(FirmwareError::InvalidLength { needed })
            );
        }
    }
}
