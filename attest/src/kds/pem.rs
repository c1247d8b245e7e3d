//! PEM as people carry it: written here, read by rustls-pki-types.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::pem::{PemObject as _, SectionKind};

/// DER as one PEM section.
pub(super) fn encode(kind: SectionKind, der: &[u8]) -> String {
    let label = label(kind);
    let mut text = format!("-----BEGIN {label}-----\n");
    let mut line = 0;
    for character in STANDARD.encode(der).chars() {
        if line == LINE {
            text.push('\n');
            line = 0;
        }
        text.push(character);
        line += 1;
    }
    text.push_str(&format!("\n-----END {label}-----\n"));
    text
}

/// The DER of all sections; `None` where the text is no PEM, or a section is of another kind.
pub(super) fn decode(kind: SectionKind, text: &[u8]) -> Option<Vec<Vec<u8>>> {
    <(SectionKind, Vec<u8>)>::pem_slice_iter(text)
        .map(|section| match section {
            Ok((found, der)) if label(found) == label(kind) => Some(der),
            _ => None,
        })
        .collect()
}

const fn label(kind: SectionKind) -> &'static str {
    match kind {
        SectionKind::Certificate => "CERTIFICATE",
        SectionKind::Crl => "X509 CRL",
        _ => "",
    }
}

/// Characters in a line. RFC 7468, section 2.
const LINE: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_amd_writes() {
        let ark = include_bytes!("../../tests/vectors/chains/milan/ark.pem");
        let [der] = &decode(SectionKind::Certificate, ark).unwrap()[..] else {
            panic!("one certificate");
        };
        let text = encode(SectionKind::Certificate, der);
        assert_eq!(text.trim_end(), String::from_utf8_lossy(ark).trim_end());
        assert_eq!(decode(SectionKind::Crl, ark), None);
    }
}
