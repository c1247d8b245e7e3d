//! Who this host is, who a peer claims to be, and which peers are allowed.
//!
//! Not yet believed: every certificate that arrives. A certificate of the site's authority alone is not
//! enough: chain first, then SAN **and** SPKI must be in the allow-list.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, TrustAnchor, UnixTime};

use crate::code::Code;
use crate::crypto::{self, CryptoError, P256Key, Provider};

/// Certificates one chain may have.
pub const MAX_CHAIN: usize = 4;
/// Bytes one certificate may have.
pub const MAX_CERTIFICATE: usize = 8 * 1024;

/// An identity that cannot be used, or one that is refused.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IdentityError {
    /// PEM or DER of a local identity does not parse.
    #[error("{what}: {reason}; give a PEM file with ECDSA P-256 material")]
    Malformed {
        /// The object.
        what: &'static str,
        /// The parser's words.
        reason: String,
    },
    /// The signer (possibly another process) failed.
    #[error("the host's signer failed: {0}")]
    Signer(String),
    /// The chain does not verify.
    #[error("certificate of the peer refused: {0}; it must chain to the configured site authority")]
    Chain(String),
    /// The chain verifies, but the peer is not in the allow-list.
    #[error(
        "peer {san:?} with key {spki} is not in the allow-list; if it is meant to be, add its SAN and SPKI to the policy"
    )]
    NotAllowed {
        /// Names in the certificate.
        san: Vec<String>,
        /// SHA-256 of its SPKI, hexadecimal.
        spki: String,
    },
    /// A signature over the transcript does not verify.
    #[error("the peer's signature over the session transcript does not verify")]
    Signature,
}

impl IdentityError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            IdentityError::Malformed { .. } | IdentityError::Signer(_) => Code::IdentityUnusable,
            IdentityError::Chain(_) => Code::CertificateInvalid,
            IdentityError::NotAllowed { .. } => Code::PeerNotAllowed,
            IdentityError::Signature => Code::SignatureInvalid,
        }
    }
}

/// Signs with the host's key: ECDSA P-256, SHA-256, ASN.1. The key may live in another process.
///
/// The two kinds of messages are told apart by their first bytes: TLS 1.3 `CertificateVerify` starts with
/// 64 spaces (RFC 8446, 4.4.3), a session transcript with `casemate-migrate/1 `.
pub trait HostSigner: Send + Sync + Debug {
    /// Returns the signature over SHA-256 of `message`.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IdentityError>;
}

/// A signer whose key is in this process.
pub struct LocalSigner(P256Key);

impl LocalSigner {
    /// From PKCS#8 DER.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, IdentityError> {
        P256Key::from_pkcs8(der)
            .map(Self)
            .map_err(|error| malformed("private key", error))
    }

    /// From PEM (`PRIVATE KEY`).
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| malformed("private key", error))?;
        Self::from_pkcs8(der.secret_pkcs8_der())
    }
}

impl Debug for LocalSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LocalSigner(ECDSA P-256)")
    }
}

impl HostSigner for LocalSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IdentityError> {
        self.0
            .sign(message)
            .map_err(|error| IdentityError::Signer(error.to_string()))
    }
}

/// This host's certificate chain (leaf first) and its signer.
#[derive(Clone, Debug)]
pub struct HostIdentity {
    chain: Vec<CertificateDer<'static>>,
    signer: Arc<dyn HostSigner>,
    peer_view: PeerIdentity,
}

impl HostIdentity {
    /// From a chain of DER certificates, leaf first.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        signer: Arc<dyn HostSigner>,
    ) -> Result<Self, IdentityError> {
        let leaf = chain
            .first()
            .ok_or_else(|| malformed("certificate chain", "it is empty"))?;
        let peer_view = PeerIdentity::parse(leaf)?;
        Ok(Self {
            chain,
            signer,
            peer_view,
        })
    }

    /// From PEM certificates (leaf first) and a signer.
    pub fn from_pem(chain: &str, signer: Arc<dyn HostSigner>) -> Result<Self, IdentityError> {
        Self::new(certificates(chain)?, signer)
    }

    /// How peers see this host.
    pub fn as_peer(&self) -> &PeerIdentity {
        &self.peer_view
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Signs a message; see [`HostSigner`].
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IdentityError> {
        self.signer.sign(message)
    }

    pub(crate) fn resolver(&self) -> Arc<SignerResolver> {
        let key = Arc::new(TlsKey(self.signer.clone()));
        Arc::new(SignerResolver(Arc::new(CertifiedKey::new(
            self.chain.clone(),
            key,
        ))))
    }
}

/// What a certificate says of its holder; believed only after [`TrustAnchors::verify`] and the allow-list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// DNS names and URIs of the subject alternative name.
    pub san: Vec<String>,
    /// SHA-256 of the subject public key info.
    pub spki_sha256: [u8; 32],
    /// The certificate, DER.
    pub certificate: Vec<u8>,
    point: Vec<u8>,
}

impl PeerIdentity {
    /// Reads names and key of a certificate.
    pub fn parse(der: &[u8]) -> Result<Self, IdentityError> {
        use x509_parser::extensions::GeneralName;
        if der.len() > MAX_CERTIFICATE {
            return Err(malformed("certificate", "it is larger than 8 KiB"));
        }
        let (_, certificate) = x509_parser::parse_x509_certificate(der)
            .map_err(|error| malformed("certificate", error))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| malformed("certificate names", error))?;
        let san = names
            .iter()
            .flat_map(|names| names.value.general_names.iter())
            .filter_map(|name| match name {
                GeneralName::DNSName(name) | GeneralName::URI(name) => Some((*name).to_owned()),
                _ => None,
            })
            .collect();
        let spki = certificate.public_key();
        Ok(Self {
            san,
            spki_sha256: crypto::sha256(&[spki.raw]),
            certificate: der.to_vec(),
            point: spki.subject_public_key.data.to_vec(),
        })
    }

    /// Verifies this peer's signature (ECDSA P-256, SHA-256).
    pub fn verify_signature(&self, message: &[u8], signature: &[u8]) -> Result<(), IdentityError> {
        crypto::verify_p256(&self.point, message, signature).map_err(|_| IdentityError::Signature)
    }
}

/// The authorities that may vouch for a host.
#[derive(Clone, Debug)]
pub struct TrustAnchors(Vec<TrustAnchor<'static>>);

/// What an end knows of itself and of whom it allows.
#[derive(Clone, Debug)]
pub struct Local {
    /// This host.
    pub identity: HostIdentity,
    /// The site authorities.
    pub anchors: TrustAnchors,
    /// The peers that policy allows, and the way to each.
    pub allow: AllowList,
    /// Who does the cryptography here.
    pub provider: Provider,
}

impl TrustAnchors {
    /// From PEM certificates.
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        let anchors = certificates(pem)?
            .iter()
            .map(|der| webpki::anchor_from_trusted_cert(der).map(|anchor| anchor.to_owned()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| malformed("site authority", error))?;
        Ok(Self(anchors))
    }

    /// Verifies a chain (leaf first) for its usage at the current time and returns who it names.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        usage: Usage,
    ) -> Result<PeerIdentity, IdentityError> {
        let (leaf, intermediates) = chain
            .split_first()
            .ok_or_else(|| IdentityError::Chain("the chain is empty".into()))?;
        if chain.len() > MAX_CHAIN || chain.iter().any(|der| der.len() > MAX_CERTIFICATE) {
            return Err(IdentityError::Chain("the chain is too long".into()));
        }
        let refused = |error: webpki::Error| IdentityError::Chain(error.to_string());
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let usage = match usage {
            Usage::Client => webpki::KeyUsage::client_auth(),
            Usage::Server => webpki::KeyUsage::server_auth(),
        };
        let provider = Provider::default().tls();
        let algorithms = provider.signature_verification_algorithms.all;
        let certificate = webpki::EndEntityCert::try_from(leaf).map_err(refused)?;
        certificate
            .verify_for_usage(
                algorithms,
                &self.0,
                intermediates,
                UnixTime::since_unix_epoch(now),
                usage,
                None,
                None,
            )
            .map_err(refused)?;
        PeerIdentity::parse(leaf).map_err(|error| IdentityError::Chain(error.to_string()))
    }

    pub(crate) fn subjects(&self) -> Vec<rustls::DistinguishedName> {
        self.0
            .iter()
            .map(|anchor| rustls::DistinguishedName::in_sequence(&anchor.subject))
            .collect()
    }
}

/// What a certificate is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// The side that connects (source).
    Client,
    /// The side that listens (destination).
    Server,
}

/// A name and a key that must both match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// One of the certificate's subject alternative names.
    pub san: String,
    /// SHA-256 of the subject public key info.
    pub spki_sha256: [u8; 32],
}

impl Pinned {
    /// Whether the certificate has both the name and the key.
    pub fn matches(&self, peer: &PeerIdentity) -> bool {
        self.spki_sha256 == peer.spki_sha256 && peer.san.contains(&self.san)
    }
}

/// How the connection to a peer runs, by local policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Path {
    /// The peer itself terminates the TLS; the TLS exporter is part of the keys.
    Direct,
    /// A gateway terminates the TLS; it can forward, but neither read nor change anything.
    Gateway(Pinned),
}

/// A peer that policy allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedPeer {
    /// The peer's name in the policy.
    pub name: String,
    /// Its name and key.
    pub identity: Pinned,
    /// The way to it.
    pub path: Path,
}

/// The peers that policy allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList(Vec<AllowedPeer>);

impl AllowList {
    /// From entries.
    pub fn new(peers: Vec<AllowedPeer>) -> Self {
        Self(peers)
    }

    /// The entry with a policy name.
    pub fn by_name(&self, name: &str) -> Option<&AllowedPeer> {
        self.0.iter().find(|peer| peer.name == name)
    }

    /// The entry of a host identity, wherever its TLS ends.
    pub fn find(&self, peer: &PeerIdentity) -> Result<&AllowedPeer, IdentityError> {
        self.0
            .iter()
            .find(|allowed| allowed.identity.matches(peer))
            .ok_or_else(|| not_allowed(peer))
    }

    /// Whether this certificate may terminate TLS: a direct peer itself, or the gateway of some peer.
    pub fn may_terminate_tls(&self, certificate: &PeerIdentity) -> Result<(), IdentityError> {
        let allowed = self.0.iter().any(|peer| match &peer.path {
            Path::Direct => peer.identity.matches(certificate),
            Path::Gateway(gateway) => gateway.matches(certificate),
        });
        if allowed {
            Ok(())
        } else {
            Err(not_allowed(certificate))
        }
    }
}

/// Lets rustls sign with a [`HostSigner`].
#[derive(Debug)]
struct TlsKey(Arc<dyn HostSigner>);

impl rustls::sign::SigningKey for TlsKey {
    fn choose_scheme(
        &self,
        offered: &[rustls::SignatureScheme],
    ) -> Option<Box<dyn rustls::sign::Signer>> {
        offered
            .contains(&rustls::SignatureScheme::ECDSA_NISTP256_SHA256)
            .then(|| Box::new(TlsSigner(self.0.clone())) as Box<dyn rustls::sign::Signer>)
    }

    fn algorithm(&self) -> rustls::SignatureAlgorithm {
        rustls::SignatureAlgorithm::ECDSA
    }
}

#[derive(Debug)]
struct TlsSigner(Arc<dyn HostSigner>);

impl rustls::sign::Signer for TlsSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        self.0
            .sign(message)
            .map_err(|error| rustls::Error::General(error.to_string()))
    }

    fn scheme(&self) -> rustls::SignatureScheme {
        rustls::SignatureScheme::ECDSA_NISTP256_SHA256
    }
}

/// Always answers with the host's one certificate, as client or server.
#[derive(Debug)]
pub(crate) struct SignerResolver(Arc<CertifiedKey>);

impl rustls::client::ResolvesClientCert for SignerResolver {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl rustls::server::ResolvesServerCert for SignerResolver {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| malformed("certificate", error))
}

fn malformed(what: &'static str, reason: impl ToString) -> IdentityError {
    IdentityError::Malformed {
        what,
        reason: reason.to_string(),
    }
}

fn not_allowed(peer: &PeerIdentity) -> IdentityError {
    IdentityError::NotAllowed {
        san: peer.san.clone(),
        spki: hex::encode(peer.spki_sha256),
    }
}

impl From<CryptoError> for IdentityError {
    fn from(error: CryptoError) -> Self {
        IdentityError::Signer(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, date_time_ymd};

    use super::*;
    use crate::dev_ca::DevCa;

    #[test]
    fn chain_alone_is_not_enough() {
        let ca = DevCa::new("test").unwrap();
        let anchors = TrustAnchors::from_pem(ca.certificate_pem()).unwrap();
        let (a, b) = (ca.issue("a.test").unwrap(), ca.issue("b.test").unwrap());
        let a = anchors
            .verify(a.identity().unwrap().chain(), Usage::Client)
            .unwrap();
        let b = anchors
            .verify(b.identity().unwrap().chain(), Usage::Client)
            .unwrap();
        let pin = |san: &str, of: &PeerIdentity| {
            let identity = Pinned {
                san: san.into(),
                spki_sha256: of.spki_sha256,
            };
            AllowList::new(vec![AllowedPeer {
                name: "a".into(),
                identity,
                path: Path::Direct,
            }])
        };
        assert!(pin("a.test", &a).find(&a).is_ok());
        assert_eq!(
            pin("a.test", &a).find(&b).unwrap_err().code(),
            Code::PeerNotAllowed
        );
        assert_eq!(
            pin("b.test", &a).find(&a).unwrap_err().code(),
            Code::PeerNotAllowed,
            "name must match"
        );
        assert_eq!(
            pin("b.test", &a).find(&b).unwrap_err().code(),
            Code::PeerNotAllowed,
            "key must match"
        );
    }

    #[test]
    fn other_authority_is_refused() {
        let anchors = TrustAnchors::from_pem(DevCa::new("one").unwrap().certificate_pem()).unwrap();
        let host = DevCa::new("two").unwrap().issue("a.test").unwrap();
        let error = anchors
            .verify(host.identity().unwrap().chain(), Usage::Server)
            .unwrap_err();
        assert_eq!(error.code(), Code::CertificateInvalid);
    }

    #[test]
    fn a_certificate_out_of_its_time_or_for_another_use_is_refused() {
        let ca = DevCa::new("test").unwrap();
        let anchors = TrustAnchors::from_pem(ca.certificate_pem()).unwrap();
        let judge = |change: fn(&mut CertificateParams), usage| {
            let host = ca.issue_with("a.test", change).unwrap();
            let verified = anchors.verify(host.identity().unwrap().chain(), usage);
            verified.map_err(|error| error.code())
        };
        let server_only = |params: &mut CertificateParams| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        };
        for usage in [Usage::Server, Usage::Client] {
            assert!(judge(|_| {}, usage).is_ok());
            let expired = judge(|params| params.not_after = date_time_ymd(2026, 1, 1), usage);
            let early = judge(
                |params| params.not_before = date_time_ymd(4000, 1, 1),
                usage,
            );
            assert_eq!(expired.unwrap_err(), Code::CertificateInvalid);
            assert_eq!(early.unwrap_err(), Code::CertificateInvalid);
        }
        assert!(judge(server_only, Usage::Server).is_ok());
        let as_client = judge(server_only, Usage::Client).unwrap_err();
        assert_eq!(as_client, Code::CertificateInvalid);
    }

    #[test]
    fn signature_binds_message_and_key() {
        let ca = DevCa::new("test").unwrap();
        let host = ca.issue("a.test").unwrap().identity().unwrap();
        let other = ca.issue("b.test").unwrap().identity().unwrap();
        let signature = host.sign(b"message").unwrap();
        assert!(
            host.as_peer()
                .verify_signature(b"message", &signature)
                .is_ok()
        );
        assert!(
            host.as_peer()
                .verify_signature(b"messagf", &signature)
                .is_err()
        );
        assert!(
            other
                .as_peer()
                .verify_signature(b"message", &signature)
                .is_err()
        );
    }
}
