//! The tree on disk, in tiles of 256 hashes: <https://c2sp.org/tlog-tiles>.
//!
//! A tile at level `l` holds the roots of subtrees of `256^l` records. Tiles are never changed, so that proofs can be made
//! without the records, also for those that retention has removed. They are derived: what they say is not believed, but
//! verified against a signed root.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::merkle::{self, Frontier, Hash, Nodes};

/// A tree whose hashes are in a folder of tiles; only its right edge is in memory.
#[derive(Debug)]
pub struct TileTree {
    folder: PathBuf,
    frontier: Frontier,
    /// The incomplete tile at each level.
    edge: Vec<Vec<Hash>>,
    /// Complete tiles that are not in the folder yet.
    unwritten: Vec<(Tile, Vec<Hash>)>,
}

impl TileTree {
    /// An empty tree that will be kept in `folder`.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            frontier: Frontier::new(),
            edge: Vec::new(),
            unwritten: Vec::new(),
        }
    }

    /// The tree that has this right edge. Its incomplete tiles must be in `folder`, and give the same edge.
    pub fn load(folder: &Path, frontier: Frontier) -> Result<Self, TileError> {
        let mut tree = Self::new(folder);
        let mut hashes = frontier.size();
        let mut level = 0;
        while hashes > 0 {
            let (index, width) = (hashes / WIDTH, hashes % WIDTH);
            let tile = Tile { level, index };
            tree.edge.push(if width > 0 {
                read(&folder.join(tile.path(width)), width)?
            } else {
                Vec::new()
            });
            hashes = index;
            level += 1;
        }
        let size = frontier.size();
        tree.frontier = frontier;
        match tree.frontier_at(size)? {
            Some(found) if found == tree.frontier => Ok(tree),
            _ => Err(TileError::Damaged {
                path: folder.to_owned(),
            }),
        }
    }

    /// The right edge.
    pub fn frontier(&self) -> &Frontier {
        &self.frontier
    }

    /// The root.
    pub fn root(&self) -> Hash {
        self.frontier.root()
    }

    /// Appends the hash of a leaf. Complete tiles wait for [`TileTree::flush`].
    pub fn push(&mut self, leaf: Hash) {
        let mut index = self.frontier.size();
        self.frontier.push(leaf);
        let mut hash = leaf;
        for level in 0.. {
            if self.edge.len() == level {
                self.edge.push(Vec::new());
            }
            let Some(edge) = self.edge.get_mut(level) else {
                return;
            };
            edge.push(hash);
            index /= WIDTH;
            if edge.len() < WIDTH as usize {
                return;
            }
            let full = std::mem::take(edge);
            let Some(root) = merkle::complete_root(&full) else {
                return;
            };
            hash = root;
            self.unwritten.push((Tile { level, index }, full));
        }
    }

    /// Writes the complete tiles; not yet durable. What fails is tried again the next time.
    pub fn flush(&mut self) -> Result<(), TileError> {
        while let Some((tile, hashes)) = self.unwritten.first() {
            write(&self.folder.join(tile.path(WIDTH)), hashes)?;
            self.unwritten.remove(0);
        }
        Ok(())
    }

    /// Writes the incomplete tiles as well, and makes all of them durable.
    pub fn sync(&mut self) -> Result<(), TileError> {
        self.flush()?;
        for (tile, hashes) in self.incomplete() {
            write(&self.folder.join(tile.path(hashes.len() as u64)), hashes)?;
        }
        let synced = fs::create_dir_all(&self.folder)
            .and_then(|()| fs::File::open(&self.folder))
            .and_then(|folder| nix::unistd::syncfs(&folder).map_err(io::Error::from));
        synced.map_err(|source| TileError::Io {
            path: self.folder.clone(),
            source,
        })
    }

    /// Writes every tile of the tree to another folder, as a log that anybody can serve.
    pub fn export(&self, to: &Path) -> Result<(), TileError> {
        let mut hashes = self.frontier.size();
        let mut level = 0;
        while hashes > 0 {
            for index in 0..hashes / WIDTH {
                let tile = Tile { level, index };
                write(&to.join(tile.path(WIDTH)), &self.full(tile)?)?;
            }
            hashes /= WIDTH;
            level += 1;
        }
        for (tile, hashes) in self.incomplete() {
            write(&to.join(tile.path(hashes.len() as u64)), hashes)?;
        }
        Ok(())
    }

    fn incomplete(&self) -> impl Iterator<Item = (Tile, &[Hash])> {
        let size = self.frontier.size();
        let levels = self.edge.iter().enumerate();
        levels
            .filter(|(_, hashes)| !hashes.is_empty())
            .map(move |(level, hashes)| {
                let index = size >> (HEIGHT as usize * (level + 1));
                (Tile { level, index }, hashes.as_slice())
            })
    }

    fn full(&self, tile: Tile) -> Result<Vec<Hash>, TileError> {
        let waiting = self.unwritten.iter().find(|(other, _)| *other == tile);
        if let Some((_, hashes)) = waiting {
            return Ok(hashes.clone());
        }
        read(&self.folder.join(tile.path(WIDTH)), WIDTH)
    }
}

impl Nodes for TileTree {
    type Error = TileError;

    fn size(&self) -> u64 {
        self.frontier.size()
    }

    fn node(&self, level: u32, index: u64) -> Result<Hash, TileError> {
        let (tile_level, height) = ((level / HEIGHT) as usize, level % HEIGHT);
        let start = index << height;
        let tile = Tile {
            level: tile_level,
            index: start / WIDTH,
        };
        let (from, count) = ((start % WIDTH) as usize, 1usize << height);
        let pick = |hashes: &[Hash]| {
            hashes
                .get(from..from + count)
                .and_then(merkle::complete_root)
        };
        let edge = self.incomplete().find(|(other, _)| *other == tile);
        let found = match edge {
            Some((_, hashes)) => pick(hashes),
            None => pick(&self.full(tile)?),
        };
        found.ok_or_else(|| TileError::Damaged {
            path: self.folder.join(tile.path(WIDTH)),
        })
    }
}

/// A tile's place in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    level: usize,
    index: u64,
}

impl Tile {
    /// `tile/<L>/<N>` or, incomplete, `tile/<L>/<N>.p/<W>`.
    fn path(self, width: u64) -> String {
        let index = index_path(self.index);
        if width == WIDTH {
            format!("tile/{}/{index}", self.level)
        } else {
            format!("tile/{}/{index}.p/{width}", self.level)
        }
    }
}

/// A tile's index as tlog-tiles spells it: 1234067 is `x001/x234/067`.
pub fn index_path(index: u64) -> String {
    let mut path = format!("{:03}", index % 1000);
    let mut rest = index / 1000;
    while rest > 0 {
        path = format!("x{:03}/{path}", rest % 1000);
        rest /= 1000;
    }
    path
}

/// Writes entry bundles for records that are leaves from `first` on: each leaf behind its length in two bytes. Those of a
/// tile that is not complete, at either end, are left out at the beginning and written as a partial one at the end.
pub fn export_entries(to: &Path, first: u64, leaves: &[String]) -> Result<(), TileError> {
    let begin = first.next_multiple_of(WIDTH);
    let skip = usize::try_from(begin - first).unwrap_or(usize::MAX);
    let leaves = leaves.get(skip..).unwrap_or_default();
    for (index, chunk) in (begin / WIDTH..).zip(leaves.chunks(WIDTH as usize)) {
        let width = chunk.len() as u64;
        let mut path = to.join("tile/entries").join(index_path(index));
        if width < WIDTH {
            path.as_mut_os_string().push(format!(".p/{width}"));
        }
        let mut bytes = Vec::new();
        for leaf in chunk {
            let length = u16::try_from(leaf.len());
            let length = length.map_err(|_| TileError::Damaged { path: path.clone() })?;
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(leaf.as_bytes());
        }
        let parent = path.parent().unwrap_or(to);
        fs::create_dir_all(parent)
            .and_then(|()| fs::write(&path, bytes))
            .map_err(|source| TileError::Io {
                path: path.clone(),
                source,
            })?;
    }
    Ok(())
}

/// Why a tile could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TileError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The tile.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A tile does not hold what it must.
    #[error("{} is not the tile of this log; restore the folder of tiles from a copy", path.display())]
    Damaged {
        /// The tile, or the folder of all.
        path: PathBuf,
    },
}

fn read(path: &Path, width: u64) -> Result<Vec<Hash>, TileError> {
    let bytes = fs::read(path).map_err(|source| TileError::Io {
        path: path.to_owned(),
        source,
    })?;
    let (hashes, rest) = bytes.as_chunks::<32>();
    if hashes.len() as u64 != width || !rest.is_empty() {
        return Err(TileError::Damaged {
            path: path.to_owned(),
        });
    }
    Ok(hashes.to_vec())
}

/// Writes a tile unless it is there already; nobody ever sees half of one.
fn write(path: &Path, hashes: &[Hash]) -> Result<(), TileError> {
    let bytes = hashes.concat();
    let written = || -> io::Result<()> {
        if fs::read(path).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let fresh = path.with_extension("new");
        fs::write(&fresh, &bytes)?;
        fs::rename(&fresh, path)
    };
    written().map_err(|source| TileError::Io {
        path: path.to_owned(),
        source,
    })
}

/// Hashes in a tile.
pub const WIDTH: u64 = 256;
const HEIGHT: u32 = 8;

#[cfg(test)]
mod tests {
    use super::super::merkle::{Tree, leaf_hash, verify_consistency, verify_inclusion};
    use super::*;

    fn grown(folder: &Path, size: u64) -> (TileTree, Tree) {
        let (mut tiles, mut tree) = (TileTree::new(folder), Tree::new());
        for n in 0..size {
            let leaf = leaf_hash(&n.to_le_bytes());
            tiles.push(leaf);
            tree.push(leaf);
        }
        (tiles, tree)
    }

    #[test]
    fn paths_are_spelled_as_specified() {
        assert_eq!(index_path(0), "000");
        assert_eq!(index_path(1_234_067), "x001/x234/067");
        let tile = Tile {
            level: 1,
            index: 273,
        };
        assert_eq!(tile.path(5), "tile/1/273.p/5");
    }

    #[test]
    fn proofs_from_tiles_are_those_of_the_tree_in_memory() {
        let directory = tempfile::tempdir().unwrap();
        let (mut tiles, tree) = grown(directory.path(), 66_000);
        for round in 0..3 {
            for (index, size) in [
                (0, 1),
                (0, 66_000),
                (65_535, 65_536),
                (65_999, 66_000),
                (300, 70),
                (513, 1300),
            ] {
                let proof = Nodes::inclusion_proof(&tiles, index, size).unwrap();
                assert_eq!(proof, tree.inclusion_proof(index, size));
                if let Some(proof) = proof {
                    let root = tree.root_at(size).unwrap();
                    let leaf = leaf_hash(&index.to_le_bytes());
                    assert!(verify_inclusion(&leaf, index, size, &proof, &root));
                    let proof = Nodes::consistency_proof(&tiles, index, size)
                        .unwrap()
                        .unwrap();
                    let old = tree.root_at(index).unwrap();
                    assert!(verify_consistency(index, &old, size, &root, &proof));
                }
            }
            if round == 0 {
                tiles.sync().unwrap();
                assert!(directory.path().join("tile/0/257.p/208").exists());
                assert!(directory.path().join("tile/1/000").exists());
                assert!(directory.path().join("tile/2/000.p/1").exists());
            } else {
                tiles = TileTree::load(directory.path(), tiles.frontier().clone()).unwrap();
            }
        }
    }

    #[test]
    fn an_exported_log_is_complete() {
        let directory = tempfile::tempdir().unwrap();
        let (tiles, _) = grown(&directory.path().join("own"), 600);
        let to = directory.path().join("export");
        tiles.export(&to).unwrap();
        let leaves: Vec<String> = (0..600).map(|n| format!("leaf {n}")).collect();
        export_entries(&to, 0, &leaves).unwrap();
        for name in [
            "tile/0/000",
            "tile/0/001",
            "tile/0/002.p/88",
            "tile/1/000.p/2",
        ] {
            assert!(to.join(name).exists(), "{name}");
        }
        let entries = fs::read(to.join("tile/entries/002.p/88")).unwrap();
        assert!(entries.starts_with(b"\0\x08leaf 512\0\x08leaf 513"));
        let rest = directory.path().join("rest");
        export_entries(&rest, 100, &leaves[100..]).unwrap();
        assert!(!rest.join("tile/entries/000").exists());
        let same = fs::read(rest.join("tile/entries/001")).unwrap();
        assert_eq!(same, fs::read(to.join("tile/entries/001")).unwrap());
    }

    #[test]
    fn a_tree_goes_on_from_its_tiles_and_not_from_wrong_ones() {
        let directory = tempfile::tempdir().unwrap();
        let (mut tiles, _) = grown(directory.path(), 700);
        tiles.sync().unwrap();
        let mut again = TileTree::load(directory.path(), tiles.frontier().clone()).unwrap();
        for n in 700..1000u64 {
            again.push(leaf_hash(&n.to_le_bytes()));
        }
        assert_eq!(again.root(), grown(directory.path(), 1000).1.root());
        let partial = directory.path().join("tile/0/002.p/188");
        let mut bytes = fs::read(&partial).unwrap();
        bytes[0] ^= 1;
        fs::write(&partial, &bytes).unwrap();
        let damaged = TileTree::load(directory.path(), tiles.frontier().clone());
        assert!(matches!(damaged, Err(TileError::Damaged { .. })));
        fs::write(&partial, &bytes[1..]).unwrap();
        assert!(TileTree::load(directory.path(), tiles.frontier().clone()).is_err());
    }
}
