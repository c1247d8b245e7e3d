//! The owner's key broker as a program: configuration, stores, policies, HTTP.
//!
//! The protocol itself, and what must hold before a secret leaves, is [`casemate_attest::broker`].

mod acts;
pub mod admin;
mod appraise;
pub mod config;
mod epoch;
mod files;
mod governed;
pub mod sealed;
mod server;
#[cfg(test)]
mod tests;
pub mod vault;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use casemate_attest::broker::{
    Broker, Clock, Decision, DecisionLog, EphemeralIssuer, LogOnly, NotRecorded, Parts,
    ResourceStore, StoreError,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use acts::Acts;
use admin::StoreAdmin;
use config::{BrokerConfig, TlsFiles};
use governed::{Governed, Government};

pub use appraise::{OwnerPolicies, PoliciesError};
pub use epoch::{State, StateError};
pub use files::{FileError, read_secret};
pub use server::{ListenError, Server};

/// Why a broker does not start, or an owner's command fails.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// A policy.
    #[error(transparent)]
    Policies(#[from] PoliciesError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Vault's configuration.
    #[error(transparent)]
    Vault(#[from] vault::VaultError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An address.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The certificate or its key.
    #[error("[tls] {0}: {1}")]
    Tls(PathBuf, String),
    /// The operating system.
    #[error("broker: {0}")]
    System(#[from] std::io::Error),
    /// The host policy, or the ledger.
    #[error("broker: {0}")]
    Governed(String),
    /// No randomness.
    #[error("broker: the operating system gives no randomness")]
    Random,
}

/// A broker that is ready, and the state folder it holds.
pub struct Opened {
    /// The protocol's core.
    pub broker: Arc<Broker>,
    /// Its own for as long as this lives.
    pub state: State,
}

/// Makes a broker of its configuration: takes the state folder, advances the epoch, reads all policies, and looks
/// into the store once, so that a wrong key shows at the start.
pub fn open(config: &mut BrokerConfig) -> Result<Opened, BrokerError> {
    open_with(config, Arc::new(SystemClock::new()), Arc::new(LogOnly))
}

/// The same with another clock, and with somebody more who takes every decision before it takes effect.
pub fn open_with(
    config: &mut BrokerConfig,
    clock: Arc<dyn Clock>,
    log: Arc<dyn DecisionLog>,
) -> Result<Opened, BrokerError> {
    let owner = Arc::new(OwnerPolicies::load(config, clock.wall())?);
    let state = State::open(&config.state_dir)?;
    let government = Arc::new(Government::open(config, clock.wall())?);
    let log = Arc::new(Both(government.clone(), log));
    let appraiser = Arc::new(Governed::new(owner, government, config.limits.sessions));
    let store = open_store(config)?;
    if let Err(error) = store.list() {
        // Vault may come later, and its token need not allow lists.
        tracing::warn!(%error, "the resource store cannot be listed");
    }
    let store: Arc<dyn ResourceStore> = Arc::<dyn StoreAdmin>::from(store);
    let tokens = EphemeralIssuer::generate().ok_or(BrokerError::Random)?;
    let parts = Parts {
        appraiser,
        store,
        tokens: Arc::new(tokens),
        log,
        clock,
    };
    let broker = Broker::new(parts, config.limits.of_sessions(), state.epoch());
    Ok(Opened {
        broker: Arc::new(broker),
        state,
    })
}

/// The ledger first: what it does not take has no effect.
struct Both(Arc<Government>, Arc<dyn DecisionLog>);

impl DecisionLog for Both {
    fn record(&self, decision: &Decision) -> Result<(), NotRecorded> {
        DecisionLog::record(&*self.0, decision)?;
        self.1.record(decision)
    }
}

/// The store of a configuration. Takes its part of the configuration out.
pub fn open_store(config: &mut BrokerConfig) -> Result<Box<dyn StoreAdmin>, BrokerError> {
    if let Some(vault) = config.vault.take() {
        return Ok(Box::new(vault::VaultStore::new(vault)?));
    }
    let store = config.store.take().ok_or(config::ConfigError::Store)?;
    std::fs::create_dir_all(&config.state_dir)?;
    let key = files::read_key(&store.key)?;
    let sealed = sealed::SealedStore::new(&store.file, key, &config.state_dir);
    Ok(Box::new(sealed))
}

/// The same for its owner: each change leaves a note for the ledger.
pub fn owners_store(config: &mut BrokerConfig) -> Result<Box<dyn StoreAdmin>, BrokerError> {
    let acts = Acts::of(&config.state_dir);
    let store = open_store(config)?;
    Ok(Box::new(acts::Noting { store, acts }))
}

/// Serves until SIGTERM or SIGINT.
pub fn serve(mut config: BrokerConfig) -> Result<(), BrokerError> {
    let opened = open(&mut config)?;
    let tls = config.tls.as_ref().map(tls_config).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let broker = opened.broker.clone();
        let server = Server::bind(broker, &config.listen, tls, config.limits).await?;
        for address in server.addresses() {
            tracing::info!(%address, "broker listens");
        }
        let shutdown = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        server.run(shutdown).await;
        Ok(())
    })
}

/// TLS 1.2 and 1.3 by rustls with ring.
fn tls_config(files: &TlsFiles) -> Result<Arc<rustls::ServerConfig>, BrokerError> {
    let wrong = |file: &PathBuf, why: String| BrokerError::Tls(file.clone(), why);
    let pem = files::read_if_there(&files.certificate, 1 << 20)?.unwrap_or_default();
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let chain = chain.map_err(|e| wrong(&files.certificate, e.to_string()))?;
    let pem = read_secret(&files.key, 1 << 16)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|e| wrong(&files.key, e.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|e| wrong(&files.certificate, e.to_string()))?;
    Ok(Arc::new(config))
}

/// The machine's clocks.
pub struct SystemClock(Instant);

impl SystemClock {
    /// Counts from now.
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}
