//! What the processor says of virtualisation and memory encryption (AMD APM volume 3, Fn8000_001F).

use std::arch::x86_64::{__cpuid, __cpuid_count};

/// Features of the processor that matter to a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cpu {
    /// Runs under a hypervisor.
    pub(super) virtual_machine: bool,
    pub(super) svm: bool,
    pub(super) vmx: bool,
    pub(super) sev: bool,
    pub(super) sev_es: bool,
    pub(super) sev_snp: bool,
    /// Number of encrypted guests at once.
    pub(super) encrypted_guests: u32,
}

pub(super) fn cpu() -> Cpu {
    let highest = __cpuid(0x8000_0000).eax;
    let basic = __cpuid(1);
    let bit = |word: u32, bit: u32| word >> bit & 1 == 1;
    let mut cpu = Cpu {
        virtual_machine: bit(basic.ecx, 31),
        vmx: bit(basic.ecx, 5),
        ..Cpu::default()
    };
    if highest >= 0x8000_0001 {
        cpu.svm = bit(__cpuid(0x8000_0001).ecx, 2);
    }
    if highest >= 0x8000_001f {
        let encryption = __cpuid_count(0x8000_001f, 0);
        cpu.sev = bit(encryption.eax, 1);
        cpu.sev_es = bit(encryption.eax, 3);
        cpu.sev_snp = bit(encryption.eax, 4);
        cpu.encrypted_guests = encryption.ecx;
    }
    cpu
}
