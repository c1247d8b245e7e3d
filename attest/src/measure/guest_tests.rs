use super::*;
use crate::measure::kernel_hashes::FileHash;
use crate::measure::ovmf::tests::Image;

const MILAN: CpuSignature = CpuSignature(0xa0_0f11);

fn kernel() -> KernelHashes {
    KernelHashes::new(&FileHash::of(b"kernel"), None, Some("ro"))
}

/// The digest of a change of a whole description.
fn digest(
    technology: Technology,
    image: &Image,
    change: impl FnOnce(&mut GuestDescription<'_>),
) -> Result<GuestDigest, GuestError> {
    let bytes = image.bytes();
    let firmware = Firmware::new(Ovmf::parse(&bytes).unwrap());
    let mut description = GuestDescription {
        technology,
        firmware: &firmware,
        kernel: Some(kernel()),
        vcpus: VcpuCount::try_from(2).unwrap(),
        signature: MILAN,
        features: SevFeatures::SNP_ACTIVE,
        profile: Profile::Qemu,
    };
    change(&mut description);
    description.digest()
}

const ALL: [Technology; 3] = [Technology::Sev, Technology::SevEs, Technology::Snp];

#[test]
fn all_that_should_count_counts_and_nothing_else() {
    type Change = fn(&mut GuestDescription<'_>);
    // With each change: in which of SEV, SEV-ES and SNP it counts.
    let changes: [(&str, [bool; 3], Change); 7] = [
        ("kernel", [true; 3], |d| d.kernel = None),
        ("vcpus", [false, true, true], |d| d.vcpus = VcpuCount::ONE),
        ("signature", [false, true, true], |d| {
            d.signature = CpuSignature(0x80_0f12);
        }),
        ("features", [false, false, true], |d| {
            d.features = SevFeatures(0x21);
        }),
        ("profile", [false, false, true], |d| {
            d.profile = Profile::Casemate;
        }),
        ("initrd", [true; 3], |d| {
            let initrd = FileHash::of(b"initrd");
            d.kernel = Some(KernelHashes::new(
                &FileHash::of(b"kernel"),
                Some(&initrd),
                Some("ro"),
            ));
        }),
        ("nothing", [false; 3], |_| {}),
    ];
    for (n, technology) in ALL.into_iter().enumerate() {
        let image = Image::amd_sev();
        let before = digest(technology, &image, |_| {}).unwrap();
        for (name, counts, change) in &changes {
            // Our VMM starts no SEV-ES guest with SNP's feature bit.
            if *name == "profile" && technology == Technology::SevEs {
                continue;
            }
            let after = digest(technology, &image, change).unwrap();
            assert_eq!(before != after, counts[n], "{technology} {name}");
        }
    }
}

#[test]
fn our_profile_counts_in_sev_es() {
    let change = |d: &mut GuestDescription<'_>| d.features = SevFeatures::NONE;
    let image = Image::amd_sev();
    let qemu = digest(Technology::SevEs, &image, change).unwrap();
    let ours = digest(Technology::SevEs, &image, |d| {
        change(d);
        d.profile = Profile::Casemate;
    });
    let swap = digest(Technology::SevEs, &image, |d| {
        d.features = SevFeatures::DEBUG_SWAP;
        d.profile = Profile::Casemate;
    });
    assert!(qemu != ours.clone().unwrap() && ours != swap);
}

#[test]
fn our_vmm_s_features_are_those_that_kvm_takes() {
    for (technology, features, right) in [
        (Technology::Snp, 0x1, true),
        (Technology::Snp, 0x21, true),
        (Technology::Snp, 0x20, false),
        (Technology::Snp, 0x3, false),
        (Technology::SevEs, 0x0, true),
        (Technology::SevEs, 0x20, true),
        (Technology::SevEs, 0x1, false),
        (Technology::Sev, 0xffff, true),
    ] {
        let result = digest(technology, &Image::amd_sev(), |d| {
            d.profile = Profile::Casemate;
            d.features = SevFeatures(features);
        });
        assert_eq!(result.is_ok(), right, "{technology} {features:#x}");
    }
}

#[test]
fn a_kernel_needs_a_firmware_that_checks_it() {
    let no_table = |image: &mut Image| image.entries[1].1 = vec![0; 8];
    let short_table = |image: &mut Image| image.entries[1].1[4..].copy_from_slice(&[16, 0, 0, 0]);
    let at_the_edge = |image: &mut Image| {
        image.entries[1].1[..4].copy_from_slice(&0x81_0ff0u32.to_le_bytes());
    };
    type Change<'a> = &'a dyn Fn(&mut Image);
    let cases: [(Change<'_>, &[Technology]); 3] = [
        (&no_table, &ALL),
        (&short_table, &ALL),
        (&at_the_edge, &[Technology::Snp]),
    ];
    for (change, refused) in cases {
        let mut image = Image::amd_sev();
        change(&mut image);
        for technology in ALL {
            let found = digest(technology, &image, |_| {});
            assert_eq!(found.is_err(), refused.contains(&technology), "{found:?}");
            // Without a kernel nobody looks there.
            assert!(digest(technology, &image, |d| d.kernel = None).is_ok());
        }
    }
    let mut image = Image::amd_sev();
    image.sections.retain(|(_, _, kind)| *kind != 0x10);
    let refused = digest(Technology::Snp, &image, |_| {});
    assert_eq!(refused, Err(GuestError::NoKernelHashes));
    let mut image = Image::amd_sev();
    image.sections[4].1 = 0x2000;
    let refused = digest(Technology::Snp, &image, |_| {});
    assert_eq!(refused, Err(GuestError::HashTablePlace(0x81_0c00)));
    assert!(digest(Technology::Snp, &image, |d| d.kernel = None).is_ok());
}

#[test]
fn vcpus_need_a_place_to_begin() {
    let mut image = Image::amd_sev();
    image.entries.remove(0);
    for technology in [Technology::SevEs, Technology::Snp] {
        let refused = digest(technology, &image, |_| {});
        assert_eq!(refused, Err(GuestError::NoResetBlock));
    }
    assert!(digest(Technology::Sev, &image, |_| {}).is_ok());
    let mut image = Image::amd_sev();
    image.entries[0].1 = vec![0; 4];
    let refused = digest(Technology::Snp, &image, |_| {});
    assert_eq!(refused, Err(GuestError::NoApReset(2)));
    assert!(digest(Technology::Snp, &image, |d| d.vcpus = VcpuCount::ONE).is_ok());
}

#[test]
fn a_section_of_unknown_kind_is_not_guessed() {
    let mut image = Image::amd_sev();
    image.sections.push((0x90_0000, 0x1000, 5));
    let refused = digest(Technology::Snp, &image, |_| {});
    assert!(matches!(
        refused,
        Err(GuestError::UnknownSection { kind: 5, .. })
    ));
    assert!(digest(Technology::SevEs, &image, |_| {}).is_ok());
}

#[test]
fn names_of_technologies_are_those_of_other_tools_too() {
    for (text, technology) in [
        ("sev", Technology::Sev),
        ("seves", Technology::SevEs),
        ("SEV-ES", Technology::SevEs),
        ("snp", Technology::Snp),
        ("sev-snp", Technology::Snp),
    ] {
        assert_eq!(text.parse(), Ok(technology));
    }
    assert!("tdx".parse::<Technology>().is_err());
}
