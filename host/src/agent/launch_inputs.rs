//! What a guest was launched from, by its hashes, for the record of the launch. Read beside the launch, not before it.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::thread::{JoinHandle, spawn};

use casemate_policy::ledger::Entry;
use ring::digest::{Context, SHA256};

use crate::agent::api::Failure;
use crate::agent::files;
use crate::machine::plan::MachinePlan;
use crate::machine::spec::MachineSpec;

/// Hashes under way.
pub struct LaunchInputs {
    /// What the guest starts in, and what that would have been.
    files: [(&'static str, Option<Hashing>); 3],
    command_line: String,
}

struct Hashing {
    path: PathBuf,
    thread: JoinHandle<std::io::Result<String>>,
}

impl LaunchInputs {
    /// Begins to read.
    pub fn begin(spec: &MachineSpec, plan: &MachinePlan) -> Self {
        let begin = |path: Option<&PathBuf>| path.map(|path| Hashing::begin(path));
        let kernel = spec.boot.kernel();
        let firmware = spec.boot.firmware();
        Self {
            files: [
                ("input.kernel", begin(kernel.map(|files| &files.kernel))),
                ("input.initrd", begin(kernel.map(|files| &files.initrd))),
                ("input.firmware", begin(firmware.map(|spec| &spec.image))),
            ],
            command_line: sha256(plan.cmdline.as_bytes()),
        }
    }

    /// The record with every input in it; what a guest starts without is `none`.
    pub fn describe(self, entry: Entry) -> Result<Entry, Failure> {
        let mut entry = entry.with("input.command_line", self.command_line);
        for (name, hashing) in self.files {
            let hash = hashing.map_or(Ok("none".to_owned()), Hashing::end)?;
            entry = entry.with(name, hash);
        }
        Ok(entry)
    }
}

impl Hashing {
    fn begin(path: &Path) -> Self {
        let path = path.to_owned();
        let of = path.clone();
        let thread = spawn(move || hash_of(&of));
        Self { path, thread }
    }

    fn end(self) -> Result<String, Failure> {
        let unusable = |why: String| {
            let text = format!("{} cannot be hashed: {why}", self.path.display());
            Failure::new("RESOURCE", text)
        };
        match self.thread.join() {
            Ok(hash) => hash.map_err(|e| unusable(e.to_string())),
            Err(_) => Err(unusable("its thread ended".to_owned())),
        }
    }
}

/// SHA-256 of bytes, hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(ring::digest::digest(&SHA256, bytes))
}

fn hash_of(path: &Path) -> std::io::Result<String> {
    let mut file = files::open(path, false)?;
    let mut context = Context::new(&SHA256);
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hex::encode(context.finish())),
            read => context.update(block.get(..read).unwrap_or_default()),
        }
    }
}
