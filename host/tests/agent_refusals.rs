//! What bad input gets: an error that names its object and the remedy, an exit status that tells kinds apart, and
//! nothing left over. Needs root and `/dev/kvm`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;
use std::net::TcpListener;

use support::{Host, IDENTITY, POLICY, SEV, SEV_WITH_SECRET};

#[test]
fn every_fault_of_a_description_is_named_with_file_line_key_and_remedy() {
    let mut host = Host::new("faults");
    host.start();
    let path = host.describe("vm", "vault", &format!("{SEV}{DEVICES}"));
    host.write("vm/data.raw", vec![0; 4096]);
    let good = fs::read_to_string(host.path(&path)).unwrap();
    for (from, to, words) in FAULTS {
        assert!(good.contains(from), "{from}");
        let bad = good.replacen(from, to, 1);
        host.write(&path, &bad);
        let ran = host
            .run(&["run", &path])
            .refused(1, &["vm/vm.toml:", "DESCRIPTION"]);
        for word in *words {
            assert!(
                ran.err.contains(word),
                "{to}: {word:?} is missing: {}",
                ran.err
            );
        }
        let line = 1 + changed_line(&good, &bad);
        assert!(
            ran.err.contains(&format!("vm.toml:{line}:"))
                || ran.err.contains(&format!("line {line}")),
            "{to}: line {line} is not named: {}",
            ran.err
        );
        assert!(!ran.err.contains('\u{1b}'), "{}", ran.err);
        // The owner's side reads descriptions too.
        host.run(&["owner", "measure", &path])
            .refused(1, &["vm/vm.toml:", words[0]]);
    }
    host.quiet(1);
}

/// Number of lines before the first that differs.
fn changed_line(good: &str, bad: &str) -> usize {
    good.lines()
        .zip(bad.lines())
        .take_while(|(a, b)| a == b)
        .count()
}

const DEVICES: &str = "[[disk]]
id = \"data\"
path = \"data.raw\"
[[disk]]
id = \"logs\"
path = \"data.raw\"
[[net]]
id = \"net0\"
tap = \"tap0\"
mac = \"52:54:00:00:00:01\"
announce = [\"10.0.0.1\"]
[vsock]
cid = 3
";

const FAULTS: &[(&str, &str, &[&str])] = &[
    ("vcpus = 1", "cpus = 1", &["cpus", "vcpus"]),
    ("vcpus = 1", "vcpus = 65", &["`vcpus`", "1 to 64"]),
    ("vcpus = 1", "vcpus = -1", &["vcpus", "-1"]),
    ("vcpus = 1", "vcpus = \"two\"", &["vcpus", "string"]),
    ("vcpus = 1", "vcpus = 1\nvcpus = 1", &["vcpus", "duplicate"]),
    ("vcpus = 1", "vcpus 1", &["expected"]),
    ("\"64 MiB\"", "\"1 MiB\"", &["`memory`", "64 MiB to 64 GiB"]),
    (
        "\"64 MiB\"",
        "\"99999999999999999999 GiB\"",
        &["`memory`", "64 MiB to 64 GiB"],
    ),
    ("\"vault\"", "\"../vault\"", &["`name`", "a-z"]),
    ("\"vault\"", "\"\"", &["`name`", "1 to 64"]),
    (
        "\"vmlinuz\"",
        "\"nowhere\"",
        &["`boot.kernel`", "nowhere", "want"],
    ),
    (
        "\"vmlinuz\"",
        "\".\"",
        &["`boot.kernel`", "not a regular file"],
    ),
    (
        "\"vmlinuz\"",
        "\"/dev/zero\"",
        &["`boot.kernel`", "not a regular file"],
    ),
    ("\"initrd\"", "\"nowhere\"", &["`boot.initrd`", "nowhere"]),
    (
        "console=ttyS0",
        "console=\\u0007",
        &["`boot.cmdline`", "printable"],
    ),
    (
        "\"sev\"",
        "\"tdx\"",
        &["`confidential.technology`", "\"sev\""],
    ),
    (
        "\"sev\"",
        "\"sev\"\npolicy = 0x2",
        &["`confidential.policy`", "NODBG"],
    ),
    ("\"sev\"", "\"sev\"\nsecrets = true", &["secrets", "secret"]),
    (
        "\"data\"",
        "\"a-name-that-no-virtio-serial-holds\"",
        &["`disk.id`", "20"],
    ),
    ("\"logs\"", "\"data\"", &["`disk.id`", "twice"]),
    ("\"data.raw\"", "\"none.raw\"", &["`disk.path`", "none.raw"]),
    (
        "\"tap0\"",
        "\"a-very-long-interface\"",
        &["`net.tap`", "1 to 15"],
    ),
    (
        "52:54:00:00:00:01",
        "52:54:00:00:00:zz",
        &["`net.mac`", "52:54:00:12:34:56"],
    ),
    ("10.0.0.1", "10.0.0.256", &["announce", "IPv4"]),
    ("cid = 3", "cid = 1", &["`vsock.cid`", "want 3"]),
    ("[vsock]", "[vsocket]", &["vsocket", "vsock"]),
];

#[test]
fn a_description_that_is_no_file_or_no_text_is_refused() {
    let mut host = Host::new("nofile");
    host.start();
    host.run(&["run", "nowhere.toml"])
        .refused(1, &["nowhere.toml", "cannot be read"]);
    host.run(&["run", "."]).refused(1, &["not a regular file"]);
    // Neither the agent nor the owner may read without end.
    for endless in ["/dev/zero", "fifo"] {
        if endless == "fifo" {
            nix::unistd::mkfifo(&host.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        host.run(&["run", endless])
            .refused(1, &[endless, "not a regular file"]);
        host.run(&["owner", "measure", endless])
            .refused(1, &[endless, "not a regular file"]);
    }
    host.write("large.toml", " ".repeat(70_000));
    host.run(&["run", "large.toml"])
        .refused(1, &["large.toml", "70000", "at most 65536"]);
    host.write("bytes.toml", [0xff, 0xfe, 0x00]);
    host.run(&["run", "bytes.toml"])
        .refused(1, &["bytes.toml", "UTF-8"]);
    host.write("empty.toml", "");
    host.run(&["run", "empty.toml"])
        .refused(1, &["empty.toml", "missing field"]);
    host.json(&["list"]);
}

#[test]
fn boot_files_that_cannot_boot_are_refused_and_leave_nothing() {
    let mut host = Host::new("boot");
    host.start();
    let path = host.describe("vm", "vault", SEV);
    let mut spoiled = support::small_image();
    spoiled[0x202] = b'X';
    for (bytes, words) in [
        (vec![], "kernel"),
        (vec![0; 100], "kernel"),
        (spoiled, "bzImage"),
    ] {
        host.write("vm/vmlinuz", bytes);
        host.run(&["run", &path]).refused(1, &[words]);
        host.run(&["owner", "measure", &path])
            .refused(1, &["vm.toml", words]);
    }
    host.write("vm/vmlinuz", support::small_image());
    host.write("vm/initrd", vec![1; 80 << 20]);
    host.run(&["run", &path]).refused(1, &["initr"]);
    host.write("vm/initrd", b"x");
    host.quiet(1);
    // The name is free again.
    host.run(&["run", &path]).expect(0);
}

#[test]
fn what_the_policy_refuses_names_the_rule() {
    let strict = POLICY.replace("\"none\", \"sev\"", "\"sev\"");
    let mut host = Host::with_policy("rules", &strict);
    host.start();
    let plain = host.describe("plain", "plain", "");
    let ran = host.run(&["run", &plain]);
    ran.refused(
        3,
        &[
            "technologies.allowed",
            "POLICY_TECHNOLOGY_NOT_ALLOWED",
            "found none",
        ],
    );
    let path = host.describe("vm", "vault", SEV);
    let good = fs::read_to_string(host.path(&path)).unwrap();
    host.write(&path, good.replace("64 MiB", "512 MiB"));
    host.run(&["run", &path]).refused(
        3,
        &[
            "limits.max_memory_mib",
            "256",
            "512",
            "POLICY_TOO_MUCH_MEMORY",
            "raise",
        ],
    );
    host.write(&path, good.replace("vcpus = 1", "vcpus = 3"));
    host.run(&["run", &path])
        .refused(3, &["limits.max_vcpus", "POLICY_TOO_MANY_VCPUS"]);
    host.quiet(1);
    assert!(
        host.records()
            .iter()
            .filter(|r| r["outcome"] == "refused")
            .count()
            >= 3
    );
}

#[test]
fn an_emulated_guest_needs_a_policy_that_says_so() {
    let strict = POLICY.replace("allow_emulated = true", "allow_emulated = false");
    let mut host = Host::with_policy("real", &strict);
    host.start();
    let path = host.describe("vm", "vault", SEV);
    host.run(&["platform", "show"])
        .refused(1, &["NO_PROCESSOR", "casemate doctor"]);
    if std::path::Path::new("/dev/sev").exists() {
        return;
    }
    host.run(&["run", &path]).refused(
        3,
        &[
            "floor.emulated",
            "POLICY_EMULATED_NOT_ALLOWED",
            "allow_emulated",
        ],
    );
    // Nothing of the emulation runs on such a host, and a plain guest does.
    assert!(host.roles().is_empty(), "{:?}", host.roles());
    let plain = host.describe("plain", "plain", "");
    host.run(&["run", &plain]).expect(0);
    host.run(&["stop", "plain"]).expect(0);
}

#[test]
fn names_are_known_and_used_once() {
    let mut host = Host::new("names");
    host.start();
    for command in ["status", "stop", "pause", "resume", "cancel"] {
        host.run(&[command, "nobody"])
            .refused(1, &["NO_SUCH_GUEST", "nobody", "casemate list"]);
    }
    host.run(&["migrate", "nobody", "--to", "there"])
        .refused(1, &["NO_SUCH_GUEST"]);
    host.run(&["sandbox", "probe", "nobody"])
        .refused(1, &["NO_SUCH_GUEST"]);
    host.run(&["status", "../../etc/passwd"])
        .refused(1, &["NO_SUCH_GUEST"]);
    let root = host.measured("vault");
    host.run(&["run", "host/vm.toml", "--owner-session", "session"])
        .refused(1, &["NAME_TAKEN", "vault"]);
    // Before its owner has answered a guest neither runs, nor pauses, nor moves.
    host.run(&["resume", "vault"]).expect(1);
    host.run(&["pause", "vault"]).expect(1);
    assert_eq!(host.listed("vault").unwrap()["state"], "measured");
    host.release(
        "vault",
        "host/vm.toml",
        "session",
        &["--allow-emulated", &root],
    )
    .expect(0);
    host.run(&["sandbox", "probe", "vault"]).expect(0);
    host.run(&["stop", "vault"]).expect(0);
    host.run(&["stop", "vault"]).refused(1, &["NO_SUCH_GUEST"]);
    host.owner_session("host/vm.toml", &root, "next");
    host.run(&["run", "host/vm.toml", "--owner-session", "next"])
        .expect(0);
}

#[test]
fn a_name_whose_record_cannot_be_read_is_free_once_it_is_mended() {
    let mut host = Host::new("record");
    host.start();
    let path = host.describe("vm", "vault", SEV);
    host.write("state/ownership/vault.json", "{");
    host.run(&["run", &path]).refused(1, &["RECORD", "vault"]);
    fs::remove_file(host.path("state/ownership/vault.json")).unwrap();
    host.run(&["run", &path]).expect(0);
    // A guest that was given away is not started a second time.
    host.run(&["stop", "vault"]).expect(0);
    let record = fs::read_to_string(host.path("state/ownership/vault.json")).unwrap();
    host.write(
        "state/ownership/vault.json",
        record.replace("ended", "handed-over"),
    );
    host.run(&["run", &path])
        .refused(1, &["NOT_OWNER", "vault"]);
}

#[test]
fn a_migration_that_cannot_begin_says_why_and_the_guest_runs_on() {
    let mut host = Host::new("moves");
    host.start();
    let path = host.describe("vm", "vault", SEV);
    host.run(&["run", &path]).expect(0);
    let there = ["migrate", "vault", "--to", "there"];
    host.run(&["migrate", "vault", "--to", "elsewhere"])
        .refused(3, &["POLICY_PEER_UNKNOWN", "elsewhere"]);
    host.run(&there).refused(1, &["IDENTITY", "[identity]"]);
    host.run(&["cancel", "vault"]).refused(1, &["NOT_MOVING"]);
    host.run(&["stop", "vault"]).expect(0);
    host.end(nix::sys::signal::Signal::SIGTERM);
    host.accept_migrations();
    host.configure(IDENTITY);
    host.start();
    host.run(&["run", &path]).expect(0);
    host.run(&there)
        .refused(1, &["PEER_ADDRESS", "[peers]", "there"]);
    host.run(&["stop", "vault"]).expect(0);
    host.end(nix::sys::signal::Signal::SIGTERM);
    // An address where nobody listens: bound here, but not listening.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    host.configure(&format!("{IDENTITY}[peers]\nthere = \"{address}\"\n"));
    host.start();
    host.run(&["run", &path]).expect(0);
    host.run(&there)
        .refused(1, &["PEER_UNREACHABLE", "there", &address.to_string()]);
    let guest = host.listed("vault").unwrap();
    assert_eq!(
        (&guest["state"], &guest["epoch"]),
        (&"running".into(), &1.into()),
        "{guest}"
    );
    assert_eq!(host.roles().len(), 2, "a mover was left over");
    host.measured("waiting");
    host.run(&["migrate", "waiting", "--to", "there"])
        .refused(1, &["NOT_RUNNING"]);
}

#[test]
fn a_peer_that_answers_rubbish_loses_nothing_but_the_migration() {
    let mut host = Host::new("rubbish");
    host.accept_migrations();
    let peer = TcpListener::bind("127.0.0.1:0").unwrap();
    host.configure(&format!(
        "{IDENTITY}[peers]\nthere = \"{}\"\n",
        peer.local_addr().unwrap()
    ));
    host.start();
    let path = host.describe("vm", "vault", SEV);
    host.run(&["run", &path]).expect(0);
    let talk = std::thread::spawn(move || {
        let answers: [&[u8]; 3] = [
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            &[0x16, 3, 3, 0xff, 0xff],
            b"",
        ];
        for answer in answers {
            let (mut stream, _) = peer.accept().unwrap();
            support::offer(&mut stream, answer);
        }
    });
    for _ in 0..3 {
        let ran = host
            .run(&["migrate", "vault", "--to", "there"])
            .refused(1, &["vault did not move to there", "runs on here"]);
        assert!(ran.err.contains('['), "no code: {ran:?}");
        assert_eq!(host.listed("vault").unwrap()["state"], "running");
    }
    talk.join().unwrap();
    host.quiet(2);
    let failed = host
        .records()
        .iter()
        .filter(|r| r["action"] == "migrate-out" && r["outcome"] == "failed")
        .count();
    assert_eq!(failed, 3);
}

#[test]
fn a_guest_whose_vmm_died_hides_no_other_guest() {
    let mut host = Host::new("died");
    host.start();
    let one = host.describe("one", "one", SEV);
    let two = host.describe(
        "two",
        "two",
        SEV_WITH_SECRET.replace("secret = true\n", "").as_str(),
    );
    host.run(&["run", &one]).expect(0);
    host.run(&["run", &two]).expect(0);
    let pid = host.listed("one").unwrap()["pid"].as_i64().unwrap();
    let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    support::until("the VMM is gone", || {
        host.listed("one").is_some_and(|g| g["state"] == "lost")
    });
    assert_eq!(host.listed("two").unwrap()["state"], "running");
    host.run(&["pause", "one"]).refused(1, &["VMM_GONE"]);
    host.run(&["stop", "one"]).expect(0);
    assert!(host.listed("one").is_none());
    host.run(&["run", &one]).expect(0);
}

#[test]
fn an_agent_that_cannot_start_says_what_is_wrong() {
    let host = Host::new("config");
    let good = fs::read_to_string(host.path("agent.toml")).unwrap();
    let cases = [
        (
            good.replace("socket =", "sokcet ="),
            vec!["agent.toml", "sokcet"],
        ),
        (
            good.replace("policy.toml", "nowhere.toml"),
            vec!["nowhere.toml", "cannot be read"],
        ),
        (
            format!("{good}listen = \"nonsense\"\n"),
            vec!["agent.toml", "line 7"],
        ),
        (format!("{good}{IDENTITY}"), vec!["host.pem"]),
        (
            good.replace("uid_base = ", "uid_base = 1 # "),
            vec!["200000"],
        ),
    ];
    for (text, words) in cases {
        host.write("agent.toml", text);
        host.start_fails().refused(1, &words);
    }
    host.write("agent.toml", &good);
    host.write(
        "policy.toml",
        POLICY.replace("allow_emulated", "alow_emulated"),
    );
    host.start_fails()
        .refused(1, &["policy.toml:5", "alow_emulated"]);
    assert!(!host.socket.exists());
}
