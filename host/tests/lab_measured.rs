//! Debian's OVMF.amdsev.fd in the lab: it starts Debian's kernel where all three hashes are right, and none where a host
//! gives it another kernel, initramfs or command line than was measured.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod vmm_support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use casemate::confidential::launch::{
    Firmware, GuestProtection, SendStarted, SpecialPage, VmsaPage,
};
use casemate::confidential::protocol::PlatformEvidence;
use casemate::machine::plan::{FirmwarePlan, MachinePlan, Technology};
use casemate::vmm::hooks::Hooks;
use casemate::vmm::protocol::{
    HandleKind, LaunchBinding, MachineState, Measurement, RoleError, VmmReply, VmmRequest,
};
use casemate_attest::measure::ovmf::Ovmf;
use casemate_attest::measure::snp::SnpLaunchDigest;
use vmm_support::{Lines, Vmm, hooks, kvm, plan};

#[test]
fn firmware_starts_what_was_measured_and_nothing_else() {
    let begun = Instant::now();
    let started = boot(None, BOOT);
    assert!(started, "the measured kernel does not start");
    let usual = begun.elapsed();
    // Where each hash lies in the table: command line, initramfs, kernel.
    for (what, at) in [("command line", 36), ("initramfs", 86), ("kernel", 136)] {
        let started = boot(Some(at), usual * 2 + Duration::from_secs(5));
        assert!(!started, "firmware starts another {what}");
    }
}

/// Whether the kernel says anything within `limit`. `wrong` is a byte of the table that is spoilt after the launch, as by
/// a host that gives the firmware something else than it had measured.
fn boot(wrong: Option<u64>, limit: Duration) -> bool {
    let lines = Lines::new();
    let open = |variable: &str| {
        let path = std::env::var_os(variable).expect("runs in the lab");
        File::open(path).unwrap()
    };
    let firmware = open("LAB_FIRMWARE_AMDSEV");
    let plan = MachinePlan {
        firmware: FirmwarePlan::for_image(firmware.metadata().unwrap().len()),
        technology: Technology::Sev {
            emulated: true,
            policy: 1,
        },
        ..plan(1, 256 << 20, "console=ttyS0 panic=-1")
    };
    let table = hash_table(&firmware);
    let handles = vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, lines.handle()),
        (HandleKind::Firmware, firmware.into()),
        (HandleKind::Kernel, open("LAB_GUEST_KERNEL").into()),
        (HandleKind::Initrd, open("LAB_GUEST_INITRD").into()),
    ];
    let (mut vmm, _) = Vmm::prepare_hooked(&plan, handles, agreeable()).unwrap();
    let binding = Box::default();
    vmm.ask(VmmRequest::Launch { binding }).unwrap();
    if let Some(at) = wrong {
        spoil(table + at);
    }
    vmm.ask(VmmRequest::Run).unwrap();
    let until = Instant::now() + limit;
    let mut said = Vec::new();
    while Instant::now() < until {
        let Some((_, line)) = lines.next(Duration::from_millis(500)) else {
            continue;
        };
        if line.contains("Linux version") {
            return true;
        }
        said.push(line);
    }
    // It runs on, and waits: it was not the machine that failed.
    let VmmReply::Status(status) = vmm.ask(VmmRequest::Status).unwrap() else {
        panic!("no status");
    };
    assert_eq!(status.state, MachineState::Running, "{said:?}");
    false
}

/// Where the firmware looks for the hashes.
fn hash_table(firmware: &File) -> u64 {
    let mut image = vec![0; firmware.metadata().unwrap().len() as usize];
    firmware.read_exact_at(&mut image, 0).unwrap();
    Ovmf::parse(&image)
        .unwrap()
        .hash_table()
        .unwrap()
        .gpa
        .into()
}

/// Changes a byte of the guest's memory, which lies in its file as in the guest.
fn spoil(gpa: u64) {
    let memory = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let memory = memory.as_ref().unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, gpa).unwrap();
    memory.write_all_at(&[byte[0] ^ 1], gpa).unwrap();
}

/// The hooks of a host that keeps the guest's memory for itself, under a processor that takes everything.
fn agreeable() -> Hooks {
    Hooks {
        protection: |_, _, machine| {
            let memory = machine.memory.try_clone_to_owned().unwrap();
            *MEMORY.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory.into());
            Ok(Some(GuestProtection::new(Agreeable)))
        },
        ..hooks()
    }
}

struct Agreeable;

impl Firmware for Agreeable {
    fn launch_start(&mut self, _: &LaunchBinding) -> Result<(), RoleError> {
        Ok(())
    }
    fn launch_update(&mut self, _: u64, _: u64) -> Result<(), RoleError> {
        Ok(())
    }
    fn launch_special(&mut self, _: u64, _: SpecialPage) -> Result<(), RoleError> {
        Ok(())
    }
    fn launch_vcpus(&mut self, _: &[VmsaPage]) -> Result<(), RoleError> {
        Ok(())
    }
    fn launch_measure(&mut self) -> Result<Option<Measurement>, RoleError> {
        Ok(None)
    }
    fn launch_secret(&mut self, _: &[u8], _: &[u8], _: u64) -> Result<(), RoleError> {
        never()
    }
    fn launch_finish(&mut self) -> Result<Option<SnpLaunchDigest>, RoleError> {
        Ok(None)
    }
    fn send_start(&mut self, _: &PlatformEvidence) -> Result<SendStarted, RoleError> {
        never()
    }
    fn send_pages(&mut self, _: &[u64]) -> Result<(), RoleError> {
        never()
    }
    fn send_finish(&mut self) -> Result<(), RoleError> {
        never()
    }
    fn send_cancel(&mut self) -> Result<(), RoleError> {
        never()
    }
    fn evidence(&mut self) -> Result<PlatformEvidence, RoleError> {
        never()
    }
    fn receive_start(&mut self, _: u32, _: &[u8], _: &[u8]) -> Result<(), RoleError> {
        never()
    }
    fn receive_pages(&mut self, _: &[u64]) -> Result<(), RoleError> {
        never()
    }
    fn receive_finish(&mut self) -> Result<(), RoleError> {
        never()
    }
    fn decommission(&mut self) {}
}

fn never<T>() -> Result<T, RoleError> {
    Err(RoleError::new("TEST", "not in this test"))
}

static MEMORY: Mutex<Option<File>> = Mutex::new(None);
/// Firmware and kernel; the lab is slow.
const BOOT: Duration = Duration::from_secs(100);
