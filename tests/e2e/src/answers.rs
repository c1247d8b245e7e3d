//! What `casemate --json` says, as far as it is looked at. Read from outside, as any script would.

use std::path::PathBuf;

use serde::Deserialize;

/// `casemate run`, `casemate status`.
#[derive(Clone, Debug, Deserialize)]
pub struct GuestInfo {
    /// Name.
    pub name: String,
    /// What it is doing.
    pub state: String,
    /// `none` or `sev`.
    pub technology: String,
    /// Whether the software secure processor stands in.
    pub emulated: bool,
    /// Ownership epoch.
    pub epoch: u64,
    /// The VMM's process id.
    pub pid: u32,
    /// Console output.
    pub console: PathBuf,
    /// Socket to the guest's vsock ports.
    pub vsock: Option<PathBuf>,
    /// Socket of the guest's virtio console.
    pub terminal: Option<PathBuf>,
    /// From the request to the measured guest, microseconds.
    pub launch_us: Option<u64>,
    /// Who does the requests of each disk, where the VMM was asked.
    #[serde(default)]
    pub disks: Vec<DiskService>,
}

/// Who does a disk's requests.
#[derive(Clone, Debug, Deserialize)]
pub struct DiskService {
    /// The disk.
    pub id: String,
    /// `io_uring`, or `threads` and why.
    pub by: String,
}

/// `casemate platform show`.
#[derive(Clone, Debug, Deserialize)]
pub struct Platform {
    /// Whether it is the software one.
    pub emulated: bool,
    /// SHA-256 of the root, hex.
    pub root_sha256: String,
}

/// `casemate doctor`.
#[derive(Clone, Debug, Deserialize)]
pub struct Diagnosis {
    /// Whether confidential guests can run here.
    pub usable: bool,
    /// A subject each.
    pub checks: Vec<Subject>,
}

/// One subject of the doctor's.
#[derive(Clone, Debug, Deserialize)]
pub struct Subject {
    /// Stable name.
    pub name: String,
    /// `ok`, `degraded`, `missing`.
    pub status: String,
    /// What is there.
    pub found: String,
    /// How to mend it; empty when nothing is to be mended.
    pub remedy: String,
}

/// `casemate owner release`.
#[derive(Clone, Debug, Deserialize)]
pub struct Release {
    /// Every check.
    pub verdict: Verdict,
    /// Whether the secret was given.
    pub released: bool,
}

/// The owner's verdict.
#[derive(Clone, Debug, Deserialize)]
pub struct Verdict {
    /// `accepted`, `rejected`, `cannot-verify`.
    pub overall: String,
    /// Whether the platform is emulated.
    pub emulated: bool,
    /// In order.
    pub checks: Vec<VerdictCheck>,
}

impl Verdict {
    /// Names of the checks that did not pass.
    pub fn failed(&self) -> Vec<&str> {
        self.checks
            .iter()
            .filter(|c| c.result != "accepted")
            .map(|c| c.name.as_str())
            .collect()
    }
}

/// One check of the owner's.
#[derive(Clone, Debug, Deserialize)]
pub struct VerdictCheck {
    /// Stable name.
    pub name: String,
    /// `accepted`, `rejected`, `cannot-verify`.
    pub result: String,
    /// What should be.
    pub expected: String,
    /// What is.
    pub found: String,
}

/// The outcome of `casemate migrate`.
#[derive(Clone, Debug, Deserialize)]
pub struct MoveReport {
    /// Rounds, the last included.
    pub rounds: u32,
    /// Pages, zero pages included.
    pub pages: u64,
    /// Packets of the secure processor among them.
    pub firmware_pages: u64,
    /// Bytes of frames.
    pub bytes: u64,
    /// The pause, milliseconds.
    pub downtime_ms: f64,
    /// Everything, milliseconds.
    pub total_ms: u64,
    /// Bytes per second.
    pub throughput: f64,
    /// `direct` or `gateway`.
    pub path: String,
    /// TLS cipher suite.
    pub tls_suite: String,
}

/// `casemate sandbox probe`.
#[derive(Clone, Debug, Deserialize)]
pub struct Probe {
    /// A process each.
    pub reports: Vec<ProbeReport>,
}

/// What one process found.
#[derive(Clone, Debug, Deserialize)]
pub struct ProbeReport {
    /// `vmm`, `mover`, `psp`.
    pub role: String,
    /// Everything tried.
    pub attempts: Vec<ProbeAttempt>,
}

impl ProbeReport {
    /// How many attempts were refused.
    pub fn refused(&self) -> usize {
        self.attempts.iter().filter(|a| a.refused).count()
    }
}

/// One thing tried.
#[derive(Clone, Debug, Deserialize)]
pub struct ProbeAttempt {
    /// What.
    pub what: String,
    /// Whether it was refused.
    pub refused: bool,
    /// By what.
    pub by: String,
}
