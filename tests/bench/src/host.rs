//! A host as it is used: an agent, a policy, descriptions; each VMM in its jail.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;

use crate::PATIENCE;

/// The folder of a host, with the agent's configuration and a policy; the agent does not run yet.
pub struct Folder(TempDir);

impl Folder {
    /// A new one, whose policy allows plain guests of so many vCPUs and 1 GiB.
    pub fn new(vcpus: u32) -> Result<Self> {
        let folder = tempfile::tempdir().context("make a folder")?;
        fs::write(folder.path().join("agent.toml"), AGENT)?;
        let policy = POLICY.replace("VCPUS", &vcpus.to_string());
        fs::write(folder.path().join("policy.toml"), policy)?;
        Ok(Self(folder))
    }

    /// Where descriptions and what they name go.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// A host with one agent.
pub struct Host {
    program: std::path::PathBuf,
    folder: Folder,
    agent: Child,
}

impl Host {
    /// Starts the agent and waits until it answers.
    pub fn start(program: &Path, folder: Folder) -> Result<Self> {
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

    /// Where the descriptions are, and what the agent writes is relative to.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Asks the agent by the command line; the answer's JSON.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
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

    /// Removes what the guest said: the agent would write behind it, and it has the line that is waited for.
    pub fn forget_console(&self, guest: &str) {
        let console = self.folder.path().join(CONSOLES).join(guest);
        let _ = fs::remove_file(console.join("console.log"));
    }

    /// What the agent has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("agent.log")).unwrap_or_default()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Its roles end with it.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

/// Where the agent keeps a folder for each guest.
const CONSOLES: &str = "state/guests";
const AGENT: &str =
    "name = \"bench\"\nstate_dir = \"state\"\nsocket = \"agent.sock\"\npolicy = \"policy.toml\"\n";
const POLICY: &str = "[host]\nname = \"bench\"\n[technologies]\nallowed = [\"none\"]\nallow_emulated = false\n\
                      [limits]\nmax_vcpus = VCPUS\nmax_memory_mib = 1024\n\
                      [migration]\noutgoing = false\nincoming = false\n";
