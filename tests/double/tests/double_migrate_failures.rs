//! A guest is sent and received, and firmware and kernel fail at every command of it, with the right plain words.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod common;

use casemate::confidential::kvm::{ATTEMPTS, FirmwareCode};
use casemate_double::Fault;
use casemate_double::protocol::{Answer, Ask, Certificates, Outcome, Step};
use common::{SEV, Vmm, all_pages, sites};
use nix::errno::Errno;

/// Commands of a move in which the secure processor or the kernel may fail.
const SENDING: [&str; 5] = [
    "PDH_CERT_EXPORT",
    "SEND_START",
    "SEND_UPDATE_DATA",
    "SEND_CANCEL",
    "SEND_FINISH",
];
const RECEIVING: [&str; 3] = ["RECEIVE_START", "RECEIVE_UPDATE_DATA", "RECEIVE_FINISH"];

/// Both ends of one move after another.
struct Move {
    source: Vmm,
    target: Vmm,
    certificates: Certificates,
}

impl Move {
    fn new() -> Self {
        let (source, mut target) = sites();
        target.attach(SEV);
        let certificates = target.evidence();
        Self {
            source,
            target,
            certificates,
        }
    }

    fn end(mut self) {
        self.source.done(&Ask::Close);
        self.target.done(&Ask::Close);
        assert_eq!(
            (self.source.double.guests(), self.target.double.guests()),
            (0, 0)
        );
        self.source.finish();
        self.target.finish();
    }

    fn start(&mut self) -> Outcome {
        let target = self.certificates.clone();
        self.source.step(Step::SendStart { target })
    }

    /// Everything a source does to the point where `command` is given; the last answer.
    fn send(&mut self, command: &str) -> Outcome {
        if command == "SEND_FINISH" {
            let target = self.certificates.clone();
            return self.source.ask(&Ask::SendFinish { target });
        }
        let started = self.start();
        if started.is_err() || matches!(command, "PDH_CERT_EXPORT" | "SEND_START") {
            return started;
        }
        let sent = self.source.step(Step::SendPages { gpas: all_pages() });
        if sent.is_err() || command == "SEND_UPDATE_DATA" {
            return sent;
        }
        self.source.step(Step::SendCancel)
    }

    /// A fresh guest at the source.
    fn launch(&mut self) {
        self.source.attach(SEV);
        self.source.launch();
    }

    /// What is left to do after a failure: nothing is stuck, and the guest is where it was where that can be.
    fn after_sending(&mut self, command: &str) {
        match command {
            "PDH_CERT_EXPORT" | "SEND_START" => {
                assert!(self.start().is_ok(), "the next try succeeds");
                self.source.stepped(Step::SendCancel);
            }
            "SEND_UPDATE_DATA" => {
                self.source.stepped(Step::SendCancel);
                assert!(self.start().is_ok(), "the next try succeeds");
            }
            "SEND_CANCEL" => {
                let refused = self.source.step(Step::SendCancel);
                assert_eq!(refused.unwrap_err().0, "LAUNCH_STATE");
            }
            _ => {}
        }
    }

    /// Everything a target does to the point where `command` is given; the last answer.
    fn receive(&mut self, command: &str) -> Outcome {
        self.launch();
        let Ok(Answer::Sending(policy, pdh, session)) = self.start() else {
            panic!("not sending");
        };
        assert_eq!(self.target.attach_as(SEV, None), Ok(Answer::Done));
        let started = self.target.step(Step::ReceiveStart {
            policy,
            pdh,
            session,
        });
        if started.is_err() || command == "RECEIVE_START" {
            return started;
        }
        let gpas = all_pages();
        let packets = self
            .source
            .bytes(&Ask::Step(Step::SendPages { gpas: gpas.clone() }));
        let received = self.target.step(Step::ReceivePages { gpas, packets });
        if received.is_err() || command == "RECEIVE_UPDATE_DATA" {
            return received;
        }
        self.target.step(Step::ReceiveFinish)
    }

    /// A guest that did not arrive whole is never finished, and the source goes on.
    fn after_receiving(&mut self) {
        let after = self.target.step(Step::ReceiveFinish);
        assert_eq!(after.unwrap_err().0, "LAUNCH_STATE");
        self.source.stepped(Step::SendCancel);
    }
}

#[test]
fn every_firmware_code_at_every_command_of_a_move_is_said_in_plain_words() {
    let mut both = Move::new();
    let check = |(name, text): (String, String), code: FirmwareCode, command: &str| {
        assert_eq!(name, code.name(), "{command}");
        assert!(
            text.starts_with(&format!("{command} refused by the secure")),
            "{text}"
        );
        assert!(text.contains(code.meaning()), "{text}");
        assert!(text.contains(code.remedy()), "{text}");
    };
    for code in FirmwareCode::all() {
        let fault = Fault::Firmware(code.0);
        for command in SENDING {
            both.launch();
            both.source.double.fail(command, 1, fault);
            check(both.send(command).unwrap_err(), code, command);
            both.after_sending(command);
        }
        for command in RECEIVING {
            both.target.double.fail(command, 1, fault);
            check(both.receive(command).unwrap_err(), code, command);
            both.after_receiving();
        }
        // RECEIVE_START binds the guest to an ASID; what was received so far is decommissioned where that fails.
        both.target.double.fail("ACTIVATE", 1, fault);
        check(
            both.receive("RECEIVE_START").unwrap_err(),
            code,
            "RECEIVE_START",
        );
        assert_eq!(both.target.double.guests(), 0);
        both.after_receiving();
    }
    both.end();
}

#[test]
fn every_kernel_error_at_every_command_of_a_move_has_its_code_and_remedy() {
    let errors = [
        (Errno::ENOTTY, "SEV_NOT_AVAILABLE", "BIOS"),
        (Errno::EBADF, "SEV_BAD_DEVICE", "/dev/sev"),
        (Errno::EBUSY, "SEV_NO_ASID", "end a confidential guest"),
        (Errno::ENOMEM, "SEV_MEMORY_LOCK", "RLIMIT_MEMLOCK"),
        (Errno::ETIMEDOUT, "SEV_DEAD", "restart the host"),
        (Errno::EPERM, "SEV_REFUSED", "write permission"),
        (Errno::EINVAL, "SEV_REFUSED", "order of commands"),
        (Errno::EFAULT, "SEV_REFUSED", "not mapped"),
        (Errno::EIO, "SEV_REFUSED", "without a code"),
    ];
    let mut both = Move::new();
    let check = |(name, text): (String, String), code: &str, remedy: &str, command: &str| {
        assert_eq!(name, code, "{command}");
        assert!(
            text.starts_with(&format!("{command} refused by the kernel")),
            "{text}"
        );
        assert!(text.contains(remedy), "{text}");
    };
    for (errno, code, remedy) in errors {
        let fault = Fault::Kernel(errno);
        for command in SENDING {
            both.launch();
            both.source.double.fail(command, 1, fault);
            check(both.send(command).unwrap_err(), code, remedy, command);
            both.after_sending(command);
        }
        for command in RECEIVING {
            both.target.double.fail(command, 1, fault);
            check(both.receive(command).unwrap_err(), code, remedy, command);
            both.after_receiving();
        }
    }
    both.end();
}

#[test]
fn what_is_put_off_is_repeated_within_bounds() {
    let mut both = Move::new();
    for errno in [Errno::EAGAIN, Errno::EINTR] {
        let fault = Fault::Kernel(errno);
        let busy = |outcome: Outcome, command: &str| {
            let (code, text) = outcome.unwrap_err();
            assert_eq!(code, "SEV_BUSY", "{command}");
            assert!(text.contains(&format!("{ATTEMPTS} times")), "{text}");
            assert!(text.contains("try again later"), "{text}");
        };
        for command in SENDING {
            both.launch();
            both.source.double.fail(command, ATTEMPTS - 1, fault);
            assert!(both.send(command).is_ok(), "{command} {errno}");
            both.launch();
            both.source.double.fail(command, ATTEMPTS, fault);
            busy(both.send(command), command);
            both.after_sending(command);
        }
        for command in RECEIVING {
            both.target.double.fail(command, ATTEMPTS - 1, fault);
            assert!(both.receive(command).is_ok(), "{command} {errno}");
            both.target.double.fail(command, ATTEMPTS, fault);
            busy(both.receive(command), command);
            both.after_receiving();
        }
    }
    both.end();
}

#[test]
fn what_fails_when_the_guest_is_given_up_keeps_nothing_in_the_firmware() {
    let mut both = Move::new();
    for code in FirmwareCode::all() {
        both.launch();
        assert!(both.start().is_ok());
        both.source.stepped(Step::SendFinish);
        let fault = Fault::Firmware(code.0);
        both.source.double.fail("SEND_FINISH", 1, fault);
        both.source.stepped(Step::Decommission);
        both.source.close();
    }
    both.end();
}
