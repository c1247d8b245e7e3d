//! Boots a disk through firmware in the VMM without its sandbox, and moves it between VMMs of this process:
//! `boot_firmware FIRMWARE DISK [--vcpus N] [--memory MIB] [--moves N] [--until TEXT] [--seconds N]`.
//!
//! A tool for the VMM's developers; it needs hardware virtualisation (or the lab). The disk is not written.

#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a tool for developers ends where it fails"
)]

#[path = "../tests/vmm_support/mod.rs"]
mod vmm_support;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use casemate::machine::plan::{DiskPlan, FirmwarePlan};
use casemate::vmm::protocol::{HandleKind, VmmRequest};
use vmm_support::{Lines, Vmm, kvm, migrate, plan};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let firmware = arguments.next().expect("FIRMWARE");
    let disk = arguments.next().expect("DISK");
    let rest: Vec<String> = arguments.collect();
    let options: HashMap<&str, &str> = rest
        .chunks_exact(2)
        .map(|pair| (pair[0].as_str(), pair[1].as_str()))
        .collect();
    let number = |name: &str, default: u64| {
        options
            .get(name)
            .map_or(default, |text| text.parse().expect("a number"))
    };
    let mut plan = plan(
        number("--vcpus", 1) as u8,
        number("--memory", 512) << 20,
        "",
    );
    let firmware = File::open(firmware).expect("firmware");
    let length = firmware.metadata().expect("its length").len();
    plan.firmware = FirmwarePlan::for_image(length);
    plan.disks.push(DiskPlan {
        id: "disk0".into(),
        format: Default::default(),
        io: Default::default(),
        read_only: true,
        limits: Default::default(),
    });
    let lines = Lines::new();
    let handles = || {
        let disk = File::open(&disk).expect("disk");
        vec![
            (HandleKind::Kvm, kvm()),
            (HandleKind::Console, lines.handle()),
            (HandleKind::Disk(0), OwnedFd::from(disk)),
        ]
    };
    let start = Instant::now();
    let mut first = handles();
    first.push((HandleKind::Firmware, firmware.into()));
    let mut vmm = Vmm::prepare(&plan, first).expect("prepare");
    let binding = Box::default();
    vmm.ask(VmmRequest::Launch { binding }).expect("launch");
    vmm.ask(VmmRequest::Run).expect("run");
    let until = options.get("--until").copied().unwrap_or("GUEST-READY");
    let limit = Duration::from_secs(number("--seconds", 90));
    wait_for(&lines, &mut vmm, start, until, limit);
    for _ in 0..number("--moves", 0) {
        let mut target = Vmm::prepare(&plan, handles()).expect("prepare the target");
        target
            .ask(VmmRequest::Incoming { copy: false })
            .expect("incoming");
        let moved = migrate(&mut vmm, &mut target);
        println!("boot_firmware: {moved:?}");
        vmm = target;
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            show(&lines, start);
        }
    }
    println!("boot_firmware: {:?}", vmm.ask(VmmRequest::Status));
}

fn wait_for(lines: &Lines, vmm: &mut Vmm, start: Instant, marker: &str, limit: Duration) {
    loop {
        match show(lines, start) {
            Some(line) if line.contains(marker) => break,
            Some(_) => {}
            None => {
                if let Some(event) = vmm.event(Duration::from_millis(1)) {
                    panic!("{event:?}");
                }
                assert!(start.elapsed() < limit, "no `{marker}`");
            }
        }
    }
    println!("boot_firmware: `{marker}` after {:?}", start.elapsed());
}

fn show(lines: &Lines, start: Instant) -> Option<String> {
    let (at, line) = lines.next(Duration::from_millis(200))?;
    println!("[{:8.3}] {line}", at.duration_since(start).as_secs_f64());
    Some(line)
}
