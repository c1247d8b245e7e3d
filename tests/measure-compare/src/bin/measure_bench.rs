//! How fast measuring is, beside `sev-snp-measure`, in one run. Prints one JSON object.
//!
//! `measure-bench [--casemate FILE]`; the command is by default the one beside this program.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a measurement that fails says so by panicking"
)]

use casemate_attest::measure::guest::{Firmware, Technology};
use casemate_attest::measure::kernel_hashes::{FileHash, KernelHashes};
use casemate_attest::measure::ovmf::Ovmf;
use casemate_attest::measure::vcpu::{CpuModel, CpuSignature};
use casemate_measure_compare::guests::Guest;
use casemate_measure_compare::images::{Random, extended};
use casemate_measure_compare::peer::{Digest, Peer, Question};
use ring::digest;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

fn main() {
    let place = std::env::current_exe().unwrap();
    let release = place.parent().unwrap();
    let given = std::env::args()
        .skip_while(|word| word != "--casemate")
        .nth(1);
    let casemate = given.map_or_else(|| release.join("casemate"), PathBuf::from);
    let peer = Peer::install(&release.parent().unwrap().join("tmp"));
    let folder = tempfile::tempdir().unwrap();
    let guest = large_guest(folder.path());
    println!(
        "{}",
        serde_json::to_string_pretty(&measure(&guest, &peer, &casemate)).unwrap()
    );
}

fn measure(guest: &Guest, peer: &Peer, casemate: &Path) -> serde_json::Value {
    let theirs = peer.ask(&Question {
        guests: std::slice::from_ref(guest),
        repeat: REPEAT,
        id_blocks: &[],
    });
    let their_seconds = theirs.seconds[0].unwrap();
    let mut digest = None;
    let once = best(|| digest = Some(guest.measure().unwrap()));
    assert_eq!(theirs.digests[0], Digest::Measured(digest.unwrap()));

    let each = per_size(guest);
    let their_command = best(|| run(cli_arguments(peer.cli(), guest)));
    let our_command = best(|| {
        let mut command = Command::new(casemate);
        command.args(["attest", "measure"]);
        run(cli_arguments(command, guest));
    });
    let our_sizes = best(|| run(reference_arguments(casemate, guest)));

    let (sha256, sha384) = (hash_rate(&digest::SHA256), hash_rate(&digest::SHA384));
    let bytes = ((4 + 64) << 20) as f64;
    json!({
        "what": "SNP, 4 MiB OVMF, 48 MiB initrd, 16 MiB kernel, 4 vCPUs; best of several runs, files cached",
        "digests_are_equal": true,
        "threads": std::thread::available_parallelism().unwrap().get(),
        "ring_mb_per_s": { "sha256": sha256 / 1e6, "sha384": sha384 / 1e6 },
        "ours_mb_per_s": bytes / once / 1e6,
        "of_sha384_speed": bytes / once / sha384,
        "one_digest_from_files_in_process_s": { "ours": once, "sev_snp_measure": their_seconds, "ratio": their_seconds / once },
        "further_digest_of_same_files_in_process_s": { "ours": each, "sev_snp_measure": their_seconds, "ratio": their_seconds / each },
        "one_digest_whole_command_s": { "ours": our_command, "sev_snp_measure": their_command, "ratio": their_command / our_command },
        "digests_of_sizes_1_to_64_whole_commands_s": { "ours": our_sizes, "sev_snp_measure_64_times_one": their_command * 64.0, "ratio": their_command * 64.0 / our_sizes },
    })
}

/// A guest as large as the target names.
fn large_guest(folder: &Path) -> Guest {
    let mut random = Random(1);
    let write = |name: &str, content: Vec<u8>| {
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        path
    };
    Guest {
        mode: Technology::Snp,
        ovmf: write("ovmf", extended("AmdSev", 1024, 1)),
        kernel: Some(write("kernel", random.bytes(16 << 20))),
        initrd: Some(write("initrd", random.bytes(48 << 20))),
        append: Some("console=ttyS0".to_owned()),
        vcpus: 4,
        vcpu_signature: TYPE.parse::<CpuModel>().unwrap().signature().0,
        guest_features: 1,
    }
}

/// Seconds for one more digest of the same files, in another size.
fn per_size(guest: &Guest) -> f64 {
    let image = fs::read(&guest.ovmf).unwrap();
    let firmware = Firmware::new(Ovmf::parse(&image).unwrap());
    let hash = |path: &Option<PathBuf>| FileHash::of(&fs::read(path.as_ref().unwrap()).unwrap());
    let hashes = KernelHashes::new(&hash(&guest.kernel), Some(&hash(&guest.initrd)), None);
    let mut description = guest.describe(&firmware, Some(hashes));
    description.digest().unwrap();
    let mut signature = 0;
    let count = 10_000;
    best(|| {
        for _ in 0..count {
            signature += 1;
            description.signature = CpuSignature(signature);
            std::hint::black_box(description.digest().unwrap());
        }
    }) / f64::from(count)
}

fn cli_arguments(mut command: Command, guest: &Guest) -> Command {
    command.args(["--mode", "snp", "--vcpus", "4", "--vcpu-type", TYPE]);
    file_arguments(&mut command, guest);
    command
}

fn reference_arguments(casemate: &Path, guest: &Guest) -> Command {
    let mut command = Command::new(casemate);
    command
        .args([
            "attest",
            "reference",
            "make",
            "--name",
            "bench",
            "--mode",
            "snp",
        ])
        .args(["--vcpus", "1-64", "--vcpu-type", TYPE])
        .args(["--expires", "2100-01-01T00:00:00Z", "--out", "/dev/null"]);
    file_arguments(&mut command, guest);
    command
}

fn file_arguments(command: &mut Command, guest: &Guest) {
    command.args(["--append", guest.append.as_deref().unwrap()]);
    for (option, path) in [
        ("--ovmf", Some(&guest.ovmf)),
        ("--kernel", guest.kernel.as_ref()),
        ("--initrd", guest.initrd.as_ref()),
    ] {
        command.arg(option).arg(path.unwrap());
    }
}

fn run(mut command: Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

fn hash_rate(algorithm: &'static digest::Algorithm) -> f64 {
    let bytes = Random(2).bytes(32 << 20);
    let seconds = best(|| {
        std::hint::black_box(digest::digest(algorithm, &bytes));
    });
    bytes.len() as f64 / seconds
}

/// The shortest of several runs, in seconds.
fn best(mut work: impl FnMut()) -> f64 {
    (0..REPEAT)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

const REPEAT: u32 = 7;
const TYPE: &str = "EPYC-Milan";
