//! The reference is true: every example in it is a policy, and every key is in it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use casemate_policy::action::ActionKind;
use casemate_policy::{HostPolicy, document};

const REFERENCE: &str = include_str!("../POLICY.md");
const LEAST: &str = "host = { name = 'h' }\ntechnologies = { allowed = [] }\nlimits = { max_vcpus = 1, max_memory_mib = 1 }\n";

fn examples(kind: &str) -> Vec<&'static str> {
    let open = format!("```{kind}\n");
    let parts = REFERENCE.split(&open).skip(1);
    parts
        .map(|rest| rest.split("\n```").next().unwrap())
        .collect()
}

#[test]
fn every_example_is_a_policy() {
    let all = examples("toml");
    assert_eq!(all.len(), 5);
    for example in all {
        let whole = if example.contains("technologies") && example.contains("max_vcpus") {
            format!("{example}\n")
        } else {
            format!("{LEAST}{example}\n")
        };
        if let Err(error) = HostPolicy::parse("POLICY.md", &whole) {
            assert_eq!(error.to_string(), "", "{example}");
        }
    }
}

/// The parser names the keys of a section when it finds one that is none of them.
#[test]
fn every_key_is_described() {
    let sections = [
        "",
        "[sandbox]\n",
        "[files]\n",
        "[migration]\n",
        "[[firmware]]\n",
        "[[peer]]\n",
        "[[incoming_disk]]\n",
        "[[incoming_net]]\n",
        "[[guest]]\n",
        "[guest.tcb.turin]\n",
        "[people]\n",
        "[[person]]\n",
    ];
    let mut keys = 0;
    for section in sections {
        let section = section.replace("[guest.tcb", "[[guest]]\n[guest.tcb");
        let text = match section.is_empty() {
            true => format!("nonsense = 1\n{LEAST}"),
            false => format!("{LEAST}{section}nonsense = 1\n"),
        };
        let problem = HostPolicy::parse("p", &text).unwrap_err().to_string();
        let listed = problem.split("expected ").nth(1).unwrap_or_default();
        let names: Vec<&str> = listed.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{section}: {problem}");
        for name in names {
            keys += 1;
            let shown = [
                format!("`{name}`"),
                format!("`[{name}]`"),
                format!("`[[{name}]]`"),
                format!("`{name}."),
            ];
            assert!(
                shown.iter().any(|s| REFERENCE.contains(s)),
                "{section}{name} is not in POLICY.md"
            );
        }
    }
    assert!(keys > 55, "{keys}");
    for kind in ActionKind::ALL {
        let name = format!("`{}`", kind.as_str());
        assert!(
            REFERENCE.contains(&name) || *kind == ActionKind::Approve,
            "{name}"
        );
    }
}

/// What was a policy before there were owners and people still is the same.
#[test]
fn older_documents_mean_what_they_meant() {
    let text = "[host]\nname = 'a'\n[technologies]\nallowed = ['none', 'sev']\nallow_emulated = true\n[limits]\nmax_vcpus = 2\nmax_memory_mib = 512\n[migration]\noutgoing = true\n";
    let policy = HostPolicy::parse("p", text).unwrap();
    assert_eq!(
        (policy.version, policy.validity),
        (0, document::Validity::default())
    );
    assert!(policy.guests().is_none() && policy.people().is_none());
    assert!(policy.sandbox.level.is_none() && policy.host.site.is_none());
}
