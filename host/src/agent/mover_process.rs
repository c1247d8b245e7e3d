//! One mover process as the agent sees it: what it asks for is decided here, what it reports is passed on.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::agent::api::Failure;
use crate::agent::vmm_process::lock;
use crate::ipc::Channel;
use crate::mover::protocol::{
    AgentAnswer, MoveOutcome, MoverCommand, MoverEvent, MoverMessage, MoverRequestToAgent,
};
use crate::sandbox::jail::RoleProcess;
use crate::sandbox::report::{ProbeReport, SandboxReport};
use crate::vmm::protocol::RoleError;

/// A running mover. Dropping it kills the process.
pub struct MoverProcess {
    channel: Channel,
    process: Mutex<RoleProcess>,
    reports: Exchange<SandboxReport>,
    probes: Exchange<ProbeReport>,
}

/// Decides what a mover asks for; the descriptors go beside the answer.
pub type Decide<'a> =
    dyn FnMut(MoverRequestToAgent) -> Result<(AgentAnswer, Vec<OwnedFd>), RoleError> + 'a;

impl MoverProcess {
    /// Takes over a process just spawned.
    pub fn new(process: RoleProcess, channel: Channel) -> Self {
        Self {
            channel,
            process: Mutex::new(process),
            reports: Exchange::new(),
            probes: Exchange::new(),
        }
    }

    /// Starts the work.
    pub fn start(&self, command: &MoverCommand, handles: &[BorrowedFd<'_>]) -> Result<(), Failure> {
        self.channel
            .send_with(command, handles)
            .map_err(|e| gone(&e))
    }

    /// Serves the mover until its work has ended. `None` means that it died without a word.
    pub fn serve(
        &self,
        decide: &mut Decide<'_>,
        on_event: &mut dyn FnMut(&MoverEvent),
    ) -> Option<MoveOutcome> {
        loop {
            match self.channel.recv::<MoverMessage>(None).ok()?.body {
                MoverMessage::Request(request) => self.answer(decide(request)).ok()?,
                MoverMessage::Event(MoverEvent::Outcome(outcome)) => return Some(outcome),
                MoverMessage::Event(event) => on_event(&event),
                MoverMessage::SandboxReport(report) => self.reports.put(report),
                MoverMessage::SandboxProbe(probe) => self.probes.put(probe),
            }
        }
    }

    /// Ends it; on return it holds no channel any more.
    pub fn end(&self) {
        let process = lock(&self.process);
        if let Err(error) = process.kill().and_then(|()| process.wait().map(drop)) {
            tracing::warn!(%error, "a mover cannot be waited for");
        }
    }

    /// Asks it to give up, if it is not too late.
    pub fn cancel(&self) -> Result<(), Failure> {
        self.order(&MoverCommand::Cancel)
    }

    /// Says what the operator wants of the move under way.
    pub fn order(&self, order: &MoverCommand) -> Result<(), Failure> {
        self.channel.send(order).map_err(|e| gone(&e))
    }

    /// Hands it a further connection of its move.
    pub fn further(&self, socket: BorrowedFd<'_>) -> Result<(), Failure> {
        self.start(&MoverCommand::Further, &[socket])
    }

    /// State of its sandbox.
    pub fn sandbox_report(&self) -> Result<SandboxReport, Failure> {
        self.reports.ask(|| {
            self.channel
                .send(&MoverCommand::SandboxReport)
                .map_err(|e| gone(&e))
        })
    }

    /// A probe from inside.
    pub fn probe(&self) -> Result<ProbeReport, Failure> {
        self.probes.ask(|| {
            self.channel
                .send(&MoverCommand::SandboxProbe)
                .map_err(|e| gone(&e))
        })
    }

    fn answer(
        &self,
        decision: Result<(AgentAnswer, Vec<OwnedFd>), RoleError>,
    ) -> Result<(), Failure> {
        let (answer, handles) = match decision {
            Ok((answer, handles)) => (Ok(answer), handles),
            Err(error) => (Err(error), Vec::new()),
        };
        let handles: Vec<BorrowedFd<'_>> = handles.iter().map(AsFd::as_fd).collect();
        self.channel
            .send_with(&MoverCommand::Answer(answer), &handles)
            .map_err(|e| gone(&e))
    }
}

/// Where an answer that arrives in the serving thread meets the thread that asked.
struct Exchange<T> {
    sender: Sender<Result<T, RoleError>>,
    receiver: Mutex<Receiver<Result<T, RoleError>>>,
}

impl<T> Exchange<T> {
    fn new() -> Self {
        let (sender, receiver) = channel();
        Self {
            sender,
            receiver: Mutex::new(receiver),
        }
    }

    fn put(&self, value: Result<T, RoleError>) {
        // Our own receiver lives as long as the sender.
        let _ = self.sender.send(value);
    }

    fn ask(&self, request: impl FnOnce() -> Result<(), Failure>) -> Result<T, Failure> {
        let receiver = lock(&self.receiver);
        // An answer that came after its deadline belongs to nobody.
        while receiver.try_recv().is_ok() {}
        request()?;
        receiver
            .recv_timeout(DEADLINE)
            .map_err(|e| gone(&e))?
            .map_err(Failure::from)
    }
}

fn gone(error: &dyn std::fmt::Display) -> Failure {
    Failure::new("MOVER_GONE", format!("the mover does not answer: {error}"))
}

const DEADLINE: Duration = Duration::from_secs(30);
