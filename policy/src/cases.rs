//! A security team's own tests of a policy: questions with the wanted answer, in a folder of TOML or JSON files.
//!
//! ```toml
//! [[case]]
//! name = "nobody debugs"
//! want = "refuse"                   # or "allow"
//! code = "debug-allowed"            # optional: the code of the refusal
//! rules = ["floor.debug"]           # optional: rules that must be among those that refuse
//! [case.ask]                        # an `Inquiry`, as records have it in `input`
//! clock = "2026-06-01T00:00:00Z"
//! actor = { local = { uid = 0 } }
//! object = "bank-1"
//! action = { launch = { technology = "sev", emulated = false, vcpus = 1, memory_mib = 64, policy_bits = 0 } }
//! ```

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::claims::Inquiry;
use crate::document::HostPolicy;
use crate::evaluate::{Code, Decision, decide};

/// One question and the wanted answer.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// What it is about.
    pub name: String,
    /// The wanted answer.
    pub want: Want,
    /// The wanted code of a refusal.
    pub code: Option<Code>,
    /// Rules that must be among those that refuse.
    #[serde(default)]
    pub rules: Vec<String>,
    /// The question.
    pub ask: Inquiry,
}

/// A wanted answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Want {
    /// Every rule allows it.
    Allow,
    /// At least one does not.
    Refuse,
}

impl Case {
    /// Asks `policy`; `judge` makes the decision.
    pub fn judge(&self, decide: impl FnOnce(&Inquiry) -> Decision) -> Judged {
        let decision = decide(&self.ask);
        let mut wrong = Vec::new();
        if decision.allowed != (self.want == Want::Allow) {
            wrong.push(match self.want {
                Want::Allow => format!("wanted allow, found {}", decision.code.as_str()),
                Want::Refuse => "wanted refuse, found allowed".to_owned(),
            });
        } else if let Some(code) = self.code.filter(|code| *code != decision.code) {
            let (wanted, found) = (code.as_str(), decision.code.as_str());
            wrong.push(format!("wanted code {wanted}, found {found}"));
        }
        for rule in &self.rules {
            if !decision.refusals().any(|reason| reason.rule == rule) {
                wrong.push(format!("rule {rule} does not refuse"));
            }
        }
        Judged {
            name: self.name.clone(),
            passed: wrong.is_empty(),
            wrong,
            decision,
        }
    }

    fn check(&self) -> Result<(), String> {
        let particular = self.code.is_some() || !self.rules.is_empty();
        if self.want == Want::Allow && particular {
            return Err(format!(
                "case `{}` wants allow and says what refuses; remove `code` and `rules`",
                self.name
            ));
        }
        if self.code == Some(Code::Allowed) {
            return Err(format!("case `{}`: `allowed` refuses nothing", self.name));
        }
        Ok(())
    }
}

/// How a case came out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Judged {
    /// The case.
    pub name: String,
    /// Whether the answer was the wanted one.
    pub passed: bool,
    /// What was not as wanted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wrong: Vec<String>,
    /// The decision.
    pub decision: Decision,
}

/// Judges all cases by the typed policy.
pub fn run(policy: &HostPolicy, cases: &[Case]) -> Vec<Judged> {
    let judge = |case: &Case| case.judge(|ask| decide(policy, ask));
    cases.iter().map(judge).collect()
}

/// Reads every `.toml` and `.json` file of a folder, in the order of their names. A folder without cases is an error: a
/// test that cannot fail says nothing.
pub fn load(folder: &Path) -> Result<Vec<Case>, CaseError> {
    let failed = |source| CaseError::Unreadable {
        file: folder.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let kind = path.extension().and_then(OsStr::to_str);
        if matches!(kind, Some("toml" | "json")) {
            files.push(path);
        }
    }
    files.sort();
    let mut all: Vec<Case> = Vec::new();
    for path in files {
        let text = read(&path)?;
        let json = path.extension().is_some_and(|kind| kind == "json");
        all.extend(parse(&path.display().to_string(), &text, json)?);
    }
    if all.is_empty() {
        return Err(CaseError::None {
            folder: folder.to_owned(),
        });
    }
    Ok(all)
}

/// Parses one file of cases, TOML or JSON of the same shape; `file` only names it in errors.
pub fn parse(file: &str, text: &str, json: bool) -> Result<Vec<Case>, CaseError> {
    let invalid = |problem: String| CaseError::Invalid {
        file: file.to_owned(),
        problem,
    };
    if text.len() as u64 > MAX_CASES {
        return Err(invalid(format!("longer than {MAX_CASES} bytes; split it")));
    }
    let cases: Cases = if json {
        serde_json::from_str(text).map_err(|e| invalid(e.to_string()))?
    } else {
        toml::from_str(text).map_err(|e| invalid(e.to_string()))?
    };
    for (index, case) in cases.case.iter().enumerate() {
        case.check().map_err(invalid)?;
        let before = cases.case.iter().take(index);
        if before.clone().any(|other| other.name == case.name) {
            return Err(invalid(format!("two cases are named `{}`", case.name)));
        }
    }
    Ok(cases.case)
}

/// Why cases cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaseError {
    /// A file or folder cannot be read.
    #[error("{file} cannot be read: {source}", file = .file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not a file of cases.
    #[error("{file}: {problem}")]
    Invalid {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// No case at all.
    #[error("{folder} has no case; write [[case]] sections into *.toml files there", folder = .folder.display())]
    None {
        /// The folder.
        folder: PathBuf,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    case: Vec<Case>,
}

fn read(path: &Path) -> Result<String, CaseError> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_CASES + 1).read_to_string(&mut text))
        .map_err(|source| CaseError::Unreadable {
            file: path.to_owned(),
            source,
        })?;
    Ok(text)
}

/// The largest file of cases, in bytes.
const MAX_CASES: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = "host = { name = 'h' }\ntechnologies = { allowed = ['sev'] }\nlimits = { max_vcpus = 2, max_memory_mib = 64 }\n";
    const CASES: &str = r#"
[[case]]
name = "nobody debugs"
want = "refuse"
code = "debug-allowed"
rules = ["floor.debug", "limits.max_vcpus"]
[case.ask]
clock = "2026-06-01T00:00:00Z"
actor = { local = { uid = 0 } }
object = "vm"
action = { launch = { technology = "sev", emulated = false, vcpus = 3, memory_mib = 64, policy_bits = 0 } }

[[case]]
name = "everybody looks"
want = "allow"
ask = { clock = "2026-06-01T00:00:00Z", actor = "host", object = "", action = "list" }
"#;

    fn judged(text: &str) -> Vec<(bool, String)> {
        let policy = HostPolicy::parse("p", POLICY).unwrap();
        let cases = parse("c", text, false).unwrap();
        let judged = run(&policy, &cases);
        judged
            .into_iter()
            .map(|j| (j.passed, j.wrong.join("; ")))
            .collect()
    }

    #[test]
    fn cases_pass_and_fail() {
        assert!(
            judged(CASES).iter().all(|case| case.0),
            "{:?}",
            judged(CASES)
        );
        for (from, to, wrong) in [
            ("want = \"allow\"", "want = \"refuse\"", "found allowed"),
            ("debug-allowed", "too-many-vcpus", "found debug-allowed"),
            ("floor.debug", "floor.proof", "floor.proof does not refuse"),
            ("vcpus = 3", "vcpus = 2", "limits.max_vcpus does not"),
        ] {
            let all = judged(&CASES.replace(from, to));
            let failed: Vec<_> = all.iter().filter(|case| !case.0).collect();
            assert_eq!(failed.len(), 1, "{to}");
            assert!(
                failed.iter().all(|case| case.1.contains(wrong)),
                "{failed:?}"
            );
        }
    }

    #[test]
    fn files_of_cases_are_strict() {
        for (from, to) in [
            (
                "want = \"allow\"",
                "want = \"allow\"\ncode = \"not-proven\"",
            ),
            ("debug-allowed", "allowed"),
            ("debug-allowed", "nonsense"),
            ("everybody looks", "nobody debugs"),
            ("action = \"list\"", "action = \"lits\""),
            ("object = \"\"", "object = \"\", odd = 1"),
            ("vcpus = 3, ", ""),
        ] {
            let bad = CASES.replacen(from, to, 1);
            assert_ne!(bad, CASES);
            assert!(parse("c", &bad, false).is_err(), "{to}");
        }
    }

    #[test]
    fn a_folder_is_read_in_order_and_not_empty() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(load(folder.path()), Err(CaseError::None { .. })));
        fs::write(folder.path().join("b.toml"), CASES).unwrap();
        fs::write(folder.path().join("notes.md"), "no case").unwrap();
        let json = r#"{"case":[{"name":"j","want":"allow","ask":{"clock":"2026-06-01T00:00:00Z","actor":"host","object":"","action":"list"}}]}"#;
        fs::write(folder.path().join("a.json"), json).unwrap();
        let names: Vec<_> = load(folder.path())
            .unwrap()
            .into_iter()
            .map(|c| c.name)
            .collect();
        assert_eq!(names, ["j", "nobody debugs", "everybody looks"]);
        fs::write(folder.path().join("c.toml"), "[[case]]\n").unwrap();
        let error = load(folder.path()).unwrap_err().to_string();
        assert!(error.contains("c.toml"), "{error}");
    }
}
