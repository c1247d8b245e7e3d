//! Which blocks of the disks are written while a mover copies them.

use std::sync::Arc;

use super::{Machine, MachineError};
use crate::devices::virtio::transport::VirtioPci;
use crate::machine::plan::devices::DeviceName;
use crate::vmm::protocol::{DiskService, RoleError};

impl Machine {
    /// Has disk `n` note its writes; a bit for each block that holds anything now.
    pub fn track_disk(&self, disk: u8) -> Result<Vec<u64>, MachineError> {
        Ok(self.disk(disk)?.track_writes()?)
    }

    /// A bit for each block of disk `n` that was written since the last call.
    pub fn take_disk_writes(&self, disk: u8) -> Result<Vec<u64>, MachineError> {
        let written = self.disk(disk)?.take_written();
        written.ok_or_else(|| {
            let text = format!("disk {disk} is not tracked; TrackDisk comes first");
            MachineError::Role(RoleError::new("WRONG_STATE", text))
        })
    }

    /// No disk notes its writes any more.
    pub fn forget_disk_writes(&self) {
        self.all().iter().for_each(|one| one.forget_writes());
    }

    /// Who does the requests of each disk.
    pub fn disk_services(&self) -> Vec<DiskService> {
        let disks = (0..).zip(&self.plan.disks);
        disks
            .filter_map(|(number, plan)| {
                let function = self.disk(number).ok()?;
                Some(DiskService {
                    id: plan.id.clone(),
                    by: function.disk_service().unwrap_or_default(),
                })
            })
            .collect()
    }

    fn disk(&self, disk: u8) -> Result<Arc<VirtioPci>, MachineError> {
        let plan = self.plan.disks.get(usize::from(disk));
        let name = plan.map(|plan| DeviceName::Disk(plan.id.clone()));
        let found = name
            .and_then(|name| self.plan.function_of(&name))
            .and_then(|index| self.function(index));
        found.ok_or_else(|| {
            let text = format!("the guest has no disk {disk}");
            MachineError::Role(RoleError::new("NO_SUCH_DEVICE", text))
        })
    }
}
