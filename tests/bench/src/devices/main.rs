//! `casemate-bench-devices`: disk and card of one guest under Casemate, in its jail and without it, beside QEMU's q35.
//!
//! The rows: `casemate` is the product as it is, `ring` and `threads` the same with that `io`, `unjailed` its VMM without the
//! sandbox. The same kernel, initramfs, command line, memory, backing file and tap for each, in turn, several times. The guest
//! measures (`tests/guest/src/load`); this program is the host that it speaks with, and compares.

mod figures;
mod net;
mod qemu;
mod table;
mod unjailed;
mod vmm;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;

use figures::Series;
use vmm::{AUTO, Guest, Jailed, RING, THREADS};

/// Measures disk and card of one guest under Casemate and QEMU in turn, and compares.
#[derive(Parser)]
#[command(name = "casemate-bench-devices", version)]
struct Arguments {
    /// The casemate program.
    #[arg(long)]
    casemate: PathBuf,
    /// QEMU's command, with what it needs in front (a loader, its libraries).
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    qemu: Vec<String>,
    /// The kernel: an uncompressed ELF file, which all of them enter by PVH.
    #[arg(long)]
    kernel: PathBuf,
    /// The initramfs of the tests' guest.
    #[arg(long)]
    initrd: PathBuf,
    /// Let shared memory have huge pages first, as `casemate doctor` advises: a setting of the whole machine.
    #[arg(long)]
    huge_pages: bool,
    /// Guests of each.
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    // Started again by itself, it is the VMM without a jail.
    if let Some(result) = unjailed::serve() {
        return end(result);
    }
    end(bench(&Arguments::parse()))
}

fn end(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemate-bench-devices: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    if arguments.huge_pages {
        fs::write(HUGE_PAGES, "advise").with_context(|| format!("write {HUGE_PAGES}"))?;
    }
    let scratch = tempfile::tempdir().context("make a folder")?;
    let guest = Guest {
        kernel: arguments.kernel.clone(),
        initrd: arguments.initrd.clone(),
        disk: scratch.path().join("disk.raw"),
        console: scratch.path().join("console"),
    };
    fill(&guest.disk)?;
    let _tap = net::Tap::new()?;
    net::listen()?;
    let jailed = Jailed::start(&arguments.casemate, &guest)?;
    let runs: [(&str, &dyn Fn() -> Result<String>); 5] = [
        ("casemate", &|| jailed.run(AUTO)),
        ("ring", &|| jailed.run(RING)),
        ("threads", &|| jailed.run(THREADS)),
        ("unjailed", &|| unjailed::run(&guest)),
        ("qemu_q35", &|| qemu::run(&arguments.qemu, &guest)),
    ];
    let mut series: Vec<Series> = runs.iter().map(|(name, _)| Series::new(name)).collect();
    for round in 1..=arguments.runs {
        for ((_, run), series) in runs.iter().zip(&mut series) {
            series.add(run)?;
        }
        eprintln!(
            "casemate-bench-devices: round {round} of {}",
            arguments.runs
        );
    }
    table::print(&series, arguments.json)
}

/// A backing file without holes.
fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("make {}", path.display()))?;
    let block: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
    for _ in 0..DISK_MIB {
        file.write_all(&block)?;
    }
    file.sync_all().context("fill the disk")
}

const DISK_MIB: u64 = 128;
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
