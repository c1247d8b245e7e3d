//! The lines of a ledger file: `KIND LENGTH CRC32 PAYLOAD`, after a header line.
//!
//! The checksum tells a torn or rotten line from a whole one; against people there are the checkpoints.

/// The first line of every ledger.
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
}

impl Kind {
    const fn letter(self) -> char {
        match self {
            Self::Record => 'R',
            Self::Checkpoint => 'C',
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
    let line = std::str::from_utf8(line).ok()?;
    let payload = line
        .splitn(4, ' ')
        .nth(3)
        .filter(|payload| payload.len() <= MAX_PAYLOAD)?;
    let kind = match line.chars().next()? {
        'R' => Kind::Record,
        'C' => Kind::Checkpoint,
        _ => return None,
    };
    (encode(kind, payload).strip_suffix('\n') == Some(line)).then_some((kind, payload))
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
