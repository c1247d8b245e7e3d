//! The commands; nothing but parsing and rendering.

mod args;
mod attest;
mod bench;
mod broker;
mod completion;
mod evidence;
mod limits;
mod migrate;
mod owner;
mod platform;
mod plug;
mod policy;
mod render;
mod resize;
mod roles;
mod terminal;
mod verdict;
mod vm;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::agent::api::{Answer, Failure, Request, SessionText};
use crate::agent::client::{Agent, ask};
use args::{Cli, Command, SandboxCommand};

/// Runs the command line.
pub fn main() -> ExitCode {
    // A half-dead VMM is worse than a dead one: a panic in any thread ends the process.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { EXIT_USAGE } else { 0 };
            // Help that nobody reads any more is no failure.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            // An error that nobody reads any more is still told by the exit status.
            let _ = writeln!(std::io::stderr(), "casemate: {failure}");
            ExitCode::from(exit_of(&failure))
        }
    }
}

fn run(cli: Cli) -> Result<u8, Failure> {
    let agent = &cli.agent.chosen();
    let json = cli.json;
    match cli.command {
        Command::Doctor => doctor(json),
        Command::Agent { config } => roles::agent(&config),
        Command::Internal { role } => roles::internal(role),
        Command::Run {
            description,
            owner_session,
            console,
        } => {
            let description = absolute(&description)?;
            let session = owner_session.as_deref().map(read_session).transpose()?;
            let request = Request::Run {
                description,
                session,
            };
            match console {
                true => terminal::launch(agent, &request),
                false => show(agent, &request, json),
            }
        }
        Command::List => show(agent, &Request::List {}, json),
        Command::Status { name } => show(agent, &Request::Status { name }, json),
        Command::Stop { name } => show(agent, &Request::Stop { name }, json),
        Command::Pause { name } => show(agent, &Request::Pause { name }, json),
        Command::Resume { name } => show(agent, &Request::Resume { name }, json),
        Command::Nmi { name } => show(agent, &Request::Nmi { name }, json),
        Command::Migrate {
            name,
            to,
            dry_run: true,
            downtime_limit,
            bandwidth,
            no_throttle,
            streams,
            copy_disk,
            ..
        } => {
            let request = Request::Assess {
                name,
                to,
                downtime_limit_ms: downtime_limit,
                bandwidth_mib: bandwidth,
                unthrottled: no_throttle,
                streams,
                copy_disks: copy_disk,
            };
            show(agent, &request, json)
        }
        Command::Migrate {
            name,
            to,
            dry_run: false,
            downtime_limit,
            time_limit,
            bandwidth,
            no_throttle,
            read_back,
            streams,
            copy_disk,
        } => migrate::run(
            agent,
            &Request::Migrate {
                name,
                to,
                downtime_limit_ms: downtime_limit,
                time_limit_s: time_limit,
                bandwidth_mib: bandwidth,
                unthrottled: no_throttle,
                read_back,
                streams,
                copy_disks: copy_disk,
            },
            json,
        ),
        Command::MigrateSet { name, bandwidth } => {
            let request = Request::MigrateSet {
                name,
                bandwidth_mib: bandwidth,
            };
            show(agent, &request, json)
        }
        Command::Settle { name } => show(agent, &Request::Settle { name }, json),
        Command::Proceed { name } => show(agent, &Request::Proceed { name }, json),
        Command::Snapshot(args) => show(agent, &args.request()?, json),
        Command::Restore(args) => show(agent, &args.request()?, json),
        Command::Cancel { name } => show(agent, &Request::Cancel { name }, json),
        Command::Owner { command } => owner::run(agent, command, json),
        Command::Attest { command } => attest::run(command, json),
        Command::Broker(args) => broker::run(args, json),
        Command::Policy { command } => policy::run(agent, command, json),
        Command::Platform(args) => platform::run(agent, args, json),
        Command::Sandbox {
            command: SandboxCommand::Probe { name },
        } => show(agent, &Request::SandboxProbe { name }, json),
        Command::Sandbox {
            command: SandboxCommand::Report { name },
        } => show(agent, &Request::SandboxReport { name }, json),
        Command::Evidence { command } => evidence::run(agent, command, json),
        Command::Bench { command } => bench::run(command, json),
        Command::Vm { command } => vm::run(agent, command, json),
        Command::Task { command } => show(agent, &command.request(), json),
        Command::Metrics => show(agent, &Request::Metrics {}, json),
        Command::Openapi => print_pretty(&crate::agent::api::openapi::document()),
        Command::Completion { shell } => completion::script(shell),
        Command::GuestNames => completion::guest_names(agent),
        Command::Man => {
            let mut text = Vec::new();
            let mut cli = Cli::command().disable_help_subcommand(true);
            cli.build();
            manual(&cli, &mut text).map_err(|e| output_failed(&e))?;
            print_bytes(&text)
        }
    }
}

/// Every command that does something, in its words (`vm start`).
pub fn commands() -> Vec<String> {
    let mut leaves = Vec::new();
    collect(&Cli::command(), "", &mut leaves);
    leaves
}

fn collect(command: &clap::Command, words: &str, leaves: &mut Vec<String>) {
    if !words.is_empty() && !command.is_subcommand_required_set() {
        leaves.push(words.to_owned());
    }
    for below in command.get_subcommands() {
        let name = below.get_name();
        let words = if words.is_empty() {
            name.to_owned()
        } else {
            format!("{words} {name}")
        };
        collect(below, &words, leaves);
    }
}

/// The page of a command, and behind it those of its own commands, as `man` shows several.
fn manual(command: &clap::Command, text: &mut Vec<u8>) -> std::io::Result<()> {
    clap_mangen::Man::new(command.clone()).render(text)?;
    let below = command.get_subcommands();
    below
        .filter(|one| !one.is_hide_set())
        .try_for_each(|one| manual(one, text))
}

fn doctor(json: bool) -> Result<u8, Failure> {
    let diagnosis = crate::doctor::diagnose();
    if json {
        print_json(&diagnosis)?;
    } else {
        print_bytes(crate::doctor::render(&diagnosis).as_bytes())?;
    }
    Ok(u8::from(!diagnosis.usable))
}

/// Asks and prints the answer; a probe that found a hole is a failure.
fn show(agent: &Agent, request: &Request, json: bool) -> Result<u8, Failure> {
    let answer = ask(agent, request, &mut |_| {})?;
    if json {
        print_json(&answer)?;
    } else {
        print_bytes(render::answer(&answer).as_bytes())?;
    }
    let held = match &answer {
        Answer::Probe { reports } => reports.iter().flat_map(|r| &r.attempts).all(|a| a.refused),
        _ => true,
    };
    Ok(u8::from(!held))
}

fn absolute(file: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(file).map_err(|e| Failure::new("USAGE", format!("{}: {e}", file.display())))
}

fn read_session(folder: &Path) -> Result<SessionText, Failure> {
    let read = |file: &str| {
        let path = folder.join(file);
        std::fs::read(&path)
            .map(|bytes| to_base64(&bytes))
            .map_err(|e| {
                let remedy = "make it with `casemate owner session`";
                Failure::new(
                    "OWNER_SESSION",
                    format!("{} cannot be read: {e}; {remedy}", path.display()),
                )
            })
    };
    Ok(SessionText {
        certificate: read("owner.cert")?,
        blob: read("session.bin")?,
    })
}

fn to_base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn from_base64(text: &str) -> Result<Vec<u8>, Failure> {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD
        .decode(text)
        .map_err(|e| {
            Failure::new(
                "BASE64",
                format!("a field of the answer is not base64: {e}"),
            )
        })
}

fn print_json(value: &impl serde::Serialize) -> Result<u8, Failure> {
    let mut text = serde_json::to_vec(value).map_err(|e| output_failed(&e))?;
    text.push(b'\n');
    print_bytes(&text)
}

fn print_pretty(value: &impl serde::Serialize) -> Result<u8, Failure> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| output_failed(&e))?;
    text.push(b'\n');
    print_bytes(&text)
}

fn print_bytes(bytes: &[u8]) -> Result<u8, Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(output_failed(&e)),
        _ => Ok(0),
    }
}

fn output_failed(error: &dyn std::fmt::Display) -> Failure {
    Failure::new("OUTPUT", format!("the result cannot be written: {error}"))
}

fn exit_of(failure: &Failure) -> u8 {
    match failure.code.as_str() {
        "AGENT_UNAVAILABLE" => EXIT_UNAVAILABLE,
        "USAGE" => EXIT_USAGE,
        "EVIDENCE_UNAVAILABLE" => EXIT_CANNOT_VERIFY,
        code if code.starts_with("POLICY_") => EXIT_REFUSED,
        _ => EXIT_FAILED,
    }
}

/// The work failed.
const EXIT_FAILED: u8 = 1;
/// What would be needed to tell is not there.
const EXIT_CANNOT_VERIFY: u8 = 2;
/// A policy refused it.
const EXIT_REFUSED: u8 = 3;
/// The command line is wrong (`EX_USAGE` of sysexits.h).
const EXIT_USAGE: u8 = 64;
/// No agent answers (`EX_UNAVAILABLE`).
const EXIT_UNAVAILABLE: u8 = 69;
