//! What a verification says: every check, and one answer that no check can be missing from.

use serde::{Deserialize, Serialize};

/// The outcome and every check behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The outcome.
    pub overall: Outcome,
    /// Whether the platform is a software secure processor.
    pub emulated: bool,
    /// Every check, in the order made.
    pub checks: Vec<Check>,
}

/// The one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Everything required was checked and holds.
    Accepted,
    /// Something does not hold.
    Rejected,
    /// It cannot be told; never as good as accepted.
    CannotVerify,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What is checked; stable.
    pub name: String,
    /// Its result.
    pub result: CheckResult,
    /// What should be, in words.
    pub expected: String,
    /// What is, in words.
    pub found: String,
    /// Why it did not pass; stable, and absent where it passed.
    pub code: Option<String>,
}

/// How one check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckResult {
    /// It holds.
    Accepted,
    /// It does not hold.
    Rejected,
    /// It cannot be told; never as good as accepted.
    CannotVerify,
    /// Nobody asked for it: no expectation was given. Never for a required check.
    NotChecked,
}

impl Verdict {
    /// The verdict over `checks`: rejected if any is; accepted only if each name in `required` is
    /// there exactly once and passed, no name is there twice, and nothing else is open.
    pub fn of(checks: Vec<Check>, required: &[&str], emulated: bool) -> Self {
        Self {
            overall: outcome(&checks, required),
            emulated,
            checks,
        }
    }

    /// This verdict with one more check, which can only make it worse.
    #[must_use]
    pub fn and(mut self, check: Check) -> Self {
        self.overall = match (self.overall, check.result) {
            (Outcome::Rejected, _) | (_, CheckResult::Rejected) => Outcome::Rejected,
            (Outcome::CannotVerify, _) | (_, CheckResult::CannotVerify) => Outcome::CannotVerify,
            (Outcome::Accepted, CheckResult::Accepted | CheckResult::NotChecked) => {
                Outcome::Accepted
            }
        };
        self.checks.push(check);
        self
    }

    /// Whether a secret may be released.
    pub fn accepted(&self) -> bool {
        self.overall == Outcome::Accepted
    }

    /// The checks that were made and did not pass.
    pub fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| {
            matches!(
                check.result,
                CheckResult::Rejected | CheckResult::CannotVerify
            )
        })
    }

    /// The checks that nobody asked for.
    pub fn not_checked(&self) -> impl Iterator<Item = &Check> {
        self.checks
            .iter()
            .filter(|check| check.result == CheckResult::NotChecked)
    }
}

impl Check {
    /// A check that holds.
    pub fn accepted(name: &str, expected: &str, found: impl Into<String>) -> Self {
        Self::new(name, CheckResult::Accepted, expected, found.into(), None)
    }

    /// A check that does not hold, with its stable code.
    pub fn rejected(name: &str, expected: &str, found: impl Into<String>, code: &str) -> Self {
        Self::new(
            name,
            CheckResult::Rejected,
            expected,
            found.into(),
            Some(code),
        )
    }

    /// A check that could not be made, with its stable code.
    pub fn cannot_verify(name: &str, expected: &str, found: impl Into<String>, code: &str) -> Self {
        Self::new(
            name,
            CheckResult::CannotVerify,
            expected,
            found.into(),
            Some(code),
        )
    }

    /// A check that nobody asked for; `found` is what there is all the same.
    pub fn not_checked(name: &str, expected: &str, found: impl Into<String>) -> Self {
        Self::new(name, CheckResult::NotChecked, expected, found.into(), None)
    }

    fn new(
        name: &str,
        result: CheckResult,
        expected: &str,
        found: String,
        code: Option<&str>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            result,
            expected: expected.to_owned(),
            found,
            code: code.map(str::to_owned),
        }
    }
}

fn outcome(checks: &[Check], required: &[&str]) -> Outcome {
    let any = |result| checks.iter().any(|check| check.result == result);
    if any(CheckResult::Rejected) {
        return Outcome::Rejected;
    }
    let once = checks.iter().all(|check| {
        let same = checks.iter().filter(|other| other.name == check.name);
        same.count() == 1
    });
    let required_passed = required.iter().all(|name| {
        let passed = |check: &Check| check.name == *name && check.result == CheckResult::Accepted;
        checks.iter().any(passed)
    });
    if once && required_passed && !any(CheckResult::CannotVerify) {
        Outcome::Accepted
    } else {
        Outcome::CannotVerify
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, result: CheckResult) -> Check {
        Check::new(name, result, "", String::new(), None)
    }

    #[test]
    fn a_further_check_never_makes_a_verdict_better() {
        use CheckResult::{Accepted, CannotVerify, NotChecked, Rejected};
        let rank = |outcome| match outcome {
            Outcome::Accepted => 0,
            Outcome::CannotVerify => 1,
            Outcome::Rejected => 2,
        };
        let start = |result| Verdict::of(vec![check("a", result)], &["a"], false);
        for first in [Accepted, CannotVerify, Rejected] {
            for (second, at_least) in [
                (Accepted, 0),
                (NotChecked, 0),
                (CannotVerify, 1),
                (Rejected, 2),
            ] {
                let before = rank(start(first).overall);
                let after = start(first).and(check("b", second));
                assert_eq!(rank(after.overall), before.max(at_least));
                assert_eq!(after.checks.len(), 2);
            }
        }
    }

    #[test]
    fn nothing_is_accepted_by_omission() {
        use CheckResult::{Accepted, CannotVerify, NotChecked, Rejected};
        let verdict = |results: &[(&str, CheckResult)]| {
            let checks = results.iter().map(|(name, r)| check(name, *r)).collect();
            Verdict::of(checks, &["a", "b"], false).overall
        };
        assert_eq!(verdict(&[]), Outcome::CannotVerify);
        assert_eq!(verdict(&[("a", Accepted)]), Outcome::CannotVerify);
        assert_eq!(
            verdict(&[("a", Accepted), ("b", Accepted)]),
            Outcome::Accepted
        );
        assert_eq!(
            verdict(&[("a", Accepted), ("b", NotChecked)]),
            Outcome::CannotVerify
        );
        assert_eq!(
            verdict(&[("a", Accepted), ("b", Accepted), ("c", NotChecked)]),
            Outcome::Accepted
        );
        assert_eq!(
            verdict(&[("a", Accepted), ("b", Accepted), ("c", CannotVerify)]),
            Outcome::CannotVerify
        );
        assert_eq!(
            verdict(&[("a", Accepted), ("b", Accepted), ("b", Accepted)]),
            Outcome::CannotVerify
        );
        assert_eq!(
            verdict(&[("a", CannotVerify), ("c", Rejected)]),
            Outcome::Rejected
        );
    }
}
