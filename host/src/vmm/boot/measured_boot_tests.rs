use casemate_attest::measure::LaunchDigester;
use casemate_attest::measure::snp::{PageType, SnpLaunchDigester};

use super::*;

const KERNEL: &[u8] = b"a kernel";
const INITRD: &[u8] = b"an initramfs";

/// The last page of a public AmdSev build below which lies fill, and of a build that checks no kernel.
fn image(build: &str) -> Vec<u8> {
    let name = format!("ovmf_{build}_suffix.bin");
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../attest/tests/vectors/measurement/"
    );
    let suffix = std::fs::read(format!("{folder}{name}")).unwrap();
    [vec![0xf4; 3 * PAGE_LEN], suffix].concat()
}

fn plan(technology: Technology) -> MachinePlan {
    MachinePlan {
        vcpus: 3,
        technology,
        cmdline: "console=ttyS0".into(),
        firmware: crate::machine::plan::FirmwarePlan::for_image(1),
        ..crate::vmm::boot::tests::plan()
    }
}

fn technologies() -> [Technology; 3] {
    let emulated = true;
    [
        Technology::Sev {
            emulated,
            policy: 1,
        },
        Technology::SevEs {
            emulated,
            policy: 5,
        },
        Technology::SevSnp {
            emulated,
            policy: 0x3_0000,
        },
    ]
}

fn boot(plan: &MachinePlan) -> MeasuredBoot {
    MeasuredBoot::new(plan, &image("AmdSev"), KERNEL, INITRD).unwrap()
}

/// The digest that a processor comes to which is led through the steps.
fn replayed(boot: &MeasuredBoot, snp: bool) -> GuestDigest {
    let image = image("AmdSev");
    let mut sev = LaunchDigester::new();
    let mut chain = SnpLaunchDigester::new();
    for step in boot.steps() {
        match step {
            Step::Image { gpa, length } => {
                assert_eq!(gpa + length, 4 << 30);
                sev.update(&image);
                chain.normal(*gpa, image.as_chunks().0);
            }
            Step::Hashes(hashes) => {
                sev.update(&hashes.bytes);
                chain.normal(hashes.gpa, hashes.bytes.as_chunks().0);
            }
            Step::Special(gpa, page) => {
                let kind = match page {
                    SpecialPage::Zero => PageType::Zero,
                    SpecialPage::Secrets => PageType::Secrets,
                    SpecialPage::Cpuid => PageType::Cpuid,
                };
                chain.without_content(kind, *gpa, 1);
            }
        }
    }
    for page in boot.registers() {
        sev.update(page);
        chain.vmsa(page, 1);
    }
    match snp {
        true => GuestDigest::Snp(chain.finish()),
        false => GuestDigest::Sev(sev.finish()),
    }
}

#[test]
fn the_steps_lead_to_the_digest_that_owners_compute() {
    for technology in technologies() {
        let boot = boot(&plan(technology));
        let snp = matches!(technology, Technology::SevSnp { .. });
        assert_eq!(replayed(&boot, snp), boot.digest(), "{technology:?}");
        let vcpus = if technology.measures_registers() {
            3
        } else {
            0
        };
        assert_eq!(boot.registers().len(), vcpus, "{technology:?}");
        assert_eq!(boot.ap_eip().is_some(), vcpus > 0, "{technology:?}");
    }
}

#[test]
fn every_input_is_in_the_digest() {
    for technology in technologies() {
        let plan = plan(technology);
        let base = boot(&plan).digest();
        let other = |image: &[u8], kernel: &[u8], initrd: &[u8], plan: &MachinePlan| {
            MeasuredBoot::new(plan, image, kernel, initrd)
                .unwrap()
                .digest()
        };
        let image = image("AmdSev");
        let mut patched = image.clone();
        patched[7] ^= 1;
        let line = MachinePlan {
            cmdline: "console=ttyS0 ".into(),
            ..plan.clone()
        };
        for (what, digest) in [
            ("firmware", other(&patched, KERNEL, INITRD, &plan)),
            ("kernel", other(&image, b"another", INITRD, &plan)),
            ("initramfs", other(&image, KERNEL, b"", &plan)),
            ("command line", other(&image, KERNEL, INITRD, &line)),
        ] {
            assert_ne!(digest, base, "{what} of {technology:?}");
        }
        let more = MachinePlan {
            vcpus: 4,
            ..plan.clone()
        };
        let same = other(&image, KERNEL, INITRD, &more) == base;
        assert_eq!(same, !technology.measures_registers(), "{technology:?}");
    }
}

#[test]
fn a_secret_has_its_place_in_front_of_the_hashes() {
    let [sev, ..] = technologies();
    let boot = boot(&plan(sev));
    let area = boot.secret().unwrap();
    let Some(Step::Hashes(hashes)) = boot.steps().last() else {
        panic!("no hashes");
    };
    assert_eq!(u64::from(area.gpa) + u64::from(area.len), hashes.gpa);
}

#[test]
fn firmware_that_checks_no_kernel_and_what_is_none_is_refused() {
    let [sev, _, snp] = technologies();
    let refusal = |image: &[u8], plan: &MachinePlan| {
        let error = MeasuredBoot::new(plan, image, KERNEL, INITRD).unwrap_err();
        let cause = std::error::Error::source(&error).map(|cause| cause.to_string());
        format!("{error}: {}", cause.unwrap_or_default())
    };
    for technology in technologies() {
        let said = refusal(&image("OvmfX64"), &plan(technology));
        assert!(said.contains("does not check kernel hashes"), "{said}");
        let said = refusal(&[0xf4; 2 * PAGE_LEN], &plan(technology));
        assert!(said.starts_with("firmware image"), "{said}");
        assert!(refusal(&[0; 100], &plan(technology)).contains("whole pages"));
    }
    let said = refusal(&image("AmdSev"), &plan(Technology::None));
    assert!(said.contains("confidential guests only"), "{said}");
    for technology in [sev, snp] {
        let small = MachinePlan {
            memory_bytes: 8 << 20,
            ..plan(technology)
        };
        let said = refusal(&image("AmdSev"), &small);
        assert!(said.contains("no memory"), "{said}");
    }
}
