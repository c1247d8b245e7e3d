//! The demo's steps, in their order.

pub(crate) mod attack;
pub(crate) mod doctor;
pub(crate) mod evidence;
pub(crate) mod launch;
pub(crate) mod migrate;
pub(crate) mod owner;
pub(crate) mod probe;
pub(crate) mod workload;

/// Name of the demo's guest.
const GUEST_NAME: &str = "vault";
