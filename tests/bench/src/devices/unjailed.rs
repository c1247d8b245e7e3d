//! Casemate's VMM without its jail, Landlock and filters: what the sandbox costs is the difference.
//!
//! It exists in this benchmark only. The program starts itself again with the guest's files as arguments and calls the
//! VMM's own role with hooks that confine nothing; the product has no such switch.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use casemate::agent::tap;
use casemate::ipc::Channel;
use casemate::machine::plan::{DiskPlan, MachinePlan, NetPlan, Technology};
use casemate::vmm::hooks::Hooks;
use casemate::vmm::protocol::{HandleKind, VmmMessage, VmmReply, VmmRequest};
use casemate::vmm::{models, role};

use super::net::{MAC_BYTES, TAP};
use super::vmm::{Guest, MEMORY_MIB, VCPUS, cmdline, figures};

/// Runs one guest in a process of its own until it has said its figures.
pub fn run(guest: &Guest) -> Result<String> {
    let _ = fs::remove_file(&guest.console);
    let own = std::env::current_exe().context("find this program")?;
    let mut child = Command::new(own)
        .arg(WORD)
        .args([&guest.kernel, &guest.initrd, &guest.disk, &guest.console])
        .stdin(Stdio::null())
        .spawn()
        .context("start the VMM")?;
    let said = figures(&guest.console);
    let _ = child.kill();
    let _ = child.wait();
    said
}

/// The VMM, if that is what this process was started for.
pub fn serve() -> Option<Result<()>> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != WORD {
        return None;
    }
    let mut path = || arguments.next().map(PathBuf::from).unwrap_or_default();
    let guest = Guest {
        kernel: path(),
        initrd: path(),
        disk: path(),
        console: path(),
    };
    Some(vmm(&guest))
}

fn vmm(guest: &Guest) -> Result<()> {
    let open = |path: &Path, write: bool| -> Result<OwnedFd> {
        let file = OpenOptions::new().read(true).write(write).open(path);
        Ok(file
            .with_context(|| format!("open {}", path.display()))?
            .into())
    };
    let handles = [
        (HandleKind::Kvm, open(Path::new("/dev/kvm"), true)?),
        (
            HandleKind::Console,
            File::create(&guest.console)
                .context("make the console's file")?
                .into(),
        ),
        (HandleKind::Kernel, open(&guest.kernel, false)?),
        (HandleKind::Initrd, open(&guest.initrd, false)?),
        (HandleKind::Disk(0), open(&guest.disk, true)?),
        (HandleKind::Tap { card: 0, pair: 0 }, tap::open(TAP, None)?),
    ];
    let (agent, other) = Channel::pair().context("make a channel")?;
    // Its answers end with it: a role that fails is seen as a channel that closes.
    let role = std::thread::spawn(move || role::run(other, hooks()));
    let (kinds, descriptors): (Vec<_>, Vec<_>) = handles.into_iter().unzip();
    let borrowed: Vec<_> = descriptors.iter().map(|fd| fd.as_fd()).collect();
    let prepare = VmmRequest::Prepare {
        plan: Box::new(plan()),
        handles: kinds,
    };
    agent.send_with(&prepare, &borrowed)?;
    answer(&agent)?;
    let binding = Box::default();
    for request in [VmmRequest::Launch { binding }, VmmRequest::Run] {
        agent.send(&request)?;
        answer(&agent)?;
    }
    // Until it is killed, or its guest ends it.
    role.join()
        .map_err(|_| anyhow::anyhow!("the VMM panicked"))?
        .context("the VMM")
}

fn answer(agent: &Channel) -> Result<VmmReply> {
    match agent.recv::<VmmMessage>(Some(PATIENCE))?.body {
        VmmMessage::Reply(answer) => Ok(answer?),
        VmmMessage::Event(event) => bail!("{event:?}"),
    }
}

fn plan() -> MachinePlan {
    MachinePlan {
        name: "devices".into(),
        vm_id: [7; 16],
        vcpus: VCPUS,
        cpu: Default::default(),
        memory_bytes: MEMORY_MIB << 20,
        firmware: None,
        cmdline: cmdline(),
        technology: Technology::None,
        disks: vec![DiskPlan {
            id: "data".into(),
            format: Default::default(),
            io: Default::default(),
            read_only: false,
            limits: Default::default(),
        }],
        nets: vec![NetPlan {
            queues: 1,
            id: "net0".into(),
            mac: MAC_BYTES,
            announce: Vec::new(),
            limits: Default::default(),
        }],
        vsock_cid: None,
        small: Default::default(),
        hotplug: Default::default(),
    }
}

/// Everything a sandbox would do, left out.
fn hooks() -> Hooks {
    Hooks {
        confine_process: || Ok(()),
        confine_thread: |_| Ok(()),
        reopen_read_only: reopen,
        probe: || Err("no sandbox in this benchmark".into()),
        report: || Err("no sandbox in this benchmark".into()),
        devices: models::from_plan,
        protection: casemate::confidential::protection,
    }
}

fn reopen(file: BorrowedFd<'_>) -> Result<OwnedFd, String> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map(OwnedFd::from)
        .map_err(|e| e.to_string())
}

/// The argument that makes the process a VMM.
const WORD: &str = "unjailed-vmm";
const PATIENCE: Duration = Duration::from_secs(60);
