//! Moves memory between two processes and says how fast, at what cost to each.
//!
//! The destination listens. The first connection is the conversation (a line of JSON each way: what to do, ready,
//! what it cost), the next ones carry the memory. In one command both ends are processes of this machine.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_crypto_migrate::Provider;
use casemate_crypto_migrate::destination::{self, DestinationConfig};
use casemate_crypto_migrate::dev_ca::DevCa;
use casemate_crypto_migrate::guest::GuestOffer;
use casemate_crypto_migrate::identity::Local;
use casemate_crypto_migrate::identity::{
    self, AllowList, AllowedPeer, HostIdentity, LocalSigner, Pinned, TrustAnchors,
};
use casemate_crypto_migrate::preamble::Ticket;
use casemate_crypto_migrate::session::MAX_STREAMS;
use casemate_crypto_migrate::source::{self, SourceConfig};
use casemate_crypto_migrate::tls::{self, TlsError, TlsStream};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::BenchError;
use super::machine::{Arriving, Leaving};
use super::memory::BenchMemory;
use super::parts::Sum;
use super::unprotected::{self, Pipe};
use super::usage::Usage;

/// What protects the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Protect {
    /// Nothing: TCP.
    None,
    /// TLS 1.3, mutual.
    Tls,
    /// TLS 1.3 and a seal for every page: what every migration uses.
    #[value(name = "tls+mac")]
    #[serde(rename = "tls+mac")]
    TlsMac,
}

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Bytes of memory, whole pages.
    pub size: u64,
    /// What protects the stream.
    pub protect: Protect,
    /// Who does the cryptography, by name.
    pub provider: String,
    /// Connections that carry memory.
    pub streams: u16,
}

impl Plan {
    fn provider(&self) -> Result<Provider, BenchError> {
        self.provider.parse().map_err(BenchError::Usage)
    }

    /// Also of what the other end asks for.
    fn check_streams(&self) -> Result<(), BenchError> {
        match (1..=MAX_STREAMS).contains(&self.streams) {
            true => Ok(()),
            false => Err(BenchError::Usage(format!(
                "{} connections are not 1 to {MAX_STREAMS}",
                self.streams
            ))),
        }
    }
}

/// The result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Bytes of memory.
    pub size: u64,
    /// What protected the stream.
    pub protect: Protect,
    /// Connections that carried memory.
    pub streams: u16,
    /// Who did the cryptography.
    pub provider: Provider,
    /// From the first byte of the connection to the last page placed and acknowledged.
    pub seconds: f64,
    /// GiB (2^30 bytes) of memory per second of that time.
    pub gib_per_s: f64,
    /// Processor seconds per GB (10^9 bytes) of memory, all threads of the source.
    pub cpu_s_per_gb_source: f64,
    /// The same of the destination.
    pub cpu_s_per_gb_destination: f64,
    /// Peak memory of the source in MiB, the guest's not counted.
    pub peak_rss_mib_source: f64,
    /// The same of the destination.
    pub peak_rss_mib_destination: f64,
    /// From the last byte of memory to the word that the other end runs: state, manifest, commit. Without page
    /// seals: to the word that all is placed.
    pub switch_ms: f64,
    /// What its parts cost alone, in the same run.
    pub parts: Sum,
}

/// Both ends on this machine, over loopback.
pub fn both(plan: Plan) -> Result<Report, BenchError> {
    let keys = nix::unistd::mkdtemp(&std::env::temp_dir().join("casemate-bench-XXXXXX"))
        .map_err(|e| BenchError::System("mkdtemp", e.into()))?;
    let report = Keys::make(&keys).and_then(|()| {
        let (child, address) = spawn_destination(&keys)?;
        let report = connect(address, &keys, plan);
        end(child, report.is_ok())?;
        report
    });
    // The keys are of no further use; a folder that stays behind is no failure of the measurement.
    if let Err(error) = fs::remove_dir_all(&keys) {
        tracing::warn!(%error, folder = %keys.display(), "cannot be removed");
    }
    report
}

/// The destination: serves one benchmark, then ends; `with_parent` ends it with the process that started it. Prints
/// the address it listens on as one line of JSON.
pub fn listen(address: SocketAddr, keys: &Path, with_parent: bool) -> Result<(), BenchError> {
    if with_parent {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
            .map_err(|e| BenchError::System("PR_SET_PDEATHSIG", e.into()))?;
    }
    if !keys.join(AUTHORITY).exists() {
        Keys::make(keys)?;
    }
    let listener = TcpListener::bind(address).map_err(BenchError::system("bind"))?;
    let address = listener
        .local_addr()
        .map_err(BenchError::system("getsockname"))?;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, &Listening { listening: address })
        .map_err(|e| BenchError::System("the address", e.into()))?;
    writeln!(out)
        .and_then(|()| out.flush())
        .map_err(BenchError::system("the address"))?;
    let mut talk = Talk::new(accept(&listener)?)?;
    let plan: Plan = talk.hear()?;
    plan.check_streams()?;
    let keys = Keys::read(keys, Side::Destination, plan.provider()?)?;
    let memory = BenchMemory::populated(plan.size)?;
    talk.say(&Ready {})?;
    let data = accept(&listener)?;
    let usage = Usage::start()?;
    match plan.protect {
        Protect::None | Protect::Tls => {
            let further = (1..plan.streams).map(|_| accept(&listener));
            let all = std::iter::once(Ok(data)).chain(further);
            let pipes = all.map(|data| keys.pipe(data?, plan.protect, tls::accept));
            unprotected::receive(pipes.collect::<Result<_, _>>()?, &memory)?;
        }
        Protect::TlsMac => receive(data, &listener, keys.local, &memory)?,
    }
    talk.say(&Cost {
        cpu_s: usage.cpu_seconds()?,
        peak_rss_mib: usage.peak_rss_mib()?,
        checksum: memory.checksum()?,
    })
}

/// The source: moves the memory to a destination that listens.
pub fn connect(address: SocketAddr, keys: &Path, plan: Plan) -> Result<Report, BenchError> {
    let provider = plan.provider()?;
    plan.check_streams()?;
    let keys = Keys::read(keys, Side::Source, provider)?;
    let memory = BenchMemory::random(plan.size)?;
    let connect = || TcpStream::connect(address).map_err(BenchError::system("connect"));
    let mut talk = Talk::new(connect()?)?;
    talk.say(&plan)?;
    let Ready {} = talk.hear()?;
    let dial = || {
        let data = TcpStream::connect(address)?;
        data.set_nodelay(true)?;
        Ok(data)
    };
    let data = dial().map_err(BenchError::system("connect"))?;
    let (usage, begun) = (Usage::start()?, Instant::now());
    let switch = match plan.protect {
        Protect::None | Protect::Tls => {
            let further = (1..plan.streams).map(|_| dial());
            let all = std::iter::once(Ok(data)).chain(further);
            let pipes = all.map(|data| {
                let data = data.map_err(BenchError::system("connect"))?;
                keys.pipe(data, plan.protect, tls::connect)
            });
            unprotected::send(pipes.collect::<Result<_, _>>()?, &memory)?
        }
        Protect::TlsMac => migrate(data, &dial, plan.streams, keys.local, &memory)?,
    };
    let seconds = begun.elapsed().as_secs_f64();
    let (cpu_s, peak_rss_mib_source) = (usage.cpu_seconds()?, usage.peak_rss_mib()?);
    let there: Cost = talk.hear()?;
    if there.checksum != memory.checksum()? {
        return Err(BenchError::Peer(
            "holds other memory than was sent".to_owned(),
        ));
    }
    let gigabytes = plan.size as f64 / 1e9;
    let parts = Sum::measure(
        &memory,
        plan.protect,
        provider,
        (cpu_s + there.cpu_s) / gigabytes,
        seconds / gigabytes,
    )?;
    Ok(Report {
        size: plan.size,
        protect: plan.protect,
        streams: plan.streams,
        provider,
        seconds,
        gib_per_s: plan.size as f64 / f64::from(1 << 30) / seconds,
        cpu_s_per_gb_source: cpu_s / gigabytes,
        cpu_s_per_gb_destination: there.cpu_s / gigabytes,
        peak_rss_mib_source,
        peak_rss_mib_destination: there.peak_rss_mib,
        switch_ms: switch.as_secs_f64() * 1e3,
        parts,
    })
}

/// Takes the memory in by the engine; the further connections come to the same listener.
fn receive(
    data: TcpStream,
    listener: &TcpListener,
    local: Local,
    memory: &BenchMemory,
) -> Result<(), BenchError> {
    let mut config = DestinationConfig::new(local);
    config.ticket = Ticket::random().map_err(|e| BenchError::Engine(e.to_string()))?;
    let ticket = config.ticket;
    listener
        .set_nonblocking(true)
        .map_err(BenchError::system("FIONBIO"))?;
    let mut arrive = |wait: Duration| {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(wait.min(ACCEPT_STEP));
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // There is but one move here: another ticket is somebody else's.
        Ok((Ticket::read(&mut stream)? == ticket).then_some(stream))
    };
    destination::serve_over(
        data,
        &mut arrive,
        &config,
        &mut Arriving(memory),
        &mut |_| {},
    )
    .map(drop)
    .map_err(|e| BenchError::Engine(format!("{}: {e}", e.code())))
}

fn migrate(
    data: TcpStream,
    dial: &dyn Fn() -> std::io::Result<TcpStream>,
    streams: u16,
    local: Local,
    memory: &BenchMemory,
) -> Result<Duration, BenchError> {
    let mut config = SourceConfig::new(local, Side::Destination.name());
    config.streams = streams;
    let mut dial = |ticket: &Ticket| {
        let mut stream = dial()?;
        ticket.write(&mut stream)?;
        Ok(stream)
    };
    config.deadlines.finish = PATIENCE;
    let offer = GuestOffer {
        vm_id: [1; 16],
        name: "bench".to_owned(),
        epoch: 1,
        memory: memory.ranges(),
        description: Vec::new(),
    };
    let guest = &mut Leaving(memory);
    let outcome = source::migrate_over(data, &mut dial, &config, &offer, guest, &mut |_| {})
        .map_err(|e| BenchError::Engine(format!("{}: {e}", e.code())))?;
    Ok(Duration::from_secs_f64(outcome.downtime_ms / 1e3))
}

fn spawn_destination(keys: &Path) -> Result<(Child, SocketAddr), BenchError> {
    let program = std::env::current_exe().map_err(BenchError::system("current_exe"))?;
    let mut child = Command::new(program)
        .args([
            "bench",
            "migrate",
            "--listen",
            "127.0.0.1:0",
            "--with-parent",
            "--keys",
        ])
        .arg(keys)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(BenchError::system("starting the destination"))?;
    let out = child
        .stdout
        .take()
        .ok_or_else(|| BenchError::Peer("has no output".to_owned()))?;
    let Listening { listening } = read_line(&mut BufReader::new(out))?;
    Ok((child, listening))
}

fn end(mut child: Child, done: bool) -> Result<(), BenchError> {
    if !done {
        // It may wait for us; it may also have ended already.
        let _ = child.kill();
    }
    let status = child
        .wait()
        .map_err(BenchError::system("waiting for the destination"))?;
    if done && !status.success() {
        return Err(BenchError::Peer(format!("ended with {status}")));
    }
    Ok(())
}

fn accept(listener: &TcpListener) -> Result<TcpStream, BenchError> {
    let (stream, _) = listener.accept().map_err(BenchError::system("accept"))?;
    stream
        .set_nodelay(true)
        .map_err(BenchError::system("TCP_NODELAY"))?;
    Ok(stream)
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listening {
    listening: SocketAddr,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ready {}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cost {
    cpu_s: f64,
    peak_rss_mib: f64,
    checksum: u32,
}

/// The conversation, a bounded line of JSON each way.
struct Talk {
    reader: BufReader<TcpStream>,
}

impl Talk {
    fn new(stream: TcpStream) -> Result<Self, BenchError> {
        stream
            .set_read_timeout(Some(PATIENCE))
            .map_err(BenchError::system("SO_RCVTIMEO"))?;
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    fn say(&mut self, message: &impl Serialize) -> Result<(), BenchError> {
        let mut line =
            serde_json::to_vec(message).map_err(|e| BenchError::System("a line", e.into()))?;
        line.push(b'\n');
        let stream = self.reader.get_mut();
        stream.write_all(&line).map_err(BenchError::system("send"))
    }

    fn hear<M: DeserializeOwned>(&mut self) -> Result<M, BenchError> {
        read_line(&mut self.reader)
    }
}

fn read_line<M: DeserializeOwned>(reader: &mut impl BufRead) -> Result<M, BenchError> {
    let mut line = String::new();
    reader
        .take(MAX_LINE)
        .read_line(&mut line)
        .map_err(BenchError::system("receive"))?;
    if line.is_empty() {
        return Err(BenchError::Peer("ended early".to_owned()));
    }
    serde_json::from_str(&line).map_err(|e| BenchError::Peer(format!("says nonsense: {e}")))
}

#[derive(Clone, Copy)]
enum Side {
    Source,
    Destination,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Source => "source.bench",
            Side::Destination => "destination.bench",
        }
    }

    fn other(self) -> Self {
        match self {
            Side::Source => Side::Destination,
            Side::Destination => Side::Source,
        }
    }
}

/// One end's identity and whom it allows.
struct Keys {
    local: Local,
}

impl Keys {
    /// Makes an authority and both ends' certificates in a folder.
    fn make(folder: &Path) -> Result<(), BenchError> {
        fs::create_dir_all(folder).map_err(BenchError::system("the folder of keys"))?;
        let authority = DevCa::new("bench")?;
        for side in [Side::Source, Side::Destination] {
            let host = authority.issue(side.name())?;
            let [certificate, key] = files(folder, side);
            write_file(&certificate, &host.certificate_pem)?;
            write_file(&key, &host.key_pem)?;
        }
        write_file(&folder.join(AUTHORITY), authority.certificate_pem())
    }

    fn read(folder: &Path, side: Side, provider: Provider) -> Result<Self, BenchError> {
        let [certificate, key] = files(folder, side);
        let [other, _] = files(folder, side.other());
        let signer = Arc::new(LocalSigner::from_pem(&read_file(&key)?)?);
        let identity = HostIdentity::from_pem(&read_file(&certificate)?, signer.clone())?;
        let peer = HostIdentity::from_pem(&read_file(&other)?, signer)?;
        let allowed = AllowedPeer {
            name: side.other().name().to_owned(),
            identity: Pinned {
                san: side.other().name().to_owned(),
                spki_sha256: peer.as_peer().spki_sha256,
            },
            path: identity::Path::Direct,
        };
        Ok(Self {
            local: Local {
                identity,
                anchors: TrustAnchors::from_pem(&read_file(&folder.join(AUTHORITY))?)?,
                allow: AllowList::new(vec![allowed]),
                provider,
            },
        })
    }

    /// One connection without page seals.
    fn pipe(
        &self,
        stream: TcpStream,
        protect: Protect,
        shake: fn(TcpStream, &Local, Duration) -> Result<TlsStream<TcpStream>, TlsError>,
    ) -> Result<Pipe, BenchError> {
        Ok(match protect {
            Protect::None => Pipe::Clear(stream),
            _ => Pipe::Tls(Box::new(shake(stream, &self.local, PATIENCE)?)),
        })
    }
}

fn files(folder: &Path, side: Side) -> [PathBuf; 2] {
    ["crt", "key"].map(|kind| folder.join(format!("{}.{kind}", side.name())))
}

fn write_file(path: &Path, text: &str) -> Result<(), BenchError> {
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(BenchError::system("writing the keys"))
}

fn read_file(path: &Path) -> Result<String, BenchError> {
    fs::read_to_string(path).map_err(|e| BenchError::Usage(format!("{}: {e}", path.display())))
}

const AUTHORITY: &str = "authority.crt";
const MAX_LINE: u64 = 4096;
const ACCEPT_STEP: Duration = Duration::from_millis(1);
/// Filling a destination's memory takes its time.
const PATIENCE: Duration = Duration::from_secs(120);
