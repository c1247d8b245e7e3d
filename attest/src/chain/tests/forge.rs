//! Certificates and lists of the emulated kind, with every part open to damage.

use crate::chain::extensions::AMD_ARC;
use crate::chain::pss::{DEFAULT_TRAILER, EXPLICIT_TRAILER};
use crate::product::Product;
use crate::report::SigningKey;
use base64::prelude::{BASE64_STANDARD, Engine};
use p384::ecdsa::signature::RandomizedSigner;
use rand_core::OsRng;
use rsa::pss::BlindedSigningKey;
use rsa::signature::SignatureEncoding;
use rsa::traits::PublicKeyParts;
use rsa::{RsaPrivateKey, RsaPublicKey};
use sha2::Sha384;
use std::sync::LazyLock;

/// An authority's key; 2048 bits, so that making one takes moments.
pub(super) struct CaKey(BlindedSigningKey<Sha384>);

pub(super) static ROOT: LazyLock<CaKey> = LazyLock::new(CaKey::generate);
pub(super) static ASK: LazyLock<CaKey> = LazyLock::new(CaKey::generate);
pub(super) static STRANGER: LazyLock<CaKey> = LazyLock::new(CaKey::generate);
pub(super) static CHIP: LazyLock<p384::ecdsa::SigningKey> =
    LazyLock::new(|| p384::ecdsa::SigningKey::random(&mut OsRng));

#[derive(Clone)]
pub(super) struct Template {
    pub(super) version: Option<u8>,
    pub(super) serial: Vec<u8>,
    pub(super) issuer: Vec<u8>,
    pub(super) subject: Vec<u8>,
    pub(super) dates: [&'static str; 2],
    pub(super) key: Vec<u8>,
    pub(super) extensions: Vec<Extension>,
    pub(super) inner_algorithm: Vec<u8>,
    pub(super) outer_algorithm: Vec<u8>,
}

#[derive(Clone, PartialEq)]
pub(super) struct Extension {
    pub(super) oid: Vec<u8>,
    pub(super) critical: bool,
    pub(super) value: Vec<u8>,
}

#[derive(Clone)]
pub(super) struct List {
    pub(super) issuer: Vec<u8>,
    pub(super) dates: Vec<&'static str>,
    pub(super) revoked: Vec<Vec<u8>>,
    pub(super) extensions: Vec<Extension>,
    pub(super) entry_extensions: Vec<Extension>,
}

impl CaKey {
    fn generate() -> Self {
        Self(BlindedSigningKey::new(
            RsaPrivateKey::new(&mut OsRng, 2048).unwrap(),
        ))
    }

    pub(super) fn spki(&self) -> Vec<u8> {
        let key = RsaPublicKey::from(self.0.as_ref());
        let number = |bytes: Vec<u8>| tlv(0x02, &[&[0][..], &bytes].concat());
        let exponent = tlv(0x02, &key.e().to_bytes_be());
        let key = sequence(&[number(key.n().to_bytes_be()), exponent]);
        let algorithm = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";
        sequence(&[tlv(0x30, algorithm), bits(&key)])
    }

    fn signed(&self, body: Vec<u8>, algorithm: &[u8]) -> Vec<u8> {
        let signature = self.0.sign_with_rng(&mut OsRng, &body).to_vec();
        sequence(&[body, tlv(0x30, algorithm), bits(&signature)])
    }
}

impl Template {
    pub(super) fn root() -> Self {
        Self {
            extensions: authority(None),
            key: ROOT.spki(),
            ..Self::new(
                name("ARK-EMULATED", "NOT AMD"),
                name("ARK-EMULATED", "NOT AMD"),
            )
        }
    }

    pub(super) fn intermediate(kind: SigningKey) -> Self {
        let subject = match kind {
            SigningKey::Vcek => name("SEV-EMULATED", "NOT AMD"),
            SigningKey::Vlek => name("SEV-VLEK-EMULATED", "NOT AMD"),
        };
        Self {
            serial: vec![0x01, 0x00, 0x01],
            extensions: authority(Some(0)),
            key: ASK.spki(),
            ..Self::new(name("ARK-EMULATED", "NOT AMD"), subject)
        }
    }

    pub(super) fn leaf(product: Product, kind: SigningKey) -> Self {
        let (issuer, subject, identity) = match kind {
            SigningKey::Vcek => (
                "SEV-EMULATED",
                "SEV-VCEK",
                amd(&[4], &vec![0x5a; product.hwid_len()]),
            ),
            SigningKey::Vlek => (
                "SEV-VLEK-EMULATED",
                "SEV-VLEK",
                amd(&[5], &tlv(0x16, b"CN=cloud.example")),
            ),
        };
        let turin = product == Product::Turin;
        let name_of = format!("{}-EMULATED", product.kds_name());
        let mut extensions = vec![
            amd(&[1], &[2, 1, u8::from(turin)]),
            amd(&[2], &tlv(0x16, name_of.as_bytes())),
            amd(&[3, 1], &[2, 1, 4]),
            amd(&[3, 2], &[2, 1, 0]),
            amd(&[3, 3], &[2, 1, 24]),
            amd(&[3, 8], &[2, 2, 0, 219]),
            identity,
        ];
        if turin {
            extensions.push(amd(&[3, 9], &[2, 1, 1]));
        }
        Self {
            serial: vec![0],
            extensions,
            key: chip_key(),
            ..Self::new(name(issuer, "NOT AMD"), name(subject, "NOT AMD"))
        }
    }

    fn new(issuer: Vec<u8>, subject: Vec<u8>) -> Self {
        Self {
            version: Some(2),
            serial: vec![0x01, 0x00, 0x00],
            issuer,
            subject,
            dates: ["250101000000Z", "350101000000Z"],
            key: Vec::new(),
            extensions: Vec::new(),
            inner_algorithm: DEFAULT_TRAILER.to_vec(),
            outer_algorithm: DEFAULT_TRAILER.to_vec(),
        }
    }

    /// The extension with this identifier.
    pub(super) fn extension(&mut self, oid: &[u8]) -> &mut Extension {
        self.extensions
            .iter_mut()
            .find(|extension| extension.oid == oid)
            .unwrap()
    }

    pub(super) fn signed_by(&self, key: &CaKey) -> Vec<u8> {
        let mut parts = Vec::new();
        if let Some(version) = self.version {
            parts.push(tlv(0xa0, &tlv(0x02, &[version])));
        }
        parts.extend([
            tlv(0x02, &self.serial),
            tlv(0x30, &self.inner_algorithm),
            self.issuer.clone(),
            sequence(&self.dates.map(|date| tlv(0x17, date.as_bytes()))),
            self.subject.clone(),
            self.key.clone(),
        ]);
        if !self.extensions.is_empty() {
            parts.push(tlv(0xa3, &encoded(&self.extensions)));
        }
        key.signed(sequence(&parts), &self.outer_algorithm)
    }
}

impl List {
    /// Of the emulated root, naming nothing.
    pub(super) fn empty() -> Self {
        Self {
            issuer: name("ARK-EMULATED", "NOT AMD"),
            dates: vec!["260101000000Z", "260201000000Z"],
            revoked: Vec::new(),
            extensions: vec![other(&[0x55, 0x1d, 0x14], false, &[2, 1, 7])],
            entry_extensions: Vec::new(),
        }
    }

    pub(super) fn signed_by(&self, key: &CaKey) -> Vec<u8> {
        let mut parts = vec![
            tlv(0x02, &[1]),
            tlv(0x30, EXPLICIT_TRAILER),
            self.issuer.clone(),
        ];
        parts.extend(self.dates.iter().map(|date| tlv(0x17, date.as_bytes())));
        let entry = |serial: &Vec<u8>| {
            let mut entry = vec![tlv(0x02, serial), tlv(0x17, b"260110000000Z")];
            if !self.entry_extensions.is_empty() {
                entry.push(encoded(&self.entry_extensions));
            }
            sequence(&entry)
        };
        if !self.revoked.is_empty() {
            let entries: Vec<_> = self.revoked.iter().map(entry).collect();
            parts.push(sequence(&entries));
        }
        parts.push(tlv(0xa0, &encoded(&self.extensions)));
        key.signed(sequence(&parts), EXPLICIT_TRAILER)
    }
}

/// A signature of the chip's key, R ‖ S.
pub(super) fn chip_signature(message: &[u8]) -> [u8; 96] {
    let signature: p384::ecdsa::Signature = CHIP.sign_with_rng(&mut OsRng, message);
    signature.to_bytes().as_slice().try_into().unwrap()
}

pub(super) fn chip_key() -> Vec<u8> {
    let point = CHIP.verifying_key().to_encoded_point(false);
    let curve = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x22";
    sequence(&[tlv(0x30, curve), bits(point.as_bytes())])
}

pub(super) fn name(common_name: &str, organization: &str) -> Vec<u8> {
    let part = |oid: u8, text: &str| {
        let oid = tlv(0x06, &[0x55, 0x04, oid]);
        tlv(0x31, &sequence(&[oid, tlv(0x0c, text.as_bytes())]))
    };
    sequence(&[part(10, organization), part(3, common_name)])
}

/// One of AMD's extensions.
pub(super) fn amd(suffix: &[u8], value: &[u8]) -> Extension {
    other(&[AMD_ARC, suffix].concat(), false, value)
}

pub(super) fn other(oid: &[u8], critical: bool, value: &[u8]) -> Extension {
    Extension {
        oid: oid.to_vec(),
        critical,
        value: value.to_vec(),
    }
}

pub(super) fn pem(label: &str, der: &[u8]) -> String {
    let body: Vec<String> = BASE64_STANDARD
        .encode(der)
        .as_bytes()
        .chunks(64)
        .map(|line| String::from_utf8(line.to_vec()).unwrap())
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        body.join("\n")
    )
}

/// Key usage keyCertSign and cRLSign, and basic constraints.
fn authority(path_len: Option<u8>) -> Vec<Extension> {
    let mut constraints = vec![tlv(0x01, &[0xff])];
    constraints.extend(path_len.map(|len| tlv(0x02, &[len])));
    vec![
        other(KEY_USAGE, true, &[0x03, 0x02, 0x01, 0x06]),
        other(BASIC_CONSTRAINTS, true, &sequence(&constraints)),
    ]
}

fn encoded(extensions: &[Extension]) -> Vec<u8> {
    let one = |extension: &Extension| {
        let mut parts = vec![tlv(0x06, &extension.oid)];
        if extension.critical {
            parts.push(tlv(0x01, &[0xff]));
        }
        parts.push(tlv(0x04, &extension.value));
        sequence(&parts)
    };
    sequence(&extensions.iter().map(one).collect::<Vec<_>>())
}

pub(super) fn sequence(parts: &[Vec<u8>]) -> Vec<u8> {
    tlv(0x30, &parts.concat())
}

pub(super) fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let len = content.len();
    let mut out = vec![tag];
    match u8::try_from(len) {
        Ok(len @ 0..=0x7f) => out.push(len),
        Ok(len) => out.extend([0x81, len]),
        Err(_) => match u16::try_from(len) {
            Ok(len) => {
                out.push(0x82);
                out.extend(len.to_be_bytes());
            }
            Err(_) => {
                out.push(0x83);
                out.extend(&u32::try_from(len).unwrap().to_be_bytes()[1..]);
            }
        },
    }
    out.extend_from_slice(content);
    out
}

fn bits(bytes: &[u8]) -> Vec<u8> {
    tlv(0x03, &[&[0][..], bytes].concat())
}

pub(super) const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
pub(super) const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
pub(super) const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];
pub(super) const ISSUING_POINT: &[u8] = &[0x55, 0x1d, 0x1c];
pub(super) const DELTA: &[u8] = &[0x55, 0x1d, 0x1b];
