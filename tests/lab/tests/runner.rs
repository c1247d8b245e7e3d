//! The runner, from outside: what goes in, what comes out, what stays behind.
//!
//! The programs that run inside the lab are the `inner_*` tests of this very binary.
#![expect(
    clippy::unwrap_used,
    reason = "the whole file is tests and their helpers"
)]

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::{Pid, chdir, pivot_root},
};

#[test]
fn output_and_exit_codes_come_through_exactly() {
    let output = lab(&["inner_prints_and_exits_with_21"]).output().unwrap();
    assert_eq!(output.status.code(), Some(21), "{}", text(&output));
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("to stdout"),
        "{}",
        text(&output)
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "to stderr\n",
        "the lab itself is silent"
    );

    let output = lab(&["inner_fails"]).output().unwrap();
    assert_eq!(output.status.code(), Some(101), "{}", text(&output));
    assert!(
        text(&output).contains("this failure is wanted"),
        "{}",
        text(&output)
    );
}

#[test]
fn a_signal_is_told_as_the_shell_tells_it() {
    let output = lab(&["inner_aborts"]).output().unwrap();
    assert_eq!(
        output.status.code(),
        Some(128 + Signal::SIGABRT as i32),
        "{}",
        text(&output)
    );
}

#[test]
fn the_lab_is_a_host_for_guests() {
    let mut command = lab(&["inner_sees_a_host_for_guests"]);
    let output = command
        .env("CASEMATE_STARTED", now().to_string())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("1 passed"), "{}", text(&output));
}

#[test]
fn every_run_is_fresh_and_two_run_at_once() {
    let mut runs: Vec<Child> = (0..2)
        .map(|_| quiet(&mut lab(&["inner_leaves_a_mark"])))
        .collect();
    for run in &mut runs {
        assert_eq!(run.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn much_output_arrives_whole_and_files_come_back() {
    let out = tempfile::tempdir().unwrap();
    let extra = out.path().join("extra.txt");
    fs::write(&extra, "taken along").unwrap();
    let mut command = Command::new(LAB);
    command
        .env("LAB", "tcg")
        .arg("run")
        .arg("--out")
        .arg(out.path().join("back"));
    command
        .arg("--payload")
        .arg(format!("{}=/data/extra.txt", extra.display()));
    let output = command
        .args(inner(&["inner_writes_much"]))
        .output()
        .unwrap();
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(
        output.stdout.iter().filter(|byte| **byte == b'#').count(),
        MUCH
    );
    assert_eq!(
        fs::read_to_string(out.path().join("back/sub/copy.txt")).unwrap(),
        "taken along"
    );
}

#[test]
fn a_program_that_hangs_is_ended() {
    let started = Instant::now();
    let output = lab(&["inner_hangs"])
        .env("LAB_TIMEOUT", "2")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(124), "{}", text(&output));
    assert!(
        text(&output).contains("timed out after 2 s"),
        "{}",
        text(&output)
    );
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_lab_that_dies_is_no_test_result() {
    let output = lab(&["inner_kills_the_lab"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", text(&output));
    assert!(text(&output).contains("lab: the lab"), "{}", text(&output));
}

#[test]
fn a_stopped_lab_leaves_nothing() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
        let (mut run, pid) = started_hanging();
        let qemu = children_of(pid);
        assert_eq!(qemu.len(), 1, "one QEMU a lab");
        kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
        let status = run.wait().unwrap();
        if signal != Signal::SIGKILL {
            assert_eq!(status.code(), Some(128 + signal as i32));
        }
        within_seconds(5, || qemu.iter().all(|pid| !is_alive(*pid)));
        assert!(!scratch_of(pid), "{signal} leaves a scratch directory");
    }
}

#[test]
fn listing_needs_no_lab() {
    let output = Command::new(LAB)
        .env("LAB", "tcg")
        .env("LAB_DIR", "/proc/none")
        .arg("run")
        .args([&this(), "--list"])
        .output();
    let refused = output.unwrap();
    assert_eq!(
        refused.status.code(),
        Some(125),
        "an impossible directory is told: {}",
        text(&refused)
    );
    let fresh = tempfile::tempdir().unwrap();
    let mut list = Command::new(LAB);
    list.env("LAB", "tcg")
        .env("LAB_DIR", fresh.path())
        .args(["run", &this(), "--list"]);
    let output = list.output().unwrap();
    assert!(
        text(&output).contains("listing_needs_no_lab: test"),
        "{}",
        text(&output)
    );
    assert_eq!(
        fs::read_dir(fresh.path()).unwrap().count(),
        0,
        "nothing was fetched"
    );
}

#[test]
#[ignore = "runs inside the lab"]
fn inner_prints_and_exits_with_21() {
    println!("to stdout");
    eprintln!("to stderr");
    std::process::exit(21);
}

#[test]
#[ignore = "runs inside the lab"]
fn inner_fails() {
    panic!("this failure is wanted");
}

#[test]
#[ignore = "runs inside the lab"]
fn inner_aborts() {
    std::process::abort();
}

#[test]
#[ignore = "runs inside the lab"]
fn inner_sees_a_host_for_guests() {
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    for parameter in ["npt", "nested"] {
        let value =
            fs::read_to_string(format!("/sys/module/kvm_amd/parameters/{parameter}")).unwrap();
        assert!(matches!(value.trim(), "1" | "Y"), "{parameter}={value}");
    }
    for device in [
        "/dev/net/tun",
        "/dev/vhost-vsock",
        "/dev/userfaultfd",
        "/dev/loop-control",
    ] {
        assert!(Path::new(device).exists(), "{device}");
    }
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap();
    assert!(
        ["cpu", "memory", "pids"]
            .iter()
            .all(|name| controllers.contains(name)),
        "{controllers}"
    );
    let started: u64 = std::env::var("CASEMATE_STARTED").unwrap().parse().unwrap();
    assert!(
        now() - started < 20,
        "the clock is not the host's: {} {started}",
        now()
    );
    std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|l| std::net::TcpStream::connect(l.local_addr()?))
        .unwrap();
    pivots_root();
}

/// Jails do this; it fails on an initial root file system.
fn pivots_root() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    fs::create_dir("/tmp/jail").unwrap();
    mount(
        Some("jail"),
        "/tmp/jail",
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    chdir("/tmp/jail").unwrap();
    pivot_root(".", ".").unwrap();
    umount2(".", MntFlags::MNT_DETACH).unwrap();
    assert_eq!(fs::read_dir("/").unwrap().count(), 0);
}

#[test]
#[ignore = "runs inside the lab"]
fn inner_leaves_a_mark() {
    fs::File::create_new("/run/mark").unwrap();
}

#[test]
#[ignore = "runs inside the lab"]
fn inner_writes_much() {
    let line = [b'#'; 1023];
    let mut stdout = std::io::stdout().lock();
    for _ in 0..MUCH / line.len() {
        stdout.write_all(&line).unwrap();
        stdout.write_all(b"\n").unwrap();
    }
    let out = std::env::var("LAB_OUT").unwrap();
    fs::create_dir(format!("{out}/sub")).unwrap();
    fs::copy("/data/extra.txt", format!("{out}/sub/copy.txt")).unwrap();
}

#[test]
#[ignore = "runs inside the lab"]
fn inner_hangs() {
    println!("hanging");
    std::io::stdout().flush().unwrap();
    thread::sleep(Duration::from_secs(100));
}

#[test]
#[ignore = "runs inside the lab"]
fn inner_kills_the_lab() {
    fs::write("/proc/sys/kernel/sysrq", "1").unwrap();
    fs::write("/proc/sysrq-trigger", "c").unwrap();
}

/// `lab run` of tests of this binary, in the lab whatever this machine can.
fn lab(tests: &[&str]) -> Command {
    let mut command = Command::new(LAB);
    command
        .env("LAB", "tcg")
        .env_remove("LAB_PAYLOAD")
        .arg("run")
        .args(inner(tests));
    command
}

fn inner(tests: &[&str]) -> Vec<String> {
    let options = ["--ignored", "--exact", "--nocapture", "--test-threads=1"];
    std::iter::once(this())
        .chain(options.iter().chain(tests).map(|text| (*text).to_owned()))
        .collect()
}

fn this() -> String {
    std::env::current_exe().unwrap().display().to_string()
}

fn quiet(command: &mut Command) -> Child {
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// A lab whose program runs and does not end.
fn started_hanging() -> (Child, u32) {
    let mut run = lab(&["inner_hangs"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(run.stdout.take().unwrap()).lines();
    assert!(
        lines
            .map_while(Result::ok)
            .any(|line| line.contains("hanging"))
    );
    let pid = run.id();
    (run, pid)
}

fn children_of(parent: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let parent = format!("PPid:\t{parent}\n");
    pids.filter(|pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|s| s.contains(&parent))
    })
    .collect()
}

fn now() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()
}

fn is_alive(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.contains("State:") && !status.contains("State:\tZ")
}

fn within_seconds(seconds: u64, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !done() {
        assert!(Instant::now() < deadline, "not done after {seconds} s");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a run of this process left its scratch directory.
fn scratch_of(pid: u32) -> bool {
    let runs = Path::new(LAB).ancestors().nth(3).unwrap().join("lab/run");
    fs::read_dir(runs).unwrap().any(|entry| {
        entry
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with(&format!("{pid}-"))
    })
}

const LAB: &str = env!("CARGO_BIN_EXE_lab");
const MUCH: usize = 1023 * 5000;
