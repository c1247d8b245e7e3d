//! Which roots count, and the intermediates below them.

use super::error::{ChainError, Link};
use super::x509::{CertificateError, Outline, Outside, Serial, Validity, parse_der};
use super::{
    AMD_ORGANIZATION, EMULATED_ASK_NAME, EMULATED_ASVK_NAME, EMULATED_ORGANIZATION,
    EMULATED_ROOT_NAME, pss,
};
use crate::product::Product;
use crate::report::SigningKey;
use rustls_pki_types::CertificateDer;
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;
use webpki::EndEntityCert;
use x509_parser::oid_registry::{
    OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER, OID_X509_EXT_BASIC_CONSTRAINTS,
    OID_X509_EXT_CRL_DISTRIBUTION_POINTS, OID_X509_EXT_EXTENDED_KEY_USAGE, OID_X509_EXT_KEY_USAGE,
    OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
};
use x509_parser::prelude::{KeyUsage, X509Certificate};

/// The roots a caller accepts: AMD's three, always, and emulated ones it names.
#[derive(Debug, Clone)]
pub struct SnpTrust {
    roots: Vec<Arc<Root>>,
}

/// A root that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnpRoot {
    /// AMD's ARK for a product.
    Amd(Product),
    /// A software secure processor's root, trusted because the caller named it.
    Emulated,
}

/// A well-formed ASK or ASVK certificate. Not believed, not even those that come with this crate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intermediate {
    outline: Outline,
}

/// An intermediate whose path to a root was checked. The dates of both are checked again at each
/// use. Cheap to clone and meant to be kept.
#[derive(Debug, Clone)]
pub struct TrustedIntermediate {
    inner: Arc<Checked>,
}

#[derive(Debug)]
struct Checked {
    root: Arc<Root>,
    outline: Outline,
    kind: SigningKey,
    /// `None` under an emulated root, which serves all products.
    product: Option<Product>,
}

#[derive(Debug)]
pub(super) struct Root {
    pub(super) outline: Outline,
    pub(super) id: SnpRoot,
    authority: Authority,
}

/// What a certificate may sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Authority {
    certificates: bool,
    lists: bool,
    /// How many further authorities may be below it.
    path_len: Option<u32>,
    unknown_critical: bool,
    key_purpose: bool,
}

impl SnpTrust {
    /// AMD's roots and nothing else.
    pub fn amd() -> Self {
        Self {
            roots: AMD_ROOTS.clone(),
        }
    }

    /// Also trusts this emulated root (DER or PEM), if the SHA-256 of its DER is one of `named`,
    /// it calls itself `ARK-EMULATED` of `NOT AMD`, and it is none of AMD's.
    pub fn with_emulated_root(
        mut self,
        der_or_pem: &[u8],
        named: &[[u8; 32]],
    ) -> Result<Self, ChainError> {
        let root = Root::parse(der_or_pem, SnpRoot::Emulated)?;
        if let Some(SnpRoot::Amd(product)) = self.find(&root.outline.sha256) {
            return Err(ChainError::EmulatedIsAmd(product));
        }
        if !named.contains(&root.outline.sha256) {
            return Err(not_pinned(&root.outline));
        }
        let Outline {
            common_name,
            organization,
            ..
        } = &root.outline;
        if common_name != EMULATED_ROOT_NAME || organization != EMULATED_ORGANIZATION {
            return Err(ChainError::NotMarkedEmulated);
        }
        if !root.signed(&root.outline.der) {
            return Err(ChainError::Signature(Link::Root));
        }
        self.roots.push(Arc::new(root));
        Ok(self)
    }

    /// Which root this certificate (DER or PEM) is. Verification does not need it, since the
    /// roots are here; a root that comes with evidence and is not one of them is a forgery.
    pub fn recognise(&self, der_or_pem: &[u8]) -> Result<SnpRoot, ChainError> {
        let (outline, ()) = outline(der_or_pem, Link::Root)?;
        self.find(&outline.sha256)
            .ok_or_else(|| not_pinned(&outline))
    }

    /// Checks an intermediate up to a root: dates of both, names, signature, authority, critical
    /// extensions. Costs one RSA verification; keep the result.
    pub fn trust_intermediate(
        &self,
        intermediate: &Intermediate,
        clock: SystemTime,
    ) -> Result<TrustedIntermediate, ChainError> {
        let outline = &intermediate.outline;
        let mut refused = not_pinned(outline);
        // Emulated roots all have one name, so more than one can be the issuer.
        for root in &self.roots {
            if root.outline.subject != outline.issuer {
                continue;
            }
            if root.signed(&outline.der) {
                return TrustedIntermediate::check(root, outline, clock);
            }
            refused = ChainError::Signature(Link::Intermediate);
        }
        Err(refused)
    }

    pub(super) fn roots(&self) -> &[Arc<Root>] {
        &self.roots
    }

    fn find(&self, sha256: &[u8; 32]) -> Option<SnpRoot> {
        let root = self
            .roots
            .iter()
            .find(|root| root.outline.sha256 == *sha256);
        root.map(|root| root.id)
    }
}

impl Intermediate {
    /// Reads exactly one certificate, DER or PEM, of at most [`super::MAX_CERTIFICATE_LEN`] bytes.
    /// [`super::split_pem`] takes a chain apart.
    pub fn parse(der_or_pem: &[u8]) -> Result<Self, ChainError> {
        let (outline, ()) = outline(der_or_pem, Link::Intermediate)?;
        Ok(Self { outline })
    }

    /// AMD's ASK (for VCEKs) or ASVK (for VLEKs) that comes with this crate.
    pub fn amd(product: Product, kind: SigningKey) -> Result<Self, ChainError> {
        Self::parse(match (product, kind) {
            (Product::Milan, SigningKey::Vcek) => include_bytes!("roots/milan-ask.der"),
            (Product::Milan, SigningKey::Vlek) => include_bytes!("roots/milan-asvk.der"),
            (Product::Genoa, SigningKey::Vcek) => include_bytes!("roots/genoa-ask.der"),
            (Product::Genoa, SigningKey::Vlek) => include_bytes!("roots/genoa-asvk.der"),
            (Product::Turin, SigningKey::Vcek) => include_bytes!("roots/turin-ask.der"),
            (Product::Turin, SigningKey::Vlek) => include_bytes!("roots/turin-asvk.der"),
        })
    }

    /// The common name: `SEV-Milan`, `SEV-VLEK-Milan`.
    pub fn common_name(&self) -> &str {
        &self.outline.common_name
    }

    /// SHA-256 of the DER.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.outline.sha256
    }

    /// The certificate, DER.
    pub fn as_der(&self) -> &[u8] {
        &self.outline.der
    }
}

impl TrustedIntermediate {
    fn check(root: &Arc<Root>, outline: &Outline, clock: SystemTime) -> Result<Self, ChainError> {
        if !root.authority.certificates || root.authority.path_len == Some(0) {
            return Err(ChainError::NotAuthority(Link::Root));
        }
        let (kind, product) = root.below(outline)?;
        let authority = Authority::of(outline, Link::Intermediate)?;
        if authority.unknown_critical {
            return Err(ChainError::CriticalExtension(Link::Intermediate));
        }
        if authority.key_purpose {
            return Err(ChainError::KeyPurpose);
        }
        if !authority.certificates {
            return Err(ChainError::NotAuthority(Link::Intermediate));
        }
        let checked = Self {
            inner: Arc::new(Checked {
                root: Arc::clone(root),
                outline: outline.clone(),
                kind,
                product,
            }),
        };
        checked.check_dates(clock)?;
        Ok(checked)
    }

    /// Checks the dates of the root and of the intermediate.
    pub fn check_dates(&self, clock: SystemTime) -> Result<(), ChainError> {
        check_dates(&self.inner.root.outline, Link::Root, clock)?;
        check_dates(&self.inner.outline, Link::Intermediate, clock)
    }

    /// The kind of leaf that it signs.
    pub fn kind(&self) -> SigningKey {
        self.inner.kind
    }

    /// The product that it is for; `None` under an emulated root, which serves all.
    pub fn product(&self) -> Option<Product> {
        self.inner.product
    }

    /// The root above it.
    pub fn root(&self) -> SnpRoot {
        self.inner.root.id
    }

    /// Whether the root is a software secure processor's, which protects nothing from its host.
    pub fn emulated(&self) -> bool {
        self.root() == SnpRoot::Emulated
    }

    /// SHA-256 of its DER.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.inner.outline.sha256
    }

    /// SHA-256 of the root's DER.
    pub fn root_fingerprint(&self) -> [u8; 32] {
        self.inner.root.outline.sha256
    }

    /// Its serial number.
    pub fn serial(&self) -> &Serial {
        &self.inner.outline.serial
    }

    /// The root's serial number.
    pub fn root_serial(&self) -> &Serial {
        &self.inner.root.outline.serial
    }

    /// Its period of validity.
    pub fn validity(&self) -> Validity {
        self.inner.outline.validity
    }

    /// The root's period of validity.
    pub fn root_validity(&self) -> Validity {
        self.inner.root.outline.validity
    }

    pub(super) fn outline(&self) -> &Outline {
        &self.inner.outline
    }

    pub(super) fn trusted_root(&self) -> &Arc<Root> {
        &self.inner.root
    }
}

impl Root {
    fn parse(der_or_pem: &[u8], id: SnpRoot) -> Result<Self, ChainError> {
        let (outline, ()) = outline(der_or_pem, Link::Root)?;
        let authority = Authority::of(&outline, Link::Root)?;
        Ok(Self {
            outline,
            id,
            authority,
        })
    }

    /// Whether it may sign revocation lists.
    pub(super) fn signs_lists(&self) -> bool {
        self.authority.lists
    }

    /// Whether the signature of this certificate is this root's.
    fn signed(&self, der: &[u8]) -> bool {
        parse_der(der).is_ok_and(|certificate| {
            let body = certificate.tbs_certificate.as_ref();
            self.verify(body, &certificate.signature_value.data)
        })
    }

    /// Whether `signature` over `message` is this root's.
    pub(super) fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        let der = CertificateDer::from(self.outline.der.as_slice());
        EndEntityCert::try_from(&der)
            .and_then(|root| root.verify_signature(pss::PSS, message, signature))
            .is_ok()
    }

    /// What an intermediate of this name is for.
    fn below(&self, outline: &Outline) -> Result<(SigningKey, Option<Product>), ChainError> {
        let (ask, asvk, organization, product) = match self.id {
            SnpRoot::Amd(product) => {
                let name = product.kds_name();
                let names = (format!("SEV-{name}"), format!("SEV-VLEK-{name}"));
                (names.0, names.1, AMD_ORGANIZATION, Some(product))
            }
            SnpRoot::Emulated => {
                let names = (EMULATED_ASK_NAME.into(), EMULATED_ASVK_NAME.into());
                (names.0, names.1, EMULATED_ORGANIZATION, None)
            }
        };
        let refused = |expected: String, found: &str| ChainError::Name {
            link: Link::Intermediate,
            expected,
            found: found.to_owned(),
        };
        if outline.organization != organization {
            return Err(refused(organization.to_owned(), &outline.organization));
        }
        match &outline.common_name {
            name if *name == ask => Ok((SigningKey::Vcek, product)),
            name if *name == asvk => Ok((SigningKey::Vlek, product)),
            name => Err(refused(format!("{ask}` or `{asvk}"), name)),
        }
    }
}

impl Authority {
    fn of(outline: &Outline, link: Link) -> Result<Self, ChainError> {
        let malformed = || ChainError::Certificate(link, CertificateError::Malformed);
        let certificate = parse_der(&outline.der).map_err(|_| malformed())?;
        let constraints = certificate.basic_constraints().map_err(|_| malformed())?;
        let constraints = constraints.map(|extension| extension.value);
        let usage = certificate.key_usage().map_err(|_| malformed())?;
        // RFC 5280, 4.2.1.3: an authority's certificate has a key usage.
        let may = |what: fn(&KeyUsage) -> bool| {
            constraints.is_some_and(|constraints| constraints.ca)
                && usage.as_ref().is_some_and(|usage| what(usage.value))
        };
        Ok(Self {
            certificates: may(KeyUsage::key_cert_sign),
            lists: may(KeyUsage::crl_sign),
            path_len: constraints.and_then(|constraints| constraints.path_len_constraint),
            unknown_critical: has_unknown_critical(&certificate),
            key_purpose: certificate
                .iter_extensions()
                .any(|extension| extension.oid == OID_X509_EXT_EXTENDED_KEY_USAGE),
        })
    }
}

/// The error for a clock outside a certificate's dates.
pub(super) fn check_dates(
    outline: &Outline,
    link: Link,
    clock: SystemTime,
) -> Result<(), ChainError> {
    outline
        .validity
        .check(clock)
        .map_err(|outside| match outside {
            Outside::Before => ChainError::NotYetValid(link),
            Outside::After => ChainError::Expired(link),
        })
}

fn outline(der_or_pem: &[u8], link: Link) -> Result<(Outline, ()), ChainError> {
    Outline::parse(der_or_pem, |_| Ok::<_, CertificateError>(()))
        .map_err(|error| ChainError::Certificate(link, error))
}

fn not_pinned(outline: &Outline) -> ChainError {
    ChainError::RootNotPinned(format!(
        "`{}` ({})",
        outline.common_name,
        hex::encode(outline.sha256)
    ))
}

fn has_unknown_critical(certificate: &X509Certificate<'_>) -> bool {
    certificate.iter_extensions().any(|extension| {
        extension.critical
            && ![
                OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER,
                OID_X509_EXT_BASIC_CONSTRAINTS,
                OID_X509_EXT_CRL_DISTRIBUTION_POINTS,
                OID_X509_EXT_EXTENDED_KEY_USAGE,
                OID_X509_EXT_KEY_USAGE,
                OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
            ]
            .contains(&extension.oid)
    })
}

/// AMD's roots: the certificates that come with this crate, as far as their SHA-256 is pinned.
static AMD_ROOTS: LazyLock<Vec<Arc<Root>>> = LazyLock::new(|| {
    PINNED
        .iter()
        .filter_map(|(product, der, sha256)| {
            let root = Root::parse(der, SnpRoot::Amd(*product)).ok()?;
            (hex::encode(root.outline.sha256) == *sha256).then(|| Arc::new(root))
        })
        .collect()
});

const PINNED: [(Product, &[u8], &str); 3] = [
    (
        Product::Milan,
        include_bytes!("roots/milan-ark.der"),
        "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
    ),
    (
        Product::Genoa,
        include_bytes!("roots/genoa-ark.der"),
        "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
    ),
    (
        Product::Turin,
        include_bytes!("roots/turin-ark.der"),
        "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
    ),
];
