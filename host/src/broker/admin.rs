//! What an owner does with a store, beside what a broker reads from it.

use casemate_attest::broker::{ResourcePath, ResourceStore, StoreError};

/// A store as its owner sees it.
pub trait StoreAdmin: ResourceStore {
    /// Puts a secret at `path`, in the place of the one there was.
    fn put(&self, path: &ResourcePath, secret: &[u8]) -> Result<(), StoreError>;

    /// The paths, sorted. Never a secret.
    fn list(&self) -> Result<Vec<String>, StoreError>;

    /// Removes what is at `path`; whether there was anything.
    fn remove(&self, path: &ResourcePath) -> Result<bool, StoreError>;
}
