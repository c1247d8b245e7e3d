//! TCB versions: the security patch levels of one platform's firmware, compared part by part.
//!
//! A TCB version has no order. Firmware with an older boot loader and a newer microcode is neither
//! newer nor older than its opposite, and comparing the eight bytes as a number or as a tuple has
//! let downgrades through in other verifiers. So there is no `Ord` here, only
//! [`TcbVersion::shortfalls`].

use crate::product::Product;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Eight bytes as they stand in a report: without the product they say nothing, since Turin
/// orders them otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RawTcb(pub [u8; 8]);

/// The security patch level of each part. SNP ABI specification (publication 56860), TCB_VERSION.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcbVersion {
    /// Firmware of the FMC; Turin only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fmc: Option<u8>,
    /// The secure processor's boot loader.
    pub boot_loader: u8,
    /// The secure processor's operating system.
    pub tee: u8,
    /// The SNP firmware.
    pub snp: u8,
    /// The lowest microcode patch level of all cores.
    pub microcode: u8,
}

/// One part of a [`TcbVersion`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TcbPart {
    /// [`TcbVersion::fmc`].
    Fmc,
    /// [`TcbVersion::boot_loader`].
    BootLoader,
    /// [`TcbVersion::tee`].
    Tee,
    /// [`TcbVersion::snp`].
    Snp,
    /// [`TcbVersion::microcode`].
    Microcode,
}

/// A part that is below what is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortfall {
    /// Which part.
    pub part: TcbPart,
    /// The lowest accepted level.
    pub wanted: u8,
    /// The level found; `None` where the product has no such part.
    pub found: Option<u8>,
}

impl TcbPart {
    /// All of them, in the order they are shown.
    pub const ALL: [Self; 5] = [
        Self::Fmc,
        Self::BootLoader,
        Self::Tee,
        Self::Snp,
        Self::Microcode,
    ];
}

impl RawTcb {
    /// The parts, by the byte order of `product`. Reserved bytes are not kept: compare two raw
    /// versions where all eight count.
    pub const fn of(self, product: Product) -> TcbVersion {
        match product {
            Product::Milan | Product::Genoa => {
                let [boot_loader, tee, _, _, _, _, snp, microcode] = self.0;
                TcbVersion {
                    fmc: None,
                    boot_loader,
                    tee,
                    snp,
                    microcode,
                }
            }
            Product::Turin => {
                let [fmc, boot_loader, tee, snp, _, _, _, microcode] = self.0;
                TcbVersion {
                    fmc: Some(fmc),
                    boot_loader,
                    tee,
                    snp,
                    microcode,
                }
            }
        }
    }
}

impl TcbVersion {
    /// The bytes of this version on `product`; `None` where the product has an FMC and this has
    /// not, or the other way round.
    pub const fn to_raw(self, product: Product) -> Option<RawTcb> {
        let Self {
            fmc,
            boot_loader,
            tee,
            snp,
            microcode,
        } = self;
        match (product, fmc) {
            (Product::Milan | Product::Genoa, None) => {
                Some(RawTcb([boot_loader, tee, 0, 0, 0, 0, snp, microcode]))
            }
            (Product::Turin, Some(fmc)) => {
                Some(RawTcb([fmc, boot_loader, tee, snp, 0, 0, 0, microcode]))
            }
            _ => None,
        }
    }

    /// One part's level; `None` where there is no such part.
    pub const fn part(&self, part: TcbPart) -> Option<u8> {
        match part {
            TcbPart::Fmc => self.fmc,
            TcbPart::BootLoader => Some(self.boot_loader),
            TcbPart::Tee => Some(self.tee),
            TcbPart::Snp => Some(self.snp),
            TcbPart::Microcode => Some(self.microcode),
        }
    }

    /// Every part that is below `minimum`; empty where this version is good enough. A minimum for
    /// a part that this version does not have is never met.
    pub fn shortfalls(&self, minimum: &Self) -> Vec<Shortfall> {
        let short = |part: TcbPart| {
            let wanted = minimum.part(part)?;
            let found = self.part(part);
            let met = found.is_some_and(|level| level >= wanted);
            (!met).then_some(Shortfall {
                part,
                wanted,
                found,
            })
        };
        TcbPart::ALL.into_iter().filter_map(short).collect()
    }
}

impl fmt::Display for TcbPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fmc => "fmc",
            Self::BootLoader => "boot_loader",
            Self::Tee => "tee",
            Self::Snp => "snp",
            Self::Microcode => "microcode",
        })
    }
}

impl fmt::Display for TcbVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut levels = TcbPart::ALL
            .into_iter()
            .filter_map(|part| Some((part, self.part(part)?)));
        if let Some((part, level)) = levels.next() {
            write!(f, "{part} {level}")?;
        }
        levels.try_for_each(|(part, level)| write!(f, ", {part} {level}"))
    }
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { part, wanted, .. } = self;
        match self.found {
            Some(found) => write!(f, "{part} {found} is below {wanted}"),
            None => write!(f, "this product has no {part}, {wanted} is asked for"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn tcb(boot_loader: u8, snp: u8, microcode: u8) -> TcbVersion {
        TcbVersion {
            fmc: None,
            boot_loader,
            tee: 0,
            snp,
            microcode,
        }
    }

    #[test]
    fn a_newer_boot_loader_does_not_make_up_for_old_microcode() {
        let downgraded = tcb(5, 1, 1);
        let minimum = tcb(4, 23, 219);
        let parts: Vec<_> = downgraded
            .shortfalls(&minimum)
            .iter()
            .map(|short| short.part)
            .collect();
        assert_eq!(parts, [TcbPart::Snp, TcbPart::Microcode]);
        assert!(minimum.shortfalls(&minimum).is_empty());
        assert!(tcb(9, 30, 220).shortfalls(&minimum).is_empty());
    }

    #[test]
    fn the_two_byte_orders_differ() {
        let raw = RawTcb([1, 2, 3, 4, 5, 6, 7, 8]);
        let milan = raw.of(Product::Milan);
        assert_eq!(
            milan.to_string(),
            "boot_loader 1, tee 2, snp 7, microcode 8"
        );
        let turin = raw.of(Product::Turin);
        assert_eq!(
            turin.to_string(),
            "fmc 1, boot_loader 2, tee 3, snp 4, microcode 8"
        );
        assert_eq!(milan.to_raw(Product::Turin), None);
        assert_eq!(
            turin.to_raw(Product::Turin),
            Some(RawTcb([1, 2, 3, 4, 0, 0, 0, 8]))
        );
    }

    #[test]
    fn a_minimum_for_a_missing_part_is_not_met() {
        let minimum = TcbVersion {
            fmc: Some(0),
            ..tcb(0, 0, 0)
        };
        let short = tcb(9, 9, 9).shortfalls(&minimum);
        assert_eq!(short.len(), 1);
        assert_eq!(
            short[0].to_string(),
            "this product has no fmc, 0 is asked for"
        );
    }
}
