//! What the VMM asks of a guest's confidential technology; `confidential` implements it.

use crate::vmm::protocol::{Measurement, OwnerSession, RoleError};

/// The confidential technology of one guest as the VMM drives it; a failed call leaves the guest unlaunchable.
pub trait GuestProtection: Send {
    /// Opens the launch context.
    fn launch_start(&mut self, session: Option<&OwnerSession>) -> Result<(), RoleError>;
    /// Encrypts and measures a run of guest memory.
    fn launch_update(&mut self, gpa: u64, length: u64) -> Result<(), RoleError>;
    /// Ends the measured part and says what was measured.
    fn launch_measure(&mut self) -> Result<Measurement, RoleError>;
    /// Injects the owner's secret packet.
    fn launch_secret(
        &mut self,
        header: &[u8],
        ciphertext: &[u8],
        gpa: u64,
    ) -> Result<(), RoleError>;
    /// Ends the launch; vCPUs may run.
    fn launch_finish(&mut self) -> Result<(), RoleError>;
    /// Opens the send context for a target; returns policy, source PDH and session.
    fn send_start(
        &mut self,
        target_pdh: &[u8],
        platform: &[u8],
        amd: &[u8],
    ) -> Result<(u32, Vec<u8>, Vec<u8>), RoleError>;
    /// Puts a packet of each page into the exchange memory, `PACKET_STRIDE` bytes each, in order.
    fn send_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError>;
    /// Ends the transfer; the guest cannot run here any more.
    fn send_finish(&mut self) -> Result<(), RoleError>;
    /// Cancels the transfer; the guest may run on.
    fn send_cancel(&mut self) -> Result<(), RoleError>;
    /// This platform's evidence: PDH; PEK ‖ OCA ‖ CEK; ASK ‖ ARK.
    fn evidence(&mut self) -> Result<(Vec<u8>, Vec<u8>, Vec<u8>), RoleError>;
    /// Opens the receive context.
    fn receive_start(
        &mut self,
        policy: u32,
        source_pdh: &[u8],
        session: &[u8],
    ) -> Result<(), RoleError>;
    /// Places the pages whose packets lie in the exchange memory.
    fn receive_pages(&mut self, gpas: &[u64]) -> Result<(), RoleError>;
    /// Ends the transfer; vCPUs may run.
    fn receive_finish(&mut self) -> Result<(), RoleError>;
    /// Frees the guest's context; nothing more can be done with it.
    fn decommission(&mut self);
}
