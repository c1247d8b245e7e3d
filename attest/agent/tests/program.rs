//! The program itself, against a broker on 127.0.0.1 and an EMULATED processor behind a socket.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that cannot go on ends"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use casemate_attest::broker::evidence::CertificateKind;
use casemate_attest::broker::{
    Appraiser, Broker, Clock, EphemeralIssuer, Epoch, GuestEvidence, Limits, LogOnly, Parts,
    Refusal, ResourcePath, ResourceStore, Scope, StoreError,
};
use casemate_attest::processor::snp::forge::{Authority, report_fields, tcb};
use casemate_attest::product::Product;
use casemate_attest::report::{Report, ReportVersion, SigningKey};
use casemate_attest::verify::{Expectation, Nonce, OwnerPolicy, SnpEvidence, Verdict, verify_snp};

const SECRET: &[u8] = b"\x00the disk's key\n";
const DISK: &str = "default/key/disk";

/// Allows the launch that the emulated guest has, and only for the disk.
struct Owner(OwnerPolicy);

impl Appraiser for Owner {
    fn appraise(
        &self,
        scope: Scope<'_>,
        evidence: &GuestEvidence,
        report_data: &[u8; 64],
        now: SystemTime,
    ) -> Option<Verdict> {
        if matches!(scope, Scope::Resource(path) if path.as_str() != DISK) {
            return None;
        }
        let nonce = Nonce::new(report_data).unwrap();
        let chain = [CertificateKind::Ask, CertificateKind::Ark]
            .map(|kind| evidence.certificate(kind).unwrap_or_default().to_vec());
        let given = SnpEvidence {
            report: evidence.report.as_bytes(),
            leaf: evidence
                .certificate(CertificateKind::Vcek)
                .unwrap_or_default(),
            certificates: &chain,
            crl: None,
        };
        let expectation = Expectation {
            nonce: Some(&nonce),
            references: &[],
            clock: now,
        };
        Some(verify_snp(&given, &self.0, &expectation))
    }
}

struct One;

impl ResourceStore for One {
    fn get(&self, _: &ResourcePath) -> Result<Option<zeroize::Zeroizing<Vec<u8>>>, StoreError> {
        Ok(Some(zeroize::Zeroizing::new(SECRET.to_vec())))
    }
}

struct Still;

impl Clock for Still {
    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}

fn broker(measurement: u8) -> Broker {
    let root = hex::encode(Authority::shared().identity().root_fingerprint());
    let digest = hex::encode([measurement; 48]);
    let policy = format!(
        "allow_emulated = true\nemulated_roots = [\"sha256:{root}\"]\nmeasurements = [\"{digest}\"]\n"
    );
    let parts = Parts {
        appraiser: Arc::new(Owner(OwnerPolicy::parse(policy.as_bytes()).unwrap())),
        store: Arc::new(One),
        tokens: Arc::new(EphemeralIssuer::generate().unwrap()),
        log: Arc::new(LogOnly),
        clock: Arc::new(Still),
    };
    Broker::new(parts, Limits::default(), Epoch::durable(1))
}

/// Serves `broker`, after so many connections that are closed at once.
fn serve(broker: Broker, broken: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (at, stream) in listener.incoming().map_while(Result::ok).enumerate() {
            if at >= broken {
                answer(&broker, stream);
            }
        }
    });
    address
}

fn answer(broker: &Broker, stream: TcpStream) {
    let mut reader = BufReader::new(stream);
    let (mut head, mut line) = (String::new(), String::new());
    while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
        head.push_str(&line);
        line.clear();
    }
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
    let length = field("Content-Length: ").unwrap().parse().unwrap();
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let session = field("Cookie: kbs-session-id=");
    let path = head
        .split(' ')
        .nth(1)
        .unwrap()
        .strip_prefix("/kbs/v0")
        .unwrap();
    let mut cookie = String::new();
    let result = match path {
        "/auth" => broker.auth(&body).map(|opened| {
            cookie = format!("Set-Cookie: kbs-session-id={}; Path=/\r\n", opened.session);
            serde_json::to_string(&opened.challenge).unwrap()
        }),
        "/attest" => broker
            .attest(session, &body)
            .map(|accepted| serde_json::to_string(&accepted.response).unwrap()),
        path => broker
            .resource(session, path.strip_prefix("/resource/").unwrap())
            .map(|released| serde_json::to_string(&released.jwe).unwrap()),
    };
    let (status, text) = match result {
        Ok(text) => (200, text),
        Err(refusal) => (refusal.status(), refused(&refusal)),
    };
    let text = format!(
        "HTTP/1.1 {status} X\r\n{cookie}Content-Length: {}\r\n\r\n{text}",
        text.len()
    );
    reader.get_mut().write_all(text.as_bytes()).unwrap();
}

fn refused(refusal: &Refusal) -> String {
    serde_json::to_string(&refusal.information()).unwrap()
}

/// An emulated processor's socket in `folder`: each connection gets a report of the guest with this launch digest.
fn processor(folder: &Path, measurement: u8) -> PathBuf {
    let path = folder.join("processor.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut request = [0; 96];
            stream.read_exact(&mut request).unwrap();
            assert_eq!(request[68..], [0; 28]);
            let _ = stream.write_all(&response(&request[..64], request[64], measurement));
        }
    });
    path
}

fn response(report_data: &[u8], vmpl: u8, measurement: u8) -> Vec<u8> {
    if vmpl != 0 {
        let mut refusal = vec![0; 32];
        refusal[0] = 0x16;
        return refusal;
    }
    let (product, authority) = (Product::Genoa, Authority::shared());
    let mut fields = report_fields(
        authority.identity(),
        product,
        ReportVersion::V5,
        SigningKey::Vcek,
        tcb(product),
    );
    fields.report_data.copy_from_slice(report_data);
    fields.measurement = [measurement; 48];
    authority.report_answer(product, &fields)
}

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_casemate-agent"))
        .args(arguments)
        .output()
        .unwrap()
}

fn fetch(address: SocketAddr, socket: &Path, more: &[&str]) -> Output {
    let broker = format!("http://{address}");
    let socket = socket.to_str().unwrap();
    let mut arguments = vec![
        "fetch",
        "--broker",
        &broker,
        "--emulated-report-socket",
        socket,
    ];
    arguments.extend(more);
    run(&arguments)
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_secret_is_fetched_to_standard_output_or_a_private_file() {
    let folder = tempfile::tempdir().unwrap();
    let socket = processor(folder.path(), 0x4d);
    let address = serve(broker(0x4d), 0);
    let output = fetch(address, &socket, &["--resource", DISK]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_eq!(output.stdout, SECRET);
    assert!(said(&output).contains("EMULATED evidence, NOT AMD"));
    let file = folder.path().join("secret");
    std::fs::write(&file, "old").unwrap();
    let out = file.to_str().unwrap();
    let output = fetch(address, &socket, &["--resource", DISK, "--out", out]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(output.stdout.is_empty());
    assert_eq!(std::fs::read(&file).unwrap(), SECRET);
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_refusal_is_final_and_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let socket = processor(folder.path(), 0x33);
    let file = folder.path().join("secret");
    let out = file.to_str().unwrap();
    let output = fetch(
        serve(broker(0x4d), 0),
        &socket,
        &["--resource", DISK, "--out", out],
    );
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        said(&output).contains("EVIDENCE_NOT_ACCEPTED"),
        "{}",
        said(&output)
    );
    assert!(!file.exists());
    let output = fetch(
        serve(broker(0x33), 0),
        &socket,
        &["--resource", "default/key/other", "--out", out],
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("NO_POLICY"), "{}", said(&output));
    assert!(!file.exists());
}

#[test]
fn a_broker_that_comes_late_is_waited_for_and_one_that_does_not_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let socket = processor(folder.path(), 0x4d);
    let output = fetch(serve(broker(0x4d), 2), &socket, &["--resource", DISK]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_eq!(
        said(&output).matches("again in").count(),
        2,
        "{}",
        said(&output)
    );
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let output = fetch(free, &socket, &["--resource", DISK, "--wait", "0"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("cannot be reached"));
}

#[test]
fn a_report_is_over_the_nonce() {
    let folder = tempfile::tempdir().unwrap();
    let socket = processor(folder.path(), 0x4d);
    let socket = socket.to_str().unwrap();
    let file = folder.path().join("report");
    let (emulated, out) = ("--emulated-report-socket", file.to_str().unwrap());
    let output = run(&[
        "report", "--nonce", "c0ffee", emulated, socket, "--out", out,
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(said(&output).contains("EMULATED"));
    let report = Report::parse(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(report.report_data()[..4], [0xc0, 0xff, 0xee, 0]);
    let output = run(&["report", "--nonce", "00", emulated, socket, "--vmpl", "1"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("0x16"), "{}", said(&output));
}

#[test]
fn without_a_secure_processor_there_is_no_report() {
    // This holds on every machine that is not itself an SNP guest.
    if Path::new("/dev/sev-guest").exists() || Path::new("/sys/kernel/config/tsm").exists() {
        return;
    }
    for source in ["auto", "tsm", "sev-guest"] {
        let output = run(&["report", "--nonce", "00", "--source", source]);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains("sev-guest"), "{}", said(&output));
        assert!(output.stdout.is_empty());
    }
    let output = run(&["report", "--nonce", "00", "--source", "emulated"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    for words in ["EMULATED", "casemate.snp=", "--source auto"] {
        assert!(said(&output).contains(words), "{}", said(&output));
    }
}

#[test]
fn the_command_line_is_checked() {
    for arguments in [
        &["report"][..],
        &["report", "--nonce", ""],
        &["report", "--nonce", "0"],
        &["report", "--nonce", &"00".repeat(65)],
        &["report", "--nonce", "00", "--vmpl", "4"],
        &[
            "report",
            "--nonce",
            "00",
            "--source",
            "tsm",
            "--emulated-report-socket",
            "/x",
        ],
        &["fetch", "--broker", "https://h:1", "--resource", DISK],
        &["fetch", "--broker", "http://h:1", "--resource", "../x"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}");
    }
}
