//! The virtual machine monitor: one process per guest.
//!
//! Threads: *control* (the agent's and the mover's channel), *devices* (virtio models), one for each vCPU.
//! The guest, its images, and a peer's machine state are not believed anywhere in here.

pub mod boot;
pub mod bus;
pub mod chipset;
pub mod device_thread;
pub mod doorbells;
pub mod hooks;
pub mod hotplug;
pub mod irq;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod models;
pub mod page_sharing;
pub mod pci;
pub mod protocol;
pub mod role;
pub mod state;
pub mod vcpu;
pub mod wiring;
