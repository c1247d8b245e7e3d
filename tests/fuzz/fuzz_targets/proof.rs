//! Merkle proofs: any indices, sizes and hashes are answered without a panic, and of all of them only the true proof of what
//! is in the tree is accepted.
#![no_main]

use casemate_policy::ledger::merkle::{leaf_hash, verify_consistency, verify_inclusion};
use casemate_policy::ledger::{Frontier, Hash, Tree};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((numbers, rest)) = bytes.split_at_checked(25) else {
        return;
    };
    let number = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().unwrap());
    let (leaf, first, second) = (u64::from(numbers[0] % LEAVES), number(1), number(9));
    let claimed: Vec<Hash> = rest.as_chunks::<32>().0.to_vec();
    let tree = tree();
    let root = tree.root();
    let size = tree.size();

    // What comes from outside, as it is.
    let hash = claimed.first().copied().unwrap_or_default();
    verify_inclusion(&hash, first, second, &claimed, &root);
    verify_consistency(first, &hash, second, &root, &claimed);
    if let Some(edge) = Frontier::from_peaks(first, claimed.clone()) {
        assert_eq!((edge.size(), edge.peaks()), (first, claimed.as_slice()));
        edge.root();
    }

    // Of this tree, nothing but what it says itself.
    let content = leaf_of(leaf);
    if verify_inclusion(&content, first, size, &claimed, &root) {
        assert_eq!(first, leaf);
        assert_eq!(tree.inclusion_proof(first, size), Some(claimed.clone()));
    }
    let old = second % (size + 1);
    let before = tree.root_at(old).unwrap();
    let (mut proof, mut earlier) = (tree.inclusion_proof(leaf, size).unwrap(), before);
    assert!(verify_inclusion(&content, leaf, size, &proof, &root));
    let mut way = tree.consistency_proof(old, size).unwrap();
    assert!(verify_consistency(old, &before, size, &root, &way));

    // The true ones, with the bits of the input flipped in them.
    if flip(&mut proof, rest) {
        assert!(!verify_inclusion(&content, leaf, size, &proof, &root));
    }
    if flip(std::slice::from_mut(&mut earlier), rest) {
        assert!(!verify_consistency(old, &earlier, size, &root, &way));
    }
    if flip(&mut way, rest) {
        assert!(!verify_consistency(old, &before, size, &root, &way));
    }
});

/// Whether anything changed.
fn flip(hashes: &mut [Hash], bits: &[u8]) -> bool {
    let targets = hashes.iter_mut().flatten();
    targets.zip(bits).fold(false, |changed, (byte, flip)| {
        *byte ^= flip;
        changed || *flip != 0
    })
}

fn leaf_of(number: u64) -> Hash {
    leaf_hash(&number.to_le_bytes())
}

fn tree() -> Tree {
    let mut tree = Tree::new();
    (0..u64::from(LEAVES)).for_each(|number| tree.push(leaf_of(number)));
    tree
}

/// No power of two, so that every shape of proof is met.
const LEAVES: u8 = 45;
