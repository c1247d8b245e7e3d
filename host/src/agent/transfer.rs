//! What both ends of a move have in common: the host's credentials, its signature, the peers of the policy.

use std::fs;
use std::sync::Arc;

use casemate_crypto_migrate::identity::{HostSigner, LocalSigner};
use casemate_policy::document::{Peer, PeerPath};
use casemate_policy::{HostPolicy, Identity};

use crate::agent::api::Failure;
use crate::agent::config::IdentityFiles;
use crate::mover::protocol::{AgentAnswer, Credentials, PeerEntry, PinnedName, may_sign};
use crate::vmm::protocol::RoleError;

/// Who this host is to its peers. The key stays here: movers ask for signatures.
pub struct HostCredentials {
    /// Certificates, as movers need them.
    pub credentials: Credentials,
    signer: Arc<dyn HostSigner>,
}

impl HostCredentials {
    /// Reads the PEM files.
    pub fn load(files: &IdentityFiles) -> Result<Self, Failure> {
        let read = |path: &std::path::Path| {
            fs::read_to_string(path)
                .map_err(|e| Failure::new("IDENTITY", format!("{}: {e}", path.display())))
        };
        let credentials = Credentials {
            chain_pem: read(&files.certificate)?,
            authority_pem: read(&files.ca)?,
        };
        let signer = LocalSigner::from_pem(&read(&files.key)?)
            .map_err(|e| Failure::new("IDENTITY", format!("{}: {e}", files.key.display())))?;
        Ok(Self {
            credentials,
            signer: Arc::new(signer),
        })
    }

    /// Signs for a mover, but only what a handshake of ours needs signed: a mover that was broken into cannot make
    /// this host say anything else.
    pub fn sign(&self, message: &[u8]) -> Result<AgentAnswer, RoleError> {
        if !may_sign(message) {
            return Err(role_error(
                "SIGNATURE_REFUSED",
                "not a TLS 1.3 CertificateVerify nor a session transcript",
            ));
        }
        let signature = self
            .signer
            .sign(message)
            .map_err(|e| role_error("SIGNATURE_FAILED", e))?;
        Ok(AgentAnswer::Signed { signature })
    }
}

/// A peer of the policy in the mover's words.
pub fn peer_entry(peer: &Peer) -> PeerEntry {
    let gateway = match &peer.path {
        PeerPath::Direct => None,
        PeerPath::Gateway(identity) => Some(pinned(identity)),
    };
    PeerEntry {
        name: peer.name.clone(),
        identity: pinned(&peer.identity),
        gateway,
    }
}

/// All peers of the policy.
pub fn peer_entries(policy: &HostPolicy) -> Vec<PeerEntry> {
    policy.peers().iter().map(peer_entry).collect()
}

/// Who shall do a mover's cryptography, if the policy says so.
pub fn provider_name(policy: &HostPolicy) -> Option<String> {
    let provider = policy.migration.provider?;
    Some(provider.as_str().to_owned())
}

/// An error for a mover.
pub fn role_error(code: &str, text: impl std::fmt::Display) -> RoleError {
    RoleError {
        code: code.to_owned(),
        text: text.to_string(),
    }
}

fn pinned(identity: &Identity) -> PinnedName {
    PinnedName {
        san: identity.san.to_string(),
        spki_sha256: *identity.spki.as_bytes(),
    }
}
