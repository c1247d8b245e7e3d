//! `casemate-agent`: the small static program in a guest that gets its secrets.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use casemate_agent::client::{Client, ClientError, patiently};
use casemate_agent::endpoint::Endpoint;
use casemate_agent::output::write_private;
use casemate_agent::source::{
    EmulatedSocket, GuestMessages, Live, ReportSource, SevGuestDevice, SourceError, Tsm,
};
use casemate_attest::broker::ResourcePath;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Proves the guest it runs in to a key broker, and gets its secrets.
#[derive(Debug, Parser)]
#[command(
    name = "casemate-agent",
    version,
    after_help = "Exit status: 0 done, 1 refused by the broker, 2 no report or no broker, 64 usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Get a secret from a broker.
    Fetch {
        /// http://HOST:PORT or vsock://CID:PORT (the host is CID 2).
        #[arg(long, value_name = "URL")]
        broker: Endpoint,
        /// The secret's path: repository/type/tag.
        #[arg(long, value_name = "PATH")]
        resource: ResourcePath,
        /// Where the secret goes, mode 0600; standard output without it.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// How long to go on trying while the broker is not there, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(..=86_400))]
        wait: u64,
        #[command(flatten)]
        source: SourceArgs,
    },
    /// Get a report over a nonce, and no secret.
    Report {
        /// 1 to 64 bytes in hex; zeros follow.
        #[arg(long, value_name = "HEX", value_parser = nonce)]
        nonce: [u8; 64],
        /// Where the report's 1184 bytes go; standard output, in hex, without it.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        source: SourceArgs,
    },
}

#[derive(Debug, Args)]
struct SourceArgs {
    /// Where the report comes from.
    #[arg(long, value_enum, default_value_t = Interface::Auto)]
    source: Interface,
    /// EMULATED: a software secure processor's Unix socket in the place of the kernel's interfaces. Proves nothing
    /// about hardware.
    #[arg(long, value_name = "SOCKET", conflicts_with = "source")]
    emulated_report_socket: Option<PathBuf>,
    /// The privilege level to ask for, 0 to 3 (default: the guest's own).
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(u8).range(..=3))]
    vmpl: Option<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Interface {
    /// configfs-tsm where it is, else /dev/sev-guest, else what `emulated` means.
    Auto,
    /// /sys/kernel/config/tsm/report.
    Tsm,
    /// /dev/sev-guest.
    SevGuest,
    /// EMULATED: the software secure processor of Casemate's host, in a guest that was launched with it. Proves
    /// nothing about hardware.
    Emulated,
}

/// Why it failed, with the exit status.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("{0} cannot be written: {1}")]
    Output(String, std::io::Error),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { EXIT_USAGE } else { 0 };
            // Help that nobody reads any more is no failure.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&failure.to_string());
            ExitCode::from(failure.exit())
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Fetch {
            broker,
            resource,
            out,
            wait,
            source,
        } => fetch(broker, &resource, out.as_deref(), wait, &source),
        Command::Report { nonce, out, source } => {
            let report = source.open().report(&nonce)?;
            mark(report.emulated);
            match out {
                Some(path) => write(&path, &report.report),
                None => print(format!("{}\n", hex::encode(report.report)).as_bytes()),
            }
        }
    }
}

fn fetch(
    broker: Endpoint,
    resource: &ResourcePath,
    out: Option<&Path>,
    wait: u64,
    source: &SourceArgs,
) -> Result<(), Failure> {
    let mut client = Client::new(broker, EXCHANGE);
    let mut source = source.open();
    let waiting = |error: &ClientError, pause: Duration| {
        say(&format!("{error}; again in {} ms", pause.as_millis()));
    };
    let (secret, emulated) = patiently(Duration::from_secs(wait), waiting, || {
        let accepted = client.attest(source.as_mut())?;
        Ok((client.resource(resource)?, accepted.emulated))
    })?;
    mark(emulated);
    match out {
        Some(path) => write(path, &secret),
        None => print(&secret),
    }
}

impl SourceArgs {
    fn open(&self) -> Box<dyn ReportSource> {
        if let Some(socket) = &self.emulated_report_socket {
            return Box::new(EmulatedSocket::new(socket, self.vmpl));
        }
        match self.source {
            Interface::Auto => Box::new(Live::new(self.vmpl)),
            Interface::Tsm => Box::new(Tsm::new(self.vmpl)),
            Interface::SevGuest => Box::new(SevGuestDevice::new(self.vmpl)),
            Interface::Emulated => Box::new(GuestMessages::system(self.vmpl)),
        }
    }
}

impl Failure {
    fn exit(&self) -> u8 {
        match self {
            Self::Client(error) if error.refused() => EXIT_REFUSED,
            _ => EXIT_CANNOT,
        }
    }
}

fn nonce(text: &str) -> Result<[u8; 64], String> {
    let bytes = hex::decode(text).map_err(|e| e.to_string())?;
    let mut nonce = [0; 64];
    match nonce.get_mut(..bytes.len()) {
        Some(start) if !bytes.is_empty() => start.copy_from_slice(&bytes),
        _ => return Err("a nonce has 1 to 64 bytes".to_owned()),
    }
    Ok(nonce)
}

fn mark(emulated: bool) {
    if emulated {
        say("EMULATED evidence, NOT AMD: it proves nothing about hardware");
    }
}

fn say(text: &str) {
    // What nobody reads any more is still told by the exit status.
    let _ = writeln!(std::io::stderr(), "casemate-agent: {text}");
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    write_private(path, bytes).map_err(|e| Failure::Output(path.display().to_string(), e))
}

fn print(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|e| Failure::Output("standard output".to_owned(), e))
}

/// How long one exchange with the broker may take.
const EXCHANGE: Duration = Duration::from_secs(15);
const EXIT_REFUSED: u8 = 1;
const EXIT_CANNOT: u8 = 2;
const EXIT_USAGE: u8 = 64;
