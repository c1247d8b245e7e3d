//! The second store: HashiCorp Vault's KV secrets engine, version 2 (`/v1/MOUNT/data/…`, `/v1/MOUNT/metadata/…`).
//!
//! Vault's answers are bounded and parsed once; its own words go to the log, cut short, and never to a guest.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::broker::{MAX_SECRET_LEN, ResourcePath, ResourceStore, StoreError};
use rustls_pki_types::pem::PemObject;
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::http::Uri;
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};
use zeroize::{Zeroize, Zeroizing};

use super::admin::StoreAdmin;
use super::config::{Encoding, VaultConfig};
use super::files;

/// Vault, as far as it concerns this broker.
pub struct VaultStore {
    agent: ureq::Agent,
    config: VaultConfig,
}

/// Why Vault gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The address is none, or would send the token in clear.
    #[error(
        "[vault] address `{0}`: give https://HOST:PORT, or http:// for this machine's own loopback address"
    )]
    Address(String),
    /// A name that does not belong into a path.
    #[error("[vault] {0}: only A-Z a-z 0-9 . _ - and / between")]
    Name(&'static str),
    /// A file of the configuration.
    #[error("[vault] {0}")]
    File(#[from] files::FileError),
    /// The token is not one.
    #[error("[vault] token_file holds no token")]
    Token,
    /// The certificate authorities cannot be read.
    #[error("[vault] ca: {0}")]
    Ca(String),
    /// No answer in time, or no connection.
    #[error("Vault did not answer: {0}; check `address`, `ca`, and that Vault is unsealed")]
    Unreachable(Box<ureq::Error>),
    /// 403.
    #[error("Vault refused the token (403): renew it, or give its policy the path {0}")]
    Denied(String),
    /// Another status.
    #[error("Vault answered {status} for {path}: {said}")]
    Status {
        /// The status.
        status: u16,
        /// What was asked for.
        path: String,
        /// The start of what it said.
        said: String,
    },
    /// Not what Vault says.
    #[error("Vault's answer for {0} cannot be read: {1}")]
    Answer(String, &'static str),
    /// More than can be released.
    #[error("a secret has at most {MAX_SECRET_LEN} bytes")]
    TooLong,
    /// It cannot be written as the configuration says.
    #[error("the secret is no text; set [vault] encoding = \"base64\"")]
    NotText,
}

impl VaultStore {
    /// Checks the configuration; Vault itself is asked first when something is wanted.
    pub fn new(config: VaultConfig) -> Result<Self, VaultError> {
        let address = || VaultError::Address(config.address.clone());
        let uri: Uri = config.address.parse().map_err(|_| address())?;
        let local = uri.host().is_some_and(is_loopback);
        let bare = uri.path_and_query().is_none_or(|path| path.as_str() == "/");
        match uri.scheme_str() {
            Some("https") if bare => {}
            Some("http") if bare && local => {}
            _ => return Err(address()),
        }
        let names = [("mount", &config.mount), ("prefix", &config.prefix)];
        for (name, text) in names {
            if !text.is_empty() && !text.split('/').all(is_segment) {
                return Err(VaultError::Name(name));
            }
        }
        if config.mount.is_empty() {
            return Err(VaultError::Name("mount"));
        }
        let timeout = Duration::from_secs(config.timeout_s.clamp(1, 300));
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(roots(&config)?)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let agent = ureq::Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .timeout_global(Some(timeout))
            .build()
            .into();
        Ok(Self { agent, config })
    }

    /// The bytes of the secret at `path`; `None` where there is none, or it was deleted.
    fn read(&self, path: &ResourcePath) -> Result<Option<Zeroizing<Vec<u8>>>, VaultError> {
        let at = self.path("data", path.as_str());
        let Some(body) = self.ask(Verb::Get, &at, None)? else {
            return Ok(None);
        };
        let bad = |why| VaultError::Answer(at.clone(), why);
        let answer: ReadAnswer =
            serde_json::from_slice(&body).map_err(|_| bad("it is no KV v2 answer"))?;
        let Some(mut members) = answer.data.data else {
            return Ok(None);
        };
        let value = members.remove(&self.config.field);
        for (_, mut other) in members {
            wipe(&mut other);
        }
        let Some(Value::String(text)) = value else {
            return Err(bad("the secret has no such member, or it is no text"));
        };
        let text = Zeroizing::new(text);
        let secret = match self.config.encoding {
            Encoding::Text => text.as_bytes().to_vec(),
            Encoding::Base64 => STANDARD
                .decode(text.trim())
                .map_err(|_| bad("the secret is no base64"))?,
        };
        if secret.len() > MAX_SECRET_LEN {
            return Err(VaultError::TooLong);
        }
        Ok(Some(Zeroizing::new(secret)))
    }

    fn write(&self, path: &ResourcePath, secret: &[u8]) -> Result<(), VaultError> {
        if secret.len() > MAX_SECRET_LEN {
            return Err(VaultError::TooLong);
        }
        let text = match self.config.encoding {
            Encoding::Base64 => STANDARD.encode(secret),
            Encoding::Text => {
                String::from_utf8(secret.to_vec()).map_err(|_| VaultError::NotText)?
            }
        };
        let mut body = json!({ "data": { &self.config.field: text } });
        let sent = Zeroizing::new(body.to_string().into_bytes());
        wipe(&mut body);
        let at = self.path("data", path.as_str());
        match self.ask(Verb::Post, &at, Some(&sent))? {
            Some(_) => Ok(()),
            None => Err(VaultError::Answer(
                at,
                "the engine is not there; is `mount` right?",
            )),
        }
    }

    /// The names below `folder`; those that end with a slash are folders.
    fn names(&self, folder: &str) -> Result<Vec<String>, VaultError> {
        let at = format!("{}?list=true", self.path("metadata", folder));
        let Some(body) = self.ask(Verb::Get, &at, None)? else {
            return Ok(Vec::new());
        };
        let answer: ListAnswer = serde_json::from_slice(&body)
            .map_err(|_| VaultError::Answer(at.clone(), "it is no KV v2 list"))?;
        Ok(answer.data.keys)
    }

    fn all(&self) -> Result<Vec<String>, VaultError> {
        let mut found = Vec::new();
        for repository in self.folders("")? {
            for kind in self.folders(&repository)? {
                let folder = format!("{repository}{kind}");
                let names = self.names(&folder)?.into_iter();
                let paths = names.map(|name| format!("{folder}{name}"));
                found.extend(paths.filter(|path| path.parse::<ResourcePath>().is_ok()));
            }
        }
        found.sort();
        Ok(found)
    }

    fn folders(&self, below: &str) -> Result<Vec<String>, VaultError> {
        let mut names = self.names(below)?;
        names.retain(|name| name.strip_suffix('/').is_some_and(is_segment));
        Ok(names)
    }

    fn delete(&self, path: &ResourcePath) -> Result<bool, VaultError> {
        let there = self.read(path)?.is_some();
        self.ask(Verb::Delete, &self.path("metadata", path.as_str()), None)?;
        Ok(there)
    }

    /// One request; `None` for 404.
    fn ask(
        &self,
        verb: Verb,
        path: &str,
        body: Option<&[u8]>,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, VaultError> {
        let url = format!("{}{path}", self.config.address.trim_end_matches('/'));
        let token = self.token()?;
        let result = match verb {
            Verb::Get => self.headers(self.agent.get(&url), &token).call(),
            Verb::Delete => self.headers(self.agent.delete(&url), &token).call(),
            Verb::Post => self
                .headers(self.agent.post(&url), &token)
                .header("content-type", "application/json")
                .send(body.unwrap_or_default()),
        };
        let mut response = result.map_err(|e| VaultError::Unreachable(Box::new(e)))?;
        let status = response.status().as_u16();
        let limited = response.body_mut().with_config().limit(MAX_ANSWER_LEN);
        let body = limited
            .read_to_vec()
            .map(Zeroizing::new)
            .map_err(|e| VaultError::Unreachable(Box::new(e)))?;
        match status {
            200 | 204 => Ok(Some(body)),
            404 => Ok(None),
            403 => Err(VaultError::Denied(path.to_owned())),
            _ => Err(VaultError::Status {
                status,
                path: path.to_owned(),
                said: errors(&body),
            }),
        }
    }

    fn headers<B>(&self, request: ureq::RequestBuilder<B>, token: &str) -> ureq::RequestBuilder<B> {
        let request = request
            .header("x-vault-token", token)
            .header("x-vault-request", "true");
        match &self.config.namespace {
            Some(namespace) => request.header("x-vault-namespace", namespace),
            None => request,
        }
    }

    // Read anew each time: Vault's agent renews tokens by replacing the file.
    fn token(&self) -> Result<Zeroizing<String>, VaultError> {
        let bytes = files::read_secret(&self.config.token_file, 8 * 1024)?;
        let text = std::str::from_utf8(bytes.trim_ascii()).map_err(|_| VaultError::Token)?;
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(VaultError::Token);
        }
        Ok(Zeroizing::new(text.to_owned()))
    }

    fn path(&self, part: &str, below: &str) -> String {
        let VaultConfig { mount, prefix, .. } = &self.config;
        let slash = if prefix.is_empty() { "" } else { "/" };
        format!("/v1/{mount}/{part}/{prefix}{slash}{below}")
    }
}

impl ResourceStore for VaultStore {
    fn get(&self, path: &ResourcePath) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError> {
        self.read(path).map_err(|e| StoreError(e.to_string()))
    }
}

impl StoreAdmin for VaultStore {
    fn put(&self, path: &ResourcePath, secret: &[u8]) -> Result<(), StoreError> {
        self.write(path, secret)
            .map_err(|e| StoreError(e.to_string()))
    }

    fn list(&self) -> Result<Vec<String>, StoreError> {
        self.all().map_err(|e| StoreError(e.to_string()))
    }

    fn remove(&self, path: &ResourcePath) -> Result<bool, StoreError> {
        self.delete(path).map_err(|e| StoreError(e.to_string()))
    }
}

#[derive(Clone, Copy)]
enum Verb {
    Get,
    Post,
    Delete,
}

#[derive(Deserialize)]
struct ReadAnswer {
    data: ReadData,
}

// `data` is null for a deleted version.
#[derive(Deserialize)]
struct ReadData {
    data: Option<serde_json::Map<String, Value>>,
}

#[derive(Deserialize)]
struct ListAnswer {
    data: ListData,
}

#[derive(Deserialize)]
struct ListData {
    keys: Vec<String>,
}

#[derive(Deserialize)]
struct Errors {
    errors: Vec<String>,
}

/// What Vault says went wrong, short and printable.
fn errors(body: &[u8]) -> String {
    let said = serde_json::from_slice::<Errors>(body).map(|e| e.errors.join("; "));
    let printable = |c: &char| !c.is_control();
    let said = said.unwrap_or_default();
    said.chars().filter(printable).take(200).collect()
}

fn roots(config: &VaultConfig) -> Result<RootCerts, VaultError> {
    let Some(file) = &config.ca else {
        return Ok(RootCerts::WebPki);
    };
    let bytes = files::read_if_there(file, 1 << 20)?
        .ok_or_else(|| VaultError::Ca(format!("{} is not there", file.display())))?;
    let mut roots = Vec::new();
    for der in rustls_pki_types::CertificateDer::pem_slice_iter(&bytes) {
        let der = der.map_err(|e| VaultError::Ca(e.to_string()))?;
        roots.push(Certificate::from_der(&der).to_owned());
    }
    if roots.is_empty() {
        return Err(VaultError::Ca("it holds no certificate".to_owned()));
    }
    Ok(RootCerts::new_with_certs(&roots))
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.parse::<std::net::IpAddr>()
        .is_ok_and(|address| address.is_loopback())
}

fn is_segment(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('.')
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn wipe(value: &mut Value) {
    match value {
        Value::String(text) => text.zeroize(),
        Value::Array(items) => items.iter_mut().for_each(wipe),
        Value::Object(members) => members.values_mut().for_each(wipe),
        _ => {}
    }
}

const MAX_ANSWER_LEN: u64 = 2 * 1024 * 1024;
