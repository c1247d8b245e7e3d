//! The cell of each role, from inside and outside: real child processes in real jails. Needs root.
//!
//! The test binary plays the role: started again by `Spawn` with a scenario in its environment, it never
//! reaches `main` (see `CHILD`), so that it is as single-threaded as a role's process is.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![expect(
    unsafe_code,
    reason = "the children make calls on purpose that safe code cannot"
)]

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use casemate::ipc::{Channel, IpcError};
use casemate::sandbox::jail::{FIRST_UID, JailSpec, RoleProcess, Spawn};
use casemate::sandbox::report::{ProbeReport, SandboxReport};
use casemate::sandbox::seccomp::{self, Cond, Rule, ThreadKind};
use casemate::sandbox::{Role, enter_jail};

const ROLES: [Role; 3] = [Role::Vmm, Role::Mover, Role::Psp];
const SOON: Option<Duration> = Some(Duration::from_secs(30));

#[test]
fn each_role_is_what_its_report_says() {
    for role in ROLES {
        let (child, channel) = start(role, "report");
        let report: SandboxReport = channel.recv(SOON).unwrap().body;
        assert_eq!(report.role, role.name());
        assert!(report.uid >= FIRST_UID && report.gid == report.uid);
        assert!(report.capabilities.is_empty(), "{:?}", report.capabilities);
        assert!(report.no_new_privs && !report.dumpable);
        assert_eq!(
            report.namespaces,
            ["mnt", "net", "ipc", "uts", "cgroup", "pid"]
        );
        // 0, 1, 2, the channel, the status file.
        assert_eq!(report.descriptors, 5);
        assert!(report.landlock_abi >= 2 && !report.landlock.is_empty());
        assert!(
            report.notes.iter().any(|n| n.starts_with("cgroup")),
            "{:?}",
            report.notes
        );
        let filters: Vec<_> = report.threads.iter().map(|t| t.filter.as_str()).collect();
        let mut expected = vec![role.probe().name(), role.control().name()];
        if role == Role::Vmm {
            expected.splice(0..0, ["vmm-vcpu", "vmm-device"]);
        }
        let sorted = |mut v: Vec<&str>| {
            v.sort_unstable();
            v.join(" ")
        };
        assert_eq!(sorted(filters), sorted(expected));
        assert!(
            report
                .threads
                .iter()
                .all(|t| t.mode == 2 && t.filter_sha256.len() == 64)
        );
        agrees_with_proc(&child, &report);
        finish(child, channel);
    }
}

/// The same from outside, where the role cannot lie.
fn agrees_with_proc(child: &RoleProcess, report: &SandboxReport) {
    let proc = |file: &str| format!("/proc/{}/{file}", child.pid());
    let status = std::fs::read_to_string(proc("status")).unwrap();
    let field = |key: &str| {
        let line = status.lines().find(|l| l.starts_with(key)).unwrap();
        line.split_whitespace()
            .skip(1)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(field("Uid:"), vec![report.uid.to_string(); 4].join(" "));
    assert_eq!(field("Groups:"), "");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0, "{set}");
    }
    assert!(field("NSpid:").ends_with(" 1"));
    let mut modes = 0;
    for task in std::fs::read_dir(proc("task")).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains("\nSeccomp:\t2\n"), "{status}");
        modes += 1;
    }
    assert_eq!(modes, report.threads.len());
    for ns in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{ns}")).unwrap();
        assert_ne!(of(&child.pid().to_string()), of("self"), "{ns}");
    }
    let mounts = std::fs::read_to_string(proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let root: Vec<_> = std::fs::read_dir(proc("root")).unwrap().collect();
    assert!(root.is_empty(), "{root:?}");
    let written = std::fs::write(proc("root/x"), "").unwrap_err();
    assert_eq!(written.raw_os_error(), Some(libc::EROFS));
    let descriptors = std::fs::read_dir(proc("fd")).unwrap().count();
    assert_eq!(descriptors, 5);
    let limits = std::fs::read_to_string(proc("limits")).unwrap();
    for (limit, value) in [
        ("Max core file size", "0"),
        ("Max locked memory", "0"),
        ("Max open files", "256"),
        ("Max msgqueue size", "0"),
    ] {
        let line = limits.lines().find(|l| l.starts_with(limit)).unwrap();
        assert_eq!(
            line.split_whitespace().rev().nth(2).unwrap(),
            value,
            "{line}"
        );
    }
}

#[test]
fn the_probe_of_each_role_is_refused_everything_by_seccomp() {
    for role in ROLES {
        let (child, channel) = start(role, "probe");
        let report: ProbeReport = channel.recv(SOON).unwrap().body;
        assert!(report.attempts.len() > 80);
        for attempt in &report.attempts {
            assert!(attempt.refused, "{role}: {attempt:?}");
            let at_start = attempt.what.contains("at start");
            assert!(
                at_start || attempt.by.starts_with("seccomp"),
                "{role}: {attempt:?}"
            );
        }
        let by = |layer: &str| {
            report
                .attempts
                .iter()
                .filter(|a| a.by.starts_with(layer))
                .count()
        };
        assert!(by("landlock") >= 1 && by("namespace") == 1);
        finish(child, channel);
    }
}

#[test]
fn what_the_probe_is_refused_kills_the_control_thread() {
    let calls: [(&str, i64); 14] = [
        ("openat", libc::SYS_openat),
        ("execve", libc::SYS_execve),
        ("socket", libc::SYS_socket),
        ("connect", libc::SYS_connect),
        ("ptrace", libc::SYS_ptrace),
        ("process_vm_readv", libc::SYS_process_vm_readv),
        ("mount", libc::SYS_mount),
        ("unshare", libc::SYS_unshare),
        ("kill", libc::SYS_kill),
        ("bpf", libc::SYS_bpf),
        ("memfd_create", libc::SYS_memfd_create),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("prctl", libc::SYS_prctl),
        ("ioctl", libc::SYS_ioctl),
    ];
    for role in ROLES {
        for (name, call) in calls {
            let (child, channel) = start(role, &format!("call {call}"));
            let status = ended(&child);
            assert_eq!(
                status.signal(),
                Some(libc::SIGSYS),
                "{role} {name}: {status}"
            );
            assert!(matches!(channel.recv::<u8>(SOON), Err(IpcError::Closed)));
        }
    }
}

#[test]
fn a_forbidden_call_on_any_thread_kills_the_whole_process() {
    for thread in ["vcpu", "device"] {
        let (child, _channel) = start(Role::Vmm, &format!("{thread} opens"));
        let status = ended(&child);
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{thread}: {status}");
    }
}

#[test]
fn each_rule_lets_its_call_through_and_without_it_the_call_kills() {
    // Landlock is per process, a filter per thread: one child forks one process a rule, before it seals.
    for kind in ThreadKind::ALL.into_iter().filter(|k| !k.is_probe()) {
        let (child, channel) = start(Role::Vmm, &format!("rules {}", kind.name()));
        let (wrong, tried): (Vec<String>, u32) = channel.recv(SOON).unwrap().body;
        assert!(wrong.is_empty(), "{}: {wrong:#?}", kind.name());
        assert!(tried as usize > kind.rules().len(), "{}", kind.name());
        finish(child, channel);
    }
}

#[test]
fn a_mover_thread_inherits_its_filter_and_says_so() {
    let (child, channel) = start(Role::Mover, "inherit");
    let report: SandboxReport = channel.recv(SOON).unwrap().body;
    let movers: Vec<_> = report
        .threads
        .iter()
        .filter(|t| t.filter == "mover")
        .collect();
    assert_eq!(movers.len(), 2, "{:?}", report.threads);
    agrees_with_proc(&child, &report);
    finish(child, channel);
}

#[test]
fn memory_handed_on_read_only_cannot_be_written() {
    let (child, channel) = start(Role::Vmm, "read-only");
    let got = channel.recv::<u8>(SOON).unwrap();
    let fd = got.handles.first().unwrap();
    let map = |protection| {
        // SAFETY: a fresh mapping nobody else knows; leaked at the end of the test process.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        at != libc::MAP_FAILED
    };
    assert!(map(libc::PROT_READ));
    assert!(!map(libc::PROT_READ | libc::PROT_WRITE));
    finish(child, channel);
}

#[test]
fn a_panic_in_any_thread_ends_the_process() {
    for scenario in ["panic", "panic in a thread"] {
        let (child, _channel) = start(Role::Mover, scenario);
        assert_eq!(ended(&child).code(), Some(101), "{scenario}");
    }
}

#[test]
fn a_thread_without_a_filter_keeps_the_process_from_sealing() {
    let (child, channel) = start(Role::Vmm, "unfiltered");
    let error: String = channel.recv(SOON).unwrap().body;
    assert!(error.contains("1 thread(s)"), "{error}");
    assert_eq!(ended(&child).code(), Some(0));
}

#[test]
fn a_role_whose_landlock_is_too_old_refuses_to_start() {
    let mut spec = spec("old");
    spec.landlock_min = 99;
    let (channel, theirs) = Channel::pair().unwrap();
    let child = spawn(Role::Vmm, spec, "report", theirs);
    assert_eq!(ended(&child).code(), Some(REFUSED));
    assert!(matches!(channel.recv::<u8>(SOON), Err(IpcError::Closed)));
}

#[test]
fn a_role_started_by_hand_refuses() {
    let mut command = std::process::Command::new("/proc/self/exe");
    command.env("CASEMATE_TEST_SCENARIO", "report");
    command.env("CASEMATE_TEST_ROLE", "vmm");
    assert_eq!(command.status().unwrap().code(), Some(REFUSED));
}

#[test]
fn dropping_the_handle_ends_the_role_and_its_cgroup() {
    let (child, channel) = start(Role::Psp, "wait");
    let ready: u8 = channel.recv(SOON).unwrap().body;
    assert_eq!(ready, 1);
    let pid = child.pid();
    let groups = cgroups_of(pid);
    assert!(groups.iter().all(|g| std::path::Path::new(g).exists()));
    drop(child);
    assert!(gone(pid));
    assert!(
        groups.iter().all(|g| !std::path::Path::new(g).exists()),
        "{groups:?}"
    );
}

#[test]
fn limits_are_set_where_the_host_has_them_and_owned_up_to_where_not() {
    let mut spec = spec("limits");
    spec.memory_max = Some(64 << 20);
    let (channel, theirs) = Channel::pair().unwrap();
    let child = spawn(Role::Psp, spec, "report", theirs);
    let report: SandboxReport = channel.recv(SOON).unwrap().body;
    for (file, value) in [("memory.max", "67108864"), ("pids.max", "64")] {
        let said = |text: &str| report.notes.iter().any(|note| note.contains(text));
        let groups = cgroups_of(child.pid());
        let set = groups.first().map(|group| format!("{group}/{file}"));
        match set.and_then(|path| std::fs::read_to_string(path).ok()) {
            Some(found) => {
                assert_eq!(found.trim(), value);
                assert!(said(&format!("{file} = {value}")), "{:?}", report.notes);
            }
            None => assert!(
                said(&format!("{file} not set")) || said("no v2 hierarchy"),
                "{:?}",
                report.notes
            ),
        }
    }
    let pids = std::fs::read_to_string(format!("/proc/{}/limits", child.pid())).unwrap();
    let line = pids.lines().find(|l| l.starts_with("Max processes"));
    assert!(line.unwrap().contains(" 64 "), "{line:?}");
    finish(child, channel);
}

#[test]
fn an_agent_that_is_killed_leaves_no_process() {
    // The scenario `agent` is an agent of its own: it starts a role and says its process id.
    let (mine, theirs) = Channel::pair().unwrap();
    let fd = theirs.into_fd();
    let mut command = std::process::Command::new("/proc/self/exe");
    command.env("CASEMATE_TEST_SCENARIO", "agent");
    command.stdin(std::process::Stdio::from(fd));
    let mut agent = command.spawn().unwrap();
    drop(command);
    let role: u32 = mine.recv(SOON).unwrap().body;
    assert!(!gone_now(role));
    agent.kill().unwrap();
    agent.wait().unwrap();
    let outlived = !gone(role);
    if outlived {
        let pid = nix::unistd::Pid::from_raw(role.cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
    assert!(!outlived, "role {role} outlived its agent");
    let its = format!("-{}-", agent.id());
    casemate::sandbox::jail::sweep_cgroups(|name| name.contains(&its));
}

// ---- the parent's side ----

fn spec(name: &str) -> JailSpec {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let id = std::process::id();
    JailSpec::new(
        format!("test-{name}-{id}-{n}"),
        FIRST_UID + id % 10_000 * 100 + n % 100,
    )
}

fn start(role: Role, scenario: &str) -> (RoleProcess, Channel) {
    let (mine, theirs) = Channel::pair().unwrap();
    (spawn(role, spec(role.name()), scenario, theirs), mine)
}

fn spawn(role: Role, spec: JailSpec, scenario: &str, channel: Channel) -> RoleProcess {
    Spawn::new(role, spec)
        .arguments([] as [&str; 0])
        .variable("CASEMATE_TEST_SCENARIO", scenario)
        .variable("CASEMATE_TEST_ROLE", role.name())
        .start(channel)
        .unwrap()
}

/// Waits for the end, but not for ever: a role that should have died and has not is killed by its handle.
fn ended(child: &RoleProcess) -> std::process::ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "the role lives on"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Closes the channel: the child ends by itself then.
fn finish(child: RoleProcess, channel: Channel) {
    drop(channel);
    assert_eq!(ended(&child).code(), Some(0));
}

fn cgroups_of(pid: u32) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = text
        .lines()
        .find_map(|l| l.strip_prefix("0::"))
        .unwrap_or("/");
    if path == "/" {
        return Vec::new();
    }
    let root = casemate::sandbox::cgroup_hierarchy().unwrap();
    vec![format!("{}{path}", root.display())]
}

fn gone_now(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_err() || status.is_ok_and(|s| s.contains("State:\tZ"))
}

fn gone(pid: u32) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        if gone_now(pid) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

// ---- the child's side ----

/// Runs before `main` in the process that plays a role, and does nothing in any other.
#[used]
#[unsafe(link_section = ".init_array")]
static CHILD: extern "C" fn() = child;

extern "C" fn child() {
    let Ok(scenario) = std::env::var("CASEMATE_TEST_SCENARIO") else {
        return;
    };
    if scenario == "agent" {
        agent();
    }
    let role = match std::env::var("CASEMATE_TEST_ROLE").as_deref() {
        Ok("vmm") => Role::Vmm,
        Ok("mover") => Role::Mover,
        _ => Role::Psp,
    };
    let code = match play(role, &scenario) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{role} {scenario}: {error}");
            REFUSED
        }
    };
    std::process::exit(code);
}

const REFUSED: i32 = 77;
const RING: i32 = 200;

fn agent() -> ! {
    use std::os::fd::FromRawFd;
    // SAFETY: descriptor 0 is the channel the test handed over, and nobody else owns it.
    let test = Channel::from_fd(unsafe { std::os::fd::OwnedFd::from_raw_fd(0) });
    let (role, channel) = start(Role::Mover, "deaf");
    let _: u8 = channel.recv(SOON).unwrap().body;
    test.send(&role.pid()).unwrap();
    loop {
        std::thread::park();
    }
}

fn play(role: Role, scenario: &str) -> Result<(), Box<dyn std::error::Error>> {
    let (jailed, channel) = enter_jail(role)?;
    if scenario == "read-only" {
        let memory = nix::sys::memfd::memfd_create(c"ram", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&memory, 4096)?;
        let twin = jailed.reopen_read_only(&memory)?;
        channel.send_with(&1u8, &[twin.as_fd()])?;
        return wait(&channel);
    }
    let enforced = jailed.enforce()?;
    if let Some(name) = scenario.strip_prefix("rules ") {
        // A ring that is none: its number is what a filter sees.
        seccomp::allow_ring(RING);
        let kind = ThreadKind::ALL.into_iter().find(|k| k.name() == name);
        channel.send(&try_rules(kind.ok_or("kind")?))?;
        return wait(&channel);
    }
    if role == Role::Vmm {
        for (name, kind) in [
            ("vcpu", ThreadKind::VmmVcpu),
            ("device", ThreadKind::VmmDevice),
        ] {
            let opens = scenario == format!("{name} opens");
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    seccomp::install(kind).unwrap();
                    if opens {
                        std::thread::sleep(Duration::from_millis(50));
                        let _ = std::fs::File::open("/");
                    }
                    loop {
                        std::thread::park();
                    }
                })?;
        }
    }
    if scenario == "unfiltered" {
        std::thread::spawn(|| std::thread::sleep(Duration::from_secs(60)));
        let error = enforced.seal().err().map(|e| e.to_string());
        channel.send(&error.unwrap_or_default())?;
        return Ok(());
    }
    let sealed = enforced.seal()?;
    match scenario {
        "report" => channel.send(&sealed.report()?)?,
        "probe" => channel.send(&sealed.probe()?)?,
        "wait" => channel.send(&1u8)?,
        "deaf" => {
            // Does not notice that its channel closes: only the parent-death signal ends it.
            channel.send(&1u8)?;
            loop {
                std::thread::park();
            }
        }
        "panic" => panic!("on purpose"),
        "panic in a thread" => {
            seccomp::spawn("panics", || panic!("on purpose"))?;
        }
        "inherit" => {
            seccomp::spawn("stream0", || {
                // A thread's ordinary life under the inherited filter.
                let noise: Vec<_> = (0..1000).map(|n| vec![n; 100]).collect();
                std::thread::sleep(Duration::from_millis(1));
                assert_eq!(noise.len(), 1000);
                loop {
                    std::thread::park();
                }
            })?;
            let start = Instant::now();
            while sealed
                .report()?
                .threads
                .iter()
                .any(|t| t.name == "(unnamed)")
                && start.elapsed() < Duration::from_secs(10)
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            channel.send(&sealed.report()?)?;
        }
        "vcpu opens" | "device opens" => {}
        other => {
            let call: i64 = other.strip_prefix("call ").ok_or("scenario")?.parse()?;
            // SAFETY: killed before the call is looked at; its arguments are all zero.
            unsafe { libc::syscall(call, 0, 0, 0, 0, 0, 0) };
        }
    }
    wait(&channel)
}

/// Until the other end closes.
fn wait(channel: &Channel) -> Result<(), Box<dyn std::error::Error>> {
    match channel.recv::<u8>(None) {
        Err(IpcError::Closed) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => Err("nobody speaks here".into()),
    }
}

// ---- rule by rule ----

/// Every rule of `kind`: with it its call goes through, without it (and what else allows the same call) it
/// kills, and with an argument next to the allowed ones it kills. What went wrong, and how much was tried.
fn try_rules(kind: ThreadKind) -> (Vec<String>, u32) {
    let (mut wrong, mut tried) = (Vec::new(), 0);
    let rules = kind.rules();
    for (index, rule) in rules.iter().enumerate() {
        if SPECIAL.contains(&rule.call) {
            tried += 1;
            continue;
        }
        for args in satisfying(rule) {
            let mut expect = |what: &str, without: Option<usize>, args: [u64; 6], killed: bool| {
                tried += 1;
                let signal = run(kind, without, rule.call, args);
                if (signal == libc::SIGSYS) != killed {
                    wrong.push(format!("{} {args:x?} {what}: signal {signal}", rule.name));
                }
            };
            expect("with its rule", None, args, false);
            if !rules
                .iter()
                .enumerate()
                .any(|(i, r)| i != index && covers(r, rule.call, args))
            {
                expect("without its rule", Some(index), args, true);
            } else {
                wrong.push(format!("{} {args:x?} is allowed twice", rule.name));
            }
        }
        for args in neighbours(rule) {
            if !rules.iter().any(|r| covers(r, rule.call, args)) {
                tried += 1;
                let signal = run(kind, None, rule.call, args);
                if signal != libc::SIGSYS {
                    wrong.push(format!(
                        "{} neighbour {args:x?}: signal {signal}",
                        rule.name
                    ));
                }
            }
        }
    }
    (wrong, tried)
}

/// Calls that cannot be made with arguments of zeros and come back: they end the caller or start a thread on no
/// stack. The scenarios above use them for real.
const SPECIAL: &[i64] = &[
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigreturn,
    libc::SYS_clone,
];

fn run(kind: ThreadKind, without: Option<usize>, call: i64, args: [u64; 6]) -> i32 {
    let program = match without {
        Some(index) => kind.program_without(index),
        None => kind.program(),
    }
    .unwrap();
    // SAFETY: this process has one thread.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // `OwnPid` was compiled for the parent, so for tgkill the parent's id is the one that passes; that
        // call then finds no such thread. A filter that is not there must not look like one that lets through.
        if seccomp::install_program(kind, &program).is_err() {
            // SAFETY: ends the child.
            unsafe { libc::abort() };
        }
        let [a, b, c, d, e, f] = args;
        // SAFETY: descriptors are invalid, pointers null, lengths zero.
        unsafe { libc::syscall(call, a, b, c, d, e, f) };
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    if libc::WIFSIGNALED(status) {
        libc::WTERMSIG(status)
    } else {
        0
    }
}

/// Descriptor -1, null pointers, zeros.
fn harmless(call: i64) -> [u64; 6] {
    let timeless = [
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_futex,
        libc::SYS_brk,
        libc::SYS_prctl,
        libc::SYS_munmap,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_getrandom,
        libc::SYS_tgkill,
    ];
    let mut args = [0; 6];
    if !timeless.contains(&call) {
        args[0] = u64::MAX;
    }
    if call == libc::SYS_ppoll {
        // A null timeout waits for ever; a bad pointer does not.
        args[2] = 8;
    }
    args
}

/// One set of arguments for each value a rule allows.
fn satisfying(rule: &Rule) -> Vec<[u64; 6]> {
    let mut all = vec![harmless(rule.call)];
    for cond in rule.when {
        let own = [u64::from(std::process::id())];
        let rings = seccomp::rings();
        let (arg, values): (u8, &[u64]) = match cond {
            Cond::Among(arg, values) | Cond::Masked(arg, _, values) => (*arg, values),
            Cond::OwnPid(arg) => (*arg, &own),
            Cond::Ring(arg) => (*arg, &rings),
        };
        let with = |args: &[u64; 6], value: u64| {
            let mut args = *args;
            args[usize::from(arg)] = value;
            args
        };
        all = all
            .iter()
            .flat_map(|args| values.iter().map(move |&v| with(args, v)))
            .collect();
    }
    all
}

/// Arguments just beside what a rule allows.
fn neighbours(rule: &Rule) -> Vec<[u64; 6]> {
    let mut beside = Vec::new();
    for args in satisfying(rule) {
        for cond in rule.when {
            let (arg, deltas): (u8, &[u64]) = match cond {
                Cond::Among(arg, _) | Cond::OwnPid(arg) | Cond::Ring(arg) => {
                    (*arg, &[1, 0x100, 0x1_0000])
                }
                Cond::Masked(arg, ..) => (*arg, &[4]),
            };
            for delta in deltas {
                let mut args = args;
                args[usize::from(arg)] ^= delta;
                beside.push(args);
            }
        }
    }
    beside.sort_unstable();
    beside.dedup();
    beside
}

/// Whether a rule allows this, by an independent reading of it.
fn covers(rule: &Rule, call: i64, args: [u64; 6]) -> bool {
    let low = |arg: &u8| args[usize::from(*arg)] & 0xffff_ffff;
    rule.call == call
        && rule.when.iter().all(|cond| match cond {
            Cond::Among(arg, values) => values.iter().any(|v| low(arg) == v & 0xffff_ffff),
            Cond::Masked(arg, mask, values) => values.contains(&(low(arg) & mask)),
            Cond::OwnPid(arg) => low(arg) == u64::from(std::process::id()),
            Cond::Ring(arg) => seccomp::rings().contains(&low(arg)),
        })
}
