//! `casemate broker`: serve secrets to guests that proved themselves, and keep them.

use std::io::Read;
use std::path::{Path, PathBuf};

use casemate_attest::broker::{MAX_SECRET_LEN, ResourcePath};
use clap::{Args, Subcommand};
use zeroize::Zeroizing;

use crate::agent::api::Failure;
use crate::broker::config::BrokerConfig;
use crate::broker::{self, BrokerError};

/// The key broker.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 done, 1 failed or not there, 64 usage.\n\n\
        The least configuration (TOML; paths are relative to its folder; policies as for `casemate attest verify`):\n\n  \
        state_dir = \"state\"\n  \
        policy = \"site.toml\"\n  \
        listen = [\"tcp:127.0.0.1:8080\"]\n  \
        references = [\"reference.toml\"]\n  \
        store = { file = \"secrets.sealed\", key = \"store.key\" }\n  \
        session = { policy = \"owner.toml\" }\n  \
        resources = { \"default/key/disk\" = \"owner.toml\" }\n\n\
        Example: casemate broker --config broker.toml put default/key/disk --from disk.key"
)]
pub struct BrokerArgs {
    /// The broker's configuration (TOML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Without one, serve.
    #[command(subcommand)]
    command: Option<BrokerCommand>,
}

/// What an owner does with the store.
#[derive(Debug, Subcommand)]
pub enum BrokerCommand {
    /// Put a secret into the store.
    Put {
        /// repository/type/tag
        path: ResourcePath,
        /// The secret; standard input without it.
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
    },
    /// List the paths in the store, and whether a policy lets anybody have them.
    List,
    /// Remove a secret from the store.
    Remove {
        /// repository/type/tag
        path: ResourcePath,
    },
}

/// Runs it.
pub fn run(args: BrokerArgs, json: bool) -> Result<u8, Failure> {
    let mut config = BrokerConfig::load(&args.config).map_err(|e| failed(e.into()))?;
    let Some(command) = args.command else {
        super::roles::log();
        return broker::serve(config).map(|()| 0).map_err(failed);
    };
    let store = broker::owners_store(&mut config).map_err(failed)?;
    match command {
        BrokerCommand::Put { path, from } => {
            let secret = read(from.as_deref())?;
            store.put(&path, &secret).map_err(|e| failed(e.into()))?;
            done(json, "put", &path, true)
        }
        BrokerCommand::Remove { path } => {
            let removed = store.remove(&path).map_err(|e| failed(e.into()))?;
            done(json, "removed", &path, removed)
        }
        BrokerCommand::List => {
            let paths = store.list().map_err(|e| failed(e.into()))?;
            list(json, &config, &paths)
        }
    }
}

fn list(json: bool, config: &BrokerConfig, paths: &[String]) -> Result<u8, Failure> {
    let policy = |path: &str| {
        let mut found = config.resources.iter();
        found
            .find(|(name, _)| name.0.as_str() == path)
            .map(|(_, file)| file.display().to_string())
    };
    if json {
        let entries = paths
            .iter()
            .map(|path| serde_json::json!({ "path": path, "policy": policy(path) }));
        super::print_json(&serde_json::json!({ "resources": entries.collect::<Vec<_>>() }))?;
        return Ok(0);
    }
    for path in paths {
        let policy = policy(path).unwrap_or_else(|| "no policy: released to nobody".to_owned());
        super::print_bytes(format!("{path}  {policy}\n").as_bytes())?;
    }
    Ok(0)
}

fn done(json: bool, what: &str, path: &ResourcePath, did: bool) -> Result<u8, Failure> {
    if json {
        super::print_json(&serde_json::json!({ "path": path.as_str(), what: did }))?;
    } else if did {
        super::print_bytes(format!("{what} {path}\n").as_bytes())?;
    } else {
        super::print_bytes(format!("there is no {path}\n").as_bytes())?;
    }
    Ok(u8::from(!did))
}

fn read(from: Option<&Path>) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut secret = Zeroizing::new(Vec::new());
    let limit = MAX_SECRET_LEN as u64 + 1;
    let read = match from {
        Some(file) => {
            std::fs::File::open(file).and_then(|file| file.take(limit).read_to_end(&mut secret))
        }
        None => std::io::stdin().lock().take(limit).read_to_end(&mut secret),
    };
    read.map_err(|e| Failure::new("SECRET", format!("the secret cannot be read: {e}")))?;
    if secret.len() > MAX_SECRET_LEN {
        let text = format!("a secret has at most {MAX_SECRET_LEN} bytes");
        return Err(Failure::new("SECRET", text));
    }
    Ok(secret)
}

fn failed(error: BrokerError) -> Failure {
    Failure::new("BROKER", error.to_string())
}
