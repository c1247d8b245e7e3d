//! A site authority for development and the demo: P-256, PEM in and out. Production brings its own.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};

use crate::identity::{HostIdentity, IdentityError, LocalSigner, PeerIdentity, Pinned};

/// A development authority. Its key stays in this value (and in what [`DevCa::key_pem`] is written to).
pub struct DevCa {
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
    key_pem: String,
}

/// A host's (or gateway's) certificate and key, PEM.
pub struct HostMaterial {
    /// The certificate.
    pub certificate_pem: String,
    /// The private key, PKCS#8.
    pub key_pem: String,
    san: String,
}

impl DevCa {
    /// A new authority for a site.
    pub fn new(site: &str) -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let params = authority(site);
        let certificate_pem = params.self_signed(&key).map_err(failed)?.pem();
        let key_pem = key.serialize_pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate_pem,
            key_pem,
        })
    }

    /// Opens an authority that [`DevCa::new`] made.
    pub fn from_pem(
        site: &str,
        certificate_pem: &str,
        key_pem: &str,
    ) -> Result<Self, IdentityError> {
        let key = KeyPair::from_pem(key_pem).map_err(failed)?;
        let (certificate_pem, key_pem) = (certificate_pem.to_owned(), key_pem.to_owned());
        Ok(Self {
            issuer: Issuer::new(authority(site), key),
            certificate_pem,
            key_pem,
        })
    }

    /// The authority's certificate.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The authority's private key.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Issues a certificate for a host or gateway with one DNS name, for either side of a connection.
    pub fn issue(&self, san: &str) -> Result<HostMaterial, IdentityError> {
        self.issue_with(san, |_| {})
    }

    /// The same, with `change` to what the certificate says.
    pub(crate) fn issue_with(
        &self,
        san: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<HostMaterial, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut params = CertificateParams::new(vec![san.to_owned()]).map_err(failed)?;
        params.distinguished_name = common_name(san);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(HostMaterial {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            san: san.to_owned(),
        })
    }
}

impl HostMaterial {
    /// The identity with the key in this process.
    pub fn identity(&self) -> Result<HostIdentity, IdentityError> {
        HostIdentity::from_pem(
            &self.certificate_pem,
            Arc::new(LocalSigner::from_pem(&self.key_pem)?),
        )
    }

    /// What an allow-list says of this host.
    pub fn pinned(&self) -> Result<Pinned, IdentityError> {
        let peer: PeerIdentity = self.identity()?.as_peer().clone();
        Ok(Pinned {
            san: self.san.clone(),
            spki_sha256: peer.spki_sha256,
        })
    }
}

fn authority(site: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(&format!("Casemate development CA {site}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

fn failed(error: rcgen::Error) -> IdentityError {
    IdentityError::Malformed {
        what: "development certificate",
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{TrustAnchors, Usage};

    #[test]
    fn reopened_authority_issues_valid_certificates() {
        let ca = DevCa::new("site").unwrap();
        let again = DevCa::from_pem("site", ca.certificate_pem(), ca.key_pem()).unwrap();
        let host = again.issue("host.site").unwrap().identity().unwrap();
        let anchors = TrustAnchors::from_pem(ca.certificate_pem()).unwrap();
        let peer = anchors.verify(host.chain(), Usage::Server).unwrap();
        assert_eq!(peer.san, ["host.site"]);
    }
}
