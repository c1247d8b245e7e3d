//! What is measured of one boot, at the moment of the guest's first line.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;

/// Memory of each guest in MiB.
pub const MEMORY_MIB: u64 = 256;
/// Command line of each guest.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=k";

/// One boot.
#[derive(Clone, Debug)]
pub struct Sample {
    pub wall_s: f64,
    pub exits: u64,
    pub io_exits: u64,
    pub mmio_exits: u64,
    pub rss_over_guest_mib: f64,
    pub vmm_cpu_ms: f64,
    pub start_cpu_ms: Option<f64>,
}

impl Sample {
    /// Of the VMM with this process id, begun at `begun`; the only one with a virtual machine.
    pub fn take(pid: u32, begun: Instant) -> Result<Self> {
        let wall_s = begun.elapsed().as_secs_f64();
        eprintln!("casemate-bench-boot: {}", counters());
        Ok(Self {
            wall_s,
            exits: counter("exits")?,
            io_exits: counter("io_exits")?,
            mmio_exits: counter("mmio_exits")?,
            rss_over_guest_mib: rss_over_guest(pid)?,
            vmm_cpu_ms: cpu_beside_vcpus(pid)?,
            start_cpu_ms: None,
        })
    }
}

/// Medians of several boots.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub wall_s: f64,
    pub wall_s_min: f64,
    pub wall_s_max: f64,
    pub exits: u64,
    pub exits_min: u64,
    pub exits_max: u64,
    pub io_exits: u64,
    pub mmio_exits: u64,
    pub rss_over_guest_mib: f64,
    /// CPU time of all the VMM's threads but the vCPUs', until the guest's first line.
    pub vmm_cpu_ms: f64,
    /// CPU time of the VMM's process until the guest's first instruction, where the VMM says it.
    pub start_cpu_ms: Option<f64>,
    pub boots: usize,
    /// Boots that failed and were done again.
    pub faults: u32,
}

impl Summary {
    pub fn of(samples: &[Sample], faults: u32) -> Self {
        let sorted = |value: fn(&Sample) -> f64| {
            let mut all: Vec<f64> = samples.iter().map(value).collect();
            all.sort_by(f64::total_cmp);
            let at = |index: usize| all.get(index).copied().unwrap_or(f64::NAN);
            (at(0), at(all.len() / 2), at(all.len().saturating_sub(1)))
        };
        let (wall_s_min, wall_s, wall_s_max) = sorted(|s| s.wall_s);
        let (exits_min, exits, exits_max) = sorted(|s| s.exits as f64);
        Self {
            wall_s,
            wall_s_min,
            wall_s_max,
            exits: exits as u64,
            exits_min: exits_min as u64,
            exits_max: exits_max as u64,
            io_exits: sorted(|s| s.io_exits as f64).1 as u64,
            mmio_exits: sorted(|s| s.mmio_exits as f64).1 as u64,
            rss_over_guest_mib: sorted(|s| s.rss_over_guest_mib).1,
            vmm_cpu_ms: sorted(|s| s.vmm_cpu_ms).1,
            start_cpu_ms: Some(sorted(|s| s.start_cpu_ms.unwrap_or(f64::NAN)).1)
                .filter(|ms| !ms.is_nan()),
            boots: samples.len(),
            faults,
        }
    }
}

/// A counter of KVM over all virtual machines that there are.
fn counter(name: &str) -> Result<u64> {
    let path = Path::new(KVM).join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    text.trim().parse().context("a counter of KVM")
}

/// All counters of KVM that are not zero: which exits they were.
fn counters() -> String {
    let Ok(entries) = fs::read_dir(KVM) else {
        return String::new();
    };
    let mut all: Vec<(u64, String)> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            Some((counter(&name).ok().filter(|count| *count > 0)?, name))
        })
        .collect();
    all.sort_by(|one, other| other.cmp(one));
    let words: Vec<String> = all.iter().map(|(n, name)| format!("{name} {n}")).collect();
    words.join(", ")
}

/// Resident memory of all mappings that are smaller than the guest's, in MiB.
fn rss_over_guest(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("read smaps")?;
    Ok(small_mappings(&text, MEMORY_MIB << 10) as f64 / 1024.0)
}

fn small_mappings(smaps: &str, guest_kib: u64) -> u64 {
    let field = |line: &str, name: &str| -> Option<u64> {
        let rest = line.strip_prefix(name)?.trim().strip_suffix("kB")?;
        rest.trim().parse().ok()
    };
    let (mut size, mut sum) = (0, 0);
    for line in smaps.lines() {
        size = field(line, "Size:").unwrap_or(size);
        if let Some(rss) = field(line, "Rss:").filter(|_| size < guest_kib) {
            sum += rss;
        }
    }
    sum
}

/// CPU time in ms of all threads but those that run vCPUs (`vcpu0`; `CPU 0/KVM` in QEMU).
fn cpu_beside_vcpus(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0u64;
    for task in fs::read_dir(format!("/proc/{pid}/task")).context("list threads")? {
        let task = task?.path();
        let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
        if name.starts_with("vcpu") || name.starts_with("CPU ") {
            continue;
        }
        let schedstat = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
        let spent = schedstat.split_whitespace().next();
        nanoseconds += spent.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(nanoseconds as f64 / 1e6)
}

const KVM: &str = "/sys/kernel/debug/kvm";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out_of_resident_memory() {
        let smaps = "7f00-7f01 rw-s\nSize:             262144 kB\nRss:               90000 kB\n\
                     7f02-7f03 r-xp\nSize:                 40 kB\nRss:                  12 kB\nPss: 3 kB\n\
                     7f04-7f05 rw-p\nSize:                  8 kB\nRss:                   8 kB\n";
        assert_eq!(small_mappings(smaps, 262_144), 20);
    }

    #[test]
    fn medians_are_of_each_figure_by_itself() {
        let sample = |wall_s, exits| Sample {
            wall_s,
            exits,
            io_exits: 0,
            mmio_exits: 0,
            rss_over_guest_mib: 1.0,
            vmm_cpu_ms: 2.0,
            start_cpu_ms: (wall_s < 3.0).then_some(wall_s),
        };
        let summary = Summary::of(&[sample(3.0, 10), sample(1.0, 30), sample(2.0, 20)], 1);
        assert_eq!((summary.wall_s, summary.exits), (2.0, 20));
        assert_eq!((summary.wall_s_min, summary.exits_max), (1.0, 30));
        assert_eq!((summary.boots, summary.faults), (3, 1));
    }
}
