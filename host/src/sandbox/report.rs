//! What a role says of its own sandbox, and what a probe from inside found.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// State of one process's sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SandboxReport {
    /// Role: `vmm`, `mover`, `psp`.
    pub role: String,
    /// User and group id.
    pub uid: u32,
    /// The same for the group.
    pub gid: u32,
    /// Landlock ABI in force; 0 means none.
    pub landlock_abi: u32,
    /// What Landlock handles and allows, one line each.
    pub landlock: Vec<String>,
    /// SHA-256 of those lines, each with a line end: the same for the same rules.
    pub landlock_sha256: String,
    /// Capabilities left in any set; empty when dropped.
    pub capabilities: Vec<String>,
    /// `no_new_privs` is set.
    pub no_new_privs: bool,
    /// Whether the process can be dumped or traced by its own uid.
    pub dumpable: bool,
    /// Namespaces of its own: `mnt`, `pid`, `net`, `ipc`, `uts`, `cgroup`.
    pub namespaces: Vec<String>,
    /// Open descriptors.
    pub descriptors: u32,
    /// Threads and their filters.
    pub threads: Vec<ThreadReport>,
    /// cgroup and root: what is limited, and what this host could not give.
    pub notes: Vec<String>,
}

/// One thread's filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ThreadReport {
    /// Thread name.
    pub name: String,
    /// Filter: `vmm-control`, `vmm-vcpu`, `vmm-device`, `mover`, `psp`.
    pub filter: String,
    /// SHA-256 of the BPF program.
    pub filter_sha256: String,
    /// `Seccomp:` of /proc: 2 means filter mode.
    pub mode: u32,
}

/// What a probe from inside found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProbeReport {
    /// Role: `vmm`, `mover`, `psp`.
    pub role: String,
    /// Everything tried.
    pub attempts: Vec<ProbeAttempt>,
}

/// One thing tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProbeAttempt {
    /// What was tried, for example `open /etc/passwd`.
    pub what: String,
    /// Whether it was refused.
    pub refused: bool,
    /// By what: `seccomp`, `landlock`, `namespace`, with the errno's name.
    pub by: String,
}
