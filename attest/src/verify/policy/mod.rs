//! The owner's policy for SNP evidence: a TOML file, read once into types that cannot be wrong.
//!
//! The file can only ask for *more* than the floor: there is no key for
//! what the floor insists on, an unknown key is an error, and values that would mean less than the
//! floor are refused here, with the reason. An absent key asks for nothing, except where the
//! default below says otherwise; an empty list allows nothing.
//!
//! ```toml
//! signing_keys = ["vcek"]              # or "vlek"; default: both
//! products = ["milan", "genoa"]        # default: all
//! measurements = ["…96 hex digits…"]   # launch digests
//! vmpl = [0]                           # the default
//! reference_signers = ["ed25519:…"]    # or who may sign reference values, and how many of them
//! reference_threshold = 1
//! provisional_firmware = "refuse"      # the default; or "allow"
//! migration_agent = "refuse"           # the default; or "allow"
//! masked_chip_id = "allow"             # the default; or "refuse"
//!
//! [tcb.genoa]                          # levels, part by part; what is not named may be 0
//!                                      # with one product named, the others are refused;
//!                                      # an empty [tcb.milan] asks nothing of Milan
//! reported = { boot_loader = 9, snp = 22, microcode = 72 }
//!
//! [guest_policy]
//! forbid = ["migrate_ma"]
//!
//! [crl]
//! mode = "required"                    # default: "if-present"
//! max_age_days = 30
//! ```

mod text;

pub use text::{Abi, Fingerprint, FingerprintError, Hex};

use crate::product::Product;
use crate::reference::SignerKey;
use crate::report::{FirmwareVersion, PlatformBit, ReportVersion, SigningKey, SnpPolicyBit};
use crate::tcb::TcbVersion;
use ring::digest;
use serde::Deserialize;
use std::collections::BTreeMap;

/// The longest policy file, in bytes.
pub const MAX_POLICY_LEN: usize = 1 << 20;

/// What the owner asks of SNP evidence, above the floor.
#[derive(Debug, Clone)]
pub struct OwnerPolicy {
    digest: [u8; 48],
    added_roots: Vec<Fingerprint>,
    file: PolicyFile,
}

/// Why a file is no policy.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Longer than [`MAX_POLICY_LEN`].
    #[error("a policy file has at most {MAX_POLICY_LEN} bytes, this one has {0}")]
    TooLong(usize),
    /// Not text.
    #[error("a policy file is UTF-8 text: {0}")]
    Utf8(#[from] std::str::Utf8Error),
    /// Not TOML, an unknown or duplicate key, or a value of the wrong kind; with line and column.
    #[error("policy file: {0}")]
    Toml(#[from] toml::de::Error),
    /// A level for a part that the product does not have.
    #[error("policy file: [tcb.{product}] {which}: only Turin has an FMC; remove `fmc`")]
    Fmc {
        /// The product.
        product: Product,
        /// Which of the four minima.
        which: &'static str,
    },
    /// A table that asks for nothing.
    #[error("policy file: [tcb.{product}] {which} names no level; name one or remove it")]
    EmptyMinimum {
        /// The product.
        product: Product,
        /// Which of the four minima.
        which: &'static str,
    },
    /// Asked for and forbidden at once.
    #[error("policy file: `{0}` is both required and forbidden; no report can meet that")]
    Contradiction(String),
    /// The floor forbids it.
    #[error("policy file: {0}")]
    BelowFloor(&'static str),
    /// It can never match a report.
    #[error("policy file: {0}")]
    Meaningless(&'static str),
}

/// The file's keys, all of them optional.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    /// Whether a software secure processor is accepted; its root must be named besides.
    #[serde(default)]
    pub allow_emulated: bool,
    /// Roots of software secure processors, `sha256:…` of their DER.
    #[serde(default)]
    pub emulated_roots: Vec<Fingerprint>,
    /// Kinds of key that may sign a report; absent: both.
    #[serde(default, deserialize_with = "text::signing_keys")]
    pub signing_keys: Option<Vec<SigningKey>>,
    /// Cloud providers whose VLEK may sign. A VCEK names no provider: a list refuses every VCEK.
    pub csp_ids: Option<Vec<String>>,
    /// Products; absent: all that are known.
    pub products: Option<Vec<Product>>,
    /// Launch digests.
    pub measurements: Option<Vec<Hex<48>>>,
    /// Who may sign reference values, `ed25519:…`.
    pub reference_signers: Option<Vec<SignerKey>>,
    /// How many of them must have signed; absent: one.
    pub reference_threshold: Option<usize>,
    /// Privilege levels that may ask for a report, 0 to 3; absent: only 0.
    pub vmpl: Option<Vec<u32>>,
    /// The oldest report version.
    #[serde(default, deserialize_with = "text::report_version")]
    pub min_report_version: Option<ReportVersion>,
    /// Whether firmware that is not committed may run.
    #[serde(default)]
    pub provisional_firmware: Leave,
    /// Whether a migration agent may be bound.
    #[serde(default)]
    pub migration_agent: Leave,
    /// Whether the chip may stay unnamed; absent: it may.
    pub masked_chip_id: Option<Leave>,
    /// Chips, 64 bytes as reports carry them.
    pub chip_ids: Option<Vec<Hex<64>>>,
    /// Minimum TCB levels of each product. Where one product has a minimum, a product without a
    /// table is refused, since the host chooses the hardware; an empty table asks for nothing.
    #[serde(default)]
    pub tcb: BTreeMap<TcbProduct, TcbMinima>,
    /// The guest policy's bits.
    #[serde(default)]
    pub guest_policy: GuestPolicyRules,
    /// The platform's bits.
    #[serde(default)]
    pub platform: PlatformRules,
    /// What the launch was given.
    #[serde(default)]
    pub launch: LaunchRules,
    /// Minimum firmware versions.
    #[serde(default)]
    pub firmware: FirmwareRules,
    /// Mitigations that must be in force.
    #[serde(default)]
    pub mitigations: MitigationRules,
    /// Revocation lists.
    #[serde(default)]
    pub crl: CrlRules,
}

/// Whether something is let through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leave {
    /// It is rejected.
    #[default]
    Refuse,
    /// It is let through.
    Allow,
}

/// A product as a key of `[tcb]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TcbProduct {
    /// `[tcb.milan]`
    Milan,
    /// `[tcb.genoa]`
    Genoa,
    /// `[tcb.turin]`
    Turin,
}

/// One product's minimum levels for the four TCB versions of a report.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcbMinima {
    /// Of the TCB that the signing key is derived for.
    pub reported: Option<TcbMinimum>,
    /// Of the TCB below which the platform cannot be taken back.
    pub committed: Option<TcbMinimum>,
    /// Of the TCB that runs now.
    pub current: Option<TcbMinimum>,
    /// Of the TCB that ran when the guest was launched.
    pub launch: Option<TcbMinimum>,
}

/// The lowest level of each part; a part that is not named may have any level.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcbMinimum {
    /// Turin only.
    pub fmc: Option<u8>,
    /// The boot loader.
    pub boot_loader: Option<u8>,
    /// The secure processor's operating system.
    pub tee: Option<u8>,
    /// The SNP firmware.
    pub snp: Option<u8>,
    /// Microcode.
    pub microcode: Option<u8>,
}

/// `[guest_policy]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestPolicyRules {
    /// Bits that must be set.
    #[serde(default)]
    pub require: Vec<SnpPolicyBit>,
    /// Bits that must not be set.
    #[serde(default)]
    pub forbid: Vec<SnpPolicyBit>,
    /// The lowest firmware ABI that the guest policy may ask for, `"1.51"`.
    pub min_abi: Option<Abi>,
}

/// `[platform]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformRules {
    /// Bits that must be set.
    #[serde(default)]
    pub require: Vec<PlatformBit>,
    /// Bits that must not be set.
    #[serde(default)]
    pub forbid: Vec<PlatformBit>,
}

/// `[launch]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchRules {
    /// What the host may have bound to the launch.
    pub host_data: Option<Vec<Hex<32>>>,
    /// Image families.
    pub family_ids: Option<Vec<Hex<16>>>,
    /// Images.
    pub image_ids: Option<Vec<Hex<16>>>,
    /// The lowest security version of the guest.
    pub min_guest_svn: Option<u32>,
    /// Whether an ID block must be there.
    #[serde(default)]
    pub require_id_key: bool,
    /// SHA-384 of the keys that may sign an ID block.
    pub id_key_digests: Option<Vec<Hex<48>>>,
    /// SHA-384 of the keys that may sign an ID key.
    pub author_key_digests: Option<Vec<Hex<48>>>,
}

/// `[firmware]`: `"1.55.29"` is major, minor, build.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirmwareRules {
    /// Of the firmware that runs now.
    #[serde(default, deserialize_with = "text::firmware")]
    pub min_current: Option<FirmwareVersion>,
    /// Of the firmware that is committed.
    #[serde(default, deserialize_with = "text::firmware")]
    pub min_committed: Option<FirmwareVersion>,
}

/// `[mitigations]`: masks of bits that must be set. Reports before V5 carry none and do not meet
/// them.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MitigationRules {
    /// When the guest was launched.
    pub launch: Option<u64>,
    /// Now.
    pub current: Option<u64>,
}

/// `[crl]`
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CrlRules {
    /// Whether a list must be there.
    #[serde(default)]
    pub mode: CrlMode,
    /// The oldest list, from its issue; its own next-update date counts besides.
    pub max_age_days: Option<u32>,
}

/// Whether a revocation list must be there. One that is there is always checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CrlMode {
    /// Without a list the evidence cannot be verified.
    Required,
    /// Without a list the verdict says that revocation was not checked.
    #[default]
    IfPresent,
}

impl OwnerPolicy {
    /// Reads a policy file.
    pub fn parse(bytes: &[u8]) -> Result<Self, PolicyError> {
        if bytes.len() > MAX_POLICY_LEN {
            return Err(PolicyError::TooLong(bytes.len()));
        }
        let file: PolicyFile = toml::from_str(std::str::from_utf8(bytes)?)?;
        file.check()?;
        Ok(Self {
            digest: sha384(bytes),
            added_roots: Vec::new(),
            file,
        })
    }

    /// The rules.
    pub fn rules(&self) -> &PolicyFile {
        &self.file
    }

    /// SHA-384 of the file as it was read; of nothing for the default policy.
    pub fn digest(&self) -> &[u8; 48] {
        &self.digest
    }

    /// One root more that counts as a software secure processor's. It is accepted only where the
    /// policy allows emulated platforms.
    #[must_use]
    pub fn with_emulated_root(mut self, root: Fingerprint) -> Self {
        self.added_roots.push(root);
        self
    }

    /// The default policy, and besides a software secure processor with this root.
    pub fn allowing_emulated(root: Fingerprint) -> Self {
        let mut policy = Self::default().with_emulated_root(root);
        policy.file.allow_emulated = true;
        policy
    }

    /// The roots of software secure processors that are named.
    pub fn emulated_roots(&self) -> impl Iterator<Item = &Fingerprint> {
        self.file.emulated_roots.iter().chain(&self.added_roots)
    }

    /// What names this policy in an attestation result: the file's digest, and each root that was
    /// added to it.
    pub fn ids(&self) -> Vec<String> {
        let file = format!("sha384:{}", hex::encode(self.digest));
        let added = self
            .added_roots
            .iter()
            .map(|root| format!("emulated-root:{root}"));
        std::iter::once(file).chain(added).collect()
    }
}

/// The policy of an empty file.
impl Default for OwnerPolicy {
    fn default() -> Self {
        Self {
            digest: sha384(&[]),
            added_roots: Vec::new(),
            file: PolicyFile::default(),
        }
    }
}

impl PolicyFile {
    /// The minima for `product`.
    pub fn minima(&self, product: Product) -> Option<&TcbMinima> {
        self.tcb.get(&TcbProduct::from(product))
    }

    /// How many named signers reference values must have.
    pub fn reference_threshold(&self) -> usize {
        self.reference_threshold.unwrap_or(1)
    }

    fn check(&self) -> Result<(), PolicyError> {
        for (key, minima) in &self.tcb {
            for (which, minimum) in minima.all() {
                minimum.check((*key).into(), which)?;
            }
        }
        no_contradiction(&self.guest_policy.require, &self.guest_policy.forbid)?;
        no_contradiction(&self.platform.require, &self.platform.forbid)?;
        if self.guest_policy.require.contains(&SnpPolicyBit::Debug) {
            return Err(PolicyError::BelowFloor(
                "`debug` cannot be required: a guest that its host may debug is always rejected",
            ));
        }
        if self.vmpl.iter().flatten().any(|level| *level > 3) {
            return Err(PolicyError::BelowFloor(
                "a guest's privilege level (vmpl) is 0, 1, 2 or 3; a report that the host asked \
                 for is always rejected",
            ));
        }
        if self.chip_ids.iter().flatten().any(|id| id.0 == [0; 64]) {
            return Err(PolicyError::Meaningless(
                "an all-zero chip id stands for a masked one and names no chip; remove it",
            ));
        }
        let signers = self.reference_signers.as_deref().unwrap_or_default();
        if self
            .reference_threshold
            .is_some_and(|n| n == 0 || n > signers.len())
        {
            return Err(PolicyError::Meaningless(
                "reference_threshold is at least 1 and at most the number of reference_signers",
            ));
        }
        if [self.mitigations.launch, self.mitigations.current].contains(&Some(0)) {
            return Err(PolicyError::Meaningless(
                "a mitigation mask of 0 asks for nothing; name bits or remove it",
            ));
        }
        Ok(())
    }
}

impl TcbMinima {
    fn all(&self) -> impl Iterator<Item = (&'static str, TcbMinimum)> {
        [
            ("reported", self.reported),
            ("committed", self.committed),
            ("current", self.current),
            ("launch", self.launch),
        ]
        .into_iter()
        .filter_map(|(which, minimum)| Some((which, minimum?)))
    }
}

impl TcbMinimum {
    /// The levels as a TCB version: what is not named is 0, or absent for the FMC.
    pub fn levels(self) -> TcbVersion {
        TcbVersion {
            fmc: self.fmc,
            boot_loader: self.boot_loader.unwrap_or(0),
            tee: self.tee.unwrap_or(0),
            snp: self.snp.unwrap_or(0),
            microcode: self.microcode.unwrap_or(0),
        }
    }

    fn check(self, product: Product, which: &'static str) -> Result<(), PolicyError> {
        if self.fmc.is_some() && product != Product::Turin {
            return Err(PolicyError::Fmc { product, which });
        }
        if self == Self::default() {
            return Err(PolicyError::EmptyMinimum { product, which });
        }
        Ok(())
    }
}

impl From<Product> for TcbProduct {
    fn from(product: Product) -> Self {
        match product {
            Product::Milan => Self::Milan,
            Product::Genoa => Self::Genoa,
            Product::Turin => Self::Turin,
        }
    }
}

impl From<TcbProduct> for Product {
    fn from(product: TcbProduct) -> Self {
        match product {
            TcbProduct::Milan => Self::Milan,
            TcbProduct::Genoa => Self::Genoa,
            TcbProduct::Turin => Self::Turin,
        }
    }
}

fn no_contradiction<B: PartialEq + ToString>(
    require: &[B],
    forbid: &[B],
) -> Result<(), PolicyError> {
    match require.iter().find(|bit| forbid.contains(bit)) {
        Some(bit) => Err(PolicyError::Contradiction(bit.to_string())),
        None => Ok(()),
    }
}

fn sha384(bytes: &[u8]) -> [u8; 48] {
    let mut out = [0; 48];
    out.copy_from_slice(digest::digest(&digest::SHA384, bytes).as_ref());
    out
}

#[cfg(test)]
mod tests;
