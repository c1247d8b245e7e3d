//! The orderly end of a guest: its power button, some time, and if need be the switch.

use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_policy::ledger::{Entry, Outcome};

use crate::agent::Agent;
use crate::agent::api::{Answer, Failure};
use crate::agent::authority::Caller;
use crate::agent::guest::Guest;
use crate::agent::vmm_process::lock;
use crate::vmm::protocol::{MachineState, VmmRequest};

impl Agent {
    /// `casemate vm stop`. A guest that has switched itself off, or whose VMM is lost, is ended at once.
    pub(super) fn shut_down(
        &self,
        caller: &Caller,
        name: &str,
        timeout_s: Option<u32>,
        force: bool,
    ) -> Result<Answer, Failure> {
        let guest = self.settled_guest(name)?;
        match guest.info()?.state {
            MachineState::Running => {
                self.must_own(name)?;
                guest.vmm.call(&VmmRequest::PowerButton, &[])?;
                let entry = Entry::new(caller.name(), "power-button", name, Outcome::Done);
                self.evidence
                    .record(entry.emulated(guest.plan.technology.emulated()))?;
                let given = timeout_s.unwrap_or(DEFAULT_TIMEOUT_S).min(MAX_TIMEOUT_S);
                let gone = wait_for_end(&guest, Duration::from_secs(given.into()))?;
                if !gone && !force {
                    return Err(Failure::new(
                        "STILL_RUNNING",
                        format!(
                            "{name} has not switched itself off within {given} s, and runs on; does it hear its power \
                             button (systemd-logind, acpid)? Wait, or end it with `casemate vm stop {name} --force`"
                        ),
                    ));
                }
            }
            MachineState::Stopped | MachineState::Lost => {}
            state if !force => {
                let state = format!("{state:?}").to_lowercase();
                return Err(Failure::new(
                    "WRONG_STATE",
                    format!(
                        "{name} is {state} and hears no power button; resume it first, or end it with --force"
                    ),
                ));
            }
            _ => {}
        }
        let still_there = lock(&self.guests)
            .get(name)
            .is_some_and(|now| Arc::ptr_eq(now, &guest));
        if still_there {
            return self.stop(caller, name);
        }
        // Somebody else ended it in the meantime, and that is on record.
        Ok(Answer::Done)
    }
}

/// Whether the guest has switched itself off, or is lost, by then.
fn wait_for_end(guest: &Guest, timeout: Duration) -> Result<bool, Failure> {
    let limit = Instant::now() + timeout;
    loop {
        let state = guest.info()?.state;
        if matches!(state, MachineState::Stopped | MachineState::Lost) {
            return Ok(true);
        }
        if Instant::now() >= limit {
            return Ok(false);
        }
        std::thread::sleep(BETWEEN);
    }
}

const DEFAULT_TIMEOUT_S: u32 = 60;
const MAX_TIMEOUT_S: u32 = 24 * 60 * 60;
const BETWEEN: Duration = Duration::from_millis(100);
