//! What the demo says: a line a check while it runs, the closing table, and the same as JSON.

use std::time::Duration;

use serde::Serialize;

use crate::steps::evidence::Bundle;

/// Where lines for people go: stdout, or stderr if stdout is for JSON.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    /// Whether stdout is for JSON.
    pub json: bool,
}

impl Screen {
    /// One line, or several.
    pub fn say(&self, text: &str) {
        if self.json {
            eprintln!("{text}");
        } else {
            println!("{text}");
        }
    }
}

/// Checks and figures of a run.
#[derive(Debug, Serialize)]
pub struct Table {
    #[serde(skip)]
    screen: Screen,
    figures: Vec<Figure>,
    checks: Vec<Check>,
    evidence: Vec<Bundle>,
}

/// A measured value.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    name: &'static str,
    value: f64,
    unit: &'static str,
    emulated: bool,
}

/// Something that had to hold.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    step: u8,
    name: String,
    passed: bool,
    found: String,
}

impl Table {
    /// Empty.
    pub fn new(screen: Screen) -> Self {
        Self {
            screen,
            figures: Vec::new(),
            checks: Vec::new(),
            evidence: Vec::new(),
        }
    }

    /// Notes whether something held, and says so at once.
    pub fn check(&mut self, step: u8, name: &str, passed: bool, found: impl Into<String>) {
        let check = Check {
            step,
            name: name.to_owned(),
            passed,
            found: found.into(),
        };
        let mark = if passed { "ok    " } else { "FAILED" };
        let found = if check.found.is_empty() {
            String::new()
        } else {
            format!(" ({})", check.found)
        };
        self.screen.say(&format!("  {mark} {name}{found}"));
        self.checks.push(check);
    }

    /// Notes a measured value.
    pub fn figure(&mut self, name: &'static str, value: f64, unit: &'static str, emulated: bool) {
        self.figures.push(Figure {
            name,
            value,
            unit,
            emulated,
        });
    }

    /// Notes a bundle of evidence; the first is the one that the JSON names.
    pub fn evidence(&mut self, bundle: Bundle) {
        self.screen
            .say(&format!("         {}", bundle.bundle.display()));
        self.evidence.push(bundle);
    }

    /// Whether there were checks and all of them held.
    pub fn ok(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|c| c.passed)
    }

    /// The closing table.
    pub fn render(&self, elapsed: Duration) -> String {
        let mut text = String::new();
        for figure in &self.figures {
            let value = if figure.value < 100.0 {
                format!("{:.1}", figure.value)
            } else {
                format!("{:.0}", figure.value)
            };
            let mark = if figure.emulated { "emulated" } else { "" };
            text += format!(
                "  {:<34} {value:>10} {:<6} {mark}",
                figure.name, figure.unit
            )
            .trim_end();
            text.push('\n');
        }
        let passed = self.checks.iter().filter(|c| c.passed).count();
        text += &format!(
            "  {:<34} {passed:>10} of {}\n",
            "checks passed",
            self.checks.len()
        );
        for check in self.checks.iter().filter(|c| !c.passed) {
            text += &format!(
                "  FAILED in step {}: {} ({})\n",
                check.step, check.name, check.found
            );
        }
        text + &format!("  {:<34} {:>10.1} s", "whole demo", elapsed.as_secs_f64())
    }

    /// The same as JSON.
    pub fn json(
        &self,
        elapsed: Duration,
        error: Option<&str>,
        machine: &Machine,
    ) -> serde_json::Value {
        serde_json::json!({
            "ok": self.ok() && error.is_none(),
            "error": error,
            "emulated": machine,
            "figures": self.figures,
            "checks_passed": self.checks.iter().filter(|c| c.passed).count(),
            "checks_total": self.checks.len(),
            "checks": self.checks,
            "seconds": elapsed.as_secs_f64(),
            "evidence_bundle": self.evidence.first().map(|first| &first.bundle),
            "evidence": self.evidence,
        })
    }
}

/// What is emulated under the figures.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The whole machine: times say nothing of hardware.
    pub machine: bool,
    /// The secure processor.
    pub secure_processor: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failed_check_or_none_at_all_is_not_ok() {
        let mut table = Table::new(Screen { json: true });
        assert!(!table.ok());
        table.check(1, "good", true, "");
        assert!(table.ok());
        table.check(2, "bad", false, "why");
        table.figure("launch", 12.34, "ms", true);
        assert!(!table.ok());
        let text = table.render(Duration::from_secs(3));
        assert!(
            text.contains("1 of 2") && text.contains("FAILED in step 2: bad (why)"),
            "{text}"
        );
        assert!(text.contains("12.3 ms     emulated"), "{text}");
        let machine = Machine {
            machine: true,
            secure_processor: true,
        };
        let json = table.json(Duration::ZERO, None, &machine);
        assert_eq!(
            (&json["ok"], &json["checks_passed"]),
            (&false.into(), &1.into())
        );
    }
}
