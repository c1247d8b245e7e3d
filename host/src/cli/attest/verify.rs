//! `casemate attest verify`: a report against the owner's policy.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use casemate_attest::chain::{Leaf, MAX_CRL_LEN, SnpTrust, split_pem};
use casemate_attest::evidence::{AzureRuntimeData, MAX_INPUT, decode};
use casemate_attest::kds::{Cache, KdsError, Lack, Source};
use casemate_attest::reference::{
    MAX_DOCUMENT_LEN, MAX_SIGNATURES_LEN, ReferenceValues, Signatures,
};
use casemate_attest::report::Report;
use casemate_attest::token::{Ear, EarKey};
use casemate_attest::verify::policy::{Fingerprint, MAX_POLICY_LEN};
use casemate_attest::verify::{Expectation, Nonce, OwnerPolicy, SnpEvidence, Verdict, verify_snp};
use clap::Args;
use serde::Serialize;
use zeroize::Zeroizing;

use super::reference::beside;
use super::report_view::ReportView;
use super::shared::{read, read_evidence};
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json, verdict};

/// Verify an SNP report: who signed it, on which platform, running what, against the owner's policy.
///
/// Every check is listed with what was expected and what was found. A floor holds whatever the policy says: one of
/// AMD's pinned roots (or an emulated root that is named), every signature, every date, a leaf that fits the report,
/// debugging forbidden, a guest's own request. Beyond it the policy decides; without --policy the default one does:
/// privilege level 0, no provisional firmware, no migration agent. Without --nonce an old report cannot be told from a
/// new one, and without measurements in the policy any guest is as good as another; the last line says so.
///
/// A software secure processor is refused unless --allow-emulated names its root, and with --policy unless the policy
/// allows it besides. Everything that rests on one says "emulated".
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 accepted, 1 rejected, 2 cannot verify, 64 usage or a file that cannot be read.\n\n\
        The codes of rejected checks are stable. With --json one object is printed: `overall`, `emulated`, `checks` (each \
        with `name`, `result`, `expected`, `found`, `code`), `policy` and the report's fields under `report`.\n\n\
        Example: casemate attest verify --report report.bin --leaf vcek.der --policy owner.toml --nonce \"$NONCE\""
)]
pub struct VerifyArgs {
    /// The report: raw, hex, base64, an Azure HCL blob or a MSG_REPORT_RSP.
    #[arg(long, value_name = "FILE")]
    report: PathBuf,
    /// The VCEK or VLEK certificate that goes with it, DER or PEM.
    #[arg(long, value_name = "FILE", required_unless_present = "cache")]
    leaf: Option<PathBuf>,
    /// Folder that `casemate attest fetch` filled: leaf, intermediate and revocation list are taken from it where they
    /// are not given. Everything in it is verified again.
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Folder with ask, asvk, ark and crl, each .pem or .der (cert_chain.pem may hold several); default: AMD's own.
    #[arg(long, value_name = "DIR")]
    chain: Option<PathBuf>,
    /// The owner's policy (TOML); default: the one of an empty file.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// What report_data must be, 1 to 64 bytes; zeros are added behind.
    #[arg(long, value_name = "HEX", value_parser = nonce)]
    nonce: Option<Nonce>,
    /// The time at which everything must be in force; default: now.
    #[arg(long, value_name = "RFC3339", value_parser = humantime::parse_rfc3339)]
    at: Option<SystemTime>,
    /// A revocation list of the root, DER or PEM; goes before the one in --chain.
    #[arg(long, value_name = "FILE")]
    crl: Option<PathBuf>,
    /// Signed reference values, with their signatures in FILE.sig; the policy names who may sign. Can be repeated.
    #[arg(long, value_name = "FILE", requires = "policy")]
    reference: Vec<PathBuf>,
    /// Sign an attestation result (EAR, a JWT) with this PKCS#8 key, Ed25519 or P-384, DER or PEM.
    #[arg(long, value_name = "FILE", requires = "ear_out")]
    ear_key: Option<PathBuf>,
    /// Where the attestation result goes; it is valid for an hour, and written for rejected evidence as well.
    #[arg(long, value_name = "FILE", requires = "ear_key")]
    ear_out: Option<PathBuf>,
    /// Accept this emulated root (sha256:…).
    #[arg(long, value_name = "SHA256", value_parser = fingerprint)]
    allow_emulated: Option<Fingerprint>,
}

#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    verdict: &'a Verdict,
    policy: Vec<String>,
    report: Option<ReportView>,
}

/// Everything read, nothing believed.
struct Inputs {
    report: Vec<u8>,
    azure: Option<AzureRuntimeData>,
    collateral: Collateral,
    policy: OwnerPolicy,
    references: Vec<ReferenceValues>,
    key: Option<EarKey>,
    clock: SystemTime,
}

/// What goes with a report.
#[derive(Default)]
struct Collateral {
    leaf: Vec<u8>,
    certificates: Vec<Vec<u8>>,
    crl: Option<Vec<u8>>,
}

/// Verifies, prints the verdict and writes the attestation result.
pub fn run(args: &VerifyArgs, json: bool) -> Result<u8, Failure> {
    let inputs = Inputs::read(args)?;
    let evidence = SnpEvidence {
        report: &inputs.report,
        leaf: &inputs.collateral.leaf,
        certificates: &inputs.collateral.certificates,
        crl: inputs.collateral.crl.as_deref(),
    };
    let expectation = Expectation {
        nonce: args.nonce.as_ref(),
        references: &inputs.references,
        clock: inputs.clock,
    };
    let verdict = inputs.with_azure(verify_snp(&evidence, &inputs.policy, &expectation));
    if let (Some(key), Some(out)) = (&inputs.key, &args.ear_out) {
        write_result(&inputs.policy, &verdict, args.nonce.as_ref(), key, out)?;
    }
    if json {
        print_json(&Output {
            verdict: &verdict,
            policy: inputs.policy.ids(),
            report: inputs.view(),
        })?;
    } else {
        let text = verdict::table(&verdict) + &verdict::outcome(&verdict);
        print_bytes(text.as_bytes())?;
    }
    Ok(verdict::exit_status(&verdict))
}

impl Inputs {
    fn read(args: &VerifyArgs) -> Result<Self, Failure> {
        let clock = args.at.unwrap_or_else(SystemTime::now);
        let policy = policy(args)?;
        let bytes = read_evidence(&args.report, MAX_INPUT)?;
        // What cannot be decoded is given to the verifier as it is, which says why it is refused.
        let (report, azure) = match decode(&bytes) {
            Ok(evidence) => (evidence.report.to_vec(), evidence.azure),
            Err(_) => (bytes, None),
        };
        let key = args.ear_key.as_deref().map(ear_key);
        let references = args
            .reference
            .iter()
            .map(|path| reference(path, &policy, clock));
        Ok(Self {
            collateral: Collateral::read(args, &policy, &report, clock)?,
            references: references.collect::<Result<_, _>>()?,
            key: key.transpose()?,
            report,
            azure,
            policy,
            clock,
        })
    }

    /// The verdict, and with it whether the report binds the runtime data that came along.
    fn with_azure(&self, verdict: Verdict) -> Verdict {
        match (&self.azure, Report::parse(&self.report)) {
            (Some(runtime), Ok(report)) => verdict.and(runtime.check(&report)),
            _ => verdict,
        }
    }

    fn view(&self) -> Option<ReportView> {
        let product = Leaf::parse(&self.collateral.leaf)
            .ok()
            .map(|leaf| leaf.product());
        let report = Report::parse(&self.report).ok()?;
        Some(ReportView::of(&report, product))
    }
}

impl Collateral {
    /// From the files that were named, and for the rest from the cache.
    fn read(
        args: &VerifyArgs,
        policy: &OwnerPolicy,
        report: &[u8],
        clock: SystemTime,
    ) -> Result<Self, Failure> {
        let mut all = match &args.chain {
            Some(folder) => Self::folder(folder)?,
            None => Self::default(),
        };
        if let Some(path) = &args.crl {
            all.crl = Some(read_evidence(path, MAX_CRL_LEN)?);
        }
        if let Some(path) = &args.leaf {
            all.leaf = read_evidence(path, MAX_EVIDENCE)?;
        }
        if let Some(folder) = &args.cache {
            let trust = all.trust(policy);
            all.complete(args.leaf.is_none(), (folder, &trust), report, clock)?;
        }
        Ok(all)
    }

    /// AMD's roots, and each emulated one that came along and that the policy names: what is cached of it is read.
    /// Whether it counts is for the verdict to say.
    fn trust(&self, policy: &OwnerPolicy) -> SnpTrust {
        let named: Vec<_> = policy.emulated_roots().map(|root| root.0).collect();
        let mut trust = SnpTrust::amd();
        for certificate in &self.certificates {
            if let Ok(with) = trust.clone().with_emulated_root(certificate, &named) {
                trust = with;
            }
        }
        trust
    }

    /// What the cache has of this report; a report that cannot be read has nothing there.
    fn complete(
        &mut self,
        with_leaf: bool,
        (folder, trust): (&Path, &SnpTrust),
        report: &[u8],
        clock: SystemTime,
    ) -> Result<(), Failure> {
        let Ok(report) = Report::parse(report) else {
            return Ok(());
        };
        let cache = Cache::at(folder);
        let source = Source::new(trust).with_cache(&cache);
        let product = Leaf::parse(&self.leaf).ok().map(|leaf| leaf.product());
        let crl = if with_leaf {
            let kept = source.collateral(&report, product, clock);
            let kept = kept.map_err(|e| cache_failed(&e))?;
            self.leaf = kept.leaf.as_der().to_vec();
            self.certificates.push(kept.intermediate.as_der().to_vec());
            kept.crl
        } else {
            let Some(product) = product.or_else(|| report.product()) else {
                return Ok(());
            };
            source
                .crl(product, report.signing_key(), clock)
                .map_err(|e| cache_failed(&e))?
        };
        if self.crl.is_none() {
            self.crl = crl.map(|list| list.as_der().to_vec());
        }
        Ok(())
    }

    /// The certificates of a folder, and its revocation list.
    fn folder(folder: &Path) -> Result<Self, Failure> {
        let mut all = Self::default();
        for name in ["ark", "ask", "asvk", "cert_chain"] {
            for ending in ["pem", "der"] {
                let path = folder.join(format!("{name}.{ending}"));
                let Some(bytes) = read_if_there(&path, MAX_EVIDENCE)? else {
                    continue;
                };
                // What cannot be taken apart is given to the verifier whole, which says why it is refused.
                match split_pem(&bytes) {
                    Ok(several) if ending == "pem" => all.certificates.extend(several),
                    _ => all.certificates.push(bytes),
                }
            }
        }
        if all.certificates.is_empty() {
            let text = format!(
                "{} holds none of ark, ask, asvk and cert_chain, as .pem or .der",
                folder.display()
            );
            return Err(Failure::new("USAGE", text));
        }
        let pem = read_if_there(&folder.join("crl.pem"), MAX_CRL_LEN)?;
        let der = read_if_there(&folder.join("crl.der"), MAX_CRL_LEN)?;
        all.crl = pem.or(der);
        Ok(all)
    }
}

/// Nothing there cannot be verified; what is there and does not verify is an answer of its own.
fn cache_failed(error: &KdsError) -> Failure {
    match error.lack() {
        Lack::Unavailable => Failure::new(
            "EVIDENCE_UNAVAILABLE",
            format!(
                "{error} [{}]; casemate attest fetch fills the cache",
                error.code()
            ),
        ),
        Lack::Unverified => Failure::new(error.code(), error.to_string()),
    }
}

fn policy(args: &VerifyArgs) -> Result<OwnerPolicy, Failure> {
    let Some(path) = &args.policy else {
        let allowing = args.allow_emulated.map(OwnerPolicy::allowing_emulated);
        return Ok(allowing.unwrap_or_default());
    };
    let policy = OwnerPolicy::parse(&read(path, MAX_POLICY_LEN)?).map_err(|e| usage(path, &e))?;
    Ok(match args.allow_emulated {
        Some(root) => policy.with_emulated_root(root),
        None => policy,
    })
}

fn reference(
    path: &Path,
    policy: &OwnerPolicy,
    clock: SystemTime,
) -> Result<ReferenceValues, Failure> {
    let rules = policy.rules();
    let signers = rules.reference_signers.as_deref().unwrap_or_default();
    let name = beside(path);
    let signatures = Signatures::parse(&read(&name, MAX_SIGNATURES_LEN)?);
    let signatures = signatures.map_err(|e| usage(&name, &e))?;
    let document = read(path, MAX_DOCUMENT_LEN)?;
    ReferenceValues::open(
        &document,
        &signatures,
        signers,
        rules.reference_threshold(),
        clock,
    )
    .map_err(|e| usage(path, &e))
}

fn ear_key(path: &Path) -> Result<EarKey, Failure> {
    let bytes = Zeroizing::new(read(path, MAX_KEY)?);
    EarKey::from_pkcs8(&bytes).map_err(|e| usage(path, &e))
}

fn write_result(
    policy: &OwnerPolicy,
    verdict: &Verdict,
    nonce: Option<&Nonce>,
    key: &EarKey,
    out: &Path,
) -> Result<(), Failure> {
    let token = Ear::of(verdict, policy, nonce, SystemTime::now(), RESULT_LIFETIME)
        .and_then(|ear| ear.sign(key))
        .map_err(|e| Failure::new("USAGE", e.to_string()))?;
    std::fs::write(out, token).map_err(|e| {
        Failure::new(
            "OUTPUT",
            format!("{} cannot be written: {e}", out.display()),
        )
    })
}

fn nonce(text: &str) -> Result<Nonce, String> {
    let bytes = hex::decode(text).map_err(|e| e.to_string())?;
    Nonce::new(&bytes).map_err(|e| e.to_string())
}

/// With or without the prefix, as `casemate owner` takes it.
fn fingerprint(text: &str) -> Result<Fingerprint, String> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    format!("sha256:{digits}")
        .parse()
        .map_err(|e: casemate_attest::verify::policy::FingerprintError| e.to_string())
}

fn read_if_there(path: &Path, most: usize) -> Result<Option<Vec<u8>>, Failure> {
    match path.symlink_metadata() {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        _ => read(path, most).map(Some),
    }
}

fn usage(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new("USAGE", format!("{}: {error}", path.display()))
}

/// Longest report, leaf or certificate file.
const MAX_EVIDENCE: usize = 1 << 20;
/// Longest private key file.
const MAX_KEY: usize = 16 << 10;
/// How long an attestation result holds.
const RESULT_LIFETIME: Duration = Duration::from_secs(3600);
