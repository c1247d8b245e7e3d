//! `casemate migrate`: progress by round, then the outcome.

use crate::agent::api::{Answer, Failure, Request};
use crate::agent::client::{Agent, ask};
use crate::cli::{print_bytes, print_json, render};

/// Runs a migration and shows it while it runs: a line a round on a terminal or in a log, JSON lines with `--json`.
pub fn run(agent: &Agent, request: &Request, json: bool) -> Result<u8, Failure> {
    let mut table = render::Rounds::default();
    let answer = ask(agent, request, &mut |event| {
        // Progress is for people; a closed terminal must not stop a migration.
        let _ = if json {
            print_json(event)
        } else {
            print_bytes(table.line(event).as_bytes())
        };
    })?;
    match &answer {
        Answer::Migrated { outcome } if json => print_json(outcome),
        Answer::Settled(settled) if json => print_json(settled),
        other => print_bytes(render::answer(other).as_bytes()),
    }
}
