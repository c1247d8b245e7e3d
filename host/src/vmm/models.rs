//! The device models of a plan, in PCI order: disks, network cards, vsock.

use std::fs::File;
use std::os::unix::net::UnixListener;

use super::hooks::{Handles, Models};
use super::protocol::{HandleKind, RoleError};
use crate::devices::virtio::block::Block;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::vsock::Vsock;
use crate::machine::plan::MachinePlan;

/// Makes every device model of `plan` from its descriptor; for [`Hooks::devices`](super::hooks::Hooks::devices).
pub fn from_plan(plan: &MachinePlan, handles: &mut Handles) -> Result<Models, RoleError> {
    let mut models: Models = Vec::new();
    for (disk, index) in plan.disks.iter().zip(0u8..) {
        let file = File::from(handles.require(HandleKind::Disk(index))?);
        let block =
            Block::new(file, &disk.id, disk.read_only).map_err(|e| failed("disk", &disk.id, &e))?;
        models.push(Box::new(block));
    }
    for (net, index) in plan.nets.iter().zip(0u8..) {
        let tap = handles.require(HandleKind::Tap(index))?;
        let card = Net::new(tap, net.mac, net.announce.clone())
            .map_err(|e| failed("network card", &net.id, &e))?;
        models.push(Box::new(card));
    }
    if let Some(cid) = plan.vsock_cid {
        let listener = UnixListener::from(handles.require(HandleKind::VsockListener)?);
        let vsock = Vsock::new(cid, listener).map_err(|e| failed("vsock", &cid.to_string(), &e))?;
        models.push(Box::new(vsock));
    }
    Ok(models)
}

fn failed(what: &str, name: &str, error: &std::io::Error) -> RoleError {
    RoleError {
        code: "DEVICE".into(),
        text: format!("{what} `{name}`: {error}"),
    }
}
