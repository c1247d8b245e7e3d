//! What the agent asks: launch, secret, run, pause, attach a mover, status, sandbox.

use std::os::fd::OwnedFd;
use std::time::Instant;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::time::{TimeSpec, TimeValLike as _};
use nix::time::{ClockId, clock_gettime};

use super::super::protocol::{
    LaunchBinding, MachineState, MachineStatus, Measurement, RoleError, VmmReply, VmmRequest,
};
use super::{Control, wrong_state};
use crate::ipc::Channel;
use crate::machine::plan::Attachment;
use crate::vmm::hotplug::HotPlug;

impl Control {
    /// Answers one request.
    pub(super) fn answer_agent(
        &mut self,
        request: VmmRequest,
        handles: Vec<OwnedFd>,
    ) -> Result<VmmReply, RoleError> {
        self.expect_not_handing(&request)?;
        match request {
            VmmRequest::HandOver => self.hand_over(),
            VmmRequest::Yield => self.yield_guest(),
            VmmRequest::KeepOn => self.keep_on(),
            VmmRequest::TakeOver { length } => self.take_over(length),
            VmmRequest::GoOn { run } => self.go_on(run),
            VmmRequest::Prepare { .. } => Err(wrong_state("the machine is prepared already")),
            VmmRequest::Launch { binding } => self.launch(&binding).map(VmmReply::Launched),
            VmmRequest::Incoming { copy } => {
                self.expect(&[MachineState::Prepared], "receiving")?;
                self.moving.copy = copy;
                self.state = MachineState::Incoming;
                Ok(VmmReply::Done)
            }
            VmmRequest::InjectSecret { header, ciphertext } => {
                self.expect(&[MachineState::Measured], "a secret")?;
                self.machine.launch_secret(&header, &ciphertext)?;
                Ok(VmmReply::Done)
            }
            VmmRequest::Run => self.first_run(),
            VmmRequest::Pause => {
                self.expect(&[MachineState::Running], "a pause")?;
                self.machine.pause()?;
                self.state = MachineState::Paused;
                Ok(VmmReply::Done)
            }
            VmmRequest::Resume => self.resume_by_agent(),
            VmmRequest::InjectNmi => {
                self.expect(&[MachineState::Running], "an interrupt")?;
                self.machine.inject_nmi()?;
                Ok(VmmReply::Done)
            }
            VmmRequest::AttachMover => self.attach_mover(handles),
            VmmRequest::PowerButton => {
                self.expect(&[MachineState::Running], "the power button")?;
                self.machine.press_power_button();
                Ok(VmmReply::Done)
            }
            VmmRequest::NewGeneration { id } => {
                self.expect(
                    &[MachineState::Incoming, MachineState::Paused],
                    "a new generation",
                )?;
                self.machine.set_generation(&id)?;
                Ok(VmmReply::Done)
            }
            VmmRequest::Status => Ok(VmmReply::Status(MachineStatus {
                state: self.state,
                device_faults: self.machine.device_faults(),
                stopped: self.machine.stop_notice().reason(),
                disks: self.machine.disk_services(),
            })),
            VmmRequest::Device { device, change } => {
                let status = match change {
                    Some(change) => self.machine.change_device(&device, &change)?,
                    None => self.machine.device_status(&device)?,
                };
                Ok(VmmReply::Device(status))
            }
            VmmRequest::Attach { attachment } => self.plug_in(attachment, handles),
            VmmRequest::AskBack { device } => {
                self.expect(&[MachineState::Running], "a request to the guest")?;
                self.expect_no_mover()?;
                self.machine.ask_back(&device)?;
                Ok(VmmReply::Done)
            }
            VmmRequest::Keep { device } => {
                self.machine.keep(&device)?;
                Ok(VmmReply::Done)
            }
            VmmRequest::SandboxProbe => (self.hooks.probe)()
                .map(VmmReply::Probe)
                .map_err(sandbox_error),
            VmmRequest::SandboxReport => (self.hooks.report)()
                .map(VmmReply::Report)
                .map_err(sandbox_error),
            VmmRequest::Shutdown => {
                if self.state == MachineState::Running {
                    self.machine.pause()?;
                    self.state = MachineState::Paused;
                }
                Ok(VmmReply::Done)
            }
        }
    }

    fn launch(&mut self, binding: &LaunchBinding) -> Result<Option<Measurement>, RoleError> {
        self.expect(&[MachineState::Prepared], "a launch")?;
        let start = Instant::now();
        let mut measurement = self.machine.launch(binding)?;
        if let Some(measurement) = &mut measurement {
            measurement.elapsed_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        }
        self.state = MachineState::Measured;
        Ok(measurement)
    }

    fn first_run(&mut self) -> Result<VmmReply, RoleError> {
        self.expect(&[MachineState::Measured], "the first run")?;
        self.machine.acquire()?;
        let digest = match self.machine.protection() {
            Some(protection) => protection.launch_finish()?,
            None => None,
        };
        let cpu_us = cpu_us();
        self.machine.run()?;
        self.state = MachineState::Running;
        crate::sandbox::forget_program_pages();
        Ok(VmmReply::Started {
            digest: digest.map(|digest| digest.to_string()),
            cpu_us,
        })
    }

    fn resume_by_agent(&mut self) -> Result<VmmReply, RoleError> {
        self.expect(&[MachineState::Paused], "resuming")?;
        if self.mover.is_some() && (self.moving.paused_running || self.moving.released) {
            return Err(wrong_state(
                "a mover has paused the machine; end the migration first",
            ));
        }
        if self.mover.is_none() {
            // What a mover left behind when it went after giving up the locks.
            self.end_move()?;
        }
        self.machine.run()?;
        self.state = MachineState::Running;
        Ok(VmmReply::Done)
    }

    /// While a mover is there the machine stays what it said of itself.
    pub(super) fn expect_no_mover(&self) -> Result<(), RoleError> {
        match self.mover {
            Some(_) => Err(wrong_state("a mover is attached; its end comes first")),
            None => Ok(()),
        }
    }

    fn plug_in(
        &mut self,
        attachment: Attachment,
        handles: Vec<OwnedFd>,
    ) -> Result<VmmReply, RoleError> {
        self.expect(&[MachineState::Running, MachineState::Paused], "a device")?;
        self.expect_no_mover()?;
        let descriptor = only(handles, "Attach takes exactly one, the image or tap")?;
        let hooks = self.hooks;
        self.machine.attach(attachment, descriptor, &hooks)?;
        Ok(VmmReply::Done)
    }

    fn attach_mover(&mut self, handles: Vec<OwnedFd>) -> Result<VmmReply, RoleError> {
        self.expect_no_mover()?;
        if self.machine.slots().is_some_and(HotPlug::is_asking) {
            let text = "the guest is letting go of a device; wait for that, and ask again";
            return Err(RoleError::new("DETACHING", text));
        }
        self.expect(
            &[
                MachineState::Running,
                MachineState::Paused,
                MachineState::Incoming,
            ],
            "a mover",
        )?;
        let channel = only(handles, "AttachMover takes exactly one, the channel")?;
        // A mover that asks and does not read must not hold up the agent: sending to it never waits.
        fcntl(&channel, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| RoleError {
            code: "BAD_HANDLES".into(),
            text: format!("the mover's channel: {e}"),
        })?;
        self.mover = Some(Channel::from_fd(channel));
        Ok(VmmReply::Done)
    }
}

fn only(handles: Vec<OwnedFd>, wanted: &str) -> Result<OwnedFd, RoleError> {
    let mut handles = handles.into_iter();
    match (handles.next(), handles.next()) {
        (Some(one), None) => Ok(one),
        _ => Err(RoleError {
            code: "BAD_HANDLES".into(),
            text: format!("descriptors: {wanted}"),
        }),
    }
}

/// CPU time of all threads of this process since it began; 0 where the kernel does not say.
fn cpu_us() -> u64 {
    let clock = ClockId::CLOCK_PROCESS_CPUTIME_ID;
    let spent = clock_gettime(clock).unwrap_or(TimeSpec::new(0, 0));
    u64::try_from(spent.num_microseconds()).unwrap_or(0)
}

fn sandbox_error(text: String) -> RoleError {
    RoleError {
        code: "SANDBOX".into(),
        text,
    }
}
