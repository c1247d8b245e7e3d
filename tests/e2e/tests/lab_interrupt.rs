//! Ctrl-C in the middle of the demo leaves nothing behind.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use casemate_e2e::cleanup::Traces;
use casemate_e2e::demo::{EvidenceFolder, Options, run};
use common::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn interrupted_while_it_launches() {
    interrupt_at("2. ", Signal::SIGINT);
}

#[test]
fn interrupted_while_the_guest_moves() {
    interrupt_at("  site-a to site-b", Signal::SIGTERM);
}

/// Not a test of its own: what the others interrupt.
#[test]
#[ignore = "started by the other tests of this file"]
fn the_demo() {
    let evidence = tempfile::tempdir().unwrap();
    run(&Options {
        product: product(),
        json: false,
        work: None,
        evidence: EvidenceFolder {
            write: evidence.path().to_owned(),
            found_at: evidence.path().to_owned(),
            verifier: "evidence-verify".into(),
        },
    })
    .unwrap();
}

fn interrupt_at(line: &str, signal: Signal) {
    // Two demos at a time would be two hosts of each name on one machine, and what one leaves the other would find.
    let _alone = ONE_DEMO.lock().unwrap_or_else(PoisonError::into_inner);
    let casemate = product().casemate;
    let before = Traces::survey(&casemate);
    let mut demo = Command::new(std::env::current_exe().unwrap());
    demo.args(["--ignored", "--exact", "the_demo", "--nocapture"])
        .stdout(Stdio::piped());
    let mut demo = demo.spawn().unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    let mut said = Vec::new();
    while !said
        .last()
        .is_some_and(|last: &String| last.starts_with(line))
    {
        let next = lines.next();
        assert!(next.is_some(), "the demo ended before {line:?}: {said:#?}");
        said.extend(next.map(Result::unwrap));
    }
    // In the middle of the step, not at its first instruction.
    std::thread::sleep(Duration::from_millis(300));
    let begun = Instant::now();
    kill(Pid::from_raw(demo.id().cast_signed()), signal).unwrap();
    lines.for_each(drop);
    assert_eq!(demo.wait().unwrap().code(), Some(128 + signal as i32));
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(
        Traces::settle(&casemate, &before, Duration::from_secs(5)),
        Vec::<String>::new()
    );
    let folder = std::env::temp_dir().join(format!("casemate-demo-{}", demo.id()));
    assert!(!folder.exists(), "{} is left", folder.display());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("nsfs"), "a namespace is left:\n{mounts}");
}

static ONE_DEMO: Mutex<()> = Mutex::new(());
