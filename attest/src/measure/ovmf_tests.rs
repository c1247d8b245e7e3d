use super::*;
use proptest::prelude::*;

/// An image under construction: fill, metadata, footer table, 32 bytes.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) len: usize,
    pub(crate) entries: Vec<([u8; 16], Vec<u8>)>,
    pub(crate) sections: Vec<(u32, u32, u32)>,
}

impl Image {
    /// What an AmdSev build has, with everything in place.
    pub(crate) fn amd_sev() -> Self {
        Self {
            len: 2 * PAGE_LEN,
            entries: vec![
                (RESET_BLOCK_GUID, 0x80_b004u32.to_le_bytes().to_vec()),
                (
                    HASH_TABLE_GUID,
                    [0x81_0c00u32.to_le_bytes(), 0x400u32.to_le_bytes()].concat(),
                ),
                ([0xaa; 16], vec![1, 2, 3]),
            ],
            sections: vec![
                (0x80_0000, 0x9000, 1),
                (0x80_d000, 0x1000, 2),
                (0x80_e000, 0x1000, 3),
                (0x80_f000, 0x1000, 4),
                (0x81_0000, 0x1000, 0x10),
            ],
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut image: Vec<u8> = (0..self.len).map(|n| (n / 64) as u8).collect();
        let mut table = Vec::new();
        for (guid, content) in &self.entries {
            push_entry(&mut table, guid, content);
        }
        let metadata = self.metadata();
        let metadata_at = PAGE_LEN / 2;
        let from_end = (self.len - metadata_at) as u32;
        push_entry(&mut table, &METADATA_GUID, &from_end.to_le_bytes());
        let len = (table.len() + ENTRY_HEADER) as u16;
        table.extend(len.to_le_bytes());
        table.extend(FOOTER_GUID);
        image[metadata_at..metadata_at + metadata.len()].copy_from_slice(&metadata);
        let end = self.len - BEHIND_TABLE;
        image[end - table.len()..end].copy_from_slice(&table);
        image
    }

    fn metadata(&self) -> Vec<u8> {
        let len = (METADATA_HEADER + self.sections.len() * SECTION_LEN) as u32;
        let mut raw = b"ASEV".to_vec();
        for word in [len, 1, self.sections.len() as u32] {
            raw.extend(word.to_le_bytes());
        }
        for (gpa, len, kind) in &self.sections {
            for word in [gpa, len, kind] {
                raw.extend(word.to_le_bytes());
            }
        }
        raw
    }
}

fn push_entry(table: &mut Vec<u8>, guid: &[u8; 16], content: &[u8]) {
    table.extend(content);
    table.extend(((content.len() + ENTRY_HEADER) as u16).to_le_bytes());
    table.extend(guid);
}

fn refusal(image: &Image) -> OvmfError {
    Ovmf::parse(&image.bytes()).unwrap_err()
}

/// The image with one word of its metadata replaced.
fn with_metadata_word(index: usize, word: u32) -> Vec<u8> {
    let mut image = Image::amd_sev().bytes();
    let at = PAGE_LEN / 2 + index * 4;
    image[at..at + 4].copy_from_slice(&word.to_le_bytes());
    image
}

#[test]
fn a_place_for_a_launch_secret_is_read_where_there_is_one() {
    let with = |content: &[u8]| {
        let mut image = Image::amd_sev();
        image.entries.push((SECRET_BLOCK_GUID, content.to_vec()));
        image.bytes()
    };
    let area = [0x81_0000u32.to_le_bytes(), 0xc00u32.to_le_bytes()].concat();
    let image = with(&area);
    let wanted = SecretArea {
        gpa: 0x81_0000,
        len: 0xc00,
    };
    assert_eq!(Ovmf::parse(&image).unwrap().launch_secret(), Some(wanted));
    for nothing in [Image::amd_sev().bytes(), with(&[0; 8])] {
        assert_eq!(Ovmf::parse(&nothing).unwrap().launch_secret(), None);
    }
    let short = Ovmf::parse(&with(&area[..7])).unwrap_err();
    assert_eq!(short, OvmfError::ShortEntry("SEV secret block"));
}

#[test]
fn a_whole_image_is_read() {
    let bytes = Image::amd_sev().bytes();
    let ovmf = Ovmf::parse(&bytes).unwrap();
    assert_eq!(ovmf.gpa(), 0xffff_e000);
    assert_eq!(ovmf.pages().len(), 2);
    assert_eq!(ovmf.reset_eip(), Some(0x80_b004));
    assert_eq!(
        ovmf.hash_table(),
        Some(HashTableArea {
            gpa: 0x81_0c00,
            len: Some(0x400)
        })
    );
    let kinds: Vec<_> = ovmf.sections().iter().map(|section| section.kind).collect();
    assert_eq!(
        kinds,
        [
            SectionKind::SecMem,
            SectionKind::Secrets,
            SectionKind::Cpuid,
            SectionKind::SvsmCaa,
            SectionKind::KernelHashes
        ]
    );
}

#[test]
fn an_image_without_a_table_has_no_sev_support() {
    let ovmf = Ovmf::parse(&[0; PAGE_LEN]).unwrap();
    assert_eq!((ovmf.reset_eip(), ovmf.hash_table()), (None, None));
    assert!(ovmf.sections().is_empty());
    // The real builds without kernel hashing say so with an address of zero.
    let mut image = Image::amd_sev();
    image.entries[1].1 = vec![0; 8];
    assert_eq!(Ovmf::parse(&image.bytes()).unwrap().hash_table(), None);
}

#[test]
fn only_whole_pages_within_bounds_are_an_image() {
    for len in [0, 1, PAGE_LEN - 1, PAGE_LEN + 1, MAX_OVMF_LEN + PAGE_LEN] {
        let error = Ovmf::parse(&vec![0; len]).unwrap_err();
        assert_eq!(error, OvmfError::Length(len));
    }
}

#[test]
fn a_table_longer_than_the_image_is_refused() {
    for len in [u16::MAX, 9000, 17, 0] {
        let mut image = Image::amd_sev().bytes();
        let at = image.len() - BEHIND_TABLE - ENTRY_HEADER;
        image[at..at + 2].copy_from_slice(&len.to_le_bytes());
        assert_eq!(
            Ovmf::parse(&image).unwrap_err(),
            OvmfError::TableLength(len)
        );
    }
}

#[test]
fn entries_longer_than_the_table_or_shorter_than_a_header_are_refused() {
    let whole = Image::amd_sev().bytes();
    // The metadata entry is the last, so its header ends where the footer's begins.
    let at = whole.len() - BEHIND_TABLE - 2 * ENTRY_HEADER;
    for len in [0, 1, 17, 500, u16::MAX] {
        let mut image = whole.clone();
        image[at..at + 2].copy_from_slice(&len.to_le_bytes());
        let error = Ovmf::parse(&image).unwrap_err();
        assert!(
            matches!(error, OvmfError::EntryLength { found, .. } if found == len),
            "{len}: {error}"
        );
    }
}

#[test]
fn what_counts_is_there_once_and_whole() {
    for n in 0..2 {
        let mut image = Image::amd_sev();
        image.entries.push(image.entries[n].clone());
        assert!(matches!(refusal(&image), OvmfError::Duplicate(_)));
        let mut image = Image::amd_sev();
        image.entries[n].1.truncate(3);
        assert!(matches!(refusal(&image), OvmfError::ShortEntry(_)));
    }
    let mut image = Image::amd_sev();
    image.entries.push((METADATA_GUID, vec![0; 4]));
    assert!(matches!(refusal(&image), OvmfError::Duplicate(_)));
    // Entries that nobody asks for may come as they like.
    let mut image = Image::amd_sev();
    image.entries.push(([0xaa; 16], Vec::new()));
    assert!(Ovmf::parse(&image.bytes()).is_ok());
}

#[test]
fn metadata_must_lie_in_the_image_and_be_metadata() {
    let whole = Image::amd_sev().bytes();
    let at = whole.len() - BEHIND_TABLE - 2 * ENTRY_HEADER - 4;
    for from_end in [u32::MAX, whole.len() as u32 + 1, 15, 0] {
        let mut image = whole.clone();
        image[at..at + 4].copy_from_slice(&from_end.to_le_bytes());
        let error = Ovmf::parse(&image).unwrap_err();
        assert_eq!(error, OvmfError::MetadataPlace(from_end));
    }
    for (index, word) in [(0, 0x1234_5678), (2, 0), (2, 2)] {
        let error = Ovmf::parse(&with_metadata_word(index, word)).unwrap_err();
        assert_eq!(error, OvmfError::MetadataHeader);
    }
    for len in [0, 15, 8192, u32::MAX] {
        let error = Ovmf::parse(&with_metadata_word(1, len)).unwrap_err();
        assert!(matches!(error, OvmfError::MetadataPlace(_)), "{len}");
    }
    for count in [6, 0x1555_5556, u32::MAX] {
        let error = Ovmf::parse(&with_metadata_word(3, count)).unwrap_err();
        assert!(matches!(error, OvmfError::MetadataCount { .. }), "{count}");
    }
}

#[test]
fn there_are_at_most_so_many_sections() {
    let section = |n: u32| (n << 12, 0x1000, 1);
    let mut image = Image::amd_sev();
    image.len = 4 * PAGE_LEN;
    image.sections = (0..MAX_SECTIONS as u32).map(section).collect();
    assert!(Ovmf::parse(&image.bytes()).is_ok());
    image.sections.push(section(MAX_SECTIONS as u32));
    assert!(matches!(refusal(&image), OvmfError::MetadataCount { .. }));
}

#[test]
fn sections_are_whole_pages_below_four_gib() {
    for (gpa, len) in [
        (0x80_0000, 0),
        (0x80_0001, 0x1000),
        (0x80_0000, 0x1001),
        (0xffff_f000, 0x2000),
        (0xffff_f000, 0xffff_f000),
    ] {
        let mut image = Image::amd_sev();
        image.sections = vec![(gpa, len, 1)];
        assert_eq!(refusal(&image), OvmfError::SectionPlace { gpa, len });
    }
    for kind in [2, 3] {
        let mut image = Image::amd_sev();
        image.sections = vec![(0x80_0000, 0x2000, kind)];
        assert!(matches!(refusal(&image), OvmfError::SectionLength { .. }));
    }
}

#[test]
fn nothing_is_launched_twice() {
    for (section, at) in [
        ((0x80_8000, 0x1000, 1), 0x80_8000),
        ((0x7f_0000, 0x100_0000, 1), 0x80_0000),
        ((0x81_0000, 0x1000, 0x10), 0x81_0000),
        ((0xffff_d000, 0x2000, 1), 0xffff_e000),
        ((0xffff_f000, 0x1000, 1), 0xffff_f000),
        // As much as there is: what would be days of hashing if it could be repeated.
        ((0, 0xffff_e000, 1), 0x80_0000),
    ] {
        let mut image = Image::amd_sev();
        image.sections.push(section);
        assert_eq!(refusal(&image), OvmfError::Overlap(at), "{section:x?}");
    }
    let mut image = Image::amd_sev();
    image.sections = vec![(0, 0xffff_e000, 1)];
    assert!(Ovmf::parse(&image.bytes()).is_ok());
}

fn exercise(image: &[u8]) {
    if let Ok(ovmf) = Ovmf::parse(image) {
        let end = ovmf.gpa() + image.len() as u64;
        assert_eq!((end, ovmf.pages().as_flattened()), (FOUR_GIB, image));
        let pages: u64 = ovmf.sections().iter().map(|s| u64::from(s.len)).sum();
        assert!(pages <= FOUR_GIB);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_an_image_or_a_refusal(bytes in prop::collection::vec(any::<u8>(), 0..3 * PAGE_LEN)) {
        exercise(&bytes);
        let whole = bytes.len() / PAGE_LEN * PAGE_LEN;
        exercise(&bytes[..whole]);
    }

    #[test]
    fn a_damaged_image_is_an_image_or_a_refusal(
        damages in prop::collection::vec((0usize..300, any::<u8>()), 1..8),
        in_table in any::<bool>(),
    ) {
        let mut image = Image::amd_sev().bytes();
        let from = if in_table { image.len() - 300 } else { PAGE_LEN / 2 };
        for (at, byte) in damages {
            image[from + at] = byte;
        }
        exercise(&image);
    }

    #[test]
    fn any_sections_are_taken_or_refused(
        sections in prop::collection::vec((any::<u32>(), any::<u32>(), 0u32..0x12), 0..12),
        whole in any::<bool>(),
    ) {
        let mut image = Image::amd_sev();
        image.sections = sections;
        if whole {
            for (gpa, len, _) in &mut image.sections {
                *gpa &= !0xfff;
                *len = *len & 0xf000 | 0x1000;
            }
        }
        exercise(&image.bytes());
    }
}
