//! `casemate-demo`: launch, prove, move; exit status 0 only if everything held.

use std::path::PathBuf;
use std::process::ExitCode;

use casemate_e2e::demo::{EvidenceFolder, Options, run};
use casemate_e2e::world::Product;
use clap::Parser;

/// One confidential guest, end to end, on two sites of this machine. Needs root and /dev/kvm.
#[derive(Parser)]
#[command(name = "casemate-demo", version)]
struct Arguments {
    /// The casemate program.
    #[arg(long)]
    casemate: PathBuf,
    /// The guest's kernel (bzImage).
    #[arg(long)]
    kernel: PathBuf,
    /// The guest's initramfs.
    #[arg(long)]
    initrd: PathBuf,
    /// Where the evidence shall be found; what a runner brings out of $LAB_OUT to there is left to it.
    #[arg(long)]
    evidence: PathBuf,
    /// The independent verifier of evidence.
    #[arg(long)]
    verifier: PathBuf,
    /// Print one JSON object last on stdout, everything else on stderr.
    #[arg(long)]
    json: bool,
    /// Folder for all files, empty or absent; removed at the end.
    #[arg(long)]
    work: Option<PathBuf>,
}

fn main() -> ExitCode {
    let Arguments {
        casemate,
        kernel,
        initrd,
        evidence,
        verifier,
        json,
        work,
    } = Arguments::parse();
    let write = std::env::var_os("LAB_OUT").map_or_else(|| evidence.clone(), PathBuf::from);
    let options = Options {
        product: Product {
            casemate,
            kernel,
            initrd,
        },
        json,
        work,
        evidence: EvidenceFolder {
            write,
            found_at: evidence,
            verifier,
        },
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("casemate-demo: {error}");
            ExitCode::FAILURE
        }
    }
}
