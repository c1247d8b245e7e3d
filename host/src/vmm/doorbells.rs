//! Doorbells: where in guest memory a driver's notification becomes an event, without an exit to this process.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::kvm::{KvmError, during};

/// Puts doorbells where a function's BAR is, and takes them away when it moves.
pub trait Doorbells: Send + Sync {
    /// From now on a write to `address` is this event.
    fn place(&self, kick: &EventFd, address: u64);
    /// No more.
    fn remove(&self, kick: &EventFd, address: u64);
}

/// Those of a machine of KVM.
pub struct KvmDoorbells(Arc<VmFd>);

impl KvmDoorbells {
    /// Of this machine.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self(vm)
    }

    /// A doorbell that stays.
    pub fn fix(&self, kick: &EventFd, address: u64) -> Result<(), KvmError> {
        self.0
            .register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(during("KVM_IOEVENTFD"))
    }
}

impl Doorbells for KvmDoorbells {
    fn place(&self, kick: &EventFd, address: u64) {
        // Refused where the guest puts two functions in one place. The write then ends in the BAR's own register.
        if let Err(error) = self.fix(kick, address) {
            tracing::debug!(address, "no doorbell: {error}");
        }
    }

    fn remove(&self, kick: &EventFd, address: u64) {
        // One that was refused is not there.
        let at = IoEventAddress::Mmio(address);
        let _ = self.0.unregister_ioevent(kick, &at, NoDatamatch);
    }
}
