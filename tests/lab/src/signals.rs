//! Ctrl-C, SIGTERM and a vanished parent: whatever we started is ended, and the normal clean-up path runs.

use std::{
    process::{Child, Command, ExitStatus},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{SigSet, Signal, kill},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::{Pid, getppid},
};

use crate::{
    command::start_error,
    error::{Error, Result},
};

/// From here on the stopping signals end our children and are remembered; call once, before any thread starts.
pub fn catch() -> nix::Result<()> {
    let stopping: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    stopping.thread_block()?;
    thread::spawn(move || {
        while let Ok(signal) = stopping.wait() {
            interrupt(signal as i32);
        }
    });
    Ok(())
}

/// Fails once we were asked to stop.
pub fn check() -> Result<()> {
    match INTERRUPTED.load(Ordering::SeqCst) {
        0 => Ok(()),
        signal => Err(Error::Interrupted(signal)),
    }
}

/// Watches for the death of the parent, for runners whose cargo is killed.
pub struct Parent(Pid);

impl Parent {
    /// The parent now.
    pub fn now() -> Self {
        Self(getppid())
    }

    /// Fails when the parent is another than at the start, or we were asked to stop.
    pub fn check(&self) -> Result<()> {
        if getppid() != self.0 {
            interrupt(Signal::SIGHUP as i32);
        }
        check()
    }
}

/// A child that is ended when we are asked to stop, and when it is dropped.
pub struct Guarded(Child);

impl Guarded {
    /// Start `command`.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut children = children();
        check()?;
        let child = command
            .spawn()
            .map_err(|source| start_error(command, source))?;
        children.push(pid(&child));
        Ok(Self(child))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Wait for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        // Look without reaping first: while it is listed its number must not be given to another process.
        let _ = waitid(
            Id::Pid(pid(&self.0)),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT,
        );
        self.forget();
        let status = self.0.wait().map_err(|source| Error::Start {
            command: "a child process".into(),
            source,
        });
        check()?;
        status
    }

    /// Wait for its end, at most until `deadline`; `None` when it still runs.
    pub fn wait_until(&mut self, deadline: Instant, parent: &Parent) -> Result<Option<ExitStatus>> {
        loop {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
            if !matches!(
                waitid(Id::Pid(pid(&self.0)), flags),
                Ok(nix::sys::wait::WaitStatus::StillAlive)
            ) {
                return self.wait().map(Some);
            }
            parent.check()?;
            if Instant::now() >= deadline {
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn forget(&self) {
        let pid = pid(&self.0);
        children().retain(|known| *known != pid);
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.forget();
        // Both fail harmlessly when it has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn interrupt(signal: i32) {
    INTERRUPTED.store(signal, Ordering::SeqCst);
    for child in children().iter() {
        let _ = kill(*child, Signal::SIGTERM);
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

fn children() -> MutexGuard<'static, Vec<Pid>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

static INTERRUPTED: AtomicI32 = AtomicI32::new(0);
static CHILDREN: Mutex<Vec<Pid>> = Mutex::new(Vec::new());
