//! One guest on this host: its process, its resources, and what is known of it.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::agent::api::{AttachedInfo, CardInfo, DeviceName, Failure, GuestInfo};
use crate::agent::files;
use crate::agent::mover_process::MoverProcess;
use crate::agent::serial::{SerialConsole, VmmEnds};
use crate::agent::tap;
use crate::agent::vmm_process::{VmmProcess, lock};
use crate::machine::cpu::{CpuBaseline, CpuModel};
use crate::machine::plan::{MachinePlan, NetPlan};
use crate::machine::spec::BootSpec;
use crate::vmm::protocol::{HandleKind, MachineState, Measurement, VmmReply, VmmRequest};
use crate::vmm::vcpu::model;

/// A guest whose VMM runs.
pub struct Guest {
    /// What it is, as it was made.
    pub plan: MachinePlan,
    /// The same with what has been changed since.
    pub changed: Mutex<MachinePlan>,
    /// Its process.
    pub vmm: VmmProcess,
    /// Ownership epoch.
    pub epoch: Mutex<u64>,
    /// The measurement, while its owner has not answered.
    pub measurement: Mutex<Option<Measurement>>,
    /// The mover of the migration that is under way, if one is.
    pub mover: Mutex<Option<Arc<MoverProcess>>>,
    /// Its serial console.
    pub serial: Arc<SerialConsole>,
    /// Where the console's output goes.
    pub console: PathBuf,
    /// The vsock device's Unix socket; removed with the guest.
    pub vsock: Option<PathBuf>,
    /// What it was given of this host.
    pub local: Mutex<Local>,
    /// It is being asked to let go of a device.
    pub detaching: AtomicBool,
    /// The virtio console's Unix socket; removed with the guest.
    pub terminal: Option<PathBuf>,
    /// From the request to the running (or measured) guest.
    pub launch_us: Mutex<Option<u64>>,
    /// CPU time of its VMM up to the first instruction of a launch.
    pub start_cpu_us: Mutex<Option<u64>>,
}

impl Guest {
    /// What is known of it.
    pub fn info(&self) -> Result<GuestInfo, Failure> {
        match self.vmm.call(&VmmRequest::Status, &[]) {
            Ok(VmmReply::Status(status)) => Ok(GuestInfo {
                stopped: status.stopped,
                device_faults: status.device_faults,
                disks: status.disks,
                ..self.info_in(status.state)
            }),
            Ok(_) => Err(Failure::new("VMM_GONE", "the VMM answered something else")),
            // The guest is to be seen and stopped all the same, and hides no other.
            Err(failure) if ["VMM_GONE", "VMM_SILENT"].contains(&failure.code.as_str()) => {
                Ok(self.info_in(MachineState::Lost))
            }
            Err(failure) => Err(failure),
        }
    }

    /// What goes along in a move or a snapshot.
    pub fn plan_now(&self) -> MachinePlan {
        lock(&self.changed).clone()
    }

    /// What was attached while it ran, and what each is on this host.
    fn attached(&self) -> Vec<AttachedInfo> {
        let (plan, local) = (self.plan_now(), lock(&self.local).clone());
        let sources = |device: &DeviceName| match device {
            DeviceName::Disk(id) => {
                let at = plan.disks.iter().position(|d| d.id == *id)?;
                Some(local.disks.get(at)?.display().to_string())
            }
            DeviceName::Net(id) => {
                let at = plan.nets.iter().position(|n| n.id == *id)?;
                Some(local.taps.get(at)?.tap.clone())
            }
            DeviceName::Balloon | DeviceName::Console => None,
        };
        let plugged = plan.hotplug.plugged.iter();
        let infos = plugged.map(|one| AttachedInfo {
            slot: one.slot,
            source: sources(&one.device).unwrap_or_default(),
            device: one.device.clone(),
        });
        infos.collect()
    }

    /// The same, without asking the VMM.
    pub fn info_in(&self, state: MachineState) -> GuestInfo {
        let attached = self.attached();
        let taken = u8::try_from(attached.len()).unwrap_or(u8::MAX);
        GuestInfo {
            free_slots: self.plan.hotplug.slots.saturating_sub(taken),
            attached,
            name: self.plan.name.clone(),
            vm_id: hex::encode(self.plan.vm_id),
            state,
            technology: self.plan.technology.name().to_owned(),
            emulated: self.plan.technology.emulated(),
            vcpus: self.plan.vcpus,
            cpu: self.plan.cpu.model,
            stopped: None,
            memory_mib: self.plan.memory_bytes >> 20,
            epoch: *lock(&self.epoch),
            pid: self.vmm.pid(),
            vmm_version: self.vmm.version(),
            console: self.console.clone(),
            vsock: self.vsock.clone(),
            vsock_cid: self.plan.vsock_cid,
            nets: self.plan.nets.iter().map(card).collect(),
            terminal: self.terminal.clone(),
            device_faults: 0,
            disks: Vec::new(),
            launch_us: *lock(&self.launch_us),
            start_cpu_us: *lock(&self.start_cpu_us),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.vmm.kill();
        for path in [&self.vsock, &self.terminal].into_iter().flatten() {
            // Already gone is just as good.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Names of the local resources a guest was given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Local {
    /// Images of its disks.
    pub disks: Vec<PathBuf>,
    /// Taps of its cards.
    pub taps: Vec<TapChoice>,
}

/// The local resources a guest is given; opened by the agent, handed over as descriptors.
pub struct Resources {
    handles: Vec<(HandleKind, OwnedFd)>,
    local: Local,
    serial: Arc<SerialConsole>,
    /// Where the console's output goes.
    pub console: PathBuf,
    /// The vsock device's Unix socket.
    pub vsock: Option<PathBuf>,
    /// The virtio console's Unix socket.
    pub terminal: Option<PathBuf>,
}

/// A local tap for one network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapChoice {
    /// Name of the tap device.
    pub tap: String,
    /// Bridge it is put on.
    pub bridge: Option<String>,
}

impl Resources {
    /// The disks by name, and what the opened files are.
    pub fn disks<'a>(
        &'a self,
        plan: &'a MachinePlan,
    ) -> impl Iterator<Item = (&'a str, std::io::Result<std::fs::Metadata>)> {
        self.handles.iter().filter_map(|(kind, file)| {
            let HandleKind::Disk(number) = kind else {
                return None;
            };
            let disk = plan.disks.get(usize::from(*number))?;
            let file = file.try_clone().map(File::from);
            Some((disk.id.as_str(), file.and_then(|file| file.metadata())))
        })
    }

    /// Opens everything but the boot files.
    pub fn open(
        plan: &MachinePlan,
        folder: &Path,
        disks: &[&Path],
        taps: &[TapChoice],
        processor: Vec<(HandleKind, OwnedFd)>,
    ) -> Result<Self, Failure> {
        std::fs::create_dir_all(folder).map_err(|e| unusable(folder, &e))?;
        let mut handles = vec![(HandleKind::Kvm, open_kvm()?)];
        let console = folder.join("console.log");
        let (serial, ends) = open_console(&console)?;
        handles.push((HandleKind::Console, ends.output));
        handles.push((HandleKind::ConsoleInput, ends.input));
        for (number, (path, disk)) in (0u8..).zip(disks.iter().zip(&plan.disks)) {
            let file = files::open(path, !disk.read_only);
            handles.push((
                HandleKind::Disk(number),
                file.map_err(|e| unusable(path, &e))?.into(),
            ));
        }
        for (card, (choice, net)) in (0u8..).zip(taps.iter().zip(&plan.nets)) {
            let queues = tap::open_queues(&choice.tap, choice.bridge.as_deref(), net.queues)
                .map_err(|e| Failure::new("TAP", e.to_string()))?;
            let pairs = (0..).zip(queues);
            handles.extend(pairs.map(|(pair, queue)| (HandleKind::Tap { card, pair }, queue)));
        }
        let vsock = plan.vsock_cid.map(|_| folder.join("vsock.sock"));
        if let Some(path) = &vsock {
            handles.push((HandleKind::VsockListener, listen(path)?));
        }
        let terminal = plan.small.console.map(|_| folder.join("console.sock"));
        if let Some(path) = &terminal {
            handles.push((HandleKind::ConsoleListener, listen(path)?));
        }
        handles.extend(processor);
        let local = Local {
            disks: disks.iter().map(|path| path.to_path_buf()).collect(),
            taps: taps.to_vec(),
        };
        Ok(Self {
            handles,
            local,
            serial,
            console,
            vsock,
            terminal,
        })
    }

    /// Adds kernel and initramfs, for a launch.
    pub fn with_boot(mut self, boot: &BootSpec) -> Result<Self, Failure> {
        let kinds = match boot {
            BootSpec::Kernel(_) => &[HandleKind::Kernel, HandleKind::Initrd][..],
            BootSpec::Firmware(_) => &[HandleKind::Firmware],
            BootSpec::Measured(..) => {
                &[HandleKind::Firmware, HandleKind::Kernel, HandleKind::Initrd]
            }
        };
        for (kind, path) in kinds.iter().copied().zip(boot.files()) {
            self.handles.push((
                kind,
                files::open(path, false)
                    .map_err(|e| unusable(path, &e))?
                    .into(),
            ));
        }
        Ok(self)
    }

    /// Adds the way to let it run before its memory is there.
    pub fn with_faults(mut self) -> Result<Self, Failure> {
        let path = Path::new("/dev/userfaultfd");
        let device = OpenOptions::new().read(true).write(true).open(path);
        let device = device.map_err(|e| {
            let remedy = "restore with `--memory at-once`, or use Linux 6.1 or newer";
            Failure::new(
                "USERFAULT",
                format!("{} cannot be used: {e}; {remedy}", path.display()),
            )
        })?;
        self.handles.push((HandleKind::Userfault, device.into()));
        Ok(self)
    }

    /// Hands everything to a VMM that was just spawned.
    pub fn prepare(
        self,
        vmm: VmmProcess,
        mut plan: MachinePlan,
        epoch: u64,
    ) -> Result<Arc<Guest>, Failure> {
        let kinds = self.handles.iter().map(|(kind, _)| *kind).collect();
        let fds: Vec<BorrowedFd<'_>> = self.handles.iter().map(|(_, fd)| fd.as_fd()).collect();
        let request = VmmRequest::Prepare {
            plan: Box::new(plan.clone()),
            handles: kinds,
        };
        let VmmReply::Prepared { tsc_khz } = vmm.call(&request, &fds)? else {
            return Err(Failure::new("VMM_GONE", "the VMM answered something else"));
        };
        drop(fds);
        vmm.hold_all(self.handles.into_iter().filter(|h| goes_on(h.0)).collect());
        // From here on the guest's clock is part of what another host must have.
        if let Some(baseline) = plan.cpu.baseline.as_mut().filter(|b| b.tsc_khz == 0) {
            baseline.tsc_khz = tsc_khz;
        }
        let guest = Guest {
            changed: Mutex::new(plan.clone()),
            plan,
            vmm,
            epoch: Mutex::new(epoch),
            measurement: Mutex::new(None),
            mover: Mutex::new(None),
            serial: self.serial,
            console: self.console,
            vsock: self.vsock,
            local: Mutex::new(self.local),
            detaching: AtomicBool::new(false),
            terminal: self.terminal,
            launch_us: Mutex::new(None),
            start_cpu_us: Mutex::new(None),
        };
        Ok(Arc::new(guest))
    }
}

/// Whether another VMM of the guest would need it.
fn goes_on(kind: HandleKind) -> bool {
    matches!(
        kind,
        HandleKind::Console
            | HandleKind::ConsoleInput
            | HandleKind::Disk(_)
            | HandleKind::Tap { .. }
            | HandleKind::VsockListener
            | HandleKind::ConsoleListener
    )
}

fn card(net: &NetPlan) -> CardInfo {
    CardInfo {
        id: net.id.clone(),
        mac: net.mac.map(|byte| format!("{byte:02x}")).join(":"),
        queues: net.queues,
    }
}

/// What a guest of this model is given on this host.
pub fn cpu_baseline(model: CpuModel) -> Result<CpuBaseline, Failure> {
    let refused = |e: kvm_ioctls::Error| Failure::new("KVM_UNAVAILABLE", format!("/dev/kvm: {e}"));
    let kvm = open_kvm().and_then(|_| Kvm::new().map_err(refused))?;
    let supported = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(refused)?;
    model::baseline(model, &supported).map_err(|e| Failure::new("CPU_UNSUPPORTED", e.to_string()))
}

pub(super) fn open_kvm() -> Result<OwnedFd, Failure> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Ok(file.into()),
        Err(e) => {
            let remedy = "load kvm_amd, run the agent as root, and see `casemate doctor`";
            Err(Failure::new(
                "KVM_UNAVAILABLE",
                format!("/dev/kvm cannot be opened: {e}; {remedy}"),
            ))
        }
    }
}

/// The console, with its output in a file.
fn open_console(path: &Path) -> Result<(Arc<SerialConsole>, VmmEnds), Failure> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.and_then(SerialConsole::new)
        .map_err(|e| unusable(path, &e))
}

fn listen(path: &Path) -> Result<OwnedFd, Failure> {
    // A socket left behind by a killed agent is in the way, and nobody listens on it.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(|e| unusable(path, &e))?;
    listener
        .set_nonblocking(true)
        .map_err(|e| unusable(path, &e))?;
    Ok(listener.into())
}

fn unusable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(
        "RESOURCE",
        format!("{} cannot be used: {error}", path.display()),
    )
}
