//! One VMM process as the agent sees it: requests in order, one reply each, events on the side.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::agent::api::Failure;
use crate::agent::roles::VmmShare;
use crate::ipc::Channel;
use crate::sandbox::jail::RoleProcess;
use crate::vmm::protocol::{HandleKind, RoleError, VmmEvent, VmmMessage, VmmReply, VmmRequest};

/// A guest's VMM. Dropping it kills the process.
pub struct VmmProcess {
    share: VmmShare,
    current: Mutex<Current>,
}

/// The process, which an upgrade changes.
struct Current {
    running: Arc<Running>,
    /// It was ended on purpose, and no other takes its place.
    ended: bool,
}

struct Running {
    version: String,
    channel: Arc<Channel>,
    replies: Mutex<Replies>,
    process: Mutex<RoleProcess>,
    held: Held,
}

/// Doubles of what the process was given and another VMM of the guest would need; none once it has ended, so that nothing
/// outlives it: neither a lock nor a tap.
type Held = Arc<Mutex<Option<Handles>>>;
type Handles = Vec<(HandleKind, OwnedFd)>;

impl VmmProcess {
    /// Takes over a process just spawned, of a program of this version; `on_event` is called from a thread of its own, at
    /// last with `None` when the process is gone.
    pub fn new(
        process: RoleProcess,
        channel_end: Channel,
        (version, share): (String, VmmShare),
        on_event: impl FnMut(Option<VmmEvent>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let channel_end = Arc::new(channel_end);
        let (sender, replies) = channel();
        let held = Held::new(Mutex::new(Some(Vec::new())));
        let reader = Reader {
            channel: Arc::clone(&channel_end),
            sender,
            held: Arc::clone(&held),
        };
        std::thread::Builder::new()
            .name("vmm-events".into())
            .spawn(move || reader.run(on_event))?;
        let running = Running {
            version,
            channel: channel_end,
            replies: Mutex::new(Replies {
                receiver: replies,
                silent: false,
            }),
            process: Mutex::new(process),
            held,
        };
        Ok(Self {
            share,
            current: Mutex::new(Current {
                running: Arc::new(running),
                ended: false,
            }),
        })
    }

    /// One request and its reply.
    pub fn call(
        &self,
        request: &VmmRequest,
        handles: &[BorrowedFd<'_>],
    ) -> Result<VmmReply, Failure> {
        self.call_within(request, handles, REPLY_DEADLINE)
    }

    /// The same, with a deadline of its own.
    pub fn call_within(
        &self,
        request: &VmmRequest,
        handles: &[BorrowedFd<'_>],
        deadline: Duration,
    ) -> Result<VmmReply, Failure> {
        let asked = self.running();
        let answer = match asked.ask(request, handles, deadline) {
            // Its guest has another process now, which can answer: the one that was asked changed nothing any more.
            Err(_) if !Arc::ptr_eq(&asked, &self.running()) => {
                self.running().ask(request, handles, deadline)
            }
            answer => answer,
        };
        Ok(answer?.0)
    }

    /// One request whose reply has descriptors beside it.
    pub fn call_for_handles(
        &self,
        request: &VmmRequest,
    ) -> Result<(VmmReply, Vec<OwnedFd>), Failure> {
        self.running().ask(request, &[], REPLY_DEADLINE)
    }

    /// Joins the VMM to a mover: the end of their channel that the mover gets.
    pub fn attach_mover(&self) -> Result<Channel, Failure> {
        let (vmm_end, mover_end) =
            Channel::pair().map_err(|e| Failure::new("INTERNAL", e.to_string()))?;
        self.call(&VmmRequest::AttachMover, &[vmm_end.as_fd()])?;
        Ok(mover_end)
    }

    /// Another process has the guest from now on; the old one is given back. Fails if the guest has been ended meanwhile,
    /// and then the other process has ended too.
    pub fn replace(&self, next: Self) -> Result<Self, Failure> {
        let mut current = lock(&self.current);
        if current.ended {
            return Err(gone(&"the guest was ended"));
        }
        std::mem::swap(&mut *current, &mut *lock(&next.current));
        drop(current);
        Ok(next)
    }

    /// Keeps a double of what the process was given.
    pub fn hold(&self, kind: HandleKind, descriptor: OwnedFd) {
        self.hold_all(vec![(kind, descriptor)]);
    }

    /// The same, of several.
    pub fn hold_all(&self, descriptors: Vec<(HandleKind, OwnedFd)>) {
        if let Some(held) = &mut *lock(&self.running().held) {
            held.extend(descriptors);
        }
    }

    /// The process was taken a device: those of its kind behind it move up.
    pub fn let_go(&self, gone: HandleKind) {
        if let Some(held) = &mut *lock(&self.running().held) {
            take_out(held, gone);
        }
    }

    /// Doubles of what the process was given, for another.
    pub fn held(&self) -> std::io::Result<Handles> {
        let running = self.running();
        let held = lock(&running.held);
        let doubled = held.iter().flatten();
        doubled
            .map(|(kind, fd)| Ok((*kind, fd.try_clone()?)))
            .collect()
    }

    /// Version of its program.
    pub fn version(&self) -> String {
        self.running().version.clone()
    }

    /// What its cell has of the host.
    pub(super) fn share(&self) -> &VmmShare {
        &self.share
    }

    /// Process id as this host sees it.
    pub fn pid(&self) -> u32 {
        lock(&self.running().process).pid()
    }

    /// Kills the process. No other takes its place.
    pub fn kill(&self) {
        let mut current = lock(&self.current);
        current.ended = true;
        // Already ended is just as good.
        let _ = lock(&current.running.process).kill();
    }

    fn running(&self) -> Arc<Running> {
        Arc::clone(&lock(&self.current).running)
    }
}

impl Running {
    fn ask(
        &self,
        request: &VmmRequest,
        handles: &[BorrowedFd<'_>],
        deadline: Duration,
    ) -> Result<(VmmReply, Vec<OwnedFd>), Failure> {
        let mut replies = lock(&self.replies);
        if replies.silent {
            return Err(silent());
        }
        self.channel
            .send_with(request, handles)
            .map_err(|e| gone(&e))?;
        replies.next(deadline)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        *lock(&self.held) = None;
    }
}

/// Replies in the order of the requests. After one that did not come in time the order is lost for good: a late answer
/// must not pass for the answer to another request.
struct Replies {
    receiver: Receiver<(Result<VmmReply, RoleError>, Vec<OwnedFd>)>,
    silent: bool,
}

impl Replies {
    fn next(&mut self, deadline: Duration) -> Result<(VmmReply, Vec<OwnedFd>), Failure> {
        if self.silent {
            return Err(silent());
        }
        match self.receiver.recv_timeout(deadline) {
            Ok((reply, handles)) => Ok((reply?, handles)),
            Err(RecvTimeoutError::Timeout) => {
                self.silent = true;
                Err(silent())
            }
            Err(RecvTimeoutError::Disconnected) => Err(gone(&"it ended")),
        }
    }
}

fn silent() -> Failure {
    Failure::new(
        "VMM_SILENT",
        format!("the VMM did not answer within {REPLY_DEADLINE:?}; stop the guest"),
    )
}

/// Numbers follow the plan, in which those behind move up. Of a card all queues go.
fn take_out(held: &mut Handles, gone: HandleKind) {
    use HandleKind::{Disk, Tap};
    held.retain_mut(|(kind, _)| match (kind, gone) {
        (Disk(number), Disk(gone)) | (Tap { card: number, .. }, Tap { card: gone, .. }) => {
            let stays = *number != gone;
            *number -= u8::from(*number > gone);
            stays
        }
        _ => true,
    });
}

struct Reader {
    channel: Arc<Channel>,
    sender: Sender<(Result<VmmReply, RoleError>, Vec<OwnedFd>)>,
    held: Held,
}

impl Reader {
    fn run(self, mut on_event: impl FnMut(Option<VmmEvent>)) {
        loop {
            let message = self.channel.recv::<VmmMessage>(None);
            match message.map(|message| (message.body, message.handles)) {
                Ok((VmmMessage::Event(event), _)) => on_event(Some(event)),
                // A reply that came after its deadline is never read.
                Ok((VmmMessage::Reply(reply), handles)) => {
                    drop(self.sender.send((reply, handles)));
                }
                Err(error) => {
                    tracing::debug!(%error, "VMM channel ended");
                    break;
                }
            }
        }
        *lock(&self.held) = None;
        on_event(None);
    }
}

fn gone(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        "VMM_GONE",
        format!("the VMM process is gone ({error}); its last words are in the agent's log"),
    )
}

/// Locks a mutex; a panic elsewhere ends the process, so poisoning cannot be met.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const REPLY_DEADLINE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_numbered_as_the_plan_is_after_a_device_went() {
        use HandleKind::{Console, Disk, Tap};
        let tap = |card, pair| Tap { card, pair };
        let all = [
            Console,
            Disk(0),
            Disk(1),
            tap(0, 0),
            tap(0, 1),
            tap(1, 0),
            tap(2, 0),
            Disk(2),
        ];
        let double = |kind| (kind, OwnedFd::from(tempfile::tempfile().unwrap()));
        let mut held: Handles = all.into_iter().map(double).collect();
        take_out(&mut held, Disk(1));
        take_out(&mut held, tap(1, 0));
        let left: Vec<HandleKind> = held.iter().map(|(kind, _)| *kind).collect();
        let want = [Console, Disk(0), tap(0, 0), tap(0, 1), tap(1, 0), Disk(1)];
        assert_eq!(left, want);
    }

    #[test]
    fn a_late_reply_is_not_the_answer_to_another_request() {
        let (sender, receiver) = channel();
        let mut replies = Replies {
            receiver,
            silent: false,
        };
        let moment = Duration::from_millis(1);
        assert_eq!(replies.next(moment).unwrap_err().code, "VMM_SILENT");
        sender.send((Ok(VmmReply::Done), Vec::new())).unwrap();
        assert_eq!(replies.next(moment).unwrap_err().code, "VMM_SILENT");
    }
}
