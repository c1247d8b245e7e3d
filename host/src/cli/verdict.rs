//! A verdict as a table for people: every check, why it did not pass, and what nobody asked for.

use std::fmt::Write as _;

use casemate_attest::verify::{CheckResult, Outcome, Verdict};

/// The checks, one a line; what was expected stands below those that did not pass.
pub fn table(verdict: &Verdict) -> String {
    let names = verdict.checks.iter().map(|check| check.name.len());
    let width = names.max().unwrap_or_default();
    let mut text = String::new();
    for check in &verdict.checks {
        let mark = match check.result {
            CheckResult::Accepted => "accepted",
            CheckResult::Rejected => "REJECTED",
            CheckResult::CannotVerify => "UNVERIFIED",
            CheckResult::NotChecked => "not checked",
        };
        let code = check.code.as_ref().map(|code| format!(" [{code}]"));
        let code = code.unwrap_or_default();
        let _ = writeln!(
            text,
            "  {mark:<11} {:<width$}  {}{code}",
            check.name, check.found
        );
        if check.code.is_some() {
            let _ = writeln!(
                text,
                "  {:<11} {:<width$}  wanted: {}",
                "", "", check.expected
            );
        }
    }
    text
}

/// The outcome in one line, with what was not checked.
pub fn outcome(verdict: &Verdict) -> String {
    let overall = match verdict.overall {
        Outcome::Accepted => "accepted",
        Outcome::Rejected => "REJECTED",
        Outcome::CannotVerify => "CANNOT VERIFY",
    };
    let mut codes: Vec<_> = verdict
        .failures()
        .filter_map(|check| check.code.as_deref())
        .collect();
    // One cause fails many checks.
    codes.dedup();
    let open: Vec<_> = verdict
        .not_checked()
        .map(|check| check.name.as_str())
        .collect();
    let mut line = overall.to_owned();
    line.push_str(mark(verdict));
    if !codes.is_empty() {
        let _ = write!(line, ": {}", codes.join(", "));
    }
    if !open.is_empty() {
        let _ = write!(line, "; not checked: {}", open.join(", "));
    }
    line.push('\n');
    line
}

/// What stands behind everything that a software secure processor said.
pub fn mark(verdict: &Verdict) -> &'static str {
    if verdict.emulated {
        " (emulated, NOT AMD)"
    } else {
        ""
    }
}

/// The exit status that a verdict leads to.
pub fn exit_status(verdict: &Verdict) -> u8 {
    match verdict.overall {
        Outcome::Accepted => 0,
        Outcome::Rejected => 1,
        Outcome::CannotVerify => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_attest::verify::Check;

    fn verdict(emulated: bool) -> Verdict {
        let checks = vec![
            Check::accepted("one", "a", "it holds"),
            Check::rejected("another", "b", "it does not", "CODE_X"),
            Check::not_checked("third", "c", "nobody asked"),
        ];
        Verdict::of(checks, &["one"], emulated)
    }

    #[test]
    fn every_check_is_shown_and_the_last_line_says_it_all() {
        let table = table(&verdict(false));
        assert_eq!(
            table,
            "  accepted    one      it holds\n\
             \x20 REJECTED    another  it does not [CODE_X]\n\
             \x20                      wanted: b\n\
             \x20 not checked third    nobody asked\n"
        );
        assert_eq!(
            outcome(&verdict(false)),
            "REJECTED: CODE_X; not checked: third\n"
        );
        let line = outcome(&verdict(true));
        assert!(line.starts_with("REJECTED (emulated, NOT AMD): "), "{line}");
        assert_eq!(exit_status(&verdict(true)), 1);
    }
}
