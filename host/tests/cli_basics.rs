//! What the command line does without an agent.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use support::{Host, Ran, casemate, finish, wait};

fn run(args: &[&str]) -> Ran {
    let mut command = casemate();
    command.args(args);
    finish(command)
}

#[test]
fn no_agent_is_its_own_exit_status_and_says_how_to_start_one() {
    let host = Host::new("none");
    for args in [
        &["list"][..],
        &["status", "x"],
        &["stop", "x"],
        &["platform", "show"],
        &["migrate", "x", "--to", "y"],
        &["--json", "list"],
    ] {
        host.run(args).refused(
            69,
            &[
                "AGENT_UNAVAILABLE",
                "casemate agent --config",
                "--agent",
                "agent.sock",
            ],
        );
    }
    // A socket that nobody listens on, and a file that is none.
    drop(std::os::unix::net::UnixListener::bind(&host.socket).unwrap());
    host.run(&["list"]).refused(69, &["AGENT_UNAVAILABLE"]);
    std::fs::remove_file(&host.socket).unwrap();
    host.write("agent.sock", "x");
    host.run(&["list"]).refused(69, &["AGENT_UNAVAILABLE"]);
}

#[test]
fn an_agent_that_hangs_up_or_talks_rubbish_is_reported() {
    for (answer, word) in [
        (&b""[..], "closed the connection"),
        (b"rubbish\n", "talking to the agent"),
        (&[0xff; 64], "talking to the agent"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
            "talking to the agent",
        ),
        (b"HTTP/1.1 418 No\r\ncontent-length: 2\r\n\r\n{}", "418"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{}",
            "talking to the agent",
        ),
    ] {
        let host = Host::new("lost");
        let listener = std::os::unix::net::UnixListener::bind(&host.socket).unwrap();
        let agent = std::thread::spawn(move || {
            use std::io::BufRead as _;
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            std::io::BufReader::new(&stream)
                .read_line(&mut line)
                .unwrap();
            support::offer(&mut stream, answer);
        });
        host.run(&["list"]).refused(1, &["AGENT_LOST", word]);
        agent.join().unwrap();
    }
}

#[test]
fn an_answer_that_came_before_the_request_was_read_is_heard() {
    let host = Host::new("early");
    // Larger than the kernel keeps for the reader, so that it cannot be sent whole.
    host.write("session/owner.cert", vec![0; 600_000]);
    host.write("session/session.bin", b"");
    let listener = std::os::unix::net::UnixListener::bind(&host.socket).unwrap();
    let agent = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let body = r#"{"type":"about:blank","title":"","status":403,"code":"NOT_PERMITTED","detail":"use root"}"#;
        let head = format!(
            "HTTP/1.1 403 Forbidden\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        support::offer(&mut stream, format!("{head}{body}").as_bytes());
    });
    let args = ["run", "vm.toml", "--owner-session", "session"];
    host.run(&args).refused(1, &["use root", "NOT_PERMITTED"]);
    agent.join().unwrap();
}

#[test]
fn usage_errors_are_64_and_help_is_0() {
    for args in [
        &[][..],
        &["frobnicate"],
        &["list", "--frob"],
        &["run"],
        &["migrate", "x"],
        &["owner"],
        &["completion", "klingon"],
    ] {
        let ran = run(args).expect(64);
        assert!(
            ran.err.contains("Usage:") || ran.err.contains("--help"),
            "{ran:?}"
        );
        assert!(ran.out.is_empty(), "{ran:?}");
    }
    for args in [&["--help"][..], &["-h"], &["help"]] {
        // Help is broken into lines of the terminal's width.
        let text = run(args).expect(0).out;
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for word in [
            "Exit status",
            "0 done",
            "1 failed",
            "2 cannot verify",
            "3 refused by policy",
            "64 usage",
            "69 no agent",
            "doctor",
            "migrate",
            "owner",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert!(!text.contains("internal"), "{text}");
    }
    assert!(
        run(&["owner", "release", "--help"])
            .expect(0)
            .out
            .contains("--allow-emulated")
    );
    assert!(run(&["--version"]).expect(0).out.starts_with("casemate "));
}

#[test]
fn internal_roles_are_started_by_the_agent_only() {
    for role in ["vmm", "mover", "psp"] {
        run(&["internal", role]).refused(1, &["started by the agent only"]);
    }
}

#[test]
fn completion_scripts_and_the_manual_page_are_whole() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completion", shell]).expect(0).out;
        assert!(
            script.contains("casemate")
                && script.contains("sandbox")
                && script.contains("ear-key")
                && script.contains("broker"),
            "{shell}"
        );
        let checker = Command::new(shell)
            .arg("-n")
            .arg("/dev/stdin")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut checker) = checker else {
            continue;
        };
        support::offer(&mut checker.stdin.take().unwrap(), script.as_bytes());
        assert!(
            wait(&mut checker).success(),
            "{shell} does not take its script"
        );
    }
    let page = run(&["man"]).expect(0).out;
    assert!(
        page.contains(".TH casemate") && page.contains("Exit status"),
        "{page}"
    );
    assert!(page.contains("migrate"), "{page}");
    for (title, option) in [
        ("casemate-attest-verify", "allow\\-emulated"),
        ("casemate-attest-reference-make", "id\\-key\\-digest"),
        ("casemate-broker", "store.key"),
    ] {
        let own = page
            .split(".TH ")
            .find(|page| page.starts_with(&format!("{title} ")));
        assert!(own.is_some_and(|page| page.contains(option)), "{title}");
    }
}

#[test]
fn output_that_nobody_reads_ends_quietly() {
    for args in [
        &["--help"][..],
        &["man"],
        &["completion", "bash"],
        &["doctor"],
        &["--json", "doctor"],
        &["frobnicate"],
        &["list"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = casemate();
        command.args(args).arg("--agent").arg("/nowhere");
        command.stdout(writer.try_clone().unwrap()).stderr(writer);
        let status = wait(&mut command.spawn().unwrap());
        assert_eq!(status.signal(), None, "{args:?}: {status}");
        assert_ne!(status.code(), Some(101), "{args:?}");
    }
    // A full disk is not the same: what was asked for did not arrive.
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut command = casemate();
    command.arg("man").stdout(full).stderr(Stdio::piped());
    let output = command.spawn().unwrap().wait_with_output().unwrap();
    Ran::from(output).refused(1, &["OUTPUT"]);
}

#[test]
fn doctor_says_what_is_there_in_both_forms() {
    let text = run(&["doctor"]);
    assert!(matches!(text.code, Some(0 | 1)), "{text:?}");
    for word in [
        "KVM",
        "Landlock",
        "seccomp",
        "cgroup",
        "userfaultfd",
        "hugepage",
    ] {
        assert!(
            text.out.to_lowercase().contains(&word.to_lowercase()),
            "{word}: {}",
            text.out
        );
    }
    let json = run(&["--json", "doctor"]);
    assert_eq!(json.code, text.code);
    assert!(json.value()["usable"].is_boolean());
}

#[test]
fn the_owner_needs_no_agent_to_measure() {
    let host = Host::new("measure");
    let path = host.describe("vm", "vault", support::SEV_WITH_SECRET);
    let one = host.json(&["owner", "measure", &path]);
    let two = host.json(&["owner", "measure", &path]);
    assert_eq!(one, two);
    // Each part of the description counts; what is the host's own affair does not.
    let text = std::fs::read_to_string(host.path(&path)).unwrap();
    for (from, to, same) in [
        ("console=ttyS0", "console=ttyS1", false),
        ("\"64 MiB\"", "\"66 MiB\"", false),
        ("vcpus = 1", "vcpus = 2", false),
        ("\"vault\"", "\"other\"", true),
    ] {
        host.write(&path, text.replace(from, to));
        let changed = host.json(&["owner", "measure", &path]);
        assert_eq!(
            changed["launch_digest"] == one["launch_digest"],
            same,
            "{to}"
        );
    }
    let of = |section: &str| {
        host.write(&path, text.replace(support::SEV_WITH_SECRET, section));
        host.run(&["owner", "measure", &path])
    };
    of("[confidential]\ntechnology = \"none\"\n").refused(1, &["no confidential guest"]);
    of("[confidential]\ntechnology = \"auto\"\n").refused(1, &["name one"]);
    // The same memory under each technology: registers and special pages make three digests of it.
    let digest = |technology: &str| {
        let section = format!("[confidential]\ntechnology = \"{technology}\"\n");
        host.write(&path, text.replace(support::SEV_WITH_SECRET, &section));
        let measured = host.json(&["owner", "measure", &path]);
        measured["launch_digest"].as_str().unwrap().to_owned()
    };
    let (sev, es, snp) = (digest("sev"), digest("sev-es"), digest("sev-snp"));
    assert_eq!((sev.len(), es.len(), snp.len()), (64, 64, 96));
    assert_ne!(sev, es);
}
