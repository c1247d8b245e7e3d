//! The kernel's side: which call is whose, and the state of each virtual machine.

mod device;
mod fields;
mod launch;
mod migrate;
mod processor;
mod snp;
mod vm;

pub use launch::vmsa;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};

use casemate_attest::processor::snp::SnpProcessor;
use casemate_attest::processor::{FirmwareError, SecureProcessor};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;

use crate::error::DoubleError;
use crate::filter::ioctl;
use crate::memory::{Caller, PAGE, pages};
use crate::script::Script;
use crate::sys::Call;
use vm::Vm;

/// What a kernel is made of.
pub(crate) struct Parts {
    pub(crate) processor: SecureProcessor,
    pub(crate) device: bool,
    pub(crate) vm_types: u32,
    pub(crate) asids: u32,
    pub(crate) snp: Option<SnpParts>,
}

/// SNP's half of the processor.
pub(crate) struct SnpParts {
    pub(crate) processor: SnpProcessor,
    /// Pages that Linux takes at a time.
    pub(crate) batch: u64,
}

/// The kernel that a child sees.
pub(crate) struct Kernel {
    parts: Parts,
    /// What stands for `/dev/sev`.
    device: OwnedFd,
    vms: BTreeMap<u64, Vm>,
    /// `RLIMIT_MEMLOCK` of processes that have set it.
    memlock: BTreeMap<Pid, u64>,
    pub(crate) script: Script,
    pub(crate) log: Vec<String>,
    pub(crate) complaints: Vec<String>,
}

/// What becomes of a call.
pub(crate) enum Reply {
    /// The real kernel carries it out.
    Pass,
    /// It ends with this.
    End(Result<i64, Errno>),
    /// It ends with this as a new descriptor.
    Inject(OwnedFd),
}

/// Who refuses a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Kernel(Errno),
    Firmware(u32),
    /// The firmware, at SNP_GCTX_CREATE, of which Linux makes ENOTTY.
    NoContext(u32),
}

type Outcome = Result<(), Refusal>;

impl Refusal {
    fn errno(self) -> Errno {
        match self {
            Self::Kernel(errno) => errno,
            Self::Firmware(_) => Errno::EIO,
            Self::NoContext(_) => Errno::ENOTTY,
        }
    }

    fn code(self) -> u32 {
        match self {
            Self::Kernel(_) => 0,
            Self::Firmware(code) | Self::NoContext(code) => code,
        }
    }
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self::Kernel(errno)
    }
}

impl From<FirmwareError> for Refusal {
    fn from(error: FirmwareError) -> Self {
        Self::Firmware(error.code())
    }
}

impl Kernel {
    pub(crate) fn new(parts: Parts) -> Result<Self, DoubleError> {
        let device = memfd_create(DEVICE, MFdFlags::MFD_CLOEXEC)
            .map_err(DoubleError::system("memfd_create"))?;
        Ok(Self {
            parts,
            device,
            vms: BTreeMap::new(),
            memlock: BTreeMap::new(),
            script: Script::default(),
            log: Vec::new(),
            complaints: Vec::new(),
        })
    }

    /// Guests that the firmware holds.
    pub(crate) fn guests(&self) -> u32 {
        let snp = self.parts.snp.as_ref();
        let snp = snp.map_or(0, |snp| snp.processor.status().guest_count);
        self.parts.processor.status().guest_count + snp
    }

    /// SNP's half of the processor.
    pub(crate) fn snp(&mut self) -> Option<&mut SnpProcessor> {
        self.parts.snp.as_mut().map(|snp| &mut snp.processor)
    }

    /// `KVM_CREATE_VM` of a type that is not the default one.
    pub(crate) fn create_vm(&mut self, vm_type: u32) -> Result<(), Errno> {
        let known = vm_type < 32 && self.parts.vm_types & (1 << vm_type) != 0;
        let outcome = if known {
            self.script.kernel("KVM_CREATE_VM")
        } else {
            Err(Errno::EINVAL)
        };
        self.note(
            &format!("KVM_CREATE_VM type={vm_type}"),
            &outcome.map_err(Refusal::from),
        );
        outcome
    }

    pub(crate) fn created_vm(&mut self, owner: Pid, descriptor: u64, vm_type: u32) {
        self.vms.insert(descriptor, Vm::new(owner, vm_type));
    }

    /// A thread is gone; with the last of a process go its machines.
    pub(crate) fn ended(&mut self, thread: Pid) {
        let gone = |(descriptor, vm): (&u64, &Vm)| (vm.owner == thread).then_some(*descriptor);
        let descriptors: Vec<u64> = self.vms.iter().filter_map(gone).collect();
        for descriptor in descriptors {
            self.destroyed(descriptor);
        }
    }

    /// Answers a call of the child.
    pub(crate) fn answer(&mut self, call: &Call) -> Reply {
        let caller = Caller {
            pid: call.pid,
            memlock: self.memlock.get(&call.pid).copied(),
        };
        let [first, second, third, ..] = call.args;
        match call.number {
            libc::SYS_openat => self.open(caller, second, third),
            libc::SYS_open => self.open(caller, first, second),
            libc::SYS_prlimit64 => Reply::End(self.limit_locked_memory(caller, third).map(|()| 0)),
            libc::SYS_close => {
                self.closed(caller, first);
                Reply::Pass
            }
            _ => self.ioctl(caller, first, second as u32, third),
        }
    }

    fn open(&mut self, caller: Caller, path: u64, flags: u64) -> Reply {
        if caller.path(path).as_deref() != Some("/dev/sev") {
            return Reply::Pass;
        }
        let mode = i32::try_from(flags).unwrap_or(0) & libc::O_ACCMODE;
        let writable = mode != libc::O_RDONLY;
        let opened = if self.parts.device {
            self.script.kernel("open")
        } else {
            Err(Errno::ENOENT)
        };
        let what = format!("open /dev/sev {}", if writable { "rw" } else { "ro" });
        self.note(&what, &opened.map_err(Refusal::from));
        let fresh = opened.and_then(|()| {
            // The device anew, with the permissions that were asked for.
            let path = format!("/proc/self/fd/{}", self.device.as_raw_fd());
            let file = OpenOptions::new().read(true).write(writable).open(path);
            file.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
        });
        match fresh {
            Ok(file) => Reply::Inject(file.into()),
            Err(errno) => Reply::End(Err(errno)),
        }
    }

    fn ioctl(&mut self, caller: Caller, descriptor: u64, command: u32, argument: u64) -> Reply {
        if command == ioctl::SEV_ISSUE_CMD {
            if !is_device(caller, descriptor) {
                return Reply::Pass;
            }
            return end(self.device_ioctl(caller, descriptor, argument));
        }
        if command == ioctl::KVM_CHECK_EXTENSION {
            return self.check_extension(argument);
        }
        if command == ioctl::KVM_GET_SUPPORTED_CPUID {
            return self.supported_cpuid(caller, descriptor, argument);
        }
        // Whatever else the number may mean to another kind of file is the real kernel's business.
        if caller.descriptor(descriptor).as_deref() != Some("anon_inode:kvm-vm") {
            return Reply::Pass;
        }
        let mut vm = self
            .vms
            .remove(&descriptor)
            .unwrap_or_else(|| Vm::new(caller.pid, kvm_bindings::KVM_X86_DEFAULT_VM));
        let reply = match command {
            ioctl::KVM_CREATE_VCPU => {
                vm.vcpus += 1;
                self.note("KVM_CREATE_VCPU", &Ok(()));
                Reply::Pass
            }
            ioctl::KVM_MEMORY_ENCRYPT_OP => end(self.encrypt_op(&mut vm, caller, argument)),
            ioctl::KVM_MEMORY_ENCRYPT_REG_REGION => end(self.register(&mut vm, caller, argument)),
            ioctl::KVM_MEMORY_ENCRYPT_UNREG_REGION => {
                end(self.unregister(&mut vm, caller, argument))
            }
            _ if vm.vm_type != kvm_bindings::KVM_X86_SNP_VM => Reply::Pass,
            ioctl::KVM_CREATE_GUEST_MEMFD => self.create_guest_memfd(caller, argument),
            ioctl::KVM_SET_USER_MEMORY_REGION2 => self.set_region(&mut vm, caller, argument),
            ioctl::KVM_SET_MEMORY_ATTRIBUTES => end(self.set_attributes(&mut vm, caller, argument)),
            _ => Reply::Pass,
        };
        self.vms.insert(descriptor, vm);
        reply
    }

    fn check_extension(&mut self, capability: u64) -> Reply {
        if capability != u64::from(kvm_bindings::KVM_CAP_VM_TYPES) {
            return Reply::Pass;
        }
        let types = i64::from(self.parts.vm_types);
        self.note("KVM_CHECK_EXTENSION KVM_CAP_VM_TYPES", &Ok(()));
        Reply::End(Ok(types))
    }

    /// `setrlimit(RLIMIT_MEMLOCK)`, on a host whose root may raise it; here it may not be.
    fn limit_locked_memory(&mut self, caller: Caller, limit: u64) -> Result<(), Errno> {
        let limit = fields::Fields::read(caller, limit, 16)?;
        self.memlock.insert(caller.pid, limit.u64(0));
        Ok(())
    }

    /// `sev_mem_enc_register_region`.
    fn register(&mut self, vm: &mut Vm, caller: Caller, argument: u64) -> Outcome {
        let name = "KVM_MEMORY_ENCRYPT_REG_REGION";
        let region = caller.read(argument, 16)?;
        let word = |at: usize| {
            let bytes = region.get(at..at + 8).and_then(|part| part.try_into().ok());
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        let (address, size) = (word(0), word(8));
        let outcome = self
            .script
            .kernel(name)
            .map_err(Refusal::from)
            .and_then(|()| {
                vm.require_sev()?;
                vm.pin(caller, address, size, true)?;
                vm.regions.push((address, size));
                Ok(())
            });
        if address % PAGE != 0 || size % PAGE != 0 {
            self.complain(name, "a region is not made of whole pages");
        }
        self.note(&format!("{name} pages={}", size.div_ceil(PAGE)), &outcome);
        outcome
    }

    /// `sev_mem_enc_unregister_region`.
    fn unregister(&mut self, vm: &mut Vm, caller: Caller, argument: u64) -> Outcome {
        let name = "KVM_MEMORY_ENCRYPT_UNREG_REGION";
        let region = fields::Fields::read(caller, argument, 16)?;
        let region = (region.u64(0), region.u64(8));
        let outcome = vm.require_sev().and_then(|()| {
            let found = vm.regions.iter().position(|known| *known == region);
            let index = found.ok_or(Errno::EINVAL)?;
            vm.regions.swap_remove(index);
            vm.locked -= pages(region.0, region.1);
            Ok(())
        });
        self.note(name, &outcome);
        outcome
    }

    /// A descriptor goes; with a virtual machine goes its guest (`sev_vm_destroy`).
    fn closed(&mut self, caller: Caller, descriptor: u64) {
        if !self.vms.contains_key(&descriptor)
            || caller.descriptor(descriptor).as_deref() != Some("anon_inode:kvm-vm")
        {
            return;
        }
        self.destroyed(descriptor);
    }

    fn destroyed(&mut self, descriptor: u64) {
        let Some(vm) = self.vms.remove(&descriptor) else {
            return;
        };
        if let Some(handle) = vm.handle {
            let gone = self.parts.processor.decommission(handle);
            self.note("close vm: DECOMMISSION", &gone.map_err(Refusal::from));
        }
        if let Some(handle) = vm.snp.handle {
            self.snp_decommission(handle);
            self.note("close vm: SNP_DECOMMISSION", &Ok(()));
        }
    }

    /// The firmware's turn at a command (`sev_issue_cmd`), after the kernel's own checks.
    fn firmware<T>(
        &mut self,
        command: &str,
        act: impl FnOnce(&mut SecureProcessor) -> Result<T, FirmwareError>,
    ) -> Result<T, Refusal> {
        self.script.firmware(command).map_err(Refusal::Firmware)?;
        Ok(act(&mut self.parts.processor)?)
    }

    fn note(&mut self, what: &str, outcome: &Outcome) {
        self.log.push(match outcome {
            Ok(()) => what.to_owned(),
            Err(Refusal::Kernel(errno)) => format!("{what} -> {errno:?}"),
            Err(refusal) => {
                let (errno, code) = (refusal.errno(), refusal.code());
                format!("{what} -> {errno:?}, firmware {code:#x}")
            }
        });
    }

    fn complain(&mut self, command: &str, what: &str) {
        self.complaints.push(format!("{command}: {what}"));
    }
}

fn end(outcome: Outcome) -> Reply {
    Reply::End(outcome.map(|()| 0).map_err(Refusal::errno))
}

/// Whether a descriptor is the double's `/dev/sev`.
fn is_device(caller: Caller, descriptor: u64) -> bool {
    let name = caller.descriptor(descriptor).unwrap_or_default();
    name.starts_with(&format!("/memfd:{DEVICE}"))
}

/// Name of the memory file that stands for `/dev/sev`.
const DEVICE: &str = "casemate-double-sev";
