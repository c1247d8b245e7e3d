//! Waits for one order, runs the program, and sends back what it writes and how it ends.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, PipeReader, Read},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    mount::{MsFlags, mount},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        time::TimeSpec,
        wait::{WaitStatus, waitpid},
    },
    time::{ClockId, clock_settime},
    unistd::Pid,
};

use super::{BLOCK_DRIVER, load_modules};
use crate::proto::{Exit, Kind, PORT_NAME, Run, receive, send};

/// Serve one order, to the last frame.
pub fn serve() -> anyhow::Result<()> {
    let mut port = open_port()?;
    send(&mut port, Kind::Ready, &[])?;
    // The snapshot is taken while this read waits.
    let (Kind::Run, order) = receive(&mut port)? else {
        bail!("the first frame is no order")
    };
    let order: Run = serde_json::from_slice(&order)?;
    let exit = match start(&order) {
        Ok((child, stdout, stderr)) => {
            send(&mut port, Kind::Started, &[])?;
            follow(&child, stdout, stderr, &mut port)?
        }
        Err(error) => Exit::NotStarted(format!("{error:#}")),
    };
    if order.kernel_log {
        send_kernel_log(&mut port)?;
    }
    if let Some(out) = &order.out {
        send_tree(Path::new(out), Path::new(""), &mut port)?;
    }
    send(&mut port, Kind::Exit, &serde_json::to_vec(&exit)?)?;
    // The runner switches the machine off: only then has it surely read everything.
    thread::sleep(Duration::from_secs(60));
    Ok(())
}

fn open_port() -> anyhow::Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT_NAME)
        {
            return Ok(File::options()
                .read(true)
                .write(true)
                .open(Path::new("/dev").join(entry.file_name()))?);
        }
    }
    bail!("no virtio-serial port has the name {PORT_NAME}")
}

fn start(order: &Run) -> anyhow::Result<(Child, PipeReader, PipeReader)> {
    let (seconds, nanoseconds) = order.clock;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanoseconds))
        .context("set the clock")?;
    place_files(&order.files)?;
    fs::create_dir_all(&order.cwd).with_context(|| format!("create {}", order.cwd))?;
    let (program, args) = order.args.split_first().context("no program given")?;
    let ((stdout, their_stdout), (stderr, their_stderr)) = (io::pipe()?, io::pipe()?);
    for pipe in [&stdout, &stderr] {
        fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .envs(order.env.iter().cloned())
        .current_dir(&order.cwd);
    command
        .stdin(Stdio::null())
        .stdout(their_stdout)
        .stderr(their_stderr);
    let child = command.spawn().with_context(|| {
        format!("start {program} (it must be static: the lab has no shared libraries)")
    })?;
    Ok((child, stdout, stderr))
}

/// Mount the payload disk and bind each entry to its place.
fn place_files(places: &[String]) -> anyhow::Result<()> {
    load_modules(|name| name == BLOCK_DRIVER)?;
    fs::create_dir_all(PAYLOAD)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
    mount(Some("/dev/vda"), PAYLOAD, Some("ext4"), flags, None::<&str>)
        .context("mount the payload disk")?;
    for (index, place) in places.iter().enumerate() {
        let source = Path::new(PAYLOAD).join("files").join(index.to_string());
        let place = Path::new(place);
        fs::create_dir_all(place.parent().unwrap_or(place))
            .with_context(|| format!("create the place of {}", place.display()))?;
        if source.is_dir() {
            fs::create_dir_all(place)?;
        } else {
            File::create(place)?;
        }
        mount(
            Some(&source),
            place,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .with_context(|| format!("bind the payload to {}", place.display()))?;
    }
    Ok(())
}

/// Pass on output until the program has ended and everything it wrote has been read. A grandchild that keeps the pipes
/// open does not keep us.
fn follow(
    child: &Child,
    stdout: PipeReader,
    stderr: PipeReader,
    port: &mut File,
) -> anyhow::Result<Exit> {
    let ended = reap_until(Pid::from_raw(child.id().cast_signed()))?;
    let mut pipes = HashMap::from([
        (Kind::Stdout as u8, (Kind::Stdout, stdout)),
        (Kind::Stderr as u8, (Kind::Stderr, stderr)),
    ]);
    let mut exit = None;
    loop {
        let mut idle = true;
        let mut closed = Vec::new();
        for (key, (kind, pipe)) in &mut pipes {
            match pass_on(*kind, pipe, port)? {
                Flow::Some => idle = false,
                Flow::Nothing => {}
                Flow::End => closed.push(*key),
            }
        }
        closed.iter().for_each(|key| drop(pipes.remove(key)));
        match exit {
            Some(exit) if idle => return Ok(exit),
            Some(_) => continue,
            None => {}
        }
        if idle {
            let mut waits: Vec<PollFd<'_>> = pipes
                .values()
                .map(|(_, pipe)| PollFd::new(pipe.as_fd(), PollFlags::POLLIN))
                .collect();
            waits.push(PollFd::new(ended.as_fd(), PollFlags::POLLIN));
            match poll(&mut waits, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let over = waits
                .last()
                .and_then(PollFd::revents)
                .is_some_and(|events| !events.is_empty());
            if over {
                let mut status = Vec::new();
                (&ended).read_to_end(&mut status)?;
                exit = Some(serde_json::from_slice(&status)?);
            }
        }
    }
}

enum Flow {
    Some,
    Nothing,
    End,
}

fn pass_on(kind: Kind, pipe: &mut PipeReader, port: &mut File) -> anyhow::Result<Flow> {
    let mut buffer = [0; 65536];
    match pipe.read(&mut buffer) {
        Ok(0) => Ok(Flow::End),
        Ok(len) => {
            send(port, kind, buffer.get(..len).unwrap_or_default())?;
            Ok(Flow::Some)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Flow::Nothing),
        Err(error) => Err(error.into()),
    }
}

/// Reap all children, as the first process must; the pipe tells how `program` ended.
fn reap_until(program: Pid) -> anyhow::Result<PipeReader> {
    let (reader, writer) = io::pipe()?;
    let mut writer = Some(writer);
    thread::spawn(move || {
        loop {
            let exit = match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, code)) if pid == program => Exit::Code(code),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == program => {
                    Exit::Signal(signal as i32)
                }
                Err(Errno::ECHILD) => return,
                _ => continue,
            };
            if let Some(writer) = writer.take() {
                let _ = serde_json::to_writer(writer, &exit);
            }
        }
    });
    Ok(reader)
}

/// Send what the kernel has said so far: seccomp kills, guest faults, oopses.
fn send_kernel_log(port: &mut File) -> anyhow::Result<()> {
    let mut log = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")?;
    let mut record = [0; 8192];
    // One record a read: "priority,sequence,microseconds,flags;text".
    while let Ok(len @ 1..) = log.read(&mut record) {
        let record = String::from_utf8_lossy(record.get(..len).unwrap_or_default());
        let (head, text) = record.split_once(';').unwrap_or_default();
        let text = text.lines().next().unwrap_or_default();
        let micros = head.split(',').nth(2).unwrap_or_default();
        send(
            port,
            Kind::Stderr,
            format!("kernel[{micros}]: {text}\n").as_bytes(),
        )?;
    }
    Ok(())
}

/// Send the regular files below `root`.
fn send_tree(root: &Path, below: &Path, port: &mut File) -> anyhow::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let name: PathBuf = below.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            send_tree(root, &name, port)?;
        } else if kind.is_file() {
            send(port, Kind::File, name.display().to_string().as_bytes())?;
            let mut file = File::open(entry.path())?;
            let mut buffer = vec![0; 1 << 20];
            while let len @ 1.. = file.read(&mut buffer)? {
                send(port, Kind::FileData, buffer.get(..len).unwrap_or_default())?;
            }
        }
    }
    Ok(())
}

const PAYLOAD: &str = "/payload";
