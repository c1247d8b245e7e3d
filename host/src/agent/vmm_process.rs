//! One VMM process as the agent sees it: requests in order, one reply each, events on the side.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::agent::api::Failure;
use crate::ipc::Channel;
use crate::sandbox::jail::RoleProcess;
use crate::vmm::protocol::{RoleError, VmmEvent, VmmMessage, VmmReply, VmmRequest};

/// A running VMM. Dropping it kills the process.
pub struct VmmProcess {
    channel: Arc<Channel>,
    replies: Mutex<Replies>,
    process: Mutex<RoleProcess>,
}

impl VmmProcess {
    /// Takes over a process just spawned; `on_event` is called from a thread of its own, at last with `None` when
    /// the process is gone.
    pub fn new(
        process: RoleProcess,
        channel_end: Channel,
        on_event: impl FnMut(Option<VmmEvent>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let channel_end = Arc::new(channel_end);
        let (sender, replies) = channel();
        let reader = Reader {
            channel: Arc::clone(&channel_end),
            sender,
        };
        std::thread::Builder::new()
            .name("vmm-events".into())
            .spawn(move || reader.run(on_event))?;
        Ok(Self {
            channel: channel_end,
            replies: Mutex::new(Replies {
                receiver: replies,
                silent: false,
            }),
            process: Mutex::new(process),
        })
    }

    /// One request and its reply.
    pub fn call(
        &self,
        request: &VmmRequest,
        handles: &[BorrowedFd<'_>],
    ) -> Result<VmmReply, Failure> {
        let mut replies = lock(&self.replies);
        if replies.silent {
            return Err(silent());
        }
        self.channel
            .send_with(request, handles)
            .map_err(|e| gone(&e))?;
        replies.next(REPLY_DEADLINE)
    }

    /// Joins the VMM to a mover: the end of their channel that the mover gets.
    pub fn attach_mover(&self) -> Result<Channel, Failure> {
        let (vmm_end, mover_end) =
            Channel::pair().map_err(|e| Failure::new("INTERNAL", e.to_string()))?;
        self.call(&VmmRequest::AttachMover, &[vmm_end.as_fd()])?;
        Ok(mover_end)
    }

    /// Process id as this host sees it.
    pub fn pid(&self) -> u32 {
        lock(&self.process).pid()
    }

    /// Kills the process and waits for its end.
    pub fn kill(&self) {
        // Already ended is just as good.
        let _ = lock(&self.process).kill();
    }
}

/// Replies in the order of the requests. After one that did not come in time the order is lost for good: a late answer
/// must not pass for the answer to another request.
struct Replies {
    receiver: Receiver<Result<VmmReply, RoleError>>,
    silent: bool,
}

impl Replies {
    fn next(&mut self, deadline: Duration) -> Result<VmmReply, Failure> {
        if self.silent {
            return Err(silent());
        }
        match self.receiver.recv_timeout(deadline) {
            Ok(reply) => reply.map_err(Failure::from),
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

struct Reader {
    channel: Arc<Channel>,
    sender: Sender<Result<VmmReply, RoleError>>,
}

impl Reader {
    fn run(self, mut on_event: impl FnMut(Option<VmmEvent>)) {
        loop {
            match self
                .channel
                .recv::<VmmMessage>(None)
                .map(|message| message.body)
            {
                Ok(VmmMessage::Event(event)) => on_event(Some(event)),
                // A reply that came after its deadline is never read.
                Ok(VmmMessage::Reply(reply)) => drop(self.sender.send(reply)),
                Err(error) => {
                    tracing::debug!(%error, "VMM channel ended");
                    break;
                }
            }
        }
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
    fn a_late_reply_is_not_the_answer_to_another_request() {
        let (sender, receiver) = channel();
        let mut replies = Replies {
            receiver,
            silent: false,
        };
        let moment = Duration::from_millis(1);
        assert_eq!(replies.next(moment).unwrap_err().code, "VMM_SILENT");
        sender.send(Ok(VmmReply::Done)).unwrap();
        assert_eq!(replies.next(moment).unwrap_err().code, "VMM_SILENT");
    }
}
