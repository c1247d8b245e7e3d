//! What an AMD processor shows and wants of software besides its secure processor: the leaf of CPUID, the C-bit.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use nix::errno::Errno;
use nix::unistd::Pid;

use super::fields::Fields;
use super::{Kernel, Reply};
use crate::memory::Caller;

impl Kernel {
    /// `KVM_GET_SUPPORTED_CPUID` of the real kernel, with the leaf that a processor with SEV has.
    pub(super) fn supported_cpuid(
        &mut self,
        caller: Caller,
        descriptor: u64,
        argument: u64,
    ) -> Reply {
        let on_kvm = caller.descriptor(descriptor).as_deref() == Some("/dev/kvm");
        if !on_kvm || !self.parts.device {
            return Reply::Pass;
        }
        Reply::End(self.write_cpuid(caller, argument).map(|()| 0))
    }

    fn write_cpuid(&self, caller: Caller, argument: u64) -> Result<(), Errno> {
        let failed = |error: kvm_ioctls::Error| Errno::from_raw(error.errno());
        let kvm = Kvm::new().map_err(failed)?;
        let known = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed)?;
        let mut entries: Vec<kvm_cpuid_entry2> = known.as_slice().to_vec();
        entries.retain(|entry| entry.function != SEV_LEAF);
        for entry in entries.iter_mut().filter(|e| e.function == EXTENDED) {
            entry.eax = entry.eax.max(SEV_LEAF);
        }
        entries.push(kvm_cpuid_entry2 {
            function: SEV_LEAF,
            eax: SEV | if self.parts.snp.is_some() { SEV_SNP } else { 0 } | SEV_ES,
            ebx: C_BIT,
            ecx: self.parts.asids,
            ..kvm_cpuid_entry2::default()
        });
        let mut head = Fields::read(caller, argument, 8)?;
        let room = head.u32(0) as usize;
        if room < entries.len() {
            return Err(Errno::E2BIG);
        }
        head.set(0, &(entries.len() as u32).to_le_bytes());
        head.write_back()?;
        caller.write(
            argument + 8,
            &entries.iter().flat_map(bytes).collect::<Vec<u8>>(),
        )
    }

    /// With paging, a page of a SEV guest is private only where its table says so: a vCPU that is started on tables
    /// without the C-bit would fetch ciphertext. Without paging everything is private.
    pub(crate) fn look_at_paging(&mut self, thread: Pid, descriptor: u64, argument: u64) {
        let caller = Caller {
            pid: thread,
            memlock: None,
        };
        let vcpu = caller.descriptor(descriptor).unwrap_or_default();
        let launched = self.vms.values().any(|vm| vm.active && !vm.received);
        if !vcpu.starts_with("anon_inode:kvm-vcpu") || !launched {
            return;
        }
        let Ok(special) = Fields::read(caller, argument, SREGS) else {
            return;
        };
        if special.u64(CR0) & PAGING != 0 && special.u64(CR3) >> C_BIT & 1 == 0 {
            self.complain(
                "KVM_SET_SREGS",
                "paging without the C-bit in an encrypted guest",
            );
        }
    }
}

fn bytes(entry: &kvm_cpuid_entry2) -> Vec<u8> {
    let words = [
        entry.function,
        entry.index,
        entry.flags,
        entry.eax,
        entry.ebx,
        entry.ecx,
        entry.edx,
        0,
        0,
        0,
    ];
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Where Milan and later have it.
const C_BIT: u32 = 51;
const EXTENDED: u32 = 0x8000_0000;
const SEV_LEAF: u32 = 0x8000_001f;
const SEV: u32 = 1 << 1;
const SEV_ES: u32 = 1 << 3;
const SEV_SNP: u32 = 1 << 4;
/// Bytes of `struct kvm_sregs`, and where CR0 and CR3 are in it.
const SREGS: usize = 312;
const CR0: usize = 224;
const CR3: usize = 240;
const PAGING: u64 = 1 << 31;
