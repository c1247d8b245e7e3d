//! What the VMM needs of the confidential technology of its guest.

use crate::vmm::protocol::{Measurement, OwnerSession, RoleError};

/// Policy, source PDH, session.
pub type SendStarted = (u32, Vec<u8>, Vec<u8>);
/// PDH, then PEK ‖ OCA ‖ CEK, then ASK ‖ ARK.
pub type PlatformEvidence = (Vec<u8>, Vec<u8>, Vec<u8>);

/// The confidential technology of one guest as the VMM drives it; a failed call leaves the guest unlaunchable.
pub trait GuestProtection: Send {
    /// LAUNCH_START. `memory` lists (gpa, length) and where it lies in the guest memory file.
    fn launch_start(&mut self, session: Option<&OwnerSession>) -> Result<(), RoleError>;
    /// LAUNCH_UPDATE_DATA over guest memory that already holds the bytes, in this order.
    fn launch_update(&mut self, gpa: u64, length: u64) -> Result<(), RoleError>;
    /// LAUNCH_MEASURE.
    fn launch_measure(&mut self) -> Result<Measurement, RoleError>;
    /// LAUNCH_SECRET to the secret page.
    fn launch_secret(
        &mut self,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<(), RoleError>;
    /// LAUNCH_FINISH.
    fn launch_finish(&mut self) -> Result<(), RoleError>;
    /// SEND_START; returns (policy, source PDH, session).
    fn send_start(
        &mut self,
        target_pdh: &[u8],
        platform: &[u8],
        amd: &[u8],
    ) -> Result<SendStarted, RoleError>;
    /// SEND_UPDATE_DATA of each page; packets go to `exchange`, PACKET_STRIDE bytes each. `offsets` are guest physical addresses.
    fn send_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError>;
    /// SEND_FINISH.
    fn send_finish(&mut self) -> Result<(), RoleError>;
    /// SEND_CANCEL.
    fn send_cancel(&mut self) -> Result<(), RoleError>;
    /// PDH, then PEK ‖ OCA ‖ CEK, then ASK ‖ ARK.
    fn evidence(&mut self) -> Result<PlatformEvidence, RoleError>;
    /// RECEIVE_START.
    fn receive_start(
        &mut self,
        policy: u32,
        source_pdh: &[u8],
        session: &[u8],
    ) -> Result<(), RoleError>;
    /// RECEIVE_UPDATE_DATA of each page from the exchange memory.
    fn receive_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError>;
    /// RECEIVE_FINISH.
    fn receive_finish(&mut self) -> Result<(), RoleError>;
    /// Ends the firmware's guest context (DEACTIVATE, DECOMMISSION); errors are logged only.
    fn decommission(&mut self);
}
