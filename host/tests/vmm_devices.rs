//! Devices of a guest on the real `/dev/kvm`: changed while it runs, taken along in a move, and a watchdog that nobody
//! feeds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod vmm_support;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use casemate::agent::tap;
use casemate::devices::virtio::VirtioDevice;
use casemate::devices::virtio::net::Net;
use casemate::machine::plan::devices::{
    BalloonPlan, ConsolePlan, DeviceChange, DeviceName, DeviceStatus, Limits, Rate, RngPlan,
    SmallDevices, WatchdogAction, WatchdogPlan,
};
use casemate::machine::plan::{DiskFormat, DiskPlan, MachinePlan};
use casemate::vmm::protocol::{
    HandleKind, MachineState, RoleError, VmmEvent, VmmReply, VmmRequest,
};
use vmm_support::{Lines, Vmm, bzimage, image_file, kvm, migrate, plan};

#[test]
fn the_kernel_spreads_frames_over_the_queues_that_the_driver_uses_alone() {
    let name = format!("mq-{}", std::process::id());
    let queues = || {
        let folder = format!("/sys/class/net/{name}/queues");
        let names = std::fs::read_dir(folder).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("rx-")).count()
    };
    let taps = tap::open_queues(&name, None, 4).unwrap();
    assert_eq!(queues(), 4);
    let mac = [0x52, 0x54, 0, 0, 0, 9];
    let mut card = Net::new(taps, mac, vec![]).unwrap();
    assert_eq!(queues(), 1, "until a driver asks for more");
    for in_use in [3, 4, 2] {
        // As when it arrives from elsewhere; its driver's own asking is tested beside the device.
        let state = [&[2][..], &mac, &[in_use]].concat();
        card.restore(&state).unwrap();
        assert_eq!(queues(), usize::from(in_use));
    }
    card.reset();
    assert_eq!(queues(), 1);
    let other = tap::open(&name, None).unwrap_err().to_string();
    assert!(other.contains("multi_queue"), "{other}");
}

#[test]
fn devices_are_changed_while_the_guest_runs_and_move_with_it() {
    let (folder, lines) = (tempfile::tempdir().unwrap(), Lines::new());
    let image = File::create(folder.path().join("disk")).unwrap();
    image.set_len(1 << 20).unwrap();
    let mut vmm = vmm(&full(), folder.path(), &lines, Some(SPIN));
    vmm.ask(VmmRequest::Run).unwrap();

    let disk = || DeviceName::Disk("data".into());
    assert_eq!(ask(&mut vmm, disk(), None).unwrap().size, 1 << 20);
    image.set_len(3 << 20).unwrap();
    let grown = ask(&mut vmm, disk(), Some(DeviceChange::Resized));
    assert_eq!(grown.unwrap().size, 3 << 20);
    let rate = Some(Rate {
        per_second: 1000,
        burst: 10,
    });
    let limits = DeviceChange::Limits(Limits {
        bytes: None,
        operations: rate,
    });
    ask(&mut vmm, disk(), Some(limits)).unwrap();
    let held = ask(
        &mut vmm,
        DeviceName::Balloon,
        Some(DeviceChange::Balloon(16 << 20)),
    );
    let held = held.unwrap();
    assert_eq!((held.size, held.held), (16 << 20, 0));
    let terminal = ConsolePlan {
        columns: 100,
        rows: 30,
    };
    let terminal = Some(DeviceChange::Terminal(terminal));
    ask(&mut vmm, DeviceName::Console, terminal).unwrap();

    let all = Some(DeviceChange::Balloon(MEMORY));
    for (name, change, code) in [
        (DeviceName::Disk("other".into()), None, "NO_SUCH_DEVICE"),
        (DeviceName::Net("data".into()), None, "NO_SUCH_DEVICE"),
        (DeviceName::Balloon, all, "DEVICE_CHANGE"),
        (DeviceName::Balloon, Some(limits), "DEVICE_CHANGE"),
        (disk(), terminal, "DEVICE_CHANGE"),
    ] {
        assert_eq!(ask(&mut vmm, name, change).unwrap_err().code, code);
    }

    let mut target = self::vmm(&full(), folder.path(), &lines, None);
    target.ask(VmmRequest::Incoming { copy: false }).unwrap();
    migrate(&mut vmm, &mut target);
    drop(vmm);
    let held = ask(&mut target, DeviceName::Balloon, None).unwrap();
    assert_eq!(held.size, 16 << 20, "the balloon's size went along");
    assert_eq!(state(&mut target), MachineState::Running);
}

#[test]
fn a_disk_of_another_size_is_not_moved_to() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lines = Lines::new();
    for (folder, size) in [(&folder, 1u64 << 20), (&other, 2 << 20)] {
        let image = File::create(folder.path().join("disk")).unwrap();
        image.set_len(size).unwrap();
    }
    let mut vmm = vmm(&full(), folder.path(), &lines, Some(SPIN));
    vmm.ask(VmmRequest::Run).unwrap();
    let mut target = self::vmm(&full(), other.path(), &lines, None);
    target.ask(VmmRequest::Incoming { copy: false }).unwrap();
    let moved = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        migrate(&mut vmm, &mut target)
    }));
    assert!(moved.is_err(), "the state does not fit");
}

#[test]
fn an_unfed_watchdog_stops_or_pauses_its_guest_or_only_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let actions = [
        WatchdogAction::Stop,
        WatchdogAction::Report,
        WatchdogAction::Pause,
    ];
    for action in actions {
        let lines = Lines::new();
        let mut plan = plan(1, MEMORY, "");
        plan.small.watchdog = Some(WatchdogPlan { action });
        let mut vmm = vmm(&plan, folder.path(), &lines, Some(STARVE));
        vmm.ask(VmmRequest::Run).unwrap();
        let soon = Duration::from_secs(20);
        assert_eq!(vmm.event(soon), Some(VmmEvent::Watchdog), "{action:?}");
        match action {
            WatchdogAction::Stop => {
                let reason = "watchdog".into();
                assert_eq!(vmm.event(soon), Some(VmmEvent::GuestStopped { reason }));
                assert_eq!(state(&mut vmm), MachineState::Stopped);
            }
            WatchdogAction::Report => {
                assert_eq!(vmm.event(Duration::from_millis(300)), None);
                assert_eq!(state(&mut vmm), MachineState::Running);
            }
            WatchdogAction::Pause => {
                assert_eq!(state(&mut vmm), MachineState::Paused);
                vmm.ask(VmmRequest::Resume).unwrap();
                assert_eq!(state(&mut vmm), MachineState::Running);
            }
        }
    }
}

fn full() -> MachinePlan {
    let bytes = Rate {
        per_second: 1 << 20,
        burst: 1 << 20,
    };
    let mut plan = plan(1, MEMORY, "");
    plan.disks.push(DiskPlan {
        id: "data".into(),
        format: DiskFormat::Raw,
        io: Default::default(),
        read_only: false,
        limits: Limits::default(),
    });
    let action = WatchdogAction::Report;
    plan.small = SmallDevices {
        rng: Some(RngPlan { bytes }),
        balloon: Some(BalloonPlan::default()),
        console: Some(ConsolePlan::default()),
        watchdog: Some(WatchdogPlan { action }),
    };
    plan
}

/// A VMM with what the plan needs; with code it is launched.
fn vmm(plan: &MachinePlan, folder: &Path, lines: &Lines, code: Option<&[u8]>) -> Vmm {
    let mut handles: Vec<(HandleKind, OwnedFd)> = vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, lines.handle()),
    ];
    for (_, number) in plan.disks.iter().zip(0u8..) {
        let file = File::options()
            .read(true)
            .write(true)
            .open(folder.join("disk"));
        handles.push((HandleKind::Disk(number), file.unwrap().into()));
    }
    if plan.small.console.is_some() {
        let path = folder.join("console.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        handles.push((HandleKind::ConsoleListener, listener.into()));
    }
    if let Some(code) = code {
        handles.push((HandleKind::Kernel, image_file(&bzimage(code, 0))));
    }
    let mut vmm = Vmm::prepare(plan, handles).unwrap();
    if code.is_some() {
        let binding = Box::default();
        vmm.ask(VmmRequest::Launch { binding }).unwrap();
    }
    vmm
}

fn ask(
    vmm: &mut Vmm,
    device: DeviceName,
    change: Option<DeviceChange>,
) -> Result<DeviceStatus, RoleError> {
    match vmm.ask(VmmRequest::Device { device, change })? {
        VmmReply::Device(status) => Ok(status),
        other => panic!("no status: {other:?}"),
    }
}

fn state(vmm: &mut Vmm) -> MachineState {
    match vmm.ask(VmmRequest::Status).unwrap() {
        VmmReply::Status(status) => status.state,
        other => panic!("no status: {other:?}"),
    }
}

const MEMORY: u64 = 64 << 20;
/// `jmp $`
const SPIN: &[u8] = &[0xeb, 0xfe];
/// The watchdog is in slot 1 and starts with two stages of some 50 ms:
/// ```text
///         mov edx, 0xcf8 ; mov eax, 0x80000860 ; out dx, eax ; mov dl, 0xfc ; mov eax, 3 ; out dx, ax
///         mov edi, 0xd0000000 ; mov word [rdi+12], 0x80 ; mov word [rdi+12], 0x86 ; mov dword [rdi], 50
///         mov word [rdi+12], 0x80 ; mov word [rdi+12], 0x86 ; mov dword [rdi+4], 50
///         mov dl, 0xf8 ; mov eax, 0x80000868 ; out dx, eax ; mov dl, 0xfc ; mov al, 2 ; out dx, al ; jmp $
/// ```
const STARVE: &[u8] = &[
    0xba, 0xf8, 0x0c, 0x00, 0x00, 0xb8, 0x60, 0x08, 0x00, 0x80, 0xef, 0xb2, 0xfc, 0xb8, 0x03, 0x00,
    0x00, 0x00, 0x66, 0xef, 0xbf, 0x00, 0x00, 0x00, 0xd0, 0x66, 0xc7, 0x47, 0x0c, 0x80, 0x00, 0x66,
    0xc7, 0x47, 0x0c, 0x86, 0x00, 0xc7, 0x07, 0x32, 0x00, 0x00, 0x00, 0x66, 0xc7, 0x47, 0x0c, 0x80,
    0x00, 0x66, 0xc7, 0x47, 0x0c, 0x86, 0x00, 0xc7, 0x47, 0x04, 0x32, 0x00, 0x00, 0x00, 0xb2, 0xf8,
    0xb8, 0x68, 0x08, 0x00, 0x80, 0xef, 0xb2, 0xfc, 0xb0, 0x02, 0xee, 0xeb, 0xfe,
];
