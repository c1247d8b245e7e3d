//! TLS for people: version 1.3 only, a certificate of both sides, no resumption. Who is let in at all is the policy's
//! matter; here only that the name and the key are the client's own.

use std::path::Path;
use std::sync::Arc;

use casemate_crypto_migrate::identity::PeerIdentity;
use casemate_policy::Fingerprint;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::agent::api::Failure;
use crate::agent::config::ApiFiles;
use crate::agent::server::connection::Who;

/// What the files say.
pub fn server_config(files: &ApiFiles) -> Result<Arc<ServerConfig>, Failure> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for root in certificates(&files.client_ca)? {
        roots
            .add(root)
            .map_err(|e| unusable(&files.client_ca, &e))?;
    }
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|e| unusable(&files.client_ca, &e))?;
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?);
    let key = key.map_err(|e| unusable(&files.key, &e))?;
    let chain = certificates(&files.certificate)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| {
            let builder = builder.with_client_cert_verifier(verifier);
            builder.with_single_cert(chain, key)
        })
        .map_err(|e| unusable(&files.certificate, &e))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// Whom the handshake has proven.
pub fn client_of(connection: &ServerConnection) -> Option<Who> {
    let leaf = connection.peer_certificates()?.first()?;
    let found = PeerIdentity::parse(leaf).ok()?;
    Some(Who::Certificate {
        names: found.san,
        spki: Fingerprint::from_bytes(found.spki_sha256),
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let pem = read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) => Err(unusable(path, &"it holds no certificate (PEM)")),
        Err(e) => Err(unusable(path, &e)),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|e| unusable(path, &e))
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new("LISTEN", format!("[api] {}: {error}", path.display()))
}

/// The application protocol (RFC 7301).
pub const ALPN: &[u8] = b"http/1.1";
