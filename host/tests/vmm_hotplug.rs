//! Devices attached to a machine on the real `/dev/kvm`, and what becomes of them in a move.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

#[path = "support/plugged.rs"]
mod plugged;
mod vmm_support;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate::machine::plan::devices::{DeviceName, HotPlugPlan, Limits, Plugged};
use casemate::machine::plan::{Attachment, DiskFormat, DiskPlan, MachinePlan};
use casemate::vmm::protocol::{HandleKind, RoleError, VmmReply, VmmRequest};
use vmm_support::{Lines, Vmm, bzimage, image_file, kvm, migrate, plan};

#[test]
fn what_is_attached_moves_along_and_the_target_tells_of_it_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = (Lines::new(), Lines::new());
    let plan = MachinePlan {
        hotplug: HotPlugPlan {
            slots: 4,
            plugged: vec![],
        },
        ..plan(1, 64 << 20, "")
    };
    let mut source = launched(&plan, &here);
    for (name, content) in [("a", b"SLOT 0.."), ("b", b"SLOT 1..")] {
        let path = image(folder.path(), name, content);
        attach(&mut source, name, &path).unwrap();
        said(&here, &String::from_utf8_lossy(content));
    }
    let device = DeviceName::Disk("a".into());
    source.ask(VmmRequest::AskBack { device }).unwrap();
    said(&here, "g");

    let mut moved = plan.clone();
    moved.disks.push(disk("b"));
    let device = DeviceName::Disk("b".into());
    moved.hotplug.plugged.push(Plugged {
        slot: 1,
        device: device.clone(),
    });
    assert_eq!(moved.check(), Ok(()));
    let handles = vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, there.handle()),
        (HandleKind::Disk(0), opened(&folder.path().join("b")).into()),
    ];
    let mut target = Vmm::prepare(&moved, handles).unwrap();
    target.ask(VmmRequest::Incoming { copy: false }).unwrap();
    migrate(&mut source, &mut target);
    drop(source);
    said(&there, "SLOT 1..");
    attach(&mut target, "a", &folder.path().join("a")).unwrap();
    said(&there, "SLOT 0..");
    target
        .ask(VmmRequest::AskBack {
            device: device.clone(),
        })
        .unwrap();
    said(&there, "g");
    let status = VmmRequest::Device {
        device,
        change: None,
    };
    assert_eq!(target.ask(status).unwrap_err().code, "NO_SUCH_DEVICE");
}

#[test]
fn a_mover_and_a_detach_do_not_meet() {
    let folder = tempfile::tempdir().unwrap();
    let lines = Lines::new();
    let plan = MachinePlan {
        hotplug: HotPlugPlan {
            slots: 1,
            plugged: vec![],
        },
        ..plan(1, 64 << 20, "")
    };
    // It never lets go.
    let mut vmm = started(&plan, &lines, &[0xeb, 0xfe]);
    let path = image(folder.path(), "a", b"SLOT 0..");
    attach(&mut vmm, "a", &path).unwrap();
    let device = DeviceName::Disk("a".into());
    let ask = || VmmRequest::AskBack {
        device: device.clone(),
    };
    vmm.ask(ask()).unwrap();
    let refused = vmm.ask(VmmRequest::AttachMover).unwrap_err();
    assert_eq!(refused.code, "DETACHING");
    let keep = VmmRequest::Keep {
        device: device.clone(),
    };
    vmm.ask(keep).unwrap();
    let _mover = vmm.mover();
    assert_eq!(vmm.ask(ask()).unwrap_err().code, "WRONG_STATE");
    let refused = attach(&mut vmm, "b", &path).unwrap_err();
    assert_eq!(refused.code, "WRONG_STATE");
}

fn launched(plan: &MachinePlan, lines: &Lines) -> Vmm {
    started(plan, lines, plugged::code())
}

fn started(plan: &MachinePlan, lines: &Lines, code: &[u8]) -> Vmm {
    let handles = vec![
        (HandleKind::Kvm, kvm()),
        (HandleKind::Console, lines.handle()),
        (HandleKind::Kernel, image_file(&bzimage(code, 0))),
    ];
    let mut vmm = Vmm::prepare(plan, handles).unwrap();
    let binding = Box::default();
    vmm.ask(VmmRequest::Launch { binding }).unwrap();
    vmm.ask(VmmRequest::Run).unwrap();
    vmm
}

fn attach(vmm: &mut Vmm, name: &str, path: &Path) -> Result<VmmReply, RoleError> {
    let attachment = Attachment::Disk(disk(name));
    let image: OwnedFd = opened(path).into();
    vmm.ask_with(VmmRequest::Attach { attachment }, &[image.as_fd()])
}

fn disk(name: &str) -> DiskPlan {
    DiskPlan {
        id: name.into(),
        format: DiskFormat::Raw,
        read_only: false,
        io: Default::default(),
        limits: Limits::default(),
    }
}

fn image(folder: &Path, name: &str, content: &[u8; 8]) -> PathBuf {
    let path = folder.join(name);
    let file = File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(content, 0).unwrap();
    path
}

fn opened(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn said(lines: &Lines, wanted: &str) {
    let (_, line) = lines.next(Duration::from_secs(20)).expect(wanted);
    assert_eq!(line, wanted);
}
