//! What can be asked of the key service, and the address that asks it. Publication 57230,
//! chapter 4.

use crate::product::Product;
use crate::report::{Report, SigningKey};
use crate::tcb::TcbVersion;
use std::fmt;
use std::str::FromStr;
use ureq::http::Uri;

/// Where a key service answers: AMD's own, or a mirror of it.
///
/// A mirror needs no trust and may speak plain HTTP: what it sends is verified against AMD's pinned
/// roots. It can withhold, and it can serve a revocation list that is old but not yet out of date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl(String);

/// One thing that the key service has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The intermediate (ASK for VCEKs, ASVK for VLEKs) and the root (ARK), as PEM in this order.
    Chain {
        /// Whose.
        product: Product,
        /// Which intermediate.
        key: SigningKey,
    },
    /// One chip's VCEK for one TCB version, as DER.
    Vcek(VcekId),
    /// The root's revocation list, as DER.
    Crl {
        /// Whose.
        product: Product,
        /// Which of the two; the VLEK one speaks of the ASVK.
        key: SigningKey,
    },
}

/// Which VCEK: there is one for every chip and every TCB version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcekId {
    product: Product,
    chip: Vec<u8>,
    tcb: TcbVersion,
}

/// Why something cannot be asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No address of a key service.
    #[error(
        "`{0}` is no base address of a key service; give http:// or https://, a host, and nothing behind the path"
    )]
    BaseUrl(String),
    /// A chip id that is not as long as the product's.
    #[error("a chip id of {product} has {} bytes, this one has {found}", product.hwid_len())]
    ChipLength {
        /// The product.
        product: Product,
        /// The length given.
        found: usize,
    },
    /// A chip id of zeros, as a platform shows that hides its own.
    #[error(
        "the platform hides its chip id (it is all zero), so its VCEK cannot be looked up; take it from the host, or give --chip"
    )]
    ChipMasked,
    /// An FMC level that is missing, or that the product does not have.
    #[error("a TCB version of {product} {}", if *.product == Product::Turin { "needs an fmc level" } else { "has no fmc level" })]
    Fmc {
        /// The product.
        product: Product,
    },
    /// A report that does not name its product, and nobody else does.
    #[error("the report does not say which product made it; name it (milan, genoa, turin)")]
    ProductUnknown,
    /// A report that names another product.
    #[error("the report is from {found}, not from {asked}")]
    ProductConflict {
        /// What the caller said.
        asked: Product,
        /// What the report says.
        found: Product,
    },
    /// A VLEK, which the key service hands only to the cloud provider it belongs to.
    #[error(
        "the report is signed by a VLEK, which AMD hands to the cloud provider only; take the certificate from the provider or the host"
    )]
    Vlek,
}

impl BaseUrl {
    /// AMD's own key service.
    pub fn amd() -> Self {
        Self(AMD.to_owned())
    }

    /// The address as text, without a slash at its end.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The address of one thing.
    pub fn join(&self, request: &Request) -> String {
        format!("{}{}", self.0, request.path())
    }
}

impl FromStr for BaseUrl {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || RequestError::BaseUrl(text.chars().take(SHOWN).collect());
        if text.len() > MAX_BASE_URL || text.contains('#') {
            return Err(refused());
        }
        let uri: Uri = text.parse().map_err(|_| refused())?;
        let scheme = matches!(uri.scheme_str(), Some("http" | "https"));
        let host = uri
            .authority()
            .is_some_and(|at| !at.host().is_empty() && !at.as_str().contains('@'));
        if scheme && host && uri.query().is_none() {
            Ok(Self(text.trim_end_matches('/').to_owned()))
        } else {
            Err(refused())
        }
    }
}

impl Request {
    /// The path and the query, from the slash on.
    pub fn path(&self) -> String {
        match self {
            Self::Chain { product, key } => {
                format!("/{}/v1/{}/cert_chain", folder(*key), product.kds_name())
            }
            Self::Crl { product, key } => {
                format!("/{}/v1/{}/crl", folder(*key), product.kds_name())
            }
            Self::Vcek(id) => {
                let TcbVersion {
                    fmc,
                    boot_loader,
                    tee,
                    snp,
                    microcode,
                } = id.tcb;
                let fmc = fmc.map_or_else(String::new, |fmc| format!("fmcSPL={fmc:02}&"));
                format!(
                    "/vcek/v1/{}/{}?{fmc}blSPL={boot_loader:02}&teeSPL={tee:02}&snpSPL={snp:02}&ucodeSPL={microcode:02}",
                    id.product.kds_name(),
                    id.chip_hex(),
                )
            }
        }
    }

    /// The longest answer that is read.
    pub const fn max_len(&self) -> usize {
        match self {
            Self::Chain { .. } => MAX_CHAIN_LEN,
            Self::Vcek(_) => MAX_LEAF_LEN,
            Self::Crl { .. } => MAX_CRL_LEN,
        }
    }

    /// The product.
    pub const fn product(&self) -> Product {
        match self {
            Self::Chain { product, .. } | Self::Crl { product, .. } => *product,
            Self::Vcek(id) => id.product,
        }
    }
}

impl VcekId {
    /// The VCEK of `chip` for `tcb`. On Turin a chip id is 8 bytes; 64 as in a report, with zeros
    /// behind the first 8, are taken as well.
    pub fn new(product: Product, chip: &[u8], tcb: TcbVersion) -> Result<Self, RequestError> {
        let wrong = RequestError::ChipLength {
            product,
            found: chip.len(),
        };
        let chip = match chip.split_at_checked(product.hwid_len()) {
            Some((id, [])) => id,
            Some((id, rest)) if chip.len() == CHIP_ID_LEN && rest.iter().all(|b| *b == 0) => id,
            _ => return Err(wrong),
        };
        if chip.iter().all(|byte| *byte == 0) {
            return Err(RequestError::ChipMasked);
        }
        if tcb.to_raw(product).is_none() {
            return Err(RequestError::Fmc { product });
        }
        Ok(Self {
            product,
            chip: chip.to_vec(),
            tcb,
        })
    }

    /// The VCEK that signed `report`, if what the report says is true: its chip's, for the TCB
    /// version it reports. `product` is needed for reports of version 2, which do not name it.
    pub fn of_report(report: &Report, product: Option<Product>) -> Result<Self, RequestError> {
        let product = product_of(report, product)?;
        match report.signing_key() {
            SigningKey::Vlek => Err(RequestError::Vlek),
            SigningKey::Vcek => Self::new(
                product,
                &report.chip_id(),
                report.reported_tcb().of(product),
            ),
        }
    }

    /// The product.
    pub const fn product(&self) -> Product {
        self.product
    }

    /// The chip's identity: 8 bytes on Turin, 64 before.
    pub fn chip(&self) -> &[u8] {
        &self.chip
    }

    /// The same in lower-case hexadecimal.
    pub fn chip_hex(&self) -> String {
        hex::encode(&self.chip)
    }

    /// The TCB version.
    pub const fn tcb(&self) -> TcbVersion {
        self.tcb
    }
}

/// The product a report names; else the one the caller names. The two may not differ.
pub fn product_of(report: &Report, asked: Option<Product>) -> Result<Product, RequestError> {
    match (report.product(), asked) {
        (Some(found), Some(asked)) if found != asked => {
            Err(RequestError::ProductConflict { asked, found })
        }
        (Some(product), _) | (None, Some(product)) => Ok(product),
        (None, None) => Err(RequestError::ProductUnknown),
    }
}

impl RequestError {
    /// A stable name for machines.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::BaseUrl(_) => "KDS_BASE_URL",
            Self::ChipLength { .. } => "KDS_CHIP_LENGTH",
            Self::ChipMasked => "KDS_CHIP_MASKED",
            Self::Fmc { .. } => "KDS_TCB_FMC",
            Self::ProductUnknown => "KDS_PRODUCT_UNKNOWN",
            Self::ProductConflict { .. } => "KDS_PRODUCT_CONFLICT",
            Self::Vlek => "KDS_VLEK_NOT_SERVED",
        }
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain { product, key } => write!(f, "{product} {} chain", folder(*key)),
            Self::Crl { product, key } => write!(f, "{product} {} crl", folder(*key)),
            Self::Vcek(id) => id.fmt(f),
        }
    }
}

impl fmt::Display for VcekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short: String = self.chip_hex().chars().take(16).collect();
        write!(f, "{} vcek of chip {short}, {}", self.product, self.tcb)
    }
}

/// The name of a key's part of the service.
pub(super) const fn folder(key: SigningKey) -> &'static str {
    match key {
        SigningKey::Vcek => "vcek",
        SigningKey::Vlek => "vlek",
    }
}

/// AMD's documented service.
const AMD: &str = "https://kdsintf.amd.com";

/// A chip id as reports carry it.
const CHIP_ID_LEN: usize = 64;

/// No address of a service is this long.
const MAX_BASE_URL: usize = 1024;

/// How much of a refused address is repeated.
const SHOWN: usize = 80;

/// Two certificates of RSA 4096 are about 4 KiB of PEM.
pub(super) const MAX_CHAIN_LEN: usize = 32 << 10;

/// A VCEK is about 1.3 KiB.
pub(super) const MAX_LEAF_LEN: usize = crate::chain::MAX_CERTIFICATE_LEN;

/// AMD's lists have a few entries.
pub(super) const MAX_CRL_LEN: usize = crate::chain::MAX_CRL_LEN;

#[cfg(test)]
mod tests {
    use super::*;

    const TCB: TcbVersion = TcbVersion {
        fmc: None,
        boot_loader: 10,
        tee: 0,
        snp: 23,
        microcode: 217,
    };

    #[test]
    fn addresses_are_as_the_interface_specification_writes_them() {
        let base = BaseUrl::amd();
        let genoa = Product::Genoa;
        let chain = |product, key| base.join(&Request::Chain { product, key });
        assert_eq!(
            chain(Product::Milan, SigningKey::Vlek),
            "https://kdsintf.amd.com/vlek/v1/Milan/cert_chain"
        );
        let crl = Request::Crl {
            product: genoa,
            key: SigningKey::Vcek,
        };
        assert_eq!(crl.path(), "/vcek/v1/Genoa/crl");
        let id = VcekId::new(genoa, &[0xa5; 64], TCB).unwrap();
        assert_eq!(
            Request::Vcek(id).path(),
            format!(
                "/vcek/v1/Genoa/{}?blSPL=10&teeSPL=00&snpSPL=23&ucodeSPL=217",
                "a5".repeat(64)
            )
        );
    }

    #[test]
    fn turin_has_an_fmc_level_and_a_short_chip_id() {
        let fmc = TcbVersion {
            fmc: Some(1),
            ..TCB
        };
        let mut chip = [0; 64];
        chip[..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let id = VcekId::new(Product::Turin, &chip, fmc).unwrap();
        assert_eq!(VcekId::new(Product::Turin, &chip[..8], fmc), Ok(id.clone()));
        assert_eq!(
            Request::Vcek(id).path(),
            "/vcek/v1/Turin/0102030405060708?fmcSPL=01&blSPL=10&teeSPL=00&snpSPL=23&ucodeSPL=217"
        );
        let turin = |chip: &[u8], tcb| VcekId::new(Product::Turin, chip, tcb).map_err(|e| e.code());
        assert_eq!(turin(&chip[..8], TCB), Err("KDS_TCB_FMC"));
        chip[63] = 1;
        assert_eq!(turin(&chip, fmc), Err("KDS_CHIP_LENGTH"));
        assert_eq!(turin(&chip[..9], fmc), Err("KDS_CHIP_LENGTH"));
        assert_eq!(turin(&[0; 8], fmc), Err("KDS_CHIP_MASKED"));
        let milan = VcekId::new(Product::Milan, &[1; 64], fmc);
        assert_eq!(milan.map_err(|e| e.code()), Err("KDS_TCB_FMC"));
    }

    #[test]
    fn a_base_address_has_a_host_and_nothing_behind_its_path() {
        for (text, kept) in [
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("https://mirror.example/kds/", "https://mirror.example/kds"),
        ] {
            assert_eq!(text.parse::<BaseUrl>().unwrap().as_str(), kept);
        }
        for text in [
            "",
            "mirror.example",
            "ftp://mirror.example",
            "file:///etc",
            "http://",
            "https://user:pass@mirror.example",
            "https://mirror.example/?a=b",
            "https://mirror.example/#a",
            "https://mirror.example/a b",
        ] {
            assert!(text.parse::<BaseUrl>().is_err(), "{text}");
        }
        let long = format!("http://a/{}", "a".repeat(MAX_BASE_URL));
        assert!(long.parse::<BaseUrl>().is_err());
    }
}
