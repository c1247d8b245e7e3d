//! Why a machine fails, and the stable codes of that.

use super::super::boot::BootError;
use super::super::device_thread::DeviceThreadError;
use super::super::hotplug::SlotError;
use super::super::kvm::KvmError;
use super::super::memory::MemoryError;
use super::super::protocol::RoleError;
use super::super::vcpu::VcpuError;
use super::super::vcpu::model::CpuError;
use super::super::vcpu::state::StateError;
use crate::devices::serial::ConsoleStateError;
use crate::devices::virtio::transport::TransportStateError;
use crate::machine::plan::devices::DeviceName;
use crate::machine::saved::FormatError;
use crate::userfault::FaultError;

/// Why a machine cannot be built, loaded, run, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A value of the plan is out of bounds.
    #[error("plan: {0}")]
    Plan(String),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU's thread.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A vCPU's state.
    #[error(transparent)]
    VcpuState(#[from] StateError),
    /// The processor that the guest was given.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// Faults of guest memory.
    #[error(transparent)]
    Faults(#[from] FaultError),
    /// The device thread.
    #[error(transparent)]
    Devices(#[from] DeviceThreadError),
    /// A device's state.
    #[error(transparent)]
    DeviceState(#[from] TransportStateError),
    /// The console's state.
    #[error(transparent)]
    Console(#[from] ConsoleStateError),
    /// Kernel, initramfs or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The machine state's format.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The state has other numbers of vCPUs or devices than the machine.
    #[error("machine state is of another machine: numbers of vCPUs or devices differ")]
    Shape,
    /// There is nothing to start in, or not any more.
    #[error("no {0} image was handed in, or it was used already")]
    NoImage(&'static str),
    /// A confidential guest has no VM generation id.
    #[error("a confidential guest has no VM generation id: it could not believe its host's")]
    NoGeneration,
    /// A lock cannot be taken or given up.
    #[error("device {0}: {1}")]
    Lock(usize, #[source] std::io::Error),
    /// There is no such device.
    #[error("the guest has no device {0:?}; its description names those it has")]
    NoDevice(DeviceName),
    /// No slot is free.
    #[error(
        "none of the guest's {0} slots is free; detach something, or give it more (`[hotplug] slots`, up to 8, read at its \
         next start)"
    )]
    NoSlot(u8),
    /// There is a device of that name.
    #[error("the guest has a device {0:?} already; choose another name")]
    DeviceThere(DeviceName),
    /// It was there from the start.
    #[error("{0:?} was there from the start and stays; only what was attached can be detached")]
    Fixed(DeviceName),
    /// A slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A device refused a change.
    #[error("{0}")]
    Change(String),
    /// The sandbox does not close.
    #[error("sandbox: {0}")]
    Confine(String),
    /// The kernel refused.
    #[error("{0}")]
    System(#[from] std::io::Error),
    /// A part said why itself.
    #[error(transparent)]
    Role(#[from] RoleError),
}

impl MachineError {
    /// The stable code.
    pub fn code(&self) -> String {
        match self {
            Self::Plan(_) => "BAD_PLAN",
            Self::Faults(_) => "USERFAULT",
            Self::Cpu(_) => "CPU_UNSUPPORTED",
            Self::Memory(_) => "MEMORY",
            Self::Kvm(KvmError::Sev(error)) => error.code(),
            Self::Kvm(_) => "KVM",
            Self::Vcpu(_) | Self::Devices(_) => "THREAD",
            Self::Format(error) if error.is_version() => "STATE_VERSION",
            Self::VcpuState(_)
            | Self::DeviceState(_)
            | Self::Console(_)
            | Self::Format(_)
            | Self::Shape => "BAD_STATE",
            Self::Boot(_) | Self::NoImage(_) => "BAD_IMAGE",
            Self::NoGeneration => "NO_GENERATION",
            Self::Lock(..) => "DEVICE_LOCK",
            Self::NoDevice(_) => "NO_SUCH_DEVICE",
            Self::NoSlot(_) => "NO_FREE_SLOT",
            Self::DeviceThere(_) => "DEVICE_EXISTS",
            Self::Fixed(_) => "DEVICE_FIXED",
            Self::Slot(SlotError::Taken(_)) => "NO_FREE_SLOT",
            Self::Slot(SlotError::Empty(_)) => "NO_SUCH_DEVICE",
            Self::Change(_) => "DEVICE_CHANGE",
            Self::Confine(_) => "SANDBOX",
            Self::System(_) => "SYSTEM",
            Self::Role(error) => return error.code.clone(),
        }
        .into()
    }
}

impl From<MachineError> for RoleError {
    fn from(error: MachineError) -> Self {
        let code = error.code();
        if let MachineError::Role(inner) = error {
            return inner;
        }
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        Self { code, text }
    }
}
