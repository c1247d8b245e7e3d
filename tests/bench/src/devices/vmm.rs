//! What each VMM runs, how it is waited for, and Casemate as it is used.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use casemate_bench::PATIENCE;
use casemate_bench::host::{Folder, Host};
use serde::Deserialize;

use super::net::{GUEST, HERE, MAC, TAP};

/// The same for each.
pub struct Guest {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub disk: PathBuf,
    /// Where what it says goes, under VMMs that let one choose.
    pub console: PathBuf,
}

/// Memory of each guest in MiB.
pub const MEMORY_MIB: u64 = 256;
/// Its vCPUs.
pub const VCPUS: u8 = 1;

/// Command line of each guest.
pub fn cmdline() -> String {
    format!("console=ttyS0 quiet panic=-1 reboot=k casemate.ip={GUEST}/24 casemate.load={HERE}")
}

/// Waits until the guest has said its figures, and returns them.
pub fn figures(console: &Path) -> Result<String> {
    let limit = Instant::now() + PATIENCE + MEASURING;
    loop {
        let said = fs::read(console).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        for line in said.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
            match line.trim_end().split_once("guest: load ") {
                Some((_, figures)) if figures.starts_with('{') => return Ok(figures.to_owned()),
                Some((_, failed)) => bail!("the guest's load {failed}"),
                None => {}
            }
        }
        if Instant::now() > limit {
            bail!("no figures: {said}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// A host with its agent; the VMM in its jail, filters on.
pub struct Jailed(Host);

impl Jailed {
    pub fn start(program: &Path, guest: &Guest) -> Result<Self> {
        let folder = Folder::new(u32::from(VCPUS))?;
        let text = format!(
            "name = \"{NAME}\"\nvcpus = {VCPUS}\nmemory = \"{MEMORY_MIB} MiB\"\n\
             [boot]\nkernel = {:?}\ninitrd = {:?}\ncmdline = {:?}\n\
             [[disk]]\nid = \"data\"\npath = {:?}\nio = \"IO\"\n\
             [[net]]\nid = \"net0\"\ntap = \"{TAP}\"\nmac = \"{MAC}\"\n",
            guest.kernel,
            guest.initrd,
            cmdline(),
            guest.disk
        );
        for io in [AUTO, RING, THREADS] {
            fs::write(
                folder.path().join(format!("{io}.toml")),
                text.replace("IO", io),
            )?;
        }
        Host::start(program, folder).map(Self)
    }

    /// One guest, whose disk is done by `io`.
    pub fn run(&self, io: &str) -> Result<String> {
        self.0.forget_console(NAME);
        let launched = self.0.ask(&["run", &format!("{io}.toml")])?;
        let launched: Launched = serde_json::from_str(&launched).context("what `run` answered")?;
        let figures = figures(&self.0.folder().join(launched.console));
        self.0.ask(&["stop", NAME]).with_context(|| self.0.log())?;
        figures
    }
}

/// What is needed of `casemate --json run`.
#[derive(Deserialize)]
struct Launched {
    console: PathBuf,
}

/// Who does the disk's requests: the product as it is.
pub const AUTO: &str = "auto";
/// The kernel, writes too.
pub const RING: &str = "io_uring";
/// The same, without the kernel's rings.
pub const THREADS: &str = "threads";
const NAME: &str = "devices";
const MEASURING: Duration = Duration::from_secs(60);
