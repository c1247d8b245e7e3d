//! Fuzzing: the targets of `tests/fuzz`, each from its committed corpus and for a given time.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    thread::available_parallelism,
};

use nix::sys::signal::Signal;

use crate::{
    command::{output, tail, tied},
    error::{Error, OnFile, Result},
    exit_code,
    paths::{Paths, make_dir, read},
    say,
    signals::Guarded,
    tasks::clean_cargo,
};

/// Build all targets and run `names` (all of them if empty), as many at once as there are cores, each for `seconds`.
///
/// Returns 0 if none crashed, hung, or took more memory than it may. What a target finds is kept beside the build; new
/// inputs worth keeping are committed by hand.
pub fn fuzz(paths: &Paths, names: &[String], seconds: u64) -> Result<i32> {
    let places = Places::new(paths);
    let names = chosen(&places, names)?;
    build(paths, &places)?;
    let at_once = available_parallelism().map_or(1, usize::from);
    let mut failed = 0;
    for group in names.chunks(at_once) {
        let mut running = Vec::new();
        for name in group {
            say(&format!("fuzzing {name} for {seconds} s"));
            running.push((name, Guarded::start(&mut run(&places, name, seconds)?)?));
        }
        for (name, mut child) in running {
            let code = exit_code(child.wait()?);
            say(&summary(&places, name, code)?);
            failed += usize::from(code != 0);
        }
    }
    let total = names.len();
    say(&format!("{} of {total} fuzz targets held", total - failed));
    Ok(i32::from(failed != 0))
}

struct Places {
    /// The targets' workspace.
    source: PathBuf,
    /// What cargo builds, what targets find, what they say.
    out: PathBuf,
}

impl Places {
    fn new(paths: &Paths) -> Self {
        let target = paths.root.parent().unwrap_or(&paths.root);
        Self {
            source: paths.workspace.join("tests/fuzz"),
            out: target.join("fuzz"),
        }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.out.join("log").join(name)
    }

    fn artifacts(&self, name: &str) -> PathBuf {
        self.out.join("artifacts").join(name)
    }
}

fn chosen(places: &Places, names: &[String]) -> Result<Vec<String>> {
    let folder = places.source.join("fuzz_targets");
    let mut all = Vec::new();
    for entry in fs::read_dir(&folder).on("list", &folder)? {
        let path = entry.on("list", &folder)?.path();
        all.extend(
            path.file_stem()
                .and_then(|stem| Some(stem.to_str()?.to_owned())),
        );
    }
    all.sort();
    if let Some(stranger) = names.iter().find(|name| !all.contains(name)) {
        let known = all.join(", ");
        return Err(Error::Usage(format!(
            "no fuzz target `{stranger}`; there are {known}"
        )));
    }
    Ok(if names.is_empty() {
        all
    } else {
        names.to_vec()
    })
}

/// As cargo-fuzz builds them, but in parallel and little optimised: a run is short, and the build would take most of it.
fn build(paths: &Paths, places: &Places) -> Result<()> {
    say("building the fuzz targets");
    let mut command = clean_cargo(paths);
    command
        .args(["build", "--quiet", "--release", "--bins", "--manifest-path"])
        .arg(places.source.join("Cargo.toml"))
        .args(["--target", TRIPLE, "--target-dir"])
        .arg(&places.out)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", FLAGS.join(" "))
        .env("RUSTC_BOOTSTRAP", "1");
    output(&mut command).map(drop)
}

fn run(places: &Places, name: &str, seconds: u64) -> Result<Command> {
    let (log, artifacts) = (places.log(name), places.artifacts(name));
    let found = places.out.join("found").join(name);
    for folder in [&artifacts, &found, &log.with_file_name("")] {
        make_dir(folder)?;
    }
    let log = File::create(&log).on("create", &log)?;
    let program = places.out.join(TRIPLE).join("release").join(name);
    let mut command = tied(program, Signal::SIGTERM);
    command
        .arg(&found)
        .arg(places.source.join("corpus").join(name))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(LIMITS)
        .stdout(log.try_clone().on("share", Path::new("a log"))?)
        .stderr(log);
    Ok(command)
}

fn summary(places: &Places, name: &str, code: i32) -> Result<String> {
    let said = String::from_utf8_lossy(&read(&places.log(name))?).into_owned();
    if code != 0 {
        let end = why(&said);
        let kept = places.artifacts(name);
        return Ok(format!(
            "{name} FAILED, its input is kept in {}:\n{end}",
            kept.display()
        ));
    }
    let runs = said.lines().find(|line| line.starts_with("Done "));
    Ok(format!(
        "{name} held: {}",
        runs.unwrap_or("but said nothing")
    ))
}

/// The panic or the sanitizer's complaint, without the stack below it.
fn why(said: &str) -> String {
    let told = |line: &str| line.contains("panicked at") || line.contains("ERROR: ");
    let from = said.lines().skip_while(|line| !told(line)).take(6);
    match from.collect::<Vec<_>>() {
        lines if lines.is_empty() => tail(said, 20),
        lines => lines.join("\n"),
    }
}

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Coverage that libFuzzer reads, and AddressSanitizer: unstable flags of the pinned compiler.
const FLAGS: [&str; 8] = [
    "--cfg fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-sanitizer-coverage-stack-depth",
    "-Zsanitizer=address",
];
/// An input may take ten seconds and memory in proportion to the largest input there is, 64 MiB of firmware.
const LIMITS: [&str; 4] = [
    "-timeout=10",
    "-rss_limit_mb=1024",
    "-malloc_limit_mb=160",
    "-print_final_stats=1",
];
