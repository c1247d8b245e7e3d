//! What a vCPU says of itself: KVM's supported leaves, this machine's topology, no secret of the host.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::model;
use crate::machine::cpu::{CpuPlan, Topology};
use crate::vmm::page_sharing::CPUID_FEATURES;

/// Leaves for vCPU `id` of `count`. `sev` is whether AMD's real secure processor encrypts the guest: then it sees where
/// the C-bit is, and is offered to tell which pages it shares.
pub fn for_vcpu(
    supported: &CpuId,
    cpu: &CpuPlan,
    id: u8,
    count: u8,
    sev: bool,
) -> Vec<kvm_cpuid_entry2> {
    let place = Place {
        id: id.into(),
        topology: cpu.topology(count),
    };
    let mut leaves: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|leaf| !DROPPED.contains(&leaf.function))
        .filter(|leaf| sev || leaf.function != SEV_LEAF)
        .copied()
        .collect();
    if let Some(baseline) = &cpu.baseline {
        model::apply(&mut leaves, baseline, cpu.model);
    }
    // Without it no guest reads 0x8000001d and 1e as threads and nodes: leaf 0xB says it all, but for threads on AMD's.
    let extensions = place.topology.threads > 1 && has_topology_extensions(supported);
    for leaf in &mut leaves {
        place.patch(leaf, extensions);
        if sev && leaf.function == KVM_FEATURES {
            leaf.eax |= CPUID_FEATURES;
        }
    }
    let last = leaves.iter().find(|leaf| leaf.function == 0);
    let last = last.map_or(0, |leaf| leaf.eax);
    for function in TOPOLOGY
        .iter()
        .filter(|function| **function <= last.max(0xb))
    {
        leaves.extend(place.levels(*function));
    }
    leaves
}

/// Whether a machine whose supported leaves are `supported` can run a vCPU saved with `saved`.
/// Returns the first feature word that it cannot.
pub fn check_compatible(
    supported: &CpuId,
    saved: &[kvm_cpuid_entry2],
) -> Result<(), CpuidMismatch> {
    for leaf in saved {
        let Some(masks) = feature_words(leaf.function, leaf.index) else {
            continue;
        };
        let here = supported
            .as_slice()
            .iter()
            .find(|have| same_leaf(have, leaf));
        let have = here.map_or([0; 4], words);
        let missing: Vec<u32> = words(leaf)
            .iter()
            .zip(have)
            .zip(masks)
            .map(|((want, have), mask)| want & !have & mask)
            .collect();
        if missing.iter().any(|word| *word != 0) {
            return Err(CpuidMismatch::Features {
                function: leaf.function,
                index: leaf.index,
                missing,
            });
        }
    }
    check_encryption_bit(supported, saved)
}

/// Why this host's processor cannot go on with a saved vCPU.
#[derive(Debug, thiserror::Error)]
pub enum CpuidMismatch {
    /// A feature that it does not have.
    #[error(
        "this host's processor lacks features of CPUID leaf {function:#x}.{index}: {missing:x?} (eax, ebx, ecx, edx)"
    )]
    Features {
        /// The leaf.
        function: u32,
        /// Its index.
        index: u32,
        /// Bits of EAX, EBX, ECX, EDX.
        missing: Vec<u32>,
    },
    /// The guest's page tables have the C-bit where this processor has an address.
    #[error(
        "the guest has its encryption bit at {saved}, this host's processor has it at {here}; move it to a host with a \
         processor of the same generation, or launch it anew"
    )]
    EncryptionBit {
        /// In the guest's page tables.
        saved: u32,
        /// Here; 0 where there is none.
        here: u32,
    },
}

/// The position is in every page table of the guest.
fn check_encryption_bit(
    supported: &CpuId,
    saved: &[kvm_cpuid_entry2],
) -> Result<(), CpuidMismatch> {
    let bit = |leaves: &[kvm_cpuid_entry2]| {
        let leaf = leaves.iter().find(|leaf| leaf.function == SEV_LEAF)?;
        Some(leaf.ebx & ENCRYPTION_BIT)
    };
    match (bit(saved), bit(supported.as_slice()).unwrap_or(0)) {
        (Some(saved), here) if saved != here => Err(CpuidMismatch::EncryptionBit { saved, here }),
        _ => Ok(()),
    }
}

/// Where a vCPU is: its APIC id is its number, thread by thread, core by core, socket by socket.
struct Place {
    id: u32,
    topology: Topology,
}

impl Place {
    fn patch(&self, leaf: &mut kvm_cpuid_entry2, extensions: bool) {
        let (cores, threads) = (self.cores(), self.threads());
        let logical = cores * threads;
        match leaf.function {
            0x1 => {
                leaf.ebx = (leaf.ebx & 0x0000_ffff) | (logical.min(255) << 16) | (self.id << 24);
                leaf.ecx |= HYPERVISOR | TSC_DEADLINE;
                set_bit(&mut leaf.edx, HTT, logical > 1);
            }
            // Cache leaves: a core has its own, its threads share them; AMD's last level is the socket's.
            0x4 => {
                leaf.eax =
                    (leaf.eax & 0x0000_3fff) | (id_mask(cores) << 26) | ((threads - 1) << 14);
            }
            0x8000_001d => leaf.eax = (leaf.eax & 0x0000_3fff) | ((threads - 1) << 14),
            0x8000_0001 => {
                set_bit(&mut leaf.ecx, AMD_CMP_LEGACY, logical > 1);
                set_bit(&mut leaf.ecx, AMD_TOPOLOGY_EXTENSIONS, extensions);
            }
            0x8000_0008 => leaf.ecx = (id_bits(logical) << 12) | logical.saturating_sub(1),
            0x8000_001e => {
                leaf.eax = self.id;
                leaf.ebx = ((threads - 1) << 8) | ((self.id / threads) % cores);
                leaf.ecx = self.id / logical;
                leaf.edx = 0;
            }
            _ => {}
        }
    }

    /// Leaf 0xB or 0x1F: threads, then cores, then the end.
    fn levels(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        let logical = self.cores() * self.threads();
        let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: SIGNIFICANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: (kind << 8) | index,
            edx: self.id,
            ..Default::default()
        };
        [
            level(0, id_bits(self.threads()), self.threads(), 1),
            level(1, id_bits(logical), logical, 2),
            level(2, 0, 0, 0),
        ]
    }

    fn cores(&self) -> u32 {
        u32::from(self.topology.cores).max(1)
    }

    fn threads(&self) -> u32 {
        u32::from(self.topology.threads).max(1)
    }
}

fn has_topology_extensions(supported: &CpuId) -> bool {
    let mut leaves = supported.as_slice().iter();
    leaves.any(|leaf| leaf.function == 0x8000_0001 && leaf.ecx & AMD_TOPOLOGY_EXTENSIONS != 0)
}

fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn id_mask(count: u32) -> u32 {
    count.next_power_of_two().saturating_sub(1).min(0x3f)
}

fn set_bit(word: &mut u32, bit: u32, on: bool) {
    if on {
        *word |= bit;
    } else {
        *word &= !bit;
    }
}

/// Which bits of a leaf are features that software relies on.
fn feature_words(function: u32, index: u32) -> Option<[u32; 4]> {
    match (function, index) {
        (0x1, _) => Some([0, 0, !(HYPERVISOR | TSC_DEADLINE | OSXSAVE), !HTT]),
        (0x7, 0) => Some([0, !0, !OSPKE, !0]),
        (0x7, 1) => Some([!0, 0, 0, !0]),
        (0xd, 0) => Some([!0, 0, 0, !0]),
        (0xd, 1) => Some([!0, 0, 0, 0]),
        (0x8000_0001, _) => Some([0, 0, !(AMD_CMP_LEGACY | AMD_TOPOLOGY_EXTENSIONS), !0]),
        (0x8000_0008, _) => Some([0, !0, 0, 0]),
        (0x8000_0021, _) => Some([!0, 0, 0, 0]),
        // What this VMM offers itself is there on every host that takes such a guest.
        (KVM_FEATURES, _) => Some([!CPUID_FEATURES, 0, 0, 0]),
        _ => None,
    }
}

/// The index counts only where the leaf has several.
fn same_leaf(a: &kvm_cpuid_entry2, b: &kvm_cpuid_entry2) -> bool {
    let indexed = (a.flags | b.flags) & SIGNIFICANT_INDEX != 0;
    a.function == b.function && (!indexed || a.index == b.index)
}

fn words(leaf: &kvm_cpuid_entry2) -> [u32; 4] {
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}

const SIGNIFICANT_INDEX: u32 = 1;
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;
const HTT: u32 = 1 << 28;
const AMD_CMP_LEGACY: u32 = 1 << 1;
const AMD_TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
const SEV_LEAF: u32 = 0x8000_001f;
/// EBX of that leaf.
const ENCRYPTION_BIT: u32 = 0x3f;
const KVM_FEATURES: u32 = 0x4000_0001;
const TOPOLOGY: &[u32] = &[0xb, 0x1f];
// host topology (0xb, 0x1f, 0x80000026) is replaced; performance monitoring (0xa, 0x80000022) is not
// offered, since its registers do not migrate between processor models
const DROPPED: &[u32] = &[0xa, 0xb, 0x1f, 0x8000_0022, 0x8000_0026];

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(1, 0xff00_0800, 0x1, 0x2),
            leaf(7, 0x20, 0, 0),
            leaf(0xb, 1, 2, 3),
            leaf(SEV_LEAF, 51, 0, 0),
            leaf(KVM_FEATURES, 0, 0, 0),
        ])
        .unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_number_and_no_leaf_of_the_host_topology() {
        let leaves = for_vcpu(&supported(), &CpuPlan::default(), 2, 3, false);
        let one = leaves.iter().find(|l| l.function == 1).unwrap();
        assert_eq!(one.ebx, 0x0203_0800);
        assert_eq!(one.ecx & HYPERVISOR, HYPERVISOR);
        let levels: Vec<_> = leaves.iter().filter(|l| l.function == 0xb).collect();
        assert_eq!(levels.len(), 3);
        assert!(levels.iter().all(|l| l.edx == 2));
        assert_eq!((levels[1].eax, levels[1].ebx), (2, 3));
        assert!(!leaves.iter().any(|l| l.function == SEV_LEAF));
    }

    #[test]
    fn sockets_cores_and_threads_are_told_in_every_leaf_that_knows_them() {
        let mut host = supported().as_slice().to_vec();
        let leaf = |function, eax, ecx| kvm_cpuid_entry2 {
            function,
            eax,
            ecx,
            ..Default::default()
        };
        host.extend([
            leaf(0, 0x1f, 0),
            leaf(4, 0xffff_c121, 0),
            leaf(0x8000_0001, 0, AMD_TOPOLOGY_EXTENSIONS),
            leaf(0x8000_0008, 0, 0xffff_ffff),
            leaf(0x8000_001e, 0, 0),
        ]);
        let host = CpuId::from_entries(&host).unwrap();
        let cpu = CpuPlan {
            topology: Some(Topology {
                sockets: 2,
                cores: 4,
                threads: 2,
            }),
            ..CpuPlan::default()
        };
        let leaves = for_vcpu(&host, &cpu, 13, 16, false);
        let find = |function, index| {
            let found = leaves
                .iter()
                .find(|l| (l.function, l.index) == (function, index));
            *found.unwrap()
        };
        for function in [0xb, 0x1f] {
            let (threads, cores) = (find(function, 0), find(function, 1));
            assert_eq!((threads.eax, threads.ebx, threads.ecx), (1, 2, 0x100));
            assert_eq!((cores.eax, cores.ebx, cores.ecx), (3, 8, 0x201));
            assert_eq!(find(function, 2).ebx, 0);
            assert_eq!(cores.edx, 13);
        }
        assert_eq!(find(1, 0).ebx >> 16, 13 << 8 | 8, "eight threads a socket");
        assert_eq!(find(4, 0).eax, 3 << 26 | 1 << 14 | 0x0121);
        assert_eq!(find(0x8000_0008, 0).ecx, 3 << 12 | 7);
        let node = find(0x8000_001e, 0);
        assert_eq!((node.eax, node.ebx, node.ecx), (13, 1 << 8 | 2, 1));
        let extensions = |leaves: &[kvm_cpuid_entry2]| {
            let leaf = leaves.iter().find(|l| l.function == 0x8000_0001);
            leaf.unwrap().ecx & AMD_TOPOLOGY_EXTENSIONS != 0
        };
        assert!(extensions(&leaves));
        let alone = for_vcpu(&host, &CpuPlan::default(), 0, 1, false);
        assert!(!extensions(&alone));
    }

    #[test]
    fn a_missing_feature_is_found_and_topology_is_no_feature() {
        let mut saved = for_vcpu(&supported(), &CpuPlan::default(), 0, 2, false);
        assert!(check_compatible(&supported(), &saved).is_ok());
        saved.iter_mut().find(|l| l.function == 7).unwrap().ebx |= 1 << 16;
        let error = check_compatible(&supported(), &saved).unwrap_err();
        let CpuidMismatch::Features {
            function, missing, ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((function, missing[1]), (7, 1 << 16));
    }

    #[test]
    fn an_encrypted_guest_sees_the_c_bit_and_is_heard() {
        let leaves = for_vcpu(&supported(), &CpuPlan::default(), 0, 1, true);
        let find = |leaves: &[kvm_cpuid_entry2], function| {
            leaves.iter().find(|l| l.function == function).copied()
        };
        assert_eq!(find(&leaves, SEV_LEAF).unwrap().ebx, 51);
        assert_eq!(find(&leaves, KVM_FEATURES).unwrap().eax, 1 << 16 | 1 << 17);
        let plain = for_vcpu(&supported(), &CpuPlan::default(), 0, 1, false);
        assert_eq!(find(&plain, KVM_FEATURES).unwrap().eax, 0);
    }

    #[test]
    fn a_guest_does_not_go_where_the_c_bit_is_another() {
        let mut saved = for_vcpu(&supported(), &CpuPlan::default(), 0, 1, true);
        assert!(check_compatible(&supported(), &saved).is_ok());
        let leaf = saved.iter_mut().find(|l| l.function == SEV_LEAF).unwrap();
        leaf.ebx = 47;
        let error = check_compatible(&supported(), &saved).unwrap_err();
        assert!(error.to_string().contains("at 47, this host's"), "{error}");
        let nowhere = CpuId::from_entries(&[]).unwrap();
        let only = saved.iter().filter(|l| l.function == SEV_LEAF).copied();
        let only: Vec<_> = only.collect();
        assert!(check_compatible(&nowhere, &only).is_err());
        let plain = for_vcpu(&supported(), &CpuPlan::default(), 0, 1, false);
        assert!(check_compatible(&supported(), &plain).is_ok());
    }
}
