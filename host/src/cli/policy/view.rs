//! Decisions as tables for people.

use std::fmt::Write as _;

use casemate_policy::Decision;

/// Every rule that spoke, one a line; the remedy behind those that refuse.
pub fn reasons(decision: &Decision) -> String {
    let names = decision.reasons.iter().map(|reason| reason.rule.len());
    let width = names.max().unwrap_or_default();
    let mut text = String::new();
    for reason in &decision.reasons {
        let mark = if reason.allows { "allows" } else { "REFUSES" };
        let _ = writeln!(
            text,
            "  {mark:<7} {:<width$}  wanted {}; found {}",
            reason.rule, reason.wanted, reason.found
        );
        if !reason.allows && !reason.remedy.is_empty() {
            let _ = writeln!(text, "  {:<7} {:<width$}  {}", "", "", reason.remedy);
        }
    }
    text
}

/// The answer in one word and a code.
pub fn answer(decision: &Decision) -> String {
    match decision.allowed {
        true => "allowed".to_owned(),
        false => format!("refused: {}", decision.code.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use casemate_policy::{Action, HostPolicy, evaluate};

    use super::*;

    #[test]
    fn every_rule_is_shown_with_what_it_wanted_and_found() {
        let text = "host = { name = 'h' }\ntechnologies = { allowed = ['sev'] }\nlimits = { max_vcpus = 1, max_memory_mib = 64 }\n";
        let policy = HostPolicy::parse("p", text).unwrap();
        let action = Action::InjectSecret {
            technology: casemate_policy::Technology::None,
            emulated: false,
        };
        let decision = evaluate(&policy, &action);
        let shown = reasons(&decision);
        assert!(
            shown.contains("REFUSES technologies.allowed  wanted one of sev; found none\n"),
            "{shown}"
        );
        assert_eq!(
            shown.lines().filter(|l| l.contains("wanted")).count(),
            decision.reasons.len()
        );
        assert_eq!(answer(&decision), "refused: not-proven");
    }
}
