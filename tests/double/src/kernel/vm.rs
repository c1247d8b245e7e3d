//! `struct kvm_sev_info`: what the kernel keeps of one virtual machine.

use casemate_attest::processor::GuestHandle;
use nix::errno::Errno;
use nix::unistd::Pid;

use super::Refusal;
use super::snp::SnpVm;
use crate::memory::{Caller, pages};

/// One virtual machine.
#[derive(Debug)]
pub(super) struct Vm {
    /// The thread that made it; with that thread's process goes the machine.
    pub(super) owner: Pid,
    /// `KVM_X86_*_VM`.
    pub(super) vm_type: u32,
    pub(super) vcpus: u32,
    pub(super) active: bool,
    /// Its guest has come from elsewhere, with page tables that were made there.
    pub(super) received: bool,
    pub(super) es: bool,
    pub(super) asid: u32,
    pub(super) handle: Option<GuestHandle>,
    /// The caller's descriptor of `/dev/sev` since LAUNCH_START or RECEIVE_START; 0 before, as in Linux.
    pub(super) device: u64,
    /// Registered memory: address, size.
    pub(super) regions: Vec<(u64, u64)>,
    /// Pages pinned.
    pub(super) locked: u64,
    /// What an SNP machine has besides.
    pub(super) snp: SnpVm,
}

impl Vm {
    pub(super) fn new(owner: Pid, vm_type: u32) -> Self {
        Self {
            owner,
            vm_type,
            vcpus: 0,
            active: false,
            received: false,
            es: false,
            asid: 0,
            handle: None,
            device: 0,
            regions: Vec::new(),
            locked: 0,
            snp: SnpVm::default(),
        }
    }

    /// `sev_guest`.
    pub(super) fn require_sev(&self) -> Result<(), Refusal> {
        self.active
            .then_some(())
            .ok_or(Refusal::Kernel(Errno::ENOTTY))
    }

    /// The guest, as firmware commands name it; before its start there is none.
    pub(super) fn guest(&self) -> GuestHandle {
        self.handle.unwrap_or(GuestHandle(0))
    }

    /// `sev_pin_memory`, for good.
    pub(super) fn pin(
        &mut self,
        caller: Caller,
        address: u64,
        length: u64,
        writable: bool,
    ) -> Result<(), Refusal> {
        self.pin_for_a_while(caller, address, length, writable)?;
        self.locked += pages(address, length);
        Ok(())
    }

    /// `sev_pin_memory` and `sev_unpin_memory` around one command.
    pub(super) fn pin_for_a_while(
        &self,
        caller: Caller,
        address: u64,
        length: u64,
        writable: bool,
    ) -> Result<(), Refusal> {
        if length == 0 || address.checked_add(length).is_none() {
            return Err(Errno::EINVAL.into());
        }
        let wanted = self.locked + pages(address, length);
        if caller.lockable_pages().is_some_and(|most| wanted > most)
            || !caller.pinnable(address, length, writable)
        {
            return Err(Errno::ENOMEM.into());
        }
        Ok(())
    }

    /// Whether a range lies in memory that was registered.
    pub(super) fn registered(&self, address: u64, length: u64) -> bool {
        let end = address.saturating_add(length);
        self.regions
            .iter()
            .any(|(start, size)| *start <= address && end <= start + size)
    }
}
