//! SNP launches on the software secure processor: each state, each refusal, and the digest beside
//! the specification's table.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod snp_common;

use casemate_attest::measure::snp::PageType;
use casemate_attest::processor::FirmwareError;
use casemate_attest::processor::snp::{
    IdBlockParameters, KeySelect, LaunchPage, Personality, SnpGuestState, SnpLaunchFinish,
    SnpLaunchStart, SnpProcessor,
};
use casemate_attest::product::Product;
use casemate_attest::report::{PlatformBit, PlatformInfo, SnpPolicy, SnpPolicyBit};
use sha2::{Digest, Sha384};
use snp_common::{
    FINISH, Owner, START, channel, load, processor, processor_as, report, running_with, started,
};

const NORMAL: LaunchPage = LaunchPage::new(PageType::Normal, 0x1000);

/// PAGE_INFO written out from the specification's table, hashed by another library.
#[test]
fn the_digest_is_that_of_the_table() {
    let mut processor = processor(Product::Milan);
    let handle = started(&mut processor, START);
    load(&mut processor, handle);
    let ours = processor.launch_finish(handle, &FINISH).unwrap();
    let (zero, one, four) = (
        [0; 48],
        Sha384::digest([0x11; 4096]),
        Sha384::digest([0x44; 4096]),
    );
    let mut digest = [0; 48];
    for (page_type, gpa, contents) in [
        (1u8, 0xffff_f000u64, one.as_slice()),
        (3, 0x80_0000, &zero),
        (5, 0x80_d000, &zero),
        (6, 0x80_e000, &zero),
        (4, 0x80_f000, &zero),
        (2, 0xffff_ffff_f000, four.as_slice()),
    ] {
        let mut info = [0; 0x70];
        info[..0x30].copy_from_slice(&digest);
        info[0x30..0x60].copy_from_slice(contents);
        info[0x60] = 0x70;
        info[0x62] = page_type;
        info[0x68..].copy_from_slice(&gpa.to_le_bytes());
        digest = Sha384::digest(info).into();
    }
    assert_eq!(ours.as_bytes(), &digest);
}

#[test]
fn states_follow_one_another_and_nothing_else_is_allowed() {
    use SnpGuestState::{Init, Launch, Running};
    let mut processor = processor(Product::Genoa);
    let handle = processor.gctx_create().unwrap();
    let state = |processor: &mut SnpProcessor| processor.guest(handle).unwrap().status().state;
    let update = |processor: &mut SnpProcessor| {
        processor
            .guest(handle)
            .unwrap()
            .launch_update(NORMAL, &mut [0; 4096])
    };
    let refused = Err(FirmwareError::InvalidGuestState);

    assert_eq!(state(&mut processor), Init);
    assert_eq!(update(&mut processor), refused);
    assert_eq!(processor.activate(handle, 1), refused);
    assert_eq!(processor.launch_finish(handle, &FINISH).map(drop), refused);
    assert_eq!(processor.guest_request(handle, &[0; 96]).map(drop), refused);

    processor.launch_start(handle, START).unwrap();
    assert_eq!(state(&mut processor), Launch);
    assert_eq!(processor.launch_start(handle, START), refused);
    assert_eq!(processor.guest_request(handle, &[0; 96]).map(drop), refused);
    assert_eq!(update(&mut processor), Err(FirmwareError::Inactive));
    processor.activate(handle, 1).unwrap();
    update(&mut processor).unwrap();

    processor.launch_finish(handle, &FINISH).unwrap();
    assert_eq!(state(&mut processor), Running);
    assert_eq!(update(&mut processor), refused);
    assert_eq!(processor.launch_start(handle, START), refused);
    assert_eq!(processor.launch_finish(handle, &FINISH).map(drop), refused);
    let status = processor.guest(handle).unwrap().status();
    assert_eq!((status.asid, status.policy), (Some(1), START.policy));
    assert_eq!(status.desired_tsc_khz, 2_450_000);

    processor.decommission(handle).unwrap();
    assert_eq!(
        processor.decommission(handle),
        Err(FirmwareError::InvalidGuest)
    );
    assert_eq!(
        processor.guest(handle).map(drop),
        Err(FirmwareError::InvalidGuest)
    );
}

#[test]
fn asids_and_contexts_run_out_and_come_back() {
    let mut processor = processor(Product::Genoa);
    let first = started(&mut processor, START);
    assert_eq!(processor.activate(first, 2), Err(FirmwareError::Active));
    let second = processor.gctx_create().unwrap();
    processor.launch_start(second, START).unwrap();
    assert_eq!(processor.activate(second, 1), Err(FirmwareError::AsidOwned));
    assert_eq!(
        processor.activate(second, 0),
        Err(FirmwareError::InvalidAsid)
    );
    assert_eq!(
        processor.activate(second, 5),
        Err(FirmwareError::InvalidAsid)
    );
    processor.decommission(first).unwrap();
    processor.activate(second, 1).unwrap();
    for _ in 0..3 {
        let another = processor.gctx_create().unwrap();
        assert_ne!(another, first);
    }
    assert_eq!(processor.gctx_create(), Err(FirmwareError::ResourceLimit));
}

#[test]
fn a_policy_is_held_against_the_platform() {
    let start = |personality: Personality, policy: u64| {
        let mut processor = processor_as(personality);
        let handle = processor.gctx_create().unwrap();
        let start = SnpLaunchStart {
            policy: SnpPolicy(policy),
            ..START
        };
        let outcome = processor.launch_start(handle, start);
        let state = processor.guest(handle).unwrap().status().state;
        assert_eq!(state == SnpGuestState::Launch, outcome.is_ok());
        outcome
    };
    let bit = |bit: SnpPolicyBit| 1u64 << bit as u32;
    let (good, failed) = (0x3_0000, Err(FirmwareError::PolicyFailure));
    let invalid = Err(FirmwareError::InvalidParam);
    let milan = Personality::milan;
    assert_eq!(start(milan(), good), Ok(()));
    assert_eq!(start(milan(), 1 << 16), invalid, "bit 17 must be one");
    assert_eq!(start(milan(), good | 1 << 26), invalid, "reserved");
    assert_eq!(start(milan(), good | 1 << 63), invalid, "reserved");
    assert_eq!(start(milan(), good | 0x0137), Ok(()), "ABI 1.55");
    assert_eq!(start(milan(), good | 0x0138), failed, "ABI 1.56");
    assert_eq!(start(milan(), good | 0x0200), failed, "ABI 2.0");
    assert_eq!(start(milan(), 1 << 17), failed, "SMT is on");
    let info = |bits: &[PlatformBit]| Personality {
        platform_info: PlatformInfo(bits.iter().fold(0, |info, bit| info | 1 << *bit as u32)),
        ..milan()
    };
    assert_eq!(start(info(&[]), 1 << 17), Ok(()));
    for (policy, platform) in [
        (SnpPolicyBit::RaplDis, PlatformBit::RaplDisabled),
        (
            SnpPolicyBit::CiphertextHiding,
            PlatformBit::CiphertextHidingEnabled,
        ),
    ] {
        assert_eq!(start(milan(), good | bit(policy)), failed);
        assert_eq!(start(info(&[platform]), good | bit(policy)), Ok(()));
    }
    let xts = good | bit(SnpPolicyBit::MemAes256Xts);
    assert_eq!(start(milan(), xts), failed);
    assert_eq!(start(Personality::genoa(), xts), Ok(()));
    // KVM refuses these; firmware does not.
    let kernels = [
        SnpPolicyBit::MigrateMa,
        SnpPolicyBit::SingleSocket,
        SnpPolicyBit::CxlAllow,
    ];
    for allowed in kernels.into_iter().chain([SnpPolicyBit::Debug]) {
        assert_eq!(start(milan(), good | bit(allowed)), Ok(()));
    }
}

#[test]
fn a_refused_page_leaves_the_digest_as_it_was() {
    let mut processor = processor(Product::Turin);
    let handle = started(&mut processor, START);
    let guest = processor.guest(handle).unwrap();
    let mut refused = |page: LaunchPage, contents: &mut [u8; 4096]| {
        guest.launch_update(page, contents).unwrap_err()
    };
    let imi = LaunchPage {
        imi: true,
        ..NORMAL
    };
    assert_eq!(refused(imi, &mut [0; 4096]), FirmwareError::InvalidParam);
    for gpa in [0x1001, 0x1800, 1 << 52, u64::MAX - 4095] {
        let page = LaunchPage { gpa, ..NORMAL };
        assert_eq!(refused(page, &mut [0; 4096]), FirmwareError::InvalidAddress);
    }
    let mut cpuid = [0; 4096];
    cpuid[0] = 1;
    cpuid[16] = 7;
    cpuid[16 + 28] = 0b11;
    let page = LaunchPage::new(PageType::Cpuid, 0x2000);
    assert_eq!(refused(page, &mut cpuid), FirmwareError::InvalidParam);
    assert_eq!(cpuid[16 + 28], 0b01, "TSC_ADJUST is taken out");
    let digest = processor.launch_finish(handle, &FINISH).unwrap();
    assert_eq!(digest.as_bytes(), &[0; 48]);
}

#[test]
fn pages_come_back_as_their_type_says() {
    let mut processor = processor(Product::Milan);
    let handle = started(&mut processor, START);
    let guest = processor.guest(handle).unwrap();
    let mut after = |page_type| {
        let mut page = [0x5a; 4096];
        guest
            .launch_update(LaunchPage::new(page_type, 0x1000), &mut page)
            .unwrap();
        page
    };
    assert_eq!(after(PageType::Normal), [0x5a; 4096]);
    assert_eq!(after(PageType::Unmeasured), [0x5a; 4096]);
    assert_eq!(after(PageType::Zero), [0; 4096]);
    let secrets = after(PageType::Secrets);
    assert_eq!(
        secrets[..16],
        [3, 0, 0, 0, 0, 0, 0, 0, 0x11, 0x0f, 0xa0, 0, 0, 0, 0, 0]
    );
    assert_eq!(secrets[0x10..0x20], [0x60; 16]);
    let keys: Vec<_> = secrets[0x20..0xa0].chunks(32).collect();
    for (n, key) in keys.iter().enumerate() {
        assert!(!keys[..n].contains(key) && key.iter().any(|byte| *byte != 0));
    }
    let other = started(&mut processor, START);
    let mut others = [0; 4096];
    let page = LaunchPage::new(PageType::Secrets, 0x1000);
    processor
        .guest(other)
        .unwrap()
        .launch_update(page, &mut others)
        .unwrap();
    assert_ne!(others[0x20..0x40], secrets[0x20..0x40]);
}

#[test]
fn contents_place_permissions_and_order_count() {
    let mut digests = Vec::new();
    let perms = LaunchPage {
        vmpl_permissions: [1, 0, 0],
        ..NORMAL
    };
    let moved = LaunchPage {
        gpa: 0x2000,
        ..NORMAL
    };
    let vmsa = LaunchPage {
        page_type: PageType::Vmsa,
        ..NORMAL
    };
    for pages in [
        vec![(NORMAL, 1)],
        vec![(NORMAL, 2)],
        vec![(perms, 1)],
        vec![(moved, 1)],
        vec![(vmsa, 1)],
        vec![(NORMAL, 1), (moved, 1)],
        vec![(moved, 1), (NORMAL, 1)],
    ] {
        let mut processor = processor(Product::Milan);
        let handle = started(&mut processor, START);
        for (page, fill) in pages {
            let guest = processor.guest(handle).unwrap();
            guest.launch_update(page, &mut [fill; 4096]).unwrap();
        }
        let digest = processor.launch_finish(handle, &FINISH).unwrap();
        assert!(!digests.contains(&digest));
        digests.push(digest);
    }
}

#[test]
fn an_id_block_says_what_must_be_launched_and_reports_name_its_keys() {
    let digest = {
        let mut processor = processor(Product::Genoa);
        let handle = started(&mut processor, START);
        load(&mut processor, handle);
        *processor.launch_finish(handle, &FINISH).unwrap().as_bytes()
    };
    let owner = Owner::new();
    let signed = owner.sign(&digest, START.policy);
    let [id_key, author_key] = owner.key_digests();
    for author in [false, true] {
        let mut processor = processor(Product::Genoa);
        let finish = SnpLaunchFinish {
            host_data: [0x40; 32],
            ..signed.finish(author)
        };
        let (handle, secrets) = running_with(&mut processor, &finish);
        let report = report(
            &mut processor,
            handle,
            &mut channel(&secrets),
            [9; 64],
            KeySelect::Any,
        );
        assert_eq!(report.measurement(), digest);
        assert_eq!(report.host_data(), [0x40; 32]);
        assert_eq!(
            (report.family_id(), report.image_id()),
            ([0xfa; 16], [0x1a; 16])
        );
        assert_eq!(report.guest_svn(), 7);
        assert_eq!(report.id_key_digest(), id_key);
        assert_eq!(report.has_author_key(), author);
        let expected = if author { author_key } else { [0; 48] };
        assert_eq!(report.author_key_digest(), expected);
    }
}

#[test]
fn a_wrong_id_block_stops_the_launch_and_a_right_one_goes_on() {
    let mut processor = processor(Product::Genoa);
    let handle = started(&mut processor, START);
    load(&mut processor, handle);
    let digest = {
        let mut other = snp_common::processor(Product::Genoa);
        let handle = started(&mut other, START);
        load(&mut other, handle);
        *other.launch_finish(handle, &FINISH).unwrap().as_bytes()
    };
    let (owner, stranger) = (Owner::new(), Owner::new());
    let good = owner.sign(&digest, START.policy);
    let mut finish = |signed: &snp_common::SignedBlock, author| {
        processor
            .launch_finish(handle, &signed.finish(author))
            .map(drop)
    };

    let wrong_digest = owner.sign(&[7; 48], START.policy);
    assert_eq!(
        finish(&wrong_digest, false),
        Err(FirmwareError::BadMeasurement)
    );
    let wrong_policy = owner.sign(&digest, SnpPolicy(0xb_0000));
    assert_eq!(
        finish(&wrong_policy, false),
        Err(FirmwareError::PolicyFailure)
    );

    let mut version = good.block;
    version[0x50] = 2;
    assert_eq!(
        finish(&owner.sign_block(version), false),
        Err(FirmwareError::InvalidParam)
    );
    // A byte of the block; of R, of S, of their upper fields; of the ID key's x.
    let mut changed = good.clone();
    changed.block[0x54] ^= 1;
    assert_eq!(finish(&changed, false), Err(FirmwareError::BadSignature));
    for at in [
        0x40,
        0x40 + 48,
        0x40 + 72,
        0x40 + 143,
        0x244,
        0x244 + 60,
        0x28c,
    ] {
        let mut changed = good.clone();
        changed.auth[at] ^= 1;
        assert_eq!(
            finish(&changed, false),
            Err(FirmwareError::BadSignature),
            "{at:#x}"
        );
    }
    for at in [0x00, 0x240] {
        let mut changed = good.clone();
        changed.auth[at] ^= 3;
        assert_eq!(
            finish(&changed, false),
            Err(FirmwareError::InvalidParam),
            "{at:#x}"
        );
    }

    // The author: signature, key, algorithm, curve, and somebody else's.
    for (at, error) in [
        (0x680, FirmwareError::BadSignature),
        (0x884, FirmwareError::BadSignature),
        (0x04, FirmwareError::InvalidParam),
        (0x880, FirmwareError::InvalidParam),
    ] {
        let mut changed = good.clone();
        changed.auth[at] ^= 2;
        assert_eq!(finish(&changed, true), Err(error), "{at:#x}");
    }
    let mut foreign = good.clone();
    foreign.auth[0x680..].copy_from_slice(&stranger.sign_block(good.block).auth[0x680..]);
    assert_eq!(finish(&foreign, true), Err(FirmwareError::BadSignature));

    finish(&good, true).unwrap();
}

/// `measure::id_block` makes what `processor` checks, written apart from one another.
#[test]
fn the_blocks_that_the_library_signs_are_taken() {
    use casemate_attest::measure::id_block::{IdAuth, IdBlock, IdSigningKey};
    let mut processor = processor(Product::Turin);
    let handle = started(&mut processor, START);
    load(&mut processor, handle);
    let digest = {
        let mut other = snp_common::processor(Product::Turin);
        let handle = started(&mut other, START);
        load(&mut other, handle);
        other.launch_finish(handle, &FINISH).unwrap()
    };
    let block = IdBlock {
        launch_digest: digest,
        family_id: [1; 16],
        image_id: [2; 16],
        guest_svn: 3,
        policy: START.policy,
    };
    let [id, author] =
        [(); 2].map(|()| IdSigningKey::from_pkcs8(&IdSigningKey::generate().unwrap()).unwrap());
    let auth = IdAuth::sign(&block, &id, Some(&author)).unwrap();
    let finish = SnpLaunchFinish {
        id: Some(IdBlockParameters {
            block: &block.to_bytes(),
            auth: auth.as_bytes(),
            author_key_en: true,
        }),
        ..FINISH
    };
    assert_eq!(processor.launch_finish(handle, &finish), Ok(digest));
}
