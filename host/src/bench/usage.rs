//! What one end spends: processor time, and peak memory beside the guest's.

use std::fs;

use nix::sys::resource::{UsageWho, getrusage};

use super::BenchError;

/// Started before the first byte moves.
pub struct Usage {
    cpu_s: f64,
}

impl Usage {
    /// Notes the processor time so far, and forgets the peak of memory so far.
    pub fn start() -> Result<Self, BenchError> {
        fs::write("/proc/self/clear_refs", "5").map_err(BenchError::system("clear_refs"))?;
        Ok(Self {
            cpu_s: processor_seconds()?,
        })
    }

    /// Processor seconds of all threads since the start.
    pub fn cpu_seconds(&self) -> Result<f64, BenchError> {
        Ok(processor_seconds()? - self.cpu_s)
    }

    /// Peak resident memory since the start in MiB, without shared memory: that is the guest's, and all of it was
    /// there from the start.
    pub fn peak_rss_mib(&self) -> Result<f64, BenchError> {
        let status = fs::read_to_string("/proc/self/status")
            .map_err(BenchError::system("/proc/self/status"))?;
        let peak = kibibytes(&status, "VmHWM:")?.saturating_sub(kibibytes(&status, "RssShmem:")?);
        Ok(peak as f64 / 1024.0)
    }
}

fn processor_seconds() -> Result<f64, BenchError> {
    let usage =
        getrusage(UsageWho::RUSAGE_SELF).map_err(|e| BenchError::System("getrusage", e.into()))?;
    let [user, system] = [usage.user_time(), usage.system_time()]
        .map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6);
    Ok(user + system)
}

fn kibibytes(status: &str, field: &str) -> Result<u64, BenchError> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .ok_or_else(|| BenchError::Usage(format!("/proc/self/status has no {field}")))
}
