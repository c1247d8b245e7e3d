//! A host under the double without an agent: it starts the product's VMM in its jail, by the agent's own means, and
//! hands on what the test says for agent and mover.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use casemate::ipc::Channel;
use casemate::machine::plan::MachinePlan;
use casemate::sandbox::Role;
use casemate::sandbox::jail::{JailSpec, RoleProcess, spawn_role};
use casemate::vmm::protocol::{
    HandleKind, MoverReply, MoverRequest, RoleError, VmmMessage, VmmReply, VmmRequest,
};
use casemate_double::protocol::{read_frame, write_frame};
use casemate_double::relay::{Order, Outcome, Report};
use nix::sys::memfd::{MFdFlags, memfd_create};

fn main() -> ExitCode {
    // The jail starts this very program as `internal vmm`.
    if std::env::args().nth(1).as_deref() == Some("internal") {
        return casemate::cli::main();
    }
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("double-host: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    let mut host = Host::default();
    loop {
        let order: Order = match read_frame(&mut input) {
            Ok(order) => order,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        let outcome: Outcome = host.carry_out(order);
        write_frame(&mut output, &outcome)?;
        output.flush()?;
    }
}

#[derive(Default)]
struct Host {
    mover: Option<Mover>,
    vmm: Option<(Channel, RoleProcess)>,
    console: Arc<Mutex<Vec<u8>>>,
}

struct Mover {
    channel: Channel,
    exchange: File,
}

impl Host {
    fn carry_out(&mut self, order: Order) -> Outcome {
        match order {
            Order::Prepare {
                plan,
                kernel,
                amd,
                uid,
            } => self.prepare(*plan, kernel, &amd, uid),
            Order::Vmm(request) => self.vmm(&request, None).map(Report::Vmm),
            Order::AttachMover => self.attach(),
            Order::Mover(request) => {
                let mover = self.mover()?;
                mover.channel.send(&request)?;
                let reply = mover
                    .channel
                    .recv::<Result<MoverReply, RoleError>>(Some(DEADLINE))?;
                reply.body.map(Report::Mover)
            }
            Order::WriteExchange(bytes) => {
                self.mover()?
                    .exchange
                    .write_all_at(&bytes, 0)
                    .map_err(fault)?;
                Ok(Report::Done)
            }
            Order::ReadExchange(length) => {
                let mut bytes = vec![0; usize::try_from(length).map_err(fault)?];
                self.mover()?
                    .exchange
                    .read_exact_at(&mut bytes, 0)
                    .map_err(fault)?;
                Ok(Report::Bytes(bytes))
            }
            Order::Console => {
                let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(Report::Bytes(console.clone()))
            }
            Order::End => {
                self.mover = None;
                self.vmm(&VmmRequest::Shutdown, None)?;
                if let Some((channel, process)) = self.vmm.take() {
                    drop(channel);
                    process.wait().map_err(fault)?;
                }
                Ok(Report::Done)
            }
        }
    }

    fn prepare(
        &mut self,
        plan: MachinePlan,
        kernel: Option<Vec<u8>>,
        amd: &[u8],
        uid: u32,
    ) -> Outcome {
        let (ours, theirs) = Channel::pair()?;
        let mut spec = JailSpec::new(format!("double-host-{uid}"), uid);
        spec.memlock_max = 2 * plan.memory_bytes;
        let process = spawn_role(Role::Vmm, theirs, spec).map_err(fault)?;
        let device = |path: &str, write| {
            let file = File::options().read(true).write(write).open(path);
            file.map(OwnedFd::from).map_err(fault)
        };
        let mut handles = vec![
            (HandleKind::Kvm, device("/dev/kvm", true)?),
            (HandleKind::SevDevice, device("/dev/sev", false)?),
            (HandleKind::Console, self.console()?),
            (HandleKind::AmdCertificates, memory_file(amd)?),
        ];
        if let Some(kernel) = kernel {
            handles.push((HandleKind::Kernel, memory_file(&kernel)?));
        }
        let (kinds, descriptors): (Vec<_>, Vec<_>) = handles.into_iter().unzip();
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let request = VmmRequest::Prepare {
            plan: Box::new(plan),
            handles: kinds,
        };
        ours.send_with(&request, &borrowed)?;
        self.vmm = Some((ours, process));
        self.answer().map(Report::Vmm)
    }

    fn attach(&mut self) -> Outcome {
        let (here, there) = Channel::pair()?;
        self.vmm(&VmmRequest::AttachMover, Some(&there))?;
        here.send(&MoverRequest::Attach)?;
        let reply = here.recv::<Result<MoverReply, RoleError>>(Some(DEADLINE))?;
        let attached = reply.body?;
        let [_memory, exchange] = <[OwnedFd; 2]>::try_from(reply.handles)
            .map_err(|_| fault("attached without memory"))?;
        self.mover = Some(Mover {
            channel: here,
            exchange: File::from(exchange),
        });
        Ok(Report::Mover(attached))
    }

    fn vmm(&self, request: &VmmRequest, beside: Option<&Channel>) -> Result<VmmReply, RoleError> {
        let (channel, _) = self.vmm.as_ref().ok_or_else(|| fault("no VMM"))?;
        let handles: Vec<_> = beside.iter().map(AsFd::as_fd).collect();
        channel.send_with(request, &handles)?;
        self.answer()
    }

    fn answer(&self) -> Result<VmmReply, RoleError> {
        let (channel, _) = self.vmm.as_ref().ok_or_else(|| fault("no VMM"))?;
        loop {
            match channel.recv::<VmmMessage>(Some(DEADLINE))?.body {
                VmmMessage::Reply(reply) => return reply,
                VmmMessage::Event(event) => eprintln!("double-host: {event:?}"),
            }
        }
    }

    fn mover(&self) -> Result<&Mover, RoleError> {
        self.mover.as_ref().ok_or_else(|| fault("no mover"))
    }

    /// A pipe whose other end is collected.
    fn console(&self) -> Result<OwnedFd, RoleError> {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(fault)?;
        let console = Arc::clone(&self.console);
        std::thread::spawn(move || {
            let (mut reader, mut buffer) = (File::from(reader), [0; 4096]);
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                let mut console = console.lock().unwrap_or_else(PoisonError::into_inner);
                console.extend(buffer.iter().take(count));
            }
        });
        Ok(writer)
    }
}

fn memory_file(bytes: &[u8]) -> Result<OwnedFd, RoleError> {
    let file = memfd_create(c"double-host", MFdFlags::MFD_CLOEXEC).map_err(fault)?;
    let file = File::from(file);
    file.write_all_at(bytes, 0).map_err(fault)?;
    Ok(file.into())
}

fn fault(what: impl std::fmt::Display) -> RoleError {
    RoleError::new("HOST", what)
}

const DEADLINE: Duration = Duration::from_secs(60);
