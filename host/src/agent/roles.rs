//! The processes that this agent starts: each in a cell of its own, under a user of its own.

use std::sync::atomic::Ordering;

use crate::agent::api::Failure;
use crate::agent::guest_events::GuestEvents;
use crate::agent::mover_process::MoverProcess;
use crate::agent::program::Program;
use crate::agent::vmm_process::{VmmProcess, lock};
use crate::agent::{Agent, sev};
use crate::formats::Formats;
use crate::ipc::Channel;
use crate::machine::plan::MachinePlan;
use crate::sandbox::Role;
use crate::sandbox::io_limit::IoShare;
use crate::sandbox::jail::{CpuShare, JailSpec, RoleProcess, Spawn};

impl Agent {
    /// The VMM of a guest that is about to be made.
    pub(super) fn spawn_vmm(
        &self,
        plan: &MachinePlan,
        share: VmmShare,
    ) -> Result<VmmProcess, Failure> {
        self.spawn_vmm_of(plan, share, None)
    }

    /// The same, of the installed program; without one, of this agent's own.
    pub(super) fn spawn_vmm_of(
        &self,
        plan: &MachinePlan,
        share: VmmShare,
        program: Option<&Program>,
    ) -> Result<VmmProcess, Failure> {
        let bounds = Bounds {
            cpu: share.cpu.clone(),
            io: share.io.clone(),
            memory: Some(plan.mapped_bytes().saturating_add(share.held)),
            vcpus: plan.vcpus.into(),
            pairs: plan.nets.iter().map(|net| u32::from(net.queues)).sum(),
            locked: sev::locked_memory(plan) + plan.rings() * RING_MEMORY,
        };
        let (process, channel) = self.spawn_of(Role::Vmm, bounds, program)?;
        let mut events = GuestEvents::of(plan, &self.evidence, &self.metrics);
        let on_event = move |event| events.hear(event);
        let version = program.map_or_else(Formats::here, |program| program.formats.clone());
        VmmProcess::new(process, channel, (version.version, share), on_event)
            .map_err(|e| Failure::new("INTERNAL", e.to_string()))
    }

    /// A mover that may map so much guest memory.
    pub(super) fn spawn_mover(&self, memory_bytes: u64) -> Result<MoverProcess, Failure> {
        let bounds = Bounds {
            memory: Some(memory_bytes),
            ..Bounds::default()
        };
        let (process, channel) = self.spawn(Role::Mover, bounds)?;
        Ok(MoverProcess::new(process, channel))
    }

    /// Starts a role in a cell of its own, under a user of its own.
    pub(super) fn spawn(
        &self,
        role: Role,
        bounds: Bounds,
    ) -> Result<(RoleProcess, Channel), Failure> {
        self.spawn_of(role, bounds, None)
    }

    fn spawn_of(
        &self,
        role: Role,
        bounds: Bounds,
        program: Option<&Program>,
    ) -> Result<(RoleProcess, Channel), Failure> {
        let number = self.next_role.fetch_add(1, Ordering::Relaxed) % MAX_ROLES;
        let name = group_name(&self.config.name, role.name(), number);
        // Held until the group is there, so that the end of the agent finds it.
        let mut groups = lock(&self.groups);
        let Some(started) = groups.as_mut() else {
            return Err(Failure::new(
                "AGENT_ENDING",
                "this agent is ending; start it again",
            ));
        };
        started.insert(name.clone());
        let mut spec = JailSpec::new(name, self.config.uid_base + number);
        spec.memory_max = bounds.memory.map(|bytes| bytes + ROLE_OVERHEAD);
        spec.memlock_max = bounds.locked;
        spec.pids_max += bounds.vcpus;
        spec.nofile += bounds.vcpus + PAIR * bounds.pairs;
        spec.cpu = bounds.cpu;
        spec.io = bounds.io;
        spec.landlock_min = self.policy().sandbox.landlock_min_abi.get();
        let (ours, theirs) =
            Channel::pair().map_err(|e| Failure::new("INTERNAL", e.to_string()))?;
        let mut spawn = Spawn::new(role, spec);
        if let Some(program) = program {
            spawn = spawn.program(program.path());
        }
        let process = spawn
            .start(theirs)
            .map_err(|e| Failure::new("SANDBOX", e.to_string()))?;
        Ok((process, ours))
    }
}

/// What the VMM of a guest gets beside what its plan says.
#[derive(Clone, Default)]
pub struct VmmShare {
    /// What it keeps beside the guest's memory, in bytes.
    pub(super) held: u64,
    /// Processors.
    pub(super) cpu: CpuShare,
    /// Block devices.
    pub(super) io: Option<IoShare>,
}

/// What a role needs of memory and threads, besides what every role does.
#[derive(Clone, Default)]
pub(super) struct Bounds {
    /// Processors.
    cpu: CpuShare,
    /// Block devices.
    io: Option<IoShare>,
    /// Guest memory in bytes.
    memory: Option<u64>,
    /// vCPUs.
    vcpus: u32,
    /// Pairs of queues of its network cards.
    pairs: u32,
    /// Bytes that it may lock.
    locked: u64,
}

/// Descriptors of a pair of queues: the tap's, two events and two interrupts, and some to spare.
const PAIR: u32 = 8;

/// Name of the cgroup of a role.
fn group_name(host: &str, role: &str, number: u32) -> String {
    format!("casemate-{host}-{role}-{number}")
}

/// Whether a cgroup is one of [`group_name`]'s for this host; those of a host `a-b` are not host `a`'s.
pub(super) fn is_group_of(host: &str, group: &str) -> bool {
    let rest = group
        .strip_prefix("casemate-")
        .and_then(|r| r.strip_prefix(host))
        .and_then(|r| r.strip_prefix('-'));
    let Some((role, number)) = rest.and_then(|r| r.split_once('-')) else {
        return false;
    };
    number
        .parse()
        .is_ok_and(|number| group_name(host, role, number) == group)
}

/// Users (and so roles) this agent cycles through.
const MAX_ROLES: u32 = 4096;
/// What the kernel counts as locked of a disk's io_uring, and then some.
const RING_MEMORY: u64 = 64 << 10;
/// Memory of a role beyond the guest's, in bytes.
pub(super) const ROLE_OVERHEAD: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_belongs_to_the_host_that_made_it() {
        let name = group_name("site-a", "vmm", 7);
        assert!(is_group_of("site-a", &name));
        for other in ["site", "site-a-vmm", "site-b", ""] {
            assert!(!is_group_of(other, &name), "{other}");
        }
        assert!(!is_group_of("site-a", "casemate-site-a-vmm-x"));
    }
}
