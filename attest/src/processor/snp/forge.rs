//! Certificates, lists and reports that say anything, for tests of those who must refuse them.
//!
//! An [`Authority`] is an emulated root whose key is kept. Everything it signs is well signed; it
//! is for the caller to make it wrong. Only with the cargo feature `testing`.

pub use super::x509::{CertificateSpec, CrlSpec, ExtensionSpec, PssForm};

use super::identity::{self, ARK_NAME, ASK_SERIAL, ASVK_SERIAL};
use super::key::EndorsementKey;
use super::report::ReportFields;
use super::x509::{CaKey, ca_extensions, p384_public_der};
use super::{CaKeySize, SnpIdentity};
use crate::evidence::table::{self, CertificateKind, TableCertificate};
use crate::product::Product;
use crate::report::{
    CpuidFms, FirmwareVersion, PlatformInfo, REPORT_LEN, ReportVersion, SigningKey, SnpPolicy,
};
use crate::tcb::{RawTcb, TcbVersion};
use p384::SecretKey;
use rand_core::OsRng;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};
use x509_cert::der::Encode as _;
use x509_cert::der::asn1::Ia5StringRef;

/// An emulated root that signs whatever it is given.
pub struct Authority {
    identity: SnpIdentity,
    ark: CaKey,
}

/// Who signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signer {
    /// The root.
    Ark,
    /// The issuer of VCEKs.
    Ask,
    /// The issuer of VLEKs.
    Asvk,
}

/// A leaf with anything in it. [`LeafSpec::vcek`] and [`LeafSpec::vlek`] start from a good one.
#[derive(Debug, Clone)]
pub struct LeafSpec {
    /// Which kind its key is to sign as.
    pub kind: SigningKey,
    /// Who signs it; the name in the certificate is another matter.
    pub signer: Signer,
    /// What the certificate says.
    pub certificate: CertificateSpec,
}

impl Authority {
    /// A new one with 2048-bit keys.
    pub fn generate() -> Self {
        Self::generate_with(CaKeySize::Rsa2048)
    }

    /// A new one with keys of this size.
    pub fn generate_with(size: CaKeySize) -> Self {
        let (identity, ark) = done(SnpIdentity::build(size, SystemTime::now()));
        Self { identity, ark }
    }

    /// One for a whole test program: RSA keys take a while.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Authority> = LazyLock::new(Authority::generate);
        &SHARED
    }

    /// Another one, which nobody should trust in the place of [`shared`](Self::shared).
    pub fn other() -> &'static Self {
        static OTHER: LazyLock<Authority> = LazyLock::new(Authority::generate);
        &OTHER
    }

    /// The platform below this root: good VCEKs and VLEKs come from it.
    pub fn identity(&self) -> &SnpIdentity {
        &self.identity
    }

    /// The same platform once more, to be owned: for a [`SnpProcessor`](super::SnpProcessor).
    pub fn identity_again(&self) -> SnpIdentity {
        done(
            self.identity
                .to_bytes()
                .and_then(|kept| SnpIdentity::from_bytes(&kept)),
        )
    }

    /// The root, DER.
    pub fn ark(&self) -> &[u8] {
        &self.identity.certificates().ark
    }

    /// The issuer of VCEKs, DER.
    pub fn ask(&self) -> &[u8] {
        &self.identity.certificates().ask
    }

    /// The issuer of VLEKs, DER.
    pub fn asvk(&self) -> &[u8] {
        &self.identity.certificates().asvk
    }

    /// A leaf with a new key.
    pub fn leaf(&self, spec: &LeafSpec) -> EndorsementKey {
        let key = SecretKey::random(&mut OsRng);
        let public = done(p384_public_der(&key));
        let certificate = self.certificate(spec.signer, &spec.certificate, &public);
        done(EndorsementKey::new(spec.kind, &key, certificate))
    }

    /// A certificate for `public`, a SubjectPublicKeyInfo.
    pub fn certificate(&self, signer: Signer, spec: &CertificateSpec, public: &[u8]) -> Vec<u8> {
        done(self.key(signer).certify(spec, public))
    }

    /// A certificate around any to-be-signed part, valid DER or not.
    pub fn certificate_around(&self, signer: Signer, tbs: &[u8], pss: PssForm) -> Vec<u8> {
        let signature = done(done(self.key(signer).sign(tbs)).to_der());
        let algorithm = done(done(pss.identifier()).to_der());
        let whole = [tbs, &algorithm, &signature].concat();
        let mut der = vec![0x30, 0x83];
        der.extend(whole.len().to_be_bytes().iter().skip(5));
        // Three length bytes are the canonical form only from 64 KiB on.
        if let Ok(len) = u16::try_from(whole.len()) {
            der = vec![0x30, 0x82];
            der.extend(len.to_be_bytes());
        }
        der.extend(whole);
        der
    }

    /// The to-be-signed part of a certificate, to be damaged and given to
    /// [`certificate_around`](Self::certificate_around).
    pub fn to_be_signed(spec: &CertificateSpec, public: &[u8]) -> Vec<u8> {
        let tbs = done(super::x509::tbs_certificate(spec, public));
        done(tbs.to_der())
    }

    /// A new intermediate's certificate in the place of the ASK or ASVK: same key, whatever the
    /// caller makes of the specification, which starts out good.
    pub fn intermediate(&self, of: Signer, change: impl FnOnce(&mut CertificateSpec)) -> Vec<u8> {
        let public = done(self.key(of).public_der());
        let (serial, name) = match of {
            Signer::Ark => (identity::ARK_SERIAL, ARK_NAME),
            Signer::Ask => (ASK_SERIAL, identity::ASK_NAME),
            Signer::Asvk => (ASVK_SERIAL, identity::ASVK_NAME),
        };
        let root = done(self.ark.public_der());
        let issuer = (of != Signer::Ark).then_some(root.as_slice());
        let mut spec = CertificateSpec {
            serial: serial.to_be_bytes().to_vec(),
            issuer: identity::full_name(ARK_NAME),
            subject: identity::full_name(name),
            not_before: ago(DAY),
            not_after: ahead(25 * 365 * DAY),
            extensions: done(ca_extensions(&public, issuer)),
            pss: PssForm::ExplicitTrailer,
        };
        change(&mut spec);
        self.certificate(Signer::Ark, &spec, &public)
    }

    /// A revocation list that the root signed: a good one that revokes nothing, changed.
    pub fn crl(&self, change: impl FnOnce(&mut CrlSpec)) -> Vec<u8> {
        self.crl_by(Signer::Ark, change)
    }

    /// A revocation list that `signer` signed.
    pub fn crl_by(&self, signer: Signer, change: impl FnOnce(&mut CrlSpec)) -> Vec<u8> {
        let mut spec = CrlSpec {
            issuer: identity::full_name(ARK_NAME),
            number: 2,
            this_update: ago(DAY),
            next_update: Some(ahead(30 * DAY)),
            revoked: Vec::new(),
            pss: PssForm::ExplicitTrailer,
        };
        change(&mut spec);
        done(self.key(signer).revoke(&spec))
    }

    /// The certificate table that a host of `product` with [`tcb`] hands over: VCEK, ASK, ARK.
    pub fn host_certificates(&self, product: Product) -> Vec<u8> {
        let vcek = done(self.identity.vcek(product, tcb(product)));
        let entry = |kind, bytes: &[u8]| TableCertificate {
            kind,
            bytes: bytes.to_vec(),
        };
        let all = [
            entry(CertificateKind::Vcek, vcek.certificate()),
            entry(CertificateKind::Ask, self.ask()),
            entry(CertificateKind::Ark, self.ark()),
        ];
        done(table::encode(&all))
    }

    /// What the socket of an emulated processor answers to an agent: MSG_REPORT_RSP with a signed
    /// report of `product` with [`tcb`], the length of the host's certificate table, the table.
    pub fn report_answer(&self, product: Product, fields: &ReportFields) -> Vec<u8> {
        let vcek = done(self.identity.vcek(product, tcb(product)));
        let table = self.host_certificates(product);
        let mut answer = vec![0; 4];
        answer.extend((REPORT_LEN as u32).to_le_bytes());
        answer.resize(32, 0);
        answer.extend(done(vcek.sign_report(fields)));
        answer.extend((table.len() as u32).to_le_bytes());
        answer.extend(table);
        answer
    }

    fn key(&self, signer: Signer) -> &CaKey {
        let (ask, asvk) = self.identity.intermediates();
        match signer {
            Signer::Ark => &self.ark,
            Signer::Ask => ask,
            Signer::Asvk => asvk,
        }
    }
}

impl Signer {
    /// The serial number of its certificate, as a revocation list names it.
    pub fn serial(self) -> Vec<u8> {
        let serial = match self {
            Self::Ark => identity::ARK_SERIAL,
            Self::Ask => ASK_SERIAL,
            Self::Asvk => ASVK_SERIAL,
        };
        serial.to_be_bytes().to_vec()
    }
}

impl LeafSpec {
    /// A good VCEK.
    pub fn vcek(product: Product, tcb: TcbVersion, hwid: &[u8]) -> Self {
        let mut extensions = done(identity::tcb_extensions(product, tcb));
        extensions.push(extension("4", hwid.to_vec()));
        Self {
            kind: SigningKey::Vcek,
            signer: Signer::Ask,
            certificate: identity::leaf_spec(SigningKey::Vcek, SystemTime::now(), extensions),
        }
    }

    /// A good VLEK.
    pub fn vlek(product: Product, tcb: TcbVersion, csp_id: &str) -> Self {
        let mut extensions = done(identity::tcb_extensions(product, tcb));
        extensions.push(extension("5", ia5(csp_id)));
        Self {
            kind: SigningKey::Vlek,
            signer: Signer::Asvk,
            certificate: identity::leaf_spec(SigningKey::Vlek, SystemTime::now(), extensions),
        }
    }

    /// Replaces the value of the AMD extension `below` AMD's arc (`"3.8"` is the microcode), or
    /// adds it.
    pub fn with_extension(mut self, below: &str, value: Vec<u8>) -> Self {
        let new = extension(below, value);
        let extensions = &mut self.certificate.extensions;
        match extensions.iter_mut().find(|old| old.oid == new.oid) {
            Some(old) => *old = new,
            None => extensions.push(new),
        }
        self
    }

    /// Leaves the AMD extension out.
    pub fn without_extension(mut self, below: &str) -> Self {
        let oid = identity::oid(below);
        self.certificate.extensions.retain(|old| old.oid != oid);
        self
    }

    /// Gives the AMD extension a second time.
    pub fn with_second_extension(mut self, below: &str, value: Vec<u8>) -> Self {
        self.certificate.extensions.push(extension(below, value));
        self
    }

    /// Valid from `from` to `to`.
    pub fn valid(mut self, from: SystemTime, to: SystemTime) -> Self {
        self.certificate.not_before = from;
        self.certificate.not_after = to;
        self
    }
}

/// A good report of `product` in `version`, to be changed and signed: chip id and TCB as the
/// platform below `identity` would have them, `tcb` everywhere, and each other field different
/// from zero wherever zero has a meaning.
pub fn report_fields(
    identity: &SnpIdentity,
    product: Product,
    version: ReportVersion,
    signing_key: SigningKey,
    tcb: TcbVersion,
) -> ReportFields {
    let raw = tcb.to_raw(product).unwrap_or(RawTcb([0; 8]));
    let firmware = FirmwareVersion {
        major: 1,
        minor: 55,
        build: 21,
    };
    let (family, model, stepping) = match product {
        Product::Milan => (0x19, 0x01, 1),
        Product::Genoa => (0x19, 0x11, 1),
        Product::Turin => (0x1a, 0x02, 1),
    };
    ReportFields {
        version,
        guest_svn: 0,
        policy: SnpPolicy(0x3_0000),
        family_id: [0; 16],
        image_id: [0; 16],
        vmpl: 0,
        current_tcb: raw,
        platform_info: PlatformInfo(0x25),
        has_author_key: false,
        masks_chip_key: false,
        signing_key,
        unsigned: false,
        report_data: [0; 64],
        measurement: [0x4d; 48],
        host_data: [0; 32],
        id_key_digest: [0; 48],
        author_key_digest: [0; 48],
        report_id: [0x1d; 32],
        report_id_ma: [0xff; 32],
        reported_tcb: raw,
        cpuid: CpuidFms {
            family,
            model,
            stepping,
        },
        chip_id: match signing_key {
            SigningKey::Vcek => done(identity.chip_id(product)),
            SigningKey::Vlek => [0; 64],
        },
        committed_tcb: raw,
        current_firmware: firmware,
        committed_firmware: firmware,
        launch_tcb: raw,
        launch_mitigations: 0xb,
        current_mitigations: 0xb,
    }
}

/// A TCB version that `product` can have.
pub fn tcb(product: Product) -> TcbVersion {
    TcbVersion {
        fmc: (product == Product::Turin).then_some(1),
        boot_loader: 4,
        tee: 1,
        snp: 23,
        microcode: 219,
    }
}

/// An AMD extension.
pub fn extension(below: &str, value: Vec<u8>) -> ExtensionSpec {
    ExtensionSpec {
        oid: identity::oid(below),
        critical: false,
        value,
    }
}

/// An IA5String, as product names and provider ids are.
pub fn ia5(text: &str) -> Vec<u8> {
    done(Ia5StringRef::new(text).and_then(|text| text.to_der()))
}

/// A DER INTEGER of any content, negative or padded included.
pub fn integer(content: &[u8]) -> Vec<u8> {
    let mut der = vec![0x02, u8::try_from(content.len()).unwrap_or(u8::MAX)];
    der.extend(content);
    der
}

/// A moment in the past.
pub fn ago(seconds: u64) -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(Duration::from_secs(seconds)).unwrap_or(now)
}

/// A moment in the future.
pub fn ahead(seconds: u64) -> SystemTime {
    let now = SystemTime::now();
    now.checked_add(Duration::from_secs(seconds)).unwrap_or(now)
}

/// Seconds of a day.
pub const DAY: u64 = 24 * 3600;

#[expect(clippy::panic, reason = "a test that cannot forge cannot go on")]
fn done<T, E: std::fmt::Display>(result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("the forge failed: {error}"),
    }
}
