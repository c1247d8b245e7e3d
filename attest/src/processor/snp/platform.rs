//! The platform: its firmware levels, its configuration, its guests and their ASIDs.

use super::super::{FirmwareError, PlatformState, asid};
use super::guest::{
    GuestSecrets, SnpCommand, SnpGuest, SnpGuestHandle, SnpGuestState, SnpLaunchStart,
};
use super::id_block::GuestIdentity;
use super::key::EndorsementKey;
use super::personality::{FirmwareLevel, Personality};
use super::{SnpIdentity, SnpIdentityError};
use crate::bytes;
use crate::measure::id_block::{ID_AUTH_LEN, ID_BLOCK_LEN};
use crate::measure::snp::SnpLaunchDigest;
use crate::report::{FirmwareVersion, PlatformBit, SigningKey, SnpPolicy, SnpPolicyBit};
use crate::tcb::{RawTcb, TcbVersion};
use std::collections::BTreeMap;

/// What CONFIG sets. Publication 56860, SNP_CONFIG.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnpConfig {
    /// The TCB version that reports show and endorsement keys are derived for: at most the
    /// committed one. All zero for the committed one.
    pub reported_tcb: RawTcb,
    /// Reports do not show the chip's identity.
    pub mask_chip_id: bool,
    /// Reports are not signed with the VCEK.
    pub mask_chip_key: bool,
}

/// What LAUNCH_FINISH is given.
#[derive(Debug, Clone, Copy)]
pub struct SnpLaunchFinish<'a> {
    /// The owner's ID block and its authentication.
    pub id: Option<IdBlockParameters<'a>>,
    /// What the host binds to the launch; reports show it.
    pub host_data: [u8; 32],
    /// Reports may not be signed with the VCEK.
    pub vcek_disabled: bool,
}

/// An ID block with its authentication.
#[derive(Debug, Clone, Copy)]
pub struct IdBlockParameters<'a> {
    /// What should have been launched.
    pub block: &'a [u8; ID_BLOCK_LEN],
    /// Keys and signatures.
    pub auth: &'a [u8; ID_AUTH_LEN],
    /// Whether the author key is checked and reported.
    pub author_key_en: bool,
}

/// What PLATFORM_STATUS says. Publication 56860, SNP_PLATFORM_STATUS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnpPlatformStatus {
    /// Uninitialised, or initialised.
    pub state: PlatformState,
    /// The current firmware.
    pub firmware: FirmwareVersion,
    /// The current TCB version.
    pub current_tcb: RawTcb,
    /// The reported one.
    pub reported_tcb: RawTcb,
    /// As configured.
    pub mask_chip_id: bool,
    /// As configured.
    pub mask_chip_key: bool,
    /// Whether a VLEK is loaded.
    pub vlek_loaded: bool,
    /// How many guest contexts there are.
    pub guest_count: u32,
    /// Always true: this is no AMD secure processor.
    pub emulated: bool,
}

/// The software secure processor's SNP half.
pub struct SnpProcessor {
    pub(super) identity: SnpIdentity,
    pub(super) personality: Personality,
    pub(super) chip_id: [u8; 64],
    pub(super) current: FirmwareLevel,
    pub(super) committed: FirmwareLevel,
    pub(super) reported: TcbVersion,
    pub(super) mask_chip_id: bool,
    pub(super) mask_chip_key: bool,
    /// The provider of the loaded VLEK.
    pub(super) csp_id: Option<String>,
    max_guests: u32,
    initialised: bool,
    vcek: Option<EndorsementKey>,
    vlek: Option<EndorsementKey>,
    guests: BTreeMap<SnpGuestHandle, SnpGuest>,
    last_handle: u32,
}

/// The highest ASID, and the most guests, of a platform made by [`SnpProcessor::new`].
pub const DEFAULT_MAX_GUESTS: u32 = 64;

impl SnpProcessor {
    /// A platform in the state UNINIT that passes itself off as `personality`. Its firmware is
    /// committed and reported as it is.
    pub fn new(identity: SnpIdentity, personality: Personality) -> Result<Self, SnpIdentityError> {
        let firmware = personality.firmware;
        let product = personality.product;
        if firmware.tcb.to_raw(product).is_none() {
            let tcb = firmware.tcb;
            return Err(SnpIdentityError::Tcb { tcb, product });
        }
        Ok(Self {
            chip_id: identity.chip_id(product)?,
            identity,
            personality,
            current: firmware,
            committed: firmware,
            reported: firmware.tcb,
            mask_chip_id: false,
            mask_chip_key: false,
            csp_id: None,
            max_guests: DEFAULT_MAX_GUESTS,
            initialised: false,
            vcek: None,
            vlek: None,
            guests: BTreeMap::new(),
            last_handle: 0,
        })
    }

    /// The same with another limit of guests and ASIDs.
    #[must_use]
    pub fn with_max_guests(mut self, max_guests: u32) -> Self {
        self.max_guests = max_guests;
        self
    }

    /// Its root, intermediates and secrets.
    pub fn identity(&self) -> &SnpIdentity {
        &self.identity
    }

    /// What it passes itself off as.
    pub fn personality(&self) -> &Personality {
        &self.personality
    }

    /// GET_ID: the chip's identity, zeros behind it where it is shorter.
    pub fn chip_id(&self) -> &[u8; 64] {
        &self.chip_id
    }

    /// INIT.
    pub fn init(&mut self) -> Result<(), FirmwareError> {
        if self.initialised {
            return Err(FirmwareError::InvalidPlatformState);
        }
        self.initialised = true;
        Ok(())
    }

    /// SHUTDOWN: forgets all guests, the VLEK and the configuration. The committed firmware and
    /// used handles stay.
    pub fn shutdown(&mut self) {
        self.guests.clear();
        self.initialised = false;
        self.csp_id = None;
        self.mask_chip_id = false;
        self.mask_chip_key = false;
        self.report_tcb(self.committed.tcb);
    }

    /// PLATFORM_STATUS.
    pub fn status(&self) -> SnpPlatformStatus {
        SnpPlatformStatus {
            state: match self.initialised {
                false => PlatformState::Uninit,
                true => PlatformState::Init,
            },
            firmware: self.current.version,
            current_tcb: self.personality.raw(self.current.tcb),
            reported_tcb: self.personality.raw(self.reported),
            mask_chip_id: self.mask_chip_id,
            mask_chip_key: self.mask_chip_key,
            vlek_loaded: self.csp_id.is_some(),
            guest_count: u32::try_from(self.guests.len()).unwrap_or(u32::MAX),
            emulated: true,
        }
    }

    /// CONFIG.
    pub fn configure(&mut self, config: &SnpConfig) -> Result<(), FirmwareError> {
        self.require_init()?;
        let reported = match config.reported_tcb {
            RawTcb([0, 0, 0, 0, 0, 0, 0, 0]) => self.committed.tcb,
            raw => self.tcb_of(raw)?,
        };
        if !self.committed.tcb.shortfalls(&reported).is_empty() {
            return Err(FirmwareError::InvalidParam);
        }
        self.mask_chip_id = config.mask_chip_id;
        self.mask_chip_key = config.mask_chip_key;
        self.report_tcb(reported);
        Ok(())
    }

    /// DOWNLOAD_FIRMWARE: other firmware from now on, not below what is committed. It stays
    /// provisional until [`commit`](Self::commit).
    pub fn install_firmware(&mut self, level: FirmwareLevel) -> Result<(), FirmwareError> {
        let product = self.personality.product;
        if level.tcb.to_raw(product).is_none() {
            return Err(FirmwareError::InvalidParam);
        }
        if !level.tcb.shortfalls(&self.committed.tcb).is_empty() {
            return Err(FirmwareError::BadSvn);
        }
        let order = |v: FirmwareVersion| (v.major, v.minor, v.build);
        if order(level.version) < order(self.committed.version) {
            return Err(FirmwareError::BadVersion);
        }
        self.current = level;
        Ok(())
    }

    /// COMMIT: no way back behind the current firmware, which is also reported from now on.
    pub fn commit(&mut self) -> Result<(), FirmwareError> {
        self.require_init()?;
        self.committed = self.current;
        self.report_tcb(self.committed.tcb);
        Ok(())
    }

    /// VLEK_LOAD: takes a provider's hash stick, as [`SnpIdentity::wrap_vlek`] makes it.
    pub fn vlek_load(&mut self, wrapped: &[u8]) -> Result<(), FirmwareError> {
        self.require_init()?;
        let (tcb, csp_id) = self
            .identity
            .unwrap_vlek(self.personality.product, wrapped)?;
        // A stick for newer firmware cannot be wound back to ours.
        if !self.committed.tcb.shortfalls(&self.tcb_of(tcb)?).is_empty() {
            return Err(FirmwareError::InvalidParam);
        }
        self.csp_id = Some(csp_id);
        self.vlek = None;
        Ok(())
    }

    /// The key that would sign now, with its certificate, which real hosts fetch from AMD.
    pub fn endorsement(&mut self, kind: SigningKey) -> Result<&EndorsementKey, FirmwareError> {
        match kind {
            SigningKey::Vcek => self.vcek(),
            SigningKey::Vlek => self.loaded_vlek(),
        }
    }

    /// GCTX_CREATE.
    pub fn gctx_create(&mut self) -> Result<SnpGuestHandle, FirmwareError> {
        self.require_init()?;
        if self.guests.len() as u64 >= u64::from(self.max_guests) {
            return Err(FirmwareError::ResourceLimit);
        }
        self.last_handle = self
            .last_handle
            .checked_add(1)
            .ok_or(FirmwareError::ResourceLimit)?;
        let handle = SnpGuestHandle(self.last_handle);
        let fms = self.personality.cpuid_1_eax();
        self.guests.insert(handle, SnpGuest::new(handle, fms));
        Ok(handle)
    }

    /// LAUNCH_START.
    pub fn launch_start(
        &mut self,
        handle: SnpGuestHandle,
        start: SnpLaunchStart,
    ) -> Result<(), FirmwareError> {
        self.guest(handle)?.require(SnpCommand::LaunchStart)?;
        self.require_startable(start.policy)?;
        let secrets = GuestSecrets::draw()?;
        let guest = self.guest(handle)?;
        guest.start = start;
        guest.secrets = Some(secrets);
        guest.state = SnpGuestState::Launch;
        Ok(())
    }

    /// LAUNCH_FINISH: checks the ID block, if there is one, and lets the guest run.
    pub fn launch_finish(
        &mut self,
        handle: SnpGuestHandle,
        finish: &SnpLaunchFinish<'_>,
    ) -> Result<SnpLaunchDigest, FirmwareError> {
        let launch_tcb = self.personality.raw(self.current.tcb);
        let mitigations = self.personality.mitigations;
        let guest = self.guest(handle)?;
        guest.require(SnpCommand::LaunchFinish)?;
        let digest = guest.digester.clone().finish();
        guest.identity = match finish.id {
            None => GuestIdentity::NONE,
            Some(id) => GuestIdentity::check(
                id.block,
                id.auth,
                id.author_key_en,
                digest.as_bytes(),
                guest.start.policy,
            )?,
        };
        guest.host_data = finish.host_data;
        guest.vcek_disabled = finish.vcek_disabled;
        guest.launch_tcb = launch_tcb;
        guest.launch_mitigations = mitigations;
        guest.state = SnpGuestState::Running;
        Ok(digest)
    }

    /// A guest, for the commands that need nothing but its own state.
    pub fn guest(&mut self, handle: SnpGuestHandle) -> Result<&mut SnpGuest, FirmwareError> {
        self.require_init()?;
        self.guests
            .get_mut(&handle)
            .ok_or(FirmwareError::InvalidGuest)
    }

    /// ACTIVATE: gives the guest an ASID, 1 to the highest, until it is decommissioned.
    pub fn activate(&mut self, handle: SnpGuestHandle, asid: u32) -> Result<(), FirmwareError> {
        let owned = self.guests.values().any(|guest| guest.asid == Some(asid));
        let highest = self.max_guests;
        let guest = self.guest(handle)?;
        guest.require(SnpCommand::Activate)?;
        guest.asid = Some(asid::free(guest.asid, asid, highest, owned)?);
        Ok(())
    }

    /// DECOMMISSION: forgets the guest and its keys, and frees its ASID.
    pub fn decommission(&mut self, handle: SnpGuestHandle) -> Result<(), FirmwareError> {
        self.guest(handle)?.require(SnpCommand::Decommission)?;
        self.guests.remove(&handle);
        Ok(())
    }

    pub(super) fn tcb_of(&self, raw: RawTcb) -> Result<TcbVersion, FirmwareError> {
        let product = self.personality.product;
        let tcb = raw.of(product);
        // Reserved bytes that are not zero do not come back.
        match tcb.to_raw(product) == Some(raw) {
            true => Ok(tcb),
            false => Err(FirmwareError::InvalidParam),
        }
    }

    fn vcek(&mut self) -> Result<&EndorsementKey, FirmwareError> {
        if self.vcek.is_none() {
            let made = self.identity.vcek(self.personality.product, self.reported);
            self.vcek = Some(made.map_err(|_| FirmwareError::HardwarePlatform)?);
        }
        self.vcek.as_ref().ok_or(FirmwareError::HardwarePlatform)
    }

    fn loaded_vlek(&mut self) -> Result<&EndorsementKey, FirmwareError> {
        let csp_id = self.csp_id.as_deref().ok_or(FirmwareError::InvalidKey)?;
        if self.vlek.is_none() {
            let made = self
                .identity
                .vlek(self.personality.product, self.reported, csp_id);
            self.vlek = Some(made.map_err(|_| FirmwareError::HardwarePlatform)?);
        }
        self.vlek.as_ref().ok_or(FirmwareError::HardwarePlatform)
    }

    fn report_tcb(&mut self, tcb: TcbVersion) {
        self.reported = tcb;
        self.vcek = None;
        self.vlek = None;
    }

    fn require_init(&self) -> Result<(), FirmwareError> {
        match self.initialised {
            true => Ok(()),
            false => Err(FirmwareError::InvalidPlatformState),
        }
    }

    /// What LAUNCH_START asks of a policy. What only KVM refuses is not refused here.
    fn require_startable(&self, policy: SnpPolicy) -> Result<(), FirmwareError> {
        if !policy.reserved_one_is_set() || policy.unknown_bits() != 0 {
            return Err(FirmwareError::InvalidParam);
        }
        let info = self.personality.platform_info;
        let version = self.current.version;
        let lacks = [
            policy.min_abi() > (version.major, version.minor),
            info.has(PlatformBit::SmtEnabled) && !policy.has(SnpPolicyBit::Smt),
            policy.has(SnpPolicyBit::MemAes256Xts) && !self.personality.aes_256_xts,
            policy.has(SnpPolicyBit::RaplDis) && !info.has(PlatformBit::RaplDisabled),
            policy.has(SnpPolicyBit::CiphertextHiding)
                && !info.has(PlatformBit::CiphertextHidingEnabled),
        ];
        match lacks.contains(&true) {
            true => Err(FirmwareError::PolicyFailure),
            false => Ok(()),
        }
    }
}

impl SnpConfig {
    /// Reads the command's buffer of 64 bytes.
    pub fn parse(raw: &[u8; 64]) -> Result<Self, FirmwareError> {
        let flags = bytes::le32(raw, 8).ok_or(FirmwareError::InvalidParam)?;
        let reserved = raw.iter().skip(12).any(|byte| *byte != 0);
        if flags & !3 != 0 || reserved {
            return Err(FirmwareError::InvalidParam);
        }
        Ok(Self {
            reported_tcb: RawTcb(bytes::array(raw, 0).unwrap_or_default()),
            mask_chip_id: flags & 1 != 0,
            mask_chip_key: flags & 2 != 0,
        })
    }
}

impl SnpPlatformStatus {
    /// The command's buffer, as Linux hands it on (`struct sev_user_data_snp_status`).
    pub fn to_bytes(&self) -> [u8; 32] {
        let mut raw = [0; 32];
        let flags = u32::from(self.mask_chip_id)
            | u32::from(self.mask_chip_key) << 1
            | u32::from(self.vlek_loaded) << 2;
        let initialised = u8::from(self.state != PlatformState::Uninit);
        let head = [
            self.firmware.major,
            self.firmware.minor,
            initialised,
            // The reverse map is initialised with the platform.
            initialised,
        ];
        let all = head
            .into_iter()
            .chain(u32::from(self.firmware.build).to_le_bytes())
            .chain(flags.to_le_bytes())
            .chain(self.guest_count.to_le_bytes())
            .chain(self.current_tcb.0)
            .chain(self.reported_tcb.0);
        for (to, from) in raw.iter_mut().zip(all) {
            *to = from;
        }
        raw
    }
}
