//! Device models. Everything a guest can write is untrusted.

pub mod events;
pub mod serial;
pub mod virtio;
pub mod watchdog;
