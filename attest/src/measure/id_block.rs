//! ID blocks: the owner's signed word, checked by firmware before a guest may run, on what its
//! launch digest and policy must be. Publication 56860, SNP_LAUNCH_FINISH.
//!
//! The host hands firmware an [`IdBlock`] and an [`IdAuth`] page with the signatures over it. A
//! report then carries the digests of the keys ([`IdKeys`]), so whoever trusts a key need not
//! know every launch digest. Blocks and pages may come from anybody; a parsed [`IdAuth`] says
//! nothing until [`IdAuth::verify`] has.

mod key;

pub use key::{IdKeyDigest, IdKeyError, IdPublicKey, IdSigningKey};

use super::snp::{SNP_DIGEST_LEN, SnpLaunchDigest};
use crate::bytes;
use crate::report::SnpPolicy;

/// The length of an ID block, in bytes.
pub const ID_BLOCK_LEN: usize = 0x60;
/// The length of an ID authentication page, in bytes.
pub const ID_AUTH_LEN: usize = 0x1000;

/// What an owner says of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdBlock {
    /// The launch digest the guest must have.
    pub launch_digest: SnpLaunchDigest,
    /// The owner's name for a family of guests.
    pub family_id: [u8; 16],
    /// The owner's name for an image of that family.
    pub image_id: [u8; 16],
    /// The image's security version.
    pub guest_svn: u32,
    /// The policy the guest must be launched with.
    pub policy: SnpPolicy,
}

/// The signatures over an ID block, and the keys they were made with.
#[derive(Clone, PartialEq, Eq)]
pub struct IdAuth {
    raw: Box<[u8; ID_AUTH_LEN]>,
    id_key: IdPublicKey,
    author_key: Option<IdPublicKey>,
}

/// The keys that stand behind an ID block, as a report will name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdKeys {
    /// Signed the block.
    pub id_key: IdKeyDigest,
    /// Signed the ID key; `None` where nobody did.
    pub author_key: Option<IdKeyDigest>,
}

/// Why an ID block or its authentication is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdBlockError {
    /// Not the length of an ID block.
    #[error("an ID block has {ID_BLOCK_LEN} bytes, this has {0}")]
    BlockLength(usize),
    /// Not a version that is known.
    #[error("ID block version {0} is not known; 1 is")]
    Version(u32),
    /// Not the length of an authentication page.
    #[error("an ID authentication page has {ID_AUTH_LEN} bytes, this has {0}")]
    AuthLength(usize),
    /// An algorithm that is not known.
    #[error("{which} key algorithm {found} is not ECDSA P-384 with SHA-384 (1)")]
    Algorithm {
        /// `ID` or `author`.
        which: &'static str,
        /// Its number.
        found: u32,
    },
    /// A key is malformed.
    #[error("the {which} key: {source}")]
    Key {
        /// `ID` or `author`.
        which: &'static str,
        /// Why.
        source: IdKeyError,
    },
    /// Bytes that should be zero are not.
    #[error("byte {0:#x} of the ID authentication page is reserved and should be zero")]
    Reserved(usize),
    /// The block is not what the ID key signed.
    #[error("the ID key did not sign this ID block")]
    BlockSignature,
    /// The author key did not sign the ID key.
    #[error("the author key did not sign this ID key")]
    KeySignature,
    /// The operating system gave no randomness.
    #[error("no randomness for a signature")]
    Randomness,
}

impl IdBlock {
    /// Reads exactly one ID block.
    pub fn parse(raw: &[u8]) -> Result<Self, IdBlockError> {
        let wrong = || IdBlockError::BlockLength(raw.len());
        let whole: &[u8; ID_BLOCK_LEN] = raw.try_into().map_err(|_| wrong())?;
        let version = bytes::le32(whole, VERSION_AT).ok_or_else(wrong)?;
        if version != ID_BLOCK_VERSION {
            return Err(IdBlockError::Version(version));
        }
        let digest = bytes::array(whole, 0).ok_or_else(wrong)?;
        let policy = bytes::array(whole, POLICY_AT).ok_or_else(wrong)?;
        Ok(Self {
            launch_digest: SnpLaunchDigest::new(digest),
            family_id: bytes::array(whole, SNP_DIGEST_LEN).ok_or_else(wrong)?,
            image_id: bytes::array(whole, IMAGE_ID_AT).ok_or_else(wrong)?,
            guest_svn: bytes::le32(whole, GUEST_SVN_AT).ok_or_else(wrong)?,
            policy: SnpPolicy(u64::from_le_bytes(policy)),
        })
    }

    /// The block as firmware takes it.
    pub fn to_bytes(&self) -> [u8; ID_BLOCK_LEN] {
        let mut raw = [0; ID_BLOCK_LEN];
        let fields = self.launch_digest.as_bytes().iter().copied();
        let fields = fields
            .chain(self.family_id)
            .chain(self.image_id)
            .chain(ID_BLOCK_VERSION.to_le_bytes())
            .chain(self.guest_svn.to_le_bytes())
            .chain(self.policy.0.to_le_bytes());
        for (to, from) in raw.iter_mut().zip(fields) {
            *to = from;
        }
        raw
    }
}

impl IdAuth {
    /// Signs `block` with `id_key`, and `id_key` with `author_key` where there is one. The author
    /// key stays the same for years; the ID key may be a product's or a release's.
    pub fn sign(
        block: &IdBlock,
        id_key: &IdSigningKey,
        author_key: Option<&IdSigningKey>,
    ) -> Result<Self, IdBlockError> {
        let mut raw = Box::new([0; ID_AUTH_LEN]);
        let randomness = |_| IdBlockError::Randomness;
        let public = id_key.public();
        let signature = id_key.sign(&block.to_bytes()).map_err(randomness)?;
        put(&mut raw, ID_ALGORITHM_AT, &ECDSA_P384_SHA384.to_le_bytes());
        put(&mut raw, ID_SIGNATURE_AT, &signature);
        put(&mut raw, ID_KEY_AT, &public.to_bytes());
        if let Some(author) = author_key {
            let signature = author.sign(&public.to_bytes()).map_err(randomness)?;
            let algorithm = ECDSA_P384_SHA384.to_le_bytes();
            put(&mut raw, AUTHOR_ALGORITHM_AT, &algorithm);
            put(&mut raw, KEY_SIGNATURE_AT, &signature);
            put(&mut raw, AUTHOR_KEY_AT, &author.public().to_bytes());
        }
        Ok(Self {
            raw,
            id_key: public,
            author_key: author_key.map(IdSigningKey::public),
        })
    }

    /// Reads exactly one authentication page. An author's part of all zeros is no author.
    pub fn parse(raw: &[u8]) -> Result<Self, IdBlockError> {
        let wrong = || IdBlockError::AuthLength(raw.len());
        let page: [u8; ID_AUTH_LEN] = raw.try_into().map_err(|_| wrong())?;
        let field = |at| bytes::le32(&page, at).ok_or_else(wrong);
        let (id, author) = (field(ID_ALGORITHM_AT)?, field(AUTHOR_ALGORITHM_AT)?);
        let known = |which, found| match found {
            ECDSA_P384_SHA384 => Ok(()),
            found => Err(IdBlockError::Algorithm { which, found }),
        };
        known("ID", id)?;
        let reserved = RESERVED.iter().flat_map(|(from, to)| *from..*to);
        for at in reserved {
            if page.get(at) != Some(&0) {
                return Err(IdBlockError::Reserved(at));
            }
        }
        let key = |which, at: usize| {
            let raw = page.get(at..at + KEY_LEN).unwrap_or_default();
            IdPublicKey::parse(raw).map_err(|source| IdBlockError::Key { which, source })
        };
        let author_part = [
            page.get(KEY_SIGNATURE_AT..KEY_SIGNATURE_AT + SIGNATURE_LEN),
            page.get(AUTHOR_KEY_AT..AUTHOR_KEY_AT + KEY_LEN),
        ];
        let mut author_bytes = author_part.into_iter().flatten().flatten();
        let author_key = if author == 0 && author_bytes.all(|byte| *byte == 0) {
            None
        } else {
            known("author", author)?;
            Some(key("author", AUTHOR_KEY_AT)?)
        };
        Ok(Self {
            id_key: key("ID", ID_KEY_AT)?,
            author_key,
            raw: Box::new(page),
        })
    }

    /// Checks both signatures as firmware will. Whether the keys are anybody's is the caller's
    /// question.
    pub fn verify(&self, block: &IdBlock) -> Result<IdKeys, IdBlockError> {
        let signature = |at: usize| self.raw.get(at..at + SIGNATURE_LEN).unwrap_or_default();
        if !self
            .id_key
            .verifies(&block.to_bytes(), signature(ID_SIGNATURE_AT))
        {
            return Err(IdBlockError::BlockSignature);
        }
        if let Some(author) = &self.author_key
            && !author.verifies(&self.id_key.to_bytes(), signature(KEY_SIGNATURE_AT))
        {
            return Err(IdBlockError::KeySignature);
        }
        Ok(self.claimed_keys())
    }

    /// The page as firmware takes it.
    pub fn as_bytes(&self) -> &[u8; ID_AUTH_LEN] {
        &self.raw
    }

    /// The keys in the page, whether or not they signed anything.
    pub fn claimed_keys(&self) -> IdKeys {
        IdKeys {
            id_key: self.id_key.digest(),
            author_key: self.author_key.as_ref().map(IdPublicKey::digest),
        }
    }
}

impl std::fmt::Debug for IdAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IdAuth({:?})", self.claimed_keys())
    }
}

/// Fields lie within the page by construction.
fn put(raw: &mut [u8; ID_AUTH_LEN], at: usize, bytes: &[u8]) {
    for (to, from) in raw.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

const ID_BLOCK_VERSION: u32 = 1;
const IMAGE_ID_AT: usize = 0x40;
const VERSION_AT: usize = 0x50;
const GUEST_SVN_AT: usize = 0x54;
const POLICY_AT: usize = 0x58;

const ECDSA_P384_SHA384: u32 = 1;
const SIGNATURE_LEN: usize = 0x200;
const KEY_LEN: usize = 0x404;
const ID_ALGORITHM_AT: usize = 0;
const AUTHOR_ALGORITHM_AT: usize = 4;
const ID_SIGNATURE_AT: usize = 0x40;
const ID_KEY_AT: usize = 0x240;
const KEY_SIGNATURE_AT: usize = 0x680;
const AUTHOR_KEY_AT: usize = 0x880;
const RESERVED: [(usize, usize); 3] = [(8, 0x40), (0x644, 0x680), (0xc84, ID_AUTH_LEN)];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    fn block() -> IdBlock {
        IdBlock {
            launch_digest: SnpLaunchDigest::new([1; 48]),
            family_id: [2; 16],
            image_id: [3; 16],
            guest_svn: 4,
            policy: SnpPolicy(0x3_0000),
        }
    }

    fn key() -> IdSigningKey {
        IdSigningKey::from_pkcs8(&IdSigningKey::generate().unwrap()).unwrap()
    }

    static SIGNED: LazyLock<IdAuth> =
        LazyLock::new(|| IdAuth::sign(&block(), &key(), Some(&key())).unwrap());

    #[test]
    fn a_block_has_its_fields_in_their_places() {
        let raw = block().to_bytes();
        assert_eq!(raw[0x30..0x40], [2; 16]);
        assert_eq!(
            raw[0x50..0x60],
            [1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0]
        );
        assert_eq!(IdBlock::parse(&raw), Ok(block()));
        assert_eq!(
            IdBlock::parse(&raw[1..]),
            Err(IdBlockError::BlockLength(95))
        );
        let mut other = raw;
        other[0x50] = 2;
        assert_eq!(IdBlock::parse(&other), Err(IdBlockError::Version(2)));
    }

    #[test]
    fn what_was_signed_verifies_and_names_its_keys() {
        let (id, author) = (key(), key());
        for author in [Some(&author), None] {
            let auth = IdAuth::sign(&block(), &id, author).unwrap();
            let read = IdAuth::parse(auth.as_bytes()).unwrap();
            assert_eq!(read, auth);
            let keys = read.verify(&block()).unwrap();
            assert_eq!(keys.id_key, id.public().digest());
            assert_eq!(keys.author_key, author.map(|key| key.public().digest()));
        }
    }

    #[test]
    fn every_field_of_the_block_is_signed() {
        for at in [0, 0x30, 0x40, 0x54, 0x58, 0x5f] {
            let mut raw = block().to_bytes();
            raw[at] ^= 1;
            let other = IdBlock::parse(&raw).unwrap();
            assert_eq!(SIGNED.verify(&other), Err(IdBlockError::BlockSignature));
        }
    }

    #[test]
    fn swapped_keys_and_signatures_are_refused() {
        let other = IdAuth::sign(&block(), &key(), Some(&key())).unwrap();
        let mix = |at: usize, len: usize| {
            let mut raw = *SIGNED.as_bytes();
            raw[at..at + len].copy_from_slice(&other.as_bytes()[at..at + len]);
            IdAuth::parse(&raw).unwrap().verify(&block())
        };
        use IdBlockError::{BlockSignature, KeySignature};
        assert_eq!(mix(ID_SIGNATURE_AT, SIGNATURE_LEN), Err(BlockSignature));
        assert_eq!(mix(ID_KEY_AT, KEY_LEN), Err(BlockSignature));
        assert_eq!(mix(KEY_SIGNATURE_AT, SIGNATURE_LEN), Err(KeySignature));
        assert_eq!(mix(AUTHOR_KEY_AT, KEY_LEN), Err(KeySignature));
        // Both the block's signature and its key, but not the author's word for that key.
        let raw = *SIGNED.as_bytes();
        let mut mixed = raw;
        mixed[ID_SIGNATURE_AT..KEY_SIGNATURE_AT]
            .copy_from_slice(&other.as_bytes()[ID_SIGNATURE_AT..KEY_SIGNATURE_AT]);
        let mixed = IdAuth::parse(&mixed).unwrap();
        assert_eq!(mixed.verify(&block()), Err(KeySignature));
    }

    #[test]
    fn malformed_pages_are_refused() {
        let changed = |at: usize, byte: u8| {
            let mut raw = *SIGNED.as_bytes();
            raw[at] = byte;
            IdAuth::parse(&raw)
        };
        let algorithm = |which, found| Err(IdBlockError::Algorithm { which, found });
        assert_eq!(changed(0, 2), algorithm("ID", 2));
        assert_eq!(changed(4, 0), algorithm("author", 0));
        for at in [8, 0x3f, 0x644, 0x67f, 0xc84, 0xfff] {
            assert_eq!(changed(at, 1), Err(IdBlockError::Reserved(at)));
        }
        for at in [
            ID_KEY_AT,
            ID_KEY_AT + 4 + 48,
            ID_KEY_AT + 4 + 72 + 48,
            ID_KEY_AT + 0x94,
        ] {
            assert!(
                matches!(changed(at, 1), Err(IdBlockError::Key { .. })),
                "{at:#x}"
            );
        }
        for len in [0, ID_AUTH_LEN - 1] {
            let raw = &SIGNED.as_bytes()[..len];
            assert_eq!(IdAuth::parse(raw), Err(IdBlockError::AuthLength(len)));
        }
        // A signature's tail is not part of a number, so nothing may hide there.
        let mut raw = *SIGNED.as_bytes();
        raw[ID_SIGNATURE_AT + 0x1ff] = 1;
        let read = IdAuth::parse(&raw).unwrap();
        assert_eq!(read.verify(&block()), Err(IdBlockError::BlockSignature));
    }

    #[test]
    fn the_sev_crate_s_page_verifies() {
        let page = include_bytes!("../../tests/vectors/measurement/test_auth_block.bin");
        let block = IdBlock {
            launch_digest: "a14d638341e5674628fe1e02fbedebe5e5ab4faf1dd72d8966068e615bb99efd13d214b35c231715b38e263dc6059745".parse().unwrap(),
            family_id: [0; 16],
            image_id: [0; 16],
            guest_svn: 0,
            policy: SnpPolicy(0x3_0000),
        };
        let keys = IdAuth::parse(page).unwrap().verify(&block).unwrap();
        assert_eq!(
            keys.id_key.to_string(),
            "59fb2c686dfa4fef49f38339aa775c90051c28d57383ddc3baf3b5eb4b1496df3b0dbbdcbae5fe27677a644820773fe2"
        );
        let author = keys.author_key.unwrap().to_string();
        assert_eq!(
            author,
            "eed81169fb0cb5e0ec34794f128fd4e0c4a46f67c65a1adfa81fcb24bcc088c272369b7ffc3eb2b6af6a4284a1b36c5f"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_page_or_a_refusal(damages in prop::collection::vec((0..ID_AUTH_LEN, any::<u8>()), 0..6)) {
            let mut raw = *SIGNED.as_bytes();
            for (at, byte) in damages {
                raw[at] = byte;
            }
            if let Ok(auth) = IdAuth::parse(&raw) {
                let valid = auth.verify(&block()).is_ok();
                prop_assert_eq!(valid, auth == *SIGNED);
            }
        }
    }
}
