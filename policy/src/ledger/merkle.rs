//! The tree of RFC 6962, with the proofs and verification algorithms of RFC 9162, section 2.1.

use ring::digest::{Context, SHA256};

/// A node of the tree.
pub type Hash = [u8; 32];

/// The hash of a leaf: SHA-256 over 0x00 and its bytes.
pub fn leaf_hash(leaf: &[u8]) -> Hash {
    sha256(&[&[0], leaf])
}

/// The right edge of a tree that only grows: all that its root needs, however many leaves it has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frontier {
    size: u64,
    /// Roots of the complete subtrees that make up the tree, largest first: one for each bit set in the size.
    peaks: Vec<Hash>,
}

impl Frontier {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// A tree of `size` leaves with these peaks, if there are as many as the size has bits.
    pub fn from_peaks(size: u64, peaks: Vec<Hash>) -> Option<Self> {
        (peaks.len() == size.count_ones() as usize).then_some(Self { size, peaks })
    }

    /// Appends the hash of a leaf.
    pub fn push(&mut self, leaf: Hash) {
        let mut peak = leaf;
        for _ in 0..self.size.trailing_ones() {
            if let Some(left) = self.peaks.pop() {
                peak = node_hash(&left, &peak);
            }
        }
        self.peaks.push(peak);
        self.size += 1;
    }

    /// The number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Roots of the complete subtrees, largest first.
    pub fn peaks(&self) -> &[Hash] {
        &self.peaks
    }

    /// The root; of the empty tree SHA-256 of nothing.
    pub fn root(&self) -> Hash {
        let joined = self
            .peaks
            .iter()
            .rev()
            .copied()
            .reduce(|right, left| node_hash(&left, &right));
        joined.unwrap_or_else(|| sha256(&[]))
    }
}

/// Something that knows the hashes of a tree's complete subtrees; what proofs are made from.
pub trait Nodes {
    /// Why a hash could not be had.
    type Error;

    /// The number of leaves.
    fn size(&self) -> u64;

    /// The root of the `2^level` leaves from `index * 2^level` on, all of which are in the tree.
    fn node(&self, level: u32, index: u64) -> Result<Hash, Self::Error>;

    /// The root when the tree had `size` leaves, if it has had so many.
    fn root_at(&self, size: u64) -> Result<Option<Hash>, Self::Error> {
        if size > self.size() {
            return Ok(None);
        }
        range_root(self, 0, size).map(Some)
    }

    /// The path that proves leaf `index` in the tree of the first `size` leaves (RFC 9162, 2.1.3.1).
    fn inclusion_proof(&self, index: u64, size: u64) -> Result<Option<Vec<Hash>>, Self::Error> {
        if index >= size || size > self.size() {
            return Ok(None);
        }
        let (mut proof, mut start, mut end) = (Vec::new(), 0, size);
        while end - start > 1 {
            let middle = start + split(end - start);
            if index < middle {
                proof.push(range_root(self, middle, end)?);
                end = middle;
            } else {
                proof.push(range_root(self, start, middle)?);
                start = middle;
            }
        }
        proof.reverse();
        Ok(Some(proof))
    }

    /// The proof that the tree of the first `old` leaves is a prefix of that of the first `new` (RFC 9162, 2.1.4.1).
    fn consistency_proof(&self, old: u64, new: u64) -> Result<Option<Vec<Hash>>, Self::Error> {
        if old > new || new > self.size() {
            return Ok(None);
        }
        let (mut proof, mut start, mut end) = (Vec::new(), 0, new);
        if old == 0 {
            return Ok(Some(proof));
        }
        while old != end {
            let middle = start + split(end - start);
            if old <= middle {
                proof.push(range_root(self, middle, end)?);
                end = middle;
            } else {
                proof.push(range_root(self, start, middle)?);
                start = middle;
            }
        }
        if start > 0 {
            proof.push(range_root(self, start, end)?);
        }
        proof.reverse();
        Ok(Some(proof))
    }

    /// The right edge of the tree when it had `size` leaves.
    fn frontier_at(&self, size: u64) -> Result<Option<Frontier>, Self::Error> {
        if size > self.size() {
            return Ok(None);
        }
        let (mut peaks, mut start) = (Vec::new(), 0);
        for level in (0..u64::BITS).rev().filter(|level| size >> level & 1 == 1) {
            peaks.push(self.node(level, start >> level)?);
            start += 1 << level;
        }
        Ok(Some(Frontier { size, peaks }))
    }
}

/// A tree in memory. Keeps every leaf's hash (32 bytes a record) for proofs.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    leaves: Vec<Hash>,
    frontier: Frontier,
}

impl Tree {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the hash of a leaf.
    pub fn push(&mut self, leaf: Hash) {
        self.frontier.push(leaf);
        self.leaves.push(leaf);
    }

    /// The number of leaves.
    pub fn size(&self) -> u64 {
        self.frontier.size
    }

    /// The root; of the empty tree SHA-256 of nothing.
    pub fn root(&self) -> Hash {
        self.frontier.root()
    }

    /// The root when the tree had `size` leaves, if it has had so many.
    pub fn root_at(&self, size: u64) -> Option<Hash> {
        Nodes::root_at(self, size).ok().flatten()
    }

    /// The path that proves leaf `index` in the tree of the first `size` leaves.
    pub fn inclusion_proof(&self, index: u64, size: u64) -> Option<Vec<Hash>> {
        Nodes::inclusion_proof(self, index, size).ok().flatten()
    }

    /// The proof that the tree of the first `old` leaves is a prefix of that of the first `new`.
    pub fn consistency_proof(&self, old: u64, new: u64) -> Option<Vec<Hash>> {
        Nodes::consistency_proof(self, old, new).ok().flatten()
    }
}

impl Nodes for Tree {
    type Error = OutOfTree;

    fn size(&self) -> u64 {
        self.frontier.size
    }

    fn node(&self, level: u32, index: u64) -> Result<Hash, OutOfTree> {
        let range = || {
            let width = 1usize.checked_shl(level)?;
            let start = usize::try_from(index).ok()?.checked_mul(width)?;
            self.leaves.get(start..start.checked_add(width)?)
        };
        complete_root(range().ok_or(OutOfTree)?).ok_or(OutOfTree)
    }
}

/// A node was asked for that the tree does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tree has no such node")]
pub struct OutOfTree;

/// Whether `proof` shows `leaf` at `index` in the tree of `size` leaves with this root (RFC 9162, 2.1.3.2).
#[must_use]
pub fn verify_inclusion(leaf: &Hash, index: u64, size: u64, proof: &[Hash], root: &Hash) -> bool {
    if index >= size {
        return false;
    }
    let (mut fn_, mut sn, mut r) = (index, size - 1, *leaf);
    for p in proof {
        if sn == 0 {
            return false;
        }
        if fn_ & 1 == 1 || fn_ == sn {
            r = node_hash(p, &r);
            while fn_ & 1 == 0 && fn_ != 0 {
                fn_ >>= 1;
                sn >>= 1;
            }
        } else {
            r = node_hash(&r, p);
        }
        fn_ >>= 1;
        sn >>= 1;
    }
    sn == 0 && r == *root
}

/// Whether `proof` shows that the tree of `new` leaves extends that of `old` (RFC 9162, 2.1.4.2).
#[must_use]
pub fn verify_consistency(
    old: u64,
    old_root: &Hash,
    new: u64,
    new_root: &Hash,
    proof: &[Hash],
) -> bool {
    if old > new {
        return false;
    }
    if old == new {
        return proof.is_empty() && old_root == new_root;
    }
    if old == 0 {
        return proof.is_empty() && *old_root == sha256(&[]);
    }
    let mut path = proof.iter();
    let start = if old.is_power_of_two() {
        Some(old_root)
    } else {
        path.next()
    };
    let Some(start) = start else { return false };
    let (mut fn_, mut sn) = (old - 1, new - 1);
    while fn_ & 1 == 1 {
        fn_ >>= 1;
        sn >>= 1;
    }
    let (mut fr, mut sr) = (*start, *start);
    for c in path {
        if sn == 0 {
            return false;
        }
        if fn_ & 1 == 1 || fn_ == sn {
            fr = node_hash(c, &fr);
            sr = node_hash(c, &sr);
            while fn_ & 1 == 0 && fn_ != 0 {
                fn_ >>= 1;
                sn >>= 1;
            }
        } else {
            sr = node_hash(&sr, c);
        }
        fn_ >>= 1;
        sn >>= 1;
    }
    sn == 0 && fr == *old_root && sr == *new_root
}

fn node_hash(left: &Hash, right: &Hash) -> Hash {
    sha256(&[&[1], left, right])
}

fn sha256(parts: &[&[u8]]) -> Hash {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(part);
    }
    let mut hash = [0; 32];
    for (to, from) in hash.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
    hash
}

/// The root over a power of two of hashes: a complete subtree.
pub(super) fn complete_root(hashes: &[Hash]) -> Option<Hash> {
    let mut level = hashes.to_vec();
    while level.len() > 1 {
        let pairs = level.chunks(2);
        level = pairs
            .map(|pair| match pair {
                [left, right] => Some(node_hash(left, right)),
                _ => None,
            })
            .collect::<Option<_>>()?;
    }
    level.first().copied()
}

/// How many of `length` leaves go to the left: the largest power of two smaller than it (RFC 6962, 2.1).
fn split(length: u64) -> u64 {
    1 << (u64::BITS - 1 - (length - 1).leading_zeros())
}

/// MTH(D[start:end]) of RFC 6962, 2.1; `start` is a multiple of the largest complete subtree in the range.
fn range_root<N: Nodes + ?Sized>(nodes: &N, start: u64, end: u64) -> Result<Hash, N::Error> {
    let length = end - start;
    if length == 0 {
        return Ok(sha256(&[]));
    }
    if length.is_power_of_two() {
        let level = length.trailing_zeros();
        return nodes.node(level, start >> level);
    }
    let middle = start + split(length);
    let left = range_root(nodes, start, middle)?;
    Ok(node_hash(&left, &range_root(nodes, middle, end)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Leaves, roots and proofs of the Certificate Transparency reference tests.
    const LEAVES: [&str; 8] = [
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    ];
    const ROOTS: [&str; 9] = [
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ];
    const INCLUSION: [(u64, u64, [&str; 3]); 2] = [
        (
            0,
            8,
            [
                "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
            ],
        ),
        (
            5,
            8,
            [
                "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ],
        ),
    ];
    const CONSISTENCY: [(u64, u64, &[&str]); 2] = [
        (
            2,
            8,
            &[
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
            ],
        ),
        (
            6,
            8,
            &[
                "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ],
        ),
    ];

    fn hash(text: &str) -> Hash {
        hex::decode(text).unwrap().try_into().unwrap()
    }

    fn reference() -> Tree {
        let mut tree = Tree::new();
        LEAVES
            .iter()
            .for_each(|leaf| tree.push(leaf_hash(&hex::decode(leaf).unwrap())));
        tree
    }

    fn grown(size: u64) -> Tree {
        let mut tree = Tree::new();
        (0..size).for_each(|n| tree.push(leaf_hash(&n.to_le_bytes())));
        tree
    }

    #[test]
    fn roots_are_the_reference_ones() {
        let mut tree = Tree::new();
        assert_eq!(tree.root(), hash(ROOTS[0]));
        for (leaf, root) in LEAVES.iter().zip(&ROOTS[1..]) {
            tree.push(leaf_hash(&hex::decode(leaf).unwrap()));
            assert_eq!(tree.root(), hash(root));
        }
        for (size, root) in ROOTS.iter().enumerate() {
            assert_eq!(tree.root_at(size as u64), Some(hash(root)));
        }
        assert_eq!(tree.root_at(9), None);
    }

    #[test]
    fn proofs_are_the_reference_ones() {
        let tree = reference();
        for (index, size, proof) in INCLUSION {
            let proof: Vec<_> = proof.into_iter().map(hash).collect();
            assert_eq!(tree.inclusion_proof(index, size).unwrap(), proof);
            let leaf = leaf_hash(&hex::decode(LEAVES[index as usize]).unwrap());
            assert!(verify_inclusion(
                &leaf,
                index,
                size,
                &proof,
                &hash(ROOTS[size as usize])
            ));
        }
        for (old, new, proof) in CONSISTENCY {
            let proof: Vec<_> = proof.iter().copied().map(hash).collect();
            assert_eq!(tree.consistency_proof(old, new).unwrap(), proof);
            let (old_root, new_root) = (hash(ROOTS[old as usize]), hash(ROOTS[new as usize]));
            assert!(verify_consistency(old, &old_root, new, &new_root, &proof));
        }
    }

    #[test]
    fn every_small_proof_verifies_and_no_other_index_does() {
        let tree = grown(20);
        for size in 1..=20 {
            let root = tree.root_at(size).unwrap();
            assert_eq!(grown(size).root(), root);
            for index in 0..size {
                let leaf = leaf_hash(&index.to_le_bytes());
                let proof = tree.inclusion_proof(index, size).unwrap();
                for other in 0..=size {
                    assert_eq!(
                        verify_inclusion(&leaf, other, size, &proof, &root),
                        other == index
                    );
                }
            }
            for old in 0..=size {
                let (old_root, proof) = (
                    tree.root_at(old).unwrap(),
                    tree.consistency_proof(old, size).unwrap(),
                );
                assert!(verify_consistency(old, &old_root, size, &root, &proof));
            }
        }
        assert_eq!(tree.inclusion_proof(3, 3), None);
        assert_eq!(tree.consistency_proof(3, 2), None);
        assert_eq!(tree.inclusion_proof(3, 21), None);
        assert_eq!(tree.consistency_proof(3, 21), None);
    }

    proptest! {
        #[test]
        fn changed_proofs_fail(size in 2u64..200, pick: prop::sample::Index, place: prop::sample::Index, bit in 0usize..256) {
            let tree = grown(size);
            let root = tree.root();
            let index = pick.index(size as usize) as u64;
            let leaf = leaf_hash(&index.to_le_bytes());
            let good = tree.inclusion_proof(index, size).unwrap();
            prop_assert!(verify_inclusion(&leaf, index, size, &good, &root));
            let mut bad = good.clone();
            bad[place.index(good.len())][bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!verify_inclusion(&leaf, index, size, &bad, &root));
            prop_assert!(!verify_inclusion(&leaf, index, size, &good[1..], &root));
            prop_assert!(!verify_inclusion(&leaf, index, size, &[good.as_slice(), &[root]].concat(), &root));

            let edge = tree.frontier_at(index).unwrap().unwrap();
            prop_assert_eq!(&edge, &grown(index).frontier);
            prop_assert_eq!(Frontier::from_peaks(index, edge.peaks.clone()), Some(edge));

            let old = index.max(1);
            let old_root = tree.root_at(old).unwrap();
            let good = tree.consistency_proof(old, size).unwrap();
            prop_assert!(verify_consistency(old, &old_root, size, &root, &good));
            let mut bad = good.clone();
            bad[place.index(good.len())][bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!verify_consistency(old, &old_root, size, &root, &bad));
            prop_assert!(!verify_consistency(old, &old_root, size, &root, &good[1..]));
            prop_assert!(!verify_consistency(old, &root, size, &root, &good));
        }
    }
}
