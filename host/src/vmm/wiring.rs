//! What a real VMM process is wired to: this process's cell, the device models, the confidential technology.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use super::confidential_hook::GuestProtection;
use super::hooks::{Handles, Hooks, ThreadKind};
use super::protocol::{HandleKind, RoleError};
use crate::confidential::{self, GuestMemoryView};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::vsock::Vsock;
use crate::ipc::Channel;
use crate::machine::plan::MachinePlan;
use crate::sandbox::seccomp::ThreadKind as Filter;
use crate::sandbox::this_process;

/// The hooks of a process whose cell [`this_process`] holds.
pub fn hooks() -> Hooks {
    Hooks {
        confine_process: || this_process::confine_process().map_err(|e| e.to_string()),
        confine_thread: |kind| {
            this_process::confine_thread(filter(kind)).map_err(|e| e.to_string())
        },
        reopen_read_only: |file| this_process::reopen_read_only(file).map_err(|e| e.to_string()),
        probe: || this_process::probe().map_err(|e| e.to_string()),
        report: || this_process::report().map_err(|e| e.to_string()),
        devices,
        protection,
    }
}

fn filter(kind: ThreadKind) -> Filter {
    match kind {
        ThreadKind::Control => Filter::VmmControl,
        ThreadKind::Vcpu => Filter::VmmVcpu,
        ThreadKind::Device => Filter::VmmDevice,
    }
}

/// Disks, then network cards, then the vsock device.
fn devices(
    plan: &MachinePlan,
    handles: &mut Handles,
) -> Result<Vec<Box<dyn VirtioDevice>>, RoleError> {
    let mut models: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (number, disk) in (0u8..).zip(&plan.disks) {
        let file = File::from(handles.require(HandleKind::Disk(number))?);
        let model = Block::new(file, &disk.id, disk.read_only);
        models.push(Box::new(
            model.map_err(|e| device_error("disk", &disk.id, &e))?,
        ));
    }
    for (number, net) in (0u8..).zip(&plan.nets) {
        let tap = handles.require(HandleKind::Tap(number))?;
        let model = Net::new(tap, net.mac, net.announce.clone());
        models.push(Box::new(
            model.map_err(|e| device_error("network card", &net.id, &e))?,
        ));
    }
    if let Some(cid) = plan.vsock_cid {
        let listener = UnixListener::from(handles.require(HandleKind::VsockListener)?);
        let model = Vsock::new(cid, listener);
        models.push(Box::new(
            model.map_err(|e| device_error("device", "vsock", &e))?,
        ));
    }
    Ok(models)
}

fn protection(
    plan: &MachinePlan,
    handles: &mut Handles,
    memory: BorrowedFd<'_>,
    exchange: BorrowedFd<'_>,
) -> Result<Option<Box<dyn GuestProtection>>, RoleError> {
    let processor: Option<OwnedFd> = handles.take(HandleKind::Processor);
    // All memory of a plan lies below the PCI hole, in one run.
    let view = GuestMemoryView {
        file: memory,
        runs: &[(0, plan.memory_bytes)],
    };
    confidential::open(plan, view, exchange, processor.map(Channel::from_fd))
}

fn device_error(what: &str, name: &str, error: &std::io::Error) -> RoleError {
    RoleError::new("DEVICE", format!("{what} {name}: {error}"))
}
