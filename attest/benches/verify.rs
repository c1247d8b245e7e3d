//! How many complete SNP verifications a second: evidence as bytes in, verdict out, every check on,
//! beside the `sev` crate over the same bytes in the same run. Prints one JSON object.
//!
//! *cold* begins with nothing: policy, intermediate and leaf are checked anew for each verdict.
//! *warm* keeps a verifier, as a broker does: signatures of intermediate, leaf and list were
//! checked before; their dates, the report and all that the policy asks are checked each time.
//! The `sev` crate checks signatures only; *cold* is its whole chain, *warm* the report's alone
//! under a parsed leaf. *signature_alone* is ring's check of the report's signature and nothing else.
//!
//! Rates are per second of processor time, so that other work on the machine falsifies little, and
//! summed over the threads.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a benchmark fails by panicking"
)]

use casemate_attest::chain::Leaf;
use casemate_attest::processor::snp::forge::report_fields;
use casemate_attest::processor::snp::{ReportFields, SnpIdentity};
use casemate_attest::product::Product;
use casemate_attest::report::{FirmwareVersion, Report, ReportVersion, SigningKey};
use casemate_attest::tcb::TcbVersion;
use casemate_attest::verify::policy::Fingerprint;
use casemate_attest::verify::{
    CheckResult, Expectation, Nonce, OwnerPolicy, SnpEvidence, SnpVerifier,
};
use ring::signature::{ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};
use serde_json::{Value, json};
use sev::certs::snp::{Certificate, Chain, Verifiable, builtin, ca};
use sev::firmware::guest::AttestationReport;
use sev::parser::ByteParser as _;
use std::time::{Duration, Instant, SystemTime};

fn main() {
    // `cargo test` runs benchmarks to see whether they still can.
    let (rounds, time) = match std::env::args().any(|arg| arg == "--bench") {
        true => (3, Duration::from_secs(2)),
        false => (1, Duration::from_millis(10)),
    };
    let cases = [Case::hardware(), Case::emulated()];
    let measured: Vec<_> = cases.iter().map(|case| case.run(rounds, time)).collect();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let result = json!({
        "unit": "verdicts per second of processor time",
        "cpus": cpus,
        "rounds": rounds,
        "seconds_per_round": time.as_secs_f64(),
        "cases": measured,
    });
    println!("{}", serde_json::to_string_pretty(&result).unwrap());
}

/// Evidence that is accepted, and what both sides need for it.
struct Case {
    name: &'static str,
    report: Vec<u8>,
    leaf: Vec<u8>,
    certificates: Vec<Vec<u8>>,
    crl: Option<Vec<u8>>,
    policy: String,
    nonce: Nonce,
    clock: SystemTime,
    /// ARK and ASK as the `sev` crate gets them.
    authorities: fn(&Self) -> ca::Chain,
}

impl Case {
    /// A report of a real Genoa under AMD's built-in intermediate. AMD's revocation list is not
    /// among the vectors.
    fn hardware() -> Self {
        let report = include_bytes!("../tests/vectors/reports/genoa-v5/report.bin");
        Self {
            name: "genoa-v5, hardware, no CRL",
            report: report.to_vec(),
            leaf: include_bytes!("../tests/vectors/reports/genoa-v5/vcek.der").to_vec(),
            certificates: Vec::new(),
            crl: None,
            policy: policy(&report[0x90..0xc0], 27, "mode = \"if-present\""),
            nonce: Nonce::new(b"hello-attestation").unwrap(),
            clock: SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000),
            authorities: |_| ca::Chain {
                ark: builtin::genoa::ark().unwrap(),
                ask: builtin::genoa::ask().unwrap(),
            },
        }
    }

    /// An emulated Genoa with keys of AMD's sizes, and a revocation list.
    fn emulated() -> Self {
        let identity = SnpIdentity::generate().unwrap();
        let tcb = TcbVersion {
            fmc: None,
            boot_loader: 10,
            tee: 0,
            snp: 27,
            microcode: 27,
        };
        let vcek = identity.vcek(Product::Genoa, tcb).unwrap();
        let fields = fields(&identity, tcb);
        let published = identity.certificates();
        let root = Fingerprint(identity.root_fingerprint());
        let emulated = format!("allow_emulated = true\nemulated_roots = [\"{root}\"]\n");
        Self {
            name: "genoa-v5, emulated, with CRL",
            report: vcek.sign_report(&fields).unwrap().to_vec(),
            leaf: vcek.certificate().to_vec(),
            certificates: vec![published.ark.clone(), published.ask.clone()],
            crl: Some(published.crl.clone()),
            policy: emulated + &policy(&fields.measurement, 27, "mode = \"required\""),
            nonce: Nonce::new(&fields.report_data).unwrap(),
            clock: SystemTime::now(),
            authorities: |case| {
                ca::Chain::from_der(&case.certificates[0], &case.certificates[1]).unwrap()
            },
        }
    }

    /// The best of some rounds, in which the contestants take turns.
    fn run(&self, rounds: u32, time: Duration) -> Value {
        let checks = self.checks_made();
        let kept = SnpVerifier::new(self.owner());
        let leaf = Certificate::from_der(&self.leaf).unwrap();
        type Work<'a> = Box<dyn Fn() + Sync + 'a>;
        let ours = Leaf::parse(&self.leaf).unwrap();
        let report = Report::parse(&self.report).unwrap();
        let contestants: [(&str, Work<'_>); 5] = [
            (
                "casemate_cold",
                Box::new(|| self.verify(&SnpVerifier::new(self.owner()))),
            ),
            ("casemate_warm", Box::new(|| self.verify(&kept))),
            (
                "signature_alone",
                Box::new(|| report_signature(&ours, &report)),
            ),
            ("sev_cold", Box::new(|| self.sev_whole())),
            ("sev_warm", Box::new(|| self.sev_report(&leaf))),
        ];
        let mut result = json!({ "evidence": self.name, "checks_made": checks });
        for threads in [1, 2] {
            let mut best = serde_json::Map::new();
            for _ in 0..rounds {
                for (name, work) in &contestants {
                    let rate = per_second(work, threads, time);
                    let old = best.get(*name).and_then(Value::as_f64).unwrap_or_default();
                    best.insert((*name).to_owned(), json!(old.max(rate).round()));
                }
            }
            result[format!("threads_{threads}")] = Value::Object(best);
        }
        result
    }

    fn owner(&self) -> OwnerPolicy {
        OwnerPolicy::parse(self.policy.as_bytes()).unwrap()
    }

    fn verify(&self, verifier: &SnpVerifier) {
        assert!(self.verdict(verifier).accepted());
    }

    fn verdict(&self, verifier: &SnpVerifier) -> casemate_attest::verify::Verdict {
        let evidence = SnpEvidence {
            report: &self.report,
            leaf: &self.leaf,
            certificates: &self.certificates,
            crl: self.crl.as_deref(),
        };
        let expectation = Expectation {
            nonce: Some(&self.nonce),
            references: &[],
            clock: self.clock,
        };
        verifier.verify(&evidence, &expectation)
    }

    fn checks_made(&self) -> usize {
        let verdict = self.verdict(&SnpVerifier::new(self.owner()));
        assert!(verdict.accepted(), "{verdict:#?}");
        let made = verdict.checks.iter();
        made.filter(|check| check.result != CheckResult::NotChecked)
            .count()
    }

    fn sev_whole(&self) {
        let ca = (self.authorities)(self);
        let vek = Certificate::from_der(&self.leaf).unwrap();
        let report = AttestationReport::from_bytes(&self.report).unwrap();
        (&Chain { ca, vek }, &report).verify().unwrap();
    }

    fn sev_report(&self, leaf: &Certificate) {
        let report = AttestationReport::from_bytes(&self.report).unwrap();
        (leaf, &report).verify().unwrap();
    }
}

/// The least that any verdict with ring takes.
fn report_signature(leaf: &Leaf, report: &Report) {
    UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, leaf.public_key())
        .verify(report.signed_bytes(), &report.signature().unwrap())
        .unwrap();
}

fn per_second(work: &(impl Fn() + Sync), threads: u32, time: Duration) -> f64 {
    work();
    let end = Instant::now() + time;
    let one = || {
        let begin = processor_time();
        let mut done = 0.0;
        while Instant::now() < end {
            work();
            done += 1.0;
        }
        done / (processor_time() - begin)
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    })
}

/// Seconds that this thread has run.
fn processor_time() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    let nanoseconds = text.split(' ').next().unwrap();
    nanoseconds.parse::<f64>().unwrap() / 1e9
}

/// A policy that asks for something of nearly every kind.
fn policy(measurement: &[u8], microcode: u8, crl: &str) -> String {
    let minimum = format!("{{ boot_loader = 10, snp = 27, microcode = {microcode} }}");
    format!(
        "signing_keys = [\"vcek\"]\n\
         products = [\"genoa\", \"turin\"]\n\
         measurements = [\"{}\"]\n\
         min_report_version = 5\n\
         masked_chip_id = \"refuse\"\n\
         [tcb.genoa]\n\
         reported = {minimum}\n\
         committed = {minimum}\n\
         current = {minimum}\n\
         launch = {minimum}\n\
         [guest_policy]\n\
         forbid = [\"migrate_ma\"]\n\
         [platform]\n\
         require = [\"alias_check_complete\"]\n\
         [launch]\n\
         host_data = [\"{}\"]\n\
         [firmware]\n\
         min_current = \"1.55.40\"\n\
         min_committed = \"1.55.40\"\n\
         [mitigations]\n\
         launch = 0xb\n\
         current = 0xb\n\
         [crl]\n{crl}\n",
        hex::encode(measurement),
        "00".repeat(32)
    )
}

/// Firmware as new as the policy wants it, and a digest and nonce that are not zero.
fn fields(identity: &SnpIdentity, tcb: TcbVersion) -> ReportFields {
    let (version, key) = (ReportVersion::V5, SigningKey::Vcek);
    let mut fields = report_fields(identity, Product::Genoa, version, key, tcb);
    let firmware = FirmwareVersion {
        major: 1,
        minor: 55,
        build: 49,
    };
    fields.current_firmware = firmware;
    fields.committed_firmware = firmware;
    fields.report_data = [7; 64];
    fields.measurement = [9; 48];
    fields
}
