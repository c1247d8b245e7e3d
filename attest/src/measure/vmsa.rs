//! VMSA pages: a vCPU's first register state, which SEV-ES and SNP measure.
//!
//! Its content is the VMM's choice. [`Profile::Qemu`] is what KVM makes of QEMU's reset state, as
//! `sev-snp-measure` computes it. [`Profile::Casemate`] is what this project's VMM submits of a
//! vCPU at reset, and [`EntryState`] of the one that begins in a kernel that was loaded directly;
//! a test of the VMM compares it with the registers that KVM then holds.
//!
//! Layout: AMD APM volume 2, table B-4, and `struct sev_es_save_area` of Linux.

use super::ovmf::{PAGE_LEN, Page};
use super::vcpu::CpuSignature;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Whose VMM launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// QEMU on KVM.
    Qemu,
    /// Our own VMM on KVM.
    Casemate,
}

/// SEV features of a guest (SEV_FEATURES in the VMSA). APM volume 2, table B-4, offset 0x3b0.
/// Shown and serialised in hex.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SevFeatures(pub u64);

/// The state of one vCPU before its first instruction: real mode, at the reset vector or where
/// the firmware wants the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResetState {
    profile: Profile,
    eip: u32,
    signature: CpuSignature,
    features: SevFeatures,
}

/// The state of the first vCPU of a guest whose kernel is loaded directly, without firmware: long
/// mode, flat segments, identity-mapped page tables. The other vCPUs wait at reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryState {
    /// Instruction pointer.
    pub rip: u64,
    /// First argument of the kernel's entry point: the zero page.
    pub rsi: u64,
    /// Stack.
    pub rsp: u64,
    /// Page tables.
    pub cr3: u64,
    /// Address of the descriptor table.
    pub gdt: u32,
    /// Its last byte.
    pub gdt_limit: u16,
    /// Selectors of the code segment, the data segments and the task.
    pub selectors: [u16; 3],
    /// SEV features.
    pub features: SevFeatures,
}

/// Why a text names nothing here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VmsaError {
    /// No such profile.
    #[error("`{0}` is no VMSA profile; qemu and casemate are")]
    Profile(String),
    /// No features.
    #[error("`{0}` are no SEV features; up to 16 hex digits are, as in 0x1 (SNP)")]
    Features(String),
}

impl SevFeatures {
    /// SNP is active.
    pub const SNP_ACTIVE: Self = Self(1);
    /// The processor swaps debug registers.
    pub const DEBUG_SWAP: Self = Self(1 << 5);
    /// Nothing.
    pub const NONE: Self = Self(0);

    /// Whether all of `other` are among these.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These without `others`.
    pub const fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    /// Both.
    pub const fn with(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }
}

impl ResetState {
    /// The first vCPU, at the architecture's reset vector.
    pub const fn boot(profile: Profile, signature: CpuSignature, features: SevFeatures) -> Self {
        Self::at(RESET_VECTOR, profile, signature, features)
    }

    /// A vCPU that begins at `eip`.
    pub const fn at(
        eip: u32,
        profile: Profile,
        signature: CpuSignature,
        features: SevFeatures,
    ) -> Self {
        Self {
            profile,
            eip,
            signature,
            features,
        }
    }

    /// The page as it is measured.
    pub fn page(&self) -> Page {
        let registers = Registers::of(self.profile);
        let mut page = [0; PAGE_LEN];
        for at in [ES, DS, FS, GS] {
            put(&mut page, at, &DATA.bytes());
        }
        let code = Segment {
            selector: 0xf000,
            base: self.eip & 0xffff_0000,
            ..registers.code
        };
        for (at, segment) in [
            (CS, code),
            (SS, DATA),
            (GDTR, TABLE),
            (LDTR, LOCAL_TABLE),
            (IDTR, TABLE),
            (TR, registers.task),
        ] {
            put(&mut page, at, &segment.bytes());
        }
        for (at, value) in [
            (EFER, EFER_SVME),
            (CR4, CR4_MCE),
            (CR0, CR0_ET),
            (DR7, 0x400),
            (DR6, 0xffff_0ff0),
            (RFLAGS, 0x2),
            (RIP, u64::from(self.eip & 0xffff)),
            (G_PAT, PAT_AT_RESET),
            (RDX, self.signature.0.into()),
            (SEV_FEATURES, self.features.0),
            (XCR0, XCR0_X87),
        ] {
            put(&mut page, at, &value.to_le_bytes());
        }
        put(&mut page, MXCSR, &MXCSR_AT_RESET.to_le_bytes());
        put(&mut page, X87_FCW, &FCW_AFTER_INIT.to_le_bytes());
        page
    }
}

impl EntryState {
    /// The page as it is measured.
    pub fn page(&self) -> Page {
        let [code, data, task] = self.selectors;
        let flat = |selector, attributes| Segment {
            selector,
            attributes,
            limit: u32::MAX,
            base: 0,
        };
        let mut page = [0; PAGE_LEN];
        for at in [ES, SS, DS, FS, GS] {
            put(&mut page, at, &flat(data, FLAT_DATA).bytes());
        }
        let gdt = Segment {
            base: self.gdt,
            limit: self.gdt_limit.into(),
            ..real_mode(0)
        };
        let no_table = Segment {
            limit: 0,
            ..real_mode(0)
        };
        for (at, segment) in [
            (CS, flat(code, FLAT_64_BIT_CODE)),
            (GDTR, gdt),
            (LDTR, LOCAL_TABLE),
            (IDTR, no_table),
            (TR, flat(task, FLAT_TASK)),
        ] {
            put(&mut page, at, &segment.bytes());
        }
        for (at, value) in [
            (EFER, EFER_SVME | EFER_LONG_MODE),
            (CR4, CR4_MCE | CR4_PAE),
            (CR3, self.cr3),
            (CR0, CR0_ET | CR0_PROTECTED_PAGED),
            (DR7, 0x400),
            (DR6, 0xffff_0ff0),
            (RFLAGS, 0x2),
            (RIP, self.rip),
            (RSP, self.rsp),
            (G_PAT, PAT_AT_RESET),
            (RBP, self.rsp),
            (RSI, self.rsi),
            (SEV_FEATURES, self.features.0),
            (XCR0, XCR0_X87),
        ] {
            put(&mut page, at, &value.to_le_bytes());
        }
        put(&mut page, MXCSR, &MXCSR_AT_RESET.to_le_bytes());
        put(&mut page, X87_FCW, &FCW_AFTER_INIT.to_le_bytes());
        page
    }
}

/// What profiles differ in.
struct Registers {
    code: Segment,
    task: Segment,
}

impl Registers {
    const fn of(profile: Profile) -> Self {
        match profile {
            // KVM stores what QEMU's reset handler sets.
            Profile::Qemu => Self {
                code: CODE,
                task: Segment {
                    attributes: BUSY_32_BIT_TSS,
                    ..TABLE
                },
            },
            // The architecture's state after RESET (APM volume 2, table 14-1), every segment
            // written by KVM_SET_SREGS, so that it does not hang on what a kernel leaves: the
            // task register is the 16-bit TSS that RESET and KVM itself have.
            Profile::Casemate => Self {
                code: CODE,
                task: Segment {
                    attributes: BUSY_16_BIT_TSS,
                    ..TABLE
                },
            },
        }
    }
}

/// A segment register as the VMSA holds it.
#[derive(Clone, Copy)]
struct Segment {
    selector: u16,
    attributes: u16,
    limit: u32,
    base: u32,
}

impl Segment {
    fn bytes(self) -> [u8; 16] {
        let mut raw = [0; 16];
        put(&mut raw, 0, &self.selector.to_le_bytes());
        put(&mut raw, 2, &self.attributes.to_le_bytes());
        put(&mut raw, 4, &self.limit.to_le_bytes());
        put(&mut raw, 8, &u64::from(self.base).to_le_bytes());
        raw
    }
}

/// Fields lie within the page by construction; one that did not would stay zero, and the tests
/// would show it.
fn put(raw: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in raw.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "qemu",
            Self::Casemate => "casemate",
        })
    }
}

impl FromStr for Profile {
    type Err = VmsaError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Qemu, Self::Casemate]
            .into_iter()
            .find(|profile| profile.to_string().eq_ignore_ascii_case(text))
            .ok_or_else(|| VmsaError::Profile(text.to_owned()))
    }
}

impl fmt::Display for SevFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl FromStr for SevFeatures {
    type Err = VmsaError;

    /// Hex digits, with or without `0x`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
        let digits = digits.unwrap_or(text);
        let wrong = || VmsaError::Features(text.to_owned());
        // `from_str_radix` takes a sign.
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        u64::from_str_radix(digits, 16)
            .map(Self)
            .map_err(|_| wrong())
    }
}

impl TryFrom<String> for SevFeatures {
    type Error = VmsaError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SevFeatures> for String {
    fn from(features: SevFeatures) -> Self {
        features.to_string()
    }
}

/// Where the first vCPU begins.
pub const RESET_VECTOR: u32 = 0xffff_fff0;

const CODE: Segment = real_mode(0x9b);
const DATA: Segment = real_mode(0x93);
const TABLE: Segment = real_mode(0);
const LOCAL_TABLE: Segment = real_mode(0x82);
const BUSY_16_BIT_TSS: u16 = 0x83;
const BUSY_32_BIT_TSS: u16 = 0x8b;

const fn real_mode(attributes: u16) -> Segment {
    Segment {
        selector: 0,
        attributes,
        limit: 0xffff,
        base: 0,
    }
}

/// KVM sets it in every guest.
const EFER_SVME: u64 = 1 << 12;
/// KVM sets it where the host has it.
const CR4_MCE: u64 = 1 << 6;
/// Caches on, as KVM lets every guest start.
const CR0_ET: u64 = 1 << 4;
/// APM volume 2, section A.3.
const PAT_AT_RESET: u64 = 0x0007_0406_0007_0406;
const XCR0_X87: u64 = 1;
const MXCSR_AT_RESET: u32 = 0x1f80;
const FCW_AFTER_INIT: u16 = 0x37f;

// Type, S, P, then L or D/B, and G: as the VMSA packs a descriptor's attributes.
const FLAT_64_BIT_CODE: u16 = 0xa9b;
const FLAT_DATA: u16 = 0xc93;
const FLAT_TASK: u16 = 0x88b;
/// LME and LMA.
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
const CR4_PAE: u64 = 1 << 5;
/// PE and PG.
const CR0_PROTECTED_PAGED: u64 = 1 | 1 << 31;

const ES: usize = 0x00;
const CS: usize = 0x10;
const SS: usize = 0x20;
const DS: usize = 0x30;
const FS: usize = 0x40;
const GS: usize = 0x50;
const GDTR: usize = 0x60;
const LDTR: usize = 0x70;
const IDTR: usize = 0x80;
const TR: usize = 0x90;
const EFER: usize = 0xd0;
const CR4: usize = 0x148;
const CR3: usize = 0x150;
const CR0: usize = 0x158;
const DR7: usize = 0x160;
const DR6: usize = 0x168;
const RFLAGS: usize = 0x170;
const RIP: usize = 0x178;
const RSP: usize = 0x1d8;
const G_PAT: usize = 0x268;
const RDX: usize = 0x310;
const RBP: usize = 0x328;
const RSI: usize = 0x330;
const SEV_FEATURES: usize = 0x3b0;
const XCR0: usize = 0x3e8;
const MXCSR: usize = 0x408;
const X87_FCW: usize = 0x410;

#[cfg(test)]
mod tests {
    use super::*;

    const MILAN: CpuSignature = CpuSignature(0xa0_0f11);

    fn page(profile: Profile, eip: u32) -> Page {
        ResetState::at(eip, profile, MILAN, SevFeatures(0x21)).page()
    }

    #[test]
    fn a_vcpu_begins_where_it_is_told() {
        let page = page(Profile::Qemu, 0x0080_b004);
        assert_eq!(page[0x10..0x12], [0, 0xf0]);
        assert_eq!(page[0x18..0x20], 0x0080_0000u64.to_le_bytes());
        assert_eq!(page[0x178..0x180], 0xb004u64.to_le_bytes());
        assert_eq!(page[0x310..0x314], MILAN.0.to_le_bytes());
        assert_eq!(page[0x3b0..0x3b8], 0x21u64.to_le_bytes());
        let boot = ResetState::boot(Profile::Qemu, MILAN, SevFeatures(0x21));
        assert_eq!(boot.page()[0x18..0x20], 0xffff_0000u64.to_le_bytes());
        assert_eq!(boot.page()[0x178..0x180], 0xfff0u64.to_le_bytes());
    }

    #[test]
    fn our_state_is_the_architecture_s_and_differs_from_qemu_s_in_the_task_register() {
        let (ours, qemu) = (
            page(Profile::Casemate, RESET_VECTOR),
            page(Profile::Qemu, RESET_VECTOR),
        );
        let differing: Vec<_> = (0..PAGE_LEN).filter(|n| ours[*n] != qemu[*n]).collect();
        assert_eq!(differing, [0x92]);
        assert_eq!((ours[0x92], qemu[0x92]), (0x83, 0x8b));
    }

    /// The whole page, so that a change of our profile is a decision and not an accident: it
    /// changes every reference value.
    #[test]
    fn our_profile_is_frozen() {
        let hash = super::super::snp::sha384(&page(Profile::Casemate, RESET_VECTOR));
        assert_eq!(hex::encode(hash), FROZEN);
    }

    #[test]
    fn a_kernel_is_entered_with_what_the_boot_protocol_wants() {
        let page = EntryState {
            rip: 0x100_0200,
            rsi: 0x7000,
            rsp: 0x8ff0,
            cr3: 0x9000,
            gdt: 0x6000,
            gdt_limit: 0x27,
            selectors: [0x10, 0x18, 0x20],
            features: SevFeatures::SNP_ACTIVE,
        }
        .page();
        let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
        let named = [
            (RIP, 0x100_0200),
            (RSI, 0x7000),
            (RSP, 0x8ff0),
            (RBP, 0x8ff0),
            (CR3, 0x9000),
            (CR0, 0x8000_0011),
            (CR4, 0x60),
            (EFER, 0x1500),
            (SEV_FEATURES, 1),
            (RDX, 0),
            (GDTR + 8, 0x6000),
        ];
        for (at, value) in named {
            assert_eq!(word(at), value, "{at:#x}");
        }
        assert_eq!(word(CS), 0xffff_ffff_0a9b_0010);
        assert_eq!(word(SS), 0xffff_ffff_0c93_0018);
        assert_eq!(word(TR), 0xffff_ffff_088b_0020);
        assert_eq!(word(IDTR), 0);
    }

    #[test]
    fn features_and_profiles_are_read_and_shown() {
        assert_eq!("0x21".parse(), Ok(SevFeatures(0x21)));
        assert_eq!("21".parse(), Ok(SevFeatures(0x21)));
        assert_eq!(SevFeatures(0x21).to_string(), "0x21");
        for text in ["", "0x", "+1", "0x+1", "x", "0x10000000000000000"] {
            assert!(text.parse::<SevFeatures>().is_err(), "{text}");
        }
        assert_eq!("QEMU".parse(), Ok(Profile::Qemu));
        assert!("ec2".parse::<Profile>().is_err());
    }

    const FROZEN: &str = "2c832bb046ca98038654f8ef5f414e57601e2e6ec7f8f2ae6e12d318635d732599ee184ab96182b7618ccd498f30e598";
}
