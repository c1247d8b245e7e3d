//! What a real VMM process is wired to: this process's cell, the device models, the confidential technology.

use super::hooks::{Hooks, ThreadKind};
use super::models;
use crate::confidential;
use crate::sandbox::seccomp::ThreadKind as Filter;
use crate::sandbox::this_process;

/// The hooks of a process whose cell [`this_process`] holds.
pub fn hooks() -> Hooks {
    Hooks {
        confine_process: || this_process::confine_process().map_err(|e| e.to_string()),
        confine_thread: |kind| {
            this_process::confine_thread(filter(kind)).map_err(|e| e.to_string())
        },
        reopen_read_only: |file| this_process::reopen_read_only(file).map_err(|e| e.to_string()),
        probe: || this_process::probe().map_err(|e| e.to_string()),
        report: || this_process::report().map_err(|e| e.to_string()),
        devices: models::from_plan,
        protection: confidential::protection,
    }
}

fn filter(kind: ThreadKind) -> Filter {
    match kind {
        ThreadKind::Control => Filter::VmmControl,
        ThreadKind::Vcpu => Filter::VmmVcpu,
        ThreadKind::Device => Filter::VmmDevice,
    }
}
