//! The agent's socket against those who do not keep to the protocol. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![expect(unsafe_code, reason = "one thread becomes another user")]

mod support;

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use support::{Host, POLICY, ask, connected, heard, http, offer, until};

#[test]
fn rubbish_is_refused_and_the_agent_answers_the_next() {
    let host = started("rubbish");
    let long_head = format!("GET /v1/guests?{} HTTP/1.1\r\n\r\n", "a".repeat(1 << 20));
    let many = format!("GET /v1/guests HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(100));
    let cases: [(&[u8], u16); 7] = [
        (b"\x00\xff\xfe\x80\r\n\r\n", 400),
        (b"{\"request\":\"list\"}\n", 400),
        (b"GET / HTTP/3.0\r\n\r\n", 400),
        (b"GET /v1/guests HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400),
        (
            b"POST /v1/guests HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            400,
        ),
        (long_head.as_bytes(), 431),
        (many.as_bytes(), 431),
    ];
    for (case, want) in cases {
        let mut stream = connected(&host);
        offer(&mut stream, case);
        let _ = stream.shutdown(Shutdown::Write);
        let shown = String::from_utf8_lossy(&case[..case.len().min(60)]);
        let status = heard(&mut stream).map(|(status, _)| status);
        assert_eq!(status, Some(want), "{shown}");
        host.json(&["list"]);
    }
}

#[test]
fn requests_that_fit_no_operation_are_refused_each_with_its_code() {
    let host = started("unfit");
    let long = format!("{{\"description\":\"{}\"}}", "x".repeat(2 << 20));
    let deep = format!("{{\"description\":{}", "[".repeat(500_000));
    for (method, target, body, status, code) in [
        ("GET", "/", "", 404, "NO_SUCH_PATH"),
        ("GET", "/v1/guests/a/b/c", "", 404, "NO_SUCH_PATH"),
        ("GET", "/v1/guests/../guests", "", 404, "NO_SUCH_PATH"),
        ("PATCH", "/v1/guests", "", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/v1/guests/nobody", "", 404, "NO_SUCH_GUEST"),
        ("GET", "/v1/tasks/nothing", "", 404, "NO_SUCH_TASK"),
        ("GET", "/v1/guests?more=1", "", 400, "BAD_REQUEST"),
        ("POST", "/v1/guests", "[]", 400, "BAD_REQUEST"),
        ("POST", "/v1/guests", "{}", 400, "BAD_REQUEST"),
        (
            "POST",
            "/v1/guests",
            "{\"description\":1}",
            400,
            "BAD_REQUEST",
        ),
        (
            "POST",
            "/v1/guests/a/stop",
            "{\"more\":1}",
            400,
            "BAD_REQUEST",
        ),
        (
            "POST",
            "/v1/guests/a/stop",
            "{\"name\":\"b\"}",
            400,
            "BAD_REQUEST",
        ),
        ("POST", "/v1/guests/a/stop", "{}{}", 400, "BAD_REQUEST"),
        ("POST", "/v1/guests", &long, 413, "TOO_LARGE"),
        ("POST", "/v1/guests", &deep, 400, "BAD_REQUEST"),
    ] {
        let (found, problem) = ask(&host, method, target, body);
        let code_found = problem["code"].as_str();
        assert_eq!(
            (found, code_found),
            (status, Some(code)),
            "{target} {problem}"
        );
        assert_eq!(problem["status"], status);
    }
    // Nor what a web page could send.
    for (header, status) in [
        (
            "content-type: application/json\r\norigin: https://evil.test",
            403,
        ),
        ("content-type: text/plain", 415),
    ] {
        let mut stream = connected(&host);
        let text = format!(
            "POST /v1/guests/a/stop HTTP/1.1\r\nhost: agent\r\n{header}\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}"
        );
        offer(&mut stream, text.as_bytes());
        assert_eq!(heard(&mut stream).unwrap().0, status, "{header}");
    }
    host.json(&["list"]);
}

#[test]
fn silence_and_half_a_request_end_within_the_deadline() {
    let host = started("silence");
    // More than the agent serves at a time, so that the last waits for the first to be turned away.
    let mut silent: Vec<UnixStream> = (0..40).map(|_| connected(&host)).collect();
    for stream in silent.iter_mut().take(8) {
        offer(stream, b"GET /v1/gue");
    }
    let whole = http("POST", "/v1/guests", "{\"description\":\"x\"}");
    for stream in silent.iter_mut().skip(8).take(8) {
        offer(stream, &whole[..whole.len() - 3]);
    }
    host.json(&["list"]);
    let mut half = silent.swap_remove(8);
    let (status, problem) = heard(&mut half).unwrap();
    assert_eq!(status, 408);
    assert!(problem.contains("within"), "{problem}");
}

#[test]
fn a_request_in_drops_does_not_outlive_the_deadline() {
    let host = started("drops");
    for beginning in [
        "GET /v1/guests HTTP/1.1\r\nx: ",
        "POST /v1/guests HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n",
    ] {
        let mut stream = connected(&host);
        let mut writer = stream.try_clone().unwrap();
        offer(&mut writer, beginning.as_bytes());
        let (ended, over) = std::sync::mpsc::channel::<()>();
        let begun = Instant::now();
        let drops = std::thread::spawn(move || {
            while over.recv_timeout(Duration::from_secs(2)).is_err() {
                if writer.write_all(b" ").is_err() {
                    break;
                }
            }
        });
        let status = heard(&mut stream).map(|(status, _)| status);
        assert!(matches!(status, None | Some(408)), "{status:?}");
        let taken = begun.elapsed().as_secs();
        assert!((8..60).contains(&taken), "{taken} s");
        drop(ended);
        drops.join().unwrap();
    }
}

#[test]
fn who_asks_and_does_not_read_loses_the_connection() {
    let host = started("deaf");
    let mut stream = connected(&host);
    let request = String::from_utf8(http("GET", "/v1/openapi.json", "")).unwrap();
    let request = request.replace("connection: close\r\n", "");
    // Answers that nobody reads fill the socket; the agent then waits, and then does not.
    let patience = Some(Duration::from_secs(60));
    stream.set_write_timeout(patience).unwrap();
    let begun = Instant::now();
    let error = loop {
        if let Err(error) = stream.write_all(request.as_bytes()) {
            break error;
        }
    };
    let reset = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
    assert!(reset.contains(&error.kind()), "{error}");
    let taken = begun.elapsed().as_secs();
    assert!((8..50).contains(&taken), "{taken} s");
}

#[test]
fn a_client_that_hangs_up_stops_no_work() {
    let host = started("hangup");
    let path = host.describe("vm", "vault", support::SEV);
    let mut stream = connected(&host);
    let body = serde_json::json!({"description": host.path(&path)});
    offer(&mut stream, &http("POST", "/v1/guests", &body.to_string()));
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
        let body = serde_json::json!({"header": header, "ciphertext": ciphertext}).to_string();
        let (status, problem) = ask(&host, "POST", "/v1/guests/vault/secret", &body);
        assert!(status >= 400 && problem["code"].is_string(), "{problem}");
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
    let (status, line) = ask_as(NOBODY, &host.socket).unwrap();
    assert_eq!(status, 403);
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

/// What a client of another user hears; none if it cannot even connect.
fn ask_as(uid: libc::uid_t, socket: &Path) -> Option<(u16, String)> {
    let socket = socket.to_owned();
    let client = std::thread::spawn(move || {
        // SAFETY: numbers only. The bare system call, unlike libc's function, changes this thread alone, and the
        // thread ends with the client.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
        assert_eq!(changed, 0);
        let mut stream = UnixStream::connect(socket).ok()?;
        offer(&mut stream, &http("GET", "/v1/guests", ""));
        heard(&mut stream)
    });
    client.join().unwrap()
}

const NOBODY: libc::uid_t = 65534;
