//! `sev-snp-measure` itself: fetched, asked.

use crate::guests::Guest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// An installed `sev-snp-measure`.
#[derive(Debug)]
pub struct Peer {
    python: Python,
    modules: PathBuf,
}

/// What is asked.
#[derive(Debug, Serialize)]
pub struct Question<'a> {
    /// Guests to measure.
    pub guests: &'a [Guest],
    /// How often each, for its best time.
    pub repeat: u32,
    /// ID blocks to make.
    pub id_blocks: &'a [IdBlockQuestion],
}

/// An ID block to make.
#[derive(Debug, Serialize)]
pub struct IdBlockQuestion {
    /// SNP launch digest in hex.
    pub digest: String,
    /// Private key, PEM.
    pub id_key: String,
    /// Private key, PEM.
    pub author_key: String,
}

/// What is answered.
#[derive(Debug, Deserialize)]
pub struct Answer {
    /// All vCPU types it knows.
    pub signatures: BTreeMap<String, u32>,
    /// A digest or a refusal for each guest.
    pub digests: Vec<Digest>,
    /// The best time for each guest.
    pub seconds: Vec<Option<f64>>,
    /// Its text for each ID block.
    pub id_blocks: Vec<String>,
}

/// A digest in hex, or why there is none.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Digest {
    /// Hex.
    Measured(String),
    /// The tool's exception.
    Refused {
        /// Its text.
        refused: String,
    },
}

/// A Python that has pip, and the environment it needs.
#[derive(Debug)]
struct Python {
    program: PathBuf,
    env: Vec<(&'static str, PathBuf)>,
    path: Vec<PathBuf>,
}

impl Peer {
    /// Installs it below `target`, once.
    pub fn install(target: &Path) -> Self {
        let modules = target.join(format!("sev-snp-measure-{VERSION}"));
        fs::create_dir_all(target).unwrap();
        let lock = File::create(modules.with_extension("lock")).unwrap();
        lock.lock().unwrap();
        let python = Python::find(target);
        let done = modules.join("installed");
        if !done.exists() {
            let _ = fs::remove_dir_all(&modules);
            let mut pip = python.command(&[]);
            pip.args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            ])
            .args(["--no-input", "--root-user-action=ignore", "--target"])
            .arg(&modules)
            .args(PACKAGES);
            let status = pip.stdout(Stdio::null()).status().unwrap();
            assert!(
                status.success(),
                "pip cannot install {PACKAGES:?}: {status}"
            );
            fs::write(done, "").unwrap();
        }
        Self { python, modules }
    }

    /// Asks in one process.
    pub fn ask(&self, question: &Question<'_>) -> Answer {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peer.py");
        let mut child = self
            .command()
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let text = serde_json::to_vec(question).unwrap();
        child.stdin.take().unwrap().write_all(&text).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", output.status);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Its command line, as a user runs it.
    pub fn cli(&self) -> Command {
        let mut command = self.command();
        command.args(["-m", "sevsnpmeasure.cli"]);
        command
    }

    fn command(&self) -> Command {
        self.python.command(std::slice::from_ref(&self.modules))
    }
}

impl Python {
    /// The machine's, or one that the lab unpacks from Debian packages below `target`.
    fn find(target: &Path) -> Self {
        let system = Self {
            program: "python3".into(),
            env: Vec::new(),
            path: Vec::new(),
        };
        if system.has_pip() {
            return system;
        }
        let root = target.join("python");
        let unpacked = Self::unpacked(&root);
        if unpacked.has_pip() {
            return unpacked;
        }
        let release = std::env::current_exe().unwrap();
        let lab = release.ancestors().map(|place| place.join("lab"));
        let lab = lab.into_iter().find(|lab| lab.is_file());
        let lab = lab.expect(
            "no Python with pip: install python3-pip, or build casemate-lab, which fetches it",
        );
        let status = Command::new(lab)
            .args(["fetch", "--to"])
            .arg(&root)
            .args(["python3", "python3-pip"])
            .status()
            .unwrap();
        assert!(status.success(), "the lab cannot fetch Python: {status}");
        let unpacked = Self::unpacked(&root);
        assert!(unpacked.has_pip(), "the unpacked Python has no pip");
        unpacked
    }

    /// Only what the machine lacks was unpacked, so Python itself may still be the machine's.
    fn unpacked(root: &Path) -> Self {
        let program = root.join("usr/bin/python3");
        let path = vec![root.join("usr/lib/python3/dist-packages")];
        if !program.exists() {
            return Self {
                program: "python3".into(),
                env: Vec::new(),
                path,
            };
        }
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        Self {
            program,
            env: vec![
                ("PYTHONHOME", root.join("usr")),
                ("LD_LIBRARY_PATH", libraries),
            ],
            path,
        }
    }

    fn has_pip(&self) -> bool {
        let mut command = self.command(&[]);
        command.args(["-m", "pip", "--version"]);
        let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
        quiet.status().is_ok_and(|status| status.success())
    }

    fn command(&self, more: &[PathBuf]) -> Command {
        let mut command = Command::new(&self.program);
        let path = std::env::join_paths(more.iter().chain(&self.path)).unwrap();
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        command
            .env("PYTHONPATH", path)
            .env("PYTHONDONTWRITEBYTECODE", "");
        command
    }
}

/// The version compared with.
pub const VERSION: &str = "0.0.13";

const PACKAGES: [&str; 2] = ["sev-snp-measure==0.0.13", "cryptography==50.0.2"];
