//! A platform's certificate chain, from AMD's root and the owner's root down to the key that a
//! session is agreed with.
//!
//! ```text
//! ARK ─▶ ASK ─▶ CEK ─┐
//!                    ├─▶ PEK ─▶ PDH
//!               OCA ─┘
//! ```
//!
//! Nothing in a [`LegacyChain`] is believed. A [`VerifiedChain`] exists only as the result of
//! [`LegacyChain::verify`], and sessions can be made with nothing else.

use super::ca::{CaCertificate, CaError};
use super::certificate::{CERTIFICATE_LEN, CertificateError, SevCertificate, Usage};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The certificates of one platform as they came from its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LegacyChain {
    /// AMD root key.
    pub ark: CaCertificate,
    /// AMD SEV signing key.
    pub ask: CaCertificate,
    /// Chip endorsement key.
    pub cek: SevCertificate,
    /// Owner certificate authority.
    pub oca: SevCertificate,
    /// Platform endorsement key.
    pub pek: SevCertificate,
    /// Platform Diffie-Hellman key.
    pub pdh: SevCertificate,
}

/// A chain whose every signature holds and whose root is trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedChain {
    chain: LegacyChain,
    root: Root,
}

/// The root a chain ends at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Root {
    /// AMD's root for a processor generation.
    Amd(Generation),
    /// A software secure processor's root, trusted because the caller named it.
    Emulated,
}

/// Processor generations with a legacy SEV root of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Generation {
    /// EPYC 7001.
    Naples,
    /// EPYC 7002.
    Rome,
    /// EPYC 7003.
    Milan,
    /// EPYC 9004 and 8004.
    Genoa,
    /// EPYC 9005.
    Turin,
}

/// The roots a caller accepts: AMD's, always, and emulated ones it names.
#[derive(Debug, Clone, Default)]
pub struct TrustAnchors {
    emulated: Vec<[u8; 32]>,
}

/// Why a chain is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// An SEV certificate is malformed or badly signed.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// An AMD CA certificate is malformed or badly signed.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A set of concatenated certificates has the wrong length.
    #[error("{what} should be {expected} bytes, found {found}")]
    Length {
        /// Which set.
        what: &'static str,
        /// Its length.
        expected: usize,
        /// What came.
        found: usize,
    },
    /// A certificate is not the one its place asks for.
    #[error("a {found:?} certificate is where the {expected:?} should be")]
    Misplaced {
        /// What the place asks for.
        expected: Usage,
        /// What is there.
        found: Usage,
    },
    /// The root is neither AMD's nor one that was named.
    #[error(
        "root key {fingerprint} is not one of AMD's five pinned roots; if it is the emulated root \
         of a machine of yours, name this fingerprint as a trusted emulated root"
    )]
    UntrustedRoot {
        /// SHA-256 of the root's signed part, in hex.
        fingerprint: String,
    },
    /// A root was named as emulated but does not say so itself.
    #[error("the root named as emulated does not carry the id ARK-EMULATED; it is not accepted")]
    NotMarkedEmulated,
    /// One of AMD's roots was named as emulated.
    #[error("this is AMD's {0} root and cannot be trusted as an emulated one; leave it out")]
    EmulatedIsAmd(Generation),
}

impl LegacyChain {
    /// Reads what firmware exports: the PDH, PEK ‖ OCA ‖ CEK, and AMD's ASK ‖ ARK.
    pub fn parse(pdh: &[u8], platform: &[u8], amd: &[u8]) -> Result<Self, ChainError> {
        if platform.len() != PLATFORM_CERTS_LEN {
            return Err(ChainError::Length {
                what: "PEK, OCA and CEK together",
                expected: PLATFORM_CERTS_LEN,
                found: platform.len(),
            });
        }
        let mut certificates = platform.chunks(CERTIFICATE_LEN).map(SevCertificate::parse);
        let mut next = || {
            certificates
                .next()
                .unwrap_or(Err(CertificateError::Length(0)))
        };
        let (pek, oca, cek) = (next()?, next()?, next()?);
        let (ask, rest) = CaCertificate::parse_first(amd)?;
        Ok(Self {
            ark: CaCertificate::parse(rest)?,
            ask,
            cek,
            oca,
            pek,
            pdh: SevCertificate::parse(pdh)?,
        })
    }

    /// PEK ‖ OCA ‖ CEK, as SEND_START takes them.
    pub fn platform_certs(&self) -> Vec<u8> {
        [&self.pek, &self.oca, &self.cek]
            .map(SevCertificate::as_bytes)
            .concat()
    }

    /// ASK ‖ ARK, as SEND_START takes them.
    pub fn amd_certs(&self) -> Vec<u8> {
        [&self.ask, &self.ark].map(CaCertificate::as_bytes).concat()
    }

    /// Checks the root against `trust`, then every signature down to the PDH.
    pub fn verify(&self, trust: &TrustAnchors) -> Result<VerifiedChain, ChainError> {
        self.check_places()?;
        let root = trust.recognise(&self.ark)?;
        self.ark.verify_signed_by(&self.ark)?;
        self.ask.verify_signed_by(&self.ark)?;
        self.ask.verify_endorsement(&self.cek)?;
        self.oca.verify_signed_by(&self.oca)?;
        self.pek.verify_signed_by(&self.cek)?;
        self.pek.verify_signed_by(&self.oca)?;
        self.pdh.verify_signed_by(&self.pek)?;
        Ok(VerifiedChain {
            chain: self.clone(),
            root,
        })
    }

    fn check_places(&self) -> Result<(), ChainError> {
        let places = [
            (Usage::Ark, self.ark.usage()),
            (Usage::Ask, self.ask.usage()),
            (Usage::Cek, self.cek.usage()),
            (Usage::Oca, self.oca.usage()),
            (Usage::Pek, self.pek.usage()),
            (Usage::Pdh, self.pdh.usage()),
        ];
        match places
            .into_iter()
            .find(|(expected, found)| expected != found)
        {
            Some((expected, found)) => Err(ChainError::Misplaced { expected, found }),
            None => Ok(()),
        }
    }
}

impl VerifiedChain {
    /// The key that sessions are agreed with.
    pub fn pdh(&self) -> &SevCertificate {
        &self.chain.pdh
    }

    /// The platform's owner.
    pub fn oca(&self) -> &SevCertificate {
        &self.chain.oca
    }

    /// The platform's signing key.
    pub fn pek(&self) -> &SevCertificate {
        &self.chain.pek
    }

    /// The chip.
    pub fn cek(&self) -> &SevCertificate {
        &self.chain.cek
    }

    /// The root it ends at.
    pub fn root(&self) -> Root {
        self.root
    }

    /// Whether this is a software secure processor, which protects nothing from its host.
    pub fn emulated(&self) -> bool {
        self.root == Root::Emulated
    }

    /// All certificates.
    pub fn certificates(&self) -> &LegacyChain {
        &self.chain
    }
}

impl TrustAnchors {
    /// AMD's roots and nothing else.
    pub fn amd() -> Self {
        Self::default()
    }

    /// Also trusts the emulated root with this [`CaCertificate::fingerprint`].
    pub fn with_emulated_root(mut self, sha256: [u8; 32]) -> Result<Self, ChainError> {
        if let Some(generation) = Generation::pinned(&hex::encode(sha256)) {
            return Err(ChainError::EmulatedIsAmd(generation));
        }
        self.emulated.push(sha256);
        Ok(self)
    }

    pub(crate) fn recognise(&self, ark: &CaCertificate) -> Result<Root, ChainError> {
        let sha256 = ark.fingerprint();
        let fingerprint = hex::encode(sha256);
        if let Some(generation) = Generation::pinned(&fingerprint) {
            return Ok(Root::Amd(generation));
        }
        if !self.emulated.contains(&sha256) {
            return Err(ChainError::UntrustedRoot { fingerprint });
        }
        if ark.key_id() != EMULATED_ARK_ID {
            return Err(ChainError::NotMarkedEmulated);
        }
        Ok(Root::Emulated)
    }
}

impl Generation {
    fn pinned(fingerprint: &str) -> Option<Self> {
        AMD_ROOTS
            .iter()
            .find(|(_, pin)| *pin == fingerprint)
            .map(|(generation, _)| *generation)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Naples => "Naples",
            Self::Rome => "Rome",
            Self::Milan => "Milan",
            Self::Genoa => "Genoa",
            Self::Turin => "Turin",
        })
    }
}

/// Length of PEK ‖ OCA ‖ CEK.
pub const PLATFORM_CERTS_LEN: usize = 3 * CERTIFICATE_LEN;

/// The key id that an emulated root must carry.
pub const EMULATED_ARK_ID: [u8; 16] = *b"ARK-EMULATED\0\0\0\0";

/// SHA-256 over header, exponent and modulus of the roots that AMD publishes (KDS `ask_ark`).
const AMD_ROOTS: [(Generation, &str); 5] = [
    (
        Generation::Naples,
        "8efddcaaf84990cf6354d93637be270220cf15797332b3d918c3b8cc77349f31",
    ),
    (
        Generation::Rome,
        "ae2456af6c6ad234badd6c75e58915be61568286766083853bf668e6e23977c3",
    ),
    (
        Generation::Milan,
        "263b13fd3170c6ffbb0b4f01f09848dc08a8dc1e9637d47e42cbe6c135e4af12",
    ),
    (
        Generation::Genoa,
        "973df6265e1b40cf8883305c1f6a6cd254979446acb40bd396946b2f19e751e9",
    ),
    (
        Generation::Turin,
        "89327696f8082b20f5a588565adc26d478e1c6d56153c1de656e63396b8f8e20",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::ApiVersion;
    use crate::processor::{Identity, Profile, testing};

    macro_rules! vector {
        ($name:literal) => {
            include_bytes!(concat!("../../tests/vectors/legacy/", $name)).as_slice()
        };
    }

    fn naples() -> LegacyChain {
        let platform = [
            vector!("naples/pek.cert"),
            vector!("naples/oca.cert"),
            vector!("naples/cek.cert"),
        ];
        let amd = [vector!("naples/ask.cert"), vector!("naples/ark.cert")];
        LegacyChain::parse(
            vector!("naples/pdh.cert"),
            &platform.concat(),
            &amd.concat(),
        )
        .unwrap()
    }

    fn rome() -> LegacyChain {
        let platform = [
            vector!("rome/pek.cert"),
            vector!("rome/oca.cert"),
            vector!("rome/cek.cert"),
        ];
        let amd = [vector!("rome/ask.cert"), vector!("rome/ark.cert")];
        LegacyChain::parse(vector!("rome/pdh.cert"), &platform.concat(), &amd.concat()).unwrap()
    }

    #[test]
    fn real_platforms_verify() {
        for (chain, generation) in [(naples(), Generation::Naples), (rome(), Generation::Rome)] {
            let verified = chain.verify(&TrustAnchors::amd()).unwrap();
            assert_eq!(verified.root(), Root::Amd(generation));
            assert!(!verified.emulated());
        }
    }

    #[test]
    fn every_generations_roots_are_pinned_and_sign() {
        let pairs = [
            (
                Generation::Naples,
                vector!("naples/ark.cert"),
                vector!("naples/ask.cert"),
            ),
            (
                Generation::Rome,
                vector!("rome/ark.cert"),
                vector!("rome/ask.cert"),
            ),
            (
                Generation::Milan,
                vector!("milan/ark.cert"),
                vector!("milan/ask.cert"),
            ),
            (
                Generation::Genoa,
                vector!("genoa/ark.cert"),
                vector!("genoa/ask.cert"),
            ),
            (
                Generation::Turin,
                vector!("turin/ark.cert"),
                vector!("turin/ask.cert"),
            ),
        ];
        for (generation, ark, ask) in pairs {
            let ark = CaCertificate::parse(ark).unwrap();
            let ask = CaCertificate::parse(ask).unwrap();
            assert_eq!(
                TrustAnchors::amd().recognise(&ark),
                Ok(Root::Amd(generation))
            );
            ark.verify_signed_by(&ark).unwrap();
            ask.verify_signed_by(&ark).unwrap();
            assert_eq!(
                TrustAnchors::amd()
                    .with_emulated_root(ark.fingerprint())
                    .unwrap_err(),
                ChainError::EmulatedIsAmd(generation)
            );
        }
    }

    #[test]
    fn each_swapped_certificate_breaks_the_chain() {
        type Swap = fn(&mut LegacyChain);
        let swaps: [(&str, Swap); 6] = [
            ("ark", |chain| chain.ark = rome().ark),
            ("ask", |chain| chain.ask = rome().ask),
            ("cek", |chain| chain.cek = rome().cek),
            ("oca", |chain| chain.oca = rome().oca),
            ("pek", |chain| chain.pek = rome().pek),
            ("pdh", |chain| chain.pdh = rome().pdh),
        ];
        for (name, swap) in swaps {
            let mut chain = naples();
            swap(&mut chain);
            assert!(chain.verify(&TrustAnchors::amd()).is_err(), "{name}");
        }
    }

    #[test]
    fn each_signature_counts_and_the_bad_one_is_named() {
        fn flipped(raw: &[u8], at: usize) -> Vec<u8> {
            let mut raw = raw.to_vec();
            raw[at] ^= 1;
            raw
        }
        fn sev(certificate: &mut SevCertificate, at: usize) {
            *certificate = SevCertificate::parse(&flipped(certificate.as_bytes(), at)).unwrap();
        }
        fn ca(certificate: &mut CaCertificate) {
            *certificate = CaCertificate::parse(&flipped(certificate.as_bytes(), 600)).unwrap();
        }
        type Damage = fn(&mut LegacyChain);
        let damages: [(Usage, Usage, Damage); 7] = [
            (Usage::Ark, Usage::Ark, |chain| ca(&mut chain.ark)),
            (Usage::Ask, Usage::Ark, |chain| ca(&mut chain.ask)),
            (Usage::Cek, Usage::Ask, |chain| sev(&mut chain.cek, 1060)),
            (Usage::Oca, Usage::Oca, |chain| sev(&mut chain.oca, 1060)),
            (Usage::Pek, Usage::Oca, |chain| sev(&mut chain.pek, 1060)),
            (Usage::Pek, Usage::Cek, |chain| sev(&mut chain.pek, 1580)),
            (Usage::Pdh, Usage::Pek, |chain| sev(&mut chain.pdh, 1060)),
        ];
        for (on, by, damage) in damages {
            let mut chain = naples();
            damage(&mut chain);
            match chain.verify(&TrustAnchors::amd()).unwrap_err() {
                ChainError::Ca(CaError::BadSignature { subject, signer })
                | ChainError::Certificate(CertificateError::BadSignature { subject, signer }) => {
                    assert_eq!((subject, signer), (on, by));
                }
                other => panic!("{by:?} on {on:?}: {other}"),
            }
        }
    }

    #[test]
    fn a_certificate_in_anothers_place_is_named() {
        let mut chain = naples();
        chain.pdh = chain.pek.clone();
        assert_eq!(
            chain.verify(&TrustAnchors::amd()),
            Err(ChainError::Misplaced {
                expected: Usage::Pdh,
                found: Usage::Pek
            })
        );
    }

    #[test]
    fn an_emulated_root_counts_only_when_named() {
        let identity = testing::identity();
        let chain = identity.chain();
        assert!(matches!(
            chain.verify(&TrustAnchors::amd()),
            Err(ChainError::UntrustedRoot { .. })
        ));
        let trust = TrustAnchors::amd()
            .with_emulated_root(identity.root_fingerprint())
            .unwrap();
        let verified = chain.verify(&trust).unwrap();
        assert!(verified.emulated());
        let other = testing::other_identity();
        assert!(matches!(
            other.chain().verify(&trust),
            Err(ChainError::UntrustedRoot { .. })
        ));
        // Naming an emulated root takes nothing away from AMD's.
        assert!(!naples().verify(&trust).unwrap().emulated());
    }

    #[test]
    fn a_forged_root_with_amds_ids_is_refused() {
        let amd = naples();
        let forged = Identity::generate_as(Profile {
            ark_id: amd.ark.key_id(),
            ask_id: amd.ask.key_id(),
            api: ApiVersion::new(1, 55),
        })
        .unwrap();
        let chain = forged.chain();
        assert_eq!(chain.ark.key_id(), amd.ark.key_id());
        chain.ark.verify_signed_by(&chain.ark).unwrap();
        assert!(matches!(
            chain.verify(&TrustAnchors::amd()),
            Err(ChainError::UntrustedRoot { .. })
        ));
        // Not even by naming it: an emulated root has to say that it is one.
        let trust = TrustAnchors::amd()
            .with_emulated_root(forged.root_fingerprint())
            .unwrap();
        assert_eq!(chain.verify(&trust), Err(ChainError::NotMarkedEmulated));
    }

    #[test]
    fn exported_sets_are_taken_only_whole() {
        let chain = naples();
        let (pdh, platform, amd) = (
            chain.pdh.as_bytes(),
            chain.platform_certs(),
            chain.amd_certs(),
        );
        assert_eq!(LegacyChain::parse(pdh, &platform, &amd).unwrap(), chain);
        assert!(LegacyChain::parse(pdh, &platform[1..], &amd).is_err());
        assert!(LegacyChain::parse(pdh, &platform, &amd[..amd.len() - 1]).is_err());
        assert!(LegacyChain::parse(pdh, &[], &[]).is_err());
    }
}
