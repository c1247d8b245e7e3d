//! A guest's description on the command line.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use casemate_attest::measure::guest::{Firmware, GuestDescription, Technology};
use casemate_attest::measure::kernel_hashes::{FileHash, KernelHashes, cmdline_hash};
use casemate_attest::measure::ovmf::{MAX_OVMF_LEN, Ovmf};
use casemate_attest::measure::vcpu::{CpuModel, CpuSignature, VcpuCount, VcpuError};
use casemate_attest::measure::vmsa::{Profile, SevFeatures};
use casemate_attest::reference::{FileReference, Hash256, Inputs};
use clap::Args;

use super::files;
use crate::agent::api::Failure;

/// What is measured, but for the vCPUs.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// What protects the guest: snp, sev or sev-es.
    #[arg(long)]
    mode: Technology,
    /// The firmware image, as the VMM loads it.
    #[arg(long, value_name = "FILE")]
    ovmf: PathBuf,
    /// The kernel, where the firmware gets one from the VMM and checks it (kernel-hashes=on).
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initrd.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(
        long,
        value_name = "TEXT",
        requires = "kernel",
        allow_hyphen_values = true
    )]
    append: Option<String>,
    /// SEV features of its vCPUs, in hex (default: 0x1 in SNP, 0x0 in SEV-ES).
    #[arg(long, value_name = "HEX")]
    guest_features: Option<SevFeatures>,
    /// Whose VMM launches it: qemu or casemate.
    #[arg(long, value_name = "VMM", default_value = "qemu")]
    vmsa_profile: Profile,
}

/// What CPUID says of its vCPUs, said in one of three ways.
#[derive(Debug, Args)]
pub struct VcpuArgs {
    /// vCPU type, as QEMU names it (EPYC-v4, EPYC-Milan, …).
    #[arg(long, value_name = "NAME", conflicts_with_all = ["vcpu_sig", "vcpu_family"])]
    vcpu_type: Option<CpuModel>,
    /// vCPU signature, CPUID leaf 1 EAX (0x800f12).
    #[arg(long, value_name = "NUMBER", conflicts_with = "vcpu_family")]
    vcpu_sig: Option<CpuSignature>,
    /// vCPU family.
    #[arg(long, value_name = "N", requires_all = ["vcpu_model", "vcpu_stepping"])]
    vcpu_family: Option<u16>,
    /// vCPU model.
    #[arg(long, value_name = "N", requires = "vcpu_family")]
    vcpu_model: Option<u16>,
    /// vCPU stepping.
    #[arg(long, value_name = "N", requires = "vcpu_family")]
    vcpu_stepping: Option<u16>,
}

/// A vCPU by name or by signature alone.
#[derive(Debug, Clone, Copy)]
pub struct Vcpu {
    /// The name, where one was given.
    pub model: Option<CpuModel>,
    /// The signature.
    pub signature: CpuSignature,
}

/// Numbers of vCPUs: `4`, `1,2,4`, `1-64`.
#[derive(Debug, Clone)]
pub struct VcpuCounts(pub Vec<VcpuCount>);

/// The files of a description, each read once.
pub struct Files {
    ovmf: Vec<u8>,
    kernel: Option<FileHash>,
    initrd: Option<FileHash>,
}

impl GuestArgs {
    /// Reads the files, those that are large side by side.
    pub fn read(&self) -> Result<Files, Failure> {
        let hash = |path: Option<&Path>| path.map(files::hash).transpose();
        std::thread::scope(|scope| {
            let kernel = scope.spawn(|| hash(self.kernel.as_deref()));
            let initrd = scope.spawn(|| hash(self.initrd.as_deref()));
            let ovmf = files::read(&self.ovmf, MAX_OVMF_LEN);
            let lost = |_| Failure::new("FILE", "a thread that reads files ended");
            Ok(Files {
                kernel: kernel.join().map_err(lost)??,
                initrd: initrd.join().map_err(lost)??,
                ovmf: ovmf?,
            })
        })
    }

    /// The firmware among `files`.
    pub fn firmware<'a>(&self, files: &'a Files) -> Result<Firmware<'a>, Failure> {
        let ovmf = Ovmf::parse(&files.ovmf)
            .map_err(|e| Failure::new("FIRMWARE", format!("{}: {e}", self.ovmf.display())))?;
        Ok(Firmware::new(ovmf))
    }

    /// The description of a guest with these vCPUs.
    pub fn describe<'a>(
        &self,
        files: &Files,
        firmware: &'a Firmware<'a>,
        vcpus: VcpuCount,
        signature: CpuSignature,
    ) -> GuestDescription<'a> {
        let kernel = files.kernel.as_ref();
        let hashes =
            |kernel| KernelHashes::new(kernel, files.initrd.as_ref(), self.append.as_deref());
        GuestDescription {
            technology: self.mode,
            firmware,
            kernel: kernel.map(hashes),
            vcpus,
            signature,
            features: self.features(),
            profile: self.vmsa_profile,
        }
    }

    /// What the files are, for the record.
    pub fn inputs(
        &self,
        files: &Files,
        description: &GuestDescription<'_>,
    ) -> Result<Inputs, Failure> {
        let reference = |hash: &FileHash| FileReference {
            sha256: Hash256(hash.sha256),
            size: hash.len,
        };
        let cmdline = cmdline_hash(self.append.as_deref().unwrap_or_default());
        Ok(Inputs {
            vmsa_profile: self.vmsa_profile,
            guest_features: description
                .effective_features()
                .map_err(|e| unlaunchable(&e))?,
            cmdline_sha256: files.kernel.map(|_| Hash256(cmdline)),
            firmware: FileReference {
                sha256: Hash256(description.firmware.sha256()),
                size: files.ovmf.len() as u64,
            },
            kernel: files.kernel.as_ref().map(reference),
            initrd: files.initrd.as_ref().map(reference),
        })
    }

    /// What protects the guest.
    pub const fn mode(&self) -> Technology {
        self.mode
    }

    /// What the caller should know of options that do not count.
    pub fn notes(&self) -> Vec<&'static str> {
        let given = self.guest_features.is_some_and(|f| f != SevFeatures::NONE);
        match (self.mode, self.vmsa_profile) {
            (Technology::SevEs, Profile::Qemu) if given => {
                vec!["QEMU gives SEV-ES guests no SEV features: --guest-features does not count"]
            }
            (Technology::Snp, Profile::Qemu)
                if !self.features().contains(SevFeatures::SNP_ACTIVE) =>
            {
                vec!["every SNP guest has SEV feature 0x1; no launch has this digest"]
            }
            (_, Profile::Casemate) => vec![
                "casemate's VMM launches neither SEV-ES nor SNP nor OVMF guests yet; this is what they will measure",
            ],
            _ => Vec::new(),
        }
    }

    fn features(&self) -> SevFeatures {
        let default = match self.mode {
            Technology::Snp => SevFeatures::SNP_ACTIVE,
            Technology::Sev | Technology::SevEs => SevFeatures::NONE,
        };
        self.guest_features.unwrap_or(default)
    }
}

impl VcpuArgs {
    /// The one that was named; `None` where none was, in SEV, which does not measure it.
    pub fn one(&self, mode: Technology) -> Result<Option<Vcpu>, Failure> {
        let fms = (self.vcpu_family, self.vcpu_model, self.vcpu_stepping);
        if let (Some(family), Some(model), Some(stepping)) = fms {
            let signature = CpuSignature::new(family, model, stepping)
                .map_err(|e| Failure::new("USAGE", e.to_string()))?;
            return Ok(Some(Vcpu::unnamed(signature)));
        }
        let model = self.vcpu_type.map(Vcpu::from);
        let vcpu = model.or(self.vcpu_sig.map(Vcpu::unnamed));
        if vcpu.is_none() && mode != Technology::Sev {
            return Err(missing("--vcpu-type, --vcpu-sig or --vcpu-family", mode));
        }
        Ok(vcpu)
    }
}

impl Vcpu {
    const fn unnamed(signature: CpuSignature) -> Self {
        Self {
            model: None,
            signature,
        }
    }
}

impl From<CpuModel> for Vcpu {
    fn from(model: CpuModel) -> Self {
        Self {
            model: Some(model),
            signature: model.signature(),
        }
    }
}

impl FromStr for VcpuCounts {
    type Err = VcpuError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut counts = Vec::new();
        for part in text.split(',') {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            let (from, to): (VcpuCount, VcpuCount) = (from.parse()?, to.parse()?);
            if from > to {
                return Err(VcpuError::CountText(part.to_owned()));
            }
            for count in from.get()..=to.get() {
                counts.push(VcpuCount::try_from(count)?);
            }
        }
        counts.sort_unstable();
        counts.dedup();
        Ok(Self(counts))
    }
}

/// An option that this mode needs.
pub fn missing(option: &str, mode: Technology) -> Failure {
    Failure::new("USAGE", format!("--mode {mode} needs {option}"))
}

/// A description that no VMM can launch.
pub fn unlaunchable(error: &dyn std::fmt::Display) -> Failure {
    Failure::new("UNLAUNCHABLE", error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpu_counts_are_lists_of_ranges() {
        let counts = |text: &str| text.parse::<VcpuCounts>().map(|c| c.0.len());
        assert_eq!(counts("4"), Ok(1));
        assert_eq!(counts("1-4,3-5,64"), Ok(6));
        assert_eq!(counts("1-4096"), Ok(4096));
        for text in ["", ",", "1,", "0", "4-1", "1-", "-1", "1-5000", "a"] {
            assert!(counts(text).is_err(), "{text}");
        }
    }
}
