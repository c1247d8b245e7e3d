//! `attest/OWNERS.md`, executed: its `sh` blocks in order, with the real programs, in one folder.
//!
//! An EMULATED processor signs the reports and a server on 127.0.0.1 stands in for AMD's. Which blocks are not
//! executed stands in [`NOT_EXECUTED`]; a block of any other kind fails the test.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "../../attest/tests/common/kds_server.rs"]
mod kds_server;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use casemate_attest::measure::guest::{Firmware, GuestDescription, Technology};
use casemate_attest::measure::id_block::{IdAuth, IdBlock};
use casemate_attest::measure::kernel_hashes::{FileHash, KernelHashes};
use casemate_attest::measure::ovmf::Ovmf;
use casemate_attest::measure::vcpu::{CpuModel, VcpuCount};
use casemate_attest::measure::vmsa::{Profile, SevFeatures};
use casemate_attest::processor::snp::ReportFields;
use casemate_attest::processor::snp::forge::{Authority, report_fields, tcb};
use casemate_attest::product::Product;
use casemate_attest::report::{ReportVersion, SigningKey};
use kds_server::{Answer, KdsServer};

/// What the page shows but the test does not run, each by its first line.
const NOT_EXECUTED: [&str; 1] = ["[vault]"];
/// What runs, so that no block is lost.
const EXECUTED: usize = 14;
/// The port that the page names; the test takes a free one.
const PORT: &str = ":8080";

/// One fenced block.
struct Block {
    line: usize,
    kind: String,
    text: String,
}

/// The folder, the programs, and everything that stands in for a machine.
struct Stage {
    folder: tempfile::TempDir,
    programs: PathBuf,
    port: u16,
    environment: Vec<(&'static str, String)>,
    background: Vec<Child>,
    _service: KdsServer,
}

#[test]
fn the_owners_page_holds() {
    let mut stage = Stage::new();
    let (mut executed, mut left, mut printed) = (0, Vec::new(), None);
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../attest/OWNERS.md");
    for block in blocks(&fs::read_to_string(page).unwrap()) {
        match block.kind.as_str() {
            "sh" => printed = Some(stage.run(&block)),
            "sh background" => stage.start(&block),
            "text" => {
                let printed: String = printed.take().expect("output stands below its block");
                shows(&block, &printed);
                continue;
            }
            "toml" => left.push(block.text.lines().next().unwrap().to_owned()),
            other => panic!("OWNERS.md:{}: a `{other}` block is not run", block.line),
        }
        executed += usize::from(block.kind != "toml");
    }
    assert_eq!(left, NOT_EXECUTED);
    assert_eq!(executed, EXECUTED);
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let ovmf = vector("measurement/ovmf_AmdSev_suffix.bin");
        fs::write(at.join("OVMF.amdsev.fd"), ovmf).unwrap();
        fs::write(at.join("vmlinuz"), [0xaa; 8192]).unwrap();
        fs::write(at.join("initrd"), [0x55; 4096]).unwrap();
        let authority = Authority::shared();
        fs::create_dir(at.join("emulated")).unwrap();
        fs::write(at.join("emulated/ark.der"), authority.ark()).unwrap();
        processor(at);
        let service = service();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        let root = hex::encode(authority.identity().root_fingerprint());
        let environment = vec![
            (
                "EMULATED_GUEST",
                "--emulated-report-socket processor.sock".to_owned(),
            ),
            ("EMULATED_MIRROR", format!("--base-url {}", service.base())),
            (
                "EMULATED_TRUST",
                format!("--emulated-root emulated/ark.der --allow-emulated sha256:{root}"),
            ),
            ("EMULATED_CHAIN", "--chain emulated".to_owned()),
            (
                "EMULATED_POLICY",
                format!("allow_emulated = true\nemulated_roots = [\"sha256:{root}\"]"),
            ),
        ];
        Self {
            folder,
            programs: programs(),
            port,
            environment,
            background: Vec::new(),
            _service: service,
        }
    }

    /// What a block printed, on both outputs; it must succeed.
    fn run(&self, block: &Block) -> String {
        let output = self.command(&block.text).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(
            output.status.success(),
            "OWNERS.md:{}: {}\n{text}",
            block.line,
            output.status
        );
        text
    }

    /// Starts a block and waits until it listens.
    fn start(&mut self, block: &Block) {
        let text = format!("exec {}", block.text);
        let child = self.command(&text).stdin(Stdio::null()).spawn().unwrap();
        self.background.push(child);
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            let ended = self.background.last_mut().unwrap().try_wait().unwrap();
            assert_eq!(ended, None, "OWNERS.md:{}: it ended", block.line);
            assert!(Instant::now() < end, "nothing listens on {address}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn command(&self, script: &str) -> Command {
        let script = script.replace(PORT, &format!(":{}", self.port));
        let path = std::env::var("PATH").unwrap();
        let mut command = Command::new("bash");
        command
            .args(["-euo", "pipefail", "-c", &script])
            .current_dir(self.folder.path())
            .env("PATH", format!("{}:{path}", self.programs.display()))
            .env_remove("CASEMATE_KDS_CACHE")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for child in &mut self.background {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The fenced blocks of a page.
fn blocks(page: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (number, line) in page.lines().enumerate() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(kind), None) => {
                open = Some(Block {
                    line: number + 1,
                    kind: kind.to_owned(),
                    text: String::new(),
                });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => block.text += &format!("{line}\n"),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "the last block has no end");
    blocks
}

/// Each line of the page's output is in what was printed; `…` stands for anything, spaces do not count.
fn shows(block: &Block, printed: &str) {
    for wanted in block.text.lines() {
        let found = printed.lines().any(|line| {
            let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            let line = words(line);
            let mut rest = line.as_str();
            wanted.split('…').map(words).all(|part| {
                let at = rest.find(&part);
                rest = at.map_or("", |at| &rest[at + part.len()..]);
                at.is_some()
            })
        });
        assert!(
            found,
            "OWNERS.md:{}: no line is `{wanted}` in\n{printed}",
            block.line
        );
    }
}

/// A folder with both programs. The agent is another package's: a build of the workspace has made it; where there is
/// none yet, cargo makes it now.
fn programs() -> PathBuf {
    let casemate = Path::new(env!("CARGO_BIN_EXE_casemate"));
    let folder = casemate.parent().unwrap().to_owned();
    if !folder.join("casemate-agent").exists() {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "casemate-agent",
        ]);
        let built = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status();
        assert!(built.unwrap().success() && folder.join("casemate-agent").exists());
    }
    folder
}

/// In the place of AMD's key service.
fn service() -> KdsServer {
    KdsServer::start(|path, _| {
        let authority = Authority::shared();
        let product = Product::Genoa;
        let pem = |der: &[u8]| {
            let digits = base64(der);
            format!("-----BEGIN CERTIFICATE-----\n{digits}-----END CERTIFICATE-----\n")
        };
        match path {
            "/vcek/v1/Genoa/cert_chain" => {
                Answer::Body((pem(authority.ask()) + &pem(authority.ark())).into_bytes())
            }
            "/vcek/v1/Genoa/crl" => Answer::Body(authority.crl(|_| {})),
            path if path.starts_with("/vcek/v1/Genoa/") => {
                let vcek = authority.identity().vcek(product, tcb(product)).unwrap();
                Answer::Body(vcek.certificate().to_vec())
            }
            _ => Answer::Status(404, vec![]),
        }
    })
}

/// An EMULATED processor's socket in `folder`, with the guest that the operator launched from the files there.
fn processor(folder: &Path) {
    let listener = UnixListener::bind(folder.join("processor.sock")).unwrap();
    let folder = folder.to_owned();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut request = [0; 96];
            stream.read_exact(&mut request).unwrap();
            let mut fields = launched(&folder);
            fields.report_data.copy_from_slice(&request[..64]);
            let answer = Authority::shared().report_answer(Product::Genoa, &fields);
            let _ = stream.write_all(&answer);
        }
    });
}

/// The launch: the digest of the page's guest, and its ID block, checked as firmware does.
fn launched(folder: &Path) -> ReportFields {
    let read = |name: &str| fs::read(folder.join(name)).unwrap();
    let product = Product::Genoa;
    let identity = Authority::shared().identity();
    let (kind, version) = (SigningKey::Vcek, ReportVersion::V5);
    let mut fields = report_fields(identity, product, version, kind, tcb(product));
    let ovmf = read("OVMF.amdsev.fd");
    let firmware = Firmware::new(Ovmf::parse(&ovmf).unwrap());
    let initrd = FileHash::of(&read("initrd"));
    let kernel = FileHash::of(&read("vmlinuz"));
    let guest = GuestDescription {
        technology: Technology::Snp,
        firmware: &firmware,
        kernel: Some(KernelHashes::new(
            &kernel,
            Some(&initrd),
            Some("console=ttyS0"),
        )),
        vcpus: VcpuCount::try_from(4).unwrap(),
        signature: "EPYC-Genoa".parse::<CpuModel>().unwrap().signature(),
        features: SevFeatures::SNP_ACTIVE,
        profile: Profile::Qemu,
    };
    let digest = guest.digest().unwrap();
    fields.measurement.copy_from_slice(digest.as_bytes());
    let block = IdBlock::parse(&read("launch/id-block.bin")).unwrap();
    let auth = IdAuth::parse(&read("launch/id-auth.bin")).unwrap();
    let keys = auth.verify(&block).unwrap();
    assert_eq!(block.launch_digest.as_bytes(), &fields.measurement);
    fields.policy = block.policy;
    fields.guest_svn = block.guest_svn;
    fields.id_key_digest = *keys.id_key.as_bytes();
    fields
}

/// In lines of 64 digits.
fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    let digits = base64::engine::general_purpose::STANDARD.encode(bytes);
    let lines = digits.as_bytes().chunks(64);
    lines
        .map(|line| String::from_utf8(line.to_vec()).unwrap() + "\n")
        .collect()
}

fn vector(name: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../attest/tests/vectors");
    fs::read(root.join(name)).unwrap()
}

const PATIENCE: Duration = Duration::from_secs(60);
