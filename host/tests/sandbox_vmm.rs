//! The cell of a running guest's VMM, seen from outside: what a debugger with every privilege finds, and what it can make
//! the VMM do. Needs root and `/dev/kvm`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;
use support::{Host, POLICY, until};

#[test]
fn a_debugger_that_forces_a_forbidden_call_sees_the_vmm_die() {
    let mut host = Host::new("debugger");
    host.start();
    let other = host.describe("other", "other", "");
    host.run(&["run", &other]).expect(0);
    for (kind, call) in [
        ("vmm-control", libc::SYS_openat),
        ("vmm-device", libc::SYS_socket),
        ("vmm-vcpu", libc::SYS_execve),
    ] {
        let path = host.describe("plain", "plain", "");
        host.run(&["run", &path]).expect(0);
        let pid = pid_of(&host, "plain");
        let thread = thread_of(&host, "plain", pid, kind);
        // Only the call is forced: the thread is otherwise what it was.
        force(thread, call);
        assert_eq!(end_of(thread), Signal::SIGSYS, "{kind}");
        until("the agent has noticed", || {
            host.listed("plain")
                .is_some_and(|row| row["state"] == "lost")
        });
        host.run(&["stop", "plain"]).expect(0);
        assert_eq!(host.listed("other").unwrap()["state"], "running");
    }
}

#[test]
fn a_debugger_that_forces_an_allowed_call_sees_the_vmm_live() {
    let mut host = Host::new("allowed");
    host.start();
    let path = host.describe("plain", "plain", "");
    host.run(&["run", &path]).expect(0);
    let pid = pid_of(&host, "plain");
    force(pid, libc::SYS_gettid);
    // Without this the test above would prove only that a debugger can break things.
    host.run(&["sandbox", "probe", "plain"]).expect(0);
    ptrace::detach(interrupted(pid, false), None).unwrap();
    host.run(&["stop", "plain"]).expect(0);
}

#[test]
fn guest_memory_is_in_no_dump_and_no_child() {
    let mut host = Host::new("memory");
    host.start();
    let path = host.describe("plain", "plain", "");
    host.run(&["run", &path]).expect(0);
    let maps = fs::read_to_string(format!("/proc/{}/smaps", pid_of(&host, "plain"))).unwrap();
    let (mut inside, mut found) = (false, 0);
    for line in maps.lines() {
        if line.contains("/memfd:guest-memory") {
            inside = true;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            if inside {
                let flags: Vec<&str> = flags.split_whitespace().collect();
                assert!(flags.contains(&"dd") && flags.contains(&"dc"), "{flags:?}");
                found += 1;
            }
            inside = false;
        }
    }
    assert!(found > 0, "{maps}");
}

/// As many vCPUs, disks, cards and queues as there can be, half of the disks attached while it runs.
#[test]
fn the_largest_guest_has_room_for_its_descriptors() {
    let policy = POLICY.replace("max_vcpus = 2", "max_vcpus = 64");
    let mut host = Host::with_policy("largest", &policy);
    host.start();
    let mut devices =
        "[vsock]\ncid = 3\n[rng]\n[balloon]\n[console]\n[watchdog]\naction = \"report\"\n[hotplug]\nslots = 4\n"
            .to_owned();
    for n in 0..8 {
        host.write(&format!("large/d{n}.raw"), vec![0; 1 << 20]);
        if n < 4 {
            devices += &format!(
                "[[disk]]\nid = \"d{n}\"\npath = \"d{n}.raw\"\nlimit = {{ operations_per_second = 100 }}\n"
            );
        }
        devices += &format!(
            "[[net]]\nid = \"n{n}\"\ntap = \"lg{n}-{}\"\nmac = \"52:54:00:00:01:0{n}\"\nqueues = 2\n",
            std::process::id()
        );
    }
    let path = host.describe("large", "large", &devices);
    let described = fs::read_to_string(host.path(&path)).unwrap();
    host.write(&path, described.replace("vcpus = 1", "vcpus = 64"));
    host.run(&["run", &path]).expect(0);
    for n in 4..8 {
        let image = host.path(&format!("large/d{n}.raw")).display().to_string();
        let id = format!("d{n}");
        let attach = ["vm", "attach", "large", "--disk", &id, "--path", &image];
        host.run(&attach).expect(0);
    }
    let report = host.json(&["sandbox", "report", "large"]);
    let open = report["reports"][0]["descriptors"].as_u64().unwrap();
    // 256 of every role, one for each vCPU, 8 for each pair of queues.
    assert!((256..=448 - 64).contains(&open), "{open}");
}

#[test]
fn every_descriptor_of_a_vmm_is_known_and_counted() {
    let mut host = Host::new("descriptors");
    host.start();
    host.write("plain/data.raw", vec![0; 1 << 20]);
    let devices = "[vsock]\ncid = 3\n[[disk]]\nid = \"data\"\npath = \"data.raw\"\n";
    let path = host.describe("plain", "plain", devices);
    host.run(&["run", &path]).expect(0);
    let folder = format!("/proc/{}/fd", pid_of(&host, "plain"));
    let report = host.json(&["sandbox", "report", "plain"]);
    let links: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| fs::read_link(entry.unwrap().path()).unwrap())
        .map(|link| link.to_string_lossy().into_owned())
        .collect();
    let counted = report["reports"][0]["descriptors"].as_u64().unwrap();
    assert_eq!(links.len() as u64, counted, "{links:?}");
    let (mut sockets, mut rings) = (0, 0);
    for link in &links {
        let known = match link.as_str() {
            "/dev/null" | "/dev/kvm" | "anon_inode:kvm-vm" => true,
            name if name.starts_with("anon_inode:kvm-vcpu:") => true,
            "anon_inode:[io_uring]" => {
                rings += 1;
                true
            }
            name if name.starts_with("anon_inode:") => ["[eventfd]", "[eventpoll]", "[timerfd]"]
                .iter()
                .any(|kind| name.ends_with(kind)),
            name if name.ends_with("/data.raw") => true,
            name if name.starts_with("/memfd:") => true,
            name if name.starts_with("socket:") => {
                sockets += 1;
                true
            }
            // The console, and the log that the test reads.
            name if name.starts_with("pipe:") || name.ends_with("agent.log") => true,
            // Its own status, from before the jail.
            name if name.starts_with("/proc/") && name.ends_with("/status") => true,
            _ => false,
        };
        assert!(known, "{link} in {links:?}");
    }
    // What does the disk's requests is there, is said, and is bound.
    let shown = host.json(&["status", "plain"]);
    let by = &shown["disks"][0]["by"];
    assert_eq!(by, "io_uring, writes by threads", "{shown}");
    assert_eq!(rings, 1, "{links:?}");
    let notes = report["reports"][0]["notes"].to_string();
    assert!(notes.contains("1 ring(s), each bound"), "{notes}");
    // The agent's channel and the vsock device's listener, both Unix sockets made by the agent: its network is empty.
    assert_eq!(sockets, 2, "{links:?}");
    let table = fs::read_to_string(format!("/proc/{}/net/tcp", pid_of(&host, "plain"))).unwrap();
    assert_eq!(table.lines().count(), 1, "{table}");
}

/// The kernel's file is read back in the lab (`limits_of_block_devices_are_in_the_kernel`): here the group may have no io
/// controller, and the disk no block device.
#[test]
fn limits_of_block_devices_are_set_or_said_and_refused_where_they_are_demanded() {
    let mut host = Host::new("io-max");
    host.start();
    host.write("plain/data.raw", vec![0; 1 << 20]);
    let described = |required: bool| {
        format!(
            "[resources]\nio_max = {{ read_bytes_per_second = \"10 MiB\", writes_per_second = 50, required = {required} }}\n\
             [[disk]]\nid = \"data\"\npath = \"data.raw\"\n"
        )
    };
    let path = host.describe("plain", "plain", &described(false));
    host.run(&["run", &path]).expect(0);
    let notes = host.json(&["sandbox", "report", "plain"])["reports"][0]["notes"].to_string();
    host.run(&["stop", "plain"]).expect(0);
    let set = notes.contains("rbps=10485760 wiops=50");
    assert!(set || notes.contains("io.max not set: "), "{notes}");
    let path = host.describe("plain", "plain", &described(true));
    let demanded = host.run(&["run", &path]);
    match set {
        true => drop(demanded.expect(0)),
        false => {
            assert_ne!(demanded.code, Some(0), "{demanded:#?}");
            let said = format!("{demanded:?}");
            assert!(said.contains("io_max` cannot be enforced here"), "{said}");
            assert!(host.listed("plain").is_none(), "it runs");
        }
    }
}

#[test]
fn a_vmm_runs_on_the_processors_of_its_description() {
    let mut host = Host::new("pinned");
    host.start();
    let path = host.describe(
        "plain",
        "plain",
        "[resources]\ncpus = \"0\"\ncpu_percent = 150\ncpu_weight = 50\n",
    );
    host.run(&["run", &path]).expect(0);
    let pid = pid_of(&host, "plain");
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let allowed = status
            .lines()
            .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
        assert_eq!(allowed.unwrap().trim(), "0", "{status}");
    }
    // What the host's control groups can do is done, and what they cannot is said.
    let notes = host.json(&["sandbox", "report", "plain"])["reports"][0]["notes"].to_string();
    assert!(notes.contains("processors: 0"), "{notes}");
    let group = notes.contains("no v2 hierarchy");
    for (file, value) in [("cpu.max", "150000 100000"), ("cpu.weight", "50")] {
        let set = notes.contains(&format!("{file} = {value}"));
        assert!(
            group || set || notes.contains(&format!("{file} not set")),
            "{notes}"
        );
    }
    host.run(&["stop", "plain"]).expect(0);
    for wrong in [
        "cpus = \"x\"",
        "cpu_percent = 0",
        "cpu_weight = 10001",
        "cpu = 1",
    ] {
        let path = host.describe("plain", "plain", &format!("[resources]\n{wrong}\n"));
        let key = wrong.split(' ').next().unwrap();
        host.run(&["run", &path]).refused(1, &["DESCRIPTION", key]);
    }
    let path = host.describe("plain", "plain", "[resources]\ncpus = \"1023\"\n");
    host.run(&["run", &path]).expect(1);
}

#[test]
fn what_holds_a_vmm_is_in_the_ledger_by_its_hashes() {
    let mut host = Host::new("hashes");
    host.start();
    let path = host.describe("plain", "plain", "");
    host.run(&["run", &path]).expect(0);
    let report = host.json(&["sandbox", "report", "plain"])["reports"][0].clone();
    let records = host.records();
    let cell = records.iter().find(|r| r["action"] == "sandbox").unwrap();
    assert_eq!(cell["object"], "plain");
    let detail = cell["detail"].to_string();
    assert!(detail.contains(report["landlock_sha256"].as_str().unwrap()));
    let threads = report["threads"].as_array().unwrap();
    assert!(threads.len() >= 4, "{threads:?}");
    for thread in threads {
        let text = |key: &str| thread[key].as_str().unwrap().to_owned();
        let line = format!(
            "{}: {} sha256:{}",
            text("name"),
            text("filter"),
            text("filter_sha256")
        );
        assert!(detail.contains(&line), "{line} in {detail}");
    }
}

fn pid_of(host: &Host, name: &str) -> Pid {
    let pid = host.listed(name).unwrap()["pid"].as_i64().unwrap();
    Pid::from_raw(pid.try_into().unwrap())
}

/// The thread of a VMM whose filter is of this kind, as the host numbers it.
fn thread_of(host: &Host, name: &str, pid: Pid, kind: &str) -> Pid {
    let report = host.json(&["sandbox", "report", name]);
    let threads = report["reports"][0]["threads"].as_array().unwrap().clone();
    let named = |t: &&Value| t["filter"] == kind;
    let wanted = threads.iter().find(named).unwrap()["name"]
        .as_str()
        .unwrap()
        .to_owned();
    if kind == "vmm-control" {
        return pid;
    }
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut tasks = tasks.map(|task| task.unwrap().path());
    let found = tasks.find(|task| {
        let comm = fs::read_to_string(task.join("comm")).unwrap();
        comm.trim() == wanted.chars().take(15).collect::<String>()
    });
    let number = found
        .unwrap()
        .file_name()
        .unwrap()
        .to_string_lossy()
        .parse();
    Pid::from_raw(number.unwrap())
}

/// Stops a thread in a system call of its own and makes it do another in its place; its arguments stay what they were.
fn force(thread: Pid, call: i64) {
    interrupted(thread, true);
    let mut registers = ptrace::getregs(thread).unwrap();
    // Behind a `syscall` instruction (0f 05): that one is done again, with another number.
    let at = registers.rip - 2;
    let bytes = ptrace::read(thread, at as ptrace::AddressType).unwrap() & 0xffff;
    assert_eq!(bytes, 0x050f, "the thread was not in a system call");
    registers.rip = at;
    registers.rax = call.cast_unsigned();
    // No restart of the interrupted call.
    registers.orig_rax = u64::MAX;
    ptrace::setregs(thread, registers).unwrap();
    ptrace::cont(thread, None).unwrap();
}

/// Stops a thread where it is, as its debugger, which this becomes if it is not yet.
fn interrupted(thread: Pid, seize: bool) -> Pid {
    if seize {
        ptrace::seize(thread, ptrace::Options::empty()).unwrap();
    }
    ptrace::interrupt(thread).unwrap();
    loop {
        match waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap() {
            WaitStatus::PtraceEvent(..) => return thread,
            WaitStatus::Stopped(_, signal) => ptrace::cont(thread, signal).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

/// The signal that ended a thread.
fn end_of(thread: Pid) -> Signal {
    loop {
        match waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap() {
            WaitStatus::Signaled(_, signal, _) => return signal,
            WaitStatus::Stopped(_, signal) => ptrace::cont(thread, signal).unwrap(),
            WaitStatus::PtraceEvent(..) => ptrace::cont(thread, None).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}
