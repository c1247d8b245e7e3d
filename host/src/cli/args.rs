//! The command line's grammar and help.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::agent::api::{Failure, Request};
use crate::agent::client::{Address, Agent, Certificates};

use super::absolute;
use super::attest::AttestCommand;
use super::bench::BenchCommand;
use super::broker::BrokerArgs;
use super::evidence::EvidenceCommand;
use super::platform::PlatformArgs;
use super::policy::PolicyCommand;
use super::vm::VmCommand;
use crate::agent::api::MemoryMode;

/// Casemate: a security-hardened confidential VM host.
///
/// Runs guests under AMD SEV in a jailed VMM, proves what it launched, and moves them between hosts over an
/// authenticated, encrypted stream. Where no AMD secure processor is present a software one stands in, and every
/// output says "emulated".
#[derive(Debug, Parser)]
#[command(
    name = "casemate",
    version,
    after_help = "Exit status: 0 done, 1 failed or rejected, 2 cannot verify, 3 refused by policy, 64 usage, 69 no agent."
)]
pub struct Cli {
    /// The agent to ask.
    #[command(flatten)]
    pub agent: AgentArgs,
    /// Print one JSON object instead of a table.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What is written to which file.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// Its name.
    name: String,
    /// The file; it must not exist.
    file: PathBuf,
    /// End the guest with it, so that its disks stay as the snapshot knows them.
    #[arg(long)]
    stop: bool,
    /// Make it a template: cloned as often as you like, never restored itself.
    #[arg(long)]
    template: bool,
}

impl SnapshotArgs {
    /// What the agent is asked.
    pub fn request(self) -> Result<Request, Failure> {
        Ok(Request::Snapshot {
            name: self.name,
            file: absolute(&self.file)?,
            stop: self.stop,
            template: self.template,
        })
    }
}

/// What is made from which file.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The file.
    file: PathBuf,
    /// Another name for the guest.
    #[arg(long)]
    name: Option<String>,
    /// When its memory comes: all of it before it runs, or each page when it is asked for.
    #[arg(long, value_enum, default_value_t = MemoryMode::AtOnce)]
    memory: MemoryMode,
    /// Take a snapshot although the guest has a newer one.
    #[arg(long)]
    allow_older: bool,
    /// Take the disks although they have changed since: the guest may find its file systems broken.
    #[arg(long)]
    allow_changed_disks: bool,
}

impl RestoreArgs {
    /// What the agent is asked.
    pub fn request(self) -> Result<Request, Failure> {
        Ok(Request::Restore {
            file: absolute(&self.file)?,
            name: self.name,
            memory: self.memory,
            allow_older: self.allow_older,
            allow_changed_disks: self.allow_changed_disks,
        })
    }
}

/// What is cloned, and how.
#[derive(Debug, Args)]
pub struct CloneArgs {
    /// The snapshot's file.
    file: PathBuf,
    /// The new guest's name.
    name: String,
    /// When its memory comes: all of it before it runs, or each page when it is asked for.
    #[arg(long, value_enum, default_value_t = MemoryMode::AtOnce)]
    memory: MemoryMode,
    /// Folder that the copies of its disks are put in, as NAME-DISK.img; by default the agent's own for the guest.
    #[arg(long)]
    disks: Option<PathBuf>,
    /// Copy the snapshot's disks although they have changed since: the guest may find its file systems broken.
    #[arg(long)]
    allow_changed_disks: bool,
}

impl CloneArgs {
    /// What the agent is asked.
    pub fn request(self) -> Result<Request, Failure> {
        Ok(Request::Clone {
            file: absolute(&self.file)?,
            name: self.name,
            memory: self.memory,
            disks: self.disks.as_deref().map(absolute).transpose()?,
            allow_changed_disks: self.allow_changed_disks,
        })
    }
}

/// Which agent, and who asks it.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// The agent: its API socket, or https://HOST:PORT with the three options below.
    #[arg(
        long,
        global = true,
        env = "CASEMATE_AGENT",
        default_value = "/run/casemate/agent.sock"
    )]
    agent: Address,
    /// Certificate authority of https agents (PEM).
    #[arg(long, global = true, env = "CASEMATE_AGENT_CA", value_name = "FILE")]
    agent_ca: Option<PathBuf>,
    /// Own client certificate (PEM) for an https agent.
    #[arg(long, global = true, env = "CASEMATE_AGENT_CERT", value_name = "FILE")]
    agent_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, global = true, env = "CASEMATE_AGENT_KEY", value_name = "FILE")]
    agent_key: Option<PathBuf>,
}

impl AgentArgs {
    /// The agent that these mean.
    pub fn chosen(&self) -> Agent {
        let files = (&self.agent_ca, &self.agent_cert, &self.agent_key);
        let (Some(ca), Some(certificate), Some(key)) = files else {
            return Agent {
                address: self.agent.clone(),
                person: None,
            };
        };
        Agent {
            address: self.agent.clone(),
            person: Some(Certificates {
                ca: ca.clone(),
                certificate: certificate.clone(),
                key: key.clone(),
            }),
        }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say what this host can and cannot do, and how to mend it.
    Doctor,
    /// Run the host's agent in the foreground.
    Agent {
        /// The agent's configuration.
        #[arg(long)]
        config: PathBuf,
    },
    /// Launch a guest from its description.
    Run {
        /// Description (TOML).
        description: PathBuf,
        /// Folder made by `casemate owner session`: the launch is bound to that owner and waits for the secret.
        #[arg(long)]
        owner_session: Option<PathBuf>,
        /// Stay with the guest: its serial console is this terminal's until it ends, or Ctrl-] leaves it running. Status:
        /// 0 where it switched itself off or was left, 1 where it ended in another way.
        #[arg(long, conflicts_with = "owner_session")]
        console: bool,
    },
    /// List the guests of this host.
    List,
    /// Show one guest.
    Status {
        /// Its name.
        name: String,
    },
    /// End a guest.
    Stop {
        /// Its name.
        name: String,
    },
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
    /// Give a guest a non-maskable interrupt; Linux says what it does or, told so, panics and dumps.
    Nmi {
        /// Its name.
        name: String,
    },
    /// Move a running guest to a peer; with --json a line an event, the outcome last.
    Migrate {
        /// Its name.
        name: String,
        /// A peer named in the policy.
        #[arg(long)]
        to: String,
        /// Only say what the move would be like: both ends decide and build as for a move, and nothing moves.
        #[arg(long, conflicts_with_all = ["time_limit", "read_back"])]
        dry_run: bool,
        /// Longest acceptable pause in milliseconds (default: the policy's).
        #[arg(long, value_name = "MS")]
        downtime_limit: Option<u32>,
        /// Give the move up after so many seconds; the guest runs on here.
        #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..))]
        time_limit: Option<u32>,
        /// MiB a second to send at most while the guest runs; `casemate migrate-set` changes it meanwhile.
        #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
        bandwidth: Option<u32>,
        /// Never slow the guest down, even if it writes more than can be sent: it is paused for longer then.
        #[arg(long)]
        no_throttle: bool,
        /// With the guest paused, read all its memory anew at both ends and compare it; for a plain guest.
        #[arg(long)]
        read_back: bool,
        /// Connections to carry memory over, 1 to 16; the peer may grant fewer. Each has its own TLS and seals; useful where
        /// one connection, or one processor, does not fill the way.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
        streams: Option<u16>,
        /// A disk that moves along, by its name in the description (repeat for more); the others are the same storage.
        #[arg(long, value_name = "DISK")]
        copy_disk: Vec<String>,
    },
    /// Change what the move of a guest may take, while it runs.
    MigrateSet {
        /// The guest.
        name: String,
        /// MiB a second to send at most while the guest runs; 0 for all there is.
        #[arg(long, value_name = "MIB")]
        bandwidth: u32,
    },
    /// Ask the peer who has a guest whose move lost its answer, and act on what it says: end the copy here, or go on here.
    ///
    /// The agent does the same by itself every half minute.
    Settle {
        /// Its name.
        name: String,
    },
    /// Pause a guest that is being moved and switch now, however long that takes.
    Proceed {
        /// Its name.
        name: String,
    },
    /// Write a guest's memory and state to a sealed file that only this host opens; its disks stay where they are.
    Snapshot(SnapshotArgs),
    /// Make a guest from a sealed file, on the disks that it had.
    Restore(RestoreArgs),
    /// Cancel the migration of a guest; it goes on running here.
    Cancel {
        /// Its name.
        name: String,
    },
    /// Guests whose descriptions this host keeps: `create` once, `start` by name.
    #[command(
        after_help = "All but `create`, `definitions`, `start` and `delete` take guests of any origin. `casemate stop` ends a \
            guest at once, as `casemate vm stop --force` does."
    )]
    Vm {
        /// What to do.
        #[command(subcommand)]
        command: VmCommand,
    },
    /// Requests that take long: a launch, a migration.
    Task {
        /// What to do.
        #[command(subcommand)]
        command: TaskCommand,
    },
    /// Print what the agent counts, in Prometheus' text format.
    Metrics,
    /// The guest owner's side: sessions, expected measurements, secrets.
    Owner {
        /// What to do.
        #[command(subcommand)]
        command: OwnerCommand,
    },
    /// Evidence: what a guest will measure, what a report proves, the certificates it takes.
    #[command(
        after_help = "An owner's way: measure, reference make and sign, fetch, verify; then `casemate broker`. \
            attest/OWNERS.md leads through it."
    )]
    Attest {
        /// What to do.
        #[command(subcommand)]
        command: AttestCommand,
    },
    /// Release secrets to guests that proved themselves; with a command, keep those secrets.
    Broker(BrokerArgs),
    /// Policies: check, sign, test, put in force; why a decision came out so, what a new policy would change.
    #[command(after_help = "policy/POLICY.md describes every key of the document.")]
    Policy {
        /// What to do.
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// The secure processor of this host: status, certificates, owner, SEV-SNP configuration.
    #[command(
        after_help = "To take a platform: oca new (on the owner's machine), csr (on the host), oca sign (owner), import \
            (host). All that changes the processor is written into the agent's ledger."
    )]
    Platform(PlatformArgs),
    /// The cells of a guest's processes.
    Sandbox {
        /// What to do.
        #[command(subcommand)]
        command: SandboxCommand,
    },
    /// What happened on a host: follow, search, hand over and verify its records.
    #[command(
        after_help = "`verify` exits with 0 if everything verified, 1 if it was refused, 2 if something needed to tell is missing."
    )]
    Evidence {
        /// What to do.
        #[command(subcommand)]
        command: EvidenceCommand,
    },
    /// Measurements that need no guest.
    Bench {
        /// What to measure.
        #[command(subcommand)]
        command: BenchCommand,
    },
    /// Print the description of the agent's API (OpenAPI 3.1).
    Openapi,
    /// The names of the guests here, for completion scripts.
    #[command(hide = true)]
    GuestNames,
    /// Print a completion script; bash's completes the names of guests too.
    Completion {
        /// For this shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page (roff).
    Man,
    /// Internal roles; started by the agent only.
    #[command(hide = true)]
    Internal {
        /// The role.
        role: Role,
    },
}

/// What can be asked about tasks.
#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// List the tasks under way and the last that ended.
    List,
    /// Show one task.
    Show {
        /// Its id.
        id: String,
    },
    /// Follow a task to its end, and print its answer.
    Follow {
        /// Its id.
        id: String,
    },
    /// Cancel a task; a migration can be.
    Cancel {
        /// Its id.
        id: String,
    },
}

impl TaskCommand {
    /// The request behind it.
    pub fn request(self) -> Request {
        match self {
            Self::List => Request::Tasks {},
            Self::Show { id } => Request::Task { id },
            Self::Follow { id } => Request::TaskEvents { id },
            Self::Cancel { id } => Request::TaskCancel { id },
        }
    }
}

/// What an owner does.
#[derive(Debug, Subcommand)]
pub enum OwnerCommand {
    /// Verify a platform's certificates and make the session a launch there will be bound to.
    Session {
        /// Folder made by `casemate platform export`.
        #[arg(long)]
        platform: PathBuf,
        /// Description of the guest (for its guest policy).
        #[arg(long)]
        description: PathBuf,
        /// Accept this emulated root (sha256:…); emulated platforms are refused without it.
        #[arg(long, value_name = "SHA256")]
        allow_emulated: Option<String>,
        /// Folder for owner.cert and session.bin (for the host) and owner.keys (secret, mode 0600).
        #[arg(long)]
        out: PathBuf,
    },
    /// Compare a launch's measurement with the one the description must have, and only then release the secret.
    Release {
        /// The guest.
        name: String,
        /// The owner's own copy of the description; kernel and initramfs are read from beside it.
        #[arg(long)]
        description: PathBuf,
        /// Folder made by `casemate owner session`.
        #[arg(long)]
        session: PathBuf,
        /// Folder made by `casemate platform export`.
        #[arg(long)]
        platform: PathBuf,
        /// Accept this emulated root (sha256:…).
        #[arg(long, value_name = "SHA256")]
        allow_emulated: Option<String>,
        /// The secret, at most 2048 bytes.
        #[arg(long)]
        secret: PathBuf,
    },
    /// Print the launch digest a description must have.
    Measure {
        /// Description of the guest.
        description: PathBuf,
    },
}

/// What can be asked of a sandbox.
#[derive(Debug, Subcommand)]
pub enum SandboxCommand {
    /// Try from inside a guest's processes what must be refused; exit status 1 if anything was not.
    Probe {
        /// The guest.
        name: String,
    },
    /// Show the sandbox thread by thread.
    Report {
        /// The guest.
        name: String,
    },
}

/// Internal roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// One guest's virtual machine monitor.
    Vmm,
    /// One migration.
    Mover,
    /// The software secure processor.
    Psp,
    /// No role: says what this program reads and writes.
    Formats,
}
