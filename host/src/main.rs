//! `casemate`: one static binary for the command line, the agent and the internal roles.

use std::process::ExitCode;

fn main() -> ExitCode {
    casemate::cli::main()
}
