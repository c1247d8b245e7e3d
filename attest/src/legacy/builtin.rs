//! AMD's SEV roots and intermediates as its key service publishes them (`ask_ark`), so that a host
//! can hand them on with its own certificates. What is believed of a root is a matter of the pins
//! in [`chain`](super::chain), not of these files.

use super::ca::CaCertificate;
use super::certificate::SevCertificate;
use super::chain::{ChainError, Generation};

impl Generation {
    /// All of them, oldest first.
    pub const ALL: [Self; 5] = [
        Self::Naples,
        Self::Rome,
        Self::Milan,
        Self::Genoa,
        Self::Turin,
    ];

    /// ASK ‖ ARK of this generation.
    pub fn amd_certs(self) -> Vec<u8> {
        let (ask, ark): (&[u8], &[u8]) = match self {
            Self::Naples => (
                include_bytes!("roots/naples-ask.cert"),
                include_bytes!("roots/naples-ark.cert"),
            ),
            Self::Rome => (
                include_bytes!("roots/rome-ask.cert"),
                include_bytes!("roots/rome-ark.cert"),
            ),
            Self::Milan => (
                include_bytes!("roots/milan-ask.cert"),
                include_bytes!("roots/milan-ark.cert"),
            ),
            Self::Genoa => (
                include_bytes!("roots/genoa-ask.cert"),
                include_bytes!("roots/genoa-ark.cert"),
            ),
            Self::Turin => (
                include_bytes!("roots/turin-ask.cert"),
                include_bytes!("roots/turin-ark.cert"),
            ),
        };
        [ask, ark].concat()
    }

    /// The generation whose ASK signed a chip's certificate. Hosts export that certificate without
    /// AMD's signature; the key service has it with one.
    pub fn that_signed(cek: &SevCertificate) -> Option<Self> {
        let signed = |generation: &Self| {
            let certs = generation.amd_certs();
            let ask = CaCertificate::parse_first(&certs);
            ask.is_ok_and(|(ask, _)| ask.verify_endorsement(cek).is_ok())
        };
        Self::ALL.into_iter().find(signed)
    }

    /// The generation of a processor by CPUID leaf 1, family and model with their extensions.
    pub const fn of_processor(family: u32, model: u32) -> Option<Self> {
        match (family, model) {
            (0x17, 0x00..=0x0f) => Some(Self::Naples),
            (0x17, 0x30..=0x3f) => Some(Self::Rome),
            (0x19, 0x00..=0x0f) => Some(Self::Milan),
            (0x19, 0x10..=0x1f | 0xa0..=0xaf) => Some(Self::Genoa),
            (0x1a, 0x00..=0x1f) => Some(Self::Turin),
            _ => None,
        }
    }
}

/// Reads a file of ASK ‖ ARK, whoever made it.
pub fn parse_amd_certs(raw: &[u8]) -> Result<(CaCertificate, CaCertificate), ChainError> {
    let (ask, rest) = CaCertificate::parse_first(raw)?;
    Ok((ask, CaCertificate::parse(rest)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::chain::{Root, TrustAnchors};
    use crate::processor::testing;

    #[test]
    fn each_generations_files_are_the_pinned_ones() {
        for generation in Generation::ALL {
            let certs = generation.amd_certs();
            let (ask, ark) = parse_amd_certs(&certs).unwrap();
            let root = TrustAnchors::amd().recognise(&ark);
            assert_eq!(root, Ok(Root::Amd(generation)));
            ark.verify_signed_by(&ark).unwrap();
            ask.verify_signed_by(&ark).unwrap();
        }
    }

    #[test]
    fn a_chips_certificate_finds_its_own_generation() {
        for (cek, generation) in [
            (
                include_bytes!("../../tests/vectors/legacy/naples/cek.cert"),
                Generation::Naples,
            ),
            (
                include_bytes!("../../tests/vectors/legacy/rome/cek.cert"),
                Generation::Rome,
            ),
        ] {
            let cek = SevCertificate::parse(cek).unwrap();
            assert_eq!(Generation::that_signed(&cek), Some(generation));
        }
        let emulated = &testing::identity().chain().cek;
        assert_eq!(Generation::that_signed(emulated), None);
    }

    #[test]
    fn processors_are_told_apart() {
        let of = Generation::of_processor;
        assert_eq!(of(0x17, 0x01), Some(Generation::Naples));
        assert_eq!(of(0x17, 0x31), Some(Generation::Rome));
        assert_eq!(of(0x19, 0x01), Some(Generation::Milan));
        assert_eq!(of(0x19, 0x11), Some(Generation::Genoa));
        assert_eq!(of(0x19, 0xa0), Some(Generation::Genoa));
        assert_eq!(of(0x1a, 0x02), Some(Generation::Turin));
        assert_eq!(of(0x17, 0x71), None, "a desktop's");
        assert_eq!(of(0x06, 0x55), None);
    }
}
