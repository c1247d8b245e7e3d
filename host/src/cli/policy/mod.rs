//! `casemate policy`: written, checked, signed, tested and put in force; past decisions explained.

mod check;
mod history;
mod sign;
mod test;
mod view;

use std::path::{Path, PathBuf};

use casemate_policy::HostPolicy;
use clap::Subcommand;

use super::attest::files;
use super::show;
use crate::agent::api::{Failure, Request};
use crate::agent::client::Agent;

/// What is done with policies.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Check a policy as a host will: keys and values, the floor, signatures, validity, and that it is no older one.
    Check(check::CheckArgs),
    /// Make an Ed25519 key that signs policies, and print its public half.
    Keygen {
        /// Where it goes (PKCS#8 PEM, mode 0600); never over another file.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Sign a policy; other signers' signatures of the same text are kept.
    Sign(sign::SignArgs),
    /// Run a folder of cases against a policy; exit status 1 if one comes out otherwise than wanted.
    Test(test::TestArgs),
    /// Show why a past decision came out as it did, by the policy that made it.
    Explain(history::ExplainArgs),
    /// Show which recorded decisions a new policy would change; exit status 1 if there are any.
    Diff(history::DiffArgs),
    /// Put a policy in force on this host; its signatures are read from beside it.
    Load {
        /// The policy.
        policy: PathBuf,
    },
    /// Be the second person for what somebody else asked the agent to do.
    Approve {
        /// The id that the agent's refusal named.
        id: String,
    },
}

/// Runs one of them.
pub fn run(agent: &Agent, command: PolicyCommand, json: bool) -> Result<u8, Failure> {
    match command {
        PolicyCommand::Check(args) => check::run(&args, json),
        PolicyCommand::Keygen { out } => sign::keygen(&out, json),
        PolicyCommand::Sign(args) => sign::run(&args, json),
        PolicyCommand::Test(args) => test::run(&args, json),
        PolicyCommand::Explain(args) => history::explain(&args, json),
        PolicyCommand::Diff(args) => history::diff(&args, json),
        PolicyCommand::Load { policy } => {
            let policy = std::path::absolute(&policy)
                .map_err(|e| Failure::new("FILE", format!("{}: {e}", policy.display())))?;
            show(agent, &Request::PolicyLoad { policy }, json)
        }
        PolicyCommand::Approve { id } => show(agent, &Request::Approve { id }, json),
    }
}

fn load(path: &Path) -> Result<HostPolicy, Failure> {
    HostPolicy::load(path).map_err(|e| Failure::new("POLICY", e.to_string()))
}

fn read_text(path: &Path, max: usize) -> Result<String, Failure> {
    String::from_utf8(files::read(path, max)?)
        .map_err(|e| Failure::new("FILE", format!("{} is not UTF-8: {e}", path.display())))
}
