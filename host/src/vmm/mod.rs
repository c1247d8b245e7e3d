//! The virtual machine monitor: one process per guest.

pub mod confidential_hook;
pub mod protocol;
