//! `casemate bench`: measurements that need no guest.

use std::net::SocketAddr;
use std::path::PathBuf;

use casemate_crypto_migrate::Provider;
use clap::{Args, Subcommand};

use super::{print_bytes, print_json};
use crate::agent::api::Failure;
use crate::bench::BenchError;
use crate::bench::migrate::{self, Plan, Protect, Report};

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Move incompressible memory between two processes by the migration engine; no KVM needed.
    #[command(
        after_help = "Without --listen and --connect both ends run here, over loopback. Between two machines: --listen \
            on one, copy its folder of keys to the other, --connect there. Every end serves one run."
    )]
    Migrate(MigrateArgs),
}

/// How to measure.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Memory to move, with K, M or G for binary multiples; whole pages.
    #[arg(long, default_value = "1G", value_parser = parse_size)]
    size: u64,
    /// What protects the stream.
    #[arg(long, value_enum, default_value = "tls+mac")]
    protect: Protect,
    /// Who does the cryptography, at both ends.
    #[arg(long, default_value_t)]
    provider: Provider,
    /// Connections that carry memory, 1 to 16.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    streams: u16,
    /// Be the destination, on this address; size and protection are the source's.
    #[arg(
        long,
        value_name = "ADDR",
        requires = "keys",
        conflicts_with = "connect"
    )]
    listen: Option<SocketAddr>,
    /// Be the source, to the destination on this address.
    #[arg(long, value_name = "ADDR", requires = "keys")]
    connect: Option<SocketAddr>,
    /// End with the process that started this one.
    #[arg(long, hide = true, requires = "listen")]
    with_parent: bool,
    /// Folder of the two ends' certificates; --listen makes it where there is none.
    #[arg(long, value_name = "DIR")]
    keys: Option<PathBuf>,
}

/// Measures and prints.
pub fn run(command: BenchCommand, json: bool) -> Result<u8, Failure> {
    let BenchCommand::Migrate(args) = command;
    let plan = Plan {
        size: args.size,
        protect: args.protect,
        provider: args.provider.to_string(),
        streams: args.streams,
    };
    let keys = args.keys.unwrap_or_default();
    let report = match (args.listen, args.connect) {
        (Some(address), _) => {
            return migrate::listen(address, &keys, args.with_parent)
                .map(|()| 0)
                .map_err(failure);
        }
        (_, Some(address)) => migrate::connect(address, &keys, plan),
        (None, None) => migrate::both(plan),
    }
    .map_err(failure)?;
    if json {
        print_json(&report)
    } else {
        print_bytes(table(&report).as_bytes())
    }
}

fn table(report: &Report) -> String {
    let protect = match report.protect {
        Protect::None => "none",
        Protect::Tls => "TLS 1.3",
        Protect::TlsMac => "TLS 1.3 and page seals",
    };
    format!(
        "  protection                    {protect}, by {}\n\
         \x20 connections            {:7}\n\
         \x20 memory moved           {:10.2} GiB in {:.2} s\n\
         \x20 throughput             {:10.2} GiB/s\n\
         \x20 processor, source      {:10.2} s/GB\n\
         \x20 processor, destination {:10.2} s/GB\n\
         \x20 peak memory, source    {:10.1} MiB\n\
         \x20 peak memory, dest.     {:10.1} MiB\n\
         \x20 switch                 {:10.2} ms\n\
         \x20 of its parts' sum      {:10.2} x processor, {:.2} x time\n",
        report.provider,
        report.streams,
        report.size as f64 / f64::from(1 << 30),
        report.seconds,
        report.gib_per_s,
        report.cpu_s_per_gb_source,
        report.cpu_s_per_gb_destination,
        report.peak_rss_mib_source,
        report.peak_rss_mib_destination,
        report.switch_ms,
        report.parts.cpu_measured,
        report.parts.wall_measured,
    )
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K')) => (text.get(..at), 10),
        Some((at, 'M')) => (text.get(..at), 20),
        Some((at, 'G')) => (text.get(..at), 30),
        _ => (Some(text), 0),
    };
    let size = digits
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or("not a size; write for example 512M or 4G")?;
    if size == 0 || size % 4096 != 0 || size > MAX_SIZE {
        return Err(format!(
            "{size} bytes are not 1 page to 1 TiB in whole pages"
        ));
    }
    Ok(size)
}

fn failure(error: BenchError) -> Failure {
    Failure::new("BENCH", error.to_string())
}

const MAX_SIZE: u64 = 1 << 40;

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_are_whole_pages_in_binary_multiples() {
        assert_eq!(parse_size("4G"), Ok(4 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        for wrong in ["", "G", "0", "4097", "5T", "-1", "99999999999999G", "2048G"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
