//! The program that is installed on this host now, which may be another than the one that this agent is.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ring::digest::{Context, SHA256};

use crate::agent::api::Failure;
use crate::formats::Formats;

/// An installed program, open: what was looked at is what is started, whatever is put in its place.
pub struct Program {
    /// What it reads and writes.
    pub formats: Formats,
    /// SHA-256 of its file, hex.
    pub sha256: String,
    file: File,
}

impl Program {
    /// Opens the one at `path`, or else where this agent was started from, and asks it what it is.
    pub fn installed(path: Option<&Path>) -> Result<Self, Failure> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => own_path().map_err(|e| unusable(Path::new("/proc/self/exe"), &e))?,
        };
        let failed = |e: std::io::Error| unusable(&path, &e);
        let file = File::open(&path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() || found.uid() != 0 || found.mode() & 0o022 != 0 {
            let text = "it must be a file of root's that nobody else can write";
            return Err(unusable(&path, &text));
        }
        let said = ask(&file).map_err(failed)?;
        let formats = Formats::parse(&said).ok_or_else(|| {
            let text = "it does not say what it reads and writes; is it a casemate?";
            unusable(&path, &text)
        })?;
        Ok(Self {
            formats,
            sha256: hash_of(&file).map_err(failed)?,
            file,
        })
    }

    /// Where a child of this process finds it.
    pub fn path(&self) -> PathBuf {
        path_of(&self.file)
    }
}

fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Where this program was, and where another one may be now.
fn own_path() -> std::io::Result<PathBuf> {
    let path = std::fs::read_link("/proc/self/exe")?;
    let text = path.to_string_lossy();
    Ok(text
        .strip_suffix(" (deleted)")
        .map_or_else(|| path.clone(), PathBuf::from))
}

fn ask(program: &File) -> std::io::Result<String> {
    let mut child = Command::new(path_of(program))
        .args(["internal", "formats"])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let begun = Instant::now();
    while child.try_wait()?.is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            return Err(std::io::Error::other("it does not answer"));
        }
        std::thread::sleep(STEP);
    }
    // It has ended: all that it said is in the pipe.
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MOST).read_to_string(&mut said)?;
    }
    Ok(said)
}

fn hash_of(mut program: &File) -> std::io::Result<String> {
    let mut hash = Context::new(&SHA256);
    let mut bytes = vec![0; 256 << 10];
    loop {
        match program.read(&mut bytes)? {
            0 => return Ok(hex::encode(hash.finish())),
            count => hash.update(bytes.get(..count).unwrap_or_default()),
        }
    }
}

fn unusable(path: &Path, why: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        "UPGRADE_PROGRAM",
        format!(
            "{} cannot be upgraded to: {why}; install casemate there, or set `program` in the agent's configuration",
            path.display()
        ),
    )
}

const PATIENCE: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(2);
/// Most bytes of an answer.
const MOST: u64 = 4096;
