//! The outermost layer of what is signed, read strictly: it lies outside the signature, and
//! x509-parser takes some of it in more than one encoding.

use super::pss;

/// A certificate or revocation list, taken apart into what is signed and by what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Signed<'a> {
    /// The signed bytes, as encoded.
    pub(super) body: &'a [u8],
    pub(super) signature: &'a [u8],
    /// Whether body and envelope name the same one of AMD's two algorithm identifiers.
    pub(super) amd_pss: bool,
}

impl<'a> Signed<'a> {
    /// `SEQUENCE { body SEQUENCE, algorithm SEQUENCE, signature BIT STRING }` and nothing else.
    pub(super) fn parse(der: &'a [u8]) -> Option<Self> {
        let parts = content(der, SEQUENCE)?;
        let (body, rest) = first(parts).filter(|(body, _)| body.tag == SEQUENCE)?;
        let (outer, rest) = first(rest).filter(|(outer, _)| outer.tag == SEQUENCE)?;
        let [0, signature @ ..] = content(rest, BIT_STRING)? else {
            return None;
        };
        let inner = algorithm_of(body.content)?;
        Some(Self {
            body: body.raw,
            signature,
            amd_pss: pss::is_amd_pss(inner) && inner == outer.content,
        })
    }
}

/// The content of the one element that `bytes` are, if it has this tag.
pub(super) fn content(bytes: &[u8], tag: u8) -> Option<&[u8]> {
    match first(bytes)? {
        (element, []) if element.tag == tag => Some(element.content),
        _ => None,
    }
}

/// The algorithm in a body: its first SEQUENCE, behind version and serial number.
fn algorithm_of(body: &[u8]) -> Option<&[u8]> {
    let mut rest = body;
    loop {
        let (element, more) = first(rest)?;
        if element.tag == SEQUENCE {
            return Some(element.content);
        }
        rest = more;
    }
}

struct Element<'a> {
    tag: u8,
    content: &'a [u8],
    raw: &'a [u8],
}

/// The first element and what is behind it. Lengths have to be in their shortest form and below
/// 2²⁴; tags of more than one byte are not read.
fn first(bytes: &[u8]) -> Option<(Element<'_>, &[u8])> {
    let (tag, header, len) = match *bytes {
        [tag, len @ ..=0x7f, ..] => (tag, 2, u32::from(len)),
        [tag, 0x81, len @ 0x80..=0xff, ..] => (tag, 3, u32::from(len)),
        [tag, 0x82, high @ 1..=0xff, low, ..] => (tag, 4, u32::from_be_bytes([0, 0, high, low])),
        [tag, 0x83, high @ 1..=0xff, mid, low, ..] => {
            (tag, 5, u32::from_be_bytes([0, high, mid, low]))
        }
        _ => return None,
    };
    if tag & 0x1f == 0x1f {
        return None;
    }
    let end = usize::try_from(len).ok()?.checked_add(header)?;
    let (raw, rest) = bytes.split_at_checked(end)?;
    let content = raw.get(header..)?;
    Some((Element { tag, content, raw }, rest))
}

pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const INTEGER: u8 = 0x02;
pub(super) const OCTET_STRING: u8 = 0x04;
pub(super) const IA5_STRING: u8 = 0x16;
const BIT_STRING: u8 = 0x03;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_length_has_one_encoding() {
        assert_eq!(content(&[2, 1, 7], INTEGER), Some(&[7][..]));
        assert_eq!(content(&[2, 1, 7], SEQUENCE), None);
        for wrong in [
            &[][..],
            &[2],
            &[2, 1],
            &[2, 1, 7, 7],
            &[2, 0x80, 7, 0, 0],
            &[2, 0x81, 1, 7],
            &[2, 0x82, 0, 1, 7],
            &[2, 0x83, 0, 0, 1, 7],
            &[2, 0x84, 0, 0, 0, 1, 7],
            &[0x1f, 1, 7],
        ] {
            assert!(
                first(wrong).is_none_or(|(_, rest)| !rest.is_empty()),
                "{wrong:?}"
            );
        }
        for len in [0x80u32, 0xff, 0x100, 0xffff, 0x1_0000] {
            let bytes = len.to_be_bytes();
            let bytes = &bytes[bytes.iter().position(|byte| *byte != 0).unwrap()..];
            let mut der = vec![4, 0x80 + u8::try_from(bytes.len()).unwrap()];
            der.extend_from_slice(bytes);
            der.resize(der.len() + len as usize, 9);
            assert_eq!(content(&der, OCTET_STRING).unwrap().len(), len as usize);
            der.pop();
            assert_eq!(content(&der, OCTET_STRING), None);
        }
    }
}
