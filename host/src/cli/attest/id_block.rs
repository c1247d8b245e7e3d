//! `casemate attest id-block`: keys, blocks, and what they say.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::measure::id_block::{
    ID_AUTH_LEN, ID_BLOCK_LEN, IdAuth, IdBlock, IdKeyDigest, IdKeys, IdSigningKey,
};
use casemate_attest::measure::snp::SnpLaunchDigest;
use casemate_attest::report::SnpPolicy;
use clap::{Args, Subcommand};
use serde::Serialize;
use zeroize::Zeroizing;

use super::files;
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json};

/// What is done with ID blocks.
#[derive(Debug, Subcommand)]
pub enum IdBlockCommand {
    /// Make a P-384 key for ID blocks or for ID keys (author), and print its digest.
    Key {
        /// Where it goes (PKCS#8 PEM, mode 0600); never over another file.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Print the digest by which reports name a key.
    Digest {
        /// The private key.
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
    },
    /// Make id-block.bin and id-auth.bin for a launch digest.
    Make(MakeArgs),
    /// Check an ID block's signatures as firmware will, and print what it says.
    Check {
        /// The block, 96 bytes.
        #[arg(long, value_name = "FILE")]
        id_block: PathBuf,
        /// Its authentication page, 4096 bytes.
        #[arg(long, value_name = "FILE")]
        id_auth: PathBuf,
    },
}

/// What an ID block says, and who signs it.
#[derive(Debug, Args)]
pub struct MakeArgs {
    /// The launch digest, as `casemate attest measure --mode snp` prints it.
    #[arg(long, value_name = "HEX")]
    digest: SnpLaunchDigest,
    /// The key that signs the block.
    #[arg(long, value_name = "FILE")]
    id_key: PathBuf,
    /// The key that signs the ID key.
    #[arg(long, value_name = "FILE")]
    author_key: Option<PathBuf>,
    /// Family id, 32 hex digits.
    #[arg(long, value_name = "HEX", value_parser = id, default_value = ZERO_ID)]
    family_id: [u8; 16],
    /// Image id, 32 hex digits.
    #[arg(long, value_name = "HEX", value_parser = id, default_value = ZERO_ID)]
    image_id: [u8; 16],
    /// Security version of the guest.
    #[arg(long, value_name = "N", default_value_t = 0)]
    guest_svn: u32,
    /// Guest policy, in hex.
    #[arg(long, value_name = "HEX", value_parser = policy, default_value = "0x30000")]
    policy: SnpPolicy,
    /// Folder for id-block.bin and id-auth.bin.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Serialize)]
struct Shown {
    launch_digest: SnpLaunchDigest,
    family_id: String,
    image_id: String,
    guest_svn: u32,
    policy: String,
    id_key_digest: IdKeyDigest,
    author_key_digest: Option<IdKeyDigest>,
    /// Base64, as QEMU's `id-block=` takes it.
    id_block: String,
    /// Base64, as QEMU's `id-auth=` takes it.
    id_auth: String,
}

/// Runs one of them.
pub fn run(command: IdBlockCommand, json: bool) -> Result<u8, Failure> {
    match command {
        IdBlockCommand::Key { out } => {
            let key = IdSigningKey::generate().map_err(|e| bad_key(&out, &e))?;
            files::write_key(&out, &key)?;
            let key = IdSigningKey::from_pkcs8(&key).map_err(|e| bad_key(&out, &e))?;
            show_digest(&key, json)
        }
        IdBlockCommand::Digest { key } => show_digest(&read_key(&key)?, json),
        IdBlockCommand::Make(args) => args.make(json),
        IdBlockCommand::Check { id_block, id_auth } => {
            let block = IdBlock::parse(&files::read(&id_block, ID_BLOCK_LEN)?)
                .map_err(|e| refused(&id_block, &e))?;
            let auth = IdAuth::parse(&files::read(&id_auth, ID_AUTH_LEN)?)
                .map_err(|e| refused(&id_auth, &e))?;
            let keys = auth.verify(&block).map_err(|e| refused(&id_auth, &e))?;
            Shown::new(&block, &auth, &keys).print(json)
        }
    }
}

impl MakeArgs {
    fn make(&self, json: bool) -> Result<u8, Failure> {
        let id_key = read_key(&self.id_key)?;
        let author_key = self.author_key.as_deref().map(read_key).transpose()?;
        let block = IdBlock {
            launch_digest: self.digest,
            family_id: self.family_id,
            image_id: self.image_id,
            guest_svn: self.guest_svn,
            policy: self.policy,
        };
        let failed = |e| refused(&self.out, &e);
        let auth = IdAuth::sign(&block, &id_key, author_key.as_ref()).map_err(failed)?;
        let keys = auth.verify(&block).map_err(failed)?;
        fs::create_dir_all(&self.out)
            .map_err(|e| Failure::new("OUTPUT", format!("{}: {e}", self.out.display())))?;
        files::write(&self.out.join("id-block.bin"), &block.to_bytes())?;
        files::write(&self.out.join("id-auth.bin"), auth.as_bytes())?;
        Shown::new(&block, &auth, &keys).print(json)
    }
}

impl Shown {
    fn new(block: &IdBlock, auth: &IdAuth, keys: &IdKeys) -> Self {
        Self {
            launch_digest: block.launch_digest,
            family_id: hex::encode(block.family_id),
            image_id: hex::encode(block.image_id),
            guest_svn: block.guest_svn,
            policy: format!("{:#x}", block.policy.0),
            id_key_digest: keys.id_key,
            author_key_digest: keys.author_key,
            id_block: STANDARD.encode(block.to_bytes()),
            id_auth: STANDARD.encode(auth.as_bytes()),
        }
    }

    fn print(&self, json: bool) -> Result<u8, Failure> {
        if json {
            return print_json(self);
        }
        let author = self
            .author_key_digest
            .map_or_else(|| "none".to_owned(), |d| d.to_string());
        let text = format!(
            "ID block, signed\n  launch digest {}\n  family id     {}\n  image id      {}\n  guest SVN     {}\n  policy        {}\n  ID key        {}\n  author key    {author}\n",
            self.launch_digest,
            self.family_id,
            self.image_id,
            self.guest_svn,
            self.policy,
            self.id_key_digest,
        );
        print_bytes(text.as_bytes())
    }
}

fn show_digest(key: &IdSigningKey, json: bool) -> Result<u8, Failure> {
    #[derive(Serialize)]
    struct Digest {
        key_digest: IdKeyDigest,
    }
    let key_digest = key.public().digest();
    if json {
        return print_json(&Digest { key_digest });
    }
    print_bytes(format!("key digest {key_digest}\n").as_bytes())
}

fn read_key(path: &Path) -> Result<IdSigningKey, Failure> {
    let bytes = Zeroizing::new(files::read(path, files::MAX_KEY_FILE)?);
    IdSigningKey::read(&bytes).map_err(|e| bad_key(path, &e))
}

fn id(text: &str) -> Result<[u8; 16], String> {
    let mut id = [0; 16];
    hex::decode_to_slice(text, &mut id).map_err(|_| "32 hex digits are an id".to_owned())?;
    Ok(id)
}

fn policy(text: &str) -> Result<SnpPolicy, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let policy = u64::from_str_radix(digits, 16).ok().filter(|_| hex);
    policy
        .map(SnpPolicy)
        .filter(|policy| policy.reserved_one_is_set())
        .ok_or_else(|| "a policy is up to 16 hex digits, bit 17 always set".to_owned())
}

fn bad_key(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new("KEY", format!("{}: {error}", path.display()))
}

fn refused(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new("ID_BLOCK", format!("{}: {error}", path.display()))
}

const ZERO_ID: &str = "00000000000000000000000000000000";
