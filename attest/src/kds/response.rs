//! What the key service answered, taken apart. None of it is believed yet: the shapes are checked
//! here, signatures and contents in [`super::Source`].

use super::pem;
use super::request::{MAX_CHAIN_LEN, MAX_CRL_LEN, MAX_LEAF_LEN};
use rustls_pki_types::pem::{PemObject as _, SectionKind};

/// A product's chain as served: two certificates, unverified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainBody {
    /// ASK or ASVK, as DER.
    pub intermediate: Vec<u8>,
    /// ARK, as DER.
    pub root: Vec<u8>,
}

/// Why an answer is not what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    /// Too long to be what it should be; nothing of it was parsed.
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
    /// A web page, as proxies and sign-in portals send.
    #[error("the answer is a web page; a proxy or a sign-in portal stands in between")]
    Html,
    /// Not one DER structure.
    #[error("the answer is not one DER structure of its whole length")]
    NotDer,
    /// Not PEM.
    #[error("the answer is not PEM text")]
    NotPem,
    /// PEM of something other than certificates.
    #[error("the answer holds PEM sections that are no certificates")]
    NotCertificates,
    /// Not two certificates.
    #[error("the answer holds {0} certificates; an intermediate and a root are wanted")]
    Certificates(usize),
}

impl ChainBody {
    /// The two as the service sends them, and nothing beside.
    pub fn to_pem(&self) -> String {
        let certificate = |der| pem::encode(SectionKind::Certificate, der);
        certificate(&self.intermediate) + &certificate(&self.root)
    }
}

/// Reads the answer to [`Request::Chain`](super::Request::Chain): exactly two certificates in PEM.
/// That the intermediate stands first is seen when it is verified.
pub fn parse_chain(body: &[u8]) -> Result<ChainBody, ResponseError> {
    bounded(body, MAX_CHAIN_LEN)?;
    let mut certificates = Vec::new();
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(body) {
        let (kind, der) = section.map_err(|_| ResponseError::NotPem)?;
        if kind != SectionKind::Certificate {
            return Err(ResponseError::NotCertificates);
        }
        // Bounded like a leaf, so that the chain written again is no longer than one may be.
        parse_leaf(&der)?;
        certificates.push(der);
    }
    if certificates.is_empty() {
        return Err(ResponseError::NotPem);
    }
    let [intermediate, root] = <[Vec<u8>; 2]>::try_from(certificates)
        .map_err(|all| ResponseError::Certificates(all.len()))?;
    Ok(ChainBody { intermediate, root })
}

/// Reads the answer to [`Request::Vcek`](super::Request::Vcek): one certificate in DER.
pub fn parse_leaf(body: &[u8]) -> Result<&[u8], ResponseError> {
    bounded(body, MAX_LEAF_LEN)?;
    one_sequence(body)
}

/// Reads the answer to [`Request::Crl`](super::Request::Crl): one revocation list in DER.
pub fn parse_crl(body: &[u8]) -> Result<&[u8], ResponseError> {
    bounded(body, MAX_CRL_LEN)?;
    one_sequence(body)
}

impl ResponseError {
    /// A stable name for machines.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::TooLong(_) => "KDS_ANSWER_TOO_LONG",
            Self::Html => "KDS_ANSWER_HTML",
            Self::NotDer => "KDS_ANSWER_NOT_DER",
            Self::NotPem => "KDS_ANSWER_NOT_PEM",
            Self::NotCertificates => "KDS_ANSWER_NOT_CERTIFICATES",
            Self::Certificates(_) => "KDS_ANSWER_CHAIN_LENGTH",
        }
    }
}

fn bounded(body: &[u8], max: usize) -> Result<(), ResponseError> {
    let text = body.trim_ascii_start();
    if body.len() > max {
        Err(ResponseError::TooLong(max))
    } else if text.first() == Some(&b'<') {
        Err(ResponseError::Html)
    } else {
        Ok(())
    }
}

/// A SEQUENCE of definite length that ends where the bytes end; so a cut answer, or one with a
/// tail, is seen before anything else is parsed.
fn one_sequence(der: &[u8]) -> Result<&[u8], ResponseError> {
    let len = match der {
        [SEQUENCE, len @ 0..=0x7f, rest @ ..] => (usize::from(*len) == rest.len()).then_some(()),
        [SEQUENCE, 0x81, len, rest @ ..] => (usize::from(*len) == rest.len()).then_some(()),
        [SEQUENCE, 0x82, a, b, rest @ ..] => {
            (usize::from(u16::from_be_bytes([*a, *b])) == rest.len()).then_some(())
        }
        [SEQUENCE, 0x83, a, b, c, rest @ ..] => {
            (u32::from_be_bytes([0, *a, *b, *c]) as usize == rest.len()).then_some(())
        }
        _ => None,
    };
    len.map(|()| der).ok_or(ResponseError::NotDer)
}

/// The DER tag of every certificate and every revocation list.
const SEQUENCE: u8 = 0x30;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ASK: &[u8] = include_bytes!("../../tests/vectors/chains/genoa/ask.pem");
    const ARK: &[u8] = include_bytes!("../../tests/vectors/chains/genoa/ark.pem");
    const VCEK: &[u8] = include_bytes!("../../tests/vectors/reports/genoa-v5/vcek.der");

    #[test]
    fn a_chain_is_two_certificates_and_nothing_else() {
        let chain = parse_chain(&[ASK, ARK].concat()).unwrap();
        assert_ne!(chain.intermediate, chain.root);
        let code = |body: &[u8]| parse_chain(body).map_err(|e| e.code());
        assert_eq!(code(ASK), Err("KDS_ANSWER_CHAIN_LENGTH"));
        assert_eq!(
            code(&[ASK, ARK, ARK].concat()),
            Err("KDS_ANSWER_CHAIN_LENGTH")
        );
        assert_eq!(code(b""), Err("KDS_ANSWER_NOT_PEM"));
        assert_eq!(code(VCEK), Err("KDS_ANSWER_NOT_PEM"));
        assert_eq!(code(&ASK[..ASK.len() - 40]), Err("KDS_ANSWER_NOT_PEM"));
        assert_eq!(code(b"\n <html></html>"), Err("KDS_ANSWER_HTML"));
        let key = b"-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n";
        assert_eq!(
            code(&[ASK, ARK, &key[..]].concat()),
            Err("KDS_ANSWER_NOT_CERTIFICATES")
        );
        assert_eq!(
            code(&vec![b'\n'; MAX_CHAIN_LEN + 1]),
            Err("KDS_ANSWER_TOO_LONG")
        );
    }

    #[test]
    fn a_chain_that_is_taken_can_be_read_again() {
        use base64::Engine as _;
        let one_line = |len: u16| {
            let mut der = vec![0x30, 0x82];
            der.extend(len.to_be_bytes());
            der.resize(usize::from(len) + 4, 0);
            let text = base64::engine::general_purpose::STANDARD.encode(der);
            format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n").repeat(2)
        };
        // Below the limit on one line each, above it in lines of 64.
        let long = one_line(12_200);
        assert!(long.len() < MAX_CHAIN_LEN);
        assert_eq!(
            parse_chain(long.as_bytes()).map(drop).map_err(|e| e.code()),
            Err("KDS_ANSWER_TOO_LONG")
        );
        let fits = one_line(u16::try_from(MAX_LEAF_LEN).unwrap() - 4);
        let chain = parse_chain(fits.as_bytes()).unwrap();
        assert_eq!(parse_chain(chain.to_pem().as_bytes()), Ok(chain));
    }

    #[test]
    fn a_leaf_is_one_structure_of_the_whole_length() {
        assert_eq!(parse_leaf(VCEK), Ok(VCEK));
        let code = |body: &[u8]| parse_leaf(body).map(|_| ()).map_err(|e| e.code());
        assert_eq!(code(&VCEK[..VCEK.len() - 1]), Err("KDS_ANSWER_NOT_DER"));
        assert_eq!(code(&[VCEK, &[0]].concat()), Err("KDS_ANSWER_NOT_DER"));
        assert_eq!(code(&[]), Err("KDS_ANSWER_NOT_DER"));
        assert_eq!(code(b"<!doctype html>"), Err("KDS_ANSWER_HTML"));
        assert_eq!(code(&[0x30; 9000]), Err("KDS_ANSWER_TOO_LONG"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_fail_otherwise_than_by_an_error(body: Vec<u8>) {
            let _ = parse_chain(&body);
            let _ = parse_leaf(&body);
            let _ = parse_crl(&body);
        }

        #[test]
        fn a_chain_with_a_changed_byte_is_two_certificates_or_an_error(at in 0..ASK.len(), byte: u8) {
            let mut body = [ASK, ARK].concat();
            body[at] = byte;
            if let Ok(chain) = parse_chain(&body) {
                prop_assert_eq!(chain.root, parse_chain(&[ASK, ARK].concat()).unwrap().root);
            }
        }
    }
}
