//! `casemate vm`: descriptions that a host keeps. Needs root and `/dev/kvm`.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use nix::sys::signal::Signal;
use support::Host;

#[test]
fn a_description_is_kept_as_it_was_and_outlives_the_agent() {
    let mut host = Host::new("kept");
    host.start();
    let path = host.describe("vm", "vault", "");
    host.run(&["vm", "validate", &path]).expect(0);
    host.run(&["vm", "start", "vault"])
        .refused(1, &["NO_SUCH_GUEST", "vm definitions"]);
    host.run(&["vm", "create", &path]).expect(0);
    assert!(host.listed("vault").is_none());
    // What the file says later, even if it is gone, is another matter.
    std::fs::remove_file(host.path(&path)).unwrap();
    host.run(&["vm", "validate", &path]).expect(1);
    host.end(Signal::SIGTERM);
    host.start();
    let kept = host.json(&["vm", "definitions"])["definitions"][0].clone();
    assert_eq!(
        (&kept["name"], &kept["present"]),
        (&"vault".into(), &false.into())
    );
    assert_eq!(host.json(&["vm", "start", "vault"])["state"], "running");
    assert_eq!(
        host.json(&["vm", "definitions"])["definitions"][0]["present"],
        true
    );
    assert_eq!(host.json(&["vm", "pause", "vault"])["state"], "paused");
    assert_eq!(host.json(&["vm", "resume", "vault"])["state"], "running");
    host.run(&["vm", "start", "vault"])
        .refused(1, &["NAME_TAKEN"]);
    host.run(&["vm", "delete", "vault"])
        .refused(1, &["NAME_TAKEN", "stop it first"]);
    let stats = host.json(&["vm", "stats", "vault"]);
    assert!(stats["threads"].as_u64().unwrap() >= 3, "{stats}");
    assert!(
        stats["resident_bytes"].as_u64().unwrap() > 1 << 20,
        "{stats}"
    );
    host.run(&["vm", "stop", "vault", "--force"]).expect(0);
    // It can be started again, and forgotten.
    host.run(&["vm", "start", "vault"]).expect(0);
    host.run(&["vm", "stop", "vault", "--force"]).expect(0);
    host.run(&["vm", "delete", "vault"]).expect(0);
    host.run(&["vm", "delete", "vault"])
        .refused(1, &["NO_SUCH_GUEST"]);
    assert_eq!(
        host.json(&["vm", "definitions"])["definitions"],
        serde_json::json!([])
    );
    let records = host.records();
    let has = |action: &str| {
        records
            .iter()
            .any(|r| r["action"] == action && r["object"] == "vault")
    };
    assert!(has("create") && has("delete") && has("launch"));
}

#[test]
fn what_is_no_description_is_not_kept_and_no_name_leads_out_of_the_folder() {
    let mut host = Host::new("unkept");
    host.start();
    host.write("wrong.toml", "name = 'x'\nfrob = 1\n");
    host.run(&["vm", "create", "wrong.toml"])
        .refused(1, &["DESCRIPTION", "frob"]);
    host.run(&["vm", "validate", "wrong.toml"])
        .refused(1, &["DESCRIPTION", "frob"]);
    host.run(&["vm", "create", "absent.toml"])
        .refused(1, &["DESCRIPTION"]);
    let good = r#"{"description":"/x/vm.toml","text":"name = 'x'"}"#;
    host.write("state/definitions/kept-before", "");
    host.write("state/stray.json", good);
    for name in ["../stray", "..", "", "a/b", "x"] {
        for verb in ["start", "delete"] {
            let ran = host.run(&["vm", verb, name]);
            assert!(ran.code != Some(0), "{verb} {name}: {ran:?}");
        }
    }
    assert!(host.path("state/stray.json").exists());
    // A kept file that somebody damaged is said, and nothing is started.
    host.write("state/definitions/damaged.json", "{\"text\": 1}");
    host.run(&["vm", "start", "damaged"])
        .refused(1, &["STATE", "damaged.json"]);
}

#[test]
fn a_console_is_read_from_where_one_left_it() {
    let mut host = Host::new("console");
    host.start();
    let path = host.describe("vm", "vault", "");
    host.run(&["run", &path]).expect(0);
    let console = host.listed("vault").unwrap()["console"]
        .as_str()
        .unwrap()
        .to_owned();
    // The small guest says nothing; what its pipe was copied to is what is read.
    std::fs::write(&console, b"one\n\xff\x1b[31mtwo\n").unwrap();
    let ran = host.command(&["vm", "console", "vault"]).output().unwrap();
    assert!(ran.status.success());
    assert_eq!(ran.stdout, b"one\n\xff\x1b[31mtwo\n");
    let (status, part) = support::ask(&host, "GET", "/v1/guests/vault/console?from=4", "");
    assert_eq!((status, &part["next"]), (200, &14.into()), "{part}");
    let (_, none) = support::ask(
        &host,
        "GET",
        "/v1/guests/vault/console?from=18446744073709551615",
        "",
    );
    assert_eq!(
        (&none["next"], &none["bytes"]),
        (&14.into(), &"".into()),
        "{none}"
    );
    host.run(&["vm", "console", "nobody"])
        .refused(1, &["NO_SUCH_GUEST"]);
}
