//! A guest changes its VMM: what the one that has it is asked, and the one that takes it over.
//!
//! Both have the same memory and the same descriptors. The old one stands still from [`VmmRequest::Yield`] on, and only
//! the agent can let it go on; the new one touches nothing of the guest before [`VmmRequest::GoOn`].

use super::super::hotplug::HotPlug;
use super::super::machine::MachineError;
use super::super::protocol::{MAX_STATE, MachineState, RoleError, VmmReply, VmmRequest};
use super::{Control, wrong_state};
use crate::machine::plan::Technology;

/// Another VMM is to take the guest over.
pub(super) struct Handing {
    /// It stands still for that, and ran before.
    ran: bool,
    /// Its state was saved: the other VMM may have had its locks.
    yielded: bool,
}

impl Control {
    /// What the machine is may not change while it is handed over.
    pub(super) fn expect_not_handing(&self, request: &VmmRequest) -> Result<(), RoleError> {
        let harmless = matches!(
            request,
            VmmRequest::Yield
                | VmmRequest::KeepOn
                | VmmRequest::Status
                | VmmRequest::Device { change: None, .. }
                | VmmRequest::SandboxProbe
                | VmmRequest::SandboxReport
                | VmmRequest::Shutdown
        );
        if self.handing.is_none() || harmless {
            return Ok(());
        }
        let text = "the guest is being handed to another VMM; wait for that, and ask again";
        Err(RoleError::new("UPGRADING", text))
    }

    pub(super) fn hand_over(&mut self) -> Result<VmmReply, RoleError> {
        self.expect(RUN_OR_STAND, "handing over")?;
        self.expect_no_mover()?;
        if self.moving.released {
            return Err(wrong_state("a move has given the guest up"));
        }
        if self.machine.plan().technology != Technology::None {
            return Err(RoleError::new(
                "TECHNOLOGY_CANNOT_UPGRADE",
                "a confidential guest's keys are bound to this VMM",
            ));
        }
        if self.machine.slots().is_some_and(HotPlug::is_asking) {
            let text = "the guest is letting go of a device; wait for that, and ask again";
            return Err(RoleError::new("DETACHING", text));
        }
        self.handing = Some(Handing {
            ran: false,
            yielded: false,
        });
        Ok(VmmReply::HandedOver)
    }

    pub(super) fn yield_guest(&mut self) -> Result<VmmReply, RoleError> {
        self.expect(RUN_OR_STAND, "yielding")?;
        let Some(handing) = &mut self.handing else {
            return Err(wrong_state("not handed over; HandOver comes first"));
        };
        if self.state == MachineState::Running {
            self.machine.pause()?;
            self.state = MachineState::Paused;
            handing.ran = true;
        }
        let ran = handing.ran;
        handing.yielded = true;
        if self.machine.stop_notice().reason().is_some() {
            return Err(wrong_state("the guest has switched itself off"));
        }
        self.machine.hand_on()?;
        let state = self.machine.save()?;
        let exchange = self.machine.exchange();
        exchange.put(&state).map_err(MachineError::from)?;
        Ok(VmmReply::Yielded {
            length: state.len() as u64,
            ran,
        })
    }

    pub(super) fn keep_on(&mut self) -> Result<VmmReply, RoleError> {
        let Some(handing) = self.handing.take() else {
            return Err(wrong_state("not handed over"));
        };
        self.machine.keep_devices(handing.yielded)?;
        if handing.ran && self.state == MachineState::Paused {
            self.machine.run()?;
            self.state = MachineState::Running;
        }
        Ok(VmmReply::Done)
    }

    pub(super) fn take_over(&mut self, length: u64) -> Result<VmmReply, RoleError> {
        self.expect(&[MachineState::Prepared], "taking over")?;
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= MAX_STATE)
            .ok_or_else(|| RoleError::new("BAD_STATE", "a machine state that is too long"))?;
        let exchange = self.machine.exchange();
        let state = exchange.take(length).map_err(MachineError::from)?;
        self.state = MachineState::Incoming;
        self.machine.restore(&state, false)?;
        self.machine.take_up()?;
        self.moving.restored = true;
        Ok(VmmReply::Done)
    }

    pub(super) fn go_on(&mut self, run: bool) -> Result<VmmReply, RoleError> {
        self.expect(&[MachineState::Incoming], "going on")?;
        if !self.moving.restored {
            return Err(wrong_state("nothing is taken over; TakeOver comes first"));
        }
        self.machine.acquire()?;
        self.moving.restored = false;
        self.state = MachineState::Paused;
        if run {
            self.machine.run()?;
            self.machine.announce()?;
            self.state = MachineState::Running;
        }
        crate::sandbox::forget_program_pages();
        Ok(VmmReply::Done)
    }
}

const RUN_OR_STAND: &[MachineState] = &[MachineState::Running, MachineState::Paused];
