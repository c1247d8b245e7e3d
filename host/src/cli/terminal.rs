//! The user's terminal as a guest's: raw while it lasts, and as it was on every way out.

use std::io::{IsTerminal, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{read, write};

use super::output_failed;
use crate::agent::api::{Answer, Failure, Request};
use crate::agent::client::{Agent, ask};
use crate::vmm::protocol::MachineState;

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The user left.
    Left,
    /// A signal told this process to go.
    Signal(Signal),
    /// The guest's console is closed, or the guest has stopped.
    Guest,
}

/// Joins the terminal to a guest's serial console until the user leaves, or the guest ends. The exit status is 0 if the user
/// left or the guest switched itself off, 1 if it ended in another way, 128 and the signal's number after a signal.
pub fn console(agent: &Agent, name: &str) -> Result<u8, Failure> {
    let end = session(agent, name)?;
    match end {
        End::Left => {
            tell(&format!("\r\n{name} runs on\r\n"));
            Ok(0)
        }
        End::Signal(signal) => Ok(128u8.saturating_add(u8::try_from(signal as i32).unwrap_or(0))),
        End::Guest => Ok(u8::from(how_it_stopped(agent, name)? != "shutdown")),
    }
}

/// The same for a guest that was launched for it: it ends with its guest.
fn foreground(agent: &Agent, name: &str) -> Result<u8, Failure> {
    let status = console(agent, name)?;
    let gone = status_of(agent, name)?
        .is_none_or(|(state, _)| matches!(state, MachineState::Stopped | MachineState::Lost));
    if gone {
        let stop = Request::Stop {
            name: name.to_owned(),
        };
        // Somebody else may have ended it.
        match ask(agent, &stop, &mut |_| {}) {
            Err(failure) if failure.code != "NO_SUCH_GUEST" => return Err(failure),
            _ => {}
        }
    }
    Ok(status)
}

/// `casemate run --console`.
pub fn launch(agent: &Agent, request: &Request) -> Result<u8, Failure> {
    let Answer::Guest(guest) = ask(agent, request, &mut |_| {})? else {
        return Err(Failure::new(
            "AGENT_LOST",
            "the agent answered something else",
        ));
    };
    foreground(agent, &guest.name)
}

fn session(agent: &Agent, name: &str) -> Result<End, Failure> {
    let request = Request::ConsoleOpen {
        name: name.to_owned(),
    };
    let Answer::ConsoleOpened { socket } = ask(agent, &request, &mut |_| {})? else {
        return Err(Failure::new(
            "AGENT_LOST",
            "the agent answered something else",
        ));
    };
    let stream = UnixStream::connect(&socket)
        .map_err(|e| Failure::new("CONSOLE", format!("{}: {e}", socket.display())))?;
    let signals = Signals::blocked()?;
    let stdin = std::io::stdin();
    let raw = stdin
        .is_terminal()
        .then(|| Raw::enter(stdin.as_fd()))
        .transpose()?;
    if raw.is_some() {
        tell(&format!("{name}: Ctrl-] leaves\r\n"));
    }
    let stopped = || {
        let found = status_of(agent, name);
        found.map(|found| {
            found.is_none_or(|(state, _)| {
                state == MachineState::Stopped || state == MachineState::Lost
            })
        })
    };
    let end = Session {
        stream: &stream,
        signals: &signals,
        escapes: raw.is_some(),
    }
    .run(stdin.as_fd(), &stopped);
    drop(raw);
    end
}

struct Session<'a> {
    stream: &'a UnixStream,
    signals: &'a Signals,
    escapes: bool,
}

impl Session<'_> {
    fn run(
        &self,
        stdin: BorrowedFd<'_>,
        stopped: &dyn Fn() -> Result<bool, Failure>,
    ) -> Result<End, Failure> {
        let mut typing = true;
        let mut next_look = Instant::now() + BETWEEN;
        loop {
            let mut fds = vec![
                PollFd::new(self.stream.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.0.as_fd(), PollFlags::POLLIN),
            ];
            if typing {
                fds.push(PollFd::new(stdin, PollFlags::POLLIN));
            }
            match poll(&mut fds, PollTimeout::from(LOOK_MS)) {
                Err(Errno::EINTR) | Ok(_) => {}
                Err(e) => return Err(failed("poll", e)),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
            let is = |index: usize| ready.get(index).copied().unwrap_or(false);
            if is(1)
                && let Some(signal) = self.signals.take()
            {
                return Ok(End::Signal(signal));
            }
            if is(0) && !self.shown()? {
                return Ok(End::Guest);
            }
            if is(2) {
                match self.typed(stdin)? {
                    Typed::Left => return Ok(End::Left),
                    Typed::All => typing = false,
                    Typed::Some => {}
                }
            }
            // A guest that has stopped keeps its console open; what it wrote last has been shown by now.
            if !is(0) && Instant::now() >= next_look {
                next_look = Instant::now() + BETWEEN;
                if stopped()? {
                    return Ok(End::Guest);
                }
            }
        }
    }

    /// From the guest to the terminal; false at the end.
    fn shown(&self) -> Result<bool, Failure> {
        let mut bytes = [0; 4096];
        match read(self.stream, &mut bytes) {
            Ok(0) => Ok(false),
            Ok(count) => {
                let mut out = std::io::stdout();
                out.write_all(bytes.get(..count).unwrap_or_default())
                    .and_then(|()| out.flush())
                    .map_err(|e| output_failed(&e))?;
                Ok(true)
            }
            Err(Errno::EINTR) => Ok(true),
            Err(_) => Ok(false),
        }
    }

    /// From the terminal to the guest.
    fn typed(&self, stdin: BorrowedFd<'_>) -> Result<Typed, Failure> {
        let mut bytes = [0; 1024];
        let count = match read(stdin, &mut bytes) {
            Err(Errno::EINTR) => return Ok(Typed::Some),
            Err(e) => return Err(failed("the terminal", e)),
            Ok(0) => return Ok(Typed::All),
            Ok(count) => count,
        };
        let bytes = bytes.get(..count).unwrap_or_default();
        let until = bytes
            .iter()
            .position(|byte| self.escapes && *byte == ESCAPE);
        let mut rest = bytes.get(..until.unwrap_or(count)).unwrap_or_default();
        while !rest.is_empty() {
            match write(self.stream, rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                // The guest is gone, as the next look will say.
                Err(_) => break,
            }
        }
        Ok(match until {
            Some(_) => Typed::Left,
            None => Typed::Some,
        })
    }
}

enum Typed {
    Some,
    /// There is no more.
    All,
    Left,
}

/// A terminal that hands on every key; as it was when this is dropped, also by a panic.
struct Raw;

static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

impl Raw {
    fn enter(terminal: BorrowedFd<'_>) -> Result<Self, Failure> {
        let before = tcgetattr(terminal).map_err(|e| failed("the terminal", e))?;
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let others = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                others(panic);
            }));
        });
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let this = Self;
        tcsetattr(terminal, SetArg::TCSANOW, &raw).map_err(|e| failed("the terminal", e))?;
        Ok(this)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        // Nothing can be done about a terminal that is gone.
        let _ = tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &before);
    }
}

/// The signals that end a process, as something to wait for.
struct Signals(SignalFd);

impl Signals {
    fn blocked() -> Result<Self, Failure> {
        let mut set = SigSet::empty();
        for signal in [
            Signal::SIGTERM,
            Signal::SIGHUP,
            Signal::SIGINT,
            Signal::SIGQUIT,
        ] {
            set.add(signal);
        }
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None).map_err(|e| failed("signals", e))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let fd = SignalFd::with_flags(&set, flags).map_err(|e| failed("signals", e))?;
        Ok(Self(fd))
    }

    fn take(&self) -> Option<Signal> {
        let info = self.0.read_signal().ok()??;
        Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()
    }
}

/// State of a guest and why it stopped; nothing if it is not here any more.
fn status_of(agent: &Agent, name: &str) -> Result<Option<(MachineState, Option<String>)>, Failure> {
    match ask(
        agent,
        &Request::Status {
            name: name.to_owned(),
        },
        &mut |_| {},
    ) {
        Ok(Answer::Guest(guest)) => Ok(Some((guest.state, guest.stopped))),
        Ok(_) => Err(Failure::new(
            "AGENT_LOST",
            "the agent answered something else",
        )),
        Err(failure) if failure.code == "NO_SUCH_GUEST" => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn how_it_stopped(agent: &Agent, name: &str) -> Result<String, Failure> {
    let reason = match status_of(agent, name)? {
        None => "gone".to_owned(),
        Some((MachineState::Lost, _)) => "lost".to_owned(),
        Some((_, reason)) => reason.unwrap_or_else(|| "gone".to_owned()),
    };
    tell(&format!("{name} has stopped: {reason}\n"));
    Ok(reason)
}

/// What nobody reads is not missed.
fn tell(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn failed(what: &str, error: Errno) -> Failure {
    Failure::new("CONSOLE", format!("{what}: {error}"))
}

/// Ctrl-].
const ESCAPE: u8 = 0x1d;
const LOOK_MS: u8 = 200;
const BETWEEN: Duration = Duration::from_millis(400);
