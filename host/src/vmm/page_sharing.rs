//! Which pages a guest of AMD's own processor shares with its host: what the guest says, by hypercall and by MSR.
//!
//! A private page travels only through the firmware, a shared one only in clear, and nobody but the guest knows which
//! is which. Everything said here was chosen by the guest; it can harm its own move with it and nothing else.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_CAP_EXIT_HYPERCALL, KVM_CAP_X86_USER_SPACE_MSR, kvm_enable_cap};
use kvm_ioctls::{
    Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd,
};

use super::kvm::{KvmError, during};
use super::memory::GuestMemory;
use super::protocol::RoleError;
use crate::confidential::page_map::{Conversion, ConversionError, KVM_HC_MAP_GPA_RANGE, PageMap};

/// What one guest has said so far. Its vCPUs' threads and the control thread share it.
pub struct PageSharing {
    memory: Arc<GuestMemory>,
    said: Mutex<Said>,
}

struct Said {
    map: PageMap,
    /// The guest keeps the map right (`KVM_MIGRATION_READY`).
    ready: bool,
}

impl PageSharing {
    /// A guest that has said nothing: all private, as it was launched, and not to be moved.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let map = PageMap::private(memory.size());
        Self {
            memory,
            said: Mutex::new(Said { map, ready: false }),
        }
    }

    /// Makes KVM tell: `KVM_HC_MAP_GPA_RANGE` and accesses to `MSR_KVM_MIGRATION_CONTROL` end in exits.
    pub fn listen(vm: &VmFd) -> Result<(), KvmError> {
        for (cap, name) in [
            (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
            (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
        ] {
            if !vm.check_extension(cap) {
                return Err(KvmError::Missing(name));
            }
        }
        // This one answers with the hypercalls that it knows.
        let hypercalls = u64::from(vm.check_extension_int(Cap::ExitHypercall).unsigned_abs());
        if hypercalls & EXIT_MAP_GPA_RANGE == 0 {
            return Err(KvmError::Missing("KVM_CAP_EXIT_HYPERCALL"));
        }
        enable(vm, KVM_CAP_EXIT_HYPERCALL, EXIT_MAP_GPA_RANGE)?;
        enable(vm, KVM_CAP_X86_USER_SPACE_MSR, MSR_FILTERED)?;
        let range = MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: MSR_KVM_MIGRATION_CONTROL,
            msr_count: 1,
            bitmap: &[0],
        };
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])
            .map_err(during("KVM_X86_SET_MSR_FILTER"))
    }

    /// A hypercall; its result for the guest. Pages that change are dirty: they are to travel once more, the other way.
    pub fn hypercall(&self, number: u64, arguments: &[u64; 6]) -> u64 {
        let noted = Conversion::of_hypercall(number, arguments).and_then(|wish| {
            self.said().map.convert(wish)?;
            self.memory.mark_written(wish.gpa, wish.length);
            Ok(())
        });
        match noted {
            Ok(()) => 0,
            Err(error) => {
                tracing::debug!(%error, "hypercall refused");
                ConversionError::HYPERCALL_RESULT
            }
        }
    }

    /// What an MSR reads as; `None` if there is none of that number here.
    pub fn read_msr(&self, index: u32) -> Option<u64> {
        (index == MSR_KVM_MIGRATION_CONTROL).then(|| u64::from(self.said().ready))
    }

    /// Whether an MSR takes a value.
    pub fn write_msr(&self, index: u32, value: u64) -> bool {
        let taken = index == MSR_KVM_MIGRATION_CONTROL && value & !MIGRATION_READY == 0;
        if taken {
            self.said().ready = value == MIGRATION_READY;
        }
        taken
    }

    /// Whether the guest can be moved as it is now.
    pub fn check_movable(&self) -> Result<(), RoleError> {
        let said = self.said();
        if !said.ready {
            return Err(RoleError::new(
                "PAGES_UNKNOWN",
                "the guest has not said that it tells which of its pages are shared (KVM_FEATURE_MIGRATION_CONTROL), \
                 and the firmware would ruin those that are; boot a Linux of 5.16 or later with CONFIG_KVM_GUEST, or \
                 launch it anew at the other host",
            ));
        }
        match said.map.shared_pages() {
            0 => Ok(()),
            shared => Err(RoleError::new(
                "PAGES_SHARED",
                format!(
                    "the guest shares {shared} pages with this host, and this version moves private pages only; \
                     launch it anew at the other host and let its owner release the key there"
                ),
            )),
        }
    }

    /// The guest has arrived from another host; only one that [may move](Self::check_movable) does.
    pub fn arrived(&self) {
        let mut said = self.said();
        said.ready = true;
        said.map = PageMap::private(self.memory.size());
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn enable(vm: &VmFd, cap: u32, bits: u64) -> Result<(), KvmError> {
    let mut request = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    request.args[0] = bits;
    vm.enable_cap(&request).map_err(during("KVM_ENABLE_CAP"))
}

/// Bits of CPUID leaf 0x40000001 (EAX) that offer all this: `KVM_FEATURE_HC_MAP_GPA_RANGE`,
/// `KVM_FEATURE_MIGRATION_CONTROL`. KVM leaves them to whoever answers the exits.
pub const CPUID_FEATURES: u32 = 1 << 16 | 1 << 17;
/// `include/uapi/asm/kvm_para.h`.
const MSR_KVM_MIGRATION_CONTROL: u32 = 0x4b56_4d08;
/// `KVM_MIGRATION_READY`.
const MIGRATION_READY: u64 = 1;
const EXIT_MAP_GPA_RANGE: u64 = 1 << KVM_HC_MAP_GPA_RANGE;
const MSR_FILTERED: u64 = MsrExitReason::Filter.bits() as u64;

#[cfg(test)]
mod tests {
    use super::*;

    const ENCRYPTED: u64 = 1 << 4;
    const EINVAL: u64 = (-22i64).cast_unsigned();

    fn sharing() -> (PageSharing, Arc<GuestMemory>) {
        let memory = Arc::new(GuestMemory::with_size(128 * 4096).unwrap());
        (PageSharing::new(Arc::clone(&memory)), memory)
    }

    fn map(sharing: &PageSharing, page: u64, count: u64, attributes: u64) -> u64 {
        let arguments = [page * 4096, count, attributes, 0, 0, 0];
        sharing.hypercall(KVM_HC_MAP_GPA_RANGE, &arguments)
    }

    fn code(sharing: &PageSharing) -> String {
        sharing.check_movable().unwrap_err().code
    }

    #[test]
    fn a_guest_moves_only_if_it_tells_and_shares_nothing() {
        let (sharing, memory) = sharing();
        assert_eq!(code(&sharing), "PAGES_UNKNOWN");
        assert!(sharing.write_msr(MSR_KVM_MIGRATION_CONTROL, 1));
        sharing.check_movable().unwrap();
        memory.take_device_writes();
        assert_eq!(map(&sharing, 63, 2, 0), 0);
        let error = sharing.check_movable().unwrap_err();
        assert_eq!(error.code, "PAGES_SHARED");
        assert!(error.text.contains("2 pages"), "{error}");
        assert_eq!(memory.take_device_writes(), [1 << 63, 1], "sent once more");
        assert_eq!(map(&sharing, 63, 2, ENCRYPTED), 0);
        assert_eq!(memory.take_device_writes(), [1 << 63, 1], "and once more");
        sharing.check_movable().unwrap();
        assert!(sharing.write_msr(MSR_KVM_MIGRATION_CONTROL, 0));
        assert_eq!(code(&sharing), "PAGES_UNKNOWN");
        sharing.arrived();
        sharing.check_movable().unwrap();
    }

    #[test]
    fn a_malformed_hypercall_gets_einval_and_changes_nothing() {
        let (sharing, memory) = sharing();
        sharing.arrived();
        memory.take_device_writes();
        for (number, arguments) in [
            (11, [0, 1, 0, 0, 0, 0]),
            (KVM_HC_MAP_GPA_RANGE, [1, 1, 0, 0, 0, 0]),
            (KVM_HC_MAP_GPA_RANGE, [0, 0, 0, 0, 0, 0]),
            (KVM_HC_MAP_GPA_RANGE, [0, 129, 0, 0, 0, 0]),
            (KVM_HC_MAP_GPA_RANGE, [0, u64::MAX, 0, 0, 0, 0]),
            (KVM_HC_MAP_GPA_RANGE, [u64::MAX - 4095, 2, 0, 0, 0, 0]),
            (KVM_HC_MAP_GPA_RANGE, [0, 1, 1 << 5, 0, 0, 0]),
        ] {
            assert_eq!(
                sharing.hypercall(number, &arguments),
                EINVAL,
                "{arguments:x?}"
            );
        }
        sharing.check_movable().unwrap();
        assert_eq!(memory.take_device_writes(), [0, 0]);
    }

    #[test]
    fn no_other_msr_is_here_and_no_other_bit() {
        let (sharing, _) = sharing();
        assert_eq!(sharing.read_msr(MSR_KVM_MIGRATION_CONTROL), Some(0));
        assert!(!sharing.write_msr(MSR_KVM_MIGRATION_CONTROL, 2));
        assert!(!sharing.write_msr(MSR_KVM_MIGRATION_CONTROL, 3));
        assert_eq!(sharing.read_msr(MSR_KVM_MIGRATION_CONTROL), Some(0));
        assert!(!sharing.write_msr(0x1b, 1));
        assert_eq!(sharing.read_msr(0x1b), None);
        assert!(sharing.write_msr(MSR_KVM_MIGRATION_CONTROL, 1));
        assert_eq!(sharing.read_msr(MSR_KVM_MIGRATION_CONTROL), Some(1));
    }
}
