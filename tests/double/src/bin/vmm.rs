//! The child under the double: a small VMM that does what it is asked with the host's own SEV code.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use casemate::confidential::kvm::{
    GuestKind, KvmSev, RealSev, RealSnp, SevDevice, SevError, SnpConfig, SnpFinish, SnpIdBlock,
    SnpInitialised, SnpLaunching, SnpPage, SnpRefused, SnpRunning, VLEK_WRAPPED, create_vm,
};
use casemate::confidential::launch::{Firmware, GuestProtection};
use casemate::confidential::page_map::Conversion;
use casemate::confidential::protocol::PlatformEvidence;
use casemate::confidential::shared::{Access, MemoryLayout, SharedMemory};
use casemate::confidential::{GuestMemoryView, open_real};
use casemate::vmm::protocol::{
    EXCHANGE_SIZE, LaunchBinding, OwnerSession, PACKET_STRIDE, RoleError,
};
use casemate_double::protocol::{
    Answer, Ask, Certificates, Device, Outcome, START, SnpStep, Step, Wrong, read_frame,
    write_frame,
};
use kvm_bindings::{kvm_regs, kvm_sev_cmd, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

fn main() -> io::Result<()> {
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    let mut child = Child::default();
    loop {
        let ask: Ask = match read_frame(&mut input) {
            Ok(ask) => ask,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        let outcome: Outcome = child.serve(ask).map_err(|error| (error.code, error.text));
        write_frame(&mut output, &outcome)?;
        output.flush()?;
    }
}

#[derive(Default)]
struct Child {
    guest: Option<Guest>,
    device: Option<SevDevice>,
}

/// An SNP guest's life; nothing is left of a step that failed.
enum Snp {
    Initialised(SnpInitialised<Arc<VmFd>>),
    Launching(SnpLaunching<Arc<VmFd>>),
    Running(SnpRunning<Arc<VmFd>>),
}

/// Fields go in this order: the vCPU and the protection before the virtual machine.
struct Guest {
    vcpu: Option<VcpuFd>,
    snp: Option<Snp>,
    protection: Option<GuestProtection>,
    vm: Arc<VmFd>,
    memory: SharedMemory,
    exchange: SharedMemory,
}

impl Child {
    fn serve(&mut self, ask: Ask) -> Result<Answer, RoleError> {
        match ask {
            Ask::Attach {
                policy,
                pages,
                amd,
                wrong,
            } => self
                .attach(policy, pages * 4096, amd, wrong)
                .map(|()| Answer::Done),
            Ask::Report { mnonce } => report(mnonce).map(Answer::Bytes),
            Ask::SendFinish { target } => send_finish(target).map(|()| Answer::Done),
            Ask::SnpAttach { pages } => self.attach_snp(pages * 4096).map(|()| Answer::Done),
            Ask::Open => {
                self.device = Some(SevDevice::open()?);
                Ok(Answer::Done)
            }
            Ask::OpenReadOnly => {
                let file = std::fs::File::open("/dev/sev").map_err(fault)?;
                self.device = Some(SevDevice::from(OwnedFd::from(file)));
                Ok(Answer::Done)
            }
            Ask::Device(command) => device(self.device()?, &command),
            Ask::Close => {
                self.guest = None;
                Ok(Answer::Done)
            }
            ask => self
                .guest
                .as_mut()
                .ok_or_else(|| fault("no guest"))?
                .serve(ask),
        }
    }

    fn device(&self) -> Result<&SevDevice, RoleError> {
        self.device
            .as_ref()
            .ok_or_else(|| fault("/dev/sev is not open"))
    }

    fn attach(
        &mut self,
        policy: u32,
        length: u64,
        amd: Vec<u8>,
        wrong: Option<Wrong>,
    ) -> Result<(), RoleError> {
        let kvm = Kvm::new().map_err(fault)?;
        let (vm, initialise) = create_vm(&kvm, GuestKind::of_policy(policy))?;
        let vm = Arc::new(vm);
        let (memory, exchange) = (sealed(length)?, sealed(EXCHANGE_SIZE as u64)?);
        let mut guest = Guest {
            vcpu: None,
            snp: None,
            protection: None,
            vm: vm.clone(),
            memory: SharedMemory::map(memory.as_fd(), length, Access::ReadWrite)?,
            exchange: SharedMemory::map(exchange.as_fd(), EXCHANGE_SIZE as u64, Access::ReadWrite)?,
        };
        guest.give_memory(length)?;
        if wrong == Some(Wrong::VcpuFirst) {
            guest.add_vcpu()?;
        }
        if wrong == Some(Wrong::NoLockedMemory) {
            lock_no_memory()?;
        }
        let path = match wrong {
            Some(Wrong::OtherDevice) => "/dev/null",
            _ => "/dev/sev",
        };
        let device = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|e| RoleError::new("NO_PROCESSOR", e))?;
        let view = GuestMemoryView {
            file: memory.as_fd(),
            runs: &[(0, length)],
        };
        let real = RealSev {
            vm,
            initialise,
            device: device.into(),
            amd,
        };
        guest.protection = Some(open_real(policy, view, exchange.as_fd(), real)?);
        self.guest = Some(guest);
        Ok(())
    }
}

impl Child {
    fn attach_snp(&mut self, length: u64) -> Result<(), RoleError> {
        let kvm = Kvm::new().map_err(fault)?;
        let (vm, _) = create_vm(&kvm, GuestKind::Snp)?;
        let vm = Arc::new(vm);
        let shared = sealed(length)?;
        let exchange = sealed(EXCHANGE_SIZE as u64)?;
        let memory = SharedMemory::map(shared.as_fd(), length, Access::ReadWrite)?;
        let device = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/sev")
            .map_err(|e| RoleError::new("NO_PROCESSOR", e))?;
        let snp = SnpInitialised::attach(RealSnp {
            vm: vm.clone(),
            device: device.into(),
            shared,
            length,
        })?;
        self.guest = Some(Guest {
            vcpu: None,
            snp: Some(Snp::Initialised(snp)),
            protection: None,
            vm,
            memory,
            exchange: SharedMemory::map(exchange.as_fd(), EXCHANGE_SIZE as u64, Access::ReadWrite)?,
        });
        Ok(())
    }
}

impl Guest {
    fn snp(&mut self, step: SnpStep) -> Result<Answer, RoleError> {
        let at = self
            .snp
            .take()
            .ok_or_else(|| fault("the launch has failed"))?;
        self.snp = Some(match (at, step) {
            (Snp::Initialised(guest), SnpStep::Start { policy, gosvw }) => {
                Snp::Launching(guest.start(policy, gosvw)?)
            }
            (Snp::Launching(guest), SnpStep::Update { gpa, content, page }) => {
                match guest.update(gpa, &content, page_kind(page)) {
                    Ok(guest) => Snp::Launching(guest),
                    Err(SnpRefused::Cpuid { corrected, .. }) => {
                        return Ok(Answer::Bytes(corrected));
                    }
                    Err(SnpRefused::Other(error)) => return Err(error.into()),
                }
            }
            (
                Snp::Launching(guest),
                SnpStep::Finish {
                    id,
                    host_data,
                    vcek_disabled,
                },
            ) => Snp::Running(guest.finish(&SnpFinish {
                id: id.map(id_block).transpose()?,
                host_data,
                vcek_disabled,
            })?),
            (Snp::Running(mut guest), step) => {
                let outcome = running(&mut guest, step);
                // A wish that is refused does not harm the guest.
                self.snp = Some(Snp::Running(guest));
                return outcome;
            }
            _ => return Err(fault("not this step's turn")),
        });
        Ok(Answer::Done)
    }

    fn serve(&mut self, ask: Ask) -> Result<Answer, RoleError> {
        match ask {
            Ask::AddVcpu => self.add_vcpu().map(|()| Answer::Done),
            Ask::Write { gpa, bytes } => {
                self.memory.write(gpa, &bytes)?;
                Ok(Answer::Done)
            }
            Ask::Read { gpa, length } => {
                let mut bytes = vec![0; usize::try_from(length).map_err(fault)?];
                self.memory.read(gpa, &mut bytes)?;
                Ok(Answer::Bytes(bytes))
            }
            Ask::Step(step) => self.step(step),
            Ask::Run { outputs } => self.run(outputs),
            Ask::Snp(step) => self.snp(step),
            Ask::HostAddress { gpa } => {
                let address = self.memory.host_address(gpa, 1)?;
                Ok(Answer::Bytes(address.to_le_bytes().to_vec()))
            }
            Ask::Raw {
                id,
                pad0,
                sev_fd,
                data,
            } => Ok(self.raw(id, pad0, sev_fd, data)),
            Ask::SaveRegisters => self.save().map(Answer::Bytes),
            Ask::RestoreRegisters { bytes } => self.restore(&bytes).map(|()| Answer::Done),
            _ => Err(fault("not a request to a guest")),
        }
    }

    fn step(&mut self, step: Step) -> Result<Answer, RoleError> {
        let protection = self
            .protection
            .as_mut()
            .ok_or_else(|| fault("unprotected"))?;
        match step {
            Step::LaunchStart { session } => {
                let session = session.map(|(certificate, blob)| OwnerSession { certificate, blob });
                protection.launch_start(&LaunchBinding {
                    session,
                    ..LaunchBinding::default()
                })?;
            }
            Step::LaunchUpdate { gpa, length } => protection.launch_update(gpa, length)?,
            Step::LaunchMeasure => {
                // Of a SEV guest nothing: its registers are not measured.
                protection.launch_vcpus(&[])?;
                let measured = protection
                    .launch_measure()?
                    .ok_or_else(|| fault("no measurement"))?;
                return Ok(Answer::Measured {
                    blob: measured.blob,
                    api: measured.api,
                    policy: measured.policy,
                });
            }
            Step::LaunchSecret {
                header,
                ciphertext,
                gpa,
            } => protection.launch_secret(&header, &ciphertext, gpa)?,
            Step::LaunchFinish => drop(protection.launch_finish()?),
            Step::Evidence => {
                let PlatformEvidence { pdh, platform, amd } = protection.evidence()?;
                return Ok(Answer::Certificates((pdh, platform, amd)));
            }
            Step::SendStart { target } => {
                let (pdh, platform, amd) = target;
                let (policy, pdh, session) =
                    protection.send_start(&PlatformEvidence { pdh, platform, amd })?;
                return Ok(Answer::Sending(policy, pdh, session));
            }
            Step::SendPages { gpas } => {
                protection.send_pages(&gpas)?;
                let mut packets = vec![0; gpas.len() * PACKET_STRIDE];
                self.exchange.read(0, &mut packets)?;
                return Ok(Answer::Bytes(packets));
            }
            Step::SendFinish => protection.send_finish()?,
            Step::SendCancel => protection.send_cancel()?,
            Step::ReceiveStart {
                policy,
                pdh,
                session,
            } => protection.receive_start(policy, &pdh, &session)?,
            Step::ReceivePages { gpas, packets } => {
                self.exchange.write(0, &packets)?;
                protection.receive_pages(&gpas)?;
            }
            Step::ReceiveFinish => protection.receive_finish()?,
            Step::Decommission => protection.decommission(),
        }
        Ok(Answer::Done)
    }

    #[expect(unsafe_code, reason = "a memory slot names this process's memory")]
    fn give_memory(&self, length: u64) -> Result<(), RoleError> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: length,
            userspace_addr: self.memory.host_address(0, length)?,
        };
        // SAFETY: the mapping is as long as the slot, and is dropped after the virtual machine.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(fault)
    }

    fn add_vcpu(&mut self) -> Result<(), RoleError> {
        let vcpu = self.vm.create_vcpu(0).map_err(fault)?;
        let mut special = vcpu.get_sregs().map_err(fault)?;
        (special.cs.base, special.cs.selector) = (0, 0);
        vcpu.set_sregs(&special).map_err(fault)?;
        let registers = kvm_regs {
            rip: START,
            rflags: 2,
            ..kvm_regs::default()
        };
        vcpu.set_regs(&registers).map_err(fault)?;
        self.vcpu = Some(vcpu);
        Ok(())
    }

    /// A command past the code under test; its structure is the answer, behind errno and firmware code.
    fn raw(&self, id: u32, pad0: u32, sev_fd: u32, mut data: Vec<u8>) -> Answer {
        let mut command = kvm_sev_cmd {
            id,
            pad0,
            data: if data.is_empty() {
                0
            } else {
                data.as_mut_ptr() as u64
            },
            sev_fd,
            ..kvm_sev_cmd::default()
        };
        let outcome = self.vm.encrypt_op_sev(&mut command);
        let errno = outcome.map_or_else(|error| error.errno(), |()| 0);
        let mut answer = errno.to_le_bytes().to_vec();
        answer.extend_from_slice(&command.error.to_le_bytes());
        answer.append(&mut data);
        Answer::Bytes(answer)
    }

    fn vcpu(&mut self) -> Result<&mut VcpuFd, RoleError> {
        self.vcpu.as_mut().ok_or_else(|| fault("no vCPU"))
    }

    fn run(&mut self, outputs: u32) -> Result<Answer, RoleError> {
        let vcpu = self.vcpu()?;
        let mut bytes = Vec::new();
        while bytes.len() < outputs as usize {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(0x3f8, data)) => bytes.extend_from_slice(data),
                Ok(exit) => return Err(fault(format!("unexpected exit {exit:?}"))),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(fault(error)),
            }
        }
        // Completes the instruction behind the last exit.
        vcpu.set_kvm_immediate_exit(1);
        let _ = vcpu.run();
        vcpu.set_kvm_immediate_exit(0);
        Ok(Answer::Bytes(bytes))
    }

    fn save(&mut self) -> Result<Vec<u8>, RoleError> {
        let vcpu = self.vcpu()?;
        let registers = (
            vcpu.get_regs().map_err(fault)?,
            vcpu.get_sregs().map_err(fault)?,
        );
        postcard::to_stdvec(&registers).map_err(fault)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), RoleError> {
        let (general, special): (kvm_regs, kvm_sregs) =
            postcard::from_bytes(bytes).map_err(fault)?;
        let vcpu = self.vcpu()?;
        vcpu.set_sregs(&special).map_err(fault)?;
        vcpu.set_regs(&general).map_err(fault)
    }
}

fn device(device: &SevDevice, command: &Device) -> Result<Answer, RoleError> {
    let text = |value: &dyn std::fmt::Debug| Answer::Text(format!("{value:?}"));
    Ok(match command {
        Device::Status => text(&device.status()?),
        Device::Export => {
            let certificates = device.pdh_cert_export()?;
            Answer::Certificates((certificates.pdh, certificates.chain, Vec::new()))
        }
        Device::PekCsr => Answer::Bytes(device.pek_csr()?),
        Device::PekCertImport { pek, oca } => done(device.pek_cert_import(pek, oca))?,
        Device::PekGen => done(device.pek_gen())?,
        Device::PdhGen => done(device.pdh_gen())?,
        Device::FactoryReset => done(device.factory_reset())?,
        Device::ChipId => Answer::Bytes(device.chip_id()?),
        Device::SnpStatus => text(&device.snp_status()?),
        Device::SnpSetConfig { tcb, id, key } => done(device.snp_set_config(SnpConfig {
            reported_tcb: *tcb,
            mask_chip_id: *id,
            mask_chip_key: *key,
        }))?,
        Device::SnpCommit => done(device.snp_commit())?,
        Device::SnpVlekLoad { wrapped } => {
            let wrapped = <[u8; VLEK_WRAPPED]>::try_from(&wrapped[..])
                .map_err(|_| fault("a wrapped VLEK has 432 bytes"))?;
            done(device.snp_vlek_load(&wrapped))?
        }
    })
}

/// What the VMM's own interface has no word for: SEV's attestation report.
fn report(mnonce: [u8; 16]) -> Result<Vec<u8>, RoleError> {
    Ok(unguarded()?.attestation_report(mnonce)?)
}

/// What it issues only when nobody listens any more: SEND_FINISH.
fn send_finish((pdh, platform, amd): Certificates) -> Result<(), RoleError> {
    let mut sev = unguarded()?;
    sev.send_start(&PlatformEvidence { pdh, platform, amd })?;
    sev.send_finish()
}

/// A launched SEV guest of one empty page.
fn unguarded() -> Result<KvmSev<Arc<VmFd>>, RoleError> {
    let kvm = Kvm::new().map_err(fault)?;
    let (vm, initialise) = create_vm(&kvm, GuestKind::Sev)?;
    let (memory, exchange) = (sealed(4096)?, sealed(EXCHANGE_SIZE as u64)?);
    let device = std::fs::File::open("/dev/sev").map_err(fault)?;
    let real = RealSev {
        vm: Arc::new(vm),
        initialise,
        device: device.into(),
        amd: Vec::new(),
    };
    let layout = MemoryLayout::packed(&[(0, 4096)])?;
    let mut sev = KvmSev::attach(real, 1, memory.as_fd(), layout, exchange.as_fd())?;
    sev.launch_start(&LaunchBinding::default())?;
    sev.launch_update(0, 4096)?;
    sev.launch_measure()?;
    sev.launch_finish()?;
    let status = sev.guest_status()?;
    if (status.policy, status.state) != (1, 3) {
        return Err(fault(format!("{status:?}")));
    }
    Ok(sev)
}

fn running(guest: &mut SnpRunning<Arc<VmFd>>, step: SnpStep) -> Result<Answer, RoleError> {
    let wish = match step {
        SnpStep::Hypercall { number, arguments } => Conversion::of_hypercall(number, &arguments),
        SnpStep::MemoryFault { flags, gpa, size } => Conversion::of_memory_fault(flags, gpa, size),
        SnpStep::PrivatePages => {
            let pages = guest.pages().private_pages();
            return Ok(Answer::Bytes(pages.flat_map(u64::to_le_bytes).collect()));
        }
        _ => return Err(fault("the guest runs already")),
    };
    let wish = wish.map_err(|error| RoleError::new("BAD_CONVERSION", error))?;
    done(guest.convert(wish))
}

fn page_kind(page: u8) -> SnpPage {
    match page {
        0 => SnpPage::Normal,
        1 => SnpPage::Zero,
        2 => SnpPage::Unmeasured,
        3 => SnpPage::Secrets,
        _ => SnpPage::Cpuid,
    }
}

fn id_block((block, auth, author_key): (Vec<u8>, Vec<u8>, bool)) -> Result<SnpIdBlock, RoleError> {
    let wrong = |_| fault("an ID block has 96 bytes, its authentication 4096");
    Ok(SnpIdBlock {
        block: block.try_into().map_err(wrong)?,
        auth: Box::new(auth.try_into().map_err(wrong)?),
        author_key,
    })
}

fn done(outcome: Result<(), SevError>) -> Result<Answer, RoleError> {
    Ok(outcome.map(|()| Answer::Done)?)
}

/// Memory that cannot shrink, as the VMM makes it.
fn sealed(length: u64) -> Result<OwnedFd, RoleError> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = memfd_create("double-guest", flags).map_err(fault)?;
    let size = i64::try_from(length).map_err(fault)?;
    nix::unistd::ftruncate(file.as_fd(), size).map_err(fault)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals)).map_err(fault)?;
    Ok(file)
}

/// As a jailed VMM without a limit for its guest's memory: no capability, one page.
fn lock_no_memory() -> Result<(), RoleError> {
    use nix::sys::resource::{Resource, setrlimit};
    setrlimit(Resource::RLIMIT_MEMLOCK, 4096, 4096).map_err(fault)?;
    if nix::unistd::geteuid().is_root() {
        let nobody = nix::unistd::Uid::from_raw(65534);
        nix::unistd::setresuid(nobody, nobody, nobody).map_err(fault)?;
    }
    Ok(())
}

fn fault(what: impl std::fmt::Display) -> RoleError {
    RoleError::new("CHILD", what)
}
