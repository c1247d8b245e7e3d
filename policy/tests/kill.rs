//! A process that writes a ledger is killed at every system call that changes a file, and at random moments; what it had
//! acknowledged is there afterwards, and nothing that was there before has changed.
//!
//! At each such call the child is killed before the call, after it, and after a call that wrote only half. Each of these
//! ends is judged twice: as the kernel keeps the files, and as a power cut may leave them, with everything gone that had
//! not been synchronised.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use casemate_policy::ledger::{Entry, Ledger, Nodes, Outcome, Signer, SystemClock, audit, merkle};
use nix::sys::ptrace;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::Ed25519KeyPair;

type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return child(Path::new(&folder), std::env::var_os(FOREVER).is_some());
    }
    let mut killed = 0;
    for way in [Way::Before, Way::After, Way::Half] {
        for call in 0.. {
            let Some(()) = run_and_kill(call, way).map_err(|e| format!("{way:?} {call}: {e}"))?
            else {
                break;
            };
            killed += 1;
        }
    }
    assert!(
        killed > 150,
        "only {killed} calls seen: the tracer sees too little"
    );
    for _ in 0..20 {
        kill_at_random()?;
    }
    println!("killed at {killed} system calls and at 20 random moments");
    Ok(())
}

/// Everything a ledger can do, each step acknowledged to the parent with the tree's size and root.
fn child(folder: &Path, forever: bool) -> Result<(), Failure> {
    std::io::stdin().read_exact(&mut [0])?;
    let mut ledger = open(folder)?;
    let acknowledge = |ledger: &Ledger| {
        let root = hex::encode(ledger.tree().root());
        writeln!(std::io::stdout(), "{} {root}", ledger.tree().size())
    };
    if forever {
        loop {
            ledger.append_signed(entry(0))?;
            acknowledge(&ledger)?;
            if ledger.tree().size() % 50 == 0 {
                ledger.rotate_file()?;
            }
        }
    }
    for n in 0..3 {
        ledger.append(entry(n))?;
        acknowledge(&ledger)?;
    }
    ledger.append_signed(entry(3))?;
    acknowledge(&ledger)?;
    ledger.append_all((0..260).map(entry).collect())?;
    acknowledge(&ledger)?;
    ledger.rotate_file()?;
    ledger.append(entry(4))?;
    acknowledge(&ledger)?;
    ledger.rotate_key(signer(folder, "key2")?)?;
    acknowledge(&ledger)?;
    ledger.rotate_file()?;
    ledger.append_signed(entry(5))?;
    acknowledge(&ledger)?;
    ledger.retain(265)?;
    acknowledge(&ledger)?;
    ledger.append(entry(6))?;
    acknowledge(&ledger)?;
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Before,
    After,
    Half,
}

/// Kills a child at its `call`th change to a file; nothing if it makes fewer.
fn run_and_kill(call: usize, way: Way) -> Result<Option<()>, Failure> {
    let folder = folder()?;
    let mut child = start(folder.path(), false)?;
    let pid = Pid::from_raw(child.id().try_into()?);
    ptrace::attach(pid)?;
    waitpid(pid, None)?;
    ptrace::setoptions(
        pid,
        ptrace::Options::PTRACE_O_EXITKILL | ptrace::Options::PTRACE_O_TRACESYSGOOD,
    )?;
    child.stdin.take().ok_or("no stdin")?.write_all(b"x")?;
    let (mut seen, mut inside, mut durable) = (0, None, BTreeMap::new());
    loop {
        ptrace::syscall(pid, None)?;
        match waitpid(pid, None)? {
            WaitStatus::PtraceSyscall(_) => {}
            WaitStatus::Exited(_, 0) => return Ok(None),
            WaitStatus::Stopped(_, _) => continue,
            other => return Err(format!("the child ended: {other:?}").into()),
        }
        let mut registers = ptrace::getregs(pid)?;
        let number = i64::try_from(registers.orig_rax)?;
        match inside.take() {
            None => {
                inside = Some(number);
                if CHANGES.contains(&number) && registers.rdi > 2 {
                    if seen == call && way == Way::Before {
                        break;
                    }
                    if seen == call && way == Way::Half {
                        if number != nix::libc::SYS_write {
                            // Only a write can be half done.
                            return finish(child).map(Some);
                        }
                        registers.rdx /= 2;
                        ptrace::setregs(pid, registers)?;
                    }
                }
            }
            Some(number) => {
                if SYNCS.contains(&number) {
                    durable = lengths(folder.path())?;
                }
                if CHANGES.contains(&number) && registers.rdi > 2 {
                    if seen == call {
                        break;
                    }
                    seen += 1;
                }
            }
        }
    }
    child.kill()?;
    let acknowledged = finish_and_read(child)?;
    let copy = copied(folder.path())?;
    judge(folder.path(), &acknowledged)?;
    for (file, length) in durable {
        let file = copy.path().join(file);
        if file.exists() {
            fs::OpenOptions::new()
                .write(true)
                .open(file)?
                .set_len(length)?;
        }
    }
    judge(copy.path(), &acknowledged).map_err(|e| format!("after a power cut: {e}"))?;
    Ok(Some(()))
}

fn kill_at_random() -> Result<(), Failure> {
    let folder = folder()?;
    let mut child = start(folder.path(), true)?;
    child.stdin.take().ok_or("no stdin")?.write_all(b"x")?;
    let mut random = [0];
    SystemRandom::new()
        .fill(&mut random)
        .map_err(|e| e.to_string())?;
    std::thread::sleep(Duration::from_millis(10 + u64::from(random[0]) / 2));
    child.kill()?;
    let acknowledged = finish_and_read(child)?;
    judge(folder.path(), &acknowledged)
}

/// The ledger opens, has everything that was acknowledged, goes on, and verifies.
fn judge(folder: &Path, acknowledged: &[(u64, String)]) -> Result<(), Failure> {
    let mut ledger = open(folder)?;
    let have = ledger.tree().size();
    for (size, root) in acknowledged {
        let found = ledger.tree().root_at(*size)?.map(hex::encode);
        if found.as_ref() != Some(root) {
            return Err(format!("{size} records were acknowledged, and {have} are there").into());
        }
    }
    ledger.append_signed(entry(9))?;
    drop(ledger);
    let key = signer(folder, "key1")?.verifying_key();
    let mut frontier = None;
    let audited = audit(&folder.join("ledger"), &[key], &[], &mut |record, leaf| {
        let frontier: &mut merkle::Frontier = frontier.get_or_insert_default();
        if record.seq == frontier.size() {
            frontier.push(merkle::leaf_hash(leaf.as_bytes()));
        }
    })?;
    assert_eq!(audited.uncovered(), 0);
    Ok(())
}

fn start(folder: &Path, forever: bool) -> Result<Child, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(FOLDER, folder);
    if forever {
        command.env(FOREVER, "1");
    }
    Ok(command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?)
}

fn finish(mut child: Child) -> Result<(), Failure> {
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn finish_and_read(mut child: Child) -> Result<Vec<(u64, String)>, Failure> {
    child.wait()?;
    let mut acknowledged = Vec::new();
    for line in BufReader::new(child.stdout.take().ok_or("no stdout")?).lines() {
        let line = line?;
        let (size, root) = line.split_once(' ').ok_or("no acknowledgement")?;
        // The last one may have been cut off on its way.
        if root.len() == 64 {
            acknowledged.push((size.parse()?, root.to_owned()));
        }
    }
    Ok(acknowledged)
}

/// A fresh folder, in memory for speed, with two keys.
fn folder() -> Result<tempfile::TempDir, Failure> {
    let folder = tempfile::tempdir_in(if Path::new("/dev/shm").is_dir() {
        "/dev/shm"
    } else {
        "/tmp"
    })?;
    for name in ["key1", "key2"] {
        let key =
            Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|e| e.to_string())?;
        fs::write(folder.path().join(name), key.as_ref())?;
    }
    Ok(folder)
}

fn open(folder: &Path) -> Result<Ledger, Failure> {
    let keys = vec![signer(folder, "key1")?, signer(folder, "key2")?];
    Ok(Ledger::open_with_keys(
        &folder.join("ledger"),
        keys,
        Box::new(SystemClock),
    )?)
}

fn signer(folder: &Path, name: &str) -> Result<Signer, Failure> {
    Ok(Signer::from_pkcs8(
        "log.test",
        &fs::read(folder.join(name))?,
    )?)
}

fn entry(n: u64) -> Entry {
    Entry::new("agent", "launch", &format!("vm-{n}"), Outcome::Done).with("n", n)
}

/// The lengths of the files that records stand in.
fn lengths(folder: &Path) -> Result<BTreeMap<PathBuf, u64>, Failure> {
    let mut lengths = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            lengths.insert(entry.file_name().into(), entry.metadata()?.len());
        }
    }
    Ok(lengths)
}

fn copied(folder: &Path) -> Result<tempfile::TempDir, Failure> {
    let copy = tempfile::tempdir_in(folder.parent().ok_or("no parent")?)?;
    let status = Command::new("cp")
        .arg("-a")
        .arg(folder.join("."))
        .arg(copy.path())
        .status()?;
    assert!(status.success());
    Ok(copy)
}

const FOLDER: &str = "CASEMATE_TEST_LEDGER";
const FOREVER: &str = "CASEMATE_TEST_FOREVER";
/// Calls that change files.
const CHANGES: [i64; 11] = [
    nix::libc::SYS_write,
    nix::libc::SYS_openat,
    nix::libc::SYS_ftruncate,
    nix::libc::SYS_rename,
    nix::libc::SYS_renameat2,
    nix::libc::SYS_unlink,
    nix::libc::SYS_mkdir,
    nix::libc::SYS_fsync,
    nix::libc::SYS_fdatasync,
    nix::libc::SYS_syncfs,
    nix::libc::SYS_flock,
];
/// Calls after which what was written before survives a power cut.
const SYNCS: [i64; 3] = [
    nix::libc::SYS_fsync,
    nix::libc::SYS_fdatasync,
    nix::libc::SYS_syncfs,
];
