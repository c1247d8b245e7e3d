//! Which processor features exist for guests, and from which model on a guest has them: reviewed data.
//!
//! Names and places of the bits: AMD64 Architecture Programmer's Manual, volume 3 (24594), appendix E, and Intel's SDM,
//! volume 2A, CPUID. Which processor has which: the models of the same names in QEMU's `target/i386/cpu.c` (EPYC with its
//! versions 2 and 3, EPYC-Rome 2 and 4, EPYC-Milan 2, EPYC-Genoa 1, EPYC-Turin 1); `baseline` is x86-64-v2 of the x86-64
//! psABI, section 3.1.1, with what any 64-bit system needs. Where a line differs from there, it says why.
//!
//! Left out of all models but `host`, because their state does not move: SVM (nested guests), PERFCORE (counters),
//! MONITOR and the invariant TSC.

use crate::machine::cpu::{CpuModel, FEATURE_WORDS};
use CpuModel::{Baseline, EpycGenoa, EpycMilan, EpycNaples, EpycRome, EpycTurin};

/// A register of a CPUID leaf that holds features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// Leaf.
    pub function: u32,
    /// Its index.
    pub index: u32,
    /// EAX, EBX, ECX, EDX: 0 to 3.
    pub register: usize,
    /// Bits that say how the moment or the arrangement is, not what the processor can.
    pub ignored: u32,
}

/// The words, in the order of [`CpuBaseline::words`](crate::machine::cpu::CpuBaseline::words).
pub const WORDS: [Word; FEATURE_WORDS] = [
    word(0x1, 0, ECX, 1 << 31 | 1 << 27 | 1 << 24 | 1 << 3), // HYPERVISOR, OSXSAVE, TSC_DEADLINE, MONITOR
    word(0x1, 0, EDX, 1 << 28),                              // HTT
    word(0x7, 0, EBX, 0),
    word(0x7, 0, ECX, 1 << 4), // OSPKE
    word(0x7, 0, EDX, 0),
    word(0x7, 1, EAX, 0),
    word(0xd, 1, EAX, 0),
    word(0x8000_0001, 0, ECX, 1 << 1 | 1 << 22), // CMP_LEGACY, TOPOEXT
    word(0x8000_0001, 0, EDX, 0),
    word(0x8000_0008, 0, EBX, 0),
    word(0x8000_0021, 0, EAX, 0),
    word(0x6, 0, EAX, !(1 << 2)), // all but ARAT is about the host's power management
];

/// One feature.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// Name in messages; Linux's where it has one.
    pub name: &'static str,
    /// Index into [`WORDS`].
    pub word: usize,
    /// Bit.
    pub bit: u8,
    /// The smallest model that has it.
    pub since: CpuModel,
}

/// The feature words of a model.
pub fn words_of(model: CpuModel, amd: bool) -> [u32; FEATURE_WORDS] {
    let mut words = [0u32; FEATURE_WORDS];
    for feature in FEATURES.iter().filter(|feature| feature.since <= model) {
        if let Some(word) = words.get_mut(feature.word) {
            *word |= 1 << feature.bit;
        }
    }
    // AMD repeats features of leaf 1 there (APM volume 3, E.4.2).
    if amd {
        words[E1_EDX] |= words[L1_EDX] & AMD_ALIASES;
    }
    words
}

/// Names of the bits of a word.
pub fn names(word: usize, bits: u32) -> Vec<String> {
    (0..32u8)
        .filter(|bit| bits & (1 << bit) != 0)
        .map(|bit| {
            let known = FEATURES.iter().find(|f| f.word == word && f.bit == bit);
            let place = WORDS.get(word);
            match (known, place) {
                (Some(feature), _) => feature.name.to_owned(),
                (None, Some(at)) => format!(
                    "bit {bit} of CPUID {:#x}.{} {}",
                    at.function,
                    at.index,
                    REGISTERS.get(at.register).unwrap_or(&"?")
                ),
                (None, None) => format!("bit {bit}"),
            }
        })
        .collect()
}

const fn word(function: u32, index: u32, register: usize, ignored: u32) -> Word {
    Word {
        function,
        index,
        register,
        ignored,
    }
}

const fn f(name: &'static str, word: usize, bit: u8, since: CpuModel) -> Feature {
    Feature {
        name,
        word,
        bit,
        since,
    }
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;
const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];
const L1_ECX: usize = 0;
const L1_EDX: usize = 1;
const L7_EBX: usize = 2;
const L7_ECX: usize = 3;
const L7_EDX: usize = 4;
const L7_1_EAX: usize = 5;
const LD_1_EAX: usize = 6;
const E1_ECX: usize = 7;
const E1_EDX: usize = 8;
const E8_EBX: usize = 9;
const E21_EAX: usize = 10;
const L6_EAX: usize = 11;
const AMD_ALIASES: u32 = 0x0183_f3ff;

/// All features of the models.
#[rustfmt::skip]
pub const FEATURES: &[Feature] = &[
    f("fpu", L1_EDX, 0, Baseline), f("de", L1_EDX, 2, Baseline),
    f("pse", L1_EDX, 3, Baseline), f("tsc", L1_EDX, 4, Baseline), f("msr", L1_EDX, 5, Baseline),
    f("pae", L1_EDX, 6, Baseline), f("mce", L1_EDX, 7, Baseline), f("cx8", L1_EDX, 8, Baseline),
    f("apic", L1_EDX, 9, Baseline), f("sep", L1_EDX, 11, Baseline), f("mtrr", L1_EDX, 12, Baseline),
    f("pge", L1_EDX, 13, Baseline), f("mca", L1_EDX, 14, Baseline), f("cmov", L1_EDX, 15, Baseline),
    f("pat", L1_EDX, 16, Baseline), f("pse36", L1_EDX, 17, Baseline), f("clflush", L1_EDX, 19, Baseline),
    f("mmx", L1_EDX, 23, Baseline), f("fxsr", L1_EDX, 24, Baseline), f("sse", L1_EDX, 25, Baseline),
    f("sse2", L1_EDX, 26, Baseline),
    f("sse3", L1_ECX, 0, Baseline), f("ssse3", L1_ECX, 9, Baseline), f("cx16", L1_ECX, 13, Baseline),
    f("sse4_1", L1_ECX, 19, Baseline), f("sse4_2", L1_ECX, 20, Baseline),
    f("x2apic", L1_ECX, 21, Baseline), // KVM's own, on every processor
    f("popcnt", L1_ECX, 23, Baseline),
    f("lahf_lm", E1_ECX, 0, Baseline),
    f("syscall", E1_EDX, 11, Baseline), f("nx", E1_EDX, 20, Baseline), f("lm", E1_EDX, 29, Baseline),
    f("arat", L6_EAX, 2, Baseline), // KVM's own, on every processor

    f("vme", L1_EDX, 1, EpycNaples), // nothing to a 64-bit guest, and software emulation lacks it
    f("pclmulqdq", L1_ECX, 1, EpycNaples), f("fma", L1_ECX, 12, EpycNaples), f("movbe", L1_ECX, 22, EpycNaples),
    f("aes", L1_ECX, 25, EpycNaples), f("xsave", L1_ECX, 26, EpycNaples), f("avx", L1_ECX, 28, EpycNaples),
    f("f16c", L1_ECX, 29, EpycNaples), f("rdrand", L1_ECX, 30, EpycNaples),
    f("fsgsbase", L7_EBX, 0, EpycNaples), f("bmi1", L7_EBX, 3, EpycNaples), f("avx2", L7_EBX, 5, EpycNaples),
    f("smep", L7_EBX, 7, EpycNaples), f("bmi2", L7_EBX, 8, EpycNaples), f("rdseed", L7_EBX, 18, EpycNaples),
    f("adx", L7_EBX, 19, EpycNaples), f("smap", L7_EBX, 20, EpycNaples), f("clflushopt", L7_EBX, 23, EpycNaples),
    f("sha_ni", L7_EBX, 29, EpycNaples),
    f("xsaveopt", LD_1_EAX, 0, EpycNaples), f("xsavec", LD_1_EAX, 1, EpycNaples), f("xgetbv1", LD_1_EAX, 2, EpycNaples),
    f("mmxext", E1_EDX, 22, EpycNaples), f("fxsr_opt", E1_EDX, 25, EpycNaples), f("pdpe1gb", E1_EDX, 26, EpycNaples),
    f("rdtscp", E1_EDX, 27, EpycNaples),
    f("cr8_legacy", E1_ECX, 4, EpycNaples), f("abm", E1_ECX, 5, EpycNaples), f("sse4a", E1_ECX, 6, EpycNaples),
    f("misalignsse", E1_ECX, 7, EpycNaples), f("3dnowprefetch", E1_ECX, 8, EpycNaples), f("osvw", E1_ECX, 9, EpycNaples),
    f("clzero", E8_EBX, 0, EpycNaples), f("xsaveerptr", E8_EBX, 2, EpycNaples), f("ibpb", E8_EBX, 12, EpycNaples),

    f("clwb", L7_EBX, 24, EpycRome), f("umip", L7_ECX, 2, EpycRome), f("rdpid", L7_ECX, 22, EpycRome),
    f("wbnoinvd", E8_EBX, 9, EpycRome), f("ibrs", E8_EBX, 14, EpycRome), f("stibp", E8_EBX, 15, EpycRome),
    f("amd_ssbd", E8_EBX, 24, EpycRome),

    f("pcid", L1_ECX, 17, EpycMilan), f("erms", L7_EBX, 9, EpycMilan), f("invpcid", L7_EBX, 10, EpycMilan),
    f("vaes", L7_ECX, 9, EpycMilan), f("vpclmulqdq", L7_ECX, 10, EpycMilan), f("fsrm", L7_EDX, 4, EpycMilan),
    f("xsaves", LD_1_EAX, 3, EpycMilan), // not of Naples and Rome: AMD's erratum 1386
    f("stibp_always_on", E8_EBX, 17, EpycMilan), f("psfd", E8_EBX, 28, EpycMilan),
    f("no_nested_data_bp", E21_EAX, 0, EpycMilan), f("lfence_rdtsc", E21_EAX, 2, EpycMilan),
    f("null_sel_clr_base", E21_EAX, 6, EpycMilan),

    f("avx512f", L7_EBX, 16, EpycGenoa), f("avx512dq", L7_EBX, 17, EpycGenoa), f("avx512ifma", L7_EBX, 21, EpycGenoa),
    f("avx512cd", L7_EBX, 28, EpycGenoa), f("avx512bw", L7_EBX, 30, EpycGenoa), f("avx512vl", L7_EBX, 31, EpycGenoa),
    f("avx512vbmi", L7_ECX, 1, EpycGenoa),
    f("pku", L7_ECX, 3, EpycGenoa), // Milan has it, at another place of the XSAVE area: its guests could not go on here
    f("avx512_vbmi2", L7_ECX, 6, EpycGenoa), f("gfni", L7_ECX, 8, EpycGenoa), f("avx512_vnni", L7_ECX, 11, EpycGenoa),
    f("avx512_bitalg", L7_ECX, 12, EpycGenoa), f("avx512_vpopcntdq", L7_ECX, 14, EpycGenoa),
    f("la57", L7_ECX, 16, EpycGenoa), f("avx512_bf16", L7_1_EAX, 5, EpycGenoa), f("autoibrs", E21_EAX, 8, EpycGenoa),

    f("movdiri", L7_ECX, 27, EpycTurin), f("movdir64b", L7_ECX, 28, EpycTurin),
    f("avx512_vp2intersect", L7_EDX, 8, EpycTurin), f("avx_vnni", L7_1_EAX, 4, EpycTurin),
    f("fs_gs_base_ns", E21_EAX, 1, EpycTurin), f("sbpb", E21_EAX, 27, EpycTurin),
    f("ibpb_brtype", E21_EAX, 28, EpycTurin), f("srso_user_kernel_no", E21_EAX, 30, EpycTurin),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bit_stands_twice_and_none_is_one_of_the_moment() {
        let mut seen = std::collections::BTreeSet::new();
        for feature in FEATURES {
            assert!(seen.insert((feature.word, feature.bit)), "{}", feature.name);
            assert_eq!(WORDS[feature.word].ignored & (1 << feature.bit), 0);
        }
    }

    /// Words computed by hand from QEMU's definitions, without what the head of this file leaves out.
    #[test]
    fn the_models_are_those_of_their_source() {
        let word = |model, index: usize| words_of(model, true)[index];
        assert_eq!(word(EpycNaples, L1_EDX), 0x078b_fbff);
        assert_eq!(word(EpycNaples, L1_ECX), 0x76f8_3203 & !(1 << 17));
        assert_eq!(word(EpycNaples, L7_EBX), 0x209c_01a9);
        assert_eq!(word(EpycNaples, E1_ECX), 0x0000_03f1);
        assert_eq!(word(EpycNaples, E1_EDX), 0x2fd3_fbff);
        assert_eq!(word(EpycRome, L7_EBX), 0x219c_01a9);
        assert_eq!(word(EpycRome, L7_ECX), 0x0040_0004);
        assert_eq!(word(EpycMilan, L1_ECX), 0x76fa_3203);
        assert_eq!(word(EpycMilan, L7_EBX), 0x219c_07a9);
        assert_eq!(word(EpycMilan, E8_EBX), 0x1102_d205);
        assert_eq!(word(EpycGenoa, L7_EBX), 0xf1bf_07a9);
        assert_eq!(word(EpycGenoa, L7_ECX), 0x0041_5f4e);
        assert_eq!(word(EpycGenoa, E21_EAX), 0x145);
        assert_eq!(word(EpycTurin, L7_1_EAX), 0x30);
        assert_eq!(word(EpycTurin, E21_EAX), 0x5800_0147);
    }

    #[test]
    fn each_model_has_all_of_the_smaller_ones() {
        for pair in CpuModel::ALL[..6].windows(2) {
            let (small, large) = (words_of(pair[0], true), words_of(pair[1], true));
            assert!(small.iter().zip(large).all(|(s, l)| s & !l == 0));
            assert_ne!(small, large);
        }
    }

    #[test]
    fn bits_are_named() {
        assert_eq!(names(L7_EBX, 1 << 5 | 1 << 16), ["avx2", "avx512f"]);
        assert_eq!(names(L7_EDX, 1 << 24), ["bit 24 of CPUID 0x7.0 EDX"]);
    }
}
