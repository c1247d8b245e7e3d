//! The SEV launch digest: SHA-256 over all bytes given to LAUNCH_UPDATE_DATA, in call order.

use ring::digest;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An SEV launch digest, shown and serialised as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LaunchDigest([u8; 32]);

/// Computes a [`LaunchDigest`] piece by piece.
#[derive(Clone)]
pub struct LaunchDigester(digest::Context);

/// Why a text is no launch digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an SEV launch digest; 64 hex digits are")]
pub struct DigestError(String);

impl LaunchDigest {
    /// A digest from its bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest of one piece.
    pub fn of(data: &[u8]) -> Self {
        let mut digester = LaunchDigester::new();
        digester.update(data);
        digester.finish()
    }

    /// The digest's bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl LaunchDigester {
    /// Nothing loaded yet.
    pub fn new() -> Self {
        Self(digest::Context::new(&digest::SHA256))
    }

    /// Adds what one LAUNCH_UPDATE_DATA call loads. How bytes are split into calls does not
    /// count, their order does.
    pub fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// The digest of everything added.
    pub fn finish(self) -> LaunchDigest {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.0.finish().as_ref());
        LaunchDigest(bytes)
    }
}

impl Default for LaunchDigester {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for LaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for LaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LaunchDigest({self})")
    }
}

impl FromStr for LaunchDigest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| DigestError(text.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for LaunchDigest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<LaunchDigest> for String {
    fn from(digest: LaunchDigest) -> Self {
        digest.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_counts_and_splitting_does_not() {
        let mut split = LaunchDigester::new();
        split.update(b"ker");
        split.update(b"nelinitrd");
        assert_eq!(split.finish(), LaunchDigest::of(b"kernelinitrd"));
        assert_ne!(
            LaunchDigest::of(b"kernelinitrd"),
            LaunchDigest::of(b"initrdkernel")
        );
        assert_eq!(
            LaunchDigester::new().finish().to_string(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn digests_are_written_in_hex() {
        let digest = LaunchDigest::of(b"x");
        let json = serde_json::to_string(&digest).unwrap();
        assert_eq!(json, format!("\"{digest}\""));
        assert_eq!(serde_json::from_str::<LaunchDigest>(&json).unwrap(), digest);
        assert!("e3b0".parse::<LaunchDigest>().is_err());
    }
}
