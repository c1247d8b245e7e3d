//! `casemate policy test`.

use std::path::PathBuf;

use casemate_policy::cases::{self, Judged};
use clap::Args;
use serde::Serialize;

use super::{load, view};
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json};

/// Which policy, which cases.
#[derive(Debug, Args)]
pub struct TestArgs {
    /// The policy.
    policy: PathBuf,
    /// Folder of *.toml and *.json files with cases.
    cases: PathBuf,
    /// Show every rule of every case, not only what came out otherwise than wanted.
    #[arg(long)]
    verbose: bool,
}

#[derive(Serialize)]
struct Tested {
    passed: usize,
    failed: usize,
    cases: Vec<Judged>,
}

/// Runs the cases.
pub fn run(args: &TestArgs, json: bool) -> Result<u8, Failure> {
    let policy = load(&args.policy)?;
    let all = cases::load(&args.cases).map_err(|e| Failure::new("CASES", e.to_string()))?;
    let judged = cases::run(&policy, &all);
    let failed = judged.iter().filter(|case| !case.passed).count();
    let tested = Tested {
        passed: judged.len() - failed,
        failed,
        cases: judged,
    };
    if json {
        print_json(&tested)?;
    } else {
        print_bytes(table(&tested, args.verbose).as_bytes())?;
    }
    Ok(u8::from(failed > 0))
}

fn table(tested: &Tested, verbose: bool) -> String {
    let mut text = String::new();
    for case in &tested.cases {
        let mark = if case.passed { "passed" } else { "FAILED" };
        text.push_str(&format!("{mark}  {}\n", case.name));
        for wrong in &case.wrong {
            text.push_str(&format!("        {wrong}\n"));
        }
        if verbose || !case.passed {
            text.push_str(&view::reasons(&case.decision));
        }
    }
    text.push_str(&format!(
        "{} passed, {} failed\n",
        tested.passed, tested.failed
    ));
    text
}
