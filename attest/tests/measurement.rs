//! Launch digests of the public fixtures, and a second opinion: the `sev` crate's.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use casemate_attest::measure::guest::{Firmware, GuestDescription, GuestDigest, Technology};
use casemate_attest::measure::kernel_hashes::{FileHash, KernelHashes};
use casemate_attest::measure::ovmf::{Ovmf, SectionKind};
use casemate_attest::measure::vcpu::{CpuModel, CpuSignature, VcpuCount};
use casemate_attest::measure::vmsa::{Profile, SevFeatures};
use serde_json::Value;
use std::path::PathBuf;

#[test]
fn every_public_fixture_has_its_digest() {
    let cases: Value = serde_json::from_slice(&vector("measurement-expected.json")).unwrap();
    let cases = cases["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 9);
    for case in cases {
        let image = vector(&format!("measurement/{}", case["ovmf"].as_str().unwrap()));
        let firmware = Firmware::new(Ovmf::parse(&image).unwrap());
        let technology = match case["mode"].as_str().unwrap() {
            "SEV_SNP" => Technology::Snp,
            "SEV_ES" => Technology::SevEs,
            mode => mode.parse().unwrap(),
        };
        let kernel = file(&case["kernel"]).map(|kernel| {
            let initrd = file(&case["initrd"]);
            KernelHashes::new(&kernel, initrd.as_ref(), case["cmdline"].as_str())
        });
        let signature: CpuSignature = case["cpu_sig"].as_str().unwrap_or("0").parse().unwrap();
        if let Some(model) = case["cpu"].as_str() {
            let model: CpuModel = model.parse().unwrap();
            assert_eq!(model.signature(), signature);
        }
        let description = GuestDescription {
            technology,
            firmware: &firmware,
            kernel,
            vcpus: u16::try_from(case["vcpus"].as_u64().unwrap())
                .unwrap()
                .try_into()
                .unwrap(),
            signature,
            features: case["guest_features"].as_str().unwrap().parse().unwrap(),
            profile: Profile::Qemu,
        };
        assert_eq!(
            description.digest().unwrap().to_string(),
            case["digest"].as_str().unwrap(),
            "{}",
            case["name"]
        );
    }
}

#[test]
fn the_fixtures_say_what_they_need() {
    for (name, hashes) in [("AmdSev", true), ("OvmfX64", false)] {
        let image = vector(&format!("measurement/ovmf_{name}_suffix.bin"));
        let ovmf = Ovmf::parse(&image).unwrap();
        assert_eq!(ovmf.reset_eip(), Some(0x80_b004));
        assert_eq!(ovmf.hash_table().is_some(), hashes);
        let section = |kind| ovmf.sections().iter().any(|section| section.kind == kind);
        assert_eq!(section(SectionKind::KernelHashes), hashes);
        assert!(section(SectionKind::Secrets) && section(SectionKind::Cpuid));
    }
}

#[test]
fn the_sev_crate_measures_snp_as_we_do() {
    use sev::measurement::snp::{SnpMeasurementArgs, snp_calc_launch_digest};
    use sev::measurement::vcpu_types::CpuType;
    use sev::measurement::vmsa::{GuestFeatures, VMMType};
    let folder = tempfile::tempdir().unwrap();
    let (kernel, initrd) = (folder.path().join("kernel"), folder.path().join("initrd"));
    std::fs::write(&kernel, b"a kernel").unwrap();
    std::fs::write(&initrd, b"an initrd").unwrap();
    let models = [
        (CpuType::EpycV4, "EPYC-v4"),
        (CpuType::EpycRome, "EPYC-Rome"),
        (CpuType::EpycMilanV2, "EPYC-Milan-v2"),
        (CpuType::EpycGenoa, "EPYC-Genoa"),
        (CpuType::EpycTurin, "EPYC-Turin"),
    ];
    for (n, (theirs, ours)) in models.into_iter().enumerate() {
        for (name, append) in [
            ("AmdSev", Some("console=ttyS0")),
            ("AmdSev", None),
            ("OvmfX64", None),
        ] {
            let path = path(&format!("measurement/ovmf_{name}_suffix.bin"));
            let image = std::fs::read(&path).unwrap();
            let firmware = Firmware::new(Ovmf::parse(&image).unwrap());
            let vcpus = 1 + 3 * n as u16;
            let expected = snp_calc_launch_digest(SnpMeasurementArgs {
                vcpus: vcpus.into(),
                vcpu_type: theirs,
                ovmf_file: path,
                guest_features: GuestFeatures(0x21),
                kernel_file: append.map(|_| kernel.clone()),
                initrd_file: append.map(|_| initrd.clone()),
                append,
                ovmf_hash_str: None,
                vmm_type: Some(VMMType::QEMU),
            })
            .unwrap();
            let hashes = KernelHashes::new(
                &FileHash::of(b"a kernel"),
                Some(&FileHash::of(b"an initrd")),
                append,
            );
            let description = GuestDescription {
                technology: Technology::Snp,
                firmware: &firmware,
                kernel: append.map(|_| hashes),
                vcpus: VcpuCount::try_from(vcpus).unwrap(),
                signature: ours.parse::<CpuModel>().unwrap().signature(),
                features: SevFeatures(0x21),
                profile: Profile::Qemu,
            };
            let GuestDigest::Snp(digest) = description.digest().unwrap() else {
                unreachable!()
            };
            assert_eq!(digest.to_string(), expected.get_hex_ld(), "{name} {ours}");
        }
    }
}

/// The fixtures' names for file contents.
fn file(name: &Value) -> Option<FileHash> {
    let content = match name.as_str().unwrap() {
        "none" => return None,
        "empty" => Vec::new(),
        "k1" => vec![0xaa; 8192],
        "i1" => (0..=255).cycle().take(17 * 256).collect(),
        other => unreachable!("{other}"),
    };
    Some(FileHash::of(&content))
}

fn path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/vectors", name]
        .iter()
        .collect()
}

fn vector(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap()
}
