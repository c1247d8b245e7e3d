//! Which processor the emulated platform passes itself off as, and with which firmware.

use crate::product::Product;
use crate::report::{CpuidFms, FirmwareVersion, PlatformInfo, ReportVersion};
use crate::tcb::{RawTcb, TcbVersion};

/// A processor and its firmware, as reports show them.
///
/// [`milan`](Self::milan), [`genoa`](Self::genoa) and [`turin`](Self::turin) say what machines in
/// the field said in 2025 and 2026. Any field may be changed before the platform is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Personality {
    /// The product; decides the TCB layout, the chip id's length and the leaf's product name.
    pub product: Product,
    /// Family, model and stepping.
    pub cpuid: CpuidFms,
    /// The layout of its reports.
    pub report_version: ReportVersion,
    /// The firmware that it starts with, current and committed.
    pub firmware: FirmwareLevel,
    /// What the platform does.
    pub platform_info: PlatformInfo,
    /// Whether it encrypts memory with AES-256-XTS; to be believed no more than the rest.
    pub aes_256_xts: bool,
    /// The mitigations in force; reports show them from V5 on.
    pub mitigations: u64,
}

/// A firmware and the patch levels of the platform it runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirmwareLevel {
    /// ABI version and build.
    pub version: FirmwareVersion,
    /// The patch levels.
    pub tcb: TcbVersion,
}

impl Personality {
    /// The product's own.
    pub const fn of(product: Product) -> Self {
        match product {
            Product::Milan => Self::milan(),
            Product::Genoa => Self::genoa(),
            Product::Turin => Self::turin(),
        }
    }

    /// EPYC 7003 with V3 reports.
    pub const fn milan() -> Self {
        Self {
            product: Product::Milan,
            cpuid: CpuidFms {
                family: 0x19,
                model: 0x01,
                stepping: 1,
            },
            report_version: ReportVersion::V3,
            firmware: FirmwareLevel::new(29, None, 4, 24, 220),
            platform_info: SMT_AND_ECC,
            aes_256_xts: false,
            mitigations: 0,
        }
    }

    /// EPYC 9004 with V5 reports.
    pub const fn genoa() -> Self {
        Self {
            product: Product::Genoa,
            cpuid: CpuidFms {
                family: 0x19,
                model: 0x11,
                stepping: 1,
            },
            report_version: ReportVersion::V5,
            firmware: FirmwareLevel::new(49, None, 10, 27, 84),
            platform_info: SMT_AND_ECC,
            aes_256_xts: true,
            mitigations: 0xb,
        }
    }

    /// EPYC 9005 with V5 reports.
    pub const fn turin() -> Self {
        Self {
            product: Product::Turin,
            cpuid: CpuidFms {
                family: 0x1a,
                model: 0x02,
                stepping: 1,
            },
            report_version: ReportVersion::V5,
            firmware: FirmwareLevel::new(54, Some(1), 1, 4, 75),
            platform_info: SMT_AND_ECC,
            aes_256_xts: true,
            mitigations: 0xb,
        }
    }

    /// The bytes of `tcb`. Levels that the product does not have are left out, those that are
    /// missing are 0.
    pub(super) fn raw(&self, tcb: TcbVersion) -> RawTcb {
        let fmc = match self.product {
            Product::Milan | Product::Genoa => None,
            Product::Turin => Some(tcb.fmc.unwrap_or(0)),
        };
        let tcb = TcbVersion { fmc, ..tcb };
        tcb.to_raw(self.product).unwrap_or(RawTcb([0; 8]))
    }

    /// What CPUID function 1 says in EAX.
    pub(super) const fn cpuid_1_eax(&self) -> u32 {
        let CpuidFms {
            family,
            model,
            stepping,
        } = self.cpuid;
        let extended_family = family.saturating_sub(0xf) as u32;
        let model = model as u32;
        extended_family << 20
            | (model >> 4) << 16
            | 0xf << 8
            | (model & 0xf) << 4
            | (stepping & 0xf) as u32
    }
}

impl FirmwareLevel {
    const fn new(build: u8, fmc: Option<u8>, boot_loader: u8, snp: u8, microcode: u8) -> Self {
        Self {
            version: FirmwareVersion {
                major: 1,
                minor: 55,
                build,
            },
            tcb: TcbVersion {
                fmc,
                boot_loader,
                tee: 0,
                snp,
                microcode,
            },
        }
    }
}

/// SMT and ECC are on, the alias check has passed.
const SMT_AND_ECC: PlatformInfo = PlatformInfo(0x25);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn personalities_are_their_products() {
        for product in Product::ALL {
            let it = Personality::of(product);
            assert_eq!(it.product, product);
            assert_eq!(
                Product::from_cpuid(it.cpuid.family, it.cpuid.model),
                Some(product)
            );
            assert!(it.firmware.tcb.to_raw(product).is_some());
        }
        assert_eq!(Personality::milan().cpuid_1_eax(), 0x00a0_0f11);
        assert_eq!(Personality::genoa().cpuid_1_eax(), 0x00a1_0f11);
        assert_eq!(Personality::turin().cpuid_1_eax(), 0x00b0_0f21);
    }
}
