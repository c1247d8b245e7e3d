//! The lab: a nested-KVM machine for tests and the demo, and the runner for both.
//!
//! Started as process 1 it is the `/init` of that machine.

mod apt;
mod backend;
mod bench_boot;
mod bench_devices;
mod bench_stream;
mod boot_disk;
mod command;
mod cpio;
mod debian_disk;
mod error;
mod fuzz;
mod guest_image;
mod init;
mod kernel;
mod machine;
mod mend;
mod paths;
mod payload;
mod prepare;
mod proto;
mod qmp;
mod run;
mod signals;
mod sys;
mod tasks;
mod tools;

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{ExitCode, ExitStatus},
};

use clap::{Parser, Subcommand};

use crate::{
    error::{Error, Result},
    paths::Paths,
    run::Request,
};

/// A nested-KVM machine for tests and the demo; a cargo target runner.
///
/// Environment: LAB=native|tcg|off chooses where programs run (default: native with hardware virtualisation, else tcg);
/// LAB_TIMEOUT=<seconds> ends them (default 300); LAB_PAYLOAD=<path>[:<path>…] takes files along; LAB_DMESG=1 shows
/// the lab kernel's log at the end; LAB_DIR=<dir> keeps the lab elsewhere than in cargo's target directory.
#[derive(Parser)]
#[command(name = "lab", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Fetch QEMU and the kernels, boot the lab once, and keep the snapshot.
    Prepare {
        /// Look for newer packages although everything is there.
        #[arg(long)]
        update: bool,
    },
    /// Run a program in a fresh lab; its output and exit status are ours. 124: timed out, 125: the lab failed.
    Run {
        /// Only programs whose file name starts so; others run on this machine as they are.
        #[arg(long, value_name = "PREFIX")]
        only: Option<String>,
        /// A file or directory to take along, at its own path or at another one.
        #[arg(long, value_name = "SRC[=DST]")]
        payload: Vec<String>,
        /// Bring back what the program leaves in the directory $LAB_OUT.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// How often a program that failed in a lab gets a fresh one, should the emulation have failed it.
        #[arg(long, value_name = "N", default_value_t = 0)]
        retries: u32,
        /// The program and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Unpack Debian packages, and what of their dependencies this machine lacks, into a directory.
    Fetch {
        /// The directory; what was there goes.
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// The packages.
        #[arg(required = true)]
        packages: Vec<String>,
    },
    /// Put together the kernel and initramfs that guests boot.
    GuestImage,
    /// Put together the firmware and the disk that guests with firmware boot; after `guest-image`.
    BootDisk,
    /// Make the Debian disk that tests boot, by host/examples/debian-disk.sh; needs root.
    DebianDisk,
    /// Get what is missing, build, and run the demo.
    Demo {
        /// Passed on to the demo.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Boot one guest under Casemate and under QEMU's q35 and microvm in turn, in one lab, and compare.
    BenchBoot {
        /// Boots of each.
        #[arg(long, default_value_t = 5)]
        runs: u32,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Measure disk and card of one guest under Casemate, with and without its sandbox, and under QEMU in turn, in one lab.
    BenchDevices {
        /// Guests of each.
        #[arg(long, default_value_t = 3)]
        runs: u32,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Run all tests: on this machine, and those named lab_* in the lab; then, unless that took 50
    /// minutes, those with Rego, and fuzz for a quarter of a minute a target.
    Verify,
    /// Measure our migration stream beside QEMU's, over loopback; prints JSON. Wants twice the size in memory, and more.
    BenchStream {
        /// Memory to move, in MiB.
        #[arg(long, value_name = "MIB", default_value_t = 4096)]
        size: u64,
        /// How often each way is measured; medians are printed.
        #[arg(long, default_value_t = 3)]
        rounds: u32,
    },
    /// Fuzz the parsers of `tests/fuzz` from their committed corpora.
    Fuzz {
        /// How long each target runs.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// These targets; all of them if none is named.
        targets: Vec<String>,
    },
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::main();
        return ExitCode::FAILURE;
    }
    match perform(Arguments::parse().task) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        Err(error) => {
            say(&error.to_string());
            ExitCode::from(match error {
                Error::Interrupted(signal) => u8::try_from(128 + signal).unwrap_or(LAB_FAILED),
                Error::Timeout(_) => TIMED_OUT,
                Error::Usage(_) => USAGE,
                _ => LAB_FAILED,
            })
        }
    }
}

/// Tell the user; never on stdout, which belongs to the program that runs.
fn say(text: &str) {
    eprintln!("lab: {text}");
}

/// The shell's convention: the code, or 128 and the signal.
fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

fn perform(task: Task) -> Result<i32> {
    // Programs that run here as they are get our place, and so must get our signal mask: before `catch`.
    if let Task::Run {
        only: Some(prefix),
        args,
        ..
    } = &task
        && !is_named(args, prefix)
    {
        return Err(backend::replace_tied(args));
    }
    signals::catch().map_err(|errno| Error::Usage(format!("cannot catch signals: {errno}")))?;
    let paths = Paths::find()?;
    match task {
        Task::Prepare { update } => prepare::prepare(&paths, update).map(|_| 0),
        Task::Run {
            payload,
            out,
            args,
            retries,
            ..
        } => {
            let mut request = Request::new(&paths, args)?;
            request.payload.extend(payload);
            request.out = out;
            request.retries = retries;
            run::run(&paths, &request)
        }
        Task::Fetch { to, packages } => prepare::fetch_packages(&paths, &packages, &to).map(|()| 0),
        Task::GuestImage => guest_image::make(&paths).map(|()| 0),
        Task::BootDisk => boot_disk::make(&paths).map(|()| 0),
        Task::DebianDisk => debian_disk::make(&paths).map(|()| 0),
        Task::Demo { args } => tasks::demo(&paths, args),
        Task::BenchBoot { runs, json } => bench_boot::bench(&paths, runs, json),
        Task::BenchDevices { runs, json } => bench_devices::bench(&paths, runs, json),
        Task::Verify => tasks::verify(&paths),
        Task::BenchStream { size, rounds } => bench_stream::bench_stream(&paths, size, rounds),
        Task::Fuzz { seconds, targets } => fuzz::fuzz(&paths, &targets, seconds),
    }
}

fn is_named(args: &[String], prefix: &str) -> bool {
    let name = args
        .first()
        .and_then(|program| Path::new(program).file_name()?.to_str());
    name.is_some_and(|name| name.starts_with(prefix))
}

const USAGE: u8 = 2;
const TIMED_OUT: u8 = 124;
const LAB_FAILED: u8 = 125;
