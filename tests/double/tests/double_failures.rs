//! The real ioctl code fails in every way that firmware and kernel can fail, with the right plain words.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod common;

use casemate::confidential::kvm::{ATTEMPTS, FirmwareCode};
use casemate_double::protocol::{Answer, Step, Wrong};
use casemate_double::{Config, Fault};
use common::{SEV, SEV_ES, SITE_A, Vmm, launch_steps, owner, site_a};
use nix::errno::Errno;

/// Commands of a SEV-ES launch, and which step of [`launch_steps`] gives them.
const LAUNCH: [(&str, usize); 7] = [
    ("LAUNCH_START", 0),
    ("LAUNCH_UPDATE_DATA", 1),
    ("LAUNCH_UPDATE_VMSA", 2),
    ("LAUNCH_MEASURE", 2),
    ("GUEST_STATUS", 2),
    ("PLATFORM_STATUS", 2),
    ("LAUNCH_FINISH", 3),
];

/// Launches up to the step that fails, which is to be the one named; then nothing goes on.
fn failing(vmm: &mut Vmm, step: usize, fault: Fault, command: &str) -> (String, String) {
    vmm.attach(SEV_ES);
    vmm.done(&casemate_double::protocol::Ask::AddVcpu);
    let [steps @ .., _] = launch_steps(None);
    let mut steps: Vec<Step> = steps.into_iter().chain([Step::LaunchFinish]).collect();
    let rest = steps.split_off(step);
    for step in steps {
        assert!(vmm.step(step).is_ok());
    }
    vmm.double.fail(command, 1, fault);
    let error = vmm.step(rest[0].clone()).unwrap_err();
    for step in rest {
        assert_eq!(vmm.step(step).unwrap_err().0, "LAUNCH_STATE");
    }
    vmm.close();
    error
}

#[test]
fn every_firmware_code_at_every_launch_command_is_said_in_plain_words() {
    let mut vmm = Vmm::start(&site_a());
    for code in FirmwareCode::all() {
        for (command, step) in LAUNCH {
            let (name, text) = failing(&mut vmm, step, Fault::Firmware(code.0), command);
            assert_eq!(name, code.name());
            assert!(text.starts_with(command), "{text}");
            assert!(text.contains(code.meaning()), "{text}");
            assert!(text.contains(code.remedy()), "{text}");
        }
    }
    vmm.finish();
}

#[test]
fn every_kernel_error_at_every_launch_command_has_its_code_and_remedy() {
    let errors = [
        (Errno::ENOTTY, "SEV_NOT_AVAILABLE", "BIOS"),
        (Errno::ENODEV, "SEV_NOT_AVAILABLE", "ccp"),
        (Errno::EBADF, "SEV_BAD_DEVICE", "/dev/sev"),
        (Errno::EBUSY, "SEV_NO_ASID", "end a confidential guest"),
        (Errno::ENOMEM, "SEV_MEMORY_LOCK", "RLIMIT_MEMLOCK"),
        (Errno::ETIMEDOUT, "SEV_DEAD", "restart the host"),
        (Errno::EPERM, "SEV_REFUSED", "write permission"),
        (Errno::EINVAL, "SEV_REFUSED", "order of commands"),
        (Errno::EFAULT, "SEV_REFUSED", "not mapped"),
        (Errno::EIO, "SEV_REFUSED", "without a code"),
        (Errno::EEXIST, "SEV_REFUSED", "launch it anew"),
        (Errno::ENOSPC, "SEV_REFUSED", "kernel's log"),
    ];
    let mut vmm = Vmm::start(&site_a());
    for (errno, code, remedy) in errors {
        for (command, step) in LAUNCH {
            let (name, text) = failing(&mut vmm, step, Fault::Kernel(errno), command);
            assert_eq!(name, code, "{command} {errno}");
            assert!(text.starts_with(command), "{text}");
            assert!(text.contains(remedy), "{text}");
        }
    }
    vmm.finish();
}

#[test]
fn what_is_put_off_is_repeated_within_bounds_and_never_measured_twice() {
    let mut vmm = Vmm::start(&site_a());
    for errno in [Errno::EAGAIN, Errno::EINTR] {
        for (command, _) in LAUNCH {
            let twice = matches!(command, "LAUNCH_UPDATE_DATA" | "LAUNCH_UPDATE_VMSA");
            let fault = Fault::Kernel(errno);
            vmm.attach(SEV_ES);
            vmm.done(&casemate_double::protocol::Ask::AddVcpu);
            let times = if twice { 1 } else { ATTEMPTS - 1 };
            vmm.double.fail(command, times, fault);
            let outcome = launch_steps(None)
                .into_iter()
                .try_for_each(|step| vmm.step(step).map(|_| ()));
            if twice {
                let (code, text) = outcome.unwrap_err();
                assert_eq!(code, "SEV_BUSY");
                assert!(text.contains("1 times"), "{text}");
            } else {
                assert_eq!(outcome, Ok(()), "{command}");
            }
            vmm.close();

            vmm.attach(SEV_ES);
            vmm.done(&casemate_double::protocol::Ask::AddVcpu);
            if !twice {
                vmm.double.fail(command, ATTEMPTS, fault);
                let outcome = launch_steps(None)
                    .into_iter()
                    .try_for_each(|step| vmm.step(step).map(|_| ()));
                assert_eq!(outcome.unwrap_err().0, "SEV_BUSY", "{command}");
            }
            vmm.close();
        }
    }
    vmm.finish();
}

#[test]
fn initialising_and_pinning_fail_in_plain_words() {
    let mut vmm = Vmm::start(&site_a());
    for code in FirmwareCode::all() {
        vmm.double.fail("INIT", 1, Fault::Firmware(code.0));
        let (name, text) = vmm.attach_as(SEV, None).unwrap_err();
        assert_eq!(name, code.name());
        assert!(text.starts_with("INIT2 refused"), "{text}");
        vmm.double.fail("ACTIVATE", 1, Fault::Firmware(code.0));
        vmm.attach(SEV);
        let refused = vmm.step(Step::LaunchStart { session: None });
        assert_eq!(refused.unwrap_err().0, code.name());
        assert_eq!(vmm.double.guests(), 0, "what was started is decommissioned");
    }
    let name = "KVM_MEMORY_ENCRYPT_REG_REGION";
    vmm.double.fail(name, 2, Fault::Kernel(Errno::EINTR));
    vmm.attach(SEV);
    vmm.double.fail(name, 1, Fault::Kernel(Errno::ENOMEM));
    let (code, text) = vmm.attach_as(SEV, None).unwrap_err();
    assert_eq!(code, "SEV_MEMORY_LOCK");
    assert!(text.starts_with(name), "{text}");
    vmm.double
        .fail("KVM_CREATE_VM", 1, Fault::Kernel(Errno::EBUSY));
    let (code, text) = vmm.attach_as(SEV, None).unwrap_err();
    assert_eq!(
        (code.as_str(), text.starts_with("KVM_CREATE_VM")),
        ("SEV_NO_ASID", true)
    );
    vmm.finish();
}

#[test]
fn what_a_machine_lacks_is_said() {
    let refused = |change: &dyn Fn(&mut Config), policy, wrong| {
        let mut config = site_a();
        change(&mut config);
        let mut vmm = Vmm::start(&config);
        let outcome = vmm.attach_as(policy, wrong);
        let outcome = outcome.and_then(|_| vmm.step(Step::LaunchStart { session: None }));
        vmm.finish();
        outcome.unwrap_err()
    };
    let keep = |_: &mut Config| {};
    let (code, text) = refused(&|config| config.device = false, SEV, None);
    assert_eq!(code, "NO_PROCESSOR", "{text}");
    let (code, text) = refused(&|config| config.asids = 0, SEV, None);
    assert_eq!(code, "SEV_NO_ASID", "{text}");
    let (code, text) = refused(&|config| config.es = false, SEV_ES, None);
    assert_eq!(code, "UNSUPPORTED", "{text}");
    let (code, text) = refused(&keep, SEV, Some(Wrong::VcpuFirst));
    assert_eq!(code, "SEV_REFUSED", "{text}");
    let (code, text) = refused(&keep, SEV, Some(Wrong::OtherDevice));
    assert_eq!(code, "SEV_BAD_DEVICE", "{text}");
    let (code, text) = refused(&keep, SEV, Some(Wrong::NoLockedMemory));
    assert_eq!(code, "SEV_MEMORY_LOCK", "{text}");
}

#[test]
fn what_an_owner_did_not_make_for_this_guest_is_refused() {
    let mut vmm = Vmm::start(&site_a());
    vmm.attach(SEV);
    let (session, _) = owner(&vmm.evidence(), SEV_ES);
    let refused = vmm.step(Step::LaunchStart {
        session: Some(session),
    });
    assert_eq!(refused.unwrap_err().0, "BAD_MEASUREMENT", "another policy");
    vmm.attach(SEV);
    let (mut session, _) = owner(&vmm.evidence(), SEV);
    session.0.pop();
    let refused = vmm.step(Step::LaunchStart {
        session: Some(session),
    });
    assert_eq!(refused.unwrap_err().0, "INVALID_LEN", "a short certificate");
    vmm.attach(SEV);
    let [start, update, measure, _] = launch_steps(None);
    for step in [start, update, measure] {
        assert!(vmm.step(step).is_ok());
    }
    let forged = vmm.step(Step::LaunchSecret {
        header: vec![0; 52],
        ciphertext: vec![0; 64],
        gpa: 0x3000,
    });
    assert_eq!(forged.unwrap_err().0, "BAD_MEASUREMENT");
    assert_eq!(vmm.read(0x3000, 64), [0; 64]);
    vmm.close();
    vmm.finish();
}

#[test]
fn a_machine_full_of_guests_says_so() {
    let mut config = Config::new(&SITE_A);
    config.asids = 1;
    let mut vmm = Vmm::start(&config);
    vmm.attach(SEV);
    vmm.launch();
    // The first guest goes only after the second was refused.
    let refused = vmm.attach_as(SEV, None);
    assert_eq!(refused.unwrap_err().0, "SEV_NO_ASID");
    vmm.close();
    assert_eq!(vmm.attach_as(SEV, None), Ok(Answer::Done));
    vmm.finish();
}
