//! External commands whose lives are tied to ours.

use std::{
    fs::File,
    io::{self, Read, Seek},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
};

use nix::sys::{
    prctl,
    signal::{SigSet, Signal},
};

use crate::{
    error::{Error, OnFile, Result},
    signals::Guarded,
};

/// A command that is killed when the thread that starts it dies (so: start it from the main thread).
#[expect(
    unsafe_code,
    reason = "the death signal must be asked for between fork and exec"
)]
pub fn tied(program: impl AsRef<std::ffi::OsStr>, signal: Signal) -> Command {
    let mut command = Command::new(program);
    let parent = nix::unistd::getpid();
    let ask = move || {
        prctl::set_pdeathsig(signal)?;
        // A mask is inherited, and ours blocks what shall end the child.
        SigSet::empty().thread_set_mask()?;
        // The parent may have died before the request.
        if nix::unistd::getppid() == parent {
            Ok(())
        } else {
            Err(io::ErrorKind::Interrupted.into())
        }
    };
    // SAFETY: the closure runs in the forked child and only makes three system calls, all async-signal-safe; it
    // allocates nothing and takes no lock (`io::Error::from(ErrorKind)` does not allocate).
    unsafe { command.pre_exec(ask) };
    command
}

/// Run to the end and return stdout; failure carries what the command said.
pub fn output(command: &mut Command) -> Result<String> {
    let captured = (tempfile::tempfile(), tempfile::tempfile());
    let (mut stdout, mut stderr) = (
        captured.0.on("create", Path::new("a file"))?,
        captured.1.on("create", Path::new("a file"))?,
    );
    let clones = (stdout.try_clone(), stderr.try_clone());
    command.stdin(Stdio::null());
    command
        .stdout(clones.0.on("share", Path::new("a file"))?)
        .stderr(clones.1.on("share", Path::new("a file"))?);
    let status = Guarded::start(command)?.wait()?;
    let said = whole(&mut stdout)?;
    if status.success() {
        return Ok(said);
    }
    let output = tail(&(said + &whole(&mut stderr)?), 20);
    Err(Error::Command {
        command: text(command),
        status: status.to_string(),
        output,
    })
}

/// Program and arguments, as a person would write them.
pub fn text(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The error for a command that could not be started.
pub fn start_error(command: &Command, source: io::Error) -> Error {
    Error::Start {
        command: command.get_program().to_string_lossy().into_owned(),
        source,
    }
}

/// The whole content of an open file, whatever its position.
pub fn whole(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .on("read", Path::new("captured output"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last `lines` lines.
pub fn tail(text: &str, lines: usize) -> String {
    let skip = text.lines().count().saturating_sub(lines);
    text.lines().skip(skip).collect::<Vec<_>>().join("\n")
}
