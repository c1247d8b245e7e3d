//! Requests that take long, and what the agent counts. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use support::{Host, POLICY, ask, connected, heard, http, offer};

#[test]
fn a_long_request_is_a_task_with_events_and_an_end() {
    let host = started("task");
    let path = host.describe("vm", "vault", support::SEV);
    let body = serde_json::json!({"description": host.path(&path)}).to_string();
    let (status, task) = ask(&host, "POST", "/v1/guests", &body);
    assert_eq!(
        (status, task["kind"].as_str()),
        (202, Some("task")),
        "{task}"
    );
    assert_eq!(task["asked_by"], "operator");
    let id = task["id"].as_str().unwrap().to_owned();
    let mut stream = connected(&host);
    let events = http("GET", &format!("/v1/tasks/{id}/events"), "");
    offer(&mut stream, &events);
    let (status, text) = heard(&mut stream).unwrap();
    assert_eq!(status, 200);
    assert!(
        text.contains("\"line\":\"answer\"") && text.contains("\"vault\""),
        "{text}"
    );
    let shown = host.json(&["task", "show", &id]);
    assert_eq!(shown["state"], "done");
    assert_eq!(shown["guest"], "vault");
    assert_eq!(host.json(&["task", "list"])["tasks"][0]["id"], id);
    assert_eq!(host.json(&["task", "follow", &id])["name"], "vault");
    let cancelled = host.run(&["task", "cancel", &id]);
    cancelled.refused(1, &["NOT_CANCELLABLE"]);
    // A launch that fails is a task that fails.
    let (_, task) = ask(&host, "POST", "/v1/guests", &body);
    let id = task["id"].as_str().unwrap();
    let followed = host.run(&["task", "follow", id]);
    followed.refused(1, &["NAME_TAKEN"]);
    let shown = host.json(&["task", "show", id]);
    assert_eq!(shown["failure"]["code"], "NAME_TAKEN");
}

#[test]
fn the_numbers_are_prometheus_and_name_no_guest() {
    let host = started("numbers");
    let path = host.describe("vm", "my-secret-guest", support::SEV);
    host.run(&["run", &path]).expect(0);
    host.run(&["status", "another-name"]).expect(1);
    let mut stream = connected(&host);
    offer(&mut stream, &http("GET", "/metrics", ""));
    let (status, text) = heard(&mut stream).unwrap();
    assert_eq!(status, 200);
    let mut types = std::collections::BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(types.insert(name, kind).is_none(), "{name} twice");
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap();
            let name = series.split('{').next().unwrap();
            let known = |name: &str| types.contains_key(name);
            let ends = ["_bucket", "_sum", "_count"];
            let base = ends.iter().find_map(|end| name.strip_suffix(end));
            assert!(known(name) || base.is_some_and(known), "{line}");
        }
    }
    for wanted in [
        "casemate_guests{state=\"running\",technology=\"sev\",emulated=\"true\"} 1",
        "casemate_requests_total{operation=\"run\",outcome=\"done\"} 1",
        "casemate_requests_total{operation=\"status\",outcome=\"failed\"} 1",
        "casemate_migration_downtime_seconds_count 0",
    ] {
        assert!(
            text.lines().any(|line| line == wanted),
            "{wanted} in\n{text}"
        );
    }
    assert!(!text.contains("secret-guest") && !text.contains("another"));
    let printed = host.run(&["metrics"]).expect(0).out;
    assert_eq!(printed.lines().next(), text.lines().next());
}

fn started(tag: &str) -> Host {
    let mut host = Host::with_policy(tag, POLICY);
    host.start();
    host
}
