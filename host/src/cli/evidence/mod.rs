//! `casemate evidence`: what a host recorded.

mod export;
mod report;
mod show;
mod source;
mod verify;

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use crate::agent::api::{Failure, Request};
use crate::agent::client::Agent;
use crate::cli::show as ask;

/// What is done with evidence.
#[derive(Debug, Subcommand)]
pub enum EvidenceCommand {
    /// Print the newest records, and with --follow those that come. Nothing is verified.
    Tail {
        /// The ledger file.
        ledger: PathBuf,
        /// How many of the newest.
        #[arg(short = 'n', long, default_value_t = 10)]
        lines: usize,
        /// Go on until interrupted; with --json a record a line.
        #[arg(short, long)]
        follow: bool,
    },
    /// Verify a ledger or a bundle, and print the records that match.
    Query {
        #[command(flatten)]
        source: SourceArgs,
        #[command(flatten)]
        filter: FilterArgs,
    },
    /// Verify a ledger offline, and write what it says in another form.
    Export(ExportArgs),
    /// Verify a ledger or a bundle offline; 0 it is whole, 1 it is not, 2 that cannot be told.
    Verify {
        #[command(flatten)]
        source: SourceArgs,
        /// A checkpoint kept from before (a signed note in a file); the log must extend it. Without one, that beside a
        /// bundle (`BUNDLE.note`) serves, if it is there.
        #[arg(long, value_name = "NOTE")]
        checkpoint: Vec<PathBuf>,
        /// Public key of a witness (C2SP verifier key, type 4, in a file).
        #[arg(long, value_name = "FILE")]
        witness: Vec<PathBuf>,
        /// How many witnesses must have co-signed a checkpoint (default: all that are given).
        #[arg(long, value_name = "N")]
        threshold: Option<usize>,
    },
    /// Set the records beside the controls of NIST SP 800-53, PCI DSS and ISO 27001; evidence, never a verdict.
    Report {
        #[command(flatten)]
        source: SourceArgs,
        /// The form.
        #[arg(long, value_enum, default_value_t = ReportFormat::Html)]
        format: ReportFormat,
        /// Write to this file instead of the standard output.
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Print a ledger's newest checkpoint, to keep elsewhere or to hand to a witness.
    Checkpoint {
        #[command(flatten)]
        source: SourceArgs,
    },
    /// Give this host's ledger another key; the old one names it in the log.
    Rotate,
    /// Remove full files of this host's ledger in which all records are older than one; proofs stay whole.
    Retain {
        /// The first record that must stay, by its number.
        #[arg(long, value_name = "SEQ")]
        keep_from: u64,
    },
    /// Keep a checkpoint that witnesses have co-signed; exports then carry it.
    Cosign {
        #[command(flatten)]
        source: SourceArgs,
        /// The co-signed checkpoint.
        note: PathBuf,
        /// Public key of a witness.
        #[arg(long, value_name = "FILE", required = true)]
        witness: Vec<PathBuf>,
    },
}

/// Where records come from, and whose they must be.
#[derive(Debug, Args)]
pub struct SourceArgs {
    /// The ledger file; where it makes sense, a bundle (tar file or folder).
    pub path: PathBuf,
    /// The log's public key (C2SP verifier key in a file), had by another way. Without it, the key beside the ledger or
    /// the bundle serves (`PATH.pub`), or else the one in the bundle, and the output says so.
    #[arg(long)]
    pub key: Option<PathBuf>,
}

/// Which records.
#[derive(Debug, Default, Args)]
pub struct FilterArgs {
    /// Not before this time (RFC 3339, or a day).
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Before this time.
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// By this actor.
    #[arg(long)]
    pub actor: Option<String>,
    /// Of this action.
    #[arg(long)]
    pub action: Option<String>,
    /// On this object.
    #[arg(long)]
    pub object: Option<String>,
    /// With this outcome.
    #[arg(long, value_enum)]
    pub outcome: Option<OutcomeArg>,
    /// With this code.
    #[arg(long)]
    pub code: Option<String>,
    /// With an emulated technology (true) or without (false).
    #[arg(long)]
    pub emulated: Option<bool>,
}

/// How an action ended.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OutcomeArg {
    /// Asked for and allowed.
    Allowed,
    /// Asked for and refused.
    Refused,
    /// Done.
    Done,
    /// Tried and failed.
    Failed,
}

/// What is exported.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    filter: FilterArgs,
    /// The form.
    #[arg(long, value_enum, default_value_t = ExportFormat::Bundle)]
    format: ExportFormat,
    /// The file (for tiles, the folder) to write; it must not be there yet.
    #[arg(long)]
    out: PathBuf,
    /// A checkpoint that somebody keeps: a bundle then proves that it extends it.
    #[arg(long, value_name = "NOTE")]
    checkpoint: Vec<PathBuf>,
}

/// The forms of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// A tar file that verifies offline.
    Bundle,
    /// Syslog messages, RFC 5424, one a line.
    Syslog,
    /// OpenTelemetry logs, OTLP/JSON, one request a line.
    Otlp,
    /// in-toto statements with SLSA verification summaries of launches, one a line.
    InToto,
    /// The log as static files: C2SP tlog-tiles.
    Tiles,
}

/// The forms of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// A page for people.
    Html,
    /// OSCAL assessment results, JSON.
    Oscal,
}

/// Runs the command.
pub fn run(agent: &Agent, command: EvidenceCommand, json: bool) -> Result<u8, Failure> {
    match command {
        EvidenceCommand::Tail {
            ledger,
            lines,
            follow,
        } => show::tail(&ledger, lines, follow, json),
        EvidenceCommand::Query { source, filter } => show::query(&source, filter, json),
        EvidenceCommand::Export(args) => export::run(args, json),
        EvidenceCommand::Verify {
            source,
            checkpoint,
            witness,
            threshold,
        } => verify::run(&source, &checkpoint, &witness, threshold, json),
        EvidenceCommand::Report {
            source,
            format,
            out,
        } => report::run(&source, format, out.as_deref()),
        EvidenceCommand::Rotate => ask(agent, &Request::EvidenceRotate {}, json),
        EvidenceCommand::Retain { keep_from } => {
            ask(agent, &Request::EvidenceRetain { keep_from }, json)
        }
        EvidenceCommand::Checkpoint { source } => verify::checkpoint(&source),
        EvidenceCommand::Cosign {
            source,
            note,
            witness,
        } => verify::cosign(&source, &note, &witness, json),
    }
}
