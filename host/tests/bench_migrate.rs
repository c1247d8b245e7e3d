//! `casemate bench migrate`: both ends as processes, every protection.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::Value;

const CASEMATE: &str = env!("CARGO_BIN_EXE_casemate");

#[test]
fn every_protection_moves_the_memory_and_reports_every_figure() {
    for protect in ["none", "tls", "tls+mac"] {
        let report = report(&["--size", "8M", "--protect", protect]);
        assert_eq!(report["protect"], protect);
        assert_eq!(report["size"], 8 << 20);
        for field in [
            "gib_per_s",
            "cpu_s_per_gb_source",
            "cpu_s_per_gb_destination",
            "peak_rss_mib_source",
            "peak_rss_mib_destination",
            "switch_ms",
        ] {
            let value = report[field].as_f64().unwrap();
            assert!(
                value > 0.0 && value.is_finite(),
                "{protect} {field}: {value}"
            );
        }
        let parts = &report["parts"];
        let part = |end: &str, name: &str| parts[end][name].as_f64().unwrap();
        for end in ["source", "destination"] {
            assert!(part(end, "copy") > 0.0 && part(end, "socket") > 0.0);
            assert_eq!(part(end, "tls") > 0.0, protect != "none", "{protect}");
            assert_eq!(part(end, "seals") > 0.0, protect == "tls+mac", "{protect}");
        }
        assert!(parts["cpu_measured"].as_f64().unwrap() > 0.1);
    }
}

#[test]
fn the_memory_that_moves_is_not_counted_as_memory_of_the_engine() {
    let report = report(&["--size", "192M"]);
    for field in ["peak_rss_mib_source", "peak_rss_mib_destination"] {
        let peak = report[field].as_f64().unwrap();
        assert!((1.0..64.0).contains(&peak), "{field}: {peak}");
    }
}

#[test]
fn memory_goes_over_several_connections() {
    for protect in ["none", "tls", "tls+mac"] {
        let report = report(&["--size", "32M", "--streams", "4", "--protect", protect]);
        assert_eq!(
            (&report["streams"], &report["protect"]),
            (&4.into(), &protect.into())
        );
        for field in ["peak_rss_mib_source", "peak_rss_mib_destination"] {
            let peak = report[field].as_f64().unwrap();
            assert!((1.0..64.0).contains(&peak), "{field}: {peak}");
        }
    }
    let most = report(&["--size", "64M", "--streams", "16"]);
    assert!(
        most["peak_rss_mib_source"].as_f64().unwrap() < 64.0,
        "{most}"
    );
    assert!(
        most["peak_rss_mib_destination"].as_f64().unwrap() < 64.0,
        "{most}"
    );
}

#[test]
fn two_machines_meet_by_address_and_a_folder_of_keys() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    let listen = [
        "bench",
        "migrate",
        "--listen",
        "127.0.0.1:0",
        "--with-parent",
        "--keys",
    ];
    let mut destination = Command::new(CASEMATE)
        .args(listen)
        .arg(&keys)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(destination.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let listening: Value = serde_json::from_str(&line).unwrap();
    let address = listening["listening"].as_str().unwrap();
    let keys = keys.to_str().unwrap();
    let report = report(&["--size", "4M", "--connect", address, "--keys", keys]);
    assert_eq!(report["protect"], "tls+mac");
    assert!(destination.wait().unwrap().success());
}

#[test]
fn a_stranger_is_refused_and_the_failure_has_a_code() {
    let (mine, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut ends = [mine.path(), other.path()].map(|keys| {
        let mut end = Command::new(CASEMATE)
            .args([
                "bench",
                "migrate",
                "--listen",
                "127.0.0.1:0",
                "--with-parent",
                "--keys",
            ])
            .arg(keys)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(end.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address: Value = serde_json::from_str(&line).unwrap();
        (end, address["listening"].as_str().unwrap().to_owned())
    });
    let output = Command::new(CASEMATE)
        .args(["bench", "migrate", "--size", "4M", "--connect", &ends[0].1])
        .arg("--keys")
        .arg(other.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("CERTIFICATE_INVALID"), "{said}");
    assert_eq!(ends[0].0.wait().unwrap().code(), Some(1));
    ends[1].0.kill().unwrap();
    ends[1].0.wait().unwrap();
}

fn report(arguments: &[&str]) -> Value {
    let output = Command::new(CASEMATE)
        .args(["bench", "migrate", "--json"])
        .args(arguments)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    serde_json::from_slice(&output.stdout).unwrap()
}
