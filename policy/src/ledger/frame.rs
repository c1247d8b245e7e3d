//! The lines of a ledger file: `KIND LENGTH CRC32 PAYLOAD`, after a header line.
//!
//! The checksum tells a torn or rotten line from a whole one; against people there are the checkpoints.

/// The first line of every ledger file.
pub(super) const HEADER: &[u8] = b"casemate-ledger 1\n";
/// The longest payload.
pub(super) const MAX_PAYLOAD: usize = 64 << 10;

/// What a line holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A record in canonical JSON.
    Record,
    /// A signed note, as a JSON string.
    Checkpoint,
    /// Where a file goes on from the one before it; its second line, and nowhere else.
    Start,
}

impl Kind {
    const fn letter(self) -> char {
        match self {
            Self::Record => 'R',
            Self::Checkpoint => 'C',
            Self::Start => 'S',
        }
    }
}

/// One line, with its line feed. The payload must not contain one (JSON does not).
pub(super) fn encode(kind: Kind, payload: &str) -> String {
    format!(
        "{} {} {:08x} {payload}\n",
        kind.letter(),
        payload.len(),
        crc32fast::hash(payload.as_bytes())
    )
}

/// Kind and payload of a line without its line feed, or nothing if it is not exactly as [`encode`] writes it.
pub(super) fn decode(line: &[u8]) -> Option<(Kind, &str)> {
    let (kind, rest) = match line.split_first_chunk::<2>()? {
        (b"R ", rest) => (Kind::Record, rest),
        (b"C ", rest) => (Kind::Checkpoint, rest),
        (b"S ", rest) => (Kind::Start, rest),
        _ => return None,
    };
    let mut digits = 0;
    let mut length = 0usize;
    for digit in rest.iter().take_while(|b| b.is_ascii_digit()).take(6) {
        length = length * 10 + usize::from(digit - b'0');
        digits += 1;
    }
    let leading_zero = digits > 1 && rest.first() == Some(&b'0');
    let (checksum, payload) = rest
        .get(digits..)?
        .strip_prefix(b" ")?
        .split_first_chunk::<8>()?;
    let payload = payload.strip_prefix(b" ")?;
    if digits == 0 || leading_zero || payload.len() != length || length > MAX_PAYLOAD {
        return None;
    }
    let spelled = checksum
        .iter()
        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b));
    let checksum = u32::from_str_radix(std::str::from_utf8(checksum).ok()?, 16).ok()?;
    if !spelled || checksum != crc32fast::hash(payload) || payload.contains(&b'\n') {
        return None;
    }
    Some((kind, std::str::from_utf8(payload).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_encode_writes_is_read() {
        let line = encode(Kind::Record, "{\"a b\":1}");
        let bare = line.trim_end();
        assert_eq!(decode(bare.as_bytes()), Some((Kind::Record, "{\"a b\":1}")));
        for bad in [
            bare.replacen('9', "09", 1),
            bare.to_uppercase(),
            bare.replacen(' ', "  ", 1),
            format!("{bare} "),
            bare[1..].to_owned(),
        ] {
            assert_eq!(decode(bad.as_bytes()), None, "{bad}");
        }
    }
}
