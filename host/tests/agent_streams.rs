//! Moves over several connections between two real agents, on the machine's own `/dev/kvm`. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use serde_json::Value;
use support::Host;
use support::counter::{Story, run_counter};
use support::pair::Pair;

#[test]
fn a_guest_moves_there_and_back_over_several_connections() {
    let pair = Pair::new("streams", ["", ""]);
    run_counter(&pair.a, "counter");
    let mut story = Story::of("counter");
    story.hear(&pair.a, 5);
    let dry = [
        "migrate",
        "counter",
        "--to",
        "b",
        "--dry-run",
        "--streams",
        "4",
    ];
    assert_eq!(pair.a.json(&dry)["streams"], 4);
    pair.b.quiet(1);

    let there = moved(&pair.a, "b", "4");
    story.leave(&pair.a);
    story.hear(&pair.b, 20);
    let back = moved(&pair.b, "a", "16");
    story.leave(&pair.b);
    story.hear(&pair.a, 20);

    for (report, count, hosts) in [
        (
            &there,
            4,
            [(&pair.a, "migrate-out"), (&pair.b, "migrate-in")],
        ),
        (
            &back,
            16,
            [(&pair.b, "migrate-out"), (&pair.a, "migrate-in")],
        ),
    ] {
        let streams = report["verified"]["streams"].as_array().unwrap();
        assert_eq!(streams.len(), count);
        let carried: Vec<_> = streams
            .iter()
            .map(|stream| stream["pages"].as_u64().unwrap())
            .collect();
        assert_eq!(Some(carried.iter().sum()), report["pages"].as_u64());
        let carried: Vec<_> = carried.iter().map(u64::to_string).collect();
        for (host, action) in hosts {
            let record = record(host, action);
            assert_eq!(record["detail"]["streams"], count, "{record}");
            assert_eq!(record["detail"]["stream_pages"], carried.join(" "));
        }
    }
    // One connection is what a move has unless it is told otherwise.
    let out = pair.a.run(&["--json", "migrate", "counter", "--to", "b"]);
    let report: Value = serde_json::from_str(out.expect(0).out.lines().last().unwrap()).unwrap();
    assert_eq!(report["verified"]["streams"].as_array().unwrap().len(), 1);
    story.leave(&pair.a);
    story.hear(&pair.b, 20);
    for wrong in ["0", "17", "many"] {
        let args = ["migrate", "counter", "--to", "a", "--streams", wrong];
        pair.b.run(&args).refused(64, &["--streams"]);
    }
}

fn moved(host: &Host, to: &str, streams: &str) -> Value {
    let args = ["--json", "migrate", "counter", "--to", to];
    let args = [&args[..], &["--streams", streams, "--read-back"]].concat();
    let out = host.run(&args).expect(0).out;
    serde_json::from_str(out.lines().last().unwrap()).unwrap()
}

/// The record of the move that went well.
fn record(host: &Host, action: &str) -> Value {
    let mut records = host.records();
    records.retain(|r| r["action"] == action && r["outcome"] == "done");
    records.remove(0)
}
