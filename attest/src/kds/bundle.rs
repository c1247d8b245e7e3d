//! What a connected machine collected, as one file for a machine that is not.
//!
//! A bundle is a JSON document with PEM inside, so that a person can read what is carried. It has no
//! file names and no trust: an item says what it is by product, chip and TCB version, and
//! [`Source::import`](super::Source::import) verifies every one before the first is kept. The same
//! items make the same bytes.

use super::pem;
use super::request::{Request, RequestError, VcekId};
use super::response::{ResponseError, parse_chain, parse_crl, parse_leaf};
use crate::product::Product;
use crate::report::SigningKey;
use crate::tcb::TcbVersion;
use rustls_pki_types::pem::SectionKind;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// Answers of the key service with what they answer. Nothing in a parsed bundle is believed yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bundle {
    /// By file name in a cache, which is unique and sorts.
    items: BTreeMap<String, (Request, Vec<u8>)>,
}

/// Why bytes are no bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file cannot be read.
    #[error("{} cannot be read: {source}", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("{} cannot be written: {source}; name another", .file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Longer than a bundle may be; nothing of it was parsed.
    #[error("a bundle has at most {MAX_BUNDLE_LEN} bytes; carry fewer chips at a time")]
    TooLong,
    /// Not the document.
    #[error("this is no bundle of `casemate attest fetch`: {0}")]
    Document(serde_json::Error),
    /// A version that is not known here.
    #[error("bundle format `{0}` is not known here; `{FORMAT}` is")]
    Format(String),
    /// More items than a bundle may have.
    #[error("a bundle has at most {MAX_ITEMS} items, this one has {0}")]
    Items(usize),
    /// An item whose name makes no sense.
    #[error("item {index}: {source}")]
    Name {
        /// Which one, from 0.
        index: usize,
        /// The reason.
        source: RequestError,
    },
    /// An item whose contents are not what it says.
    #[error("item {index} ({request}): {source}")]
    Contents {
        /// Which one, from 0.
        index: usize,
        /// What it says it is.
        request: Box<Request>,
        /// The reason.
        source: ResponseError,
    },
    /// Two items for the same thing.
    #[error("item {index} ({request}) is there twice; which of the two is meant?")]
    Twice {
        /// The second one, from 0.
        index: usize,
        /// What both say they are.
        request: Box<Request>,
    },
}

impl Bundle {
    /// Reads a bundle. Every item is of the right shape then, and none is verified.
    pub fn parse(text: &[u8]) -> Result<Self, BundleError> {
        if text.len() > MAX_BUNDLE_LEN {
            return Err(BundleError::TooLong);
        }
        let document: Document = serde_json::from_slice(text).map_err(BundleError::Document)?;
        if document.format != FORMAT {
            let shown = document.format.chars().take(SHOWN).collect();
            return Err(BundleError::Format(shown));
        }
        if document.items.len() > MAX_ITEMS {
            return Err(BundleError::Items(document.items.len()));
        }
        let mut bundle = Self::default();
        for (index, item) in document.items.into_iter().enumerate() {
            let request = item
                .request()
                .map_err(|source| BundleError::Name { index, source })?;
            let body = item.body().map_err(|source| BundleError::Contents {
                index,
                request: Box::new(request.clone()),
                source,
            })?;
            if bundle
                .items
                .contains_key(&super::cache::file_name(&request))
            {
                return Err(BundleError::Twice {
                    index,
                    request: Box::new(request),
                });
            }
            bundle.insert(request, body);
        }
        Ok(bundle)
    }

    /// The bundle as a document.
    pub fn to_json(&self) -> Result<Vec<u8>, BundleError> {
        let items = self.items.values();
        let document = Document {
            format: FORMAT.to_owned(),
            items: items
                .map(|(request, body)| Item::new(request, body))
                .collect(),
        };
        let mut text = serde_json::to_vec_pretty(&document).map_err(BundleError::Document)?;
        text.push(b'\n');
        if text.len() > MAX_BUNDLE_LEN || document.items.len() > MAX_ITEMS {
            return Err(BundleError::TooLong);
        }
        Ok(text)
    }

    /// Reads a bundle from a file of at most [`MAX_BUNDLE_LEN`] bytes.
    pub fn read(file: &Path) -> Result<Self, BundleError> {
        let mut text = Vec::new();
        File::open(file)
            .and_then(|open| open.take(MAX_BUNDLE_LEN as u64 + 1).read_to_end(&mut text))
            .map_err(|source| BundleError::Read {
                file: file.to_path_buf(),
                source,
            })?;
        Self::parse(&text)
    }

    /// Writes the bundle to a file, whole or not at all.
    pub fn write(&self, file: &Path) -> Result<(), BundleError> {
        super::cache::replace(file, &self.to_json()?).map_err(|source| BundleError::Write {
            file: file.to_path_buf(),
            source,
        })
    }

    /// Adds an answer; the one there was for the same thing goes.
    pub fn insert(&mut self, request: Request, body: Vec<u8>) {
        let name = super::cache::file_name(&request);
        self.items.insert(name, (request, body));
    }

    /// How many items there are.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The items, in the bundle's order.
    pub fn items(&self) -> impl Iterator<Item = (&Request, &[u8])> {
        self.items
            .values()
            .map(|(request, body)| (request, body.as_slice()))
    }

    /// The answer to one question.
    pub(super) fn get(&self, request: &Request) -> Option<&[u8]> {
        let (_, body) = self.items.get(&super::cache::file_name(request))?;
        Some(body)
    }
}

impl BundleError {
    /// A stable name for machines.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "KDS_BUNDLE_READ",
            Self::Write { .. } => "KDS_BUNDLE_WRITE",
            Self::TooLong => "KDS_BUNDLE_TOO_LONG",
            Self::Document(_) => "KDS_BUNDLE_DOCUMENT",
            Self::Format(_) => "KDS_BUNDLE_FORMAT",
            Self::Items(_) => "KDS_BUNDLE_ITEMS",
            Self::Name { source, .. } => source.code(),
            Self::Contents { source, .. } => source.code(),
            Self::Twice { .. } => "KDS_BUNDLE_TWICE",
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: String,
    items: Vec<Item>,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
enum Item {
    Chain {
        product: Product,
        key: Key,
        pem: String,
    },
    Crl {
        product: Product,
        key: Key,
        pem: String,
    },
    Vcek {
        product: Product,
        chip_id: String,
        tcb: TcbVersion,
        pem: String,
    },
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Key {
    Vcek,
    Vlek,
}

impl Item {
    fn new(request: &Request, body: &[u8]) -> Self {
        match request {
            Request::Chain { product, key } => Self::Chain {
                product: *product,
                key: (*key).into(),
                pem: String::from_utf8_lossy(body).into_owned(),
            },
            Request::Crl { product, key } => Self::Crl {
                product: *product,
                key: (*key).into(),
                pem: pem::encode(SectionKind::Crl, body),
            },
            Request::Vcek(id) => Self::Vcek {
                product: id.product(),
                chip_id: id.chip_hex(),
                tcb: id.tcb(),
                pem: pem::encode(SectionKind::Certificate, body),
            },
        }
    }

    fn request(&self) -> Result<Request, RequestError> {
        Ok(match self {
            Self::Chain { product, key, .. } => Request::Chain {
                product: *product,
                key: (*key).into(),
            },
            Self::Crl { product, key, .. } => Request::Crl {
                product: *product,
                key: (*key).into(),
            },
            Self::Vcek {
                product,
                chip_id,
                tcb,
                ..
            } => {
                // Not hexadecimal: a chip id of no length.
                let chip = hex::decode(chip_id).unwrap_or_default();
                Request::Vcek(VcekId::new(*product, &chip, *tcb)?)
            }
        })
    }

    /// The contents in the form the service has them.
    fn body(&self) -> Result<Vec<u8>, ResponseError> {
        let one = |kind, pem: &str| {
            let sections = pem::decode(kind, pem.as_bytes()).ok_or(ResponseError::NotPem)?;
            <[Vec<u8>; 1]>::try_from(sections)
                .map(|[der]| der)
                .map_err(|all| ResponseError::Certificates(all.len()))
        };
        match self {
            Self::Chain { pem, .. } => Ok(parse_chain(pem.as_bytes())?.to_pem().into_bytes()),
            Self::Crl { pem, .. } => {
                let der = one(SectionKind::Crl, pem)?;
                parse_crl(&der).map(<[u8]>::to_vec)
            }
            Self::Vcek { pem, .. } => {
                let der = one(SectionKind::Certificate, pem)?;
                parse_leaf(&der).map(<[u8]>::to_vec)
            }
        }
    }
}

impl From<SigningKey> for Key {
    fn from(key: SigningKey) -> Self {
        match key {
            SigningKey::Vcek => Self::Vcek,
            SigningKey::Vlek => Self::Vlek,
        }
    }
}

impl From<Key> for SigningKey {
    fn from(key: Key) -> Self {
        match key {
            Key::Vcek => Self::Vcek,
            Key::Vlek => Self::Vlek,
        }
    }
}

/// The most bytes of a bundle.
pub const MAX_BUNDLE_LEN: usize = 64 << 20;

/// The most items of a bundle; twenty thousand chips are some 40 MiB.
const MAX_ITEMS: usize = 20_000;

/// What the first version calls itself.
const FORMAT: &str = "casemate-kds-bundle-1";

/// How much of an unknown format's name is repeated.
const SHOWN: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ASK: &str = include_str!("../../tests/vectors/chains/genoa/ask.pem");
    const ARK: &str = include_str!("../../tests/vectors/chains/genoa/ark.pem");
    const VCEK: &[u8] = include_bytes!("../../tests/vectors/reports/genoa-v5/vcek.der");

    fn bundle() -> Bundle {
        let chain = parse_chain(format!("{ASK}{ARK}").as_bytes()).unwrap();
        let tcb = TcbVersion {
            fmc: None,
            boot_loader: 1,
            tee: 0,
            snp: 2,
            microcode: 3,
        };
        let id = VcekId::new(Product::Genoa, &[7; 64], tcb).unwrap();
        let mut bundle = Bundle::default();
        bundle.insert(Request::Vcek(id), VCEK.to_vec());
        bundle.insert(
            Request::Chain {
                product: Product::Genoa,
                key: SigningKey::Vcek,
            },
            chain.to_pem().into_bytes(),
        );
        bundle
    }

    fn changed(change: impl Fn(&mut serde_json::Value)) -> &'static str {
        let text = bundle().to_json().unwrap();
        let mut document = serde_json::from_slice(&text).unwrap();
        change(&mut document);
        let text = serde_json::to_vec(&document).unwrap();
        Bundle::parse(&text).map_or_else(|e| e.code(), |_| "ok")
    }

    #[test]
    fn a_bundle_reads_back_and_is_the_same_bytes_again() {
        let text = bundle().to_json().unwrap();
        let back = Bundle::parse(&text).unwrap();
        assert_eq!(back, bundle());
        assert_eq!(back.to_json().unwrap(), text);
        let readable = String::from_utf8(text).unwrap();
        assert!(readable.contains("casemate-kds-bundle-1"));
        assert!(readable.contains("BEGIN CERTIFICATE"));
    }

    #[test]
    fn hostile_bundles_are_refused() {
        assert_eq!(changed(|_| ()), "ok");
        for (change, code) in [
            (
                (|b| b["format"] = "casemate-kds-bundle-9".into()) as fn(&mut serde_json::Value),
                "KDS_BUNDLE_FORMAT",
            ),
            (
                |b| b["items"][0]["product"] = "../../etc".into(),
                "KDS_BUNDLE_DOCUMENT",
            ),
            (
                |b| b["items"][0]["path"] = "../../etc/passwd".into(),
                "KDS_BUNDLE_DOCUMENT",
            ),
            (
                |b| b["items"][0]["chip_id"] = "../../../../../etc/passwd".into(),
                "KDS_CHIP_LENGTH",
            ),
            (|b| b["items"][0]["tcb"]["fmc"] = 1.into(), "KDS_TCB_FMC"),
            (
                |b| b["items"][0]["tcb"]["snp"] = 256.into(),
                "KDS_BUNDLE_DOCUMENT",
            ),
            (
                |b| {
                    let twice = b["items"][0].clone();
                    b["items"].as_array_mut().unwrap().push(twice);
                },
                "KDS_BUNDLE_TWICE",
            ),
            (
                |b| b["items"][1]["pem"] = ASK.into(),
                "KDS_ANSWER_CHAIN_LENGTH",
            ),
            (
                |b| b["items"][0]["pem"] = format!("{ASK}{ASK}").into(),
                "KDS_ANSWER_CHAIN_LENGTH",
            ),
            (
                |b| b["items"][0]["pem"] = "".into(),
                "KDS_ANSWER_CHAIN_LENGTH",
            ),
            (
                |b| b["items"] = vec![b["items"][0].clone(); MAX_ITEMS + 1].into(),
                "KDS_BUNDLE_ITEMS",
            ),
        ] {
            assert_eq!(changed(change), code);
        }
        let huge = vec![b' '; MAX_BUNDLE_LEN + 1];
        assert_eq!(
            Bundle::parse(&huge).unwrap_err().code(),
            "KDS_BUNDLE_TOO_LONG"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_fail_otherwise_than_by_an_error(text: Vec<u8>) {
            let _ = Bundle::parse(&text);
        }
    }
}
