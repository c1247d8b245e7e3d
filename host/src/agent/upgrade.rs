//! Local live upgrade: a running guest goes from its VMM to a newly started one of the program that is installed now.
//!
//! No page is copied: the new VMM gets the very same memory, and the descriptors that the old one was given. The old one
//! stands still from its last word on, and only this agent can let it go on; it does so exactly if the new one was never
//! told to.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use casemate_policy::ledger::{Entry, Outcome};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;
use crate::agent::guest::{Guest, open_kvm};
use crate::agent::program::Program;
use crate::agent::vmm_process::{VmmProcess, lock};
use crate::agent::{Agent, plug};
use crate::formats::Formats;
use crate::machine::plan::Technology;
use crate::vmm::protocol::{HandleKind, MachineState, VmmReply, VmmRequest};

/// A guest that has another VMM now.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct UpgradeInfo {
    /// Its name.
    pub name: String,
    /// Version of the program that had it.
    pub from_version: String,
    /// Version of the program that has it.
    pub version: String,
    /// SHA-256 of that program, hex.
    pub program_sha256: String,
    /// Process id of the new VMM as this host sees it.
    pub pid: u32,
    /// For how long the guest stood still, microseconds: from the order to stop to the word that it runs.
    pub pause_us: u64,
    /// State that went along, in bytes.
    pub state_bytes: u64,
}

impl Agent {
    /// `casemate vm upgrade`.
    pub(super) fn upgrade(
        &self,
        caller: &Caller,
        name: &str,
        progress: &mut dyn FnMut(serde_json::Value),
    ) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        may_upgrade(&guest)?;
        self.must_own(name)?;
        let program = Program::installed(self.config.program.as_deref())?;
        check_formats(name, &program.formats)?;
        // Held to the end: nobody moves, stops, attaches or detaches meanwhile.
        let mover = lock(&guest.mover);
        if mover.is_some() {
            return Err(plug::moving(name));
        }
        if guest.detaching.load(Ordering::SeqCst) {
            return Err(plug::detaching(name));
        }
        let info = self.change_vmm(&guest, &program, progress)?;
        drop(mover);
        let entry = Entry::new(caller.name(), "upgrade", name, Outcome::Done)
            .with("from_version", info.from_version.as_str())
            .with("version", info.version.as_str())
            .with("program_sha256", info.program_sha256.as_str())
            .with("pause_us", info.pause_us);
        self.evidence.record(entry)?;
        self.record_cell(caller, &guest)?;
        Ok(Answer::Upgraded(info))
    }

    /// Either the new VMM has the guest afterwards, or the old one has it as before; or, if the new one fails at the very
    /// word by which it would run it, nobody.
    fn change_vmm(
        &self,
        guest: &Guest,
        program: &Program,
        progress: &mut dyn FnMut(serde_json::Value),
    ) -> Result<UpgradeInfo, Failure> {
        let name = &guest.plan.name;
        let from_version = guest.vmm.version();
        let lent = hand_over(guest)?;
        progress(json!({ "phase": "prepare" }));
        let switched = self
            .prepare(guest, program, lent)
            .and_then(|next| switch(guest, next, progress));
        match switched {
            Ok((pause, state_bytes)) => Ok(UpgradeInfo {
                name: name.clone(),
                from_version,
                version: program.formats.version.clone(),
                program_sha256: program.sha256.clone(),
                pid: guest.vmm.pid(),
                pause_us: u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
                state_bytes,
            }),
            Err(failure) if failure.code == LOST => Err(failure),
            // The new VMM has ended; it never ran the guest.
            Err(Failure { code, error }) => match guest.vmm.call(&VmmRequest::KeepOn, &[]) {
                Ok(_) => Err(Failure {
                    code,
                    error: format!(
                        "{name} was not upgraded, and goes on in its VMM as before: {error}"
                    ),
                }),
                Err(kept) => Err(Failure {
                    code,
                    error: format!(
                        "{name} was not upgraded: {error}; and its VMM does not go on: {kept}"
                    ),
                }),
            },
        }
    }

    /// A VMM of the installed program that has all but the state.
    fn prepare(
        &self,
        guest: &Guest,
        program: &Program,
        lent: Vec<(HandleKind, OwnedFd)>,
    ) -> Result<VmmProcess, Failure> {
        let plan = guest.plan_now();
        let next = self.spawn_vmm_of(&plan, guest.vmm.share().clone(), Some(program))?;
        let kept = guest.vmm.held().map_err(|e| {
            let text = format!("a descriptor of {} cannot be doubled: {e}", plan.name);
            Failure::new("RESOURCE", text)
        })?;
        let alone: Vec<_> = lent
            .into_iter()
            .chain([(HandleKind::Kvm, open_kvm()?)])
            .collect();
        let all = || kept.iter().chain(&alone);
        let descriptors: Vec<BorrowedFd<'_>> = all().map(|(_, fd)| fd.as_fd()).collect();
        let request = VmmRequest::Prepare {
            handles: all().map(|(kind, _)| *kind).collect(),
            plan: Box::new(plan),
        };
        next.call(&request, &descriptors)?;
        next.hold_all(kept);
        Ok(next)
    }
}

/// How long the guest stood still, and the length of its state. If this fails, the new VMM has ended.
fn switch(
    guest: &Guest,
    next: VmmProcess,
    progress: &mut dyn FnMut(serde_json::Value),
) -> Result<(Duration, u64), Failure> {
    progress(json!({ "phase": "switch" }));
    let begun = Instant::now();
    let VmmReply::Yielded { length, ran } = guest.vmm.call(&VmmRequest::Yield, &[])? else {
        return Err(Failure::new("VMM_GONE", "the VMM answered something else"));
    };
    next.call_within(&VmmRequest::TakeOver { length }, &[], SWITCH)?;
    // From here on whoever ends the guest ends the new VMM.
    let old = guest.vmm.replace(next)?;
    let gone_on = guest
        .vmm
        .call_within(&VmmRequest::GoOn { run: ran }, &[], SWITCH);
    let pause = begun.elapsed();
    if let Err(failure) = gone_on {
        // It may have run: what the old one knows is out of date.
        guest.vmm.kill();
        drop(old);
        let text = format!(
            "the new VMM of {} failed at its first step, when the old one could not go on any more: {failure}; stop the \
             guest, and start it again",
            guest.plan.name
        );
        return Err(Failure::new(LOST, text));
    }
    // Killed, and waited for.
    drop(old);
    progress(json!({ "phase": "switched", "pause_us": pause.as_micros() as u64 }));
    Ok((pause, length))
}

fn hand_over(guest: &Guest) -> Result<Vec<(HandleKind, OwnedFd)>, Failure> {
    let (reply, lent) = guest.vmm.call_for_handles(&VmmRequest::HandOver)?;
    match (reply, <[OwnedFd; 2]>::try_from(lent)) {
        (VmmReply::HandedOver, Ok([memory, exchange])) => Ok(vec![
            (HandleKind::Memory, memory),
            (HandleKind::Exchange, exchange),
        ]),
        _ => Err(Failure::new("VMM_GONE", "the VMM answered something else")),
    }
}

fn may_upgrade(guest: &Guest) -> Result<(), Failure> {
    let name = &guest.plan.name;
    if guest.plan.technology != Technology::None {
        let text = format!(
            "{name} is a {} guest: the secure processor has bound its keys and registers to the VMM that launched it, and \
             gives them to no other; launch it anew from the installed program, or move a SEV guest to another host",
            guest.plan.technology.name()
        );
        return Err(Failure::new("TECHNOLOGY_CANNOT_UPGRADE", text));
    }
    match guest.info()?.state {
        MachineState::Running | MachineState::Paused => Ok(()),
        state => {
            let state = format!("{state:?}").to_lowercase();
            let text =
                format!("{name} is {state}; only a guest that runs or is paused is upgraded");
            Err(Failure::new("WRONG_STATE", text))
        }
    }
}

/// Before anything of the guest is touched.
fn check_formats(name: &str, installed: &Formats) -> Result<(), Failure> {
    let here = Formats::here();
    let refuse = |what: &str, found: u16, want: u16| {
        let text = format!(
            "{name} cannot be upgraded to the installed casemate {}: {what} {found}, this host's agent and guests have {want}; \
             stop the guests, start the agent anew, and launch them again",
            installed.version
        );
        Err(Failure::new("UPGRADE_VERSION", text))
    };
    if installed.vmm_protocol != here.vmm_protocol {
        return refuse(
            "it speaks VMM protocol",
            installed.vmm_protocol,
            here.vmm_protocol,
        );
    }
    if installed.machine_state != here.machine_state {
        return refuse(
            "it reads machine state",
            installed.machine_state,
            here.machine_state,
        );
    }
    Ok(())
}

/// Code of a guest that nobody has any more.
const LOST: &str = "UPGRADE_LOST";
/// How long the new VMM may take for each step while the guest stands still.
const SWITCH: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_reads_or_says_something_else_is_refused_by_its_numbers() {
        let here = Formats::here();
        check_formats("vm", &here).unwrap();
        let other = Formats {
            version: "9.9.9".into(),
            ..here.clone()
        };
        check_formats("vm", &other).unwrap();
        for other in [
            Formats {
                vmm_protocol: here.vmm_protocol + 1,
                ..other.clone()
            },
            Formats {
                machine_state: here.machine_state + 1,
                ..other.clone()
            },
            Formats {
                machine_state: here.machine_state - 1,
                ..other.clone()
            },
        ] {
            let failure = check_formats("vm", &other).unwrap_err();
            assert_eq!(failure.code, "UPGRADE_VERSION");
            assert!(failure.error.contains("9.9.9"), "{failure}");
        }
    }
}
