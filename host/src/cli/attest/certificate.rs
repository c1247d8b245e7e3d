//! `casemate attest certificate`: verifies and shows the certificates of the keys that sign reports.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use casemate_attest::chain::{
    ChainError, Crl, CrlMode, CrlOutcome, Intermediate, Leaf, Revocation, SnpTrust, VerifiedLeaf,
    split_pem, verify,
};
use casemate_attest::product::Product;
use casemate_attest::report::SigningKey;
use casemate_attest::tcb::TcbVersion;
use clap::Args;
use serde::Serialize;

use super::shared::{MAX_INPUT_LEN, TrustArgs, read};
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json};

/// Which certificates, and what they are verified with.
#[derive(Debug, Args)]
pub struct CertificateArgs {
    /// VCEK or VLEK certificates, DER or PEM.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Folder with ask.pem or asvk.pem and ark.pem, or a cache folder; without it the certificates that come with
    /// this program.
    #[arg(long, value_name = "DIR")]
    chain: Option<PathBuf>,
    /// The root's revocation list; it then has to be good.
    #[arg(long, value_name = "FILE")]
    crl: Option<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
}

/// Runs the command.
pub fn run(args: &CertificateArgs, json: bool) -> Result<u8, Failure> {
    let trust = args.trust.trust()?;
    let crl = args.crl.as_deref().map(read_crl).transpose()?;
    let judge = Judge {
        trust: &trust,
        chain: args.chain.as_deref(),
        revocation: Revocation {
            mode: match crl {
                Some(_) => CrlMode::Required,
                None => CrlMode::IfPresent,
            },
            crl: crl.as_ref(),
            max_age: None,
        },
        at: args.trust.clock(),
    };
    let mut rows = Vec::new();
    for file in &args.files {
        rows.push(judge.row(file, &read(file, MAX_INPUT_LEN)?)?);
    }
    let report = Shown {
        overall: rows
            .iter()
            .map(|row| row.result)
            .max()
            .unwrap_or(Finding::CannotVerify),
        certificates: rows,
    };
    if json {
        print_json(&report)?;
    } else {
        print_bytes(report.text().as_bytes())?;
    }
    Ok(match report.overall {
        Finding::Valid => 0,
        Finding::CannotVerify => 2,
        Finding::Invalid => 1,
    })
}

fn read_crl(file: &Path) -> Result<Crl, Failure> {
    Crl::parse(&read(file, MAX_INPUT_LEN)?)
        .map_err(|e| Failure::new("USAGE", format!("{}: {}: {e}", file.display(), e.code())))
}

/// What the certificates are verified with.
struct Judge<'a> {
    trust: &'a SnpTrust,
    chain: Option<&'a Path>,
    revocation: Revocation<'a>,
    at: SystemTime,
}

/// Why a certificate is not valid.
enum Refusal {
    Chain(ChainError),
    /// The folder has no certificate of the kind that is needed.
    NoIssuer(String),
}

impl From<ChainError> for Refusal {
    fn from(error: ChainError) -> Self {
        Self::Chain(error)
    }
}

impl Judge<'_> {
    fn row(&self, file: &Path, bytes: &[u8]) -> Result<Row, Failure> {
        let leaf = match Leaf::parse(bytes) {
            Ok(leaf) => leaf,
            Err(error) => {
                let error = ChainError::from(error);
                return Ok(Row::new(file, None).refused(&Refusal::Chain(error)));
            }
        };
        let row = Row::new(file, Some(&leaf));
        let Some(issuer) = self.issuer(&leaf)? else {
            let missing = format!(
                "{} has no certificate above a {} of {}; fetch the chain",
                self.chain.unwrap_or(Path::new("")).display(),
                name(leaf.kind()),
                leaf.product()
            );
            return Ok(row.refused(&Refusal::NoIssuer(missing)));
        };
        Ok(match self.verified(&leaf, &issuer) {
            Ok(verified) => row.verified(&verified),
            Err(refusal) => row.refused(&refusal),
        })
    }

    fn verified(&self, leaf: &Leaf, issuer: &Issuer) -> Result<VerifiedLeaf, Refusal> {
        if let Some(root) = &issuer.root {
            self.trust.recognise(root)?;
        }
        let intermediate = match &issuer.intermediate {
            Some(der) => Intermediate::parse(der)?,
            None => Intermediate::amd(leaf.product(), leaf.kind())?,
        };
        let trusted = self.trust.trust_intermediate(&intermediate, self.at)?;
        Ok(verify(leaf, &trusted, &self.revocation, self.at)?)
    }

    /// The certificates above a leaf: from the folder, in the names people use or in the cache's.
    fn issuer(&self, leaf: &Leaf) -> Result<Option<Issuer>, Failure> {
        let Some(folder) = self.chain else {
            return Ok(Some(Issuer::default()));
        };
        let kind = match leaf.kind() {
            SigningKey::Vcek => "ask.pem",
            SigningKey::Vlek => "asvk.pem",
        };
        let cached = format!("{}-{}-chain.pem", leaf.product(), name(leaf.kind()));
        let there = |file: &str| {
            let path = folder.join(file);
            match path.exists() {
                true => read(&path, MAX_INPUT_LEN).map(Some),
                false => Ok(None),
            }
        };
        if let Some(intermediate) = there(kind)? {
            return Ok(Some(Issuer {
                intermediate: Some(intermediate),
                root: there("ark.pem")?,
            }));
        }
        let Some(chain) = there(&cached)? else {
            return Ok(None);
        };
        let mut parts = split_pem(&chain)
            .map_err(|e| Failure::new("USAGE", format!("{cached}: {e}")))?
            .into_iter();
        Ok(Some(Issuer {
            intermediate: parts.next(),
            root: parts.next(),
        }))
    }
}

/// What stands above a leaf; AMD's own that come with this program where there is nothing.
#[derive(Default)]
struct Issuer {
    intermediate: Option<Vec<u8>>,
    root: Option<Vec<u8>>,
}

#[derive(Debug, Serialize)]
struct Shown {
    overall: Finding,
    certificates: Vec<Row>,
}

/// In the order of how much it says against a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Finding {
    Valid,
    CannotVerify,
    Invalid,
}

#[derive(Debug, Serialize)]
struct Row {
    file: PathBuf,
    result: Finding,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// What the certificate says of itself; to be believed only where the result is valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    claims: Option<Claims>,
    #[serde(skip_serializing_if = "Option::is_none")]
    proven: Option<Proven>,
}

#[derive(Debug, Serialize)]
struct Claims {
    kind: &'static str,
    product: Product,
    product_name: String,
    tcb: TcbVersion,
    #[serde(skip_serializing_if = "Option::is_none")]
    chip_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    csp_id: Option<String>,
    not_before: String,
    not_after: String,
    sha256: String,
}

#[derive(Debug, Serialize)]
struct Proven {
    emulated: bool,
    issuer_sha256: String,
    root_sha256: String,
    revocation: &'static str,
    revocation_detail: String,
}

impl Row {
    fn new(file: &Path, leaf: Option<&Leaf>) -> Self {
        Self {
            file: file.to_path_buf(),
            result: Finding::CannotVerify,
            code: None,
            error: None,
            claims: leaf.map(Claims::of),
            proven: None,
        }
    }

    fn verified(mut self, leaf: &VerifiedLeaf) -> Self {
        self.result = Finding::Valid;
        self.proven = Some(Proven {
            emulated: leaf.emulated(),
            issuer_sha256: hex::encode(leaf.issuer().fingerprint()),
            root_sha256: hex::encode(leaf.issuer().root_fingerprint()),
            revocation: leaf.crl().code(),
            revocation_detail: leaf.crl().to_string(),
        });
        self
    }

    fn refused(mut self, refusal: &Refusal) -> Self {
        let (result, code, error) = match refusal {
            Refusal::NoIssuer(text) => (Finding::CannotVerify, "CHAIN_ABSENT", text.clone()),
            Refusal::Chain(error) => {
                let result = match error {
                    // A list that cannot be relied on says nothing against the certificate.
                    ChainError::Revocation(CrlOutcome::Revoked { .. }) => Finding::Invalid,
                    ChainError::Revocation(_) | ChainError::Crl(_) => Finding::CannotVerify,
                    _ => Finding::Invalid,
                };
                (result, error.code(), error.to_string())
            }
        };
        self.result = result;
        self.code = Some(code.to_owned());
        self.error = Some(error);
        self
    }
}

impl Claims {
    fn of(leaf: &Leaf) -> Self {
        let date = |time| humantime::format_rfc3339_seconds(time).to_string();
        Self {
            kind: name(leaf.kind()),
            product: leaf.product(),
            product_name: leaf.product_name().to_owned(),
            tcb: leaf.tcb(),
            chip_id: leaf.hwid().map(hex::encode),
            csp_id: leaf.csp_id().map(str::to_owned),
            not_before: date(leaf.validity().not_before),
            not_after: date(leaf.validity().not_after),
            sha256: hex::encode(leaf.fingerprint()),
        }
    }
}

impl Shown {
    fn text(&self) -> String {
        self.certificates.iter().map(Row::text).collect()
    }
}

impl Row {
    fn text(&self) -> String {
        let result = match self.result {
            Finding::Valid => "valid",
            Finding::CannotVerify => "CANNOT VERIFY",
            Finding::Invalid => "INVALID",
        };
        let mark = match &self.proven {
            Some(proven) if proven.emulated => " (emulated, NOT AMD)",
            _ => "",
        };
        let mut text = format!("{}: {result}{mark}\n", self.file.display());
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "  {name:<11} {value}");
        };
        if let (Some(code), Some(error)) = (&self.code, &self.error) {
            line("reason", &format!("{code}: {error}"));
        }
        if let Some(claims) = &self.claims {
            line("kind", claims.kind);
            line("product", &claims.product_name);
            line("tcb", &claims.tcb.to_string());
            if let Some(chip) = &claims.chip_id {
                line("chip", chip);
            }
            if let Some(provider) = &claims.csp_id {
                line("provider", provider);
            }
            let dates = format!("{} to {}", claims.not_before, claims.not_after);
            line("dates", &dates);
            line("sha256", &claims.sha256);
        }
        if let Some(proven) = &self.proven {
            line("issuer", &format!("sha256:{}", proven.issuer_sha256));
            line("root", &format!("sha256:{}", proven.root_sha256));
            line("revocation", &proven.revocation_detail);
        }
        text
    }
}

const fn name(kind: SigningKey) -> &'static str {
    match kind {
        SigningKey::Vcek => "vcek",
        SigningKey::Vlek => "vlek",
    }
}
