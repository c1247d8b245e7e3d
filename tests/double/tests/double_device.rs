//! The real code for `/dev/sev`: status, certificates, ownership, and the SNP platform's configuration.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod common;

use casemate::confidential::kvm::{ATTEMPTS, FirmwareCode};
use casemate_attest::processor::Identity;
use casemate_attest::processor::snp::{Personality, SnpIdentity};
use casemate_attest::product::Product;
use casemate_attest::tcb::TcbVersion;
use casemate_double::protocol::{Answer, Ask, Device};
use casemate_double::{Config, Fault};
use common::{SEV, SITE_A, SNP, Vmm, site_a, snp_machine};
use nix::errno::Errno;

fn opened(config: &Config) -> Vmm {
    let mut vmm = Vmm::start(config);
    vmm.done(&Ask::Open);
    vmm
}

fn text(vmm: &mut Vmm, device: Device) -> String {
    match vmm.device(device) {
        Ok(Answer::Text(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn status_and_certificates_are_the_platforms() {
    let mut vmm = opened(&site_a());
    let status = text(&mut vmm, Device::Status);
    assert!(
        status.contains("state: 1, owned: false, es: true, guests: 0"),
        "{status}"
    );
    vmm.attach(SEV);
    vmm.launch();
    let status = text(&mut vmm, Device::Status);
    assert!(
        status.contains("state: 2, owned: false, es: true, guests: 1"),
        "{status}"
    );
    let identity = Identity::from_bytes(&SITE_A).unwrap();
    let expected = Answer::Certificates((
        identity.chain().pdh.as_bytes().to_vec(),
        identity.chain().platform_certs(),
        vec![],
    ));
    assert_eq!(vmm.device(Device::Export), Ok(expected));
    vmm.finish();
}

#[test]
fn every_firmware_code_of_the_device_is_said_in_plain_words() {
    let mut vmm = opened(&snp_machine());
    let wrapped = vec![7; 432];
    let set = Device::SnpSetConfig {
        tcb: 0,
        id: false,
        key: false,
    };
    let certificate = vec![0; 2084];
    let import = Device::PekCertImport {
        pek: certificate.clone(),
        oca: certificate,
    };
    let commands = [
        ("PLATFORM_STATUS", Device::Status),
        ("PDH_CERT_EXPORT", Device::Export),
        ("PEK_CSR", Device::PekCsr),
        ("PEK_CERT_IMPORT", import),
        ("PEK_GEN", Device::PekGen),
        ("PDH_GEN", Device::PdhGen),
        ("GET_ID", Device::ChipId),
        ("FACTORY_RESET", Device::FactoryReset),
        ("SNP_PLATFORM_STATUS", Device::SnpStatus),
        ("SNP_CONFIG", set),
        ("SNP_COMMIT", Device::SnpCommit),
        ("SNP_VLEK_LOAD", Device::SnpVlekLoad { wrapped }),
    ];
    for code in FirmwareCode::all() {
        for (name, command) in &commands {
            vmm.double.fail(name, 1, Fault::Firmware(code.0));
            let (found, text) = vmm.device(command.clone()).unwrap_err();
            assert_eq!(found, code.name());
            assert!(
                text.starts_with(name) && text.contains(code.remedy()),
                "{text}"
            );
        }
    }
    for errno in [Errno::EAGAIN, Errno::EINTR] {
        vmm.double
            .fail("PLATFORM_STATUS", ATTEMPTS - 1, Fault::Kernel(errno));
        assert!(vmm.device(Device::Status).is_ok());
        vmm.double
            .fail("PLATFORM_STATUS", ATTEMPTS, Fault::Kernel(errno));
        let (code, _) = vmm.device(Device::Status).unwrap_err();
        assert_eq!(code, "SEV_BUSY");
    }
    vmm.finish();
}

#[test]
fn the_snp_platform_is_shown_configured_committed_and_given_its_vlek() {
    let mut vmm = opened(&snp_machine());
    let milan = Personality::milan();
    let tcb = milan.firmware.tcb;
    let number = |tcb: TcbVersion| u64::from_le_bytes(tcb.to_raw(Product::Milan).unwrap().0);
    let status = text(&mut vmm, Device::SnpStatus);
    let expected = format!("current_tcb: {0}, reported_tcb: {0}", number(tcb));
    assert!(status.contains(&expected), "{status}");
    assert!(status.contains("initialised: true, rmp: true"), "{status}");
    assert!(status.contains("vlek: false"), "{status}");

    let mut lower = tcb;
    lower.snp -= 1;
    vmm.done(&Ask::Device(Device::SnpSetConfig {
        tcb: number(lower),
        id: true,
        key: false,
    }));
    let identity = SnpIdentity::from_bytes(&SNP).unwrap();
    let wrapped = identity
        .wrap_vlek(Product::Milan, tcb, "emulated-csp")
        .unwrap();
    vmm.done(&Ask::Device(Device::SnpVlekLoad {
        wrapped: wrapped.to_vec(),
    }));
    let status = text(&mut vmm, Device::SnpStatus);
    let expected = format!(
        "current_tcb: {}, reported_tcb: {}",
        number(tcb),
        number(lower)
    );
    assert!(status.contains(&expected), "{status}");
    assert!(
        status.contains("masks_chip_id: true, masks_chip_key: false, vlek: true"),
        "{status}"
    );
    vmm.done(&Ask::Device(Device::SnpCommit));
    let reported = vmm.double.snp(|snp| snp.status().reported_tcb).unwrap();
    assert_eq!(
        u64::from_le_bytes(reported.0),
        number(tcb),
        "a commit reports what it commits"
    );

    // A TCB above the committed one, and a hash stick of another chip.
    let mut higher = tcb;
    higher.snp += 1;
    let refused = vmm.device(Device::SnpSetConfig {
        tcb: number(higher),
        id: false,
        key: false,
    });
    assert_eq!(refused.unwrap_err().0, "INVALID_PARAM");
    let refused = vmm.device(Device::SnpVlekLoad {
        wrapped: vec![1; 432],
    });
    assert!(refused.is_err());
    vmm.finish();
}

#[test]
fn a_platform_without_snp_says_so() {
    let mut vmm = opened(&site_a());
    let status = text(&mut vmm, Device::SnpStatus);
    assert!(status.contains("initialised: false"), "{status}");
    for command in [
        Device::SnpCommit,
        Device::SnpVlekLoad {
            wrapped: vec![0; 432],
        },
    ] {
        let (code, text) = vmm.device(command).unwrap_err();
        assert_eq!(code, "SEV_REFUSED", "{text}");
    }
    vmm.finish();
    let mut config = site_a();
    config.device = false;
    let mut vmm = Vmm::start(&config);
    let (code, text) = vmm.ask(&Ask::Open).unwrap_err();
    assert!(text.contains("/dev/sev"), "{code} {text}");
    vmm.finish();
}
