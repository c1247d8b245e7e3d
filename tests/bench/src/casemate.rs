//! Casemate as it is used: an agent, a policy, a description; the VMM in its jail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use tempfile::TempDir;

use crate::Guest;
use crate::guest::MARKER;
use crate::measure::{CMDLINE, MEMORY_MIB, Sample};

/// How long a guest may take to its first line.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// A host with one agent.
pub struct Casemate {
    program: PathBuf,
    folder: TempDir,
    agent: Child,
}

/// What is needed of `casemate --json run`.
#[derive(Deserialize)]
struct Launched {
    pid: u32,
    console: PathBuf,
    start_cpu_us: Option<u64>,
}

impl Casemate {
    /// Starts the agent and waits until it answers.
    pub fn start(program: &Path, guest: &Guest) -> Result<Self> {
        let folder = tempfile::tempdir().context("make a folder")?;
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text);
        write("agent.toml", AGENT)?;
        write("policy.toml", POLICY)?;
        fs::File::create(folder.path().join("data.raw"))?.set_len(64 << 20)?;
        for (name, devices) in [("bare", ""), ("equipped", DEVICES)] {
            let text = format!(
                "name = {name:?}\nvcpus = 1\nmemory = \"{MEMORY_MIB} MiB\"\n[boot]\nkernel = {:?}\ninitrd = {:?}\ncmdline = {CMDLINE:?}\n{devices}",
                guest.kernel, guest.initrd
            );
            write(&format!("{name}.toml"), &text)?;
        }
        let agent = Command::new(program)
            .current_dir(folder.path())
            .args(["agent", "--config", "agent.toml"])
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.path().join("agent.log"))?)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let host = Self {
            program: program.to_owned(),
            folder,
            agent,
        };
        let begun = Instant::now();
        while host.ask(&["list"]).is_err() {
            if begun.elapsed() > PATIENCE {
                bail!("the agent does not answer: {}", host.log());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(host)
    }

    /// Boots until the first line of user space; with one disk and one card, if it is to be equipped.
    pub fn boot(&self, equipped: bool) -> Result<Sample> {
        let name = if equipped { "equipped" } else { "bare" };
        // The agent would write behind what the last boot said, which has the line that is waited for.
        let console = self.folder.path().join(CONSOLES).join(name);
        let _ = fs::remove_file(console.join("console.log"));
        let begun = Instant::now();
        let description = format!("{name}.toml");
        let sample = self
            .ask(&["run", &description])
            .and_then(|text| watch(&text, self.folder.path(), begun));
        self.ask(&["stop", name]).with_context(|| self.log())?;
        sample
    }

    fn ask(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new(&self.program)
            .current_dir(self.folder.path())
            .args(["--json", "--agent", "agent.sock"])
            .args(arguments)
            .output()?;
        if !output.status.success() {
            bail!(
                "casemate {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("agent.log")).unwrap_or_default()
    }
}

impl Drop for Casemate {
    fn drop(&mut self) {
        // Its roles end with it.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
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

/// Where the agent keeps a folder for each guest.
const CONSOLES: &str = "state/guests";
const AGENT: &str =
    "name = \"bench\"\nstate_dir = \"state\"\nsocket = \"agent.sock\"\npolicy = \"policy.toml\"\n";
const POLICY: &str = "[host]\nname = \"bench\"\n[technologies]\nallowed = [\"none\"]\nallow_emulated = false\n\
                      [limits]\nmax_vcpus = 1\nmax_memory_mib = 1024\n\
                      [migration]\noutgoing = false\nincoming = false\n";
const DEVICES: &str = "[[disk]]\nid = \"data\"\npath = \"data.raw\"\n\
                       [[net]]\nid = \"net0\"\ntap = \"bench0\"\nmac = \"52:54:00:00:00:01\"\n";
