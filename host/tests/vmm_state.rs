//! The state of a machine that has every device, on the real `/dev/kvm`, beside the golden file of its version. Needs
//! root, for a tap.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

mod vmm_support;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use casemate::agent::tap;
use casemate::machine::plan::devices::{
    BalloonPlan, ConsolePlan, Limits, Rate, RngPlan, SmallDevices, WatchdogAction, WatchdogPlan,
};
use casemate::machine::plan::{DiskFormat, DiskIo, DiskPlan, FirmwarePlan, MachinePlan, NetPlan};
use casemate::vmm::protocol::{HandleKind, MoverReply, MoverRequest, VmmRequest};
use vmm_support::{Lines, Vmm, image_file, kvm, plan};

#[test]
fn a_machine_with_everything_saves_what_the_golden_file_is_of() {
    let folder = tempfile::tempdir().unwrap();
    let lines = Lines::new();
    let mut vmm = Vmm::prepare(&full(), handles(folder.path(), &lines, true)).unwrap();
    let binding = Box::default();
    vmm.ask(VmmRequest::Launch { binding }).unwrap();
    vmm.ask(VmmRequest::Run).unwrap();
    vmm.ask(VmmRequest::Pause).unwrap();
    let mover = vmm.mover();
    let MoverReply::State { length } = mover.ask(MoverRequest::SaveState).unwrap() else {
        panic!("no state");
    };
    let mut state = vec![0u8; length as usize];
    mover.exchange.read_exact_at(&mut state, 0).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/machine-state-4.bin");
    if std::env::var_os("CASEMATE_GOLDEN").is_some_and(|v| v == "write") {
        fs::write(&path, &state).unwrap();
    }
    let golden = fs::read(&path).unwrap();
    assert_eq!(state[..10], golden[..10], "tag and version");

    // What is saved can be put back, and an older one says what to do.
    let folder = tempfile::tempdir().unwrap();
    let mut older = state.clone();
    older[8] = 1;
    for (bytes, code) in [(older, Some("STATE_VERSION")), (state, None)] {
        let handles = handles(folder.path(), &lines, false);
        let mut target = Vmm::prepare(&full(), handles).unwrap();
        target.ask(VmmRequest::Incoming { copy: false }).unwrap();
        let mover = target.mover();
        mover.exchange.write_all_at(&bytes, 0).unwrap();
        let restored = mover.ask(MoverRequest::RestoreState { length });
        assert_eq!(restored.err().map(|e| e.code).as_deref(), code);
    }
}

fn full() -> MachinePlan {
    let bytes = Rate {
        per_second: 1 << 20,
        burst: 1 << 20,
    };
    MachinePlan {
        firmware: FirmwarePlan::for_image(2 << 20),
        disks: vec![DiskPlan {
            id: "data".into(),
            format: DiskFormat::Raw,
            read_only: false,
            io: DiskIo::Auto,
            limits: Limits::default(),
        }],
        nets: vec![NetPlan {
            id: "net0".into(),
            mac: [0x52, 0x54, 0, 0, 0, 1],
            queues: 1,
            announce: vec![],
            limits: Limits::default(),
        }],
        vsock_cid: Some(3),
        small: SmallDevices {
            rng: Some(RngPlan { bytes }),
            balloon: Some(BalloonPlan::default()),
            console: Some(ConsolePlan::default()),
            watchdog: Some(WatchdogPlan {
                action: WatchdogAction::Report,
            }),
        },
        ..plan(2, 64 << 20, "")
    }
}

fn handles(folder: &Path, lines: &Lines, firmware: bool) -> Vec<(HandleKind, OwnedFd)> {
    let disk = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(folder.join("disk"))
        .unwrap();
    disk.set_len(1 << 20).unwrap();
    let listener = |name: &str| {
        let _ = fs::remove_file(folder.join(name));
        OwnedFd::from(UnixListener::bind(folder.join(name)).unwrap())
    };
    // Another for each machine: the one before may not have ended.
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let card = tap::open(&format!("gold{number}-{}", std::process::id()), None).unwrap();
    let mut handles = vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, lines.handle()),
        (HandleKind::Disk(0), disk.into()),
        (HandleKind::Tap { card: 0, pair: 0 }, card),
        (HandleKind::VsockListener, listener("vsock.sock")),
        (HandleKind::ConsoleListener, listener("console.sock")),
    ];
    if firmware {
        // jmp $ at the reset vector
        let mut image = vec![0xf4; 2 << 20];
        let vector = image.len() - 16;
        image[vector..][..2].copy_from_slice(&[0xeb, 0xfe]);
        handles.push((HandleKind::Firmware, image_file(&image)));
    }
    handles
}

static NEXT: AtomicU32 = AtomicU32::new(0);
