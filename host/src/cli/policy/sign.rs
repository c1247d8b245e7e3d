//! `casemate policy keygen|sign`.

use std::path::{Path, PathBuf};

use casemate_policy::HostPolicy;
use casemate_policy::document::MAX_DOCUMENT;
use casemate_policy::sign::{MAX_SIGNATURES_LEN, Signatures, SignerKey, SigningKey};
use clap::Args;
use serde::Serialize;
use zeroize::Zeroizing;

use super::{files, read_text};
use crate::agent::api::Failure;
use crate::agent::authority::beside;
use crate::cli::{print_bytes, print_json};

/// What is signed, by whom.
#[derive(Debug, Args)]
pub struct SignArgs {
    /// The policy.
    policy: PathBuf,
    /// The signer's private key.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The file of signatures; made if there is none (default: the policy's name with .sig behind it).
    #[arg(long, value_name = "FILE")]
    signatures: Option<PathBuf>,
}

/// Makes a key.
pub fn keygen(out: &Path, json: bool) -> Result<u8, Failure> {
    let key = SigningKey::generate().map_err(|e| bad_key(out, &e))?;
    files::write_key(out, &key)?;
    let key = SigningKey::read(&key).map_err(|e| bad_key(out, &e))?;
    show_key(key.public(), json)
}

/// Signs a policy.
pub fn run(args: &SignArgs, json: bool) -> Result<u8, Failure> {
    let name = args.policy.display().to_string();
    let text = read_text(&args.policy, MAX_DOCUMENT as usize)?;
    // Nobody should sign what no host will read.
    let policy =
        HostPolicy::parse(&name, &text).map_err(|e| Failure::new("POLICY", e.to_string()))?;
    if policy.version == 0 {
        let text = format!("{name} has no version; write `version = N` above its first section");
        return Err(Failure::new("NO_VERSION", text));
    }
    let secret = Zeroizing::new(files::read(&args.key, files::MAX_KEY_FILE)?);
    let key = SigningKey::read(&secret).map_err(|e| bad_key(&args.key, &e))?;
    let file = args.signatures.clone();
    let file = file.unwrap_or_else(|| beside(&args.policy));
    let bad = |e| Failure::new("SIGNATURES", format!("{}: {e}", file.display()));
    let mut all = match file.try_exists() {
        Ok(false) => Signatures::default(),
        _ => Signatures::parse(&files::read(&file, MAX_SIGNATURES_LEN)?).map_err(bad)?,
    };
    // A signature of an earlier text would refuse this one everywhere.
    all.retain_of(text.as_bytes());
    all.add(key.sign(text.as_bytes())).map_err(bad)?;
    files::write(&file, all.to_toml().map_err(bad)?.as_bytes())?;
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

fn bad_key(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new("KEY", format!("{}: {error}", path.display()))
}
