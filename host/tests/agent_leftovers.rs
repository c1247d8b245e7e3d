//! However an agent ends, nothing of it stays: no process, no cgroup, no socket. Needs root and `/dev/kvm`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::os::unix::net::UnixStream;

use nix::sys::signal::Signal;
use support::{Host, SEV, until};

#[test]
fn an_agent_told_to_stop_takes_everything_along() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut host = Host::new("told");
        host.start();
        host.measured("vault");
        let path = host.describe("other", "other", &format!("{SEV}[vsock]\ncid = 3\n"));
        host.run(&["run", &path]).expect(0);
        let vsock = host.listed("other").unwrap()["vsock"]
            .as_str()
            .unwrap()
            .to_owned();
        assert_eq!(host.roles().len(), 3);
        assert!(host.groups().is_empty() || host.groups().len() == 3);
        // A client that says nothing keeps nothing alive either.
        let silent = UnixStream::connect(&host.socket).unwrap();
        assert!(host.end(signal).success(), "{signal}");
        host.quiet(0);
        assert!(!host.socket.exists() && !std::path::Path::new(&vsock).exists());
        drop(silent);
        let stops = host
            .records()
            .iter()
            .filter(|r| r["action"] == "stop")
            .count();
        assert_eq!(stops, 2);
    }
}

#[test]
fn an_agent_that_is_killed_leaves_no_process_and_the_next_clears_the_rest() {
    let mut host = Host::new("killed");
    host.start();
    let root = host.measured("vault");
    assert_eq!(host.roles().len(), 2);
    host.end(Signal::SIGKILL);
    // At once, while the roles may still be dying.
    host.start();
    assert_eq!(host.export_platform(), root);
    assert!(host.listed("vault").is_none());
    until("the roles of the killed agent are gone", || {
        host.roles().len() == 1
    });
    host.quiet(1);
    // The name is free: that guest died with its agent.
    host.owner_session("host/vm.toml", &root, "next");
    host.run(&["run", "host/vm.toml", "--owner-session", "next"])
        .expect(0);
    host.end(Signal::SIGKILL);
    until("no role outlives its agent", || host.roles().is_empty());
    // A guest that ran is not forgotten either: it ended with its agent, and may be started again.
    host.start();
    let path = host.describe("plain", "plain", SEV);
    host.run(&["run", &path]).expect(0);
    host.end(Signal::SIGKILL);
    host.start();
    host.run(&["run", &path]).expect(0);
    host.json(&[
        "evidence",
        "verify",
        "state/ledger",
        "--key",
        "state/ledger.pub",
    ]);
}

#[test]
fn an_agent_told_to_stop_in_the_middle_of_launches_leaves_nothing() {
    let mut host = Host::new("middle");
    host.start();
    let clients: Vec<_> = (0..3)
        .map(|n| {
            let name = format!("g{n}");
            let path = host.describe(&name, &name, SEV);
            let mut command = host.command(&["run", &path]);
            command
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null());
            command.spawn().unwrap()
        })
        .collect();
    until("a launch has begun", || host.roles().len() >= 2);
    assert!(host.end(Signal::SIGTERM).success());
    for mut client in clients {
        // Done or failed, but not waiting for ever.
        support::wait(&mut client);
    }
    host.quiet(0);
    assert!(!host.socket.exists());
}

#[test]
fn the_death_of_the_secure_processor_is_said_and_not_hidden() {
    let mut host = Host::new("psp");
    host.start();
    let processor = host.roles().into_iter().next().unwrap();
    let pid = nix::unistd::Pid::from_raw(processor.try_into().unwrap());
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    until("it is gone", || host.roles().is_empty());
    let path = host.describe("vm", "vault", SEV);
    let ran = host.run(&["run", &path]).expect(1);
    assert!(ran.err.contains('['), "{ran:?}");
    host.run(&["platform", "show"]).expect(1);
    let plain = host.describe("plain", "plain", "");
    host.run(&["run", &plain]).expect(0);
    host.run(&["stop", "plain"]).expect(0);
    until("nothing runs", || host.roles().is_empty());
}
