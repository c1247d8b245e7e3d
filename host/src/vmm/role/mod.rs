//! The `vmm` role: serves the agent's channel and an attached mover's, one request at a time.
//!
//! The agent is trusted to say what to build. The mover is not: it speaks with a peer, so its numbers are
//! checked and its order of calls is enforced.

mod agent;
mod mover;
mod throttle;
mod upgrade;

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use self::throttle::Throttle;
use self::upgrade::Handing;
use super::hooks::{Handles, Hooks};
use super::machine::Machine;
use super::protocol::{
    MachineState, MoverRequest, RoleError, VmmEvent, VmmMessage, VmmReply, VmmRequest,
};
use crate::devices::watchdog::Watchdog;
use crate::ipc::{Channel, IpcError};
use crate::machine::plan::devices::WatchdogAction;

/// Main of the `vmm` role: the first message is `Prepare`; returns when the agent says `Shutdown` or its
/// end closes.
pub fn run(agent: Channel, hooks: Hooks) -> Result<(), VmmError> {
    crate::sandbox::quiet_allocator();
    let first = agent.recv::<VmmRequest>(None)?;
    let VmmRequest::Prepare { plan, handles } = first.body else {
        agent.send(&reply(Err(wrong_state(
            "not prepared: the first request must be Prepare",
        ))))?;
        return Err(VmmError::NotPrepared);
    };
    let built = Handles::new(handles, first.handles).and_then(|mut handles| {
        let machine = Machine::build(*plan, &mut handles, &hooks)?;
        let tsc_khz = machine.tsc_khz()?;
        Ok((machine, tsc_khz))
    });
    match built {
        Ok((machine, tsc_khz)) => {
            agent.send(&reply(Ok(VmmReply::Prepared { tsc_khz })))?;
            Control::new(machine, agent, hooks).serve()
        }
        Err(error) => {
            agent.send(&reply(Err(error.clone())))?;
            Err(VmmError::Build(error))
        }
    }
}

/// Why the role ended.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The channel to the agent.
    #[error(transparent)]
    Channel(#[from] IpcError),
    /// The first message was not `Prepare`.
    #[error("the first request was not Prepare")]
    NotPrepared,
    /// The machine could not be built.
    #[error(transparent)]
    Build(RoleError),
    /// Waiting failed.
    #[error("poll: {0}")]
    Poll(#[from] Errno),
}

/// The control thread's view: the machine, where it is in its life, who is connected.
struct Control {
    machine: Machine,
    agent: Channel,
    hooks: Hooks,
    state: MachineState,
    mover: Option<Channel>,
    moving: Move,
    handing: Option<Handing>,
    stop_seen: bool,
}

/// How far a migration has gone, at either end.
#[derive(Clone, Copy, Debug, Default)]
struct Move {
    /// Dirty tracking is on.
    tracking: bool,
    /// SEND_START has succeeded.
    sending: bool,
    /// The mover paused a running machine.
    paused_running: bool,
    /// Locks are given up: only a decision about who owns the guest may start it again.
    released: bool,
    /// RECEIVE_START has succeeded.
    receiving: bool,
    /// What comes is another guest's.
    copy: bool,
    /// The state is in place.
    restored: bool,
    /// The vCPUs do not get all their time.
    throttle: Option<Throttle>,
}

/// Which channel has something.
#[derive(Default)]
struct Ready {
    agent: bool,
    mover: bool,
    stop: bool,
    watchdog: bool,
    ejected: bool,
}

impl Control {
    fn new(machine: Machine, agent: Channel, hooks: Hooks) -> Self {
        Self {
            machine,
            agent,
            hooks,
            state: MachineState::Prepared,
            mover: None,
            moving: Move::default(),
            handing: None,
            stop_seen: false,
        }
    }

    fn serve(mut self) -> Result<(), VmmError> {
        loop {
            let ready = self.wait()?;
            self.keep_throttle();
            if ready.watchdog {
                self.guest_unfed()?;
            }
            if ready.stop {
                self.guest_stopped()?;
            }
            if ready.ejected
                && let Err(e) = self.machine.let_go()
            {
                tracing::error!("a device that the guest let go of: {e}");
            }
            if ready.mover {
                self.serve_mover();
            }
            if ready.agent && !self.serve_agent()? {
                break;
            }
        }
        let _ = self.machine.pause();
        if let Some(protection) = self.machine.protection() {
            protection.decommission();
        }
        Ok(())
    }

    fn wait(&self) -> Result<Ready, Errno> {
        let mut fds = vec![PollFd::new(self.agent.as_fd(), PollFlags::POLLIN)];
        if !self.stop_seen {
            fds.push(PollFd::new(
                self.machine.stop_notice().event(),
                PollFlags::POLLIN,
            ));
        }
        let watchdog = self.machine.watchdog();
        fds.extend(watchdog.map(|w| PollFd::new(w.alarm(), PollFlags::POLLIN)));
        let slots = self.machine.slots();
        fds.extend(slots.map(|slots| PollFd::new(slots.event(), PollFlags::POLLIN)));
        if let Some(mover) = &self.mover {
            fds.push(PollFd::new(mover.as_fd(), PollFlags::POLLIN));
        }
        loop {
            match poll(&mut fds, self.patience()) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e),
                Ok(_) => break,
            }
        }
        let mut hits = fds.iter().map(|fd| fd.any().unwrap_or(true));
        let agent = hits.next().unwrap_or(false);
        let stop = !self.stop_seen && hits.next().unwrap_or(false);
        let watchdog = watchdog.is_some() && hits.next().unwrap_or(false);
        let ejected = slots.is_some() && hits.next().unwrap_or(false);
        let mover = self.mover.is_some() && hits.next().unwrap_or(false);
        Ok(Ready {
            agent,
            mover,
            stop,
            watchdog,
            ejected,
        })
    }

    /// Serves one request of the agent; false when the process is to end.
    fn serve_agent(&mut self) -> Result<bool, VmmError> {
        let request = match self.agent.recv::<VmmRequest>(None) {
            Ok(request) => request,
            Err(IpcError::Closed) => return Ok(false),
            Err(IpcError::Decode(_) | IpcError::TrailingBytes(_)) => {
                self.agent.send(&reply(Err(unreadable())))?;
                return Ok(true);
            }
            Err(e) => return Err(e.into()),
        };
        let last = matches!(request.body, VmmRequest::Shutdown);
        let answer = self.answer_agent(request.body, request.handles);
        if matches!(answer, Ok(VmmReply::HandedOver)) {
            let lent = [self.machine.memory().file(), self.machine.exchange().file()];
            self.agent.send_with(&reply(answer), &lent)?;
        } else {
            self.agent.send(&reply(answer))?;
        }
        Ok(!last)
    }

    /// Serves one request of the mover. Whatever goes wrong on its channel ends the mover's part only.
    fn serve_mover(&mut self) {
        let Some(channel) = self.mover.take() else {
            return;
        };
        let sent = match channel.recv::<MoverRequest>(None) {
            Ok(request) => self.answer_mover(request.body, &channel),
            Err(e @ (IpcError::Decode(_) | IpcError::TrailingBytes(_))) => {
                tracing::warn!("mover: {e}");
                channel.send(&Err::<super::protocol::MoverReply, _>(unreadable()))
            }
            Err(e) => Err(e),
        };
        match sent {
            Ok(()) => self.mover = Some(channel),
            Err(e) => {
                tracing::info!("mover is gone: {e}");
                self.mover_gone();
            }
        }
    }

    fn guest_unfed(&mut self) -> Result<(), VmmError> {
        if !self.machine.watchdog().is_some_and(Watchdog::take_alarm) {
            return Ok(());
        }
        self.agent.send(&VmmMessage::Event(VmmEvent::Watchdog))?;
        let plan = self.machine.plan().small.watchdog;
        match plan.map(|watchdog| watchdog.action) {
            Some(WatchdogAction::Stop) => self.machine.stop_notice().stop("watchdog"),
            // Not under a mover, who pauses and resumes by its own order.
            Some(WatchdogAction::Pause)
                if self.state == MachineState::Running
                    && self.mover.is_none()
                    && self.handing.is_none() =>
            {
                match self.machine.pause() {
                    Ok(()) => self.state = MachineState::Paused,
                    Err(e) => tracing::error!("its watchdog was not fed, but: {e}"),
                }
            }
            Some(WatchdogAction::Pause | WatchdogAction::Report) | None => {}
        }
        Ok(())
    }

    fn guest_stopped(&mut self) -> Result<(), VmmError> {
        self.stop_seen = true;
        let reason = self.machine.stop_notice().reason().unwrap_or_default();
        if let Err(e) = self.machine.pause() {
            tracing::error!("guest stopped ({reason}), but: {e}");
        }
        self.state = MachineState::Stopped;
        self.agent
            .send(&VmmMessage::Event(VmmEvent::GuestStopped { reason }))?;
        Ok(())
    }

    fn expect(&self, allowed: &[MachineState], what: &str) -> Result<(), RoleError> {
        if allowed.contains(&self.state) {
            return Ok(());
        }
        Err(wrong_state(&format!(
            "{what} is not possible while the machine is {:?}",
            self.state
        )))
    }
}

fn reply(answer: Result<VmmReply, RoleError>) -> VmmMessage {
    VmmMessage::Reply(answer)
}

fn wrong_state(text: &str) -> RoleError {
    RoleError {
        code: "WRONG_STATE".into(),
        text: text.into(),
    }
}

fn not_confidential() -> RoleError {
    RoleError {
        code: "NOT_CONFIDENTIAL".into(),
        text: "the guest has no confidential technology; its plan says none".into(),
    }
}

fn unreadable() -> RoleError {
    RoleError {
        code: "BAD_MESSAGE".into(),
        text: "the request cannot be read".into(),
    }
}
