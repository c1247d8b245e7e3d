//! A child process under the double, from its start to its end.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use casemate_attest::legacy::TrustAnchors;
use casemate_attest::processor::snp::{Personality, SnpIdentity, SnpProcessor};
use casemate_attest::processor::{Identity, ProcessorConfig, SecureProcessor};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::DoubleError;
use crate::kernel::{Kernel, Parts, Reply, SnpParts};
use crate::protocol::{Ask, Outcome, read_frame, write_frame};
use crate::script::Fault;
use crate::sys::{Call, Listener};
use crate::tracer;

/// The machine that a child finds itself on.
#[derive(Clone, Debug)]
pub struct Config {
    /// The platform's identity, as `casemate_attest::processor::Identity` keeps it.
    pub identity: Vec<u8>,
    /// Fingerprints of the other emulated roots that guests may be sent to.
    pub peers: Vec<[u8; 32]>,
    /// SEV-ES is configured.
    pub es: bool,
    /// There is a `/dev/sev`.
    pub device: bool,
    /// `KVM_CAP_VM_TYPES`: 0 for a kernel before 6.10.
    pub vm_types: u32,
    /// ASIDs, and so guests at once.
    pub asids: u32,
    /// SNP is initialised; machines of its type can be made.
    pub snp: Option<Snp>,
}

/// The SNP half of the platform.
#[derive(Clone, Debug)]
pub struct Snp {
    /// Its identity, as `SnpIdentity` keeps it.
    pub identity: Vec<u8>,
    /// Which processor it passes itself off as.
    pub personality: Personality,
    /// Pages of a launch that Linux takes at a time.
    pub batch: u64,
}

impl Config {
    /// A machine of today with SEV and SEV-ES.
    pub fn new(identity: &[u8]) -> Self {
        Self {
            identity: identity.to_vec(),
            peers: Vec::new(),
            es: true,
            device: true,
            vm_types: 1 << kvm_bindings::KVM_X86_DEFAULT_VM
                | 1 << kvm_bindings::KVM_X86_SEV_VM
                | 1 << kvm_bindings::KVM_X86_SEV_ES_VM,
            asids: 8,
            snp: None,
        }
    }

    fn parts(&self) -> Result<Parts, DoubleError> {
        let bad = |error: &dyn std::fmt::Display| DoubleError::Processor(error.to_string());
        let mut peers = TrustAnchors::amd();
        for root in &self.peers {
            peers = peers.with_emulated_root(*root).map_err(|e| bad(&e))?;
        }
        let identity = Identity::from_bytes(&self.identity).map_err(|e| bad(&e))?;
        let config = ProcessorConfig {
            max_guests: self.asids,
            peers,
        };
        let mut processor = SecureProcessor::new(identity, config);
        if self.es {
            processor = processor.with_sev_es();
        }
        processor.init().map_err(|e| bad(&e))?;
        let snp = self.snp.as_ref().map(|snp| snp.parts(self.asids));
        Ok(Parts {
            processor,
            device: self.device,
            vm_types: self.vm_types | u32::from(self.snp.is_some()) << kvm_bindings::KVM_X86_SNP_VM,
            asids: self.asids,
            snp: snp.transpose()?,
        })
    }
}

impl Snp {
    fn parts(&self, asids: u32) -> Result<SnpParts, DoubleError> {
        let bad = |error: &dyn std::fmt::Display| DoubleError::Processor(error.to_string());
        let identity = SnpIdentity::from_bytes(&self.identity).map_err(|e| bad(&e))?;
        let processor = SnpProcessor::new(identity, self.personality.clone());
        let mut processor = processor.map_err(|e| bad(&e))?.with_max_guests(asids);
        processor.init().map_err(|e| bad(&e))?;
        Ok(SnpParts {
            processor,
            batch: self.batch,
        })
    }
}

/// A child under the double.
pub struct Double {
    kernel: Arc<Mutex<Kernel>>,
    pid: Pid,
    pipes: Option<(ChildStdin, ChildStdout)>,
    threads: Option<Threads>,
}

struct Threads {
    tracer: JoinHandle<String>,
    listener: JoinHandle<()>,
}

impl Double {
    /// Starts a program that speaks [`protocol`](crate::protocol), on a machine of its own.
    pub fn start(program: impl AsRef<OsStr>, config: &Config) -> Result<Self, DoubleError> {
        let mut command = Command::new(program);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Self::run(command, config)
    }

    /// Starts any program on a machine of its own, with all that it starts in turn; one of them at a time may have
    /// virtual machines. Unless its input and output are pipes, it is not [asked](Self::ask) anything.
    pub fn run(command: Command, config: &Config) -> Result<Self, DoubleError> {
        let kernel = Arc::new(Mutex::new(Kernel::new(config.parts()?)?));
        let (started, child) = channel();
        let tracer = std::thread::spawn({
            let kernel = kernel.clone();
            move || tracer::hold(command, &kernel, &started)
        });
        let gone = |_| DoubleError::Start("the tracing thread is gone".into());
        let (mut child, listener) = child.recv().map_err(gone)??;
        let listener = std::thread::spawn({
            let kernel = kernel.clone();
            move || serve(&listener, &kernel)
        });
        Ok(Self {
            kernel,
            pid: Pid::from_raw(child.id().cast_signed()),
            pipes: child.stdin.take().zip(child.stdout.take()),
            threads: Some(Threads { tracer, listener }),
        })
    }

    /// One request to the child, and its answer.
    pub fn ask(&mut self, ask: &Ask) -> Result<Outcome, DoubleError> {
        self.exchange(ask)
    }

    /// The same in the words of another program.
    pub fn exchange<Q: Serialize + Debug, A: DeserializeOwned>(
        &mut self,
        ask: &Q,
    ) -> Result<A, DoubleError> {
        let gone = |what: &dyn std::fmt::Display| DoubleError::Gone(format!("{ask:?}: {what}"));
        let (input, output) = self.pipes.as_mut().ok_or_else(|| gone(&"no pipes"))?;
        write_frame(input, ask).map_err(|e| gone(&e))?;
        input.flush().map_err(|e| gone(&e))?;
        readable(output.as_fd()).map_err(|e| gone(&e))?;
        read_frame(output).map_err(|e| gone(&e))
    }

    /// Asks a program that is not ended by its input to end (SIGTERM).
    pub fn terminate(&self) {
        // It may have ended already; `finish` tells how.
        let _ = kill(self.pid, Signal::SIGTERM);
    }

    /// Lets the next `times` turns of a command fail. Names are the specification's (`LAUNCH_START`), those of
    /// `/dev/sev` likewise (`PDH_CERT_EXPORT`), and those of ioctls (`KVM_CREATE_VM`).
    pub fn fail(&self, command: &str, times: u32, fault: Fault) {
        self.kernel().script.fail(command, 0, times, fault);
    }

    /// The same, after `skip` turns that succeed.
    pub fn fail_later(&self, command: &str, skip: u32, times: u32, fault: Fault) {
        self.kernel().script.fail(command, skip, times, fault);
    }

    /// The calls so far, in order.
    pub fn log(&self) -> Vec<String> {
        self.kernel().log.clone()
    }

    /// Guests that the firmware holds.
    pub fn guests(&self) -> u32 {
        self.kernel().guests()
    }

    /// Looks at the SNP half of the platform, or does what a guest or AMD would do there.
    pub fn snp<T>(&self, act: impl FnOnce(&mut SnpProcessor) -> T) -> Option<T> {
        self.kernel().snp().map(act)
    }

    /// Lets the child end, and tells whether it used the kernel as it should: no complaint, every fault met.
    pub fn finish(mut self) -> Result<(), DoubleError> {
        let end = self.end();
        if end != "exit status 0" {
            return Err(DoubleError::Gone(end));
        }
        let kernel = self.kernel();
        let mut complaints = kernel.complaints.clone();
        complaints.extend(kernel.script.rest());
        if complaints.is_empty() {
            Ok(())
        } else {
            Err(DoubleError::Complaints(complaints))
        }
    }

    /// Closes the child's input, which ends it, and waits.
    fn end(&mut self) -> String {
        drop(self.pipes.take());
        let Some(threads) = self.threads.take() else {
            return String::new();
        };
        let end = threads.tracer.join().unwrap_or_default();
        let _ = threads.listener.join();
        end
    }

    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        lock(&self.kernel)
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        if self.threads.is_some() {
            // The test has failed already; the child may hang.
            let _ = kill(self.pid, Signal::SIGKILL);
            self.end();
        }
    }
}

/// Answers the child's calls until nobody is left under the filter.
fn serve(listener: &Listener, kernel: &Mutex<Kernel>) {
    loop {
        let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        let events = ready.first().and_then(PollFd::revents);
        if !events.is_some_and(|events| events.contains(PollFlags::POLLIN)) {
            return;
        }
        // A caller that was killed meanwhile is not there any more.
        let Ok(call) = listener.receive() else {
            continue;
        };
        answer(listener, kernel, &call);
    }
}

fn answer(listener: &Listener, kernel: &Mutex<Kernel>, call: &Call) {
    if !listener.waits(call) {
        return;
    }
    let reply = lock(kernel).answer(call);
    // A caller that was killed meanwhile needs no answer.
    let _ = match reply {
        Reply::Pass => listener.pass(call),
        Reply::End(outcome) => listener.answer(call, outcome),
        Reply::Inject(descriptor) => listener.inject(call, descriptor.as_fd()),
    };
}

fn lock(kernel: &Mutex<Kernel>) -> MutexGuard<'_, Kernel> {
    kernel
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn readable(output: BorrowedFd<'_>) -> Result<(), String> {
    let mut ready = [PollFd::new(output, PollFlags::POLLIN)];
    match poll(&mut ready, PollTimeout::from(DEADLINE_MS)) {
        Ok(0) => Err(format!("no answer on {} in time", output.as_raw_fd())),
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.to_string()),
    }
}

/// A child that hangs must not hang the tests.
const DEADLINE_MS: u16 = 60_000;
