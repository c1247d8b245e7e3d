//! Sets of guest pages: one bit a page of the offered memory, whatever the set holds.
//!
//! 16 GiB of guest memory take 512 KiB. A set is made over the memory's ranges and knows no page outside them.

use crate::guest::{Gpn, PageRange};

/// A set of pages of one guest's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    ranges: Vec<PlacedRange>,
    words: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PlacedRange {
    start: u64,
    count: u64,
    /// Number of its first page, counted over all ranges.
    first: u64,
}

impl PageSet {
    /// No page of this memory, which must be ascending and without overlap.
    pub fn empty(memory: &[PageRange]) -> Self {
        let mut first = 0u64;
        let mut ranges = Vec::with_capacity(memory.len());
        for range in memory {
            ranges.push(PlacedRange {
                start: range.start.0,
                count: range.count,
                first,
            });
            first = first.saturating_add(range.count);
        }
        let words = usize::try_from(first.div_ceil(64)).unwrap_or(0);
        Self {
            ranges,
            words: vec![0; words],
        }
    }

    /// Every page of this memory.
    pub fn all(memory: &[PageRange]) -> Self {
        let mut set = Self::empty(memory);
        for range in memory {
            set.insert_run(range.start, range.count);
        }
        set
    }

    /// From a bitmap over the pages of all ranges in their order, the lowest bit first; bits beyond the memory
    /// are ignored.
    pub fn from_words(memory: &[PageRange], words: impl IntoIterator<Item = u64>) -> Self {
        let mut set = Self::empty(memory);
        let pages: u64 = set.ranges.iter().map(|range| range.count).sum();
        set.words
            .iter_mut()
            .zip(words)
            .for_each(|(to, from)| *to = from);
        if let (Some(last), Some(shift)) = (set.words.last_mut(), pages.checked_rem(64))
            && shift != 0
        {
            *last &= (1 << shift) - 1;
        }
        set
    }

    /// Adds a page; whether it is new, `None` if it lies outside the memory.
    pub fn insert(&mut self, page: Gpn) -> Option<bool> {
        self.insert_run(page, 1).map(|new| new == 1)
    }

    /// Adds pages that one range holds; how many of them are new, `None` if they lie outside the memory.
    pub fn insert_run(&mut self, start: Gpn, count: u64) -> Option<u64> {
        let first = self.number(start, count)?;
        let mut new = 0;
        for number in first..first + count {
            let (word, bit) = place(number);
            let word = self.words.get_mut(word)?;
            new += u64::from(*word & bit == 0);
            *word |= bit;
        }
        Some(new)
    }

    /// The first of these pages that is in the set.
    pub fn first_of(&self, start: Gpn, count: u64) -> Option<Gpn> {
        let first = self.number(start, count)?;
        (0..count)
            .find(|step| {
                let (word, bit) = place(first + step);
                self.words.get(word).is_some_and(|word| word & bit != 0)
            })
            .map(|step| Gpn(start.0 + step))
    }

    /// Whether all these pages are in the memory.
    pub fn covers(&self, start: Gpn, count: u64) -> bool {
        self.number(start, count).is_some()
    }

    /// Adds the pages of another set over the same memory.
    pub fn merge(&mut self, other: &PageSet) {
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(to, from)| *to |= from);
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// How many.
    pub fn len(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Gpn> + '_ {
        let numbers = (0u64..).zip(&self.words).flat_map(|(at, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros();
                left &= left.checked_sub(1)?;
                Some(at * 64 + u64::from(bit))
            })
        });
        let mut ranges = self.ranges.iter().copied().peekable();
        numbers.filter_map(move |number| {
            while ranges.next_if(|r| number >= r.first + r.count).is_some() {}
            let range = ranges.peek()?;
            Some(Gpn(range.start + (number - range.first)))
        })
    }

    /// Number of a page among all, if one range holds `count` pages from it.
    fn number(&self, start: Gpn, count: u64) -> Option<u64> {
        self.ranges.iter().find_map(|range| {
            let within = start.0.checked_sub(range.start)?;
            let fits = within.checked_add(count)? <= range.count;
            fits.then_some(range.first + within)
        })
    }
}

fn place(number: u64) -> (usize, u64) {
    (
        usize::try_from(number / 64).unwrap_or(usize::MAX),
        1 << (number % 64),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn memory() -> Vec<PageRange> {
        [(0, 70), (100, 5), (1000, 200)]
            .map(|(start, count)| PageRange {
                start: Gpn(start),
                count,
            })
            .to_vec()
    }

    #[test]
    fn pages_outside_are_refused_and_counts_are_of_new_pages() {
        let mut set = PageSet::empty(&memory());
        assert_eq!(set.insert(Gpn(70)), None);
        assert_eq!(set.insert_run(Gpn(69), 2), None);
        assert_eq!(set.insert_run(Gpn(u64::MAX), 2), None);
        assert_eq!(set.insert(Gpn(104)), Some(true));
        assert_eq!(set.insert(Gpn(104)), Some(false));
        assert_eq!(set.insert_run(Gpn(100), 5), Some(4));
        assert_eq!(set.first_of(Gpn(100), 5), Some(Gpn(100)));
        assert_eq!(set.first_of(Gpn(0), 70), None);
        assert_eq!(set.len(), 5);
    }

    #[test]
    fn bitmaps_are_little_endian_words_over_all_ranges() {
        let set = PageSet::from_words(&memory(), [0b1000_0001, 0b100_0001]);
        let pages: Vec<u64> = set.iter().map(|page| page.0).collect();
        assert_eq!(pages, [0, 7, 64, 100]);
    }

    #[test]
    fn bits_beyond_the_memory_are_ignored() {
        let set = PageSet::from_words(&memory(), [u64::MAX; 9]);
        assert_eq!(set.len(), 275);
        assert_eq!(set, PageSet::all(&memory()));
        assert_eq!(set.iter().last(), Some(Gpn(1199)));
    }

    proptest! {
        #[test]
        fn a_set_is_a_set(pages in proptest::collection::btree_set(0u64..1300, 0..200)) {
            let mut set = PageSet::empty(&memory());
            let inside: BTreeSet<u64> =
                pages.into_iter().filter(|page| set.insert(Gpn(*page)).is_some()).collect();
            let listed: Vec<u64> = set.iter().map(|page| page.0).collect();
            prop_assert_eq!(listed, inside.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), inside.len() as u64);
            prop_assert_eq!(set.is_empty(), inside.is_empty());
        }
    }
}
