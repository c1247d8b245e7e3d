//! Rego may only restrict, and only `true` counts. Runs with `--features rego`.
#![cfg(feature = "rego")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::{Duration, Instant};

use casemate_policy::claims::Inquiry;
use casemate_policy::rego::{Dialect, RegoPolicy, input};
use casemate_policy::{Action, Code, Technology, decide};

use support::*;

fn rego(text: &str) -> RegoPolicy {
    let whole = format!("package casemate\nimport rego.v1\n{text}\n");
    RegoPolicy::parse("r", &whole, Dialect::Casemate).unwrap()
}

fn code(text: &str, inquiry: &Inquiry) -> Code {
    let policy = parse(&format!("{BASE}{OWNER}"));
    rego(text).restrict(inquiry, decide(&policy, inquiry)).code
}

#[test]
fn only_true_lets_a_decision_stand() {
    let good = attested();
    for (text, wanted) in [
        (
            "default allow := false\nallow if input.guest.vmpl == 1",
            Code::Allowed,
        ),
        ("allow := true", Code::Allowed),
        (
            "default allow := false\nallow if input.guest.vmpl == 0",
            Code::RegoRefused,
        ),
        // Undefined, whatever it stands for.
        ("allow if input.guest.vmpll == 1", Code::RegoRefused),
        (
            "deny if input.guest.vmpll == 1\nallow if not data.casemate.denied_typo\nallow := false if true",
            Code::RegoRefused,
        ),
        ("allow := \"true\"", Code::RegoRefused),
        ("allow := 1", Code::RegoRefused),
        ("allow := {\"allow\": true}", Code::RegoRefused),
        ("allow := [true]", Code::RegoRefused),
        ("allow := null", Code::RegoRefused),
        // Errors while it runs: two answers, and a builtin that is given nonsense.
        (
            "allow := true if input.guest.vmpl == 1\nallow := false if input.guest.vmpl == 1",
            Code::RegoRefused,
        ),
        ("allow if to_number(input.object) == 1", Code::RegoRefused),
    ] {
        assert_eq!(code(text, &good), wanted, "{text}");
    }
}

#[test]
fn what_the_typed_policy_refuses_stays_refused() {
    let mut inquiry = attested();
    inquiry.guest.vmpl = Some(3);
    assert_eq!(code("allow := true", &inquiry), Code::VmplNotAllowed);
    inquiry.action = launch(Technology::SevSnp, 1 << 19);
    assert_eq!(code("allow := true", &inquiry), Code::DebugAllowed);
}

#[test]
fn loops_end() {
    let product =
        "default allow := false\nallow if { some a in input.n; some b in input.n; a + b < 0 }";
    assert_eq!(code(product, &attested()), Code::RegoRefused);
    let digits = "x := [0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19]\n";
    let deep = format!(
        "{digits}allow if count({{[a,b,c,d,e,f] | some a in x; some b in x; some c in x; some d in x; some e in x; some f in x}}) > 0"
    );
    let begun = Instant::now();
    assert_eq!(code(&deep, &attested()), Code::RegoRefused);
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn what_is_no_policy_is_refused_when_it_is_read() {
    let parse = |text: &str| RegoPolicy::parse("r.rego", text, Dialect::Casemate);
    for text in [
        "",
        "package casemate\n",
        "package other\nallow := true",
        "package casemate\nallow := ",
        "package casemate\nallow if time.now_ns() > 0",
        "package casemate\nallow if http.send({\"method\": \"get\", \"url\": \"http://x\"}).status_code == 200",
        "package casemate\nallow if opa.runtime().env.HOME == \"/\"",
        "package casemate\nallow if uuid.rfc4122(\"x\") != \"\"",
        "package casemate\nallow if rand.intn(\"x\", 2) == 1",
        "package casemate\nallow if net.cidr_contains(\"10.0.0.0/8\", \"10.0.0.1\")",
        "package casemate\nallow if count(numbers.range(1, 1000000000)) > 1",
    ] {
        let error = parse(text).err();
        assert!(error.is_some(), "{text}");
        assert!(error.unwrap().to_string().starts_with("r.rego: "));
    }
}

#[test]
fn the_schema_is_fixed() {
    let mut inquiry = attested();
    inquiry.guest.tcb = None;
    let found = input(&inquiry);
    let wanted: serde_json::Value = serde_json::from_str(
        r#"{
        "schema": 1,
        "clock": "2026-06-01T00:00:00Z",
        "clock_unix": 1780272000,
        "actor": {"local": {"uid": 0}},
        "approvals": [],
        "object": "bank-1",
        "action": {"name": "attest", "technology": "sev-snp", "emulated": false, "verified": true},
        "guest": {
            "launch_digest": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "launch_signers": [], "product": "milan", "tcb": null, "policy_bits": 196608, "vmpl": 1,
            "nonce_matches": true, "evidence_age_s": 300
        },
        "host": {"landlock_abi": null, "sandbox": null, "firmware": null},
        "session": null
    }"#,
    )
    .unwrap();
    assert_eq!(found, wanted);
    inquiry.action = Action::List;
    assert_eq!(
        input(&inquiry)["action"],
        serde_json::json!({"name": "list"})
    );
}

#[test]
fn policies_written_for_trustee_run() {
    let good = attested();
    let typed = parse(&format!("{BASE}{OWNER}"));
    let ask = |text: &str, inquiry: &Inquiry| {
        let policy = RegoPolicy::parse("t", text, Dialect::Trustee).unwrap();
        policy.restrict(inquiry, decide(&typed, inquiry)).code
    };
    let affirming = r#"input["submods"]["cpu0"]["ear.status"] == "affirming""#;
    let old = format!(
        "package policy\ndefault allow = false\npath := split(data[\"resource-path\"], \"/\")\nallow {{ {affirming}; path[2] == \"bank-1\" }}\n"
    );
    assert_eq!(ask(&old, &good), Code::Allowed);
    let new = format!(
        "package policy\nimport rego.v1\ndefault allow := false\nallow if {{\n{affirming}\nsnp := input.submods.cpu0[\"ear.veraison.annotated-evidence\"].snp\nsnp.policy_debug_allowed == false\nsnp.reported_tcb_microcode >= 200\nstartswith(snp.measurement, \"aaaa\")\n}}\n"
    );
    assert_eq!(ask(&new, &good), Code::Allowed);
    assert_eq!(ask(&new.replace("200", "201"), &good), Code::RegoRefused);
    // A claim that nobody made is undefined there, and refuses.
    let open = parse(BASE);
    let mut less = good.clone();
    less.guest.tcb = None;
    let policy = RegoPolicy::parse("t", &new, Dialect::Trustee).unwrap();
    assert_eq!(
        policy.restrict(&less, decide(&open, &less)).code,
        Code::RegoRefused
    );
    // What is not attested is not affirmed.
    less.action = Action::Stop;
    assert_eq!(
        policy.restrict(&less, decide(&open, &less)).code,
        Code::RegoRefused
    );
}

#[test]
fn the_example_of_the_reference_runs() {
    let reference = include_str!("../REGO.md");
    let example = reference.split("```rego\n").nth(1).unwrap();
    let example = example.split("```").next().unwrap();
    let policy = RegoPolicy::parse("REGO.md", example, Dialect::Casemate).unwrap();
    let open = parse(BASE);
    for (action, allowed) in [
        (Action::List, true),
        (launch(Technology::SevSnp, 0x20000), true),
        (launch(Technology::Sev, 1), false),
        (Action::Pause, false),
    ] {
        let inquiry = ask(operator(), "vm", action);
        let typed = decide(&open, &inquiry);
        assert!(typed.allowed);
        assert_eq!(policy.restrict(&inquiry, typed).allowed, allowed);
    }
}
