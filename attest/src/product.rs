//! The SEV-SNP products: each has a root key, a TCB layout and a name of its own.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A processor line with an SEV-SNP root of its own.
///
/// Bergamo and Siena are Genoa to the key service and to the root key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Product {
    /// EPYC 7003.
    Milan,
    /// EPYC 9004 and 8004.
    Genoa,
    /// EPYC 9005.
    Turin,
}

/// Why a text is no product.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no SEV-SNP product; milan, genoa and turin are")]
pub struct ProductError(String);

impl Product {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Milan, Self::Genoa, Self::Turin];

    /// The product of a CPUID family and model (both with their extended parts added), as reports
    /// of version 3 and later carry them. `None` for one that is not known: a report of it is
    /// refused, never guessed.
    pub const fn from_cpuid(family: u8, model: u8) -> Option<Self> {
        match (family, model) {
            (0x19, 0x00..=0x0f) => Some(Self::Milan),
            (0x19, 0x10..=0x1f | 0xa0..=0xaf) => Some(Self::Genoa),
            (0x1a, 0x00..=0x1f) => Some(Self::Turin),
            _ => None,
        }
    }

    /// The product that a leaf certificate's product name (`Milan-B0`, `Genoa`) starts with.
    pub fn from_leaf_name(name: &str) -> Option<Self> {
        let line = name.split('-').next().unwrap_or(name);
        Self::ALL
            .into_iter()
            .find(|product| product.kds_name() == line)
    }

    /// The name in the key service's addresses and in AMD's certificates.
    pub const fn kds_name(self) -> &'static str {
        match self {
            Self::Milan => "Milan",
            Self::Genoa => "Genoa",
            Self::Turin => "Turin",
        }
    }

    /// The length of the chip's identity in the leaf (hwID) and in the key service's addresses:
    /// 8 bytes on Turin, whose reports fill the rest of `chip_id` with zeros; 64 before.
    pub const fn hwid_len(self) -> usize {
        match self {
            Self::Milan | Self::Genoa => 64,
            Self::Turin => 8,
        }
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Milan => "milan",
            Self::Genoa => "genoa",
            Self::Turin => "turin",
        })
    }
}

impl FromStr for Product {
    type Err = ProductError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|product| product.kds_name().eq_ignore_ascii_case(text))
            .ok_or_else(|| ProductError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bergamo_and_siena_are_genoa_and_strangers_are_nothing() {
        assert_eq!(Product::from_cpuid(0x19, 0x01), Some(Product::Milan));
        assert_eq!(Product::from_cpuid(0x19, 0x11), Some(Product::Genoa));
        assert_eq!(Product::from_cpuid(0x19, 0xa0), Some(Product::Genoa));
        assert_eq!(Product::from_cpuid(0x1a, 0x02), Some(Product::Turin));
        assert_eq!(Product::from_cpuid(0x19, 0x20), None);
        assert_eq!(Product::from_cpuid(0x17, 0x31), None);
        assert_eq!(Product::from_cpuid(0x1a, 0x50), None);
    }

    #[test]
    fn names_are_read_as_kds_and_people_write_them() {
        assert_eq!(Product::from_leaf_name("Milan-B0"), Some(Product::Milan));
        assert_eq!(Product::from_leaf_name("Genoa"), Some(Product::Genoa));
        assert_eq!(Product::from_leaf_name("MilanX"), None);
        assert_eq!("TURIN".parse(), Ok(Product::Turin));
        assert!("venice".parse::<Product>().is_err());
    }
}
