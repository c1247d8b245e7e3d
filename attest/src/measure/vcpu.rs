//! vCPU models: what CPUID leaf 1 says of a vCPU stands in its VMSA, so it is measured.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

/// CPUID Fn0000_0001_EAX: family, model and stepping. Shown and serialised in hex.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuSignature(pub u32);

/// A vCPU model by the name that QEMU and `sev-snp-measure` know it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuModel {
    name: &'static str,
    signature: CpuSignature,
}

/// How many vCPUs a guest has: 1 to [`MAX_VCPUS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct VcpuCount(NonZeroU16);

/// Why a vCPU description is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VcpuError {
    /// No such model.
    #[error("`{0}` is no vCPU type known here; known are {names}", names = CpuModel::names())]
    Model(String),
    /// A family, model or stepping that CPUID cannot express.
    #[error(
        "family {family}, model {model}, stepping {stepping} cannot stand in CPUID leaf 1; at most \
         {MAX_FAMILY}, {MAX_MODEL} and {MAX_STEPPING} can"
    )]
    Signature {
        /// Family, its extended part added.
        family: u16,
        /// Model, its extended part included.
        model: u16,
        /// Stepping.
        stepping: u16,
    },
    /// Not a number.
    #[error("`{0}` is no vCPU signature; a 32-bit number like 0x800f12 is")]
    Number(String),
    /// Not a number.
    #[error("`{0}` is no number of vCPUs")]
    CountText(String),
    /// No vCPU, or too many.
    #[error("a guest has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Count(u64),
}

impl CpuSignature {
    /// The signature of a family (with its extended part added), a model and a stepping.
    /// AMD publication 25481.
    pub fn new(family: u16, model: u16, stepping: u16) -> Result<Self, VcpuError> {
        if family > MAX_FAMILY || model > MAX_MODEL || stepping > MAX_STEPPING {
            return Err(VcpuError::Signature {
                family,
                model,
                stepping,
            });
        }
        Ok(signature(family as u32, model as u32, stepping as u32))
    }
}

impl CpuModel {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        model("EPYC", NAPLES),
        model("EPYC-v1", NAPLES),
        model("EPYC-v2", NAPLES),
        model("EPYC-IBPB", NAPLES),
        model("EPYC-v3", NAPLES),
        model("EPYC-v4", NAPLES),
        model("EPYC-v5", NAPLES),
        model("EPYC-Rome", ROME),
        model("EPYC-Rome-v1", ROME),
        model("EPYC-Rome-v2", ROME),
        model("EPYC-Rome-v3", ROME),
        model("EPYC-Rome-v4", ROME),
        model("EPYC-Rome-v5", ROME),
        model("EPYC-Milan", MILAN),
        model("EPYC-Milan-v1", MILAN),
        model("EPYC-Milan-v2", MILAN),
        model("EPYC-Milan-v3", MILAN),
        model("EPYC-Genoa", GENOA),
        model("EPYC-Genoa-v1", GENOA),
        model("EPYC-Genoa-v2", GENOA),
        model("EPYC-Turin", TURIN),
        model("EPYC-Turin-v1", TURIN),
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Its signature.
    pub const fn signature(self) -> CpuSignature {
        self.signature
    }

    fn names() -> String {
        let names: Vec<_> = Self::ALL.iter().map(|model| model.name).collect();
        names.join(", ")
    }
}

impl VcpuCount {
    /// One.
    pub const ONE: Self = Self(NonZeroU16::MIN);

    /// The number.
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl TryFrom<u16> for VcpuCount {
    type Error = VcpuError;

    fn try_from(count: u16) -> Result<Self, Self::Error> {
        NonZeroU16::new(count)
            .filter(|count| count.get() <= MAX_VCPUS)
            .map(Self)
            .ok_or(VcpuError::Count(count.into()))
    }
}

impl FromStr for VcpuCount {
    type Err = VcpuError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.bytes().all(|digit| digit.is_ascii_digit());
        let number = text.parse::<u64>().ok().filter(|_| digits);
        let number = number.ok_or_else(|| VcpuError::CountText(text.to_owned()))?;
        u16::try_from(number).map_or(Err(VcpuError::Count(number)), Self::try_from)
    }
}

impl fmt::Display for VcpuCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<VcpuCount> for u16 {
    fn from(count: VcpuCount) -> Self {
        count.get()
    }
}

impl FromStr for CpuModel {
    type Err = VcpuError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .iter()
            .copied()
            .find(|model| model.name.eq_ignore_ascii_case(name))
            .ok_or_else(|| VcpuError::Model(name.to_owned()))
    }
}

impl FromStr for CpuSignature {
    type Err = VcpuError;

    /// Hex with `0x`, decimal without.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => text.parse(),
        };
        // `from_str_radix` takes a sign.
        match number {
            Ok(number) if !text.contains('+') => Ok(Self(number)),
            _ => Err(VcpuError::Number(text.to_owned())),
        }
    }
}

impl fmt::Display for CpuSignature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl TryFrom<String> for CpuSignature {
    type Error = VcpuError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<CpuSignature> for String {
    fn from(signature: CpuSignature) -> Self {
        signature.to_string()
    }
}

const fn model(name: &'static str, signature: CpuSignature) -> CpuModel {
    CpuModel { name, signature }
}

const fn signature(family: u32, model: u32, stepping: u32) -> CpuSignature {
    let (base, extended) = if family > 0xf {
        (0xf, family - 0xf)
    } else {
        (family, 0)
    };
    CpuSignature(
        (extended << 20) | ((model >> 4) << 16) | (base << 8) | ((model & 0xf) << 4) | stepping,
    )
}

/// KVM's limit.
pub const MAX_VCPUS: u16 = 4096;

const MAX_FAMILY: u16 = 0xf + 0xff;
const MAX_MODEL: u16 = 0xff;
const MAX_STEPPING: u16 = 0xf;

const NAPLES: CpuSignature = signature(23, 1, 2);
const ROME: CpuSignature = signature(23, 49, 0);
const MILAN: CpuSignature = signature(25, 1, 1);
const GENOA: CpuSignature = signature(25, 17, 0);
const TURIN: CpuSignature = signature(26, 0, 0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_those_that_processors_show() {
        for (name, expected) in [
            ("EPYC-v4", 0x80_0f12),
            ("EPYC-Rome", 0x83_0f10),
            ("EPYC-Milan", 0xa0_0f11),
            ("epyc-genoa", 0xa1_0f10),
            ("EPYC-Turin", 0xb0_0f00),
        ] {
            let model: CpuModel = name.parse().unwrap();
            assert_eq!(model.signature(), CpuSignature(expected), "{name}");
        }
        assert_eq!(CpuSignature::new(25, 1, 1), Ok(MILAN));
        assert_eq!(CpuSignature::new(6, 15, 1), Ok(CpuSignature(0x6f1)));
        for (family, model, stepping) in [(271, 0, 0), (0, 256, 0), (0, 0, 16)] {
            assert!(CpuSignature::new(family, model, stepping).is_err());
        }
    }

    #[test]
    fn strangers_are_told_what_is_known() {
        let error = "Opteron".parse::<CpuModel>().unwrap_err().to_string();
        assert!(error.contains("EPYC-Milan-v2"), "{error}");
        for text in ["", "0x", "+1", "0x+1", "-1", "0x100000000", "800f12"] {
            assert!(text.parse::<CpuSignature>().is_err(), "{text}");
        }
        assert_eq!("0x800f12".parse(), Ok(NAPLES));
        assert_eq!("8392466".parse(), Ok(NAPLES));
        assert_eq!(NAPLES.to_string(), "0x800f12");
    }

    #[test]
    fn a_guest_has_a_vcpu_and_not_too_many() {
        assert!(VcpuCount::try_from(0).is_err());
        assert_eq!(VcpuCount::try_from(1), Ok(VcpuCount::ONE));
        assert!(VcpuCount::try_from(MAX_VCPUS).is_ok());
        assert!(VcpuCount::try_from(MAX_VCPUS + 1).is_err());
        assert_eq!("1".parse(), Ok(VcpuCount::ONE));
        for text in ["", "+1", "-1", "0", "65537", "4097", "one"] {
            assert!(text.parse::<VcpuCount>().is_err(), "{text}");
        }
    }
}
