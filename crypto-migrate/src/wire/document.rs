//! `WIRE.md` executed: every table of the document against the code.

use ring::hkdf;

use super::batch::{EntryHeader, MAX_ENTRIES, PageKind};
use super::messages::{
    Abort, Begin, Commit, Confirm, Joined, Message, Probe, ProbeAck, RoundAck, RoundEnd, Running,
    State, Verified,
};
use super::{FrameKind, Header, MAX_STATE, STATE_CHUNK, VERSION};
use crate::code::Code;
use crate::crypto::SEALS_PER_KEY;
use crate::preamble::{PREAMBLE_SIZE, Ticket};
use crate::transcript::{Manifest, StreamCount};

const DOCUMENT: &str = include_str!("../../WIRE.md");

#[test]
fn frame_header() {
    let header = Header::new(FrameKind::Commit, 0x0102, 0x1112_1314_1516_1718, 0x0101).unwrap();
    let bytes = header.encode();
    let due: [(&str, &[u8]); 5] = [
        ("version", &[VERSION]),
        ("type", &[0x22]),
        ("stream", &[2, 1]),
        ("length", &[1, 1, 0, 0]),
        (
            "sequence",
            &[0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11],
        ),
    ];
    check_layout("Frame header", &bytes, &due);
    assert_eq!(rows("Frame header")[0][2], format!("{VERSION:#04x}"));
}

#[test]
fn frame_types() {
    let rows = rows("Frame types");
    assert_eq!(rows.len(), FrameKind::ALL.len());
    for (row, kind) in rows.iter().zip(FrameKind::ALL) {
        assert_eq!(row[0], format!("{:#04x}", *kind as u8), "{kind:?}");
        assert_eq!(row[1], format!("{kind:?}"));
        assert_eq!(row[3], kind.max_length().to_string(), "{kind:?}");
    }
}

#[test]
fn messages() {
    let manifest = Manifest {
        pages: 5,
        seals_sha256: [1; 32],
        streams: vec![
            StreamCount { seals: 6, pages: 5 },
            StreamCount {
                seals: 1,
                pages: 300,
            },
        ],
        rounds: 2,
        epoch: 7,
        state_length: 300,
        state_sha256: [2; 32],
        offer_sha256: [3; 32],
        content_sha256: Some([4; 32]),
    };
    let end = RoundEnd {
        round: 3,
        pages: 300,
        next_sequence: 70_000,
        last: true,
    };
    let ack = RoundAck {
        round: 3,
        pages: 300,
    };
    let state = State {
        total: 300,
        offset: 2,
        bytes: vec![0xaa, 0xbb],
    };
    let verified = Verified {
        root_hi: [1; 24],
        root_lo: [2; 24],
    };
    let start = vec![1, 2, 3];
    let running = Running {
        epoch: 129,
        announced: 3,
    };
    let probe = Probe {
        last: true,
        bytes: vec![1, 2],
    };
    let (join, ..) = crate::session::example_join(&[]);
    let encoded = [
        ("Confirm", Confirm { mac: [7; 32] }.encode()),
        ("Join", join.encode()),
        ("Joined", Joined { mac: [7; 32] }.encode()),
        ("Probe", probe.encode()),
        ("ProbeAck", ProbeAck { bytes: 300 }.encode()),
        ("Begin", Begin { start }.encode()),
        ("RoundEnd", end.encode()),
        ("RoundAck", ack.encode()),
        ("State", state.encode()),
        ("Verified", verified.encode()),
        ("Commit", Commit { epoch: 129 }.encode()),
        ("Running", running.encode()),
        ("Abort", Abort::new("C", "why").encode()),
        ("Manifest", manifest.encode()),
    ];
    let rows = rows("Messages");
    assert_eq!(rows.len(), encoded.len());
    for (row, (name, bytes)) in rows.iter().zip(encoded) {
        assert_eq!(row[0], name);
        let example = row[2].replace(['`', ' '], "");
        assert_eq!(example, hex::encode(bytes.unwrap()), "{name}");
    }
    let pieces = format!("at most {MAX_STATE} bytes in pieces of {STATE_CHUNK}");
    assert!(DOCUMENT.contains(&pieces));
}

#[test]
fn page_entries() {
    let header = EntryHeader {
        sequence: 0x1112_1314_1516_1718,
        page: 0x2122_2324_2526_2728,
        count: 0x0a,
        round: 0x3132_3334,
        session: [0x41, 0x42, 0x43, 0x44],
        stream: 0x5152,
        kind: PageKind::Data,
    };
    let due: [(&str, &[u8]); 8] = [
        ("sequence", &header.sequence.to_le_bytes()),
        ("page", &header.page.to_le_bytes()),
        ("count", &[0x0a, 0, 0, 0]),
        ("round", &[0x34, 0x33, 0x32, 0x31]),
        ("session", &header.session),
        ("stream", &[0x52, 0x51]),
        ("kind", &[1]),
        ("reserved", &[0]),
    ];
    let rows_of_both = rows("Page entry");
    let (layout, kinds) = rows_of_both.split_at(due.len());
    check_rows(layout, &header.encode(), &due);
    let all = [PageKind::Data, PageKind::Zero, PageKind::Firmware];
    assert_eq!(kinds.len() - 1, all.len());
    for (row, kind) in kinds.iter().skip(1).zip(all) {
        let count = kind.max_count();
        let largest = EntryHeader {
            kind,
            count,
            ..header
        };
        assert_eq!(row[0], (kind as u8).to_string());
        assert_eq!(row[1], format!("{kind:?}"));
        assert_eq!(row[2], count.to_string());
        assert_eq!(row[3], largest.body_length().to_string());
    }
    assert_eq!(rows("Page batch")[0][2], format!("1 to {MAX_ENTRIES}"));
    let two = super::batch::join(&[vec![9; 48], vec![8; 48]]);
    check_layout(
        "Page batch",
        &two,
        &[
            ("entries", &[2, 0]),
            ("flags", &[0, 0]),
            ("the entries", &two[4..]),
        ],
    );
}

#[test]
fn associated_data_of_a_page() {
    let (header, bytes) = crate::page::associated_data();
    check_layout(
        "Page seal",
        &bytes,
        &[
            ("seal version", &[3, 0]),
            ("session id", &[1; 16]),
            ("VM id", &[2; 16]),
            ("epoch", &[3, 0, 0, 0, 0, 0, 0, 0]),
            ("stream", &[4, 0]),
            ("the entry's clear header", &header),
            ("length", &[0, 0x20, 0, 0]),
        ],
    );
}

/// The derivation as the document tells it, in other words than the code's, makes the same keys.
#[test]
fn keys() {
    let rows = rows("Key derivation");
    let [transcript, secret] = [[9; 48].as_slice(), b"secret"];
    let session = crate::session::example_keys(&[9; 48], secret).unwrap();
    for row in &rows {
        let [name, label, direction, bytes, _] = <[_; 5]>::try_from(row.clone()).unwrap();
        let fields: [&[u8]; 7] = [
            label.as_bytes(),
            &[1; 16],
            &[2; 16],
            b"direct",
            direction.as_bytes(),
            &[0, 0],
            &3u64.to_le_bytes(),
        ];
        let mut info = b"casemate-migrate/1 key".to_vec();
        for field in fields {
            info.extend((field.len() as u64).to_le_bytes());
            info.extend(field);
        }
        let secret = hkdf::Salt::new(hkdf::HKDF_SHA384, transcript).extract(secret);
        let okm = expand(&secret, &info, bytes.parse().unwrap());
        let (known, tag) = session.iter().find(|(known, _)| *known == name).unwrap();
        let due = match *known {
            "confirm_source" | "confirm_destination" => {
                let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &okm);
                ring::hmac::sign(&key, b"probe").as_ref().to_vec()
            }
            "pages" => {
                let chain = |secret: &[u8], label: &[u8], length| {
                    let secret = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA384, secret);
                    expand(&secret, label, length)
                };
                let next = chain(&okm, b"casemate-migrate/1 next key", 48);
                let keys = [okm, next].map(|s| chain(&s, b"casemate-migrate/1 page key", 32));
                keys.iter().flat_map(|key| seal(key)).collect()
            }
            "join" => okm,
            _ => seal(&okm),
        };
        assert_eq!(&due, tag, "{name}");
    }
    assert_eq!(rows.len(), session.len());
    assert!(DOCUMENT.contains(&format!("Every key makes {SEALS_PER_KEY} seals")));
    assert!(DOCUMENT.contains(&format!("more than {} seals", 1u64 << 32)));
}

/// What a further connection proves, and its keys, as the document tells them.
#[test]
fn further_connections() {
    let preamble = rows("Preamble");
    let bytes = Ticket([7; 16]).encode();
    check_rows(
        &preamble,
        &bytes,
        &[("magic", b"CMJOIN/1"), ("ticket", &[7; 16])],
    );
    assert_eq!(bytes.len(), PREAMBLE_SIZE);
    assert!(DOCUMENT.contains(&format!("1 to {} connections", crate::session::MAX_STREAMS)));

    let with_length = |out: &mut Vec<u8>, field: &[u8]| {
        out.extend((field.len() as u64).to_le_bytes());
        out.extend(field);
    };
    let exporter = [4; 32];
    let (_, claimed, [join, joined, control, pages]) = crate::session::example_join(&exporter);
    let mut due = b"casemate-migrate/1 join".to_vec();
    for field in [&[1; 16][..], &[2, 0], &[5; 16], &[6; 32]] {
        with_length(&mut due, field);
    }
    assert_eq!(claimed, due);

    let mut secret = Vec::new();
    with_length(&mut secret, &[8; 48]);
    with_length(&mut secret, &exporter);
    let secret = hkdf::Salt::new(hkdf::HKDF_SHA384, &[9; 48]).extract(&secret);
    let okm = |label: &[u8], direction: &[u8], length| {
        let mut info = b"casemate-migrate/1 key".to_vec();
        let epoch = 3u64.to_le_bytes();
        let fields: [&[u8]; 7] = [
            label,
            &[1; 16],
            &[2; 16],
            b"direct",
            direction,
            &[2, 0],
            &epoch,
        ];
        for field in fields {
            with_length(&mut info, field);
        }
        expand(&secret, &info, length)
    };
    let (there, back): (&[u8], &[u8]) = (b"source to destination", b"destination to source");
    let mac = |okm: &[u8]| {
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, okm);
        ring::hmac::sign(&key, b"probe").as_ref().to_vec()
    };
    assert_eq!(join, mac(&okm(b"confirm", there, 32)));
    assert_eq!(joined, mac(&okm(b"confirm", back, 32)));
    let both = [there, back].map(|way| seal(&okm(b"control", way, 32)));
    assert_eq!(control, both.concat());
    let chain = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA384, &okm(b"page", there, 48));
    assert_eq!(
        pages,
        seal(&expand(&chain, b"casemate-migrate/1 page key", 32))
    );
}

#[test]
fn tls_limits() {
    let limits = crate::tls::limits();
    let rows = rows("TLS limits");
    let found: Vec<String> = rows.iter().map(|row| row[1].clone()).collect();
    assert_eq!(found, limits.map(|limit| limit.to_string()));
}

#[test]
fn every_code_is_named() {
    let section = section("Codes");
    let mut named: Vec<&str> = section
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| !["Refuse", "Abort"].contains(name))
        .collect();
    named.sort_unstable();
    let mut codes: Vec<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
    codes.sort_unstable();
    assert_eq!(named, codes);
}

fn section(title: &str) -> &'static str {
    let (_, rest) = DOCUMENT
        .split_once(&format!("\n## {title}\n"))
        .unwrap_or_else(|| panic!("no section {title}"));
    rest.split("\n## ").next().unwrap()
}

/// The rows of all tables of a section; of the first table, without its head.
fn rows(title: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        let inner = line.trim_matches('|');
        inner
            .split(" |")
            .map(|cell| cell.trim().to_owned())
            .collect()
    };
    let lines = section(title).lines().filter(|line| line.starts_with('|'));
    let rows: Vec<_> = lines
        .filter(|line| !line.starts_with("| ---"))
        .map(cells)
        .collect();
    rows[1..].to_vec()
}

fn check_layout(title: &str, bytes: &[u8], due: &[(&str, &[u8])]) {
    check_rows(&rows(title), bytes, due);
}

/// The rows name all bytes in their order, and each field is where its row says.
fn check_rows(rows: &[Vec<String>], bytes: &[u8], due: &[(&str, &[u8])]) {
    assert_eq!(rows.len(), due.len());
    let mut at = 0;
    for (row, (name, value)) in rows.iter().zip(due) {
        assert_eq!(row[1], *name);
        let (from, to) = row[0].split_once("..").unwrap();
        let from: usize = from.parse().unwrap();
        let to = if to.is_empty() {
            bytes.len()
        } else {
            to.parse().unwrap()
        };
        assert_eq!(from, at, "{name}");
        assert_eq!(&bytes[from..to], *value, "{name}");
        at = to;
    }
    assert_eq!(at, bytes.len());
}

fn expand(secret: &hkdf::Prk, info: &[u8], length: usize) -> Vec<u8> {
    struct Length(usize);
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let mut out = vec![0; length];
    let info = [info];
    secret
        .expand(&info, Length(length))
        .unwrap()
        .fill(&mut out)
        .unwrap();
    out
}

/// What the key makes of a known text under the nonce 0.
fn seal(key: &[u8]) -> Vec<u8> {
    use ring::aead;
    let key = aead::UnboundKey::new(&aead::AES_256_GCM, key).unwrap();
    let nonce = aead::Nonce::assume_unique_for_key([0; 12]);
    let mut data = b"probe".to_vec();
    aead::LessSafeKey::new(key)
        .seal_in_place_append_tag(nonce, aead::Aad::empty(), &mut data)
        .unwrap();
    data
}
