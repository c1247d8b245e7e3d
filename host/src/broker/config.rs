//! The broker's configuration file (TOML); unknown keys are refused, paths are relative to its folder.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use casemate_attest::broker::{Limits, ResourcePath};
use casemate_policy::sign::Trust;
use serde::Deserialize;

/// What a broker is told at its start.
///
/// ```toml
/// state_dir = "state"                  # the epoch, how far the store has come, the ledger
/// policy = "host-policy.toml"          # asked before each release; signed with policy_trust
/// listen = ["tcp:0.0.0.0:8080", "vsock:8080"]
/// references = ["reference.toml"]        # for policies with reference_signers; signatures in FILE.sig
///
/// [tls]                                # without it, only loopback and vsock
/// certificate = "broker.crt"
/// key = "broker.key"
///
/// [store]                              # or [vault]
/// file = "secrets.sealed"
/// key = "secrets.key"                  # or "credential:NAME", systemd's
///
/// [session]                            # who may open a session at all
/// policy = "any-guest.toml"
///
/// [resources]                          # who may have what
/// "default/key/disk" = "disk-policy.toml"
/// ```
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BrokerConfig {
    /// Name of this broker in records, and of its ledger's key.
    #[serde(default = "default_name")]
    pub name: String,
    /// Folder for what must survive a restart: the epoch, and the ledger of every decision.
    pub state_dir: PathBuf,
    /// The host policy, which is asked before each acceptance and each release, and may only refuse.
    pub policy: PathBuf,
    /// Whose signatures that policy needs; they are read from beside it.
    pub policy_trust: Option<Trust>,
    /// Where guests connect.
    pub listen: Vec<Listen>,
    /// Signed reference values, each with its signatures in FILE.sig. They count for the policies whose
    /// `reference_signers` signed them, and until they expire.
    #[serde(default)]
    pub references: Vec<PathBuf>,
    /// For addresses that are not this machine's own.
    pub tls: Option<TlsFiles>,
    /// The sealed file.
    pub store: Option<SealedConfig>,
    /// HashiCorp Vault.
    pub vault: Option<VaultConfig>,
    /// Who may open a session.
    pub session: SessionConfig,
    /// The policy of each resource. What is not named here is released to nobody.
    #[serde(default)]
    pub resources: BTreeMap<ResourceName, PathBuf>,
    /// How much and how long.
    #[serde(default)]
    pub limits: LimitsConfig,
    /// Certificates for guests that bring none.
    #[serde(default)]
    pub certificates: CertificatesConfig,
}

/// An address to listen on: `tcp:ADDRESS:PORT` or `vsock:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Listen {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A vsock port, for the guests of this host.
    Vsock(u32),
}

/// A [`ResourcePath`] as a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct ResourceName(pub ResourcePath);

/// PEM files.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The chain, leaf first.
    pub certificate: PathBuf,
    /// The PKCS#8 key.
    pub key: PathBuf,
}

/// Where the sealed file is.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealedConfig {
    /// The file.
    pub file: PathBuf,
    /// Its key: a file of 64 hex digits or 32 bytes that only its owner can read, or `credential:NAME`.
    pub key: String,
}

/// Where Vault is: its KV secrets engine, version 2.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaultConfig {
    /// `https://HOST:PORT`; `http://` on this machine only.
    pub address: String,
    /// Where the engine is mounted.
    #[serde(default = "default_mount")]
    pub mount: String,
    /// What stands in front of each resource's path.
    #[serde(default)]
    pub prefix: String,
    /// A file with the token, readable by its owner only; read anew for each request.
    pub token_file: PathBuf,
    /// Vault Enterprise's namespace.
    pub namespace: Option<String>,
    /// The certificate authorities of Vault; absent: those of the web.
    pub ca: Option<PathBuf>,
    /// The member that holds the secret.
    #[serde(default = "default_field")]
    pub field: String,
    /// How it is written there.
    #[serde(default)]
    pub encoding: Encoding,
    /// How long Vault may take, in seconds.
    #[serde(default = "default_timeout")]
    pub timeout_s: u64,
}

/// How a secret is written in Vault, whose values are text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// Base64: any bytes.
    #[default]
    Base64,
    /// As it is: text only.
    Text,
}

/// Who may open a session.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionConfig {
    /// The owner's policy that evidence must meet.
    pub policy: PathBuf,
}

/// How much and how long.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Open sessions.
    pub sessions: usize,
    /// Seconds that a challenge waits.
    pub challenge_s: u64,
    /// Seconds that an attested session lasts.
    pub session_s: u64,
    /// Connections at once.
    pub connections: usize,
    /// Seconds that one request may take to arrive.
    pub request_s: u64,
}

/// What stands in for certificates that a guest does not bring. DER or PEM, unverified until used.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CertificatesConfig {
    /// VCEKs or VLEKs.
    pub leaves: Vec<PathBuf>,
    /// Intermediates and emulated roots.
    pub chain: Vec<PathBuf>,
    /// Revocation lists.
    pub crls: Vec<PathBuf>,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("broker configuration {file} cannot be read: {source}")]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what is wanted; the source names line and key.
    #[error("broker configuration {file}: {source}")]
    Invalid {
        /// The file.
        file: PathBuf,
        /// Line, key and what would be right.
        source: Box<toml::de::Error>,
    },
    /// No store, or two.
    #[error("broker configuration: give exactly one of [store] and [vault]")]
    Store,
    /// Nowhere to listen.
    #[error("broker configuration: `listen` names no address")]
    Nowhere,
    /// Plain HTTP towards a network.
    #[error(
        "broker configuration: {0} is not this machine's own, and plain HTTP is refused there; give [tls]"
    )]
    Plain(SocketAddr),
    /// A limit that lets nothing through.
    #[error("broker configuration: [limits] {0} must be {1}")]
    Limit(&'static str, &'static str),
}

impl BrokerConfig {
    /// Reads and checks the configuration.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            file: path.to_owned(),
            source,
        })?;
        let mut config: Self = toml::from_str(&text).map_err(|e| ConfigError::Invalid {
            file: path.to_owned(),
            source: Box::new(e),
        })?;
        config.below(path.parent().unwrap_or(Path::new("")));
        config.check()?;
        Ok(config)
    }

    fn below(&mut self, folder: &Path) {
        let tls = self
            .tls
            .iter_mut()
            .flat_map(|tls| [&mut tls.certificate, &mut tls.key]);
        let vault = self.vault.iter_mut().flat_map(|vault| {
            let ca = vault.ca.iter_mut();
            ca.chain([&mut vault.token_file])
        });
        let CertificatesConfig {
            leaves,
            chain,
            crls,
        } = &mut self.certificates;
        let certificates = leaves.iter_mut().chain(chain).chain(crls);
        let paths = [
            &mut self.state_dir,
            &mut self.policy,
            &mut self.session.policy,
        ];
        let paths = paths
            .into_iter()
            .chain(&mut self.references)
            .chain(self.resources.values_mut())
            .chain(tls)
            .chain(vault);
        for path in paths.chain(certificates) {
            *path = folder.join(&*path);
        }
        if let Some(store) = &mut self.store {
            store.file = folder.join(&store.file);
            if !store.key.starts_with(CREDENTIAL) {
                store.key = folder.join(&store.key).to_string_lossy().into_owned();
            }
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.store.is_some() == self.vault.is_some() {
            return Err(ConfigError::Store);
        }
        if self.listen.is_empty() {
            return Err(ConfigError::Nowhere);
        }
        for listen in &self.listen {
            match listen {
                Listen::Tcp(address) if self.tls.is_none() && !address.ip().is_loopback() => {
                    return Err(ConfigError::Plain(*address));
                }
                _ => {}
            }
        }
        let LimitsConfig {
            sessions,
            challenge_s,
            session_s,
            connections,
            request_s,
        } = self.limits;
        let seconds = "1 to 86400 (seconds)";
        for (name, value) in [
            ("challenge_s", challenge_s),
            ("session_s", session_s),
            ("request_s", request_s),
        ] {
            if !(1..=86_400).contains(&value) {
                return Err(ConfigError::Limit(name, seconds));
            }
        }
        for (name, value) in [("sessions", sessions), ("connections", connections)] {
            if !(1..=10_000).contains(&value) {
                return Err(ConfigError::Limit(name, "1 to 10000"));
            }
        }
        Ok(())
    }
}

impl LimitsConfig {
    /// As the protocol's core takes them.
    pub fn of_sessions(&self) -> Limits {
        Limits {
            sessions: self.sessions,
            challenge: Duration::from_secs(self.challenge_s),
            attested: Duration::from_secs(self.session_s),
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            sessions: 1000,
            challenge_s: 60,
            session_s: 300,
            connections: 256,
            request_s: 10,
        }
    }
}

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parsed = match text.split_once(':') {
            Some(("tcp", address)) => address.parse().ok().map(Self::Tcp),
            Some(("vsock", port)) => port.parse().ok().map(Self::Vsock),
            _ => None,
        };
        parsed.ok_or_else(|| format!("`{text}` is neither tcp:ADDRESS:PORT nor vsock:PORT"))
    }
}

impl TryFrom<String> for ResourceName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        ResourcePath::from_str(&text)
            .map(Self)
            .map_err(|e| format!("`{text}`: {e}"))
    }
}

fn default_name() -> String {
    "broker".to_owned()
}

fn default_mount() -> String {
    "secret".to_owned()
}

fn default_field() -> String {
    "value".to_owned()
}

const fn default_timeout() -> u64 {
    10
}

/// What a key's name starts with that is systemd's to give.
pub const CREDENTIAL: &str = "credential:";

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "state_dir = \"state\"\npolicy = \"host.toml\"\nlisten = [\"tcp:127.0.0.1:0\", \"vsock:8080\"]\n\
        store = { file = \"s\", key = \"k\" }\nsession = { policy = \"any.toml\" }\n\
        [resources]\n\"default/key/disk\" = \"disk.toml\"\n";

    fn load(text: &str) -> Result<BrokerConfig, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broker.toml");
        std::fs::write(&path, text).unwrap();
        let loaded = BrokerConfig::load(&path);
        loaded
            .inspect(|config| assert_eq!(config.state_dir, folder.path().join("state")))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_whole_configuration_is_read() {
        let config = load(GOOD).unwrap();
        assert_eq!(config.listen[1], Listen::Vsock(8080));
        assert_eq!(config.limits.of_sessions(), Limits::default());
        assert_eq!(config.resources.len(), 1);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, named) in [
            ("state_dir", "lisen = 1\nstate_dir", "lisen"),
            ("policy = \"host.toml\"\n", "", "missing field `policy`"),
            ("tcp:127.0.0.1:0", "tcp:0.0.0.0:0", "[tls]"),
            ("tcp:127.0.0.1:0", "udp:1", "udp:1"),
            ("default/key/disk", "../key/disk", "repository/type/tag"),
            (
                "[resources]",
                "[vault]\naddress = \"\"\ntoken_file = \"\"\n[resources]",
                "exactly one",
            ),
            ("store = { file = \"s\", key = \"k\" }", "", "exactly one"),
            (
                "[resources]",
                "[limits]\nsessions = 0\n[resources]",
                "sessions",
            ),
            ("[\"tcp:127.0.0.1:0\", \"vsock:8080\"]", "[]", "listen"),
        ] {
            assert!(GOOD.contains(from));
            let error = load(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(named), "{named}: {error}");
        }
    }
}
