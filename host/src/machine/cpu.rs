//! The processor that a guest sees: what its description asks for, and what its plan fixes for all its life.
//!
//! A plan carries the bits themselves, not only a model's name: another host gives exactly those or refuses, whatever
//! its own version thinks the name means.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The processor in a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuPlan {
    /// What the description asked for.
    pub model: CpuModel,
    /// How the vCPUs are arranged; without it they are the cores of one socket.
    pub topology: Option<Topology>,
    /// What the guest was given at its launch. Before, and in tests, whatever the host has.
    pub baseline: Option<CpuBaseline>,
}

impl CpuPlan {
    /// The arrangement of `vcpus` vCPUs.
    pub fn topology(&self, vcpus: u8) -> Topology {
        self.topology.unwrap_or(Topology {
            sockets: 1,
            cores: vcpus,
            threads: 1,
        })
    }

    /// Whether a plan that came from elsewhere holds together.
    pub fn check(&self, vcpus: u8) -> bool {
        self.topology
            .is_none_or(|topology| topology.problem(vcpus).is_none())
            && self
                .baseline
                .as_ref()
                .is_none_or(|b| b.xsave.len() <= MAX_COMPONENTS)
    }
}

/// Models a description can name; `vmm/vcpu/features.rs` says which has what.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum CpuModel {
    /// x86-64-v2: what every processor of the last decade has, of either maker.
    Baseline,
    /// AMD EPYC 7001.
    EpycNaples,
    /// AMD EPYC 7002.
    EpycRome,
    /// AMD EPYC 7003.
    EpycMilan,
    /// AMD EPYC 9004.
    EpycGenoa,
    /// AMD EPYC 9005.
    EpycTurin,
    /// Everything that KVM offers on the host of the launch.
    #[default]
    Host,
}

impl CpuModel {
    /// All of them, the smallest first.
    pub const ALL: [Self; 7] = [
        Self::Baseline,
        Self::EpycNaples,
        Self::EpycRome,
        Self::EpycMilan,
        Self::EpycGenoa,
        Self::EpycTurin,
        Self::Host,
    ];

    /// As a description writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::EpycNaples => "epyc-naples",
            Self::EpycRome => "epyc-rome",
            Self::EpycMilan => "epyc-milan",
            Self::EpycGenoa => "epyc-genoa",
            Self::EpycTurin => "epyc-turin",
            Self::Host => "host",
        }
    }

    /// The model of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|model| model.name() == name)
    }
}

/// How vCPUs are arranged. APIC ids count threads, then cores, then sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Packages.
    pub sockets: u8,
    /// Cores of a package.
    pub cores: u8,
    /// Threads of a core, 1 or 2.
    pub threads: u8,
}

impl Topology {
    /// What is wrong with it for that many vCPUs.
    pub fn problem(&self, vcpus: u8) -> Option<&'static str> {
        let a_socket = u32::from(self.cores) * u32::from(self.threads);
        let all = a_socket * u32::from(self.sockets);
        if all != u32::from(vcpus) {
            return Some("sockets × cores × threads is not `vcpus`");
        }
        if !(1..=2).contains(&self.threads) {
            return Some("threads must be 1 or 2");
        }
        // A vCPU's APIC id is its number, and bits of it are its place.
        (self.sockets > 1 && !a_socket.is_power_of_two())
            .then_some("with several sockets, cores × threads must be a power of two")
    }
}

/// What a guest was given: another host must have all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuBaseline {
    /// `AuthenticAMD` or `GenuineIntel`.
    pub vendor: [u8; 12],
    /// Family, model and stepping as CPUID leaf 1 tells them.
    pub signature: u32,
    /// Feature words, in the order of `vmm/vcpu/features.rs`.
    pub words: [u32; FEATURE_WORDS],
    /// Components of the XSAVE area that the guest may enable, and where its processor keeps them.
    pub xsave: Vec<XsaveComponent>,
    /// Frequency of its TSC; 0 if it never ran.
    pub tsc_khz: u32,
}

/// One component of the XSAVE area in the standard format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct XsaveComponent {
    /// Bit of XCR0, from 2.
    pub bit: u8,
    /// Size in bytes.
    pub size: u32,
    /// Offset in bytes: processors differ, for the protection keys even among EPYCs.
    pub offset: u32,
}

/// Number of feature words.
pub const FEATURE_WORDS: usize = 12;
const MAX_COMPONENTS: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_round() {
        for model in CpuModel::ALL {
            assert_eq!(CpuModel::named(model.name()), Some(model));
        }
        assert_eq!(CpuModel::named("epyc"), None);
    }

    #[test]
    fn an_arrangement_fits_the_number_of_vcpus_and_the_apic_ids() {
        let problem = |sockets, cores, threads, vcpus| {
            Topology {
                sockets,
                cores,
                threads,
            }
            .problem(vcpus)
        };
        assert_eq!(problem(1, 3, 2, 6), None);
        assert_eq!(problem(4, 8, 2, 64), None);
        assert!(problem(1, 2, 2, 3).unwrap().contains("is not `vcpus`"));
        assert!(problem(1, 1, 4, 4).unwrap().contains("threads"));
        assert!(problem(2, 3, 1, 6).unwrap().contains("power of two"));
        assert!(problem(0, 0, 1, 0).is_none() && problem(255, 255, 2, 2).is_some());
    }
}
