//! Device models. Everything a guest can write is untrusted.

pub mod virtio;
