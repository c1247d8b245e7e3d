//! AMD's extensions of a leaf certificate: which chip or provider, at which patch levels.
//!
//! The arc is 1.3.6.1.4.1.3704.1 (publication 57230, "VCEK Certificate Extensions"). Levels are
//! DER INTEGERs, two bytes long from 128 on.

use super::x509::der_content;
use crate::product::Product;
use crate::tcb::TcbVersion;
use std::fmt;
use x509_parser::asn1_rs::Tag;
use x509_parser::prelude::X509Extension;

/// One of AMD's extensions that is read here. The levels spl_4 to spl_7 are reserved and are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AmdExtension {
    /// .1: the layout of the others; 1 on Turin, 0 before.
    StructVersion,
    /// .2: `Milan-B0`, `Genoa`, `Turin`.
    ProductName,
    /// .3.1.
    BootLoaderSpl,
    /// .3.2.
    TeeSpl,
    /// .3.3.
    SnpSpl,
    /// .3.8.
    MicrocodeSpl,
    /// .3.9, on Turin only.
    FmcSpl,
    /// .4: the chip, in a VCEK only.
    HwId,
    /// .5: the cloud provider, in a VLEK only.
    CspId,
}

/// What is wrong with the extensions of a leaf.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExtensionError {
    /// Not there.
    #[error("the leaf has no {0}")]
    Missing(AmdExtension),
    /// There, where this kind of leaf or product has none.
    #[error("the leaf has a {0}, which a {1} leaf does not have")]
    Unexpected(AmdExtension, &'static str),
    /// Not of the type that the specification says, or not in DER.
    #[error("the leaf's {0} is not a DER {1}")]
    Encoding(AmdExtension, &'static str),
    /// A level below 0.
    #[error("the leaf's {0} is negative")]
    Negative(AmdExtension),
    /// A level above 255.
    #[error("the leaf's {0} is above 255")]
    Range(AmdExtension),
    /// A layout (structVersion) that does not belong to the product.
    #[error("the leaf's structVersion is {0}; 1 is Turin's, 0 that of the products before it")]
    Layout(u8),
    /// An identity of the wrong length.
    #[error("the leaf's {which} is {found} bytes long instead of {expected}")]
    Length {
        /// Which.
        which: AmdExtension,
        /// The length of this product's.
        expected: usize,
        /// The length found.
        found: usize,
    },
    /// Not a name of a product that is known here.
    #[error("the leaf is for product `{0}`; milan, genoa and turin are known")]
    Product(String),
}

/// What the extensions say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LeafClaims {
    pub(super) product_name: String,
    pub(super) product: Product,
    pub(super) tcb: TcbVersion,
    pub(super) identity: Identity,
}

/// Whose key it is; a VCEK has the one, a VLEK the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Identity {
    Chip(Vec<u8>),
    Provider(String),
}

impl AmdExtension {
    /// The encoded object identifier behind AMD's arc.
    const fn suffix(self) -> &'static [u8] {
        match self {
            Self::StructVersion => &[1],
            Self::ProductName => &[2],
            Self::BootLoaderSpl => &[3, 1],
            Self::TeeSpl => &[3, 2],
            Self::SnpSpl => &[3, 3],
            Self::MicrocodeSpl => &[3, 8],
            Self::FmcSpl => &[3, 9],
            Self::HwId => &[4],
            Self::CspId => &[5],
        }
    }

    fn matches(self, extension: &X509Extension<'_>) -> bool {
        extension.oid.as_bytes().strip_prefix(AMD_ARC) == Some(self.suffix())
    }
}

impl LeafClaims {
    /// Of extensions none of which stands there twice.
    pub(super) fn read(extensions: &[X509Extension<'_>]) -> Result<Self, ExtensionError> {
        let found = Extensions(extensions);
        let product_name = found.text(AmdExtension::ProductName)?;
        let product = Product::from_leaf_name(&product_name)
            .ok_or_else(|| ExtensionError::Product(product_name.clone()))?;
        let layout = found.level(AmdExtension::StructVersion)?;
        if layout != u8::from(product == Product::Turin) {
            return Err(ExtensionError::Layout(layout));
        }
        Ok(Self {
            product,
            tcb: found.tcb(product)?,
            identity: found.identity(product)?,
            product_name,
        })
    }
}

struct Extensions<'a>(&'a [X509Extension<'a>]);

impl<'a> Extensions<'a> {
    fn find(&self, which: AmdExtension) -> Option<&'a [u8]> {
        let found = self.0.iter().find(|extension| which.matches(extension));
        found.map(|extension| extension.value)
    }

    fn get(&self, which: AmdExtension) -> Result<&'a [u8], ExtensionError> {
        self.find(which).ok_or(ExtensionError::Missing(which))
    }

    fn level(&self, which: AmdExtension) -> Result<u8, ExtensionError> {
        match der_content(self.get(which)?, Tag::Integer) {
            Some([level @ 0..=0x7f] | [0, level @ 0x80..=0xff]) => Ok(*level),
            // Longer than it need be: no DER.
            Some([0, 0..=0x7f, ..] | [0xff, 0x80..=0xff, ..] | []) | None => {
                Err(ExtensionError::Encoding(which, "INTEGER"))
            }
            Some([0x80..=0xff, ..]) => Err(ExtensionError::Negative(which)),
            Some(_) => Err(ExtensionError::Range(which)),
        }
    }

    fn text(&self, which: AmdExtension) -> Result<String, ExtensionError> {
        let text = der_content(self.get(which)?, Tag::Ia5String)
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .filter(|text| text.chars().all(|c| matches!(c, ' '..='~')))
            .ok_or(ExtensionError::Encoding(which, "IA5String"))?;
        match text.len() {
            1..=MAX_TEXT_LEN => Ok(text.to_owned()),
            found => Err(ExtensionError::Length {
                which,
                expected: MAX_TEXT_LEN,
                found,
            }),
        }
    }

    fn tcb(&self, product: Product) -> Result<TcbVersion, ExtensionError> {
        let fmc = match product {
            Product::Turin => Some(self.level(AmdExtension::FmcSpl)?),
            Product::Milan | Product::Genoa => {
                self.absent(AmdExtension::FmcSpl, product.kds_name())?;
                None
            }
        };
        Ok(TcbVersion {
            fmc,
            boot_loader: self.level(AmdExtension::BootLoaderSpl)?,
            tee: self.level(AmdExtension::TeeSpl)?,
            snp: self.level(AmdExtension::SnpSpl)?,
            microcode: self.level(AmdExtension::MicrocodeSpl)?,
        })
    }

    fn identity(&self, product: Product) -> Result<Identity, ExtensionError> {
        match self.find(AmdExtension::HwId) {
            Some(value) => {
                self.absent(AmdExtension::CspId, "VCEK")?;
                hwid(value, product).map(Identity::Chip)
            }
            None if self.find(AmdExtension::CspId).is_none() => {
                Err(ExtensionError::Missing(AmdExtension::HwId))
            }
            None => self.text(AmdExtension::CspId).map(Identity::Provider),
        }
    }

    fn absent(&self, which: AmdExtension, of: &'static str) -> Result<(), ExtensionError> {
        match self.find(which) {
            Some(_) => Err(ExtensionError::Unexpected(which, of)),
            None => Ok(()),
        }
    }
}

/// The chip's identity: the specification has it bare, some leaves wrap it in an OCTET STRING.
fn hwid(value: &[u8], product: Product) -> Result<Vec<u8>, ExtensionError> {
    let expected = product.hwid_len();
    let bare = match der_content(value, Tag::OctetString) {
        Some(content) if value.len() != expected => content,
        _ => value,
    };
    if bare.len() == expected {
        return Ok(bare.to_vec());
    }
    Err(ExtensionError::Length {
        which: AmdExtension::HwId,
        expected,
        found: bare.len(),
    })
}

impl fmt::Display for AmdExtension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StructVersion => "structVersion",
            Self::ProductName => "productName",
            Self::BootLoaderSpl => "blSPL",
            Self::TeeSpl => "teeSPL",
            Self::SnpSpl => "snpSPL",
            Self::MicrocodeSpl => "ucodeSPL",
            Self::FmcSpl => "fmcSPL",
            Self::HwId => "hwID",
            Self::CspId => "cspID",
        })
    }
}

/// 1.3.6.1.4.1.3704.1, encoded.
pub(super) const AMD_ARC: &[u8] = &[0x2b, 6, 1, 4, 1, 0x9c, 0x78, 1];
const MAX_TEXT_LEN: usize = 255;
