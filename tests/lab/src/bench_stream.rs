//! `lab bench-stream`: our stream beside QEMU's, on this machine, in the same minutes.
//!
//! QEMU's guest is one that never ran: paused, of incompressible memory in a prefilled file, its destination's memory
//! preallocated; both over loopback, without a bound on bandwidth. What is measured is what `casemate bench migrate`
//! measures: the time of the move and the processor time of both processes during it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    net::TcpListener,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use casemate_crypto_migrate::dev_ca::DevCa;
use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    command::output,
    error::{Error, OnFile, Result},
    paths::Paths,
    prepare::prepare_packages,
    qmp::Qmp,
    say,
    signals::Guarded,
    tools::Tools,
};

/// Measures `rounds` times each way, interleaved, and prints JSON: medians and ratios.
pub fn bench_stream(paths: &Paths, size_mib: u64, rounds: u32) -> Result<i32> {
    prepare_packages(paths)?;
    let tools = Tools::at(&paths.tools());
    let bench = Bench {
        tools: &tools,
        casemate: paths.release.join("casemate"),
        folder: tempfile::tempdir_in("/dev/shm").on("create", Path::new("/dev/shm/…"))?,
        size_mib,
    };
    bench.prepare()?;
    let mut found: BTreeMap<String, Vec<Cost>> = BTreeMap::new();
    for round in 1..=rounds.max(1) {
        for way in OURS {
            say(&format!("round {round}: casemate {}", way.join(" ")));
            let key = format!("casemate {}", way.join(" "));
            found.entry(key).or_default().push(bench.ours(way)?);
        }
        for (name, channels, tls) in QEMU {
            say(&format!("round {round}: {name}"));
            found
                .entry(name.to_owned())
                .or_default()
                .push(bench.qemu(channels, tls)?);
        }
    }
    let medians: BTreeMap<_, _> = found
        .iter()
        .map(|(name, costs)| (name.clone(), median(costs)))
        .collect();
    let report = json!({
        "size_mib": size_mib,
        "rounds": rounds,
        "qemu": tools.qemu_version()?,
        "medians": medians,
        "ratios": ratios(&medians),
    });
    println!("{report:#}");
    Ok(0)
}

/// What a move took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Cost {
    gib_per_s: f64,
    /// Both ends.
    cpu_s_per_gb: f64,
}

struct Bench<'a> {
    tools: &'a Tools,
    casemate: PathBuf,
    folder: tempfile::TempDir,
    size_mib: u64,
}

impl Bench<'_> {
    /// Memory that does not compress, and certificates of both ends under names that QEMU looks for.
    fn prepare(&self) -> Result<()> {
        let path = self.folder.path().join("memory");
        let mut file = File::create(&path).on("create", &path)?;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut piece = vec![0; 1 << 20];
        for _ in 0..self.size_mib {
            for word in piece.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            file.write_all(&piece).on("write", &path)?;
        }
        let put = |name: &str, text: &str| {
            let path = self.folder.path().join(name);
            fs::write(&path, text).on("write", &path)
        };
        let certificates = |error| Error::Usage(format!("certificates: {error}"));
        let authority = DevCa::new("bench").map_err(certificates)?;
        put("ca-cert.pem", authority.certificate_pem())?;
        for end in ["server", "client"] {
            let host = authority.issue(NAME).map_err(certificates)?;
            put(&format!("{end}-cert.pem"), &host.certificate_pem)?;
            put(&format!("{end}-key.pem"), &host.key_pem)?;
        }
        Ok(())
    }

    fn ours(&self, way: &[&str]) -> Result<Cost> {
        let size = format!("{}M", self.size_mib);
        let mut command = Command::new(&self.casemate);
        command.args(["bench", "migrate", "--json", "--size", &size]);
        let report: Value = parse(&output(command.args(way))?)?;
        let number = |name: &str| report.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN);
        Ok(Cost {
            gib_per_s: number("gib_per_s"),
            cpu_s_per_gb: number("cpu_s_per_gb_source") + number("cpu_s_per_gb_destination"),
        })
    }

    fn qemu(&self, channels: u64, tls: bool) -> Result<Cost> {
        let memory = self.folder.path().join("memory");
        let full = format!("memory-backend-file,mem-path={},share=on", memory.display());
        let empty = "memory-backend-memfd,share=on,prealloc=on";
        let mut source = self.machine(&full, "client", tls, &[])?;
        let mut destination = self.machine(empty, "server", tls, &["-incoming", "defer"])?;
        let uri = format!("tcp:127.0.0.1:{}", free_port()?);
        for end in [&mut source, &mut destination] {
            let mut parameters = json!({ "max-bandwidth": 1_u64 << 40 });
            if let (true, Some(parameters)) = (tls, parameters.as_object_mut()) {
                parameters.insert("tls-creds".into(), json!("tls0"));
                parameters.insert("tls-hostname".into(), json!(NAME));
            }
            if channels > 1 {
                let multifd =
                    json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
                end.execute("migrate-set-capabilities", &multifd)?;
                if let Some(parameters) = parameters.as_object_mut() {
                    parameters.insert("multifd-channels".into(), json!(channels));
                }
            }
            end.execute("migrate-set-parameters", &parameters)?;
        }
        destination.execute("migrate-incoming", &json!({ "uri": uri }))?;
        let before = source.cpu_seconds()? + destination.cpu_seconds()?;
        source.execute("migrate", &json!({ "uri": uri }))?;
        let milliseconds = source.migrated()?;
        destination.migrated()?;
        let cpu = source.cpu_seconds()? + destination.cpu_seconds()? - before;
        let bytes = (self.size_mib << 20) as f64;
        Ok(Cost {
            gib_per_s: bytes / f64::from(1 << 30) / (milliseconds / 1e3),
            cpu_s_per_gb: cpu / (bytes / 1e9),
        })
    }

    /// A paused machine of which the memory is this.
    fn machine(&self, memory: &str, end: &str, tls: bool, more: &[&str]) -> Result<Qemu> {
        let (qmp, theirs) = UnixStream::pair().on("create", Path::new("a socket pair"))?;
        let mut command = self.tools.qemu();
        command.args(["-S", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-accel", "tcg", "-machine", "q35,memory-backend=m"]);
        command.args(["-m", &format!("{}M", self.size_mib), "-qmp", "stdio"]);
        command.args(["-object", &format!("{memory},id=m,size={}M", self.size_mib)]);
        if tls {
            let folder = self.folder.path().display();
            let peer = format!(
                "tls-creds-x509,id=tls0,dir={folder},endpoint={end},verify-peer=on,sanity-check=off"
            );
            command.args(["-object", &peer]);
        }
        let shared = theirs.try_clone().on("share", Path::new("a socket"))?;
        command.args(more);
        command.stdin(Stdio::from(OwnedFd::from(shared)));
        command.stdout(Stdio::from(OwnedFd::from(theirs)));
        let process = Guarded::start(&mut command)?;
        // Else QEMU's end stays open here, and a QEMU that dies is waited for.
        drop(command);
        let qmp = Qmp::open(qmp).map_err(failed)?;
        Ok(Qemu { process, qmp })
    }
}

/// A QEMU and its monitor; ends with this.
struct Qemu {
    process: Guarded,
    qmp: Qmp,
}

impl Qemu {
    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.qmp.execute(command, arguments).map_err(failed)
    }

    /// Waits for the end and returns its milliseconds, as QEMU counts them.
    fn migrated(&mut self) -> Result<f64> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let info = self.execute("query-migrate", &json!({}))?;
            match info.get("status").and_then(Value::as_str) {
                Some("completed") => {
                    let time = info.get("total-time").and_then(Value::as_f64);
                    return Ok(time.unwrap_or(f64::NAN));
                }
                Some("failed" | "cancelled") => {
                    return Err(Error::Usage(format!("QEMU's migration failed: {info}")));
                }
                _ => thread::sleep(Duration::from_millis(5)),
            }
        }
        Err(failed(io::ErrorKind::TimedOut.into()))
    }

    /// Processor seconds of all threads since the start, user and system.
    fn cpu_seconds(&self) -> Result<f64> {
        let path = PathBuf::from(format!("/proc/{}/stat", self.process.id()));
        let text = fs::read_to_string(&path).on("read", &path)?;
        // Behind the name in brackets: state is field 3, user and system time are 14 and 15.
        let fields = text
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let ticks: f64 = fields
            .skip(11)
            .take(2)
            .filter_map(|f| f.parse::<f64>().ok())
            .sum();
        let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        Ok(ticks / per_second as f64)
    }
}

/// How many times as fast, and what part of the processor.
fn ratios(medians: &BTreeMap<String, Cost>) -> Value {
    let ours = medians.get("casemate --provider aws-lc");
    let best = |names: &[&str]| {
        let costs = names.iter().filter_map(|name| medians.get(*name));
        costs
            .max_by(|a, b| a.gib_per_s.total_cmp(&b.gib_per_s))
            .copied()
    };
    let against = |other: Option<Cost>| {
        let (ours, other) = (ours?, other?);
        Some(json!({
            "speed": ours.gib_per_s / other.gib_per_s,
            "processor_per_gb": ours.cpu_s_per_gb / other.cpu_s_per_gb,
        }))
    };
    json!({
        "tls_and_seals_to_qemu_best_tls": against(best(&["qemu tls", "qemu tls multifd 4"])),
        "tls_and_seals_to_qemu_best_plain": against(best(&["qemu plain", "qemu plain multifd 4"])),
    })
}

/// Each figure by itself.
fn median(costs: &[Cost]) -> Cost {
    let middle = |of: fn(&Cost) -> f64| {
        let mut values: Vec<f64> = costs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    Cost {
        gib_per_s: middle(|cost| cost.gib_per_s),
        cpu_s_per_gb: middle(|cost| cost.cpu_s_per_gb),
    }
}

fn free_port() -> Result<u16> {
    let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    address.map(|address| address.port()).map_err(failed)
}

fn parse(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| failed(error.into()))
}

fn failed(error: io::Error) -> Error {
    Error::Usage(format!("bench-stream: {error}"))
}

const OURS: [&[&str]; 4] = [
    &["--protect", "none"],
    &["--protect", "tls"],
    &["--provider", "aws-lc"],
    &["--provider", "ring"],
];
const QEMU: [(&str, u64, bool); 4] = [
    ("qemu plain", 1, false),
    ("qemu plain multifd 4", 4, false),
    ("qemu tls", 1, true),
    ("qemu tls multifd 4", 4, true),
];
const NAME: &str = "qemu.bench";
const PATIENCE: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_medians_and_to_the_best_of_the_others() {
        let cost = |gib_per_s, cpu_s_per_gb| Cost {
            gib_per_s,
            cpu_s_per_gb,
        };
        let three = [cost(1.0, 9.0), cost(3.0, 7.0), cost(2.0, 8.0)];
        assert_eq!(median(&three), cost(2.0, 8.0));
        let medians = [
            ("casemate --provider aws-lc", cost(2.0, 1.0)),
            ("qemu tls", cost(0.5, 3.0)),
            ("qemu tls multifd 4", cost(0.8, 4.0)),
        ];
        let medians = medians.map(|(name, cost)| (name.to_owned(), cost));
        let ratios = ratios(&BTreeMap::from(medians));
        assert_eq!(
            ratios["tls_and_seals_to_qemu_best_tls"],
            json!({ "speed": 2.5, "processor_per_gb": 0.25 })
        );
        assert!(ratios["tls_and_seals_to_qemu_best_plain"].is_null());
    }
}
