//! Boots a Linux kernel in the VMM without its sandbox, and moves it between VMMs of this process:
//! `boot_linux KERNEL INITRD [--disk FILE-TO-COPY] [--vcpus N] [--memory MIB] [--cmdline TEXT] [--moves N] [--until TEXT] [--stay SECONDS] [--sev-shape yes]`.
//!
//! A tool for the VMM's developers; it needs hardware virtualisation (or the lab).

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
use std::path::Path;
use std::time::{Duration, Instant};

use casemate::machine::plan::{DiskPlan, MachinePlan, Technology};
use casemate::vmm::protocol::{HandleKind, VmmRequest};
use vmm_support::{Lines, Vmm, kvm, migrate, plan};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments.next().expect("KERNEL");
    let initrd = arguments.next().expect("INITRD");
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
    let cmdline = options
        .get("--cmdline")
        .copied()
        .unwrap_or("console=ttyS0 quiet panic=-1 reboot=k");
    let mut plan = plan(
        number("--vcpus", 2) as u8,
        number("--memory", 256) << 20,
        cmdline,
    );
    if options.contains_key("--sev-shape") {
        // The shape of a confidential guest (DMA rules, secret page), without a secure processor.
        plan.technology = Technology::Sev {
            emulated: true,
            policy: 1,
        };
    }
    if options.contains_key("--disk") {
        plan.disks.push(DiskPlan {
            id: "disk0".into(),
            format: Default::default(),
            io: Default::default(),
            read_only: false,
            limits: Default::default(),
        });
    }
    let lines = Lines::new();
    let copy = options.get("--disk").map(|template| {
        let copy = std::env::temp_dir().join("boot_linux.disk");
        std::fs::copy(template, &copy).expect("a copy of the disk");
        copy
    });
    let disk = copy.as_deref();
    let until = options.get("--until").copied().unwrap_or("GUEST-READY");

    let start = Instant::now();
    let mut handles = handles(&lines, disk);
    handles.push((
        HandleKind::Kernel,
        File::open(kernel).expect("kernel").into(),
    ));
    handles.push((
        HandleKind::Initrd,
        File::open(initrd).expect("initrd").into(),
    ));
    let mut vmm = Vmm::prepare(&plan, handles).expect("prepare");
    vmm.ask(VmmRequest::Launch {
        binding: Box::default(),
    })
    .expect("launch");
    println!("boot_linux: loaded after {:?}", start.elapsed());
    vmm.ask(VmmRequest::Run).expect("run");
    wait_for(&lines, &mut vmm, start, until);
    println!("boot_linux: `{until}` after {:?}", start.elapsed());
    for _ in 0..number("--moves", 0) {
        vmm = move_once(vmm, &plan, &lines, disk);
        let until = Instant::now() + Duration::from_secs(number("--stay", 2));
        while Instant::now() < until {
            if let Some((at, line)) = lines.next(Duration::from_millis(100)) {
                println!("[{:8.3}] {line}", at.duration_since(start).as_secs_f64());
            }
        }
    }
    println!("boot_linux: {:?}", vmm.ask(VmmRequest::Status));
}

fn move_once(mut source: Vmm, plan: &MachinePlan, lines: &Lines, disk: Option<&Path>) -> Vmm {
    let mut target = Vmm::prepare(plan, handles(lines, disk)).expect("prepare the target");
    target
        .ask(VmmRequest::Incoming { copy: false })
        .expect("incoming");
    let start = Instant::now();
    let moved = migrate(&mut source, &mut target);
    println!("boot_linux: moved in {:?}: {moved:?}", start.elapsed());
    target
}

fn handles(lines: &Lines, disk: Option<&Path>) -> Vec<(HandleKind, OwnedFd)> {
    let mut handles = vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, lines.handle()),
    ];
    if let Some(path) = disk {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("disk");
        handles.push((HandleKind::Disk(0), file.into()));
    }
    handles
}

fn wait_for(lines: &Lines, vmm: &mut Vmm, start: Instant, marker: &str) {
    let limit = start + Duration::from_secs(90);
    loop {
        let Some((at, line)) = lines.next(Duration::from_secs(1)) else {
            if let Some(event) = vmm.event(Duration::from_millis(1)) {
                panic!("{event:?}");
            }
            assert!(Instant::now() < limit, "no `{marker}`");
            continue;
        };
        println!("[{:8.3}] {line}", at.duration_since(start).as_secs_f64());
        if line.contains(marker) {
            return;
        }
    }
}
