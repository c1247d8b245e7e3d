//! The real ioctl code launches SNP guests, converts their pages, and fails in every way.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod common;

use casemate::confidential::kvm::{ATTEMPTS, FirmwareCode};
use casemate_attest::measure::id_block::{IdAuth, IdBlock, IdSigningKey};
use casemate_attest::measure::snp::{PageType, SnpLaunchDigest, SnpLaunchDigester};
use casemate_attest::processor::snp::{GuestChannel, KeySelect, SnpGuestHandle};
use casemate_attest::report::{Report, SnpPolicy};
use casemate_double::protocol::{Answer, Ask, Outcome, START, SnpStep};
use casemate_double::{Fault, vmsa};
use common::{PAGES, Vmm, code_page, golden, site_a, snp_machine};
use nix::errno::Errno;

/// ABI 0, SMT, bit 17.
const POLICY: u64 = 0x3_0000;
const HOST_DATA: [u8; 32] = [0xd1; 32];
const SECRETS: u64 = 0x6000;

fn page(kind: u8, gpa: u64, content: Vec<u8>) -> SnpStep {
    SnpStep::Update {
        gpa,
        content,
        page: kind,
    }
}

fn start() -> SnpStep {
    SnpStep::Start {
        policy: POLICY,
        gosvw: [3; 16],
    }
}

fn finish() -> SnpStep {
    SnpStep::Finish {
        id: None,
        host_data: HOST_DATA,
        vcek_disabled: false,
    }
}

/// A CPUID page of one entry: function 1 with these features in ECX.
fn cpuid(ecx: u32) -> Vec<u8> {
    let mut page = vec![0u8; 4096];
    page[0] = 1;
    page[16] = 1;
    page[16 + 32..16 + 36].copy_from_slice(&ecx.to_le_bytes());
    page
}

/// All pages that a launch gives, in order.
fn pages() -> Vec<SnpStep> {
    vec![
        page(0, START, code_page()),
        page(1, 0x2000, vec![0; 3 * 4096]),
        page(2, 0x5000, vec![0x77; 4096]),
        page(3, SECRETS, vec![0; 4096]),
        page(4, 0x7000, cpuid(1)),
    ]
}

/// What an owner computes of the same description.
fn digest() -> SnpLaunchDigest {
    let mut digester = SnpLaunchDigester::new();
    digester.normal(START, &[code_page().try_into().unwrap()]);
    digester.without_content(PageType::Zero, 0x2000, 3);
    digester.without_content(PageType::Unmeasured, 0x5000, 1);
    digester.without_content(PageType::Secrets, SECRETS, 1);
    digester.without_content(PageType::Cpuid, 0x7000, 1);
    digester.vmsa(&vmsa(0).try_into().unwrap(), 1);
    digester.finish()
}

trait Snp {
    fn attach_snp(&mut self);
    fn snp(&mut self, step: SnpStep) -> Outcome;
    fn loaded(&mut self);
    fn launched(&mut self, finish: SnpStep) -> Outcome;
    fn private_pages(&mut self) -> Vec<u64>;
}

impl Snp for Vmm {
    fn attach_snp(&mut self) {
        self.done(&Ask::SnpAttach { pages: PAGES });
    }

    fn snp(&mut self, step: SnpStep) -> Outcome {
        self.ask(&Ask::Snp(step))
    }

    fn loaded(&mut self) {
        self.attach_snp();
        assert_eq!(self.snp(start()), Ok(Answer::Done));
        for page in pages() {
            assert_eq!(self.snp(page), Ok(Answer::Done));
        }
        self.done(&Ask::AddVcpu);
    }

    fn launched(&mut self, finish: SnpStep) -> Outcome {
        self.loaded();
        self.snp(finish)
    }

    fn private_pages(&mut self) -> Vec<u64> {
        let bytes = self.bytes(&Ask::Snp(SnpStep::PrivatePages));
        let words = bytes.chunks(8);
        words
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect()
    }
}

/// The report that the guest asks for, through the messages of its secrets page.
fn report(vmm: &mut Vmm, guest: u32) -> Report {
    let secrets = vmm.read(SECRETS, 4096).try_into().unwrap();
    let mut channel = GuestChannel::new(&secrets, 0).unwrap();
    let request = channel.report_request(&[9; 64], 0, KeySelect::Any);
    let request = request.unwrap();
    let reply = vmm
        .double
        .snp(|snp| snp.guest_request(SnpGuestHandle(guest), &request).unwrap())
        .unwrap();
    Report::parse(&channel.report(&reply).unwrap()).unwrap()
}

#[test]
fn an_snp_guest_is_launched_runs_and_its_report_says_what_was_launched() {
    let mut vmm = Vmm::start(&snp_machine());
    assert_eq!(vmm.launched(finish()), Ok(Answer::Done));
    assert_eq!(vmm.bytes(&Ask::Run { outputs: 3 }), [1, 2, 3]);
    assert_eq!(vmm.read(0x5000, 4096), [0x77; 4096]);
    let report = report(&mut vmm, 1);
    assert_eq!(report.measurement(), *digest().as_bytes());
    assert_eq!(report.host_data(), HOST_DATA);
    assert_eq!(report.report_data(), [9; 64]);
    assert_eq!(vmm.double.guests(), 1);
    vmm.close();
    golden("sev-snp-launch.txt", &vmm.double.log());
    vmm.finish();
}

#[test]
fn an_id_block_binds_the_launch_and_one_of_another_image_ends_it() {
    let key = || IdSigningKey::from_pkcs8(&IdSigningKey::generate().unwrap()).unwrap();
    let (id_key, author) = (key(), key());
    let signed = |launch_digest, policy| {
        let block = IdBlock {
            launch_digest,
            family_id: [1; 16],
            image_id: [2; 16],
            guest_svn: 3,
            policy: SnpPolicy(policy),
        };
        let auth = IdAuth::sign(&block, &id_key, Some(&author)).unwrap();
        SnpStep::Finish {
            id: Some((block.to_bytes().to_vec(), auth.as_bytes().to_vec(), true)),
            host_data: HOST_DATA,
            vcek_disabled: true,
        }
    };
    let mut vmm = Vmm::start(&snp_machine());
    let other = SnpLaunchDigest::new([0; 48]);
    let refused = vmm.launched(signed(other, POLICY)).unwrap_err();
    assert_eq!(refused.0, "BAD_MEASUREMENT", "{}", refused.1);
    assert!(vmm.snp(finish()).is_err(), "a failed launch is gone");
    vmm.close();
    let refused = vmm
        .launched(signed(digest(), POLICY | 1 << 19))
        .unwrap_err();
    assert_eq!(refused.0, "POLICY_FAILURE");
    vmm.close();
    let mut forged = signed(digest(), POLICY);
    if let SnpStep::Finish { id: Some(id), .. } = &mut forged {
        id.1[0x40] ^= 1;
    }
    assert_eq!(vmm.launched(forged).unwrap_err().0, "BAD_SIGNATURE");
    vmm.close();
    assert_eq!(vmm.launched(signed(digest(), POLICY)), Ok(Answer::Done));
    let disabled = vmm.double.snp(|snp| {
        let guest = snp.guest(SnpGuestHandle(4)).unwrap();
        guest.status().vcek_disabled
    });
    assert_eq!(disabled, Some(true));
    vmm.close();
    vmm.finish();
}

#[test]
fn a_cpuid_page_that_the_firmware_corrects_comes_back() {
    let mut vmm = Vmm::start(&snp_machine());
    vmm.attach_snp();
    vmm.snp(start()).unwrap();
    let corrected = vmm.bytes(&Ask::Snp(page(4, 0x7000, cpuid(1 << 24 | 1))));
    assert_eq!(corrected, cpuid(1), "no TSC deadline timer");
    vmm.close();
    vmm.finish();
}

#[test]
fn pages_change_sides_on_the_guests_wish_and_on_no_other() {
    let mut vmm = Vmm::start(&snp_machine());
    assert_eq!(vmm.launched(finish()), Ok(Answer::Done));
    let all: Vec<u64> = (0..PAGES).collect();
    assert_eq!(vmm.private_pages(), all);
    let hypercall = |gpa: u64, pages: u64, attributes: u64| SnpStep::Hypercall {
        number: 12,
        arguments: [gpa, pages, attributes, 0, 0, 0],
    };
    assert_eq!(vmm.snp(hypercall(0xa000, 2, 0)), Ok(Answer::Done));
    let kept: Vec<u64> = all
        .iter()
        .copied()
        .filter(|page| ![10, 11].contains(page))
        .collect();
    assert_eq!(vmm.private_pages(), kept);
    // What the host writes into a shared page goes when it becomes private: the page is freed.
    vmm.done(&Ask::Write {
        gpa: 0xa000,
        bytes: vec![0x42; 16],
    });
    assert_eq!(vmm.read(0xa000, 16), [0x42; 16]);
    let fault = SnpStep::MemoryFault {
        flags: 8,
        gpa: 0xa000,
        size: 0x1000,
    };
    assert_eq!(vmm.snp(fault), Ok(Answer::Done));
    assert_eq!(vmm.read(0xa000, 16), [0; 16]);
    let now = vmm.private_pages();
    assert!(now.contains(&10) && !now.contains(&11));
    for (wish, code) in [
        (hypercall(0xa800, 1, 0), "BAD_CONVERSION"),
        (hypercall(0xa000, 0, 0), "BAD_CONVERSION"),
        (hypercall(0xa000, 1, 0x40), "BAD_CONVERSION"),
        (hypercall(PAGES * 4096, 1, 0), "BAD_REQUEST"),
        (hypercall(0xf000, 2, 0), "BAD_REQUEST"),
        (
            SnpStep::MemoryFault {
                flags: 1,
                gpa: 0,
                size: 4096,
            },
            "BAD_CONVERSION",
        ),
    ] {
        assert_eq!(vmm.snp(wish).unwrap_err().0, code);
    }
    let refusal = Fault::Kernel(Errno::ENOMEM);
    vmm.double.fail("KVM_SET_MEMORY_ATTRIBUTES", 1, refusal);
    assert_eq!(
        vmm.snp(hypercall(0, 1, 0)).unwrap_err().0,
        "SEV_MEMORY_LOCK"
    );
    assert_eq!(vmm.private_pages(), now, "what failed is not noted");
    assert_eq!(
        vmm.bytes(&Ask::Run { outputs: 1 }),
        [1],
        "and the guest runs on"
    );
    vmm.close();
    vmm.finish();
}

#[test]
fn every_firmware_code_at_every_command_is_said_in_plain_words() {
    let mut vmm = Vmm::start(&snp_machine());
    for code in FirmwareCode::all() {
        for command in ["SNP_GCTX_CREATE", "SNP_LAUNCH_START", "SNP_ACTIVATE"] {
            vmm.attach_snp();
            vmm.double.fail(command, 1, Fault::Firmware(code.0));
            let (name, text) = vmm.snp(start()).unwrap_err();
            assert_eq!(name, code.name());
            assert!(text.starts_with("SNP_LAUNCH_START"), "{text}");
            assert!(text.contains(code.remedy()), "{text}");
            assert!(vmm.snp(start()).is_err(), "a failed launch is gone");
            vmm.close();
        }
        vmm.attach_snp();
        vmm.snp(start()).unwrap();
        vmm.double
            .fail("SNP_LAUNCH_UPDATE", 1, Fault::Firmware(code.0));
        let (name, text) = vmm.snp(page(0, START, code_page())).unwrap_err();
        assert_eq!(name, code.name());
        assert!(text.starts_with("SNP_LAUNCH_UPDATE"), "{text}");
        assert!(vmm.snp(finish()).is_err(), "a failed launch is gone");
        vmm.close();
        for command in ["SNP_LAUNCH_UPDATE_VMSA", "SNP_LAUNCH_FINISH"] {
            vmm.loaded();
            vmm.double.fail(command, 1, Fault::Firmware(code.0));
            let (name, text) = vmm.snp(finish()).unwrap_err();
            assert_eq!(name, code.name());
            assert!(text.starts_with("SNP_LAUNCH_FINISH"), "{text}");
            vmm.close();
        }
    }
    vmm.finish();
}

#[test]
fn what_is_put_off_is_repeated_within_bounds_and_a_finish_never() {
    let mut vmm = Vmm::start(&snp_machine());
    for errno in [Errno::EAGAIN, Errno::EINTR] {
        let fault = Fault::Kernel(errno);
        for command in ["SNP_LAUNCH_START", "SNP_LAUNCH_UPDATE"] {
            vmm.double.fail(command, ATTEMPTS - 1, fault);
        }
        assert_eq!(vmm.launched(finish()), Ok(Answer::Done));
        assert_eq!(report_measurement(&mut vmm), *digest().as_bytes());
        vmm.close();
        vmm.attach_snp();
        vmm.snp(start()).unwrap();
        vmm.double.fail("SNP_LAUNCH_UPDATE", ATTEMPTS, fault);
        let refused = vmm.snp(page(0, START, code_page()));
        assert_eq!(refused.unwrap_err().0, "SEV_BUSY");
        vmm.close();
        vmm.double.fail("SNP_LAUNCH_FINISH", 1, fault);
        assert_eq!(vmm.launched(finish()).unwrap_err().0, "SEV_BUSY");
        vmm.close();
    }
    vmm.finish();
}

fn report_measurement(vmm: &mut Vmm) -> [u8; 48] {
    // Handles count up: the last guest is the one that runs.
    let handle = (1..64).rev().find(|handle| {
        let known = |snp: &mut casemate_attest::processor::snp::SnpProcessor| {
            snp.guest(SnpGuestHandle(*handle)).is_ok()
        };
        vmm.double.snp(known).unwrap()
    });
    report(vmm, handle.unwrap()).measurement()
}

#[test]
fn what_no_kernel_takes_is_refused_before_it_is_asked() {
    let mut vmm = Vmm::start(&snp_machine());
    for policy in [
        1 << 16,
        POLICY | 1 << 18,
        POLICY | 1 << 21,
        POLICY | 1 << 63,
    ] {
        vmm.attach_snp();
        let refused = vmm.snp(SnpStep::Start {
            policy,
            gosvw: [0; 16],
        });
        assert_eq!(refused.unwrap_err().0, "BAD_REQUEST", "{policy:#x}");
        vmm.close();
    }
    // Linux 6.12 takes no guest that forbids SMT.
    vmm.attach_snp();
    let refused = vmm.snp(SnpStep::Start {
        policy: 1 << 17,
        gosvw: [0; 16],
    });
    assert_eq!(refused.unwrap_err().0, "SEV_REFUSED");
    vmm.close();
    for (gpa, length) in [
        (0x1000, 100),
        (0x1000, 0),
        (PAGES * 4096, 4096),
        (0xf000, 8192),
    ] {
        vmm.attach_snp();
        vmm.snp(start()).unwrap();
        let refused = vmm.snp(page(0, gpa, vec![0; length]));
        let code = refused.unwrap_err().0;
        assert!(
            ["BAD_REQUEST", "BAD_MEMORY"].contains(&code.as_str()),
            "{code}"
        );
        vmm.close();
    }
    vmm.finish();
    let mut vmm = Vmm::start(&site_a());
    let (code, text) = vmm.ask(&Ask::SnpAttach { pages: PAGES }).unwrap_err();
    assert_eq!(code, "SEV_NOT_SUPPORTED");
    assert!(text.contains("Linux 6.11"), "{text}");
    vmm.finish();
}

#[test]
fn memory_of_two_sides_fails_in_plain_words() {
    let mut vmm = Vmm::start(&snp_machine());
    for command in [
        "KVM_CREATE_GUEST_MEMFD",
        "KVM_SET_USER_MEMORY_REGION2",
        "KVM_SET_MEMORY_ATTRIBUTES",
    ] {
        vmm.double.fail(command, 1, Fault::Kernel(Errno::EINVAL));
        let (code, text) = vmm.ask(&Ask::SnpAttach { pages: PAGES }).unwrap_err();
        assert_eq!(code, "SEV_REFUSED");
        assert!(text.starts_with(command), "{text}");
    }
    assert_eq!(vmm.double.guests(), 0);
    vmm.finish();
}
