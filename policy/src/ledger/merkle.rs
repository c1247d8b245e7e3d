//! The tree of RFC 6962, with the proofs and verification algorithms of RFC 9162, section 2.1.

use ring::digest::{Context, SHA256};

/// A node of the tree.
pub type Hash = [u8; 32];

/// The hash of a leaf: SHA-256 over 0x00 and its bytes.
pub fn leaf_hash(leaf: &[u8]) -> Hash {
    sha256(&[&[0], leaf])
}

/// A tree that only grows. Keeps every leaf's hash (32 bytes a record) for proofs.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    leaves: Vec<Hash>,
    /// Roots of the complete subtrees that make up the tree, largest first: one for each bit set in the size.
    peaks: Vec<Hash>,
}

impl Tree {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the hash of a leaf.
    pub fn push(&mut self, leaf: Hash) {
        let mut peak = leaf;
        for _ in 0..self.leaves.len().trailing_ones() {
            if let Some(left) = self.peaks.pop() {
                peak = node_hash(&left, &peak);
            }
        }
        self.peaks.push(peak);
        self.leaves.push(leaf);
    }

    /// The number of leaves.
    pub fn size(&self) -> u64 {
        self.leaves.len() as u64
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

    /// The root when the tree had `size` leaves, if it has had so many.
    pub fn root_at(&self, size: u64) -> Option<Hash> {
        Some(subtree_root(
            self.leaves.get(..usize::try_from(size).ok()?)?,
        ))
    }

    /// The path that proves leaf `index` in the tree of the first `size` leaves.
    pub fn inclusion_proof(&self, index: u64, size: u64) -> Option<Vec<Hash>> {
        if index >= size {
            return None;
        }
        let leaves = self.leaves.get(..usize::try_from(size).ok()?)?;
        let mut proof = Vec::new();
        inclusion_path(usize::try_from(index).ok()?, leaves, &mut proof);
        Some(proof)
    }

    /// The proof that the tree of the first `old` leaves is a prefix of that of the first `new`.
    pub fn consistency_proof(&self, old: u64, new: u64) -> Option<Vec<Hash>> {
        if old > new {
            return None;
        }
        let leaves = self.leaves.get(..usize::try_from(new).ok()?)?;
        let mut proof = Vec::new();
        if old > 0 {
            consistency_path(usize::try_from(old).ok()?, leaves, true, &mut proof);
        }
        Some(proof)
    }
}

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

/// Splits as RFC 6962 does: the left part is the largest power of two smaller than the length.
fn split(leaves: &[Hash]) -> (&[Hash], &[Hash]) {
    leaves.split_at(
        leaves
            .len()
            .div_ceil(2)
            .next_power_of_two()
            .min(leaves.len()),
    )
}

fn subtree_root(leaves: &[Hash]) -> Hash {
    match leaves {
        [] => sha256(&[]),
        [leaf] => *leaf,
        _ => {
            let (left, right) = split(leaves);
            node_hash(&subtree_root(left), &subtree_root(right))
        }
    }
}

/// PATH(m, D) of RFC 6962, 2.1.1.
fn inclusion_path(index: usize, leaves: &[Hash], proof: &mut Vec<Hash>) {
    if leaves.len() <= 1 {
        return;
    }
    let (left, right) = split(leaves);
    if index < left.len() {
        inclusion_path(index, left, proof);
        proof.push(subtree_root(right));
    } else {
        inclusion_path(index - left.len(), right, proof);
        proof.push(subtree_root(left));
    }
}

/// SUBPROOF(m, D, b) of RFC 6962, 2.1.2; `known` is b: whether the verifier has this subtree's root already.
fn consistency_path(old: usize, leaves: &[Hash], known: bool, proof: &mut Vec<Hash>) {
    if old == leaves.len() {
        if !known {
            proof.push(subtree_root(leaves));
        }
        return;
    }
    let (left, right) = split(leaves);
    if old <= left.len() {
        consistency_path(old, left, known, proof);
        proof.push(subtree_root(right));
    } else {
        consistency_path(old - left.len(), right, false, proof);
        proof.push(subtree_root(left));
    }
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
