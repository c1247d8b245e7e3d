//! The migration role: a guest's memory and a peer's socket in, the protected stream between them.

pub mod agent_link;
pub mod destination;
pub mod evidence;
pub mod protocol;
pub mod source;
pub mod vmm_link;
