//! The thread that starts the child and holds it by ptrace: it makes default machines of SEV ones, and remembers.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::process::{Child, Command};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::error::DoubleError;
use crate::filter::{ioctl, program};
use crate::kernel::Kernel;
use crate::sys::{Listener, Stop, go_on, receive_listener, start_under, wait_traced};

/// A child that has started, and its filter's listener.
pub(crate) type Started = Result<(Child, Listener), DoubleError>;

/// Starts the child, sends it out, and stays with it to its end, which it returns.
pub(crate) fn hold(
    mut command: Command,
    kernel: &Arc<Mutex<Kernel>>,
    started: &Sender<Started>,
) -> String {
    let (main, child) = match start(&mut command) {
        Ok(child) => (pid(&child.0), child),
        Err(error) => {
            let _ = started.send(Err(error));
            return "not started".to_owned();
        }
    };
    let _ = started.send(Ok(child));
    let mut tracer = Tracer {
        main,
        kernel: kernel.clone(),
        known: BTreeSet::from([main]),
        creating: BTreeMap::new(),
        end: String::new(),
    };
    while tracer.step() {}
    tracer.end
}

fn start(command: &mut Command) -> Result<(Child, Listener), DoubleError> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (here, there) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags)
        .map_err(DoubleError::system("socketpair"))?;
    start_under(command, program(), there);
    let child = command
        .spawn()
        .map_err(|error| DoubleError::Start(error.to_string()))?;
    let pid = pid(&child);
    // The stop at exec.
    waitpid(pid, Some(WaitPidFlag::__WALL)).map_err(DoubleError::system("waitpid"))?;
    let options = ptrace::Options::PTRACE_O_TRACESECCOMP
        | ptrace::Options::PTRACE_O_TRACESYSGOOD
        | ptrace::Options::PTRACE_O_TRACECLONE
        | ptrace::Options::PTRACE_O_TRACEFORK
        | ptrace::Options::PTRACE_O_TRACEVFORK
        // Else a program that the child starts is sent a SIGTRAP.
        | ptrace::Options::PTRACE_O_TRACEEXEC
        | ptrace::Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(pid, options).map_err(DoubleError::system("PTRACE_SETOPTIONS"))?;
    let listener = receive_listener(here.as_fd())
        .ok_or_else(|| DoubleError::Start("no listener came".into()))?;
    ptrace::cont(pid, None).map_err(DoubleError::system("PTRACE_CONT"))?;
    Ok((child, listener))
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

struct Tracer {
    main: Pid,
    kernel: Arc<Mutex<Kernel>>,
    /// Threads that have stopped once.
    known: BTreeSet<Pid>,
    /// Threads inside `KVM_CREATE_VM`, with the type they asked for.
    creating: BTreeMap<Pid, u32>,
    end: String,
}

impl Tracer {
    /// One event; whether there may be more.
    fn step(&mut self) -> bool {
        let (pid, stop, end) = match wait_traced() {
            Ok(waited) => waited,
            Err(Errno::EINTR) => return true,
            Err(_) => return false,
        };
        match stop {
            Stop::Ended => self.ended(pid, end),
            Stop::Event(libc::PTRACE_EVENT_SECCOMP) => self.traced_call(pid),
            Stop::Event(_) => go_on(pid, 0),
            Stop::Syscall => {
                self.created_vm(pid);
                go_on(pid, 0);
            }
            Stop::Signal(signal) => {
                // A new thread begins with a stop that is no signal of anybody's.
                let new = self.known.insert(pid) && signal == libc::SIGSTOP;
                go_on(pid, if new { 0 } else { signal });
            }
        }
        true
    }

    fn ended(&mut self, pid: Pid, how: String) {
        self.lock(|kernel| kernel.ended(pid));
        if pid == self.main {
            self.end = how;
        }
    }

    fn traced_call(&mut self, pid: Pid) {
        let Ok(registers) = ptrace::getregs(pid) else {
            return;
        };
        match registers.rsi as u32 {
            ioctl::KVM_CREATE_VM => self.create_vm(pid, registers),
            ioctl::KVM_SET_SREGS => {
                let (vcpu, special) = (registers.rdi, registers.rdx);
                self.lock(|kernel| kernel.look_at_paging(pid, vcpu, special));
                go_on(pid, 0);
            }
            _ => go_on(pid, 0),
        }
    }

    /// `KVM_CREATE_VM` of a type: the real kernel makes one of the default type.
    fn create_vm(&mut self, pid: Pid, mut registers: libc::user_regs_struct) {
        let vm_type = registers.rdx as u32;
        let allowed = self.lock(|kernel| kernel.create_vm(vm_type));
        match allowed {
            Ok(()) => {
                registers.rdx = 0;
                self.creating.insert(pid, vm_type);
                let _ = ptrace::setregs(pid, registers);
                let _ = ptrace::syscall(pid, None);
            }
            Err(errno) => {
                // No call at all, and this is its result.
                registers.orig_rax = u64::MAX;
                registers.rax = i64::from(-(errno as i32)).cast_unsigned();
                let _ = ptrace::setregs(pid, registers);
                go_on(pid, 0);
            }
        }
    }

    fn created_vm(&mut self, pid: Pid) {
        let made = ptrace::getregs(pid).map(|registers| registers.rax.cast_signed());
        if let (Some(vm_type), Ok(descriptor)) = (self.creating.remove(&pid), made)
            && let Ok(descriptor) = u64::try_from(descriptor)
        {
            self.lock(|kernel| kernel.created_vm(pid, descriptor, vm_type));
        }
    }

    fn lock<T>(&self, act: impl FnOnce(&mut Kernel) -> T) -> T {
        act(&mut self
            .kernel
            .lock()
            .unwrap_or_else(|broken| broken.into_inner()))
    }
}
