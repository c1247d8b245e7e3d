//! `casemate vm`: guests whose descriptions a host keeps, and what can be asked of any guest.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

use super::args::{CloneArgs, RestoreArgs, SnapshotArgs};
use super::plug::{AttachArgs, DetachArgs};
use super::resize::ResizeArgs;
use super::terminal;
use super::{
    absolute, from_base64, output_failed, print_bytes, print_json, print_pretty, read_session, show,
};
use crate::agent::api::{Answer, Failure, Request};
use crate::agent::client::{Agent, ask};
use crate::machine::spec::{self, MachineSpec};

/// What is done with guests.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Check a description: every key and value, and that the files it names are there. Needs no agent.
    Validate {
        /// Description (TOML).
        description: PathBuf,
    },
    /// Keep a description on the host; what stands in it now counts, not what the file says later.
    Create {
        /// Description (TOML).
        description: PathBuf,
    },
    /// List the descriptions that are kept.
    Definitions,
    /// Launch a guest whose description is kept.
    Start {
        /// Its name.
        name: String,
        /// Folder made by `casemate owner session`: the launch is bound to that owner and waits for the secret.
        #[arg(long)]
        owner_session: Option<PathBuf>,
    },
    /// Forget the description of a guest that does not run.
    Delete {
        /// Its name.
        name: String,
    },
    /// List the guests of this host.
    List,
    /// Show one guest.
    Show {
        /// Its name.
        name: String,
    },
    /// Shut a guest down: press its power button, and end it when it has switched itself off.
    Stop {
        /// Its name.
        name: String,
        /// How long it has.
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u32>,
        /// End it: at once or, with --timeout, where it has not gone by then.
        #[arg(long)]
        force: bool,
    },
    /// Give a running guest a VMM of the casemate that is installed now; it stands still for some milliseconds.
    Upgrade {
        /// Its name.
        name: String,
    },
    /// Write a guest's memory and state to a sealed file, as `casemate snapshot` does.
    Snapshot(SnapshotArgs),
    /// Make a guest from a sealed file, as `casemate restore` does.
    Restore(RestoreArgs),
    /// Make another guest of a sealed file: identity, addresses and disks of its own.
    Clone(CloneArgs),
    /// Destroy the key of a snapshot: nobody opens its file any more.
    SnapshotErase {
        /// Its id, as `casemate snapshot` printed it.
        id: String,
    },
    /// Change a device of a guest, running or not: the balloon, a disk's size, the limits of a disk or card.
    Resize(ResizeArgs),
    /// Put a disk or a network card into a guest, which may be running.
    Attach(AttachArgs),
    /// Take one that was attached out again: the guest is asked to let go of it.
    Detach(DetachArgs),
    /// Print the JSON Schema of descriptions, by which editors complete and check them. Needs no agent.
    Schema,
    /// Stop a guest's vCPUs and devices.
    Pause {
        /// Its name.
        name: String,
    },
    /// Let a paused guest go on.
    Resume {
        /// Its name.
        name: String,
    },
    /// Show what a guest takes of the host.
    Stats {
        /// Its name.
        name: String,
    },
    /// Print what a guest has written to its serial console.
    Console {
        /// Its name.
        name: String,
        /// Go on until the guest has stopped.
        #[arg(long)]
        follow: bool,
        /// Join this terminal to it, to type as well; Ctrl-] leaves. Status: 0 where the guest was left or switched itself
        /// off, 1 where it ended in another way.
        #[arg(long, short, conflicts_with = "follow")]
        interactive: bool,
    },
}

/// Runs one of them.
pub fn run(agent: &Agent, command: VmCommand, json: bool) -> Result<u8, Failure> {
    let request = match command {
        VmCommand::Validate { description } => return validate(&description, json),
        VmCommand::Console {
            name,
            interactive: true,
            ..
        } => return terminal::console(agent, &name),
        VmCommand::Console { name, follow, .. } => return console(agent, &name, follow),
        VmCommand::Create { description } => Request::Create {
            description: absolute(&description)?,
        },
        VmCommand::Definitions => Request::Definitions {},
        VmCommand::Start {
            name,
            owner_session,
        } => Request::Start {
            name,
            session: owner_session.as_deref().map(read_session).transpose()?,
        },
        VmCommand::Delete { name } => Request::Delete { name },
        VmCommand::List => Request::List {},
        VmCommand::Show { name } => Request::Status { name },
        VmCommand::Stop {
            name,
            timeout: None,
            force: true,
        } => Request::Stop { name },
        VmCommand::Stop {
            name,
            timeout,
            force,
        } => Request::Shutdown {
            name,
            timeout_s: timeout,
            force,
        },
        VmCommand::Upgrade { name } => Request::Upgrade { name },
        VmCommand::Snapshot(args) => args.request()?,
        VmCommand::Restore(args) => args.request()?,
        VmCommand::Clone(args) => args.request()?,
        VmCommand::SnapshotErase { id } => Request::SnapshotErase { id },
        VmCommand::Resize(args) => args.request()?,
        VmCommand::Attach(args) => args.request()?,
        VmCommand::Detach(args) => args.request()?,
        VmCommand::Schema => return print_pretty(&spec::schema()),
        VmCommand::Pause { name } => Request::Pause { name },
        VmCommand::Resume { name } => Request::Resume { name },
        VmCommand::Stats { name } => Request::Stats { name },
    };
    show(agent, &request, json)
}

fn validate(description: &std::path::Path, json: bool) -> Result<u8, Failure> {
    let spec =
        MachineSpec::load(description).map_err(|e| Failure::new("DESCRIPTION", e.to_string()))?;
    if json {
        return print_json(&serde_json::json!({"valid": true, "name": spec.name}));
    }
    print_bytes(
        format!(
            "{} can be used; the policy decides at the launch\n",
            spec.name
        )
        .as_bytes(),
    )
}

/// The guest's bytes as they are; what a terminal makes of them is the terminal's matter.
fn console(agent: &Agent, name: &str, follow: bool) -> Result<u8, Failure> {
    let mut from = 0;
    loop {
        let request = Request::Console {
            name: name.to_owned(),
            from,
        };
        let Answer::Console { bytes, next, ended } = ask(agent, &request, &mut |_| {})? else {
            let text = "the agent answered something else";
            return Err(Failure::new("AGENT_LOST", text));
        };
        let bytes = from_base64(&bytes)?;
        match std::io::stdout().write_all(&bytes) {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(0),
            result => result.map_err(|e| output_failed(&e))?,
        }
        from = next;
        if bytes.is_empty() {
            if ended || !follow {
                return print_bytes(b"");
            }
            std::thread::sleep(BETWEEN);
        }
    }
}

const BETWEEN: Duration = Duration::from_millis(200);
