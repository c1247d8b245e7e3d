//! The real ioctl code launches SEV and SEV-ES guests; the order of its calls is the documented one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod common;

use casemate::confidential::kvm::FirmwareCode;
use casemate_attest::legacy::{ApiVersion, MeasureBlob, SevReport};
use casemate_attest::measure::LaunchDigest;
use casemate_attest::processor::Identity;
use casemate_double::protocol::{Answer, Ask, Step};
use casemate_double::{Fault, vmsa};
use common::{COUNTER, SEV, SEV_ES, SITE_A, Vmm, code_page, golden, launch_steps, owner, site_a};

/// Measures, lets the owner check it against `loaded`, brings the secret in and finishes.
fn prove_and_finish(vmm: &mut Vmm, policy: u32, loaded: &[u8]) {
    let certificates = vmm.evidence();
    let (session, owner) = owner(&certificates, policy);
    let [start, update, measure, finish] = launch_steps(Some(session));
    vmm.stepped(start);
    vmm.stepped(update);
    if policy == SEV_ES {
        vmm.done(&Ask::AddVcpu);
    }
    let Ok(Answer::Measured {
        blob,
        api,
        policy: measured,
    }) = vmm.step(measure)
    else {
        panic!("not measured");
    };
    assert_eq!(measured, policy);
    let blob = MeasureBlob::from_bytes(&blob).unwrap();
    let version = ApiVersion::new(api.0, api.1);
    assert!(owner.measure_fits(&LaunchDigest::of(loaded), version, api.2, &blob));
    let other = LaunchDigest::of(&[loaded, &[0; 16]].concat());
    assert!(!owner.measure_fits(&other, version, api.2, &blob));
    let packet = owner.seal_secret(&blob, &[0x5a; 64]).unwrap();
    vmm.stepped(Step::LaunchSecret {
        header: packet.header.to_bytes().to_vec(),
        ciphertext: packet.ciphertext,
        gpa: SECRET,
    });
    vmm.stepped(finish);
    assert_eq!(vmm.read(SECRET, 64), [0x5a; 64]);
}

#[test]
fn a_sev_guest_is_launched_proved_and_runs() {
    let mut vmm = Vmm::start(&site_a());
    vmm.attach(SEV);
    prove_and_finish(&mut vmm, SEV, &code_page());
    vmm.done(&Ask::AddVcpu);
    assert_eq!(vmm.bytes(&Ask::Run { outputs: 3 }), [1, 2, 3]);
    assert_eq!(vmm.read(COUNTER, 2), [3, 0]);
    assert_eq!(vmm.double.guests(), 1);
    vmm.close();
    golden("sev-launch.txt", &vmm.double.log());
    vmm.finish();
}

#[test]
fn a_sev_es_guest_has_its_registers_measured() {
    let mut vmm = Vmm::start(&site_a());
    vmm.attach(SEV_ES);
    prove_and_finish(&mut vmm, SEV_ES, &[code_page(), vmsa(0)].concat());
    assert_eq!(vmm.bytes(&Ask::Run { outputs: 2 }), [1, 2]);
    vmm.close();
    golden("sev-es-launch.txt", &vmm.double.log());
    vmm.finish();
}

#[test]
fn an_attestation_report_is_asked_for_by_its_length_and_signed_by_the_platform() {
    let mut vmm = Vmm::start(&site_a());
    let report = vmm.bytes(&Ask::Report { mnonce: [7; 16] });
    let report = SevReport::parse(&report).unwrap();
    assert_eq!(report.mnonce(), [7; 16]);
    assert_eq!(report.digest(), LaunchDigest::of(&[0; 4096]));
    let identity = Identity::from_bytes(&SITE_A).unwrap();
    report.verify_signed_by(&identity.chain().pek).unwrap();
    let asked = |log: &[String]| {
        let report = |call: &&String| call.starts_with("KVM_SEV_ATTESTATION_REPORT");
        log.iter().filter(report).cloned().collect::<Vec<_>>()
    };
    let name = "KVM_SEV_ATTESTATION_REPORT".to_owned();
    let query = format!("{name} -> EIO, firmware 0x4");
    assert_eq!(asked(&vmm.double.log()), [query, name]);
    for code in FirmwareCode::all().filter(|code| code.0 != 4) {
        vmm.double
            .fail("ATTESTATION_REPORT", 1, Fault::Firmware(code.0));
        let (found, text) = vmm.ask(&Ask::Report { mnonce: [7; 16] }).unwrap_err();
        assert_eq!(found, code.name());
        assert!(text.starts_with("ATTESTATION_REPORT"), "{text}");
        // At the second turn, when the length is known.
        vmm.double
            .fail_later("ATTESTATION_REPORT", 1, 1, Fault::Firmware(code.0));
        let (found, _) = vmm.ask(&Ask::Report { mnonce: [7; 16] }).unwrap_err();
        assert_eq!(found, code.name());
    }
    assert_eq!(vmm.double.guests(), 0);
    vmm.finish();
}

#[test]
fn an_older_kernel_is_asked_the_older_way() {
    for (policy, file) in [
        (SEV, "sev-launch-older.txt"),
        (SEV_ES, "sev-es-launch-older.txt"),
    ] {
        let mut config = site_a();
        config.vm_types = 0;
        let mut vmm = Vmm::start(&config);
        vmm.attach(policy);
        vmm.done(&Ask::AddVcpu);
        vmm.launch();
        assert_eq!(vmm.bytes(&Ask::Run { outputs: 2 }), [1, 2]);
        vmm.close();
        golden(file, &vmm.double.log());
        vmm.finish();
    }
}

#[test]
fn many_guests_follow_each_other_in_one_process() {
    let mut config = site_a();
    config.asids = 1;
    let mut vmm = Vmm::start(&config);
    for _ in 0..20 {
        vmm.attach(SEV);
        vmm.launch();
        vmm.close();
    }
    vmm.finish();
}

const SECRET: u64 = 0x3000;
