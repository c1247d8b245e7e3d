//! The migration port against strangers: no byte of their TLS reaches the agent, none of their connections leaves a process
//! behind, and as many as there are take no peer's place. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::io::Read;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

use casemate_crypto_migrate::preamble::Ticket;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect as connect_socket, socket,
};
use support::counter::{Story, run_counter};
use support::pair::Pair;
use support::{Host, SEV, offer, until};

#[test]
fn rubbish_and_huge_lengths_are_refused() {
    let host = listening("strangers");
    let path = host.describe("vm", "vault", SEV);
    host.run(&["run", &path]).expect(0);
    let huge = [0x16, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff];
    let plain = b"casemate\x00\x00\x00\x01\xff\xff\xff\xff\xff\xff\xff\xff";
    let cases: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        &[0; 4096],
        &[0xff; 4096],
        &huge,
        plain,
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
fn a_preamble_leads_to_a_move_under_way_or_nowhere() {
    let host = listening("preamble");
    let unknown = Ticket([7; 16]).encode();
    let cases: [&[u8]; 4] = [
        &unknown,
        &unknown[..9],
        b"CMJOIN/2 and another ticket",
        b"C",
    ];
    for case in cases {
        let mut stream = connect(&host);
        offer(&mut stream, case);
        closed(stream);
    }
    // None of them was worth a process; a move that begins still is.
    assert!(arrivals(&host).is_empty());
    host.quiet(1);
    let mut stream = connect(&host);
    offer(&mut stream, &[0; 4096]);
    closed(stream);
    until("it was heard", || arrivals(&host).len() == 1);
}

#[test]
fn silence_ends_within_the_deadline_and_a_scan_starves_nobody() {
    let host = listening("silence");
    // More than are served at a time: the last wait for those to be turned away that fall silent after a byte.
    let silent: Vec<TcpStream> = (0..4).map(|_| connect(&host)).collect();
    let halting: Vec<TcpStream> = (0..6).map(|_| connect(&host)).collect();
    for mut stream in &halting {
        offer(&mut stream, &[0x16]);
    }
    let scan: Vec<TcpStream> = (0..40).map(|_| connect(&host)).collect();
    drop(scan);
    // Meanwhile the agent serves its own.
    let path = host.describe("vm", "vault", SEV);
    host.run(&["run", &path]).expect(0);
    host.run(&["stop", "vault"]).expect(0);
    silent.into_iter().chain(halting).for_each(closed);
    // Who said nothing was worth neither a process nor a record.
    until("every connection is over", || arrivals(&host).len() == 6);
    host.quiet(1);
    host.json(&["list"]);
}

#[test]
fn ten_thousand_connections_take_no_peers_place_and_little_memory() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most.min(20_000), most).unwrap();
    let pair = Pair::new("flood", ["", ""]);
    run_counter(&pair.a, "counter");
    let mut story = Story::of("counter");
    story.hear(&pair.a, 5);
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", pair.b.pid())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmHWM"))
            .unwrap();
        let kib = line.split_whitespace().nth(1).unwrap();
        kib.parse::<u64>().unwrap() >> 10
    };
    let before = resident();
    // Of another address than the peer's. Every third says the beginning of a hello, and no more.
    let mut flood = Vec::new();
    let mut more = |count: usize| {
        for number in 0..count {
            let stream = from_afar(pair.b.listen.unwrap());
            if number % 3 == 0 {
                // It may have been closed already.
                let _ = nix::unistd::write(&stream, &[0x16, 3, 1]);
            }
            flood.push(stream);
        }
    };
    more(5000);
    let mut flooded = false;
    let moved = pair.a.migrate(&["counter", "--to", "b"], |_| {
        if !std::mem::replace(&mut flooded, true) {
            more(5000);
        }
    });
    moved.expect(0);
    story.leave(&pair.a);
    story.hear(&pair.b, 20);
    assert_eq!(flood.len(), 10_000);
    assert!(
        resident() < before + 32,
        "{} MiB after {before}",
        resident()
    );
    // Four of its address had a mover each; the agent serves its own all the while.
    assert!(pair.b.roles().len() <= 1 + 4 + 1, "{:?}", pair.b.roles());
    let counted = pair.b.run(&["metrics"]).expect(0).out;
    let turned_away = counted
        .lines()
        .find_map(|line| line.strip_prefix("casemate_arrivals_turned_away_total "))
        .unwrap();
    assert!(turned_away.parse::<u32>().unwrap() > 9000, "{turned_away}");
    drop(flood);
    pair.b.quiet(2);
}

#[test]
fn an_address_has_four_movers_however_slowly_it_comes() {
    let host = listening("slowly");
    // One at a time, each when the one before has been handed on; then two that must wait.
    let mut halting = Vec::new();
    for number in 1..=6 {
        let stream = from_afar(host.listen.unwrap());
        nix::unistd::write(&stream, &[0x16]).unwrap();
        halting.push(stream);
        let movers = || host.roles_of("mover").len();
        if number <= 4 {
            until("it has a mover", || movers() == number);
        } else {
            std::thread::sleep(Duration::from_millis(500));
            assert_eq!(movers(), 4, "after {number} connections");
        }
    }
    drop(halting);
    host.quiet(1);
}

#[test]
fn an_agent_told_to_stop_while_strangers_are_connected_leaves_nothing() {
    let mut host = listening("stop");
    let silent: Vec<TcpStream> = (0..6).map(|_| connect(&host)).collect();
    for mut stream in &silent {
        offer(&mut stream, &[0x16]);
    }
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

/// A connection of 127.0.0.2.
fn from_afar(port: u16) -> std::os::fd::OwnedFd {
    let stream = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(stream.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 2, 0)).unwrap();
    connect_socket(stream.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, port)).unwrap();
    stream
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
