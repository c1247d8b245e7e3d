//! Which pages of a guest are private and which are shared with the host, as the guest says by hypercall or fault.
//!
//! Migration asks it which pages the firmware must carry; a SNP guest's memory follows it. What arrives here was
//! chosen by the guest and is believed in nothing but that it is the guest's wish.

/// Who may read a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    /// The guest only.
    Private,
    /// Guest and host.
    Shared,
}

/// A guest's wish that pages become private or shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conversion {
    /// Start, page aligned.
    pub gpa: u64,
    /// Bytes, whole pages, not zero.
    pub length: u64,
    /// What they shall be.
    pub to: Visibility,
}

/// Why a wish is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConversionError {
    /// Not a request for conversion.
    #[error("hypercall {0} is none that asks for pages to be converted")]
    OtherHypercall(u64),
    /// Bits without a meaning.
    #[error("a conversion asks for what has no meaning ({0:#x})")]
    Unknown(u64),
    /// Not whole pages, or none, or around the end of addresses.
    #[error("a conversion of {length:#x} bytes at {gpa:#x} is not one of whole pages")]
    Range {
        /// Start.
        gpa: u64,
        /// Bytes.
        length: u64,
    },
    /// Not the guest's memory.
    #[error("a conversion of {length:#x} bytes at {gpa:#x} is outside the guest's memory")]
    Outside {
        /// Start.
        gpa: u64,
        /// Bytes.
        length: u64,
    },
}

impl ConversionError {
    /// What the guest gets as the hypercall's result: `-KVM_EINVAL`.
    pub const HYPERCALL_RESULT: u64 = (-22i64).cast_unsigned();
}

impl Conversion {
    /// From an exit for `KVM_HC_MAP_GPA_RANGE`: address, number of pages, attributes. The page size among the
    /// attributes is a hint and is not looked at.
    pub fn of_hypercall(number: u64, arguments: &[u64; 6]) -> Result<Self, ConversionError> {
        let [gpa, pages, attributes, ..] = *arguments;
        if number != KVM_HC_MAP_GPA_RANGE {
            return Err(ConversionError::OtherHypercall(number));
        }
        if attributes & !(ENCRYPTED | PAGE_SIZE_HINT) != 0 {
            return Err(ConversionError::Unknown(attributes));
        }
        let length = pages.saturating_mul(PAGE);
        Self::new(gpa, length, visibility(attributes & ENCRYPTED != 0))
    }

    /// From an exit for `KVM_EXIT_MEMORY_FAULT`: the guest has touched a page as what it is not yet.
    pub fn of_memory_fault(flags: u64, gpa: u64, size: u64) -> Result<Self, ConversionError> {
        if flags & !FAULT_PRIVATE != 0 {
            return Err(ConversionError::Unknown(flags));
        }
        Self::new(gpa, size, visibility(flags & FAULT_PRIVATE != 0))
    }

    fn new(gpa: u64, length: u64, to: Visibility) -> Result<Self, ConversionError> {
        let whole = gpa.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0;
        if !whole || gpa.checked_add(length).is_none() {
            return Err(ConversionError::Range { gpa, length });
        }
        Ok(Self { gpa, length, to })
    }
}

/// What each page of a guest's memory is; memory is one run from address 0.
#[derive(Clone, Debug)]
pub struct PageMap {
    shared: Vec<u64>,
    pages: u64,
}

impl PageMap {
    /// All pages private, as a launched guest begins.
    pub fn private(length: u64) -> Self {
        let pages = length / PAGE;
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
        Self {
            shared: vec![0; words],
            pages,
        }
    }

    /// Notes a conversion.
    pub fn convert(&mut self, wish: Conversion) -> Result<(), ConversionError> {
        self.check(wish)?;
        for page in wish.gpa / PAGE..(wish.gpa + wish.length) / PAGE {
            let (word, bit) = place(page);
            if let Some(word) = self.shared.get_mut(word) {
                match wish.to {
                    Visibility::Shared => *word |= bit,
                    Visibility::Private => *word &= !bit,
                }
            }
        }
        Ok(())
    }

    /// Whether a conversion names the guest's own memory.
    pub fn check(&self, wish: Conversion) -> Result<(), ConversionError> {
        let Conversion { gpa, length, .. } = wish;
        if (gpa + length).div_ceil(PAGE) > self.pages {
            return Err(ConversionError::Outside { gpa, length });
        }
        Ok(())
    }

    /// What a page is; a page outside memory is shared, for no firmware can carry it.
    pub fn visibility(&self, page: u64) -> Visibility {
        let (word, bit) = place(page);
        let shared = self.shared.get(word).is_none_or(|word| word & bit != 0);
        visibility(page < self.pages && !shared)
    }

    /// How many pages are shared.
    pub fn shared_pages(&self) -> u64 {
        self.shared
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Numbers of the private pages, ascending.
    pub fn private_pages(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.pages).filter(|page| self.visibility(*page) == Visibility::Private)
    }
}

fn visibility(private: bool) -> Visibility {
    if private {
        Visibility::Private
    } else {
        Visibility::Shared
    }
}

fn place(page: u64) -> (usize, u64) {
    (
        usize::try_from(page / 64).unwrap_or(usize::MAX),
        1 << (page % 64),
    )
}

/// `include/uapi/linux/kvm_para.h`.
pub const KVM_HC_MAP_GPA_RANGE: u64 = 12;
/// `KVM_MAP_GPA_RANGE_ENCRYPTED`.
const ENCRYPTED: u64 = 1 << 4;
/// `KVM_MAP_GPA_RANGE_PAGE_SZ_*`.
const PAGE_SIZE_HINT: u64 = 0xf;
/// `KVM_MEMORY_EXIT_FLAG_PRIVATE`.
const FAULT_PRIVATE: u64 = kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE as u64;
const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: u64 = 0;

    fn hypercall(gpa: u64, pages: u64, attributes: u64) -> Result<Conversion, ConversionError> {
        Conversion::of_hypercall(KVM_HC_MAP_GPA_RANGE, &[gpa, pages, attributes, 0, 0, 0])
    }

    #[test]
    fn a_wish_is_parsed_once_and_strictly() {
        let wish = hypercall(0x3000, 2, ENCRYPTED | 1).unwrap();
        assert_eq!(
            (wish.gpa, wish.length, wish.to),
            (0x3000, 0x2000, Visibility::Private)
        );
        assert_eq!(hypercall(0, 1, SHARED).unwrap().to, Visibility::Shared);
        for (gpa, pages) in [
            (0x3001, 1),
            (0x3000, 0),
            (u64::MAX - 4095, 1),
            (0, u64::MAX),
        ] {
            assert!(
                matches!(
                    hypercall(gpa, pages, SHARED),
                    Err(ConversionError::Range { .. })
                ),
                "{gpa:#x} {pages}"
            );
        }
        assert_eq!(hypercall(0, 1, 0x20), Err(ConversionError::Unknown(0x20)));
        let other = Conversion::of_hypercall(11, &[0; 6]);
        assert_eq!(other, Err(ConversionError::OtherHypercall(11)));
        let fault = Conversion::of_memory_fault(8, 0x4000, 0x1000).unwrap();
        assert_eq!(fault.to, Visibility::Private);
        assert!(Conversion::of_memory_fault(1, 0x4000, 0x1000).is_err());
    }

    #[test]
    fn the_map_knows_every_page_and_nothing_outside() {
        let mut map = PageMap::private(130 * PAGE);
        assert_eq!(map.private_pages().count(), 130);
        map.convert(hypercall(63 * PAGE, 2, SHARED).unwrap())
            .unwrap();
        assert_eq!(map.visibility(62), Visibility::Private);
        assert_eq!(map.visibility(63), Visibility::Shared);
        assert_eq!(map.visibility(64), Visibility::Shared);
        assert_eq!(map.private_pages().count(), 128);
        map.convert(hypercall(64 * PAGE, 1, ENCRYPTED).unwrap())
            .unwrap();
        assert_eq!(map.visibility(64), Visibility::Private);
        let outside = map.convert(hypercall(129 * PAGE, 2, SHARED).unwrap());
        assert!(matches!(outside, Err(ConversionError::Outside { .. })));
        assert_eq!(
            map.visibility(129),
            Visibility::Private,
            "nothing is half done"
        );
        assert_eq!(map.visibility(130), Visibility::Shared);
    }
}
