//! The workspace's two commands: `cargo demo` and `cargo verify`.

use std::{
    env, fs,
    io::ErrorKind,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::{
    backend::Backend,
    boot_disk,
    command::tied,
    debian_disk,
    error::{OnFile, Result},
    exit_code,
    fuzz::fuzz,
    guest_image,
    paths::{Paths, make_dir},
    prepare::{fetch_packages, prepare},
    run::{Request, run},
    say,
    signals::Guarded,
};

/// Get what is missing, build, and run the demo; returns its exit status.
pub fn demo(paths: &Paths, args: Vec<String>) -> Result<i32> {
    let backend = Backend::choose()?;
    say(match backend {
        Backend::Lab => {
            "no hardware virtualisation here: the demo runs in the lab, a nested-KVM machine under QEMU"
        }
        Backend::Native => {
            "hardware virtualisation found: the demo runs on this machine's /dev/kvm"
        }
        Backend::Off => "LAB=off: the demo runs on this machine as it is",
    });
    if backend == Backend::Lab {
        prepare(paths, false)?;
    }
    let packages = [
        "--package",
        "casemate",
        "--package",
        "casemate-guest",
        "--package",
        "casemate-agent",
        "--package",
        "casemate-e2e",
        "--package",
        "evidence-verify",
    ];
    let code = cargo(paths, &["build", "--release"], &packages, &[])?;
    if code != 0 {
        return Ok(code);
    }
    guest_image::make(paths)?;
    let verifier = paths.release.join("evidence-verify");
    let evidence = fresh_evidence(paths)?;
    let program = paths.release.join("casemate-demo").display().to_string();
    let mut all = vec![program];
    let files = [
        ("--casemate", paths.release.join("casemate")),
        ("--kernel", paths.guest_kernel()),
        ("--initrd", paths.guest_initrd()),
        ("--verifier", verifier.clone()),
        ("--evidence", evidence.clone()),
    ];
    all.extend(
        files
            .into_iter()
            .flat_map(|(option, path)| [option.to_owned(), path.display().to_string()]),
    );
    all.extend(args);
    let mut request = Request::new(paths, all)?;
    if env::var_os("LAB_TIMEOUT").is_none() {
        request.timeout = DEMO_TIMEOUT;
    }
    request.retries = DEMO_RETRIES;
    request.payload.push(verifier.display().to_string());
    request.out = Some(evidence);
    say("running the demo");
    run(paths, &request)
}

/// The folder in which the demo's evidence stays until the next demo.
fn fresh_evidence(paths: &Paths) -> Result<PathBuf> {
    let folder = paths.evidence();
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).on("remove", &folder)?,
        _ => {}
    }
    make_dir(&folder)?;
    Ok(folder)
}

/// All tests: unit, host and doc tests on this machine, `lab_*` tests each in a fresh lab.
///
/// A run has to end in time: if [`LONG`] has gone by when the tests have passed, what comes after them is left out, and said.
pub fn verify(paths: &Paths) -> Result<i32> {
    let begun = Instant::now();
    if Backend::choose()? == Backend::Lab {
        prepare(paths, false)?;
    }
    say("building everything");
    // With the tests: without them packages have other features, and all would be built twice.
    let task = ["build", "--release", "--workspace", "--bins", "--tests"];
    let code = cargo(paths, &task, &[], &[])?;
    if code != 0 {
        return Ok(code);
    }
    guest_image::make(paths)?;
    boot_disk::make(paths)?;
    debian_disk::make(paths)?;
    say("running unit, host, lab and doc tests; the lab_* tests each in a fresh lab");
    // One binary may hold many tests, each with guests of its own.
    let timeout = env::var("LAB_TIMEOUT").unwrap_or_else(|_| TEST_TIMEOUT.as_secs().to_string());
    let runner = format!(
        "{} run --only lab_ --retries {TEST_RETRIES}",
        paths.lab.display()
    );
    let code = cargo(
        paths,
        &["test", "--release", "--workspace", "--no-fail-fast"],
        &[],
        &[
            (RUNNER, runner),
            ("LAB_TIMEOUT", timeout),
            ("CASEMATE_JUDGES", judges(paths)?.display().to_string()),
        ],
    )?;
    if code != 0 {
        say("some tests failed, see above");
        return Ok(code);
    }
    if begun.elapsed() > LONG {
        say(&format!(
            "all tests passed, after {} minutes; NOT run for want of time: decisions with Rego (`cargo test -p casemate-policy \
             --features rego`, `cargo test -p casemate --features rego agent::decision`), and fuzzing (`cargo lab fuzz`)",
            begun.elapsed().as_secs() / 60
        ));
        return Ok(0);
    }
    say("running the tests of the policy crate, and of the agent's decisions, with Rego");
    for rego in [
        &["--package", "casemate-policy", "--features", "rego"][..],
        &[
            "--package",
            "casemate",
            "--features",
            "rego",
            "--lib",
            "agent::decision",
        ],
    ] {
        let code = cargo(paths, &["test", "--release"], rego, &[])?;
        if code != 0 {
            say("some tests failed, see above");
            return Ok(code);
        }
    }
    say("all tests passed; fuzzing");
    fuzz(paths, &[], FUZZ_SECONDS)
}

/// Programs by which tests judge what we write: ACPICA's compiler and `qemu-img`.
fn judges(paths: &Paths) -> Result<PathBuf> {
    let folder = paths.judges();
    let programs = ["iasl", "qemu-img"].map(|name| folder.join("usr/bin").join(name));
    if !programs.iter().all(|program| program.exists()) {
        fetch_packages(
            paths,
            &["acpica-tools", "qemu-utils"].map(str::to_owned),
            &folder,
        )?;
    }
    Ok(folder)
}

fn cargo(paths: &Paths, task: &[&str], packages: &[&str], env: &[(&str, String)]) -> Result<i32> {
    let mut command = clean_cargo(paths);
    command.args(task).args(packages).envs(env.iter().cloned());
    say(&format!("cargo {}", [task, packages].concat().join(" ")));
    Guarded::start(&mut command)?.wait().map(exit_code)
}

/// Build packages for release; returns cargo's exit status.
pub fn build(paths: &Paths, packages: &[&str]) -> Result<i32> {
    let packages: Vec<&str> = packages
        .iter()
        .flat_map(|package| ["--package", package])
        .collect();
    cargo(paths, &["build", "--release"], &packages, &[])
}

/// Cargo in the workspace, as a user would start it.
pub fn clean_cargo(paths: &Paths) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = tied(cargo, Signal::SIGTERM);
    command.current_dir(&paths.workspace);
    // Set for our own package by the `cargo run` that started us. Build scripts watch some of them, and what they build
    // would be built again each time.
    for (name, _) in
        env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_set_by_cargo_run))
    {
        command.env_remove(name);
    }
    command
}

fn is_set_by_cargo_run(name: &str) -> bool {
    let prefixes = [
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_BIN_",
        "CARGO_CRATE_",
        "CARGO_PRIMARY_",
    ];
    name == "CARGO" || prefixes.iter().any(|prefix| name.starts_with(prefix))
}

const RUNNER: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";

/// The demo itself promises three minutes on two cores; slower machines shall still see its own verdict.
const DEMO_TIMEOUT: Duration = Duration::from_secs(900);
/// A test program takes a minute or two, more on a busy machine.
const TEST_TIMEOUT: Duration = Duration::from_secs(420);

/// After this time only the tests themselves are run.
const LONG: Duration = Duration::from_secs(50 * 60);

/// What one fuzz target gets in a test run.
const FUZZ_SECONDS: u64 = 15;

/// How often a failed demo, or a failed test program, gets a fresh lab: see `run`.
const DEMO_RETRIES: u32 = 2;
const TEST_RETRIES: u32 = 4;
