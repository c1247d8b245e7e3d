//! Signed notes and checkpoints: <https://c2sp.org/signed-note>, <https://c2sp.org/tlog-checkpoint>.
//!
//! A note's text is not believed before a signature by a known key has verified.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};

use super::merkle::Hash;

/// A log's signing key and its name.
pub struct Signer {
    key: VerifyingKey,
    pair: Ed25519KeyPair,
}

impl Signer {
    /// A key from an Ed25519 PKCS#8 document (version 1 or 2). Keep the document in a file of mode 0600.
    pub fn from_pkcs8(name: &str, pkcs8: &[u8]) -> Result<Self, NoteError> {
        let pair =
            Ed25519KeyPair::from_pkcs8_maybe_unchecked(pkcs8).map_err(|_| NoteError::BadKey)?;
        Self::new(name, pair)
    }

    #[cfg(test)]
    pub(super) fn from_seed(name: &str, seed: &[u8]) -> Result<Self, NoteError> {
        Self::new(
            name,
            Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| NoteError::BadKey)?,
        )
    }

    fn new(name: &str, pair: Ed25519KeyPair) -> Result<Self, NoteError> {
        let public = pair
            .public_key()
            .as_ref()
            .try_into()
            .map_err(|_| NoteError::BadKey)?;
        Ok(Self {
            key: VerifyingKey::new(name, public)?,
            pair,
        })
    }

    /// The key's name; also the origin of the log it signs.
    pub fn name(&self) -> &str {
        &self.key.name
    }

    /// The public half.
    pub fn verifying_key(&self) -> VerifyingKey {
        self.key.clone()
    }

    /// A note of `text` (which must end in a line feed) with this key's signature.
    pub fn sign(&self, text: &str) -> Result<String, NoteError> {
        if !text.ends_with('\n') || has_control(text) {
            return Err(NoteError::Malformed(
                "a note's text ends in a line feed and has no other control character",
            ));
        }
        let signature = self.pair.sign(text.as_bytes());
        let blob = [&self.key.id[..], signature.as_ref()].concat();
        Ok(format!(
            "{text}\n{DASH}{} {}\n",
            self.key.name,
            BASE64.encode(blob)
        ))
    }
}

/// A log's public key: `name+hash+base64`, as the Go implementation writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyingKey {
    name: String,
    id: [u8; 4],
    public: [u8; 32],
}

impl VerifyingKey {
    /// The key of this name with these 32 bytes (RFC 8032).
    pub fn new(name: &str, public: [u8; 32]) -> Result<Self, NoteError> {
        check_name(name)?;
        Ok(Self {
            name: name.to_owned(),
            id: key_id(name, TYPE_ED25519, &public),
            public,
        })
    }

    /// The key's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The text of a note that this key has signed. Signatures by other keys are ignored, a bad one by this key is not.
    pub fn open<'note>(&self, note: &'note str) -> Result<&'note str, NoteError> {
        let note = Note::parse(note)?;
        let mut signed = false;
        for signature in &note.signatures {
            if signature.name == self.name && signature.id == self.id {
                let key = UnparsedPublicKey::new(&ED25519, &self.public);
                key.verify(note.text.as_bytes(), &signature.bytes)
                    .map_err(|_| NoteError::BadSignature)?;
                signed = true;
            }
        }
        if signed {
            Ok(note.text)
        } else {
            Err(NoteError::NotSigned)
        }
    }

    /// Whether a note claims to be signed by this key; the signature is not looked at.
    pub(super) fn signs(&self, note: &str) -> Result<bool, NoteError> {
        let note = Note::parse(note)?;
        let mut signatures = note.signatures.iter();
        Ok(signatures.any(|s| s.name == self.name && s.id == self.id))
    }

    /// The key's id, as it stands in signatures.
    pub fn id(&self) -> [u8; 4] {
        self.id
    }
}

/// A note taken apart; nothing in it is believed.
pub(super) struct Note<'note> {
    pub(super) text: &'note str,
    pub(super) signatures: Vec<Signature<'note>>,
}

/// One line under a note.
pub(super) struct Signature<'note> {
    pub(super) name: &'note str,
    pub(super) id: [u8; 4],
    /// What follows the key id.
    pub(super) bytes: Vec<u8>,
    pub(super) line: &'note str,
}

impl<'note> Note<'note> {
    pub(super) fn parse(note: &'note str) -> Result<Self, NoteError> {
        if note.len() > MAX_NOTE {
            return Err(NoteError::Malformed("larger than 64 KiB"));
        }
        if has_control(note) {
            return Err(NoteError::Malformed("control characters"));
        }
        let Some(split) = note.rfind("\n\n") else {
            return Err(NoteError::Malformed("no blank line before signatures"));
        };
        let (text, lines) = (note.get(..=split), note.get(split + 2..));
        let (Some(text), Some(lines)) = (text, lines.filter(|lines| lines.ends_with('\n'))) else {
            return Err(NoteError::Malformed("the last line does not end"));
        };
        let signatures = lines
            .lines()
            .map(signature_line)
            .collect::<Result<_, _>>()?;
        Ok(Self { text, signatures })
    }
}

impl fmt::Display for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&key_text(&self.name, self.id, TYPE_ED25519, &self.public))
    }
}

impl FromStr for VerifyingKey {
    type Err = NoteError;

    fn from_str(text: &str) -> Result<Self, NoteError> {
        let (name, public) = key_parts(text, TYPE_ED25519)?;
        let key = Self::new(name, public)?;
        // The hash in the text must be the right one, in its one spelling.
        if key.to_string() == text {
            Ok(key)
        } else {
            Err(NoteError::BadKey)
        }
    }
}

/// A C2SP verifier key: name, key hash, and type with public key in base64.
pub(super) fn key_text(name: &str, id: [u8; 4], kind: u8, public: &[u8; 32]) -> String {
    let encoded = BASE64.encode([&[kind][..], public].concat());
    format!("{name}+{}+{encoded}", hex::encode(id))
}

/// Name and public key of a text that [`key_text`] may have written. Its hash is not looked at: compare what the
/// key is written as.
pub(super) fn key_parts(text: &str, kind: u8) -> Result<(&str, [u8; 32]), NoteError> {
    let mut parts = text.splitn(3, '+');
    let (Some(name), Some(_), Some(encoded)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(NoteError::BadKey);
    };
    let bytes = BASE64.decode(encoded).map_err(|_| NoteError::BadKey)?;
    match bytes.split_first() {
        Some((found, public)) if *found == kind => {
            let public = public.try_into().map_err(|_| NoteError::BadKey)?;
            Ok((name, public))
        }
        _ => Err(NoteError::BadKey),
    }
}

/// A tree's size and root under a log's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The log.
    pub origin: String,
    /// The number of records.
    pub size: u64,
    /// The root of the tree of these.
    pub root: Hash,
}

impl Checkpoint {
    /// The text that is signed.
    pub fn to_text(&self) -> String {
        format!(
            "{}\n{}\n{}\n",
            self.origin,
            self.size,
            BASE64.encode(self.root)
        )
    }

    /// The checkpoint in a signed note, verified; the origin must be the key's name. Extension lines are ignored.
    pub fn open(note: &str, key: &VerifyingKey) -> Result<Self, NoteError> {
        let checkpoint = Self::from_text(key.open(note)?)?;
        if checkpoint.origin == key.name {
            Ok(checkpoint)
        } else {
            Err(NoteError::WrongOrigin {
                found: checkpoint.origin,
            })
        }
    }

    /// What a note says, before any signature has been looked at.
    pub fn unverified(note: &str) -> Result<Self, NoteError> {
        Self::from_text(Note::parse(note)?.text)
    }

    fn from_text(text: &str) -> Result<Self, NoteError> {
        let mut lines = text.lines();
        let (Some(origin), Some(size), Some(root)) = (lines.next(), lines.next(), lines.next())
        else {
            return Err(NoteError::Malformed("a checkpoint has three lines"));
        };
        let number: u64 = size
            .parse()
            .map_err(|_| NoteError::Malformed("the tree size is no number"))?;
        if number.to_string() != size {
            return Err(NoteError::Malformed("the tree size has leading zeroes"));
        }
        let root = BASE64
            .decode(root)
            .ok()
            .and_then(|bytes| Hash::try_from(bytes).ok());
        let root = root.ok_or(NoteError::Malformed(
            "the root is not the base64 of 32 bytes",
        ))?;
        Ok(Self {
            origin: origin.to_owned(),
            size: number,
            root,
        })
    }
}

/// Why a note, a key or a checkpoint was not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoteError {
    /// Not a key.
    #[error("not an Ed25519 key; private keys are PKCS#8, public ones `name+hash+base64`")]
    BadKey,
    /// Not a key name.
    #[error("not a key name; it may not be empty or have spaces, `+` or control characters")]
    BadName,
    /// Not a note, or not a checkpoint.
    #[error("malformed note: {0}")]
    Malformed(&'static str),
    /// The key's signature is wrong.
    #[error("the signature is wrong")]
    BadSignature,
    /// There is no signature by the key.
    #[error("not signed by the given key")]
    NotSigned,
    /// The checkpoint is of another log.
    #[error("a checkpoint of the log `{found}`, not of the key's")]
    WrongOrigin {
        /// The origin found.
        found: String,
    },
    /// Fewer witnesses than wanted have co-signed.
    #[error(
        "{found} of the {wanted} wanted witnesses have co-signed; hand them the checkpoint, or lower the threshold"
    )]
    TooFewWitnesses {
        /// How many have.
        found: usize,
        /// How many must.
        wanted: usize,
    },
    /// The checkpoint is over another tree.
    #[error("the checkpoint is over another tree than the records give")]
    WrongTree,
}

pub(super) const DASH: &str = "\u{2014} ";
const TYPE_ED25519: u8 = 1;
const MAX_NOTE: usize = 64 << 10;

pub(super) fn check_name(name: &str) -> Result<(), NoteError> {
    let bad = |c: char| c.is_whitespace() || c == '+' || c.is_control();
    if name.is_empty() || name.chars().any(bad) {
        return Err(NoteError::BadName);
    }
    Ok(())
}

pub(super) fn key_id(name: &str, kind: u8, public: &[u8; 32]) -> [u8; 4] {
    let input = [name.as_bytes(), &[b'\n', kind], public].concat();
    let digest = ring::digest::digest(&ring::digest::SHA256, &input);
    digest.as_ref().first_chunk().copied().unwrap_or_default()
}

fn signature_line(line: &str) -> Result<Signature<'_>, NoteError> {
    let malformed = NoteError::Malformed("a signature line is not `— name base64`");
    let Some((name, encoded)) = line
        .strip_prefix(DASH)
        .and_then(|rest| rest.split_once(' '))
    else {
        return Err(malformed);
    };
    let blob = BASE64.decode(encoded).map_err(|_| malformed)?;
    let Some((id, bytes)) = blob.split_first_chunk::<4>() else {
        return Err(NoteError::Malformed("a signature without key id"));
    };
    Ok(Signature {
        name,
        id: *id,
        bytes: bytes.to_vec(),
        line,
    })
}

fn has_control(text: &str) -> bool {
    text.bytes().any(|b| b < b' ' && b != b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of golang.org/x/mod/sumdb/note, which defined the format.
    const SECRET: &str = "YEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz";
    const KEY: &str = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
    const TEXT: &str = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n";
    const SIGNATURE: &str = "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n";

    #[test]
    fn the_reference_example_is_reproduced() {
        let seed = &BASE64.decode(format!("A{SECRET}")).unwrap()[1..];
        let signer = Signer::from_seed("PeterNeumann", seed).unwrap();
        assert_eq!(signer.verifying_key().to_string(), KEY);
        let note = signer.sign(TEXT).unwrap();
        assert_eq!(note, format!("{TEXT}\n{SIGNATURE}"));
        assert_eq!(KEY.parse::<VerifyingKey>().unwrap().open(&note), Ok(TEXT));
    }

    #[test]
    fn other_signatures_are_ignored_and_bad_ones_refused() {
        let key: VerifyingKey = KEY.parse().unwrap();
        let other = Signer::from_seed("other", &[7; 32]).unwrap();
        let by_other = other.sign(TEXT).unwrap();
        assert_eq!(key.open(&by_other), Err(NoteError::NotSigned));
        assert_eq!(key.open(&format!("{by_other}{SIGNATURE}")), Ok(TEXT));
        let changed = format!("{TEXT}\n{SIGNATURE}").replace("answer", "Answer");
        assert_eq!(key.open(&changed), Err(NoteError::BadSignature));
        let namesake = Signer::from_seed("PeterNeumann", &[7; 32]).unwrap();
        assert_eq!(
            key.open(&namesake.sign(TEXT).unwrap()),
            Err(NoteError::NotSigned)
        );
    }

    #[test]
    fn malformed_notes_are_refused() {
        let key: VerifyingKey = KEY.parse().unwrap();
        let good = format!("{TEXT}\n{SIGNATURE}");
        for bad in [
            TEXT.to_owned(),
            good.trim_end().to_owned(),
            good.replace("— ", "- "),
            good.replace("problem", "prob\tlem"),
            format!("{good}\n"),
            format!("{TEXT}\n— PeterNeumann AAA=\n"),
            String::new(),
        ] {
            assert!(
                matches!(key.open(&bad), Err(NoteError::Malformed(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn keys_and_names_are_strict() {
        for bad in [
            "",
            "a",
            "a+b",
            &KEY.replace("c74f", "c74e"),
            &KEY.replace("c74f", "C74F"),
            &KEY.replace("+AR", "+BR"),
            &KEY[..40],
        ] {
            assert!(bad.parse::<VerifyingKey>().is_err(), "{bad}");
        }
        for name in ["", "a b", "a+b", "a\nb"] {
            assert_eq!(VerifyingKey::new(name, [0; 32]), Err(NoteError::BadName));
        }
        assert!(Signer::from_pkcs8("a", b"junk").is_err());
    }

    #[test]
    fn pkcs8_keys_work() {
        let document = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
        let signer = Signer::from_pkcs8("log.test", document.as_ref()).unwrap();
        assert_eq!(
            signer.verifying_key().open(&signer.sign("x\n").unwrap()),
            Ok("x\n")
        );
    }

    #[test]
    fn checkpoints_round_trip_and_are_strict() {
        let signer = Signer::from_seed("log.test", &[1; 32]).unwrap();
        let key = signer.verifying_key();
        let checkpoint = Checkpoint {
            origin: "log.test".to_owned(),
            size: 3,
            root: [9; 32],
        };
        let text = checkpoint.to_text();
        assert_eq!(
            Checkpoint::open(&signer.sign(&text).unwrap(), &key),
            Ok(checkpoint)
        );
        assert!(
            Checkpoint::open(&signer.sign(&format!("{text}extension\n")).unwrap(), &key).is_ok()
        );
        for bad in [
            text.replace("log.test", "log.best"),
            text.replace("\n3\n", "\n03\n"),
            text.replace("\n3\n", "\n+3\n"),
            text.replace("JCQ", "JC"),
            "log.test\n3\n".to_owned(),
        ] {
            assert!(
                Checkpoint::open(&signer.sign(&bad).unwrap(), &key).is_err(),
                "{bad}"
            );
        }
    }
}
