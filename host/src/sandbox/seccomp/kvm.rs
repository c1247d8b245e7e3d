//! Numbers of the KVM and SEV requests, by what they are for (`linux/kvm.h`, `linux/psp-sev.h`).

use std::mem::size_of;

use kvm_bindings as kvm;

/// State of the machine's interrupt controllers, timer and clock.
pub(super) const VM_STATE: &[u64] = &[
    io(0x03),                         // CHECK_EXTENSION
    iowr::<kvm::kvm_msr_list>(0x02),  // GET_MSR_INDEX_LIST
    iowr::<kvm::kvm_cpuid2>(0x05),    // GET_SUPPORTED_CPUID
    iowr::<kvm::kvm_irqchip>(0x62),   // GET_IRQCHIP
    ior::<kvm::kvm_irqchip>(0x63),    // SET_IRQCHIP
    ior::<kvm::kvm_pit_state2>(0x9f), // GET_PIT2
    iow::<kvm::kvm_pit_state2>(0xa0), // SET_PIT2
    ior::<kvm::kvm_clock_data>(0x7c), // GET_CLOCK
    iow::<kvm::kvm_clock_data>(0x7b), // SET_CLOCK
];
/// Memory slots and the dirty log.
pub(super) const VM_MEMORY: &[u64] = &[
    iow::<kvm::kvm_dirty_log>(0x42),                // GET_DIRTY_LOG
    iowr::<kvm::kvm_clear_dirty_log>(0xc0),         // CLEAR_DIRTY_LOG
    iow::<kvm::kvm_userspace_memory_region>(0x46),  // SET_USER_MEMORY_REGION
    iow::<kvm::kvm_userspace_memory_region2>(0x49), // SET_USER_MEMORY_REGION2
];
/// Interrupts and doorbells of devices.
pub(super) const VM_INTERRUPTS: &[u64] = &[
    iow::<kvm::kvm_irq_level>(0x61),   // IRQ_LINE
    iow::<kvm::kvm_irq_routing>(0x6a), // SET_GSI_ROUTING
    iow::<kvm::kvm_irqfd>(0x76),       // IRQFD
    iow::<kvm::kvm_ioeventfd>(0x79),   // IOEVENTFD
    iow::<kvm::kvm_msi>(0xa5),         // SIGNAL_MSI
];
/// Commands of a SEV guest, on its machine. Memory is pinned before a filter is there, and stays so to the end.
pub(super) const SEV_GUEST: &[u64] = &[
    iowr::<libc::c_ulong>(0xba), // MEMORY_ENCRYPT_OP
];
/// Commands of the platform, on `/dev/sev`; its descriptor is for reading, so that none of them changes anything.
pub(super) const SEV_PLATFORM: &[u64] = &[
    0xc010_5300, // SEV_ISSUE_CMD: _IOWR('S', 0, 16 bytes)
];
/// The guest runs.
pub(super) const VCPU_RUN: &[u64] = &[
    io(0x80),                          // RUN
    iow::<kvm::kvm_signal_mask>(0x8b), // SET_SIGNAL_MASK
    io(0x9a),                          // NMI
    io(0xad),                          // KVMCLOCK_CTRL
];
/// State of a stopped vCPU.
pub(super) const VCPU_STATE: &[u64] = &[
    io(0x03),                          // CHECK_EXTENSION
    ior::<kvm::kvm_regs>(0x81),        // GET_REGS
    iow::<kvm::kvm_regs>(0x82),        // SET_REGS
    ior::<kvm::kvm_sregs>(0x83),       // GET_SREGS
    iow::<kvm::kvm_sregs>(0x84),       // SET_SREGS
    ior::<kvm::kvm_sregs2>(0xcc),      // GET_SREGS2
    iow::<kvm::kvm_sregs2>(0xcd),      // SET_SREGS2
    iowr::<kvm::kvm_msrs>(0x88),       // GET_MSRS
    iow::<kvm::kvm_msrs>(0x89),        // SET_MSRS
    ior::<kvm::kvm_fpu>(0x8c),         // GET_FPU
    iow::<kvm::kvm_fpu>(0x8d),         // SET_FPU
    ior::<kvm::kvm_lapic_state>(0x8e), // GET_LAPIC
    iow::<kvm::kvm_lapic_state>(0x8f), // SET_LAPIC
    iow::<kvm::kvm_cpuid2>(0x90),      // SET_CPUID2
    iowr::<kvm::kvm_cpuid2>(0x91),     // GET_CPUID2
    ior::<kvm::kvm_mp_state>(0x98),    // GET_MP_STATE
    iow::<kvm::kvm_mp_state>(0x99),    // SET_MP_STATE
    ior::<kvm::kvm_vcpu_events>(0x9f), // GET_VCPU_EVENTS
    iow::<kvm::kvm_vcpu_events>(0xa0), // SET_VCPU_EVENTS
    ior::<kvm::kvm_debugregs>(0xa1),   // GET_DEBUGREGS
    iow::<kvm::kvm_debugregs>(0xa2),   // SET_DEBUGREGS
    io(0xa2),                          // SET_TSC_KHZ
    io(0xa3),                          // GET_TSC_KHZ
    ioc(READ, 0xa4, XSAVE_SIZE),       // GET_XSAVE
    ioc(WRITE, 0xa5, XSAVE_SIZE),      // SET_XSAVE
    ioc(READ, 0xcf, XSAVE_SIZE),       // GET_XSAVE2
    ior::<kvm::kvm_xcrs>(0xa6),        // GET_XCRS
    iow::<kvm::kvm_xcrs>(0xa7),        // SET_XCRS
];
/// Makes a VM; on no list, so a probe can try it.
pub(in crate::sandbox) const CREATE_VM: u64 = io(0x01);

const fn ioc(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}

const fn io(number: u64) -> u64 {
    ioc(0, number, 0)
}

const fn iow<T>(number: u64) -> u64 {
    ioc(WRITE, number, size_of::<T>())
}

const fn ior<T>(number: u64) -> u64 {
    ioc(READ, number, size_of::<T>())
}

const fn iowr<T>(number: u64) -> u64 {
    ioc(READ | WRITE, number, size_of::<T>())
}

const WRITE: u64 = 1;
const READ: u64 = 2;
/// `struct kvm_xsave` without its flexible tail.
const XSAVE_SIZE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel_headers() {
        assert_eq!(io(0x80), 0xae80); // KVM_RUN
        assert_eq!(ior::<kvm::kvm_regs>(0x81), 0x8090_ae81);
        assert_eq!(iow::<kvm::kvm_userspace_memory_region>(0x46), 0x4020_ae46);
        assert_eq!(iow::<kvm::kvm_irqfd>(0x76), 0x4020_ae76);
        assert_eq!(iow::<kvm::kvm_ioeventfd>(0x79), 0x4040_ae79);
        assert_eq!(iow::<kvm::kvm_irq_routing>(0x6a), 0x4008_ae6a);
        assert_eq!(iowr::<kvm::kvm_msrs>(0x88), 0xc008_ae88);
        assert_eq!(iowr::<kvm::kvm_clear_dirty_log>(0xc0), 0xc018_aec0);
        assert_eq!(iowr::<libc::c_ulong>(0xba), 0xc008_aeba);
        assert_eq!(ioc(READ, 0xa4, XSAVE_SIZE), 0x9000_aea4);
        assert_eq!(ior::<kvm::kvm_vcpu_events>(0x9f), 0x8040_ae9f);
        assert_eq!(ior::<kvm::kvm_pit_state2>(0x9f), 0x8070_ae9f);
        assert_eq!(iow::<kvm::kvm_msi>(0xa5), 0x4020_aea5);
    }
}
