//! The emulated SNP platform: what its reports say, its configuration, VLEK and firmware.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod snp_common;

use casemate_attest::processor::snp::forge::Authority;
use casemate_attest::processor::snp::{
    FirmwareLevel, GuestChannel, KeyRequest, KeySelect, Personality, SnpConfig, SnpLaunchFinish,
    SnpProcessor,
};
use casemate_attest::processor::{FirmwareError, PlatformState};
use casemate_attest::product::Product;
use casemate_attest::report::{Report, ReportVersion, SigningKey};
use casemate_attest::tcb::{RawTcb, TcbVersion};
use snp_common::{
    FINISH, START, channel, key, processor, processor_as, report, running, running_with, signed_by,
};

const NO_CONFIG: SnpConfig = SnpConfig {
    reported_tcb: RawTcb([0; 8]),
    mask_chip_id: false,
    mask_chip_key: false,
};
const DATA: [u8; 64] = [0xda; 64];

#[test]
fn each_personality_reports_all_its_fields_in_every_version() {
    for product in Product::ALL {
        for version in [
            ReportVersion::V2,
            ReportVersion::V3,
            ReportVersion::V4,
            ReportVersion::V5,
        ] {
            let personality = Personality {
                report_version: version,
                mitigations: 0x15,
                ..Personality::of(product)
            };
            let mut processor = processor_as(personality.clone());
            let finish = SnpLaunchFinish {
                host_data: [0x8d; 32],
                ..FINISH
            };
            let (handle, secrets) = running_with(&mut processor, &finish);
            let mut channel = GuestChannel::new(&secrets, 1).unwrap();
            let request = channel.report_request(&DATA, 2, KeySelect::Vcek).unwrap();
            let reply = processor.guest_request(handle, &request).unwrap();
            let report = Report::parse(&channel.report(&reply).unwrap()).unwrap();

            signed_by(&mut processor, SigningKey::Vcek, &report);
            assert_eq!(report.version(), version);
            assert_eq!(report.signing_key(), SigningKey::Vcek);
            assert_eq!(report.policy(), START.policy);
            assert_eq!((report.vmpl(), report.guest_svn()), (2, 0));
            assert_eq!(report.report_data(), DATA);
            assert_eq!(report.host_data(), [0x8d; 32]);
            assert_eq!(report.platform_info(), personality.platform_info);
            assert_eq!((report.family_id(), report.image_id()), ([0; 16], [0; 16]));
            assert_eq!(report.id_key_digest(), [0; 48]);
            assert_eq!(report.author_key_digest(), [0; 48]);
            assert!(!report.has_author_key() && !report.has_migration_agent());
            assert_ne!(report.report_id(), [0; 32]);
            assert_eq!(report.chip_id(), *processor.chip_id());
            let used = report
                .chip_id()
                .iter()
                .rposition(|byte| *byte != 0)
                .unwrap()
                + 1;
            assert!(used <= product.hwid_len() && used > product.hwid_len() / 2);
            let level = personality.firmware;
            for tcb in [
                report.current_tcb(),
                report.reported_tcb(),
                report.committed_tcb(),
                report.launch_tcb(),
            ] {
                assert_eq!(tcb.of(product), level.tcb);
            }
            assert_eq!(report.current_firmware(), level.version);
            assert_eq!(report.committed_firmware(), level.version);
            let v3 = version >= ReportVersion::V3;
            assert_eq!(report.cpuid(), v3.then_some(personality.cpuid));
            assert_eq!(report.product(), v3.then_some(product));
            let v5 = (version >= ReportVersion::V5).then_some(0x15);
            assert_eq!(
                (report.launch_mitigations(), report.current_mitigations()),
                (v5, v5)
            );
        }
    }
}

#[test]
fn the_host_masks_the_chip_and_its_key() {
    let mut processor = processor(Product::Milan);
    let (handle, secrets) = running(&mut processor);
    let mut guest = channel(&secrets);
    let masked = SnpConfig {
        mask_chip_id: true,
        ..NO_CONFIG
    };
    processor.configure(&masked).unwrap();
    let hidden = report(&mut processor, handle, &mut guest, DATA, KeySelect::Any);
    assert_eq!(hidden.chip_id(), [0; 64]);
    signed_by(&mut processor, SigningKey::Vcek, &hidden);

    let masked = SnpConfig {
        mask_chip_key: true,
        ..NO_CONFIG
    };
    processor.configure(&masked).unwrap();
    let request = guest.report_request(&DATA, 0, KeySelect::Vcek).unwrap();
    let reply = processor.guest_request(handle, &request).unwrap();
    let raw = guest.report(&reply).unwrap();
    assert_eq!(raw[0x48], 0b1_1110, "masked, signed by nobody");
    assert!(raw[0x2a0..].iter().all(|byte| *byte == 0));
    assert!(Report::parse(&raw).is_err());
}

#[test]
fn a_vlek_is_loaded_preferred_and_taken_by_nobody_else() {
    let mut processor = processor(Product::Turin);
    let tcb = Personality::turin().firmware.tcb;
    let (handle, secrets) = running(&mut processor);
    let mut guest = channel(&secrets);
    assert_eq!(
        processor.endorsement(SigningKey::Vlek).map(drop),
        Err(FirmwareError::InvalidKey)
    );
    let identity = processor.identity();
    let stick = identity
        .wrap_vlek(Product::Turin, tcb, "CN=cloud.example")
        .unwrap();
    let newer = TcbVersion {
        snp: tcb.snp + 1,
        ..tcb
    };
    let too_new = identity
        .wrap_vlek(Product::Turin, newer, "CN=cloud.example")
        .unwrap();
    let other_product = identity
        .wrap_vlek(
            Product::Milan,
            Personality::milan().firmware.tcb,
            "CN=cloud.example",
        )
        .unwrap();
    assert!(identity.wrap_vlek(Product::Turin, tcb, "").is_err());
    assert!(
        identity
            .wrap_vlek(Product::Turin, tcb, &"x".repeat(256))
            .is_err()
    );
    for at in [0, 0x10, 0x18f, 0x190, 0x1a0, 0x1af] {
        let mut changed = stick;
        changed[at] ^= 1;
        assert_eq!(
            processor.vlek_load(&changed),
            Err(FirmwareError::BadMeasurement)
        );
    }
    for at in [0x0c, 0x198] {
        let mut changed = stick;
        changed[at] ^= 1;
        assert_eq!(
            processor.vlek_load(&changed),
            Err(FirmwareError::InvalidParam)
        );
    }
    assert_eq!(
        processor.vlek_load(&other_product),
        Err(FirmwareError::BadMeasurement)
    );
    assert_eq!(
        processor.vlek_load(&too_new),
        Err(FirmwareError::InvalidParam)
    );
    assert_eq!(
        processor.vlek_load(&stick[1..]),
        Err(FirmwareError::InvalidLength { needed: 432 })
    );
    assert!(!processor.status().vlek_loaded);

    processor.vlek_load(&stick).unwrap();
    assert!(processor.status().vlek_loaded);
    for (select, kind) in [
        (KeySelect::Any, SigningKey::Vlek),
        (KeySelect::Vlek, SigningKey::Vlek),
        (KeySelect::Vcek, SigningKey::Vcek),
    ] {
        let report = report(&mut processor, handle, &mut guest, DATA, select);
        assert_eq!(report.signing_key(), kind);
        signed_by(&mut processor, kind, &report);
    }
    let [any, vcek] = [KeySelect::Any, KeySelect::Vcek].map(|select| {
        let request = KeyRequest {
            key: select,
            ..KeyRequest::default()
        };
        key(&mut processor, handle, &mut guest, &request).unwrap()
    });
    assert_ne!(any, vcek);
}

#[test]
fn firmware_is_provisional_until_committed_and_never_goes_back() {
    let product = Product::Genoa;
    let mut processor = processor(product);
    let old = Personality::genoa().firmware;
    let mut new = old;
    new.tcb.microcode += 3;
    new.version.build += 1;
    let (handle, secrets) = running(&mut processor);
    let mut guest = channel(&secrets);
    processor.install_firmware(new).unwrap();
    let seen = |report: &Report| {
        [
            report.launch_tcb(),
            report.reported_tcb(),
            report.committed_tcb(),
            report.current_tcb(),
        ]
        .map(|tcb| tcb.of(product).microcode - old.tcb.microcode)
    };
    let provisional = report(&mut processor, handle, &mut guest, DATA, KeySelect::Any);
    assert_eq!(seen(&provisional), [0, 0, 0, 3]);
    assert_eq!(provisional.committed_firmware(), old.version);
    assert_eq!(provisional.current_firmware(), new.version);
    signed_by(&mut processor, SigningKey::Vcek, &provisional);
    // Back, as long as nothing is committed; and there again.
    processor.install_firmware(old).unwrap();
    processor.install_firmware(new).unwrap();
    let before = processor
        .endorsement(SigningKey::Vcek)
        .unwrap()
        .certificate()
        .to_vec();
    processor.commit().unwrap();
    let committed = report(&mut processor, handle, &mut guest, DATA, KeySelect::Any);
    assert_eq!(seen(&committed), [0, 3, 3, 3]);
    signed_by(&mut processor, SigningKey::Vcek, &committed);
    let after = processor
        .endorsement(SigningKey::Vcek)
        .unwrap()
        .certificate()
        .to_vec();
    assert_ne!(before, after);

    assert_eq!(processor.install_firmware(old), Err(FirmwareError::BadSvn));
    let mut lower = new;
    lower.version.build -= 1;
    assert_eq!(
        processor.install_firmware(lower),
        Err(FirmwareError::BadVersion)
    );
    // A newer boot loader does not make up for older microcode.
    let mut mixed = new;
    mixed.tcb.boot_loader += 9;
    mixed.tcb.microcode -= 1;
    assert_eq!(
        processor.install_firmware(mixed),
        Err(FirmwareError::BadSvn)
    );
    let turin = FirmwareLevel {
        tcb: Personality::turin().firmware.tcb,
        ..new
    };
    assert_eq!(
        processor.install_firmware(turin),
        Err(FirmwareError::InvalidParam)
    );
}

#[test]
fn the_reported_tcb_is_at_most_the_committed_one() {
    let mut processor = processor(Product::Milan);
    let tcb = Personality::milan().firmware.tcb;
    let config = |tcb: TcbVersion| SnpConfig {
        reported_tcb: tcb.to_raw(Product::Milan).unwrap(),
        ..NO_CONFIG
    };
    for higher in [
        TcbVersion {
            boot_loader: 5,
            ..tcb
        },
        TcbVersion { tee: 1, ..tcb },
        TcbVersion { snp: 25, ..tcb },
        TcbVersion {
            microcode: 221,
            ..tcb
        },
        TcbVersion {
            boot_loader: 5,
            snp: 0,
            microcode: 0,
            ..tcb
        },
    ] {
        assert_eq!(
            processor.configure(&config(higher)),
            Err(FirmwareError::InvalidParam)
        );
    }
    let reserved = SnpConfig {
        reported_tcb: RawTcb([1, 0, 1, 0, 0, 0, 1, 1]),
        ..NO_CONFIG
    };
    assert_eq!(
        processor.configure(&reserved),
        Err(FirmwareError::InvalidParam)
    );
    let lower = TcbVersion {
        microcode: 210,
        ..tcb
    };
    processor.configure(&config(lower)).unwrap();
    let (handle, secrets) = running(&mut processor);
    let report = report(
        &mut processor,
        handle,
        &mut channel(&secrets),
        DATA,
        KeySelect::Any,
    );
    assert_eq!(report.reported_tcb().of(Product::Milan), lower);
    assert_eq!(report.committed_tcb().of(Product::Milan), tcb);
    signed_by(&mut processor, SigningKey::Vcek, &report);
    processor.configure(&NO_CONFIG).unwrap();
    assert_eq!(processor.status().reported_tcb.of(Product::Milan), tcb);

    let mut raw = [0; 64];
    raw[..8].copy_from_slice(&[4, 0, 0, 0, 0, 0, 24, 210]);
    raw[8] = 3;
    let parsed = SnpConfig::parse(&raw).unwrap();
    assert!(parsed.mask_chip_id && parsed.mask_chip_key);
    assert_eq!(parsed.reported_tcb.of(Product::Milan), lower);
    for (at, value) in [(8, 4), (11, 0x80), (12, 1), (63, 1)] {
        let mut raw = raw;
        raw[at] = value;
        assert_eq!(SnpConfig::parse(&raw), Err(FirmwareError::InvalidParam));
    }
}

#[test]
fn a_platform_has_to_be_initialised_and_forgets_when_it_shuts_down() {
    let identity = Authority::shared().identity_again();
    let mut processor = SnpProcessor::new(identity, Personality::genoa()).unwrap();
    let refused = FirmwareError::InvalidPlatformState;
    assert_eq!(processor.status().state, PlatformState::Uninit);
    assert!(processor.status().emulated);
    assert_eq!(processor.gctx_create(), Err(refused));
    assert_eq!(processor.configure(&NO_CONFIG), Err(refused));
    assert_eq!(processor.commit(), Err(refused));
    assert_eq!(processor.vlek_load(&[0; 432]), Err(refused));
    processor.init().unwrap();
    assert_eq!(processor.init(), Err(refused));
    let (handle, _) = running(&mut processor);
    let masked = SnpConfig {
        mask_chip_id: true,
        ..NO_CONFIG
    };
    processor.configure(&masked).unwrap();
    let status = processor.status();
    assert_eq!((status.guest_count, status.mask_chip_id), (1, true));
    let raw = status.to_bytes();
    assert_eq!(
        raw[..16],
        [1, 55, 1, 1, 49, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    );
    assert_eq!(raw[16..24], [10, 0, 0, 0, 0, 0, 27, 84]);
    assert_eq!(raw[24..], [10, 0, 0, 0, 0, 0, 27, 84]);
    processor.shutdown();
    assert_eq!(processor.guest(handle).map(drop), Err(refused));
    processor.init().unwrap();
    assert_eq!(
        processor.guest(handle).map(drop),
        Err(FirmwareError::InvalidGuest)
    );
    assert!(!processor.status().mask_chip_id);
    assert_ne!(processor.gctx_create().unwrap(), handle);

    let mut wrong = Personality::milan();
    wrong.firmware = Personality::turin().firmware;
    assert!(SnpProcessor::new(Authority::shared().identity_again(), wrong).is_err());
}
