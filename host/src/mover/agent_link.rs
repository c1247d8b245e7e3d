//! The mover's channel to its agent: requests that need an answer, events, and the wish to cancel.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use casemate_crypto_migrate::control::Controls;
use casemate_crypto_migrate::guest::Refusal;
use casemate_crypto_migrate::identity::{HostSigner, IdentityError};
use casemate_crypto_migrate::preamble::Ticket;
use casemate_crypto_migrate::session::{MAX_STREAMS, SessionFacts};

use crate::ipc::{Channel, IpcError, Received};
use crate::mover::engine::take;
use crate::mover::protocol::{
    AgentAnswer, MoverCommand, MoverEvent, MoverMessage, MoverRequestToAgent, OwnershipStep,
    SessionText,
};
use crate::role::Cell;
use crate::vmm::protocol::RoleError;

/// The channel to the agent, shared by the engine's thread and whoever signs.
pub struct AgentLink {
    inner: Mutex<Inner>,
    cancelled: Arc<AtomicBool>,
    controls: Arc<Controls>,
    deadline: OnceLock<Instant>,
    /// Further connections that nobody has taken yet.
    arrived: Mutex<VecDeque<OwnedFd>>,
}

struct Inner {
    channel: Channel,
    cell: Box<dyn Cell + Send>,
}

impl AgentLink {
    /// Takes the channel over, with the cell whose state the agent may ask for.
    pub fn new(channel: Channel, cell: Box<dyn Cell + Send>) -> Self {
        Self {
            inner: Mutex::new(Inner { channel, cell }),
            cancelled: Arc::default(),
            controls: Arc::default(),
            deadline: OnceLock::new(),
            arrived: Mutex::default(),
        }
    }

    /// Waits for the command that starts the work; answers questions about the cell meanwhile.
    pub fn start(&self) -> Result<(MoverCommand, Vec<OwnedFd>), RoleError> {
        let inner = self.lock()?;
        loop {
            let Received { body, handles } = inner.channel.recv::<MoverCommand>(None)?;
            match inner.serve(body)? {
                Some(MoverCommand::Cancel) => {
                    return Err(RoleError::new("CANCELLED", "cancelled before it began"));
                }
                Some(command) => return Ok((command, handles)),
                None => {}
            }
        }
    }

    /// Asks the agent and waits for its answer.
    pub fn ask(
        &self,
        request: MoverRequestToAgent,
    ) -> Result<(AgentAnswer, Vec<OwnedFd>), RoleError> {
        let inner = self.lock()?;
        // Where disks are copied for a guest that takes as long as it takes; an agent that dies hangs up.
        let copies = matches!(request, MoverRequestToAgent::AdmitSnapshot { .. });
        let deadline = (!copies).then_some(AGENT_DEADLINE);
        inner.channel.send(&MoverMessage::Request(request))?;
        loop {
            let Received { body, handles } = inner.channel.recv::<MoverCommand>(deadline)?;
            match inner.serve(body)? {
                Some(MoverCommand::Answer(answer)) => return Ok((answer?, handles)),
                Some(order) => self.obey(order, handles)?,
                None => {}
            }
        }
    }

    /// Source: a further connection to the peer.
    pub fn dial(&self, ticket: &Ticket) -> Result<OwnedFd, RoleError> {
        let request = MoverRequestToAgent::Dial { ticket: *ticket };
        match self.ask(request)? {
            (AgentAnswer::Dialed, handles) => {
                let [socket] = take(handles)?;
                Ok(socket)
            }
            _ => Err(unexpected()),
        }
    }

    /// Destination: the next further connection; waits so long for it.
    pub fn arrived(&self, wait: Duration) -> Option<OwnedFd> {
        let deadline = Instant::now() + wait;
        loop {
            self.poll();
            let next = self.arrived.lock().ok()?.pop_front();
            let left = deadline.saturating_duration_since(Instant::now());
            if next.is_some() || left.is_zero() || self.cancelled() {
                return next;
            }
            std::thread::sleep(left.min(ARRIVAL_STEP));
        }
    }

    /// Has a step of ownership recorded; returns only when it is durable.
    pub fn record(&self, step: OwnershipStep) -> Result<(), RoleError> {
        match self.ask(MoverRequestToAgent::Record(step))?.0 {
            AgentAnswer::Recorded => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Asks the agent's policy about an agreed session.
    pub fn agreed(&self, session: &SessionFacts) -> Result<(), Refusal> {
        let request = MoverRequestToAgent::Session(Box::new(SessionText::of(session)));
        let refused = |code: String, reason: String| Err(Refusal { code, reason });
        match self.ask(request) {
            Ok((AgentAnswer::Admitted, _)) => Ok(()),
            Ok((AgentAnswer::Refused { code, reason }, _)) => refused(code, reason),
            Ok(_) => refused("ROLE_PROTOCOL".into(), "the agent did not decide".into()),
            Err(error) => refused(error.code, error.text),
        }
    }

    /// Tells the agent. An agent that cannot be told is one that has ended: the move is cancelled.
    pub fn tell(&self, event: MoverEvent) {
        let told = self
            .lock()
            .and_then(|inner| Ok(inner.channel.send(&MoverMessage::Event(event))?));
        if told.is_err() {
            self.cancelled.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the agent has cancelled, or ended.
    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Nothing is to be gone on with.
    pub fn give_up(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// The flag that the engine watches.
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.cancelled.clone()
    }

    /// What the operator may change.
    pub fn controls(&self) -> Arc<Controls> {
        self.controls.clone()
    }

    /// From then on the move counts as cancelled. Taken once.
    pub fn set_deadline(&self, deadline: Instant) {
        // A second deadline would be a second start, which `start` gives only once.
        let _ = self.deadline.set(deadline);
    }

    /// Takes waiting commands. The move counts as cancelled if the agent says so, breaks the protocol, or has
    /// ended, or if the deadline is over.
    pub fn poll(&self) {
        let late = self
            .deadline
            .get()
            .is_some_and(|deadline| Instant::now() >= *deadline);
        if late || self.drain().is_err() {
            self.cancelled.store(true, Ordering::Relaxed);
        }
    }

    fn drain(&self) -> Result<(), RoleError> {
        // Whoever holds it waits for an answer, and takes what comes before. To wait for them could be for ever: the
        // answer may depend on a page that this thread is to give.
        let Ok(inner) = self.inner.try_lock() else {
            return Ok(());
        };
        loop {
            match inner.channel.recv::<MoverCommand>(Some(Duration::ZERO)) {
                Ok(received) => {
                    if let Some(order) = inner.serve(received.body)? {
                        self.obey(order, received.handles)?;
                    }
                }
                Err(IpcError::Deadline(_)) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What the operator wants of a move under way; nothing else has a place then.
    fn obey(&self, order: MoverCommand, handles: Vec<OwnedFd>) -> Result<(), RoleError> {
        match order {
            MoverCommand::Cancel => self.cancelled.store(true, Ordering::Relaxed),
            MoverCommand::Proceed => self.controls.proceed(),
            MoverCommand::Bandwidth(limit) => self.controls.set_bandwidth(limit),
            MoverCommand::Further => self.keep(handles)?,
            _ => return Err(unexpected()),
        }
        Ok(())
    }

    /// Late ones are closed: the engine takes none after the agreement.
    fn keep(&self, handles: Vec<OwnedFd>) -> Result<(), RoleError> {
        let [socket] = take(handles)?;
        let mut arrived = self.arrived.lock().map_err(|_| thread_failed())?;
        if arrived.len() < usize::from(MAX_STREAMS) {
            arrived.push_back(socket);
        }
        Ok(())
    }

    fn lock(&self) -> Result<std::sync::MutexGuard<'_, Inner>, RoleError> {
        self.inner.lock().map_err(|_| thread_failed())
    }
}

impl Inner {
    /// Answers questions about the cell; gives everything else back.
    fn serve(&self, command: MoverCommand) -> Result<Option<MoverCommand>, RoleError> {
        let answer = match command {
            MoverCommand::SandboxReport => MoverMessage::SandboxReport(self.cell.report()),
            MoverCommand::SandboxProbe => MoverMessage::SandboxProbe(self.cell.probe()),
            other => return Ok(Some(other)),
        };
        self.channel.send(&answer)?;
        Ok(None)
    }
}

/// Signs with the host's key by asking the agent; the key never comes here.
pub struct AgentSigner(pub Arc<AgentLink>);

impl std::fmt::Debug for AgentSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AgentSigner")
    }
}

impl HostSigner for AgentSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IdentityError> {
        let message = message.to_vec();
        match self.0.ask(MoverRequestToAgent::Sign { message }) {
            Ok((AgentAnswer::Signed { signature }, _)) => Ok(signature),
            Ok(_) => Err(IdentityError::Signer(unexpected().to_string())),
            Err(error) => Err(IdentityError::Signer(error.to_string())),
        }
    }
}

impl From<IpcError> for RoleError {
    fn from(error: IpcError) -> Self {
        let code = match &error {
            IpcError::Closed => "ROLE_ENDED",
            IpcError::Deadline(_) => "ROLE_SILENT",
            _ => "ROLE_PROTOCOL",
        };
        Self::new(code, error)
    }
}

fn thread_failed() -> RoleError {
    RoleError::new("INTERNAL", "a thread of the mover has failed")
}

fn unexpected() -> RoleError {
    RoleError::new("ROLE_PROTOCOL", "the agent's message has no place here")
}

/// How long the agent may take for an answer; admission builds a VMM.
const AGENT_DEADLINE: Duration = Duration::from_secs(60);
const ARRIVAL_STEP: Duration = Duration::from_millis(2);
