//! The device models of a plan, in PCI order: disks, network cards, vsock, random numbers, balloon, console. The
//! watchdog, behind them, is no virtio device.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use casemate_attest::processor::snp::request_frame::{
    GUEST_REQUEST_PORT, REPLY_FRAME_MAX, REQUEST_FRAME_LEN,
};

use super::hooks::{Handles, Models};
use super::protocol::{HandleKind, RoleError};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::console::VirtioConsole;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{Vsock, WiredPort};
use crate::machine::plan::{DiskFormat, DiskIo, DiskPlan, MachinePlan};
use crate::sandbox::seccomp;

/// Makes every device model of `plan` from its descriptor; for [`Hooks::devices`](super::hooks::Hooks::devices).
pub fn from_plan(plan: &MachinePlan, handles: &mut Handles) -> Result<Models, RoleError> {
    let mut models: Models = Vec::new();
    for (disk, index) in plan.disks.iter().zip(0u8..) {
        let file = File::from(handles.require(HandleKind::Disk(index))?);
        let block = Block::open(file, disk.format, &disk.id, disk.read_only)
            .map_err(|e| failed("disk", &disk.id, &e))?;
        let block = served(block.with_limits(disk.limits), disk)?;
        models.push(Box::new(block));
    }
    for (net, card) in plan.nets.iter().zip(0u8..) {
        let taps = (0..net.queues).map(|pair| handles.require(HandleKind::Tap { card, pair }));
        let taps = taps.collect::<Result<_, _>>()?;
        let card = Net::new(taps, net.mac, net.announce.clone())
            .map_err(|e| failed("network card", &net.id, &e))?;
        models.push(Box::new(card.with_limits(net.limits)));
    }
    let messages = handles.take(HandleKind::GuestMessages);
    match plan.vsock_cid {
        Some(cid) => {
            let listener = UnixListener::from(handles.require(HandleKind::VsockListener)?);
            let vsock = vsock(cid, listener, messages)
                .map_err(|e| failed("vsock", &cid.to_string(), &e))?;
            models.push(Box::new(vsock));
        }
        None if messages.is_some() => return Err(no_way_to_the_processor()),
        None => {}
    }
    small(plan, handles, &mut models)?;
    Ok(models)
}

/// The disk with who does its requests.
fn served(mut block: Block, disk: &DiskPlan) -> Result<Block, RoleError> {
    let by_ring = match disk.io {
        DiskIo::Auto => disk.format == DiskFormat::Raw,
        DiskIo::IoUring => true,
        DiskIo::Threads => false,
    };
    if !by_ring {
        return Ok(block);
    }
    match block.use_uring(disk.io == DiskIo::IoUring) {
        Ok(ring) => seccomp::allow_ring(ring),
        Err(_) if disk.io == DiskIo::Auto => {}
        Err(error) => {
            let text = format!(
                "this host has no io_uring for it: {error}; set `io = \"auto\"`, or allow it by the sysctl \
                 kernel.io_uring_disabled"
            );
            return Err(failed(
                "disk",
                &disk.id,
                &io::Error::new(error.kind(), text),
            ));
        }
    }
    Ok(block)
}

fn small(plan: &MachinePlan, handles: &mut Handles, models: &mut Models) -> Result<(), RoleError> {
    if let Some(rng) = plan.small.rng {
        models.push(Box::new(
            Rng::new(rng).map_err(|e| failed("device", "rng", &e))?,
        ));
    }
    if let Some(balloon) = plan.small.balloon {
        models.push(Box::new(Balloon::new(balloon, plan.memory_bytes)));
    }
    if let Some(size) = plan.small.console {
        let listener = UnixListener::from(handles.require(HandleKind::ConsoleListener)?);
        let console =
            VirtioConsole::new(listener, size).map_err(|e| failed("device", "console", &e))?;
        models.push(Box::new(console));
    }
    Ok(())
}

fn vsock(cid: u32, listener: UnixListener, messages: Option<OwnedFd>) -> io::Result<Vsock> {
    let vsock = Vsock::new(cid, listener)?;
    match messages {
        None => Ok(vsock),
        Some(channel) => vsock.with_wired(WiredPort {
            port: GUEST_REQUEST_PORT,
            channel,
            request_len: REQUEST_FRAME_LEN,
            reply_max: REPLY_FRAME_MAX,
        }),
    }
}

fn no_way_to_the_processor() -> RoleError {
    RoleError {
        code: "DEVICE".into(),
        text: "GuestMessages was handed in, but the plan has no vsock device for it; \
               give the guest a vsock_cid"
            .into(),
    }
}

fn failed(what: &str, name: &str, error: &io::Error) -> RoleError {
    RoleError {
        code: "DEVICE".into(),
        text: format!("{what} `{name}`: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::plan::Technology;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn plan(vsock_cid: Option<u32>) -> MachinePlan {
        MachinePlan {
            name: "vault".into(),
            vm_id: [1; 16],
            vcpus: 1,
            cpu: Default::default(),
            memory_bytes: 64 << 20,
            firmware: None,
            cmdline: String::new(),
            technology: Technology::None,
            disks: vec![],
            nets: vec![],
            vsock_cid,
            small: Default::default(),
            hotplug: Default::default(),
        }
    }

    fn devices(vsock_cid: Option<u32>, kind: SockType) -> Result<usize, RoleError> {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("vsock")).unwrap();
        let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
        let kinds = vec![HandleKind::VsockListener, HandleKind::GuestMessages];
        let mut handles = Handles::new(kinds, vec![listener.into(), pair.unwrap().0]).unwrap();
        from_plan(&plan(vsock_cid), &mut handles).map(|models| models.len())
    }

    fn with_disk(io: DiskIo) -> Result<Option<String>, RoleError> {
        let mut plan = plan(None);
        plan.disks.push(DiskPlan {
            id: "data".into(),
            format: DiskFormat::Raw,
            io,
            read_only: false,
            limits: Default::default(),
        });
        let image = tempfile::tempfile().unwrap();
        let mut handles = Handles::new(vec![HandleKind::Disk(0)], vec![image.into()]).unwrap();
        let models = from_plan(&plan, &mut handles)?;
        Ok(models.first().and_then(|model| model.service()))
    }

    /// As a kernel does that has none, or whose administrator has switched it off.
    fn without_io_uring(errno: i32) {
        use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
        let filter = SeccompFilter::new(
            [(libc::SYS_io_uring_setup, vec![])].into(),
            SeccompAction::Allow,
            SeccompAction::Errno(errno.unsigned_abs()),
            TargetArch::x86_64,
        );
        let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
        seccompiler::apply_filter(&program).unwrap();
    }

    #[test]
    fn the_kernel_does_a_disks_requests_if_it_may() {
        let by = |io| with_disk(io).unwrap();
        assert_eq!(
            by(DiskIo::Auto).as_deref(),
            Some("io_uring, writes by threads")
        );
        assert_eq!(by(DiskIo::IoUring).as_deref(), Some("io_uring"));
        assert_eq!(by(DiskIo::Threads).as_deref(), Some("threads"));
    }

    #[test]
    fn without_io_uring_the_thread_does_them_or_the_guest_is_refused() {
        for errno in [libc::ENOSYS, libc::EPERM] {
            let tried = std::thread::spawn(move || {
                without_io_uring(errno);
                (
                    with_disk(DiskIo::Auto).unwrap().unwrap(),
                    with_disk(DiskIo::IoUring).unwrap_err(),
                    with_disk(DiskIo::Threads).unwrap().unwrap(),
                )
            });
            let (auto, wanted, threads) = tried.join().unwrap();
            assert!(
                auto.starts_with("threads, for there is no io_uring"),
                "{auto}"
            );
            assert!(wanted.text.contains("disk `data`"), "{wanted}");
            assert!(wanted.text.contains("io = \"auto\""), "{wanted}");
            assert_eq!(threads, "threads");
        }
    }

    #[test]
    fn guest_messages_go_by_vsock_or_not_at_all() {
        assert_eq!(devices(Some(3), SockType::SeqPacket).unwrap(), 1);
        let refused = devices(Some(3), SockType::Stream).unwrap_err();
        assert!(refused.text.contains("packets"), "{refused}");
        let refused = devices(None, SockType::SeqPacket).unwrap_err();
        assert!(refused.text.contains("vsock_cid"), "{refused}");
    }
}
