//! The agent's own configuration file (TOML); unknown keys are refused, paths are relative to its folder.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use casemate_policy::sign::Trust;
use serde::Deserialize;

/// What an agent is told at its start.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// Name of this host; goes into the ledger.
    pub name: String,
    /// Folder for the state that must survive: ownership records, ledger, the emulated processor's identity.
    pub state_dir: PathBuf,
    /// Unix socket of the API.
    pub socket: PathBuf,
    /// Where migrations are accepted; none if absent.
    pub listen: Option<SocketAddr>,
    /// Where people with client certificates reach the API; without it, only this machine's users do.
    pub api: Option<ApiFiles>,
    /// The signed-off rules of this host.
    pub policy: PathBuf,
    /// Whose signatures the rules need; without it, none. They are read from beside the rules (`.sig` behind the name).
    pub policy_trust: Option<Trust>,
    /// A second opinion on every decision, in Rego; it may only restrict.
    pub rego: Option<RegoFile>,
    /// Who this host is to others; needed for migration.
    pub identity: Option<IdentityFiles>,
    /// Addresses of the peers that the policy names.
    #[serde(default)]
    pub peers: BTreeMap<String, SocketAddr>,
    /// ASK ‖ ARK of this host's own AMD processor, as AMD publishes them; by default those of its generation that come
    /// with Casemate.
    pub amd_certificates: Option<PathBuf>,
    /// Certificate (CEK) of this host's own AMD processor with AMD's signature, which the processor exports without.
    pub chip_certificate: Option<PathBuf>,
    /// What the keys of snapshots lie under; without it there are no snapshots.
    pub snapshots: Option<SnapshotConfig>,
    /// The installed program, to which guests are upgraded; by default where the agent was started from.
    pub program: Option<PathBuf>,
    /// First of the user ids given to roles.
    #[serde(default = "default_uid_base")]
    pub uid_base: u32,
}

/// The operator's keys for snapshots: files of 32 to 4096 bytes that root alone reads, outside the state folder.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotConfig {
    /// The present one; read at each use, so that a credential of systemd's or a file in memory will do.
    pub key: PathBuf,
    /// The one before: keys that are under it are put under the present one when they are used.
    pub previous_key: Option<PathBuf>,
}

/// A policy in Rego.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegoFile {
    /// The file.
    pub policy: PathBuf,
    /// Whose input it was written for.
    #[serde(default)]
    pub dialect: RegoDialect,
}

/// Whose input a Rego policy was written for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegoDialect {
    /// `package casemate`.
    #[default]
    Casemate,
    /// `package policy`, as Trustee's resource policies.
    Trustee,
}

/// PEM files of the host's identity.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityFiles {
    /// Certificate chain, leaf first.
    pub certificate: PathBuf,
    /// PKCS#8 private key (P-256), readable by root only.
    pub key: PathBuf,
    /// Certificate authorities of the peers.
    pub ca: PathBuf,
}

/// The API over TLS 1.3. The policy says who of the certificates' holders may do what.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiFiles {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// Certificate chain of this host for its clients (PEM), leaf first.
    pub certificate: PathBuf,
    /// Its key (PEM), readable by root only.
    pub key: PathBuf,
    /// Certificate authorities of the people (PEM).
    pub client_ca: PathBuf,
}

impl AgentConfig {
    /// Reads the configuration.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            file: path.to_owned(),
            source,
        })?;
        let mut config: Self = toml::from_str(&text).map_err(|e| ConfigError::Invalid {
            file: path.to_owned(),
            source: Box::new(e),
        })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let paths = [
            &mut config.state_dir,
            &mut config.socket,
            &mut config.policy,
        ]
        .into_iter();
        let identity = config
            .identity
            .iter_mut()
            .flat_map(|i| [&mut i.certificate, &mut i.key, &mut i.ca]);
        let api = config
            .api
            .iter_mut()
            .flat_map(|api| [&mut api.certificate, &mut api.key, &mut api.client_ca]);
        let published = [&mut config.amd_certificates, &mut config.chip_certificate];
        let published = published.into_iter().flatten();
        let snapshots = config.snapshots.iter_mut().flat_map(|snapshots| {
            std::iter::once(&mut snapshots.key).chain(&mut snapshots.previous_key)
        });
        let paths = paths.chain(snapshots).chain(config.program.iter_mut());
        let paths = paths.chain(config.rego.iter_mut().map(|rego| &mut rego.policy));
        for path in paths.chain(identity).chain(api).chain(published) {
            *path = folder.join(&*path);
        }
        Ok(config)
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("agent configuration {file} cannot be read: {source}")]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what is wanted; the source names line and key.
    #[error("agent configuration {file}: {source}")]
    Invalid {
        /// The file.
        file: PathBuf,
        /// Line, key and what would be right.
        source: Box<toml::de::Error>,
    },
}

fn default_uid_base() -> u32 {
    200_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_to_the_file_and_unknown_keys_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.toml");
        let text = "name = \"a\"\nstate_dir = \"state\"\nsocket = \"/run/a.sock\"\npolicy = \"policy.toml\"\n";
        std::fs::write(&path, text).unwrap();
        let config = AgentConfig::load(&path).unwrap();
        assert_eq!(config.state_dir, folder.path().join("state"));
        assert_eq!(config.socket, Path::new("/run/a.sock"));
        std::fs::write(&path, format!("{text}lisen = 1\n")).unwrap();
        let error = AgentConfig::load(&path).unwrap_err().to_string();
        assert!(
            error.contains("lisen") && error.contains("line 5"),
            "{error}"
        );
    }
}
