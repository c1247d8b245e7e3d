//! `casemate doctor`: what this host can and cannot do, what that means, and how to mend it.
//!
//! Only looks: it changes nothing, loads no module, and needs no privilege to say what it cannot see.

mod checks;
mod cpu;

use std::fmt::Write as _;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

/// Everything that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Whether confidential guests can run here, if only emulated.
    pub usable: bool,
    /// One entry a subject, in a fixed order.
    pub checks: Vec<Check>,
}

/// One subject.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Stable name, for example `kvm`.
    pub name: String,
    /// How it stands.
    pub status: Status,
    /// Whether no guest can run without it.
    pub required: bool,
    /// What is there.
    pub found: String,
    /// What that means for the user.
    pub meaning: String,
    /// How to mend it; empty when there is nothing to mend.
    pub remedy: String,
}

/// How a subject stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// All there.
    Ok,
    /// Works, with less than there could be.
    Degraded,
    /// Not there.
    Missing,
}

impl Diagnosis {
    /// 0 when guests can run, 1 when not.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(u8::from(!self.usable))
    }

    fn of(checks: Vec<Check>) -> Self {
        let missing = |check: &Check| check.required && check.status == Status::Missing;
        Self {
            usable: !checks.iter().any(missing),
            checks,
        }
    }
}

impl Check {
    fn ok(name: &str, found: impl Into<String>, meaning: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            status: Status::Ok,
            required: false,
            found: found.into(),
            meaning: meaning.into(),
            remedy: String::new(),
        }
    }

    fn but(mut self, status: Status, remedy: impl Into<String>) -> Self {
        self.status = status;
        self.remedy = remedy.into();
        self
    }

    fn required(mut self) -> Self {
        self.required = true;
        self
    }
}

/// Looks at this host.
pub fn diagnose() -> Diagnosis {
    Diagnosis::of(vec![
        checks::kvm(),
        checks::hypervisor(),
        checks::sev(),
        checks::landlock(),
        checks::seccomp(),
        checks::privilege(),
        checks::namespaces(),
        checks::cgroup(),
        checks::memory(),
        checks::hugepages(),
        checks::userfaultfd(),
        checks::tun(),
        checks::io_uring(),
    ])
}

/// What would hold this host's roles, one item a mechanism, as evidence records it.
pub fn sandbox() -> Vec<String> {
    let checks = [checks::landlock(), checks::seccomp()];
    checks
        .into_iter()
        .map(|check| format!("{}: {}", check.name, check.found))
        .collect()
}

/// A table for people.
pub fn render(diagnosis: &Diagnosis) -> String {
    let width = diagnosis
        .checks
        .iter()
        .map(|c| c.name.len())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for check in &diagnosis.checks {
        let mark = match check.status {
            Status::Ok => "ok      ",
            Status::Degraded => "degraded",
            Status::Missing => "missing ",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{mark}  {:width$}  {}", check.name, check.found);
        let indent = width + 12;
        let _ = writeln!(text, "{:indent$}{}", "", check.meaning);
        if !check.remedy.is_empty() {
            let _ = writeln!(text, "{:indent$}→ {}", "", check.remedy);
        }
    }
    let verdict = if diagnosis.usable {
        "This host can run guests."
    } else {
        "This host cannot run guests: mend what is missing above."
    };
    let _ = writeln!(text, "\n{verdict}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_missing_requirement_makes_a_host_unusable() {
        let ok = Check::ok("a", "x", "y");
        let optional = Check::ok("b", "x", "y").but(Status::Missing, "z");
        assert!(Diagnosis::of(vec![ok.clone(), optional.clone()]).usable);
        let unusable = Diagnosis::of(vec![ok, optional.required()]);
        assert!(!unusable.usable);
        assert_eq!(unusable.exit_code(), ExitCode::from(1));
    }

    #[test]
    fn a_diagnosis_says_everything_in_both_forms() {
        let diagnosis = diagnose();
        let text = render(&diagnosis);
        for check in &diagnosis.checks {
            assert!(text.contains(&check.name) && text.contains(&check.found));
            assert!(!check.meaning.is_empty(), "{}", check.name);
            // What is not well can be mended, or the text says why not.
            assert!(
                check.status == Status::Ok || !check.remedy.is_empty(),
                "{}",
                check.name
            );
        }
        let json = serde_json::to_string(&diagnosis).unwrap();
        assert_eq!(serde_json::from_str::<Diagnosis>(&json).unwrap(), diagnosis);
    }
}
