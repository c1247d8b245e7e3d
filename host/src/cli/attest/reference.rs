//! `casemate attest reference`: files of reference values, made, signed, checked.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use casemate_attest::measure::guest::{GuestDigest, Technology};
use casemate_attest::measure::id_block::IdKeyDigest;
use casemate_attest::measure::vcpu::{CpuModel, CpuSignature, VcpuCount};
use casemate_attest::reference::{
    Launch, MAX_DOCUMENT_LEN, MAX_SIGNATURES_LEN, ReferenceDocument, ReferenceGuest,
    ReferenceValues, Signatures, SignerKey, SigningKey, Timestamp,
};
use clap::{Args, Subcommand};
use serde::Serialize;
use zeroize::Zeroizing;

use super::files;
use super::guest::{GuestArgs, Vcpu, VcpuCounts, missing, unlaunchable};
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json};

/// What is done with reference values.
#[derive(Debug, Subcommand)]
pub enum ReferenceCommand {
    /// Make an Ed25519 key that signs reference values, and print its public half.
    Key {
        /// Where it goes (PKCS#8 PEM, mode 0600); never over another file.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Measure a guest in all its sizes and write a document.
    Make(Box<MakeArgs>),
    /// Sign a document; other signers' signatures in the file are kept.
    Sign {
        /// The document.
        #[arg(long, value_name = "FILE")]
        document: PathBuf,
        /// The signer's private key.
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// The file of signatures; made if there is none (default: the document's name with .sig behind it).
        #[arg(long, value_name = "FILE")]
        signatures: Option<PathBuf>,
    },
    /// Check signatures and validity as a verifier will.
    Check(CheckArgs),
}

/// One guest, and when its values hold.
#[derive(Debug, Args)]
pub struct MakeArgs {
    /// The guest's name.
    #[arg(long)]
    name: String,
    #[command(flatten)]
    guest: GuestArgs,
    /// Numbers of vCPUs: 4, or 1,2,4, or 1-64; SEV does not measure them.
    #[arg(long, value_name = "LIST")]
    vcpus: Option<VcpuCounts>,
    /// vCPU types, separated by commas.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    vcpu_type: Vec<CpuModel>,
    /// Digest of the key that must have signed the guest's ID block.
    #[arg(long, value_name = "HEX")]
    id_key_digest: Option<IdKeyDigest>,
    /// Digest of the key that must have signed the ID key.
    #[arg(long, value_name = "HEX")]
    author_key_digest: Option<IdKeyDigest>,
    /// From when on the values hold, as in 2026-01-01T00:00:00Z (default: now).
    #[arg(long, value_name = "TIME")]
    not_before: Option<Timestamp>,
    /// Until when they hold.
    #[arg(long, value_name = "TIME")]
    expires: Timestamp,
    /// Take over the other guests of this document.
    #[arg(long, value_name = "FILE")]
    with: Option<PathBuf>,
    /// Where the document goes.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// What is checked, and who is trusted.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The document.
    #[arg(long, value_name = "FILE")]
    document: PathBuf,
    /// Its file of signatures (default: the document's name with .sig behind it).
    #[arg(long, value_name = "FILE")]
    signatures: Option<PathBuf>,
    /// A signer's key (ed25519:…); once for each.
    #[arg(long, value_name = "KEY", required = true)]
    trust: Vec<SignerKey>,
    /// How many of them must have signed (default: all).
    #[arg(long, value_name = "N")]
    threshold: Option<usize>,
    /// Check as of this moment (default: now).
    #[arg(long, value_name = "TIME")]
    at: Option<Timestamp>,
    /// Say which guests have this launch digest; exit status 1 if none has.
    #[arg(long, value_name = "HEX")]
    digest: Option<GuestDigest>,
}

/// Runs one of them.
pub fn run(command: ReferenceCommand, json: bool) -> Result<u8, Failure> {
    match command {
        ReferenceCommand::Key { out } => {
            let key = SigningKey::generate().map_err(|e| bad_key(&out, &e))?;
            files::write_key(&out, &key)?;
            let key = SigningKey::read(&key).map_err(|e| bad_key(&out, &e))?;
            show_key(key.public(), json)
        }
        ReferenceCommand::Make(args) => args.make(json),
        ReferenceCommand::Sign {
            document,
            key,
            signatures,
        } => {
            let signatures = signatures.unwrap_or_else(|| beside(&document));
            sign(&document, &key, &signatures, json)
        }
        ReferenceCommand::Check(args) => args.check(json),
    }
}

impl MakeArgs {
    fn make(&self, json: bool) -> Result<u8, Failure> {
        let mut guests = match &self.with {
            Some(path) => read_document(path)?.guest,
            None => Vec::new(),
        };
        guests.retain(|guest| guest.name != self.name);
        guests.push(self.measure()?);
        let no_clock = || Failure::new("CLOCK", "the clock is outside of 1970 to 9999");
        let now = Timestamp::new(SystemTime::now()).ok_or_else(no_clock)?;
        let document = ReferenceDocument::new(self.not_before.unwrap_or(now), self.expires, guests)
            .map_err(|e| malformed(&self.out, &e))?;
        let text = document.to_toml().map_err(|e| malformed(&self.out, &e))?;
        files::write(&self.out, text.as_bytes())?;
        if json {
            return print_json(&document);
        }
        let digests: usize = document.guest.iter().map(|guest| guest.launch.len()).sum();
        let text = format!(
            "{digests} digests of {} guests in {}; sign it with `casemate attest reference sign`\n",
            document.guest.len(),
            self.out.display()
        );
        print_bytes(text.as_bytes())
    }

    fn measure(&self) -> Result<ReferenceGuest, Failure> {
        let sizes = self.sizes()?;
        let files = self.guest.read()?;
        let firmware = self.guest.firmware(&files)?;
        let first = self
            .guest
            .describe(&files, &firmware, VcpuCount::ONE, CpuSignature(0));
        let mut launch = Vec::with_capacity(sizes.len());
        for size in sizes {
            let count = size.map_or(VcpuCount::ONE, |(count, _)| count);
            let vcpu = size.map(|(_, vcpu)| vcpu);
            let signature = vcpu.map_or(CpuSignature(0), |vcpu| vcpu.signature);
            let description = self.guest.describe(&files, &firmware, count, signature);
            let model = vcpu.and_then(|vcpu| vcpu.model);
            launch.push(Launch {
                digest: description.digest().map_err(|e| unlaunchable(&e))?,
                vcpus: size.map(|(count, _)| count),
                vcpu_type: model.map(|model| model.name().to_owned()),
                vcpu_signature: vcpu.map(|vcpu| vcpu.signature),
            });
        }
        Ok(ReferenceGuest {
            name: self.name.clone(),
            technology: self.guest.mode(),
            id_key_digest: self.id_key_digest,
            author_key_digest: self.author_key_digest,
            inputs: self.guest.inputs(&files, &first)?,
            launch,
        })
    }

    /// Every count with every type; in SEV, where neither is measured, one without either.
    fn sizes(&self) -> Result<Vec<Option<(VcpuCount, Vcpu)>>, Failure> {
        let mode = self.guest.mode();
        if mode == Technology::Sev {
            return Ok(vec![None]);
        }
        let counts = self
            .vcpus
            .as_ref()
            .ok_or_else(|| missing("--vcpus", mode))?;
        if self.vcpu_type.is_empty() {
            return Err(missing("--vcpu-type", mode));
        }
        let sizes = self.vcpu_type.iter().flat_map(|model| {
            let vcpu = Vcpu::from(*model);
            counts.0.iter().map(move |count| Some((*count, vcpu)))
        });
        Ok(sizes.collect())
    }
}

impl CheckArgs {
    fn check(&self, json: bool) -> Result<u8, Failure> {
        #[derive(Serialize)]
        struct Checked<'a> {
            document_sha256: String,
            signers: &'a [SignerKey],
            not_before: Timestamp,
            expires: Timestamp,
            guests: Vec<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            digest: Option<GuestDigest>,
        }
        let bytes = files::read(&self.document, MAX_DOCUMENT_LEN)?;
        let signatures = self.signatures.clone();
        let signatures = read_signatures(&signatures.unwrap_or_else(|| beside(&self.document)))?;
        let now = self.at.map_or_else(SystemTime::now, Timestamp::time);
        let threshold = self.threshold.unwrap_or_else(|| distinct(&self.trust));
        let values = ReferenceValues::open(&bytes, &signatures, &self.trust, threshold, now)
            .map_err(|e| Failure::new(e.code(), format!("{}: {e}", self.document.display())))?;
        let mut guests: Vec<&str> = match self.digest {
            Some(digest) => values
                .find(digest)
                .map(|(guest, _)| guest.name.as_str())
                .collect(),
            None => values
                .document()
                .guest
                .iter()
                .map(|guest| guest.name.as_str())
                .collect(),
        };
        guests.dedup();
        if guests.is_empty() {
            let text = format!(
                "{}: no guest has this launch digest",
                self.document.display()
            );
            return Err(Failure::new("REFERENCE_NO_MATCH", text));
        }
        if json {
            return print_json(&Checked {
                document_sha256: values.sha256().to_string(),
                signers: values.signers(),
                not_before: values.document().not_before,
                expires: values.document().expires,
                guests,
                digest: self.digest,
            });
        }
        let signers: Vec<_> = values.signers().iter().map(SignerKey::to_string).collect();
        let text = format!(
            "signed, and valid until {}\n  signers  {}\n  guests   {}\n  sha256   {}\n",
            values.document().expires,
            signers.join(", "),
            guests.join(", "),
            values.sha256()
        );
        print_bytes(text.as_bytes())
    }
}

fn sign(document: &Path, key: &Path, signatures: &Path, json: bool) -> Result<u8, Failure> {
    let bytes = files::read(document, MAX_DOCUMENT_LEN)?;
    // Nobody should sign what no verifier will read.
    ReferenceDocument::parse(&bytes).map_err(|e| malformed(document, &e))?;
    let secret = Zeroizing::new(files::read(key, files::MAX_KEY_FILE)?);
    let key = SigningKey::read(&secret).map_err(|e| bad_key(key, &e))?;
    let mut all = match signatures.try_exists() {
        Ok(false) => Signatures::default(),
        _ => read_signatures(signatures)?,
    };
    // A signature of an earlier state of the document would refuse it for everybody.
    all.retain_of(&bytes);
    let bad = |e| Failure::new("SIGNATURES", format!("{}: {e}", signatures.display()));
    all.add(key.sign(&bytes)).map_err(bad)?;
    files::write(signatures, all.to_toml().map_err(bad)?.as_bytes())?;
    show_key(key.public(), json)
}

fn show_key(public: SignerKey, json: bool) -> Result<u8, Failure> {
    #[derive(Serialize)]
    struct Key {
        key: SignerKey,
    }
    if json {
        return print_json(&Key { key: public });
    }
    print_bytes(format!("{public}\n").as_bytes())
}

/// Where a document's signatures are unless somebody says otherwise; verifiers look there.
pub fn beside(document: &Path) -> PathBuf {
    let mut name = document.as_os_str().to_owned();
    name.push(".sig");
    PathBuf::from(name)
}

fn read_document(path: &Path) -> Result<ReferenceDocument, Failure> {
    let bytes = files::read(path, MAX_DOCUMENT_LEN)?;
    ReferenceDocument::parse(&bytes).map_err(|e| malformed(path, &e))
}

fn read_signatures(path: &Path) -> Result<Signatures, Failure> {
    Signatures::parse(&files::read(path, MAX_SIGNATURES_LEN)?)
        .map_err(|e| Failure::new("SIGNATURES", format!("{}: {e}", path.display())))
}

fn distinct(keys: &[SignerKey]) -> usize {
    keys.iter().collect::<std::collections::BTreeSet<_>>().len()
}

fn malformed(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        "REFERENCE_MALFORMED",
        format!("{}: {error}", path.display()),
    )
}

fn bad_key(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new("KEY", format!("{}: {error}", path.display()))
}
