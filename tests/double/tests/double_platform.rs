//! The real code for `/dev/sev` takes a platform for its owner and gives it back: Linux's checks, the firmware's
//! states, and how lengths are asked for.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod common;

use casemate_attest::legacy::certificate::SevCertificate;
use casemate_attest::processor::{Identity, OwnerAuthority};
use casemate_double::Fault;
use casemate_double::protocol::{Answer, Ask, Device};
use common::{SEV, SITE_A, SITE_B, Vmm, site_a};
use nix::errno::Errno;

fn opened() -> Vmm {
    let mut vmm = Vmm::start(&site_a());
    vmm.done(&Ask::Open);
    vmm
}

fn bytes(vmm: &mut Vmm, device: Device) -> Vec<u8> {
    match vmm.device(device) {
        Ok(Answer::Bytes(bytes)) => bytes,
        other => panic!("{other:?}"),
    }
}

/// PDH and PEK ‖ OCA ‖ CEK.
fn export(vmm: &mut Vmm) -> (Vec<u8>, Vec<u8>) {
    match vmm.device(Device::Export) {
        Ok(Answer::Certificates((pdh, chain, _))) => (pdh, chain),
        other => panic!("{other:?}"),
    }
}

fn status(vmm: &mut Vmm) -> String {
    match vmm.device(Device::Status) {
        Ok(Answer::Text(text)) => text,
        other => panic!("{other:?}"),
    }
}

fn code(vmm: &mut Vmm, device: Device) -> String {
    vmm.device(device).unwrap_err().0
}

/// The platform's request, signed.
fn import(vmm: &mut Vmm, owner: &OwnerAuthority) -> Device {
    let request = SevCertificate::parse(&bytes(vmm, Device::PekCsr)).unwrap();
    Device::PekCertImport {
        pek: owner.sign_pek(&request).unwrap().as_bytes().to_vec(),
        oca: owner.certificate().as_bytes().to_vec(),
    }
}

#[test]
fn an_owner_takes_the_platform_and_a_factory_reset_gives_it_back() {
    let mut vmm = opened();
    let owner = OwnerAuthority::generate().unwrap();
    let (pdh, chain) = export(&mut vmm);
    let id = bytes(&mut vmm, Device::ChipId);
    assert_eq!(id.len(), 64);
    let signed = import(&mut vmm, &owner);
    vmm.done(&Ask::Device(signed.clone()));
    assert!(status(&mut vmm).contains("state: 1, owned: true"));
    let (owned_pdh, owned) = export(&mut vmm);
    assert_ne!(owned_pdh, pdh);
    assert_eq!(owned[2084..4168], *owner.certificate().as_bytes());
    assert_eq!(owned[4168..], chain[4168..], "the chip is the same");
    let (refused, text) = vmm.device(signed.clone()).unwrap_err();
    assert_eq!(refused, "ALREADY_OWNED");
    assert!(text.starts_with("PEK_CERT_IMPORT"), "{text}");

    vmm.done(&Ask::Device(Device::FactoryReset));
    assert!(status(&mut vmm).contains("state: 0, owned: false"));
    // Linux initialises it again with the next command that needs it.
    assert_eq!(code(&mut vmm, signed), "INVALID_CERTIFICATE");
    assert!(status(&mut vmm).contains("state: 1, owned: false"));
    let (_, reset) = export(&mut vmm);
    assert_ne!(reset[..4168], owned[..4168]);
    assert_eq!(bytes(&mut vmm, Device::ChipId), id);
    let calls = vmm.double.log();
    let of = |name: &str| calls.iter().filter(|call| call.contains(name)).count();
    assert_eq!(of("FACTORY_RESET"), 1, "{calls:?}");
    vmm.finish();
}

#[test]
fn keys_change_as_the_commands_say() {
    let mut vmm = opened();
    let (pdh, chain) = export(&mut vmm);
    vmm.done(&Ask::Device(Device::PdhGen));
    let (new_pdh, same) = export(&mut vmm);
    assert_ne!(new_pdh, pdh);
    assert_eq!(same, chain);
    let owner = OwnerAuthority::generate().unwrap();
    let signed = import(&mut vmm, &owner);
    vmm.done(&Ask::Device(signed));
    vmm.done(&Ask::Device(Device::PekGen));
    let (last_pdh, last) = export(&mut vmm);
    assert_ne!(last_pdh, new_pdh);
    assert_ne!(last[..2084], chain[..2084]);
    assert!(status(&mut vmm).contains("owned: false"));
    vmm.finish();
}

#[test]
fn lengths_are_asked_for_before_buffers_are_given() {
    let mut vmm = opened();
    for (device, name, length) in [
        (Device::PekCsr, "PEK_CSR", 2084),
        (Device::ChipId, "GET_ID", 64),
    ] {
        let before = vmm.double.log().len();
        assert_eq!(bytes(&mut vmm, device.clone()).len(), length);
        // The double complains of a buffer that is too short, which Linux would overrun.
        let calls = vmm.double.log().split_off(before);
        let query = format!("/dev/sev {name} -> EIO, firmware 0x4");
        assert_eq!(calls, [query, format!("/dev/sev {name}")]);
        // A length that does not come is the firmware's refusal as it stands.
        vmm.double.fail(name, 1, Fault::Firmware(4));
        let (refused, text) = vmm.device(device.clone()).unwrap_err();
        assert_eq!(refused, "INVALID_LEN", "{text}");
        // Refused at the query, and with the buffer there.
        for skip in 0..2 {
            vmm.double.fail_later(name, skip, 1, Fault::Firmware(0x13));
            assert_eq!(code(&mut vmm, device.clone()), "HWSEV_RET_PLATFORM");
            vmm.double
                .fail_later(name, skip, 1, Fault::Kernel(Errno::ENOMEM));
            assert_eq!(code(&mut vmm, device.clone()), "SEV_MEMORY_LOCK");
        }
    }
    vmm.finish();
}

#[test]
fn with_guests_the_kernel_or_the_firmware_refuses() {
    let mut vmm = opened();
    let owner = OwnerAuthority::generate().unwrap();
    let signed = import(&mut vmm, &owner);
    vmm.attach(SEV);
    vmm.launch();
    let before = export(&mut vmm);
    let (refused, text) = vmm.device(Device::FactoryReset).unwrap_err();
    assert_eq!(refused, "GUESTS_RUNNING");
    assert!(text.contains("end them first"), "{text}");
    for device in [Device::PekGen, Device::PekCsr, signed] {
        assert_eq!(code(&mut vmm, device), "INVALID_PLATFORM_STATE");
    }
    assert_eq!(export(&mut vmm), before);
    vmm.done(&Ask::Device(Device::PdhGen));
    assert_ne!(export(&mut vmm).0, before.0);
    vmm.close();
    vmm.done(&Ask::Device(Device::PekGen));
    vmm.finish();
}

#[test]
fn without_write_permission_only_what_changes_nothing_is_done() {
    let mut vmm = opened();
    let owner = OwnerAuthority::generate().unwrap();
    let signed = import(&mut vmm, &owner);
    vmm.done(&Ask::OpenReadOnly);
    let changing = [
        Device::PekCsr,
        signed,
        Device::PekGen,
        Device::PdhGen,
        Device::FactoryReset,
    ];
    for device in changing {
        let (refused, text) = vmm.device(device).unwrap_err();
        assert_eq!(refused, "SEV_REFUSED");
        assert!(text.contains("without write permission"), "{text}");
    }
    assert!(status(&mut vmm).contains("state: 1, owned: false"));
    assert_eq!(bytes(&mut vmm, Device::ChipId).len(), 64);
    export(&mut vmm);
    // A platform that is not initialised is not exported: that would initialise it.
    vmm.done(&Ask::Open);
    vmm.done(&Ask::Device(Device::FactoryReset));
    vmm.done(&Ask::OpenReadOnly);
    assert_eq!(code(&mut vmm, Device::Export), "SEV_REFUSED");
    assert!(status(&mut vmm).contains("state: 0"));
    vmm.finish();
}

#[test]
fn each_bad_import_is_refused_by_name() {
    let mut vmm = opened();
    let (owner, other) = (
        OwnerAuthority::generate().unwrap(),
        OwnerAuthority::generate().unwrap(),
    );
    let request = SevCertificate::parse(&bytes(&mut vmm, Device::PekCsr)).unwrap();
    let pek = owner.sign_pek(&request).unwrap().as_bytes().to_vec();
    let oca = owner.certificate().as_bytes().to_vec();
    let foreign = Identity::from_bytes(&SITE_B).unwrap().chain().pek.clone();
    let strange = other.certificate().as_bytes().to_vec();
    for (pek, oca, expected) in [
        (pek[..2083].to_vec(), oca.clone(), "INVALID_LEN"),
        (pek.clone(), oca[..100].to_vec(), "INVALID_LEN"),
        (oca.clone(), pek.clone(), "INVALID_CERTIFICATE"),
        (
            foreign.as_bytes().to_vec(),
            oca.clone(),
            "INVALID_CERTIFICATE",
        ),
        (pek.clone(), strange, "BAD_SIGNATURE"),
        (request.as_bytes().to_vec(), oca.clone(), "BAD_SIGNATURE"),
        (Vec::new(), oca.clone(), "SEV_REFUSED"),
        (pek.clone(), Vec::new(), "SEV_REFUSED"),
        (vec![0; 0x4001], oca.clone(), "BAD_REQUEST"),
    ] {
        let refused = code(&mut vmm, Device::PekCertImport { pek, oca });
        assert_eq!(refused, expected);
    }
    let whole = Device::PekCertImport { pek, oca };
    vmm.done(&Ask::Device(whole));
    let identity = Identity::from_bytes(&SITE_A).unwrap();
    assert_eq!(export(&mut vmm).1[4168..], *identity.chain().cek.as_bytes());
    vmm.finish();
}

#[test]
fn a_platform_that_cannot_be_initialised_or_shut_down_says_so() {
    let mut vmm = opened();
    vmm.double.fail("SHUTDOWN", 1, Fault::Firmware(0x13));
    assert_eq!(code(&mut vmm, Device::FactoryReset), "HWSEV_RET_PLATFORM");
    vmm.done(&Ask::Device(Device::FactoryReset));
    for device in [
        Device::PekCsr,
        Device::PekGen,
        Device::PdhGen,
        Device::Export,
    ] {
        vmm.double.fail("INIT", 1, Fault::Firmware(0x18));
        assert_eq!(code(&mut vmm, device), "SECURE_DATA_INVALID");
    }
    export(&mut vmm);
    vmm.finish();
}
