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
mod page;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

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
use page::{Stage, Told};

/// What the page shows but the test does not run, each by its first line.
const NOT_EXECUTED: [&str; 1] = ["[vault]"];
/// What runs, so that no block is lost.
const EXECUTED: usize = 14;
/// The port that the page names; the test takes a free one.
const PORT: &str = ":8080";

#[test]
fn the_owners_page_holds() {
    let mut stage = Stage::new("attest/OWNERS.md");
    stage.programs = programs();
    let at = stage.folder.path();
    let ovmf = vector("measurement/ovmf_AmdSev_suffix.bin");
    fs::write(at.join("OVMF.amdsev.fd"), ovmf).unwrap();
    fs::write(at.join("vmlinuz"), [0xaa; 8192]).unwrap();
    fs::write(at.join("initrd"), [0x55; 4096]).unwrap();
    let authority = Authority::shared();
    fs::create_dir(at.join("emulated")).unwrap();
    fs::write(at.join("emulated/ark.der"), authority.ark()).unwrap();
    processor(at);
    let service = service();
    let root = hex::encode(authority.identity().root_fingerprint());
    stage.environment = environment(&root, &service.base());
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    stage.instead = vec![(PORT, format!(":{}", address.port()))];
    let told = stage.tell(|_| TcpStream::connect(address).is_ok());
    let all = Told {
        executed: EXECUTED,
        shown: NOT_EXECUTED.map(str::to_owned).to_vec(),
    };
    assert_eq!(told, all);
}

/// What the page leaves to the environment, so that it reads as with AMD's processor.
fn environment(root: &str, service: &str) -> Vec<(&'static str, String)> {
    let trust = format!("--emulated-root emulated/ark.der --allow-emulated sha256:{root}");
    let policy = format!("allow_emulated = true\nemulated_roots = [\"sha256:{root}\"]");
    vec![
        (
            "EMULATED_GUEST",
            "--emulated-report-socket processor.sock".to_owned(),
        ),
        ("EMULATED_MIRROR", format!("--base-url {service}")),
        ("EMULATED_TRUST", trust),
        ("EMULATED_CHAIN", "--chain emulated".to_owned()),
        ("EMULATED_POLICY", policy),
    ]
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
