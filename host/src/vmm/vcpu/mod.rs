//! vCPU threads: run, be kicked out, save and restore; each owns its vCPU and takes commands.
#![expect(
    unsafe_code,
    reason = "the immediate_exit flag lies in memory shared with KVM"
)]

pub mod cpuid;
pub mod entry;
pub mod features;
pub mod model;
pub mod state;

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::bus::{GuestBus, StopNotice};
use super::hooks::ThreadKind;

/// A vCPU on its thread.
pub struct Vcpu {
    commands: Sender<Command>,
    kick: Arc<Kick>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread; the vCPU is stopped. Returns when the thread has confined itself.
    pub fn spawn(
        id: u8,
        mut fd: VcpuFd,
        bus: Arc<dyn GuestBus>,
        stop: Arc<StopNotice>,
        confine: fn(ThreadKind) -> Result<(), String>,
    ) -> Result<Self, VcpuError> {
        register_signal_handler(SIGRTMIN(), on_kick)
            .map_err(|e| VcpuError::Thread(e.to_string()))?;
        let kick = Arc::new(Kick::new(&mut fd));
        let (commands, receiver) = channel();
        let (ready_sender, ready) = channel();
        let runner = Runner {
            fd,
            bus,
            stop,
            kick: Arc::clone(&kick),
            running: false,
        };
        let thread = Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                let confined = confine(ThreadKind::Vcpu);
                let go = confined.is_ok();
                let _ = ready_sender.send(confined);
                if go {
                    runner.serve(&receiver);
                }
            })
            .map_err(|e| VcpuError::Thread(e.to_string()))?;
        let confined = ready.recv().map_err(|_| VcpuError::Gone)?;
        let vcpu = Self {
            commands,
            kick,
            thread: Some(thread),
        };
        confined.map_err(VcpuError::Confine)?;
        Ok(vcpu)
    }

    /// Runs until paused or stopped.
    pub fn run(&self) -> Result<(), VcpuError> {
        self.send(Command::Run)
    }

    /// Asks the thread to stop; the receiver hears when it has, with its last exit completed.
    pub fn pause(&self) -> Result<Pausing<'_>, VcpuError> {
        let (sender, done) = channel();
        self.send(Command::Pause(sender))?;
        self.kick();
        Ok(Pausing { vcpu: self, done })
    }

    /// Takes it off its processor for so long, or until it is asked for something else. One that does not run is left alone.
    pub fn rest(&self, time: Duration) -> Result<(), VcpuError> {
        self.send(Command::Rest(time))?;
        self.kick();
        Ok(())
    }

    /// Runs `work` on the thread, between two exits if the vCPU is running.
    pub fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&VcpuFd) -> R + Send + 'static,
    ) -> Result<R, VcpuError> {
        let (sender, done) = channel();
        self.send(Command::Call(Box::new(move |fd| {
            let _ = sender.send(work(fd));
        })))?;
        self.kick();
        done.recv_timeout(ANSWER_DEADLINE)
            .map_err(|_| VcpuError::Gone)
    }

    fn send(&self, command: Command) -> Result<(), VcpuError> {
        self.commands.send(command).map_err(|_| VcpuError::Gone)
    }

    fn kick(&self) {
        self.kick.exit_at_once();
        if let Some(thread) = &self.thread {
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Exit);
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A vCPU that has been asked to stop.
pub struct Pausing<'a> {
    vcpu: &'a Vcpu,
    done: Receiver<()>,
}

impl Pausing<'_> {
    /// Waits until it has.
    pub fn wait(self) -> Result<(), VcpuError> {
        for _ in 0..PAUSE_ATTEMPTS {
            match self.done.recv_timeout(KICK_AGAIN) {
                Ok(()) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => self.vcpu.kick(),
                Err(RecvTimeoutError::Disconnected) => return Err(VcpuError::Gone),
            }
        }
        Err(VcpuError::Gone)
    }
}

/// What can go wrong with a vCPU's thread.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The thread could not start.
    #[error("vCPU thread cannot start: {0}")]
    Thread(String),
    /// The thread could not confine itself, and ended.
    #[error("vCPU thread cannot be confined: {0}")]
    Confine(String),
    /// The thread is gone or does not answer.
    #[error("vCPU thread does not answer")]
    Gone,
}

type Call = Box<dyn FnOnce(&VcpuFd) + Send>;

enum Command {
    Run,
    Pause(Sender<()>),
    Call(Call),
    Rest(Duration),
    Exit,
}

struct Runner {
    fd: VcpuFd,
    bus: Arc<dyn GuestBus>,
    stop: Arc<StopNotice>,
    kick: Arc<Kick>,
    running: bool,
}

impl Runner {
    fn serve(mut self, commands: &Receiver<Command>) {
        let mut early = None;
        loop {
            // Cleared before the commands are looked at: whoever sends one sets it afterwards.
            self.kick.clear();
            let command = if early.is_some() {
                early.take()
            } else if self.running {
                match commands.try_recv() {
                    Ok(command) => Some(command),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => break,
                }
            } else {
                match commands.recv() {
                    Ok(command) => Some(command),
                    Err(_) => break,
                }
            };
            match command {
                None => self.step(),
                Some(Command::Run) => self.running = self.stop.reason().is_none(),
                Some(Command::Pause(done)) => {
                    self.complete_exit();
                    self.running = false;
                    let _ = done.send(());
                }
                Some(Command::Call(work)) => work(&self.fd),
                Some(Command::Rest(time)) if self.running => match commands.recv_timeout(time) {
                    Ok(command) => early = Some(command),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                },
                Some(Command::Rest(_)) => {}
                Some(Command::Exit) => break,
            }
        }
        self.kick.forget();
    }

    /// Port and memory accesses take effect in the guest's registers only at the next entry: enter once
    /// more, and leave before the guest runs.
    fn complete_exit(&mut self) {
        if !self.running {
            return;
        }
        for _ in 0..MAX_COMPLETIONS {
            self.kick.exit_at_once();
            if self.enter() {
                break;
            }
        }
    }

    fn step(&mut self) {
        self.enter();
    }

    /// Enters the guest once; true if it came back without anything to do.
    fn enter(&mut self) -> bool {
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => self.bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => {
                self.bus.port_write(port, data);
                self.running = self.running && self.stop.reason().is_none();
            }
            Ok(VcpuExit::MmioRead(address, data)) => self.bus.memory_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => self.bus.memory_write(address, data),
            Ok(VcpuExit::Hypercall(call)) => *call.ret = self.bus.hypercall(call.nr, &call.args),
            Ok(VcpuExit::X86Rdmsr(msr)) => match self.bus.read_msr(msr.index) {
                Some(value) => (*msr.data, *msr.error) = (value, 0),
                None => *msr.error = 1,
            },
            Ok(VcpuExit::X86Wrmsr(msr)) => {
                *msr.error = u8::from(!self.bus.write_msr(msr.index, msr.data));
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt | VcpuExit::Nmi) => {
                return true;
            }
            Ok(VcpuExit::Shutdown) => self.stop_because("triple-fault"),
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                let reason = system_event(kind);
                self.stop_because(&reason);
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                self.stop_because(&format!("fail-entry {reason:#x}"))
            }
            Ok(VcpuExit::MemoryFault { gpa, flags, .. }) => {
                self.stop_because(&format!("memory-fault at {gpa:#x}, flags {flags:#x}"));
            }
            Ok(VcpuExit::InternalError) => {
                let reason = internal_error(&mut self.fd);
                self.stop_because(&reason);
            }
            Ok(other) => {
                let reason = format!("{other:?}");
                self.stop_because(&reason);
            }
            // EAGAIN: an application processor got its INIT or SIPI.
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => return true,
            Err(e) => self.stop_because(&format!("KVM_RUN: {e}")),
        }
        false
    }

    fn stop_because(&mut self, reason: &str) {
        self.running = false;
        self.stop.stop(reason);
    }
}

/// The `immediate_exit` flag of a vCPU's run page, usable from other threads as long as the page is mapped.
struct Kick {
    flag: Mutex<Option<NonNull<AtomicU8>>>,
}

// SAFETY: the pointer is only used under the lock, as an atomic, while the page is mapped.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    fn new(fd: &mut VcpuFd) -> Self {
        let flag = &raw mut fd.get_kvm_run().immediate_exit;
        Self {
            flag: Mutex::new(NonNull::new(flag.cast())),
        }
    }

    fn exit_at_once(&self) {
        self.store(1);
    }

    fn clear(&self) {
        self.store(0);
    }

    /// Called by the owner of the page before it unmaps it.
    fn forget(&self) {
        *self.flag.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn store(&self, value: u8) {
        if let Some(flag) = *self.flag.lock().unwrap_or_else(PoisonError::into_inner) {
            // SAFETY: the run page is mapped until `forget`, which takes the same lock; KVM and all threads
            // treat this byte as a plain flag.
            unsafe { flag.as_ref() }.store(value, Ordering::SeqCst);
        }
    }
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn system_event(kind: u32) -> String {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => "shutdown".into(),
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => "reset".into(),
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => "crash".into(),
        other => format!("system-event {other}"),
    }
}

fn internal_error(fd: &mut VcpuFd) -> String {
    let rip = fd.get_regs().map_or(0, |regs| regs.rip);
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so this is the union's live member.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let count = internal.data.len().min(internal.ndata as usize);
    format!(
        "internal-error {} at {rip:#x}, data {:x?}",
        internal.suberror,
        internal.data.get(..count).unwrap_or_default()
    )
}

const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
const KICK_AGAIN: Duration = Duration::from_millis(20);
const PAUSE_ATTEMPTS: u32 = 500;
const MAX_COMPLETIONS: u32 = 4096;
