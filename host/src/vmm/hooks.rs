//! Where the sandbox, the device models and the confidential technology plug into the VMM.

use std::os::fd::{BorrowedFd, OwnedFd};

use crate::confidential::launch::GuestProtection;
use crate::devices::virtio::VirtioDevice;
use crate::machine::plan::MachinePlan;
use crate::sandbox::report::{ProbeReport, SandboxReport};
use crate::vmm::kvm::Vm;
use crate::vmm::protocol::{HandleKind, RoleError};

/// Kinds of threads in a VMM process; each has a filter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Serves the agent and the mover.
    Control,
    /// Runs one vCPU.
    Vcpu,
    /// Runs the device models.
    Device,
}

/// What the surroundings give to a VMM. Plain function pointers: the same for every guest of a process image.
#[derive(Clone, Copy)]
pub struct Hooks {
    /// Closes what holds for the whole process (Landlock, capabilities); called once, after memory and the
    /// virtual machine exist and before any thread starts or any byte of the guest is parsed.
    pub confine_process: fn() -> Result<(), String>,
    /// Installs the calling thread's filter; the first thing a new thread does, the last the control thread
    /// does before it parses.
    pub confine_thread: fn(ThreadKind) -> Result<(), String>,
    /// Opens the guest memory file anew, for reading only; called before `confine_process`.
    pub reopen_read_only: fn(BorrowedFd<'_>) -> Result<OwnedFd, String>,
    /// Tries from inside what must be refused.
    pub probe: fn() -> Result<ProbeReport, String>,
    /// State of the sandbox of this process.
    pub report: fn() -> Result<SandboxReport, String>,
    /// Makes the device models of a plan, in PCI order, from the descriptors handed in.
    pub devices: fn(&MachinePlan, &mut Handles) -> Result<Models, RoleError>,
    /// Opens the confidential technology of a plan, before the machine has vCPUs.
    pub protection: OpenProtection,
}

/// Device models in PCI order.
pub type Models = Vec<Box<dyn VirtioDevice>>;
/// The confidential technology of a guest, if it has one.
pub type Protection = Option<GuestProtection>;
/// Opens it from the plan, the descriptors, and the machine.
pub type OpenProtection =
    fn(&MachinePlan, &mut Handles, &BareMachine<'_>) -> Result<Protection, RoleError>;

/// A machine that has memory and nothing else yet.
pub struct BareMachine<'a> {
    /// The virtual machine.
    pub vm: &'a Vm,
    /// The guest memory file, writable.
    pub memory: BorrowedFd<'a>,
    /// Guest physical start and length of each run of it, packed in the file in this order.
    pub runs: &'a [(u64, u64)],
    /// The exchange memory's.
    pub exchange: BorrowedFd<'a>,
}

/// Descriptors of [`VmmRequest::Prepare`](crate::vmm::protocol::VmmRequest::Prepare), each taken once.
#[derive(Debug, Default)]
pub struct Handles {
    left: Vec<(HandleKind, OwnedFd)>,
}

impl Handles {
    /// Pairs descriptors with their kinds; fails if the counts differ or a kind comes twice.
    pub fn new(kinds: Vec<HandleKind>, descriptors: Vec<OwnedFd>) -> Result<Self, RoleError> {
        if kinds.len() != descriptors.len() {
            return Err(bad_handles(format!(
                "{} kinds for {} descriptors",
                kinds.len(),
                descriptors.len()
            )));
        }
        let mut left: Vec<(HandleKind, OwnedFd)> = Vec::with_capacity(kinds.len());
        for (kind, descriptor) in kinds.into_iter().zip(descriptors) {
            if left.iter().any(|(seen, _)| *seen == kind) {
                return Err(bad_handles(format!("{kind:?} came twice")));
            }
            left.push((kind, descriptor));
        }
        Ok(Self { left })
    }

    /// Takes a descriptor, if it was handed in and not taken yet.
    pub fn take(&mut self, kind: HandleKind) -> Option<OwnedFd> {
        let index = self.left.iter().position(|(have, _)| *have == kind)?;
        Some(self.left.swap_remove(index).1)
    }

    /// Takes a descriptor that the plan cannot do without.
    pub fn require(&mut self, kind: HandleKind) -> Result<OwnedFd, RoleError> {
        self.take(kind)
            .ok_or_else(|| bad_handles(format!("{kind:?} is missing; the agent must hand it in")))
    }
}

fn bad_handles(text: String) -> RoleError {
    RoleError {
        code: "BAD_HANDLES".into(),
        text: format!("descriptors of Prepare: {text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    #[test]
    fn a_descriptor_is_taken_once() {
        let mut handles = Handles::new(vec![HandleKind::Kvm], vec![descriptor()]).unwrap();
        assert!(handles.take(HandleKind::Kvm).is_some());
        assert_eq!(
            handles.require(HandleKind::Kvm).unwrap_err().code,
            "BAD_HANDLES"
        );
    }

    #[test]
    fn a_kind_twice_or_without_descriptor_is_refused() {
        let twice = vec![HandleKind::Disk(0), HandleKind::Disk(0)];
        assert!(Handles::new(twice, vec![descriptor(), descriptor()]).is_err());
        assert!(Handles::new(vec![HandleKind::Kvm], vec![]).is_err());
    }
}
