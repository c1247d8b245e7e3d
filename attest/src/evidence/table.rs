//! The certificate table that a host may hand over with a report: publication 56421 (GHCB),
//! section 4.1.8.1; the `auxblob` of configfs-tsm.
//!
//! The host fills it and the guest forwards it; whether a certificate is worth anything is
//! settled by the chain, not here.

use crate::bytes;
use std::fmt;

/// The longest table that is looked at; Linux hands out at most 32 KiB.
pub const MAX_TABLE: usize = 128 << 10;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableCertificate {
    /// What the host says it is.
    pub kind: CertificateKind,
    /// Its bytes: DER, as a rule.
    pub bytes: Vec<u8>,
}

/// What an entry's GUID names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CertificateKind {
    /// Versioned chip endorsement key.
    Vcek,
    /// Versioned loaded endorsement key.
    Vlek,
    /// AMD's signing key, which signs VCEKs (or, as ASVK, VLEKs).
    Ask,
    /// AMD's root key.
    Ark,
    /// AMD's revocation list.
    Crl,
    /// A GUID that has no name here.
    Other([u8; 16]),
}

/// Why bytes are no certificate table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Longer than is looked at.
    #[error("the certificate table has {0} bytes; at most {MAX_TABLE} are looked at")]
    TooLong(usize),
    /// More entries than is reasonable.
    #[error("the certificate table has more than {MAX_ENTRIES} entries")]
    TooManyEntries,
    /// The list of entries has no end.
    #[error("the certificate table ends before its closing entry")]
    NotClosed,
    /// An entry's bytes are not in the table, or in its list of entries.
    #[error("the {kind} entry at {offset} + {length} does not lie behind the entries in the table")]
    OutOfRange {
        /// Whose entry.
        kind: CertificateKind,
        /// Where it should start.
        offset: u32,
        /// Its length.
        length: u32,
    },
    /// Two entries share bytes.
    #[error("the {0} and {1} entries of the certificate table overlap")]
    Overlap(CertificateKind, CertificateKind),
    /// Two entries of one kind.
    #[error("the certificate table has two {0} entries")]
    Twice(CertificateKind),
}

/// Reads a table. No bytes at all mean no certificates, as from a host that has none.
pub fn parse(table: &[u8]) -> Result<Vec<TableCertificate>, TableError> {
    if table.len() > MAX_TABLE {
        return Err(TableError::TooLong(table.len()));
    }
    if table.is_empty() {
        return Ok(Vec::new());
    }
    let entries = entries(table)?;
    // The closing entry counts.
    let list_len = entries.len().saturating_add(1).saturating_mul(ENTRY_LEN);
    let mut found: Vec<TableCertificate> = Vec::with_capacity(entries.len());
    for (at, entry) in entries.iter().enumerate() {
        for before in entries.iter().take(at) {
            if before.kind == entry.kind {
                return Err(TableError::Twice(entry.kind));
            }
            if before.start() < entry.end() && entry.start() < before.end() {
                return Err(TableError::Overlap(before.kind, entry.kind));
            }
        }
        let bytes = usize::try_from(entry.start())
            .ok()
            .zip(usize::try_from(entry.end()).ok())
            .filter(|(start, end)| *start >= list_len && start < end)
            .and_then(|(start, end)| table.get(start..end))
            .ok_or(TableError::OutOfRange {
                kind: entry.kind,
                offset: entry.offset,
                length: entry.length,
            })?;
        found.push(TableCertificate {
            kind: entry.kind,
            bytes: bytes.to_vec(),
        });
    }
    Ok(found)
}

/// Writes a table that [`parse`] reads: the entries in their order, their bytes behind. No
/// certificates are no bytes.
pub fn encode(certificates: &[TableCertificate]) -> Result<Vec<u8>, TableError> {
    if certificates.is_empty() {
        return Ok(Vec::new());
    }
    // The closing entry counts.
    let list_len = certificates.len().saturating_add(1);
    let mut table = Vec::new();
    let mut offset = list_len.saturating_mul(ENTRY_LEN);
    for certificate in certificates {
        let length = certificate.bytes.len();
        table.extend(certificate.kind.guid());
        for number in [offset, length] {
            let number = u32::try_from(number).map_err(|_| TableError::TooLong(number))?;
            table.extend(number.to_le_bytes());
        }
        offset = offset.saturating_add(length);
    }
    table.extend([0; ENTRY_LEN]);
    for certificate in certificates {
        table.extend(&certificate.bytes);
    }
    // A GUID of zeros closes the list.
    match parse(&table)?.len() == certificates.len() {
        true => Ok(table),
        false => Err(TableError::NotClosed),
    }
}

impl CertificateKind {
    /// The GUID's bytes in the order they are written.
    pub fn guid(self) -> [u8; 16] {
        match self {
            Self::Other(guid) => guid,
            named => GUIDS
                .into_iter()
                .find(|(kind, _)| *kind == named)
                .map_or([0; 16], |(_, guid)| guid),
        }
    }

    /// From the GUID's bytes in the order they are written.
    pub fn from_guid(guid: [u8; 16]) -> Self {
        GUIDS
            .into_iter()
            .find(|(_, known)| *known == guid)
            .map_or(Self::Other(guid), |(kind, _)| kind)
    }
}

impl fmt::Display for CertificateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcek => f.write_str("VCEK"),
            Self::Vlek => f.write_str("VLEK"),
            Self::Ask => f.write_str("ASK"),
            Self::Ark => f.write_str("ARK"),
            Self::Crl => f.write_str("CRL"),
            Self::Other(guid) => write!(f, "GUID {}", hex::encode(guid)),
        }
    }
}

struct Entry {
    kind: CertificateKind,
    offset: u32,
    length: u32,
}

impl Entry {
    fn start(&self) -> u64 {
        u64::from(self.offset)
    }

    fn end(&self) -> u64 {
        self.start().saturating_add(u64::from(self.length))
    }
}

fn entries(table: &[u8]) -> Result<Vec<Entry>, TableError> {
    let mut entries = Vec::new();
    for raw in table.chunks_exact(ENTRY_LEN) {
        let guid = bytes::array(raw, 0).ok_or(TableError::NotClosed)?;
        if guid == [0; 16] {
            return Ok(entries);
        }
        if entries.len() == MAX_ENTRIES {
            return Err(TableError::TooManyEntries);
        }
        entries.push(Entry {
            kind: CertificateKind::from_guid(guid),
            offset: bytes::le32(raw, 16).ok_or(TableError::NotClosed)?,
            length: bytes::le32(raw, 20).ok_or(TableError::NotClosed)?,
        });
    }
    Err(TableError::NotClosed)
}

const ENTRY_LEN: usize = 24;
const MAX_ENTRIES: usize = 16;
const GUIDS: [(CertificateKind, [u8; 16]); 5] = [
    // 63da758d-e664-4564-adc5-f4b93be8accd
    (
        CertificateKind::Vcek,
        0x63da_758d_e664_4564_adc5_f4b9_3be8_accd_u128.to_be_bytes(),
    ),
    // a8074bc2-a25a-483e-aae6-39c045a0b8a1
    (
        CertificateKind::Vlek,
        0xa807_4bc2_a25a_483e_aae6_39c0_45a0_b8a1_u128.to_be_bytes(),
    ),
    // 4ab7b379-bbac-4fe4-a02f-05aef327c782
    (
        CertificateKind::Ask,
        0x4ab7_b379_bbac_4fe4_a02f_05ae_f327_c782_u128.to_be_bytes(),
    ),
    // c0b406a4-a803-4952-9743-3fb6014cd0ae
    (
        CertificateKind::Ark,
        0xc0b4_06a4_a803_4952_9743_3fb6_014c_d0ae_u128.to_be_bytes(),
    ),
    // 92f81bc3-5811-4d3d-97ff-d19f88dc67ea
    (
        CertificateKind::Crl,
        0x92f8_1bc3_5811_4d3d_97ff_d19f_88dc_67ea_u128.to_be_bytes(),
    ),
];
