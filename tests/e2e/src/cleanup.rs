//! Nothing stays behind, whichever way a run ends; and a survey that proves it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use crate::error::{E2eError, OnFile, Result, io};

/// Knows what must end and go.
#[derive(Clone, Debug, Default)]
pub struct Cleanup(Arc<Mutex<Register>>);

#[derive(Debug, Default)]
struct Register {
    ended: bool,
    agents: BTreeSet<u32>,
    folders: BTreeSet<PathBuf>,
}

impl Cleanup {
    /// Nothing to clean yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on SIGINT and SIGTERM end everything that is registered, and then this process.
    pub fn on_signals(&self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(io("start the signal thread"))?;
        let (mut interrupt, mut terminate) = {
            let _inside = runtime.enter();
            let catch = |kind| signal(kind).map_err(io("catch signals"));
            (
                catch(SignalKind::interrupt())?,
                catch(SignalKind::terminate())?,
            )
        };
        let register = self.clone();
        let wait = move || {
            let number = runtime.block_on(async {
                tokio::select! { _ = interrupt.recv() => libc::SIGINT, _ = terminate.recv() => libc::SIGTERM }
            });
            eprintln!("\ninterrupted; cleaning up");
            register.end();
            std::process::exit(128 + number);
        };
        thread::Builder::new()
            .name("signals".into())
            .spawn(wait)
            .map(drop)
            .map_err(io("start the signal thread"))
    }

    /// Makes a folder that goes with everything in it.
    pub fn folder(&self, path: &Path) -> Result<()> {
        let mut register = self.lock();
        if register.ended {
            return Err(E2eError::Interrupted);
        }
        fs::create_dir_all(path).on("create", path)?;
        register.folders.insert(path.to_owned());
        Ok(())
    }

    /// Starts a process under the lock, so that a signal either finds it or prevents it.
    pub fn start<T>(&self, start: impl FnOnce() -> Result<(u32, T)>) -> Result<T> {
        let mut register = self.lock();
        if register.ended {
            return Err(E2eError::Interrupted);
        }
        let (pid, child) = start()?;
        register.agents.insert(pid);
        Ok(child)
    }

    /// A process that has been waited for.
    pub fn forget(&self, pid: u32) {
        self.lock().agents.remove(&pid);
    }

    /// Ends the processes (asked first, killed after [`GRACE`]) and removes the folders.
    pub fn end(&self) {
        let mut register = self.lock();
        register.ended = true;
        signal_all(&register.agents, Signal::SIGTERM);
        let deadline = Instant::now() + GRACE;
        while register.agents.iter().any(|pid| is_alive(*pid)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        signal_all(&register.agents, Signal::SIGKILL);
        register.agents.clear();
        for folder in std::mem::take(&mut register.folders) {
            if let Err(error) = fs::remove_dir_all(&folder)
                && folder.exists()
            {
                eprintln!("{} stays behind: {error}", folder.display());
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Register> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Processes of the product and cgroups of its roles on this machine at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Looks around; `casemate` is the program whose processes count.
    pub fn survey(casemate: &Path) -> Self {
        let mut traces = BTreeSet::new();
        let program = fs::canonicalize(casemate).unwrap_or_else(|_| casemate.to_owned());
        for pid in processes() {
            let folder = PathBuf::from(format!("/proc/{pid}"));
            if fs::read_link(folder.join("exe")).is_ok_and(|exe| exe == program) && is_alive(pid) {
                let words = fs::read(folder.join("cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&words).replace('\0', " ");
                traces.insert(format!("process {pid} ({})", line.trim()));
            }
        }
        cgroups(&cgroup_root(), &mut traces, 4);
        Self(traces)
    }

    /// What is there now and was not before.
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// Waits until nothing new is there, at most `time`; returns what still is. The kernel ends processes and
    /// cgroups a moment after their parents.
    pub fn settle(casemate: &Path, before: &Self, time: Duration) -> Vec<String> {
        let deadline = Instant::now() + time;
        loop {
            let left = Self::survey(casemate).since(before);
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Whether a process exists and is more than a zombie.
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| state != 'Z' && state != 'X')
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut fields = mounts.lines().map(|line| line.split(' '));
    fields
        .find_map(|mut f| match (f.next(), f.next(), f.next()) {
            (_, Some(at), Some("cgroup2")) => Some(PathBuf::from(at)),
            _ => None,
        })
        .unwrap_or_else(|| "/sys/fs/cgroup".into())
}

fn cgroups(folder: &Path, traces: &mut BTreeSet<String>, depth: usize) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|t| t.is_dir()) {
            continue;
        }
        if entry.file_name().to_string_lossy().starts_with("casemate") {
            traces.insert(format!("cgroup {}", entry.path().display()));
        }
        if depth > 0 {
            cgroups(&entry.path(), traces, depth - 1);
        }
    }
}

fn signal_all(processes: &BTreeSet<u32>, signal: Signal) {
    for pid in processes {
        // A process that is gone already is just as good.
        let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
    }
}

/// How long a process may take to end when asked.
const GRACE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_a_trace_until_it_ends() {
        let program = fs::canonicalize("/bin/sleep").unwrap();
        let before = Traces::survey(&program);
        let mut child = Command::new(&program)
            .arg("60")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let left = Traces::settle(&program, &before, Duration::ZERO);
        assert!(
            left.iter()
                .any(|l| l.starts_with(&format!("process {} ", child.id()))),
            "{left:?}"
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(
            Traces::settle(&program, &before, Duration::from_secs(5)),
            Vec::<String>::new()
        );
    }

    #[test]
    fn the_end_stops_processes_removes_folders_and_lets_nothing_start() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("work");
        let cleanup = Cleanup::new();
        cleanup.folder(&inner).unwrap();
        let start = || {
            let child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
            Ok((child.id(), child))
        };
        let mut child = cleanup.start(start).unwrap();
        cleanup.end();
        assert!(!is_alive(child.id()) && !inner.exists());
        child.wait().unwrap();
        assert!(matches!(cleanup.start(start), Err(E2eError::Interrupted)));
    }
}
