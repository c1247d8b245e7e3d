//! Casemate as it is used: an agent, a policy, a description; the VMM in its jail.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use casemate_bench::PATIENCE;
use casemate_bench::host::{Folder, Host};
use serde::Deserialize;

use crate::Guest;
use crate::guest::MARKER;
use crate::measure::{CMDLINE, MEMORY_MIB, Sample};

/// A host with one agent, and the guests' descriptions.
pub struct Casemate(Host);

impl Casemate {
    /// Starts the agent and waits until it answers.
    pub fn start(program: &Path, guest: &Guest) -> Result<Self> {
        let folder = Folder::new(1)?;
        fs::File::create(folder.path().join("data.raw"))?.set_len(64 << 20)?;
        for (name, devices) in [("bare", ""), ("equipped", DEVICES)] {
            let text = format!(
                "name = {name:?}\nvcpus = 1\nmemory = \"{MEMORY_MIB} MiB\"\n[boot]\nkernel = {:?}\ninitrd = {:?}\ncmdline = {CMDLINE:?}\n{devices}",
                guest.kernel, guest.initrd
            );
            fs::write(folder.path().join(format!("{name}.toml")), text)?;
        }
        Host::start(program, folder).map(Self)
    }

    /// Boots until the first line of user space; with one disk and one card, if it is to be equipped.
    pub fn boot(&self, equipped: bool) -> Result<Sample> {
        let name = if equipped { "equipped" } else { "bare" };
        self.0.forget_console(name);
        let begun = Instant::now();
        let description = format!("{name}.toml");
        let sample = self
            .0
            .ask(&["run", &description])
            .and_then(|text| watch(&text, self.0.folder(), begun));
        self.0.ask(&["stop", name]).with_context(|| self.0.log())?;
        sample
    }
}

/// What is needed of `casemate --json run`.
#[derive(Deserialize)]
struct Launched {
    pid: u32,
    console: PathBuf,
    start_cpu_us: Option<u64>,
}

fn watch(launched: &str, folder: &Path, begun: Instant) -> Result<Sample> {
    let launched: Launched = serde_json::from_str(launched).context("what `run` answered")?;
    // As the agent calls it, from its own folder.
    let console = folder.join(&launched.console);
    let limit = Instant::now() + PATIENCE;
    loop {
        let said = fs::read(&console).unwrap_or_default();
        if String::from_utf8_lossy(&said).contains(MARKER) {
            let mut sample = Sample::take(launched.pid, begun)?;
            sample.start_cpu_ms = launched.start_cpu_us.map(|us| us as f64 / 1000.0);
            return Ok(sample);
        }
        if Instant::now() > limit {
            bail!("no line of user space: {}", String::from_utf8_lossy(&said));
        }
        thread::sleep(Duration::from_millis(2));
    }
}

const DEVICES: &str = "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n\
                       [[net]]\nid = \"net0\"\ntap = \"bench0\"\nmac = \"52:54:00:00:00:01\"\n";
