//! `casemate attest measure`: the launch digest that a guest will have.

use casemate_attest::measure::guest::GuestDigest;
use casemate_attest::measure::vcpu::{CpuSignature, VcpuCount};
use casemate_attest::reference::Inputs;
use clap::Args;
use serde::Serialize;

use super::guest::{GuestArgs, Vcpu, VcpuArgs, missing, unlaunchable};
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json};
use casemate_attest::measure::guest::Technology;

/// A guest's whole description.
#[derive(Debug, Args)]
pub struct MeasureArgs {
    #[command(flatten)]
    guest: GuestArgs,
    /// How many vCPUs; SEV does not measure them.
    #[arg(long, value_name = "N")]
    vcpus: Option<VcpuCount>,
    #[command(flatten)]
    vcpu: VcpuArgs,
    /// Print the digest and nothing else, for scripts.
    #[arg(long)]
    digest_only: bool,
}

#[derive(Serialize)]
struct Measured {
    digest: GuestDigest,
    mode: Technology,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpus: Option<VcpuCount>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu_signature: Option<CpuSignature>,
    inputs: Inputs,
    notes: Vec<&'static str>,
}

/// Measures.
pub fn run(args: &MeasureArgs, json: bool) -> Result<u8, Failure> {
    if args.digest_only && json {
        return Err(Failure::new("USAGE", "give --digest-only or --json"));
    }
    let measured = args.measure()?;
    if args.digest_only {
        return print_bytes(format!("{}\n", measured.digest).as_bytes());
    }
    if json {
        return print_json(&measured);
    }
    print_bytes(measured.text().as_bytes())
}

impl MeasureArgs {
    fn measure(&self) -> Result<Measured, Failure> {
        let mode = self.guest.mode();
        let measures_vcpus = mode != Technology::Sev;
        let vcpu = self.vcpu.one(mode)?.filter(|_| measures_vcpus);
        let vcpus = self.vcpus.filter(|_| measures_vcpus);
        if vcpus.is_none() && measures_vcpus {
            return Err(missing("--vcpus", mode));
        }
        let files = self.guest.read()?;
        let firmware = self.guest.firmware(&files)?;
        let signature = vcpu.map_or(CpuSignature(0), |vcpu| vcpu.signature);
        let count = vcpus.unwrap_or(VcpuCount::ONE);
        let description = self.guest.describe(&files, &firmware, count, signature);
        Ok(Measured {
            digest: description.digest().map_err(|e| unlaunchable(&e))?,
            mode,
            vcpus,
            vcpu_type: vcpu.and_then(|vcpu| vcpu.model).map(|model| model.name()),
            vcpu_signature: vcpu.map(|vcpu: Vcpu| vcpu.signature),
            inputs: self.guest.inputs(&files, &description)?,
            notes: self.guest.notes(),
        })
    }
}

impl Measured {
    fn text(&self) -> String {
        let mut text = format!("launch digest {}\n", self.digest);
        let mut row = |name: &str, value: String| {
            text.push_str(&format!("  {name:<12} {value}\n"));
        };
        row("mode", self.mode.to_string());
        row("profile", self.inputs.vmsa_profile.to_string());
        if let (Some(count), Some(signature)) = (self.vcpus, self.vcpu_signature) {
            let name = self.vcpu_type.map(|n| format!("{n}, ")).unwrap_or_default();
            row("vcpus", format!("{count}, {name}signature {signature}"));
        }
        if let Some(features) = self.inputs.guest_features {
            row("features", features.to_string());
        }
        row("ovmf", self.inputs.firmware.sha256.to_string());
        for (name, file) in [
            ("kernel", self.inputs.kernel),
            ("initrd", self.inputs.initrd),
        ] {
            if let Some(file) = file {
                row(name, file.sha256.to_string());
            }
        }
        if let Some(hash) = self.inputs.cmdline_sha256 {
            row("append", hash.to_string());
        }
        for note in &self.notes {
            row("note", (*note).to_owned());
        }
        text
    }
}
