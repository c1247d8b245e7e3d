//! The broker over real HTTP on 127.0.0.1, with reports that an EMULATED processor signed.

mod flow;
mod governed;
mod limits;
mod references;
mod vault;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use casemate_agent::client::Client;
use casemate_agent::source::{GuestReport, ReportSource, SourceError};
use casemate_attest::broker::evidence::{CertificateKind, GuestCertificate};
use casemate_attest::broker::{Clock, Decision, DecisionLog, NotRecorded, ResourcePath};
use casemate_attest::processor::snp::forge::{Authority, report_fields, tcb};
use casemate_attest::product::Product;
use casemate_attest::report::{ReportVersion, SigningKey};
use serde_json::Value;
use tokio::sync::oneshot;

use super::config::BrokerConfig;
use super::{Server, open_store, open_with, tls_config};

const DISK: &str = "default/key/disk";
const OTHER: &str = "default/key/other";
const SECRET: &[u8] = b"the disk's key";
const MEASUREMENT: u8 = 0x4d;
/// A host policy that leaves the choice to the owners'.
const HOST_POLICY: &str = "[host]\nname = \"broker-1\"\n[technologies]\nallowed = [\"sev-snp\"]\nallow_emulated = true\n\
    [limits]\nmax_vcpus = 1\nmax_memory_mib = 1\n";

/// A broker's folder; brokers come and go over it.
struct Case {
    folder: tempfile::TempDir,
}

/// A broker that runs.
struct Running {
    address: SocketAddr,
    clock: Arc<Hands>,
    log: Arc<Kept>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// A clock that tests set.
#[derive(Default)]
struct Hands(AtomicU64);

#[derive(Default)]
struct Kept(Mutex<Vec<Decision>>);

impl Clock for Hands {
    fn monotonic(&self) -> Duration {
        Duration::from_secs(self.0.load(Ordering::SeqCst))
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}

impl DecisionLog for Kept {
    fn record(&self, decision: &Decision) -> Result<(), NotRecorded> {
        self.0.lock().unwrap().push(decision.clone());
        Ok(())
    }
}

impl Case {
    /// One secret twice, for two launches; the policies name the shared emulated root.
    fn new() -> Self {
        let case = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let root = hex::encode(Authority::shared().identity().root_fingerprint());
        let emulated = format!("allow_emulated = true\nemulated_roots = [\"sha256:{root}\"]\n");
        case.write("any.toml", &emulated);
        for (file, measurement) in [("disk.toml", MEASUREMENT), ("other.toml", 0x0e)] {
            let digest = hex::encode([measurement; 48]);
            case.write(file, &format!("{emulated}measurements = [\"{digest}\"]\n"));
        }
        case.write("store.key", &"5a".repeat(32));
        case.write("host.toml", HOST_POLICY);
        case.configure("");
        let mut config = case.config();
        let store = open_store(&mut config).unwrap();
        for path in [DISK, OTHER] {
            store.put(&path.parse().unwrap(), SECRET).unwrap();
        }
        case
    }

    fn write(&self, file: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.folder.path().join(file);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn configure(&self, more: &str) {
        let text = format!(
            "name = \"broker-1\"\nstate_dir = \"state\"\npolicy = \"host.toml\"\nlisten = [\"tcp:127.0.0.1:0\"]\n\
             store = {{ file = \"secrets.sealed\", key = \"store.key\" }}\nsession = {{ policy = \"any.toml\" }}\n\
             [resources]\n\"{DISK}\" = \"disk.toml\"\n\"{OTHER}\" = \"other.toml\"\n\
             \"default/key/none\" = \"disk.toml\"\n{more}"
        );
        self.write("broker.toml", &text);
    }

    fn config(&self) -> BrokerConfig {
        BrokerConfig::load(&self.folder.path().join("broker.toml")).unwrap()
    }

    fn start(&self) -> Running {
        let mut config = self.config();
        let (clock, log) = (Arc::new(Hands::default()), Arc::new(Kept::default()));
        let opened = open_with(&mut config, clock.clone(), log.clone()).unwrap();
        let tls = config.tls.as_ref().map(|files| tls_config(files).unwrap());
        let (ready, address) = std::sync::mpsc::channel();
        let (end, ended) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let broker = opened.broker.clone();
                let server = Server::bind(broker, &config.listen, tls, config.limits);
                let server = server.await.unwrap();
                ready.send(server.addresses()[0]).unwrap();
                server
                    .run(async {
                        let _ = ended.await;
                    })
                    .await;
            });
        });
        Running {
            address: address.recv().unwrap(),
            clock,
            log,
            end: Some(end),
            thread: Some(thread),
        }
    }
}

impl Running {
    fn client(&self) -> Client {
        let endpoint = format!("http://{}", self.address).parse().unwrap();
        Client::new(endpoint, Duration::from_secs(20))
    }

    /// One request over a connection of its own: status, head, body.
    fn ask(&self, method: &str, path: &str, cookie: Option<&str>, body: &[u8]) -> Reply {
        let cookie = cookie.map_or(String::new(), |c| {
            format!("Cookie: a=b; kbs-session-id={c}\r\n")
        });
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: broker\r\nConnection: close\r\n{cookie}Content-Length: {}\r\n\r\n",
            body.len()
        );
        let mut stream = TcpStream::connect(self.address).unwrap();
        let _ = stream.write_all(&[head.as_bytes(), body].concat());
        read_reply(&mut stream)
    }

    /// Opens a session: its name and its nonce.
    fn open(&self) -> (String, String) {
        let body = casemate_attest::broker::protocol::Request::message().to_string();
        let reply = self.ask("POST", "/kbs/v0/auth", None, body.as_bytes());
        assert_eq!(reply.status, 200, "{reply:?}");
        let cookie = reply.head.split("kbs-session-id=").nth(1).unwrap();
        let name = cookie.split(';').next().unwrap().to_owned();
        let nonce = reply.json()["nonce"].as_str().unwrap().to_owned();
        (name, nonce)
    }

    fn attest(&self, session: &str, body: &Value) -> Reply {
        let body = body.to_string();
        self.ask("POST", "/kbs/v0/attest", Some(session), body.as_bytes())
    }

    fn resource(&self, session: &str, path: &str) -> Reply {
        let path = format!("/kbs/v0/resource/{path}");
        self.ask("GET", &path, Some(session), b"")
    }

    /// Lets what is under way end, and waits for it.
    fn stop(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        if let Some(end) = self.end.take() {
            let _ = end.send(());
        }
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.finish();
    }
}

#[derive(Debug)]
struct Reply {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The refusal's code.
    fn code(&self) -> String {
        let kind = self.json()["type"].as_str().unwrap().to_owned();
        kind.strip_prefix("urn:casemate:broker:")
            .unwrap()
            .to_owned()
    }
}

fn read_reply(stream: &mut impl Read) -> Reply {
    let mut bytes = Vec::new();
    // A refusal of a long body may end with a reset; what came before it counts.
    let mut buffer = [0; 4096];
    while let Ok(read) = stream.read(&mut buffer)
        && read > 0
    {
        bytes.extend(&buffer[..read]);
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, _) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    let at = (head.len() + 4).min(bytes.len());
    Reply {
        status: status.unwrap_or(0),
        head: head.to_ascii_lowercase(),
        body: bytes.split_off(at),
    }
}

/// An EMULATED guest: reports that the forge's processor signs.
struct Emulated {
    authority: &'static Authority,
    measurement: u8,
    product: Product,
    key: SigningKey,
    chain: bool,
}

impl Default for Emulated {
    fn default() -> Self {
        Self {
            authority: Authority::shared(),
            measurement: MEASUREMENT,
            product: Product::Milan,
            key: SigningKey::Vcek,
            chain: true,
        }
    }
}

impl ReportSource for Emulated {
    fn report(&mut self, report_data: &[u8; 64]) -> Result<GuestReport, SourceError> {
        let identity = self.authority.identity();
        let levels = tcb(self.product);
        let (key, issuer, kind) = match self.key {
            SigningKey::Vcek => (
                identity.vcek(self.product, levels).unwrap(),
                self.authority.ask(),
                CertificateKind::Vcek,
            ),
            SigningKey::Vlek => (
                identity.vlek(self.product, levels, "a cloud").unwrap(),
                self.authority.asvk(),
                CertificateKind::Vlek,
            ),
        };
        let mut fields = report_fields(identity, self.product, ReportVersion::V3, self.key, levels);
        fields.report_data = *report_data;
        fields.measurement = [self.measurement; 48];
        let report = key.sign_report(&fields).unwrap().to_vec();
        let mut certificates = vec![(kind, key.certificate())];
        certificates.push((CertificateKind::Ask, issuer));
        certificates.push((CertificateKind::Ark, self.authority.ark()));
        let certificates = certificates.into_iter().map(|(kind, bytes)| {
            let bytes = bytes.to_vec();
            GuestCertificate { kind, bytes }
        });
        Ok(GuestReport {
            report,
            certificates: certificates.take(if self.chain { 3 } else { 0 }).collect(),
            emulated: true,
        })
    }
}

fn path(text: &str) -> ResourcePath {
    text.parse().unwrap()
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}
