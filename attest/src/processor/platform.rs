//! The platform: its life, its guests, their ASIDs, and the commands that need its keys.

use super::guest::{Command, Guest, GuestHandle, GuestState};
use super::identity::{API, Identity};
use super::{FirmwareError, PlatformCommand, asid, migrate};
use crate::legacy::certificate::{SevCertificate, Usage};
use crate::legacy::chain::{LegacyChain, TrustAnchors};
use crate::legacy::packet::TransportKeys;
use crate::legacy::policy::{ApiVersion, GuestPolicy, PolicyFlag};
use crate::legacy::report::SevReport;
use crate::legacy::session::SessionBlob;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What may differ from one emulated platform to another.
#[derive(Debug, Clone)]
pub struct ProcessorConfig {
    /// How many guests it holds at once; also its highest ASID.
    pub max_guests: u32,
    /// Roots of the platforms that guests may be sent to. Its own and AMD's are always among
    /// them; another emulated platform's has to be named.
    pub peers: TrustAnchors,
}

/// The platform's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PlatformState {
    /// Not initialised.
    Uninit = 0,
    /// Initialised, no guests.
    Init = 1,
    /// Initialised, with guests.
    Working = 2,
}

/// What PLATFORM_STATUS says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformStatus {
    /// The firmware API.
    pub api: ApiVersion,
    /// The firmware build.
    pub build: u8,
    /// The platform's state.
    pub state: PlatformState,
    /// Whether an outside owner signed the platform.
    pub owned: bool,
    /// Whether SEV-ES is initialised.
    pub config_es: bool,
    /// How many guests it holds.
    pub guest_count: u32,
    /// Always true: this is no AMD secure processor.
    pub emulated: bool,
}

/// The software secure processor.
pub struct SecureProcessor {
    pub(super) identity: Identity,
    pub(super) peers: TrustAnchors,
    max_guests: u32,
    initialised: bool,
    es: bool,
    guests: BTreeMap<GuestHandle, Guest>,
    last_handle: u32,
}

impl SecureProcessor {
    /// A platform with this identity, in the state UNINIT.
    pub fn new(identity: Identity, config: ProcessorConfig) -> Self {
        let own = identity.root_fingerprint();
        // Its own root is no AMD root, so it is always taken.
        let peers = config
            .peers
            .clone()
            .with_emulated_root(own)
            .unwrap_or(config.peers);
        Self {
            identity,
            peers,
            max_guests: config.max_guests,
            initialised: false,
            es: false,
            guests: BTreeMap::new(),
            last_handle: 0,
        }
    }

    /// The same platform with SEV-ES configured; before INIT. Its guests cannot be sent.
    pub fn with_sev_es(mut self) -> Self {
        self.es = true;
        self
    }

    /// INIT.
    pub fn init(&mut self) -> Result<(), FirmwareError> {
        self.require(PlatformCommand::Init)?;
        self.initialised = true;
        Ok(())
    }

    /// SHUTDOWN: forgets all guests and their keys. Handles are not used again even then.
    pub fn shutdown(&mut self) {
        self.guests.clear();
        self.initialised = false;
    }

    /// PLATFORM_STATUS.
    pub fn status(&self) -> PlatformStatus {
        PlatformStatus {
            api: API,
            build: BUILD,
            state: self.state(),
            owned: self.identity.owned(),
            config_es: self.es && self.initialised,
            guest_count: u32::try_from(self.guests.len()).unwrap_or(u32::MAX),
            emulated: true,
        }
    }

    /// PDH_CERT_EXPORT: the platform's certificates, and those that AMD publishes for real ones.
    pub fn pdh_cert_export(&self) -> Result<&LegacyChain, FirmwareError> {
        self.require(PlatformCommand::PdhCertExport)?;
        Ok(self.identity.chain())
    }

    /// LAUNCH_START: a new guest, with the owner's DH key and session; without them its measure
    /// convinces nobody, because no owner knows the TIK.
    pub fn launch_start(
        &mut self,
        policy: GuestPolicy,
        owner: Option<(&SevCertificate, &SessionBlob)>,
    ) -> Result<GuestHandle, FirmwareError> {
        self.require_startable(policy)?;
        let keys = match owner {
            Some((dh, session)) => self.unwrap_session(policy, dh, session)?,
            None => TransportKeys::random()?,
        };
        self.add(policy, GuestState::LUpdate, &keys)
    }

    /// RECEIVE_START: a guest that another platform sends. Who that is has to be settled
    /// outside: the session proves only that sender and session belong together.
    pub fn receive_start(
        &mut self,
        policy: GuestPolicy,
        sender: &SevCertificate,
        session: &SessionBlob,
    ) -> Result<GuestHandle, FirmwareError> {
        self.require_startable(policy)?;
        if policy.has(PolicyFlag::EncryptedState) {
            return Err(FirmwareError::Unsupported);
        }
        let keys = self.unwrap_session(policy, sender, session)?;
        self.add(policy, GuestState::RUpdate, &keys)
    }

    /// SEND_START: checks policy and target, and wraps new transport keys for the target.
    pub fn send_start(
        &mut self,
        handle: GuestHandle,
        target: &LegacyChain,
    ) -> Result<migrate::SendSession, FirmwareError> {
        self.require_init()?;
        let guest = self
            .guests
            .get_mut(&handle)
            .ok_or(FirmwareError::InvalidGuest)?;
        migrate::send_start(&self.identity, &self.peers, guest, target)
    }

    /// ATTESTATION_REPORT: signs what a running guest was launched with, over the asker's nonce.
    pub fn attestation_report(
        &self,
        handle: GuestHandle,
        mnonce: &[u8; 16],
    ) -> Result<SevReport, FirmwareError> {
        self.require_init()?;
        let guest = self
            .guests
            .get(&handle)
            .ok_or(FirmwareError::InvalidGuest)?;
        let digest = guest.measured_digest()?;
        SevReport::sign(self.identity.pek_key(), mnonce, &digest, guest.policy)
            .ok_or(FirmwareError::HardwarePlatform)
    }

    /// A guest, for the commands that need nothing but its own state.
    pub fn guest(&mut self, handle: GuestHandle) -> Result<&mut Guest, FirmwareError> {
        self.require_init()?;
        self.guests
            .get_mut(&handle)
            .ok_or(FirmwareError::InvalidGuest)
    }

    /// ACTIVATE: gives the guest an ASID, 1 to `max_guests`.
    pub fn activate(&mut self, handle: GuestHandle, asid: u32) -> Result<(), FirmwareError> {
        let owned = self.guests.values().any(|guest| guest.asid == Some(asid));
        let highest = self.max_guests;
        let guest = self.guest(handle)?;
        guest.require(Command::Activate)?;
        guest.asid = Some(asid::free(guest.asid, asid, highest, owned)?);
        Ok(())
    }

    /// DEACTIVATE: takes the ASID back.
    pub fn deactivate(&mut self, handle: GuestHandle) -> Result<(), FirmwareError> {
        let guest = self.guest(handle)?;
        guest.require_active(Command::Deactivate)?;
        guest.asid = None;
        Ok(())
    }

    /// DECOMMISSION: forgets the guest and its keys, and frees its ASID.
    pub fn decommission(&mut self, handle: GuestHandle) -> Result<(), FirmwareError> {
        self.guest(handle)?.require(Command::Decommission)?;
        self.guests.remove(&handle);
        Ok(())
    }

    /// Whether the platform's state allows a command.
    pub(super) fn require(&self, command: PlatformCommand) -> Result<(), FirmwareError> {
        if self.state().allows(command) {
            Ok(())
        } else {
            Err(FirmwareError::InvalidPlatformState)
        }
    }

    fn state(&self) -> PlatformState {
        match (self.initialised, self.guests.is_empty()) {
            (false, _) => PlatformState::Uninit,
            (true, true) => PlatformState::Init,
            (true, false) => PlatformState::Working,
        }
    }

    fn require_init(&self) -> Result<(), FirmwareError> {
        if self.initialised {
            Ok(())
        } else {
            Err(FirmwareError::InvalidPlatformState)
        }
    }

    /// What LAUNCH_START and RECEIVE_START ask of a policy.
    fn require_startable(&self, policy: GuestPolicy) -> Result<(), FirmwareError> {
        self.require_init()?;
        if policy.min_api() > API {
            return Err(FirmwareError::PolicyFailure);
        }
        if policy.has(PolicyFlag::EncryptedState) && !self.es {
            return Err(FirmwareError::Unsupported);
        }
        Ok(())
    }

    fn unwrap_session(
        &self,
        policy: GuestPolicy,
        peer: &SevCertificate,
        session: &SessionBlob,
    ) -> Result<TransportKeys, FirmwareError> {
        if peer.usage() != Usage::Pdh {
            return Err(FirmwareError::InvalidCertificate);
        }
        Ok(session.unwrap(self.identity.pdh_key(), peer.public_key(), policy)?)
    }

    fn add(
        &mut self,
        policy: GuestPolicy,
        state: GuestState,
        keys: &TransportKeys,
    ) -> Result<GuestHandle, FirmwareError> {
        if self.guests.len() as u64 >= u64::from(self.max_guests) {
            return Err(FirmwareError::ResourceLimit);
        }
        self.last_handle = self
            .last_handle
            .checked_add(1)
            .ok_or(FirmwareError::ResourceLimit)?;
        let handle = GuestHandle(self.last_handle);
        self.guests
            .insert(handle, Guest::new(handle, policy, state, keys));
        Ok(handle)
    }
}

impl Default for ProcessorConfig {
    fn default() -> Self {
        Self {
            max_guests: 64,
            peers: TrustAnchors::amd(),
        }
    }
}

/// The emulated firmware's build number.
pub(super) const BUILD: u8 = 1;
