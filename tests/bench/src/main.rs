//! `casemate-bench-boot`: how a guest boots under Casemate, jail and filters on, beside QEMU's q35 and microvm.
//!
//! The same kernel, initramfs, command line and memory for each, in turn, several times. As process 1 it is the init of
//! that initramfs: it says one line and waits.

mod casemate;
mod guest;
mod measure;
mod qemu;
mod table;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;

use casemate::Casemate;
use measure::{Sample, Summary};
use qemu::Qemu;
use table::Report;

/// Boots the same guest under Casemate and QEMU in turn and compares.
#[derive(Parser)]
#[command(name = "casemate-bench-boot", version)]
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
    /// An initramfs with this program as its init.
    #[arg(long)]
    initrd: PathBuf,
    /// Let shared memory have huge pages first, as `casemate doctor` advises: a setting of the whole machine.
    #[arg(long)]
    huge_pages: bool,
    /// Boots of each.
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is booted.
pub struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::main();
    }
    let arguments = Arguments::parse();
    match bench(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemate-bench-boot: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    let guest = Guest {
        kernel: arguments.kernel.clone(),
        initrd: arguments.initrd.clone(),
    };
    if arguments.huge_pages {
        fs::write(HUGE_PAGES, "advise").with_context(|| format!("write {HUGE_PAGES}"))?;
    }
    let casemate = Casemate::start(&arguments.casemate, &guest)?;
    let q35 = Qemu::new(&arguments.qemu, "q35", &guest);
    let microvm = Qemu::new(&arguments.qemu, "microvm,isa-serial=on", &guest);
    let boots: [&dyn Fn() -> Result<Sample>; 3] =
        [&|| casemate.boot(false), &|| q35.boot(), &|| microvm.boot()];
    let mut series: [Series; 3] = Default::default();
    for run in 0..arguments.runs {
        for (boot, series) in boots.iter().zip(&mut series) {
            series.add(boot);
        }
        eprintln!("casemate-bench-boot: run {} of {}", run + 1, arguments.runs);
    }
    let mut equipped = Series::default();
    equipped.add(&|| casemate.boot(true));
    let [ours, q35, microvm] = series.map(|series| series.summary());
    let report = Report {
        casemate: ours.context("Casemate's guest did not boot")?,
        equipped_rss_mib: equipped
            .summary()
            .context("Casemate's guest with a disk and a card did not boot")?
            .rss_over_guest_mib,
        q35: q35.context("QEMU's q35 did not boot its guest")?,
        microvm,
    };
    report.print(arguments.json)
}

/// Boots of one VMM.
#[derive(Default)]
struct Series {
    samples: Vec<Sample>,
    faults: u32,
}

impl Series {
    /// Guests fault now and then under emulated nested virtualisation: such a boot is counted and done again; after too
    /// many there are no more.
    fn add(&mut self, boot: &dyn Fn() -> Result<Sample>) {
        while self.faults < MOST_FAULTS {
            match boot() {
                Ok(sample) => {
                    eprintln!("casemate-bench-boot: {sample:?}");
                    self.samples.push(sample);
                    return;
                }
                Err(error) => {
                    self.faults += 1;
                    eprintln!("casemate-bench-boot: {error:#}");
                }
            }
        }
    }

    fn summary(&self) -> Option<Summary> {
        (!self.samples.is_empty()).then(|| Summary::of(&self.samples, self.faults))
    }
}

const MOST_FAULTS: u32 = 3;
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
