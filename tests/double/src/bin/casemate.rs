//! `casemate` as it is, to be started under the double with all its roles.

use std::process::ExitCode;

fn main() -> ExitCode {
    casemate::cli::main()
}
