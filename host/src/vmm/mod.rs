//! The virtual machine monitor: one process per guest.

pub mod protocol;
