//! The agent's socket against those who do not keep to the protocol. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![expect(unsafe_code, reason = "one thread becomes another user")]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;
use support::{Host, POLICY, offer, until};

#[test]
fn rubbish_is_refused_and_the_agent_answers_the_next() {
    let host = started("rubbish");
    let long = vec![b'a'; 2 << 20];
    let mut long_json = br#"{"request":"status","name":""#.to_vec();
    long_json.extend(vec![b'x'; 2 << 20]);
    long_json.extend(b"\"}\n");
    let cases: [&[u8]; 12] = [
        b"\n",
        b"\x00\xff\xfe\x80\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"{}\n",
        b"[]\n",
        b"{\"request\":\"frobnicate\"}\n",
        b"{\"request\":\"status\"}\n",
        b"{\"request\":\"status\",\"name\":1}\n",
        b"{\"request\":\"status\",\"name\":\"a\",\"more\":1}\n",
        b"{\"request\":\"stop\",\"name\":\"a\"}{\"request\":\"list\"}\n",
        &long,
        &long_json,
    ];
    for case in cases {
        let mut stream = UnixStream::connect(&host.socket).unwrap();
        offer(&mut stream, case);
        let _ = stream.shutdown(Shutdown::Write);
        let line = last_line(stream);
        assert_eq!(line["line"], "failed", "{line}");
        assert_eq!(line["code"], "BAD_REQUEST", "{line}");
        host.json(&["list"]);
    }
    // Deeply nested JSON must not end the agent by its stack.
    let mut stream = UnixStream::connect(&host.socket).unwrap();
    offer(&mut stream, "[".repeat(500_000).as_bytes());
    offer(&mut stream, b"\n");
    assert_eq!(last_line(stream)["code"], "BAD_REQUEST");
    host.json(&["list"]);
}

#[test]
fn silence_and_half_a_request_end_within_the_deadline() {
    let host = started("silence");
    // More than the agent serves at a time, so that the last waits for the first to be turned away.
    let mut silent: Vec<UnixStream> = (0..40)
        .map(|_| UnixStream::connect(&host.socket).unwrap())
        .collect();
    for stream in silent.iter_mut().take(8) {
        offer(stream, b"{\"request\":\"li");
    }
    host.json(&["list"]);
    let first = silent.swap_remove(0);
    let line = last_line(first);
    assert_eq!(line["code"], "BAD_REQUEST", "{line}");
    assert!(line["error"].as_str().unwrap().contains("within"), "{line}");
}

#[test]
fn a_request_in_drops_does_not_outlive_the_deadline() {
    let host = started("drops");
    let mut stream = UnixStream::connect(&host.socket).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let (ended, over) = std::sync::mpsc::channel::<()>();
    let drops = std::thread::spawn(move || {
        while over
            .recv_timeout(std::time::Duration::from_secs(2))
            .is_err()
        {
            if writer.write_all(b" ").is_err() {
                break;
            }
        }
    });
    stream
        .set_read_timeout(Some(std::time::Duration::from_secs(60)))
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let line: Value = serde_json::from_str(text.trim()).unwrap();
    assert_eq!(line["code"], "BAD_REQUEST", "{line}");
    drop(ended);
    drops.join().unwrap();
}

#[test]
fn a_client_that_hangs_up_stops_no_work() {
    let host = started("hangup");
    let path = host.describe("vm", "vault", support::SEV);
    let mut stream = UnixStream::connect(&host.socket).unwrap();
    let description = host.path(&path);
    let request =
        serde_json::json!({"request": "run", "description": description, "session": null});
    offer(&mut stream, format!("{request}\n").as_bytes());
    drop(stream);
    until("the guest runs", || host.listed("vault").is_some());
    host.run(&["stop", "vault"]).expect(0);
}

#[test]
fn base64_and_sizes_in_requests_are_checked() {
    let host = started("base64");
    host.measured("vault");
    for (header, ciphertext) in [
        ("%", ""),
        ("", "AA=="),
        ("AAAA", "AAAA"),
        (&*"A".repeat(200_000), "AAAA"),
    ] {
        let request = serde_json::json!({"request": "inject-secret", "name": "vault", "header": header, "ciphertext": ciphertext});
        let line = ask(&host, &request);
        assert_eq!(line["line"], "failed", "{line}");
        assert_eq!(host.listed("vault").unwrap()["state"], "measured");
    }
}

#[test]
fn another_user_is_refused() {
    let host = started("user");
    let mode = |path: &Path, bits| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(bits)).unwrap();
    };
    mode(host.path("").as_path(), 0o755);
    assert_eq!(
        std::fs::metadata(&host.socket)
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    assert_eq!(
        ask_as(NOBODY, &host.socket),
        None,
        "the socket's mode must keep others out"
    );
    // Even with the file's permissions gone the kernel says who asks.
    mode(&host.socket, 0o666);
    let line = ask_as(NOBODY, &host.socket).unwrap();
    assert!(
        line.contains("NOT_PERMITTED") && line.contains("65534"),
        "{line}"
    );
    host.json(&["list"]);
}

#[test]
fn an_agent_whose_log_has_no_reader_lives_on() {
    let mut host = Host::new("log");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    host.start_with(writer.into());
    let path = host.describe("vm", "vault", support::SEV);
    for _ in 0..2 {
        host.run(&["run", &path]).expect(0);
        host.run(&["stop", "vault"]).expect(0);
    }
    host.json(&["list"]);
}

#[test]
fn a_socket_left_behind_is_replaced_and_nothing_else_is() {
    let mut host = started("socket");
    host.end(nix::sys::signal::Signal::SIGKILL);
    assert!(host.socket.exists());
    host.start();
    assert!(host.log().contains("left behind"), "{}", host.log());
    host.json(&["list"]);
    // A second agent of the same host is refused, and the first is not disturbed.
    let ran = host.start_fails();
    assert_eq!(ran.code, Some(1), "{ran:?}");
    host.json(&["list"]);
    host.json(&[
        "evidence",
        "verify",
        "state/ledger",
        "--key",
        "state/ledger.pub",
    ]);
    assert!(host.end(nix::sys::signal::Signal::SIGTERM).success());
    assert!(!host.socket.exists());
    // A file that is no socket is somebody's, not ours to remove.
    std::fs::write(&host.socket, "precious").unwrap();
    host.start_fails()
        .refused(1, &["agent.sock", "not a socket"]);
    assert_eq!(std::fs::read_to_string(&host.socket).unwrap(), "precious");
}

fn started(tag: &str) -> Host {
    let mut host = Host::with_policy(tag, POLICY);
    host.start();
    host
}

fn ask(host: &Host, request: &Value) -> Value {
    let mut stream = UnixStream::connect(&host.socket).unwrap();
    offer(&mut stream, format!("{request}\n").as_bytes());
    last_line(stream)
}

/// What a client of another user hears; none if it cannot even connect.
fn ask_as(uid: libc::uid_t, socket: &Path) -> Option<String> {
    let socket = socket.to_owned();
    let client = std::thread::spawn(move || {
        // SAFETY: numbers only. The bare system call, unlike libc's function, changes this thread alone, and the
        // thread ends with the client.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
        assert_eq!(changed, 0);
        let mut stream = UnixStream::connect(socket).ok()?;
        offer(&mut stream, b"{\"request\":\"list\"}\n");
        // The agent reads nothing of a stranger, so behind its answer the connection is reset.
        BufReader::new(stream).lines().next()?.ok()
    });
    client.join().unwrap()
}

fn last_line(stream: UnixStream) -> Value {
    stream
        .set_read_timeout(Some(std::time::Duration::from_secs(100)))
        .unwrap();
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    serde_json::from_str(&lines.last().unwrap()).unwrap()
}

const NOBODY: libc::uid_t = 65534;
