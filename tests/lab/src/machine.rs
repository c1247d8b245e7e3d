//! One QEMU process: started cold or from a snapshot, heard through frames, gone when dropped.

use std::{
    fs::File,
    io,
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::Stdio,
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use crate::{
    command::{tail, whole},
    error::{Error, OnFile, Result},
    proto::{self, Kind, PORT_NAME},
    qmp::Qmp,
    signals::{Guarded, Parent},
    tools::Tools,
};

/// The files a machine starts from.
pub struct Parts<'a> {
    /// Uncompressed kernel.
    pub kernel: &'a Path,
    /// Initramfs.
    pub initrd: &'a Path,
    /// Payload disk; always of the same size, because the snapshot has seen one.
    pub disk: &'a Path,
    /// A disk that programs may write to; what they write goes with the machine. Always of [`SYSTEM_SIZE`].
    pub system: &'a Path,
    /// Where QEMU writes the console; may be unlinked after the start.
    pub console: &'a Path,
}

/// A running machine.
pub struct Machine {
    _process: Guarded,
    control: UnixStream,
    frames: Receiver<io::Result<(Kind, Vec<u8>)>>,
    console: File,
    messages: File,
    parent: Parent,
}

impl Machine {
    /// Boot to the waiting agent.
    pub fn boot(tools: &Tools, parts: &Parts<'_>) -> Result<(Self, Qmp)> {
        let (machine, qmp) = Self::start(tools, parts, &[])?;
        let qmp = machine.known(Qmp::open(qmp))?;
        let deadline = Instant::now() + BOOT_PATIENCE;
        match machine.next_frame(deadline)? {
            Some((Kind::Ready, _)) => Ok((machine, qmp)),
            Some(_) => Err(machine.failed("spoke out of turn")),
            None => Err(machine.failed("did not reach its agent in time")),
        }
    }

    /// Continue from the state in the file `snapshot`.
    pub fn restore(tools: &Tools, parts: &Parts<'_>, snapshot: &Path) -> Result<Self> {
        let (machine, qmp) = Self::start(tools, parts, &["-incoming", "defer"])?;
        let restored = Qmp::open(qmp).and_then(|mut qmp| qmp.restore(snapshot));
        machine.known(restored)?;
        Ok(machine)
    }

    /// Send a frame to the agent.
    pub fn send(&mut self, kind: Kind, data: &[u8]) -> Result<()> {
        let sent = proto::send(&mut self.control, kind, data);
        self.known(sent)
    }

    /// The agent's next frame; `None` at the deadline.
    pub fn next_frame(&self, deadline: Instant) -> Result<Option<(Kind, Vec<u8>)>> {
        loop {
            self.parent.check()?;
            let wait = deadline.saturating_duration_since(Instant::now());
            match self.frames.recv_timeout(wait.min(WAKE_UP)) {
                Ok(frame) => {
                    // A stopping signal ends QEMU too: that is no failure of the lab.
                    self.parent.check()?;
                    return self.known(frame).map(Some);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.failed("closed its connection"));
                }
                Err(RecvTimeoutError::Timeout) if wait.is_zero() => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// The error that says `what` happened, with the end of the console and of QEMU's own messages.
    pub fn failed(&self, what: &str) -> Error {
        let read = |file: &File| {
            file.try_clone()
                .ok()
                .and_then(|mut file| whole(&mut file).ok())
                .unwrap_or_default()
        };
        let console = tail(&(read(&self.messages) + &read(&self.console)), 40);
        Error::Machine {
            what: what.to_owned(),
            console,
        }
    }

    fn start(tools: &Tools, parts: &Parts<'_>, more: &[&str]) -> Result<(Self, UnixStream)> {
        let pair = || UnixStream::pair().on("create", Path::new("a socket pair"));
        let ((control, their_control), (qmp, their_qmp)) = (pair()?, pair()?);
        let console = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(parts.console);
        let console = console.on("create", parts.console)?;
        let messages = tempfile::tempfile().on("create", Path::new("a file"))?;
        let mut command = tools.qemu();
        command.args(MACHINE).args(more);
        command
            .arg("-kernel")
            .arg(parts.kernel)
            .arg("-initrd")
            .arg(parts.initrd);
        command
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", escaped(parts.console)));
        command.arg("-drive").arg(format!(
            "file={},format=raw,if=virtio,readonly=on",
            escaped(parts.disk)
        ));
        command.arg("-drive").arg(format!(
            "file={},format=raw,if=virtio,snapshot=on,discard=unmap",
            escaped(parts.system)
        ));
        command
            .arg("-device")
            .arg(format!("virtserialport,chardev=control,name={PORT_NAME}"));
        // The two sockets travel as stdin and stdout: no path to make, to guard, or to leave behind.
        command
            .stdin(Stdio::from(OwnedFd::from(their_control)))
            .stdout(Stdio::from(OwnedFd::from(their_qmp)));
        command.stderr(Stdio::from(
            messages.try_clone().on("share", Path::new("a file"))?,
        ));
        let process = Guarded::start(&mut command)?;
        let (tell, frames) = mpsc::sync_channel(FRAMES_AHEAD);
        let mut reader = control.try_clone().on("share", Path::new("a socket"))?;
        thread::spawn(move || {
            loop {
                let frame = proto::receive(&mut reader);
                let last = frame.is_err();
                if tell.send(frame).is_err() || last {
                    return;
                }
            }
        });
        Ok((
            Self {
                _process: process,
                control,
                frames,
                console,
                messages,
                parent: Parent::now(),
            },
            qmp,
        ))
    }

    fn known<T>(&self, result: io::Result<T>) -> Result<T> {
        result.or_else(|error| {
            self.parent.check()?;
            // Let QEMU say why it goes.
            thread::sleep(Duration::from_millis(50));
            Err(self.failed(&format!("broke off: {error}")))
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Ends the reader thread even when a frame is only half there; QEMU itself dies with `process`.
        let _ = self.control.shutdown(Shutdown::Both);
    }
}

/// What a snapshot depends on besides its files: part of its key.
pub fn description() -> String {
    MACHINE.join(" ") + &format!("{DISK_SIZE} {SYSTEM_SIZE}")
}

/// QEMU option values end at a comma; a doubled one stands for itself.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Size of every payload disk, in bytes; the image is sparse.
pub const DISK_SIZE: u64 = 2 << 30;
/// Size of every system disk, in bytes; sparse as well.
pub const SYSTEM_SIZE: u64 = 1536 << 20;

/// `-cpu max` has SVM with nested paging under TCG. AVX and the fast string moves are left out: TCG emulates them so
/// slowly that HMAC, AES-CTR and TLS take five to eight times as long with them. `tsc=reliable`: the TSC of all vCPUs is
/// one clock here, but on a busy machine the kernel's watchdog takes late ticks for a broken one, and KVM then changes
/// the clocks of running guests. `vmgenid` makes the kernel reseed its random numbers after a restore.
const MACHINE: &[&str] = &[
    "-accel",
    "tcg,thread=multi",
    "-machine",
    "pc",
    "-cpu",
    "max,-avx,-avx2,-vaes,-vpclmulqdq,-erms,-fsrm",
    "-smp",
    "2",
    "-m",
    "6G",
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-no-reboot",
    "-append",
    "console=ttyS0 quiet panic=-1 tsc=reliable",
    "-chardev",
    "socket,id=control,fd=0",
    "-chardev",
    "socket,id=qmp,fd=1",
    "-mon",
    "chardev=qmp,mode=control",
    "-serial",
    "chardev:console",
    "-device",
    "virtio-serial-pci",
    "-device",
    "vmgenid,guid=auto",
];
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
const WAKE_UP: Duration = Duration::from_millis(200);
const FRAMES_AHEAD: usize = 64;
