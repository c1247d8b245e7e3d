//! The real ioctl code sends a guest from one process and platform to another.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod common;

use casemate_double::Fault;
use casemate_double::protocol::{Answer, Ask, Step};
use common::{
    COUNTER, PAGES, SEV, SEV_ES, SEV_NOSEND, SITE_B, Vmm, all_pages, golden, open_both, running,
    send_pages, site_a,
};
use nix::errno::Errno;

#[test]
fn a_guest_moves_between_two_processes_and_counts_on() {
    let (mut source, mut target) = running(SEV);
    open_both(&mut source, &mut target);
    let packets = send_pages(&mut source);
    let memory = source.read(0, PAGES * 4096);
    let code = &memory[0x1000..0x1010];
    assert!(
        !packets.windows(16).any(|window| window == code),
        "in clear"
    );
    target.stepped(Step::ReceivePages {
        gpas: all_pages(),
        packets,
    });
    target.stepped(Step::ReceiveFinish);
    assert!(target.read(0, PAGES * 4096) == memory, "memory differs");
    let registers = source.bytes(&Ask::SaveRegisters);
    target.done(&Ask::RestoreRegisters { bytes: registers });
    source.stepped(Step::SendFinish);
    source.stepped(Step::Decommission);
    assert_eq!(target.bytes(&Ask::Run { outputs: 3 }), [6, 7, 8]);
    assert_eq!(target.read(COUNTER, 2), [8, 0]);
    source.close();
    target.close();
    golden("sev-send.txt", &source.double.log());
    golden("sev-receive.txt", &target.double.log());
    source.finish();
    target.finish();
}

#[test]
fn a_changed_packet_is_refused_and_the_source_runs_on() {
    let (mut source, mut target) = running(SEV);
    open_both(&mut source, &mut target);
    let mut packets = send_pages(&mut source);
    packets[64 + 100] ^= 1;
    let refused = target.step(Step::ReceivePages {
        gpas: all_pages(),
        packets,
    });
    assert_eq!(refused.unwrap_err().0, "BAD_MEASUREMENT");
    assert!(target.read(0, 4096).iter().all(|byte| *byte == 0));
    let after = target.step(Step::ReceiveFinish);
    assert_eq!(after.unwrap_err().0, "LAUNCH_STATE");
    source.stepped(Step::SendCancel);
    assert_eq!(source.bytes(&Ask::Run { outputs: 2 }), [6, 7]);
    // And once more, to another guest of the same target.
    target.close();
    assert_eq!(target.attach_as(SEV, None), Ok(Answer::Done));
    open_both(&mut source, &mut target);
    let packets = send_pages(&mut source);
    target.stepped(Step::ReceivePages {
        gpas: all_pages(),
        packets,
    });
    target.stepped(Step::ReceiveFinish);
    source.close();
    target.close();
    source.finish();
    target.finish();
}

#[test]
fn what_policy_and_trust_forbid_does_not_leave_the_source() {
    let (mut source, mut target) = running(SEV_NOSEND);
    let certificates = target.evidence();
    let refused = source.step(Step::SendStart {
        target: certificates,
    });
    assert_eq!(refused.unwrap_err().0, "POLICY_FAILURE");
    assert_eq!(source.bytes(&Ask::Run { outputs: 1 }), [6]);
    source.finish();
    target.finish();

    // The target's machine knows nobody: B may not send to A.
    let mut b = Vmm::start(&casemate_double::Config::new(&SITE_B));
    b.attach(SEV);
    b.launch();
    let mut a = Vmm::start(&site_a());
    a.attach(SEV);
    let certificates = a.evidence();
    let refused = b.step(Step::SendStart {
        target: certificates,
    });
    assert_eq!(refused.unwrap_err().0, "INVALID_CERTIFICATE");
    a.finish();
    b.finish();
}

#[test]
fn a_sev_es_guest_is_not_sent_and_the_firmware_is_not_asked() {
    let mut vmm = Vmm::start(&site_a());
    vmm.attach(SEV_ES);
    vmm.done(&Ask::AddVcpu);
    vmm.launch();
    let certificates = vmm.evidence();
    let before = vmm.double.log().len();
    let refused = vmm.step(Step::SendStart {
        target: certificates,
    });
    let (code, text) = refused.unwrap_err();
    assert_eq!(code, "SEV_NOT_SUPPORTED");
    assert!(text.contains("launch it anew"), "{text}");
    let asked = &vmm.double.log()[before..];
    assert!(!asked.iter().any(|call| call.contains("SEND")), "{asked:?}");
    vmm.finish();
}

#[test]
fn what_is_put_off_is_repeated_and_what_fails_is_named() {
    let (mut source, mut target) = running(SEV);
    for command in ["SEND_START", "SEND_UPDATE_DATA", "SEND_CANCEL"] {
        source.double.fail(command, 3, Fault::Kernel(Errno::EAGAIN));
        source.double.fail(command, 3, Fault::Kernel(Errno::EINTR));
    }
    for command in ["RECEIVE_START", "RECEIVE_UPDATE_DATA", "RECEIVE_FINISH"] {
        target.double.fail(command, 3, Fault::Kernel(Errno::EINTR));
    }
    open_both(&mut source, &mut target);
    let packets = send_pages(&mut source);
    target.stepped(Step::ReceivePages {
        gpas: all_pages(),
        packets,
    });
    target.stepped(Step::ReceiveFinish);
    assert!(target.read(0, 0x3000) == source.read(0, 0x3000));
    source.stepped(Step::SendCancel);
    target.close();
    target.finish();

    // A failure in the middle of the pages: the sending stays open and can be cancelled.
    let mut target = Vmm::start(&casemate_double::Config::new(&SITE_B));
    target.attach(SEV);
    open_both(&mut source, &mut target);
    let fault = Fault::Firmware(0x13);
    source.double.fail_later("SEND_UPDATE_DATA", 7, 1, fault);
    let failed = source.step(Step::SendPages { gpas: all_pages() });
    let (code, text) = failed.unwrap_err();
    assert_eq!(code, "HWSEV_RET_PLATFORM");
    assert!(text.starts_with("SEND_UPDATE_DATA"), "{text}");
    source.stepped(Step::SendCancel);
    assert_eq!(source.bytes(&Ask::Run { outputs: 1 }), [6]);
    source.finish();
    target.finish();
}
