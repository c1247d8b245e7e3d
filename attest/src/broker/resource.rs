//! What a guest can ask for, and where it is kept.

use std::fmt;
use std::str::FromStr;
use zeroize::Zeroizing;

/// The path of a resource: `repository/type/tag`.
///
/// Each part is 1 to 64 of `A–Z a–z 0–9 . _ -` and does not begin with a dot, so that a path can
/// name a file or a URL and nothing outside.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourcePath(String);

/// Why a text is no resource path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a resource is named repository/type/tag, each 1 to 64 of A-Z a-z 0-9 . _ - without a leading dot"
)]
pub struct PathError;

/// Where secrets are kept.
pub trait ResourceStore: Send + Sync {
    /// The secret at `path`, `None` where there is none.
    fn get(&self, path: &ResourcePath) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError>;
}

/// The store did not answer. Its text goes to the log, never to a guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the resource store failed: {0}")]
pub struct StoreError(pub String);

impl ResourcePath {
    /// `repository/type/tag`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ResourcePath {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        let parts: Vec<&str> = text.split('/').take(PARTS + 1).collect();
        if parts.len() == PARTS && parts.iter().all(|part| is_part(part)) {
            Ok(Self(text.to_owned()))
        } else {
            Err(PathError)
        }
    }
}

impl fmt::Display for ResourcePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_part(part: &str) -> bool {
    (1..=MAX_PART_LEN).contains(&part.len())
        && !part.starts_with('.')
        && part
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

const PARTS: usize = 3;
const MAX_PART_LEN: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_one_resource_and_nothing_outside() {
        for good in ["default/key/1", "a.b/c_d/e-f", "R/T/t.v1"] {
            assert_eq!(good.parse::<ResourcePath>().unwrap().as_str(), good);
        }
        let long = format!("a/b/{}", "c".repeat(65));
        for bad in [
            "",
            "a",
            "a/b",
            "a/b/c/d",
            "a//c",
            "../b/c",
            "a/../c",
            "a/b/.hidden",
            "a/b/c%2fd",
            "a/b/c d",
            "a/b/c\0",
            "/a/b/c",
            "ä/b/c",
            &long,
        ] {
            assert!(bad.parse::<ResourcePath>().is_err(), "{bad:?}");
        }
    }
}
