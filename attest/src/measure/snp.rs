//! The SNP launch digest: a chain of SHA-384 over one PAGE_INFO for every page that the host
//! launches. Publication 56860, SNP_LAUNCH_UPDATE.

use super::ovmf::{PAGE_LEN, Page};
use ring::digest;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An SNP launch digest, shown and serialised as 96 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnpLaunchDigest([u8; SNP_DIGEST_LEN]);

/// Computes an [`SnpLaunchDigest`] page by page.
#[derive(Clone)]
pub struct SnpLaunchDigester([u8; SNP_DIGEST_LEN]);

/// A page's type, as firmware numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageType {
    /// Content is measured.
    Normal = 1,
    /// Content is measured; a vCPU's state.
    Vmsa = 2,
    /// Zeroed by firmware.
    Zero = 3,
    /// Content is the host's affair.
    Unmeasured = 4,
    /// Filled by firmware.
    Secrets = 5,
    /// Checked by firmware.
    Cpuid = 6,
}

/// What firmware measures of one page (PAGE_INFO).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageInfo {
    /// SHA-384 of the page for [`PageType::Normal`] and [`PageType::Vmsa`], else zero.
    pub contents: [u8; SNP_DIGEST_LEN],
    /// What kind of page.
    pub page_type: PageType,
    /// Whether the page is part of an initial migration image.
    pub imi: bool,
    /// What VMPL 1, 2 and 3 may do with it.
    pub vmpl_permissions: [u8; 3],
    /// Guest physical address of the page.
    pub gpa: u64,
}

/// Why a text is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an SNP launch digest; 96 hex digits are")]
pub struct SnpDigestError(String);

impl SnpLaunchDigest {
    /// A digest from its bytes.
    pub const fn new(bytes: [u8; SNP_DIGEST_LEN]) -> Self {
        Self(bytes)
    }

    /// The digest's bytes.
    pub const fn as_bytes(&self) -> &[u8; SNP_DIGEST_LEN] {
        &self.0
    }
}

impl SnpLaunchDigester {
    /// Nothing launched yet: 48 zero bytes.
    pub const fn new() -> Self {
        Self([0; SNP_DIGEST_LEN])
    }

    /// Goes on from what was launched before.
    pub const fn continuing(digest: SnpLaunchDigest) -> Self {
        Self(digest.0)
    }

    /// Adds one page.
    pub fn update(&mut self, page: &PageInfo) {
        let mut info = [0; PAGE_INFO_LEN];
        let [vmpl1, vmpl2, vmpl3] = page.vmpl_permissions;
        let rest = (PAGE_INFO_LEN as u16)
            .to_le_bytes()
            .into_iter()
            .chain([page.page_type as u8, page.imi.into(), 0])
            .chain([vmpl1, vmpl2, vmpl3])
            .chain(page.gpa.to_le_bytes());
        let all = self.0.into_iter().chain(page.contents).chain(rest);
        for (to, from) in info.iter_mut().zip(all) {
            *to = from;
        }
        self.0 = sha384(&info);
    }

    /// Adds pages with measured content, the first at `gpa`.
    pub fn normal(&mut self, gpa: u64, pages: &[Page]) {
        // Firmware images are largely fill: a page like the one before needs no second hash.
        let mut last: Option<(&Page, [u8; SNP_DIGEST_LEN])> = None;
        for (page, gpa) in pages.iter().zip(addresses(gpa)) {
            let contents = match last {
                Some((known, hash)) if known == page => hash,
                _ => sha384(page),
            };
            last = Some((page, contents));
            self.update(&PageInfo::new(PageType::Normal, gpa, contents));
        }
    }

    /// Adds the state of `count` vCPUs that begin alike. KVM measures vCPUs last, in their order,
    /// all at [`VMSA_GPA`].
    pub fn vmsa(&mut self, page: &Page, count: u16) {
        let info = PageInfo::new(PageType::Vmsa, VMSA_GPA, sha384(page));
        for _ in 0..count {
            self.update(&info);
        }
    }

    /// Adds `count` pages whose content is not measured, the first at `gpa`.
    pub fn without_content(&mut self, page_type: PageType, gpa: u64, count: u32) {
        for (_, gpa) in (0..count).zip(addresses(gpa)) {
            self.update(&PageInfo::new(page_type, gpa, [0; SNP_DIGEST_LEN]));
        }
    }

    /// The digest of everything added.
    pub const fn finish(self) -> SnpLaunchDigest {
        SnpLaunchDigest(self.0)
    }
}

impl PageInfo {
    /// A page of a guest without migration agent and without VMPL permissions, as KVM launches all.
    pub const fn new(page_type: PageType, gpa: u64, contents: [u8; SNP_DIGEST_LEN]) -> Self {
        Self {
            contents,
            page_type,
            imi: false,
            vmpl_permissions: [0; 3],
            gpa,
        }
    }
}

impl Default for SnpLaunchDigester {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for SnpLaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for SnpLaunchDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnpLaunchDigest({self})")
    }
}

impl FromStr for SnpLaunchDigest {
    type Err = SnpDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; SNP_DIGEST_LEN];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| SnpDigestError(text.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for SnpLaunchDigest {
    type Error = SnpDigestError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SnpLaunchDigest> for String {
    fn from(digest: SnpLaunchDigest) -> Self {
        digest.to_string()
    }
}

/// SHA-384 of bytes at hand.
pub(super) fn sha384(bytes: &[u8]) -> [u8; SNP_DIGEST_LEN] {
    let mut hash = [0; SNP_DIGEST_LEN];
    hash.copy_from_slice(digest::digest(&digest::SHA384, bytes).as_ref());
    hash
}

fn addresses(first: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(first), |gpa| gpa.checked_add(PAGE_LEN as u64))
}

/// The length of an SNP launch digest, in bytes.
pub const SNP_DIGEST_LEN: usize = 48;
/// Where VMSAs are measured: all ones, page-aligned, cut to 48 bits.
pub const VMSA_GPA: u64 = 0xffff_ffff_f000;

const PAGE_INFO_LEN: usize = 0x70;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_info_has_its_fields_in_their_places() {
        let mut info = PageInfo::new(PageType::Normal, 0x0123_4567_89ab_c000, [7; 48]);
        info.imi = true;
        info.vmpl_permissions = [1, 2, 3];
        let mut digester = SnpLaunchDigester([9; 48]);
        digester.update(&info);
        let mut raw = [0; 0x70];
        raw[..48].fill(9);
        raw[48..96].fill(7);
        raw[0x60] = 0x70;
        raw[0x62..0x68].copy_from_slice(&[1, 1, 0, 1, 2, 3]);
        raw[0x68..].copy_from_slice(&0x0123_4567_89ab_c000u64.to_le_bytes());
        assert_eq!(*digester.finish().as_bytes(), sha384(&raw));
    }

    #[test]
    fn equal_neighbours_are_hashed_once_and_measured_each() {
        let pages = [[0; PAGE_LEN], [0; PAGE_LEN], [1; PAGE_LEN], [0; PAGE_LEN]];
        let mut whole = SnpLaunchDigester::new();
        whole.normal(0x1000, &pages);
        let mut single = SnpLaunchDigester::new();
        for (n, page) in pages.iter().enumerate() {
            single.normal(0x1000 * (n as u64 + 1), std::slice::from_ref(page));
        }
        assert_eq!(whole.finish(), single.finish());
    }

    #[test]
    fn type_place_and_order_count() {
        let digest = |steps: &[(PageType, u64)]| {
            let mut digester = SnpLaunchDigester::new();
            for (page_type, gpa) in steps {
                digester.without_content(*page_type, *gpa, 1);
            }
            digester.finish()
        };
        let (zero, secrets) = ((PageType::Zero, 0x1000), (PageType::Secrets, 0x2000));
        let all = [
            digest(&[zero, secrets]),
            digest(&[secrets, zero]),
            digest(&[zero, (PageType::Secrets, 0x3000)]),
            digest(&[zero, (PageType::Cpuid, 0x2000)]),
        ];
        for (n, one) in all.iter().enumerate() {
            assert!(all[n + 1..].iter().all(|other| other != one), "{n}");
        }
        // The last page may end with the address space.
        SnpLaunchDigester::new().without_content(PageType::Zero, u64::MAX - 4095, 2);
    }

    #[test]
    fn digests_are_written_in_hex() {
        let digest = SnpLaunchDigest::new(sha384(b"x"));
        let json = serde_json::to_string(&digest).unwrap();
        assert_eq!(json, format!("\"{digest}\""));
        assert_eq!(
            serde_json::from_str::<SnpLaunchDigest>(&json).unwrap(),
            digest
        );
        assert!("e3b0".parse::<SnpLaunchDigest>().is_err());
    }
}
