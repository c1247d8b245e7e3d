//! The host of Casemate: the VMM, its sandbox, the agent and the command line.
//!
//! One binary, few roles (`agent`, `vmm`, `mover`, `psp`), each with the least it can live on. The
//! library exists for the binary and for the tests; it is not a stable interface.

pub mod agent;
pub mod bench;
pub mod broker;
pub mod cli;
pub mod confidential;
pub mod devices;
pub mod doctor;
pub mod formats;
mod image_file;
pub mod ipc;
pub mod machine;
pub mod mover;
pub mod role;
pub mod sandbox;
pub mod userfault;
pub mod vmm;
