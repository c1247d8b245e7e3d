//! A processor model on a host: what a guest would be given, whether this host has it, and the CPUID leaves that say so.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::features::{WORDS, Word, names, words_of};
use crate::machine::cpu::{CpuBaseline, CpuModel, FEATURE_WORDS, XsaveComponent};

/// What a guest of `model` is given on a host whose KVM supports `supported`; refused if that lacks any of it.
pub fn baseline(model: CpuModel, supported: &CpuId) -> Result<CpuBaseline, CpuError> {
    let host = of_host(supported);
    if model == CpuModel::Host {
        return Ok(host);
    }
    let amd = host.vendor == *AMD;
    if model != CpuModel::Baseline && !amd {
        return Err(CpuError::Maker {
            model,
            vendor: String::from_utf8_lossy(&host.vendor).into_owned(),
        });
    }
    let words = words_of(model, amd);
    let wanted = CpuBaseline {
        signature: signature(model).filter(|_| amd).unwrap_or(host.signature),
        xsave: components(supported, xcr0_of(&words)),
        words,
        ..host
    };
    check(&wanted, model, supported)?;
    Ok(wanted)
}

/// Whether a host can give a guest what it was given elsewhere.
pub fn check(wanted: &CpuBaseline, model: CpuModel, supported: &CpuId) -> Result<(), CpuError> {
    let host = of_host(supported);
    if wanted.vendor != host.vendor {
        return Err(CpuError::Vendor {
            wanted: String::from_utf8_lossy(&wanted.vendor).into_owned(),
            here: String::from_utf8_lossy(&host.vendor).into_owned(),
        });
    }
    let missing: Vec<String> = (0..FEATURE_WORDS)
        .zip(wanted.words.iter().zip(host.words))
        .flat_map(|(index, (want, have))| names(index, want & !have))
        .collect();
    if !missing.is_empty() {
        return Err(CpuError::Missing {
            model,
            features: missing.join(", "),
        });
    }
    match wanted.xsave.iter().find(|part| !host.xsave.contains(part)) {
        Some(part) => Err(CpuError::Layout(part.bit)),
        None => Ok(()),
    }
}

/// Masks KVM's leaves to what the guest was given. Leaves of a `host` guest stay as they are.
pub fn apply(leaves: &mut Vec<kvm_cpuid_entry2>, wanted: &CpuBaseline, model: CpuModel) {
    if model == CpuModel::Host {
        return;
    }
    let xcr0 = xcr0_of(&wanted.words);
    leaves.retain(|leaf| kept(leaf, xcr0));
    for leaf in leaves {
        restrict(leaf, wanted, xcr0);
        for (place, word) in WORDS.iter().zip(wanted.words) {
            if let Some(register) = register_of(leaf, place) {
                *register = (*register & place.ignored & INHERITED) | word;
            }
        }
        brand(leaf, model);
    }
}

/// Why a guest cannot have its processor here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// Features.
    #[error(
        "this host's KVM lacks features of the processor model {name}: {features}; run the guest where they are, or \
         describe a smaller model", name = model.name()
    )]
    Missing {
        /// The model.
        model: CpuModel,
        /// Their names.
        features: String,
    },
    /// An EPYC on a processor that is none.
    #[error("the processor model {} is AMD's, this host's processor is of {vendor}; describe `baseline` or `host`", model.name())]
    Maker {
        /// The model.
        model: CpuModel,
        /// The host's.
        vendor: String,
    },
    /// Another maker's.
    #[error(
        "the guest was launched on a processor of {wanted}, this host's is of {here}; no guest goes on there"
    )]
    Vendor {
        /// The guest's.
        wanted: String,
        /// The host's.
        here: String,
    },
    /// Same feature, other place.
    #[error(
        "this host's processor keeps component {0} of the XSAVE area elsewhere than the guest's; describe a model without it"
    )]
    Layout(u8),
    /// The guest's clock.
    #[error(
        "the guest's TSC runs at {wanted} kHz, this host's at {here} kHz and it cannot scale; move it to a host that can"
    )]
    Tsc {
        /// The guest's.
        wanted: u32,
        /// The host's.
        here: u32,
    },
}

/// Whether a guest whose TSC ran at `wanted` kHz keeps its time here. KVM itself lets 250 parts of a million pass.
pub fn check_tsc(wanted: u32, here: u32, scaling: bool) -> Result<(), CpuError> {
    let tolerated = u64::from(wanted) * TSC_TOLERANCE_PPM / 1_000_000;
    if wanted == 0 || scaling || u64::from(wanted.abs_diff(here)) <= tolerated {
        return Ok(());
    }
    Err(CpuError::Tsc { wanted, here })
}

fn of_host(supported: &CpuId) -> CpuBaseline {
    let leaves = supported.as_slice();
    let mut words = [0; FEATURE_WORDS];
    for (to, place) in words.iter_mut().zip(&WORDS) {
        let found = leaves.iter().find(|leaf| is_at(leaf, place));
        let value = found.map_or(0, |leaf| register(leaf, place));
        *to = value & !place.ignored;
    }
    let first = leaves.iter().find(|leaf| leaf.function == 0);
    let mut vendor = [0; 12];
    for (to, from) in vendor.iter_mut().zip(first.into_iter().flat_map(|leaf| {
        [leaf.ebx, leaf.edx, leaf.ecx]
            .map(u32::to_le_bytes)
            .concat()
    })) {
        *to = from;
    }
    let second = leaves.iter().find(|leaf| leaf.function == 1);
    CpuBaseline {
        vendor,
        signature: second.map_or(0, |leaf| leaf.eax),
        words,
        xsave: components(supported, u64::MAX),
        tsc_khz: 0,
    }
}

/// The components of XCR0 that KVM supports, as far as `xcr0` has them.
fn components(supported: &CpuId, xcr0: u64) -> Vec<XsaveComponent> {
    let leaves = supported.as_slice();
    let main = leaves.iter().find(|l| l.function == XSAVE && l.index == 0);
    let user = main.map_or(0, |l| u64::from(l.edx) << 32 | u64::from(l.eax));
    leaves
        .iter()
        .filter(|l| l.function == XSAVE && (2..63).contains(&l.index))
        .filter(|l| user & xcr0 & (1 << l.index) != 0)
        .map(|l| XsaveComponent {
            bit: l.index as u8,
            size: l.eax,
            offset: l.ebx,
        })
        .collect()
}

/// What a guest with these features may enable in XCR0.
fn xcr0_of(words: &[u32; FEATURE_WORDS]) -> u64 {
    let has = |name: &str| {
        super::features::FEATURES.iter().any(|f| {
            f.name == name
                && words
                    .get(f.word)
                    .is_some_and(|word| word & (1 << f.bit) != 0)
        })
    };
    let parts = [
        ("xsave", X87 | SSE),
        ("avx", AVX),
        ("avx512f", AVX512),
        ("pku", PKRU),
    ];
    parts
        .iter()
        .filter(|(name, _)| has(name))
        .fold(0, |all, (_, bits)| all | bits)
}

fn kept(leaf: &kvm_cpuid_entry2, xcr0: u64) -> bool {
    match (leaf.function, leaf.index) {
        (XSAVE, _) if xcr0 == 0 => false,
        (XSAVE, 0 | 1) => true,
        (XSAVE, index) => index < 63 && xcr0 & (1 << index) != 0,
        (0x7, index) => index <= 1,
        (function, _) => KEPT.contains(&function),
    }
}

/// Everything of a leaf that is neither a feature word nor the same on every host of a fleet.
fn restrict(leaf: &mut kvm_cpuid_entry2, wanted: &CpuBaseline, xcr0: u64) {
    match (leaf.function, leaf.index) {
        (0x0, _) => leaf.eax = leaf.eax.min(XSAVE),
        (0x1, _) => leaf.eax = wanted.signature,
        (0x6, _) => (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0),
        (0x7, 0) => leaf.eax = leaf.eax.min(1),
        (0x7, _) => (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0),
        (XSAVE, 0) => {
            (leaf.eax, leaf.edx) = (xcr0 as u32, 0);
            let end = |part: &XsaveComponent| part.offset.saturating_add(part.size);
            leaf.ecx = wanted.xsave.iter().map(end).fold(LEGACY_XSAVE, u32::max);
        }
        // no supervisor state: none of it moves
        (XSAVE, 1) => (leaf.ecx, leaf.edx) = (0, 0),
        (0x8000_0000, _) => leaf.eax = leaf.eax.min(0x8000_0021),
        (0x8000_0007, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        // 40 bits of physical address are there on every processor, also where SEV takes some away
        (0x8000_0008, _) => {
            leaf.eax = (leaf.eax & !0xff_00ff) | (leaf.eax & 0xff).min(PHYSICAL_BITS);
            if wanted.words.get(3).is_none_or(|word| word & LA57 == 0) {
                leaf.eax = (leaf.eax & !0xff00) | 48 << 8;
            }
            leaf.edx = 0;
        }
        (0x8000_0021, _) => (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0),
        _ => {}
    }
}

/// The name that the guest shows, 48 bytes over three leaves.
fn brand(leaf: &mut kvm_cpuid_entry2, model: CpuModel) {
    let Some(part) = leaf.function.checked_sub(0x8000_0002).filter(|p| *p < 3) else {
        return;
    };
    let name = format!("Casemate {}", model.name());
    let mut bytes = name.into_bytes();
    bytes.resize(48, 0);
    let parts = bytes.as_chunks::<16>().0;
    let words = parts.get(part as usize).map(|part| part.as_chunks::<4>().0);
    if let Some([eax, ebx, ecx, edx]) = words {
        (leaf.eax, leaf.ebx) = (u32::from_le_bytes(*eax), u32::from_le_bytes(*ebx));
        (leaf.ecx, leaf.edx) = (u32::from_le_bytes(*ecx), u32::from_le_bytes(*edx));
    }
}

/// Family, model and stepping, as QEMU's models of these names have them.
fn signature(model: CpuModel) -> Option<u32> {
    let (family, number, stepping) = match model {
        CpuModel::Baseline | CpuModel::EpycNaples => (23, 1, 2),
        CpuModel::EpycRome => (23, 49, 0),
        CpuModel::EpycMilan => (25, 1, 1),
        CpuModel::EpycGenoa => (25, 17, 0),
        CpuModel::EpycTurin => (26, 0, 0),
        CpuModel::Host => return None,
    };
    Some((family - 15) << 20 | (number >> 4) << 16 | 15 << 8 | (number & 15) << 4 | stepping)
}

fn is_at(leaf: &kvm_cpuid_entry2, place: &Word) -> bool {
    leaf.function == place.function && leaf.index == place.index
}

fn register_of<'a>(leaf: &'a mut kvm_cpuid_entry2, place: &Word) -> Option<&'a mut u32> {
    if !is_at(leaf, place) {
        return None;
    }
    Some(match place.register {
        0 => &mut leaf.eax,
        1 => &mut leaf.ebx,
        2 => &mut leaf.ecx,
        _ => &mut leaf.edx,
    })
}

fn register(leaf: &kvm_cpuid_entry2, place: &Word) -> u32 {
    match place.register {
        0 => leaf.eax,
        1 => leaf.ebx,
        2 => leaf.ecx,
        _ => leaf.edx,
    }
}

const AMD: &[u8; 12] = b"AuthenticAMD";
const XSAVE: u32 = 0xd;
const X87: u64 = 1;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const AVX512: u64 = 7 << 5;
const PKRU: u64 = 1 << 9;
const LA57: u32 = 1 << 16;
/// Legacy region and header.
const LEGACY_XSAVE: u32 = 512 + 64;
const PHYSICAL_BITS: u32 = 40;
const TSC_TOLERANCE_PPM: u64 = 250;
/// Bits of the moment that a masked word keeps; of leaf 6 and of MONITOR nothing.
const INHERITED: u32 = 1 << 31 | 1 << 27 | 1 << 24 | 1 << 28 | 1 << 4;
/// Leaves of a named model besides 0x7 and 0xd. Caches (0x4, 0x8000_0005, 6, 0x1d) tell of the host, and stay as they
/// are in a guest that moves.
const KEPT: &[u32] = &[
    0x0,
    0x1,
    0x2,
    0x4,
    0x6,
    0x4000_0000,
    0x4000_0001,
    0x8000_0000,
    0x8000_0001,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0007,
    0x8000_0008,
    0x8000_001d,
    0x8000_001e,
    0x8000_001f,
    0x8000_0021,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with all of `model`, and more.
    fn host(model: CpuModel) -> CpuId {
        let words = words_of(model, true);
        let mut leaves: Vec<kvm_cpuid_entry2> = Vec::new();
        for (place, word) in WORDS.iter().zip(words) {
            if !leaves.iter().any(|leaf| is_at(leaf, place)) {
                leaves.push(kvm_cpuid_entry2 {
                    function: place.function,
                    index: place.index,
                    ..Default::default()
                });
            }
            let leaf = leaves.iter_mut().find(|leaf| is_at(leaf, place)).unwrap();
            *register_of(leaf, place).unwrap() = word;
        }
        let bytes = |at: usize| u32::from_le_bytes(AMD[at..at + 4].try_into().unwrap());
        let leaf = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        leaves.extend([
            leaf(0, 0, 0x1f, bytes(0), bytes(8), bytes(4)),
            leaf(0xd, 0, 0x2e7, 0, 2696, 0),
            leaf(0xd, 2, 256, 576, 0, 0),
            leaf(0xd, 5, 64, 832, 0, 0),
            leaf(0xd, 6, 512, 896, 0, 0),
            leaf(0xd, 7, 1024, 1408, 0, 0),
            leaf(0xd, 9, 8, 2432, 0, 0),
            leaf(0x14, 0, 1, 0, 0, 0),
            leaf(0x8000_0002, 0, 1, 2, 3, 4),
            leaf(0x8000_0007, 0, 0, 0, 0, 1 << 8),
        ]);
        CpuId::from_entries(&leaves).unwrap()
    }

    #[test]
    fn a_model_is_the_same_on_every_host_that_has_it() {
        let there = baseline(CpuModel::EpycMilan, &host(CpuModel::EpycMilan)).unwrap();
        let here = baseline(CpuModel::EpycMilan, &host(CpuModel::EpycTurin)).unwrap();
        assert_eq!(there, here);
        assert_eq!(here.signature, 0x00a0_0f11);
        let masked = |on| {
            let mut leaves = host(on).as_slice().to_vec();
            apply(&mut leaves, &here, CpuModel::EpycMilan);
            leaves
        };
        let leaves = masked(CpuModel::EpycTurin);
        assert_eq!(leaves, masked(CpuModel::EpycMilan));
        let find = |f, i| leaves.iter().find(|l| (l.function, l.index) == (f, i));
        assert_eq!(find(0xd, 0).unwrap().eax, 7, "x87, SSE, AVX");
        assert_eq!(find(0xd, 0).unwrap().ecx, 832);
        assert!(find(0xd, 9).is_none() && find(0x14, 0).is_none());
        assert_eq!(find(7, 0).unwrap().ebx & (1 << 16), 0, "no AVX-512");
        assert_eq!(find(0x8000_0007, 0).unwrap().edx, 0, "no invariant TSC");
        assert_eq!(&find(0x8000_0002, 0).unwrap().eax.to_le_bytes(), b"Case");
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let error = baseline(CpuModel::EpycMilan, &host(CpuModel::EpycRome)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("model epyc-milan: pcid, erms, invpcid, vaes"),
            "{text}"
        );
        let guest = baseline(CpuModel::Host, &host(CpuModel::EpycGenoa)).unwrap();
        let error = check(&guest, CpuModel::Host, &host(CpuModel::EpycMilan)).unwrap_err();
        assert!(error.to_string().contains("avx512f"), "{error}");
    }

    #[test]
    fn another_maker_another_layout_another_clock_are_refused() {
        let amd = host(CpuModel::EpycGenoa);
        let guest = baseline(CpuModel::EpycGenoa, &amd).unwrap();
        assert!(guest.xsave.iter().any(|part| part.bit == 9));
        let mut intel = amd.as_slice().to_vec();
        intel.iter_mut().filter(|l| l.function == 0).for_each(|l| {
            l.ebx = u32::from_le_bytes(*b"Genu");
        });
        let intel = CpuId::from_entries(&intel).unwrap();
        assert!(matches!(
            check(&guest, CpuModel::EpycGenoa, &intel),
            Err(CpuError::Vendor { .. })
        ));
        assert!(matches!(
            baseline(CpuModel::EpycNaples, &intel),
            Err(CpuError::Maker { .. })
        ));
        assert!(baseline(CpuModel::Baseline, &intel).is_ok());
        let mut other = amd.as_slice().to_vec();
        other
            .iter_mut()
            .filter(|l| (l.function, l.index) == (0xd, 9))
            .for_each(|l| l.ebx = 832);
        let other = CpuId::from_entries(&other).unwrap();
        assert_eq!(
            check(&guest, CpuModel::EpycGenoa, &other),
            Err(CpuError::Layout(9))
        );
        assert!(check_tsc(2_000_000, 2_000_400, false).is_ok());
        assert!(check_tsc(2_000_000, 2_100_000, true).is_ok());
        assert!(check_tsc(2_000_000, 2_100_000, false).is_err());
        assert!(check_tsc(0, 2_100_000, false).is_ok());
    }

    #[test]
    fn a_baseline_guest_has_no_xsave_area_at_all() {
        let host = host(CpuModel::EpycGenoa);
        let guest = baseline(CpuModel::Baseline, &host).unwrap();
        let mut leaves = host.as_slice().to_vec();
        apply(&mut leaves, &guest, CpuModel::Baseline);
        assert!(guest.xsave.is_empty());
        assert!(!leaves.iter().any(|leaf| leaf.function == 0xd));
        let one = leaves.iter().find(|leaf| leaf.function == 1).unwrap();
        assert_eq!(one.ecx & (1 << 26 | 1 << 28), 0, "no XSAVE, no AVX");
    }
}
