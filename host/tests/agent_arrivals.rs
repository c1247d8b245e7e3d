//! The migration port against strangers: no byte of theirs reaches the agent, and none of their connections leaves a
//! process behind. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::io::Read;
use std::net::TcpStream;
use std::time::Duration;

use support::{Host, SEV, offer, until};

#[test]
fn rubbish_and_huge_lengths_are_refused() {
    let host = listening("strangers");
    let path = host.describe("vm", "vault", SEV);
    host.run(&["run", &path]).expect(0);
    let huge = [0x16, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff];
    let plain = b"casemate\x00\x00\x00\x01\xff\xff\xff\xff\xff\xff\xff\xff";
    let cases: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        &[0; 4096],
        &[0xff; 4096],
        &huge,
        plain,
        b"",
    ];
    for case in cases {
        let mut stream = connect(&host);
        offer(&mut stream, case);
        // Half a hello and nothing more would be silence, which is the next test's matter.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        closed(stream);
    }
    host.quiet(2);
    let refused: Vec<_> = arrivals(&host);
    assert_eq!(refused.len(), cases.len(), "{refused:#?}");
    for record in &refused {
        assert_eq!(record["outcome"], "failed");
        assert!(!record["code"].as_str().unwrap().is_empty(), "{record}");
        assert!(!record["actor"].as_str().unwrap().is_empty(), "{record}");
    }
    assert_eq!(host.listed("vault").unwrap()["state"], "running");
}

#[test]
fn a_stranger_with_a_certificate_of_another_authority_is_refused() {
    let host = listening("authority");
    let mut child = std::process::Command::new("openssl");
    child.args(["s_client", "-tls1_3", "-connect"]);
    child.arg(format!("127.0.0.1:{}", host.listen.unwrap()));
    child.args(["-servername", "here.casemate.test", "-alpn", "casemate"]);
    let Ok(found) = std::process::Command::new("openssl")
        .arg("version")
        .output()
    else {
        eprintln!("no openssl here; not tried");
        return;
    };
    assert!(found.status.success());
    child.stdin(std::process::Stdio::null());
    support::finish(child);
    host.quiet(1);
    assert_eq!(arrivals(&host).len(), 1);
    host.json(&["list"]);
}

#[test]
fn silence_ends_within_the_deadline_and_a_scan_starves_nobody() {
    let host = listening("silence");
    // More than are served at a time: the last wait for the silent ones to be turned away.
    let silent: Vec<TcpStream> = (0..4).map(|_| connect(&host)).collect();
    let scan: Vec<TcpStream> = (0..40).map(|_| connect(&host)).collect();
    drop(scan);
    // Meanwhile the agent serves its own.
    let path = host.describe("vm", "vault", SEV);
    host.run(&["run", &path]).expect(0);
    host.run(&["stop", "vault"]).expect(0);
    silent.into_iter().for_each(closed);
    until("every connection is over", || arrivals(&host).len() == 44);
    host.quiet(1);
    host.json(&["list"]);
}

#[test]
fn an_agent_told_to_stop_while_strangers_are_connected_leaves_nothing() {
    let mut host = listening("stop");
    let silent: Vec<TcpStream> = (0..6).map(|_| connect(&host)).collect();
    until("the movers run", || host.roles().len() >= 5);
    assert!(host.end(nix::sys::signal::Signal::SIGTERM).success());
    host.quiet(0);
    assert!(!host.socket.exists());
    silent.into_iter().for_each(closed);
}

#[test]
fn a_host_without_an_identity_accepts_no_migration() {
    let mut host = Host::new("anonymous");
    host.accept_migrations();
    host.configure(&format!(
        "listen = \"127.0.0.1:{}\"\n",
        host.listen.unwrap()
    ));
    host.start_fails().refused(1, &["listen", "[identity]"]);
}

fn listening(tag: &str) -> Host {
    let mut host = Host::new(tag);
    host.accept_migrations();
    host.start();
    host
}

fn connect(host: &Host) -> TcpStream {
    TcpStream::connect(("127.0.0.1", host.listen.unwrap())).unwrap()
}

/// Waits until the other side has closed.
fn closed(mut stream: TcpStream) {
    stream
        .set_read_timeout(Some(Duration::from_secs(100)))
        .unwrap();
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes) {
        let kind = error.kind();
        assert_eq!(kind, std::io::ErrorKind::ConnectionReset, "{error}");
    }
    assert!(bytes.len() < 4096, "{} bytes for a stranger", bytes.len());
}

fn arrivals(host: &Host) -> Vec<serde_json::Value> {
    let mut records = host.records();
    records.retain(|r| r["action"] == "migrate-in");
    records
}
