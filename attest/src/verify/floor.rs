//! The floor: what no policy file can loosen.
//!
//! Each function here is one check of the floor and takes no policy, so that there is nothing a
//! policy could say to it. The one exception is named in its signature: whether a software secure
//! processor is allowed at all. A verdict is accepted only if every name in [`FLOOR`] was checked
//! exactly once and passed.

use super::snp::{ChainFinding, DateFinding, judge};
use super::verdict::Check;
use crate::chain::Leaf;
use crate::product::Product;
use crate::report::{Report, ReportError, SigningKey, SnpPolicyBit};
use crate::tcb::{RawTcb, TcbVersion};
use ring::signature::{ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};

/// The names of the floor's checks.
pub(super) const FLOOR: [&str; 15] = [
    REPORT_FORMAT,
    LEAF_FORMAT,
    CERTIFICATE_CHAIN,
    CERTIFICATE_DATES,
    EMULATED,
    PRODUCT,
    SIGNING_KEY,
    REPORT_SIGNATURE,
    LEAF_TCB,
    LEAF_CHIP,
    DEBUG,
    GUEST_POLICY_RESERVED,
    VMPL_RANGE,
    TCB_ORDER,
    CHIP_KEY_MASK,
];

/// The checks of the floor over a report that could be read.
pub(super) fn checks(
    report: &Report,
    leaf: Option<&Leaf>,
    chain: &ChainFinding,
    allow_emulated: bool,
) -> Vec<Check> {
    vec![
        report_format(Ok(report)),
        certificate_chain(chain),
        certificate_dates(chain),
        emulated(chain, allow_emulated),
        with_leaf(PRODUCT, leaf, |leaf| product(report, leaf)),
        with_leaf(SIGNING_KEY, leaf, |leaf| signing_key(report, leaf)),
        with_leaf(REPORT_SIGNATURE, leaf, |leaf| {
            report_signature(report, leaf)
        }),
        with_leaf(LEAF_TCB, leaf, |leaf| leaf_tcb(report, leaf)),
        with_leaf(LEAF_CHIP, leaf, |leaf| leaf_chip(report, leaf)),
        debug(report),
        guest_policy_reserved(report),
        vmpl_range(report),
        tcb_order(report, product_of(report, leaf)),
        chip_key_mask(report),
    ]
}

/// The checks of the floor over bytes that are no report.
pub(super) fn without_report(
    error: &ReportError,
    chain: &ChainFinding,
    allow_emulated: bool,
) -> Vec<Check> {
    let made = [
        report_format(Err(error)),
        certificate_chain(chain),
        certificate_dates(chain),
        emulated(chain, allow_emulated),
    ];
    let left = FLOOR
        .iter()
        .filter(|name| **name != LEAF_FORMAT && made.iter().all(|check| check.name != **name));
    let open = left.map(|name| {
        Check::cannot_verify(name, "a report", "there is no report", "REPORT_UNREADABLE")
    });
    let open: Vec<_> = open.collect();
    made.into_iter().chain(open).collect()
}

/// The product by whose layout a report's TCB versions are read: the leaf's, since V2 reports name
/// none; [`product`] checks that the report does not contradict it.
pub(super) fn product_of(report: &Report, leaf: Option<&Leaf>) -> Option<Product> {
    leaf.map(|leaf| leaf.product()).or_else(|| report.product())
}

/// A report is one of a known layout, with nothing behind its signature.
fn report_format(report: Result<&Report, &ReportError>) -> Check {
    let expected = "1184 bytes of a known version, zeros behind the signature";
    match report {
        Ok(report) => {
            let found = format!("{}, signed by a {}", report.version(), report.signing_key());
            Check::accepted(REPORT_FORMAT, expected, found)
        }
        Err(error) => {
            let code = match error {
                ReportError::Length(_) => "REPORT_LENGTH",
                ReportError::Version(_) => "REPORT_VERSION_UNSUPPORTED",
                ReportError::SignatureAlgorithm(_) => "REPORT_SIGNATURE_ALGORITHM",
                ReportError::SigningKey(_) => "REPORT_SIGNING_KEY_UNKNOWN",
                ReportError::Trailing(_) => "REPORT_TRAILING_BYTES",
            };
            Check::rejected(REPORT_FORMAT, expected, error.to_string(), code)
        }
    }
}

/// Signatures and certificate contents up to a pinned AMD root, or a named emulated one.
fn certificate_chain(chain: &ChainFinding) -> Check {
    let expected = "every signature up to a pinned AMD root or a named emulated root";
    match &chain.path {
        Ok(path) => Check::accepted(CERTIFICATE_CHAIN, expected, path.clone()),
        Err(fault) => Check::rejected(CERTIFICATE_CHAIN, expected, fault.text.clone(), fault.code),
    }
}

/// Every certificate is in force at the clock.
fn certificate_dates(chain: &ChainFinding) -> Check {
    let expected = format!("in force at {}", chain.clock);
    match &chain.dates {
        DateFinding::InForce(found) => Check::accepted(CERTIFICATE_DATES, &expected, found.clone()),
        DateFinding::Outside(fault) => {
            Check::rejected(CERTIFICATE_DATES, &expected, fault.text.clone(), fault.code)
        }
        DateFinding::Unknown => Check::cannot_verify(
            CERTIFICATE_DATES,
            &expected,
            "the certificates do not form a chain",
            CHAIN_UNVERIFIED,
        ),
    }
}

fn emulated(chain: &ChainFinding, allowed: bool) -> Check {
    let expected = if allowed {
        "AMD's secure processor, or a software one (allowed)"
    } else {
        "AMD's secure processor"
    };
    match &chain.path {
        Ok(_) if !chain.emulated => Check::accepted(EMULATED, expected, "AMD's secure processor"),
        Ok(_) if allowed => {
            Check::accepted(EMULATED, expected, "a software secure processor: emulated")
        }
        Ok(_) => Check::rejected(
            EMULATED,
            expected,
            "a software secure processor: emulated; it protects nothing from its host",
            "EMULATED_NOT_ALLOWED",
        ),
        Err(_) => Check::cannot_verify(
            EMULATED,
            expected,
            "the certificates do not form a chain",
            CHAIN_UNVERIFIED,
        ),
    }
}

fn product(report: &Report, leaf: &Leaf) -> Check {
    let expected = format!("{}, as the leaf says", leaf.product());
    let Some(cpuid) = report.cpuid() else {
        let found = format!("{} reports name no product", report.version());
        return Check::accepted(PRODUCT, &expected, found);
    };
    match report.product() {
        Some(product) => judge(
            PRODUCT,
            product == leaf.product(),
            &expected,
            format!("{product} ({cpuid})"),
            "PRODUCT_MISMATCH",
        ),
        None => {
            let found = format!("{cpuid}, which is no product known here");
            Check::rejected(PRODUCT, &expected, found, PRODUCT_UNKNOWN)
        }
    }
}

fn signing_key(report: &Report, leaf: &Leaf) -> Check {
    judge(
        SIGNING_KEY,
        report.signing_key() == leaf.kind(),
        &format!("{}, as the leaf says", leaf.kind()),
        format!("{}, as the report says", report.signing_key()),
        "SIGNING_KEY_MISMATCH",
    )
}

/// The signature, over the bytes as they came.
fn report_signature(report: &Report, leaf: &Leaf) -> Check {
    let expected = "ECDSA P-384 with SHA-384 over the report's bytes, by the leaf's key";
    let Some(signature) = report.signature() else {
        let found = "R or S is zero or longer than 48 bytes";
        return Check::rejected(
            REPORT_SIGNATURE,
            expected,
            found,
            "REPORT_SIGNATURE_MALFORMED",
        );
    };
    let key = UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, leaf.public_key());
    match key.verify(report.signed_bytes(), &signature) {
        Ok(()) => Check::accepted(REPORT_SIGNATURE, expected, "valid"),
        Err(_) => Check::rejected(
            REPORT_SIGNATURE,
            expected,
            "not valid: the report was changed, or another key signed it",
            "REPORT_SIGNATURE_INVALID",
        ),
    }
}

/// The leaf was issued for the TCB that the report says it is signed under; all eight bytes, the
/// reserved ones too.
fn leaf_tcb(report: &Report, leaf: &Leaf) -> Check {
    let RawTcb(raw) = report.reported_tcb();
    let found = format!(
        "{} ({})",
        report.reported_tcb().of(leaf.product()),
        hex::encode(raw)
    );
    judge(
        LEAF_TCB,
        leaf.tcb().to_raw(leaf.product()) == Some(report.reported_tcb()),
        &format!("reported TCB as in the leaf: {}", leaf.tcb()),
        found,
        "LEAF_TCB_MISMATCH",
    )
}

/// The leaf is this chip's.
fn leaf_chip(report: &Report, leaf: &Leaf) -> Check {
    let Some(hwid) = leaf.hwid() else {
        return match leaf.kind() {
            SigningKey::Vlek => Check::accepted(
                LEAF_CHIP,
                "a provider's key, for all its chips",
                "a VLEK names no chip",
            ),
            SigningKey::Vcek => Check::rejected(
                LEAF_CHIP,
                "the chip's identity in its VCEK",
                "the VCEK names no chip",
                "LEAF_CHIP_MISSING",
            ),
        };
    };
    let mut wanted = [0; 64];
    if let Some(start) = wanted.get_mut(..hwid.len()) {
        start.copy_from_slice(hwid);
    }
    let expected = format!("chip {}", hex::encode(hwid));
    // SNP_CONFIG's MASK_CHIP_ID: firmware writes zeros. The policy may refuse that.
    if report.chip_id() == [0; 64] {
        return Check::accepted(
            LEAF_CHIP,
            &expected,
            "the report hides its chip; what binds them is that this chip's key signed it",
        );
    }
    judge(
        LEAF_CHIP,
        hwid.len() == leaf.product().hwid_len() && report.chip_id() == wanted,
        &expected,
        format!("chip {}", hex::encode(report.chip_id())),
        "LEAF_CHIP_MISMATCH",
    )
}

fn debug(report: &Report) -> Check {
    let policy = report.policy();
    let expected = "debugging forbidden by the guest policy";
    if policy.has(SnpPolicyBit::Debug) {
        let found = format!("{policy}: the host may read and write guest memory");
        Check::rejected(DEBUG, expected, found, "DEBUG_ALLOWED")
    } else {
        Check::accepted(DEBUG, expected, policy.to_string())
    }
}

/// Bit 17 is set, as firmware insists, and no bit that nobody here knows the meaning of.
fn guest_policy_reserved(report: &Report) -> Check {
    let policy = report.policy();
    let expected = "bit 17 set, no unknown bit set";
    let unknown = policy.unknown_bits();
    if !policy.reserved_one_is_set() {
        let found = format!("{policy}: bit 17 is clear");
        return Check::rejected(
            GUEST_POLICY_RESERVED,
            expected,
            found,
            "GUEST_POLICY_RESERVED_CLEAR",
        );
    }
    judge(
        GUEST_POLICY_RESERVED,
        unknown == 0,
        expected,
        format!("{policy}, unknown bits {unknown:#x}"),
        "GUEST_POLICY_UNKNOWN_BITS",
    )
}

/// A guest asked for the report, not the host.
fn vmpl_range(report: &Report) -> Check {
    let expected = "a guest's privilege level, 0 to 3";
    match report.vmpl() {
        level @ 0..=3 => Check::accepted(VMPL_RANGE, expected, level.to_string()),
        u32::MAX => Check::rejected(
            VMPL_RANGE,
            expected,
            "0xffffffff: the host asked for this report, not the guest",
            "VMPL_HOST_REQUESTED",
        ),
        level => Check::rejected(
            VMPL_RANGE,
            expected,
            format!("{level:#x}"),
            "VMPL_OUT_OF_RANGE",
        ),
    }
}

/// Reported ≤ committed ≤ current in every part, which firmware keeps: SNP_CONFIG refuses a
/// reported TCB above the committed one, and no firmware below the committed one loads.
fn tcb_order(report: &Report, product: Option<Product>) -> Check {
    let expected = "reported ≤ committed ≤ current in every part";
    let Some(product) = product else {
        let found = "without a product a TCB version cannot be read";
        return Check::cannot_verify(TCB_ORDER, expected, found, PRODUCT_UNKNOWN);
    };
    let reported = report.reported_tcb().of(product);
    let committed = report.committed_tcb().of(product);
    let current = report.current_tcb().of(product);
    let found = format!("reported {reported}; committed {committed}; current {current}");
    let above = |lower: &TcbVersion, upper: &TcbVersion| !upper.shortfalls(lower).is_empty();
    if above(&reported, &committed) {
        Check::rejected(TCB_ORDER, expected, found, "REPORTED_ABOVE_COMMITTED")
    } else {
        judge(
            TCB_ORDER,
            !above(&committed, &current),
            expected,
            found,
            "COMMITTED_ABOVE_CURRENT",
        )
    }
}

/// Firmware whose chip key is masked (SNP_CONFIG's MASK_CHIP_KEY) signs nothing with it.
fn chip_key_mask(report: &Report) -> Check {
    let expected = "the chip's key is not masked, where it is the one that signs";
    match (report.masks_chip_key(), report.signing_key()) {
        (true, SigningKey::Vcek) => Check::rejected(
            CHIP_KEY_MASK,
            expected,
            "masked, and yet the report says that a VCEK signed it",
            "CHIP_KEY_MASKED",
        ),
        (true, SigningKey::Vlek) => {
            Check::accepted(CHIP_KEY_MASK, expected, "masked; a VLEK signs")
        }
        (false, _) => Check::accepted(CHIP_KEY_MASK, expected, "not masked"),
    }
}

fn with_leaf(name: &str, leaf: Option<&Leaf>, check: impl FnOnce(&Leaf) -> Check) -> Check {
    match leaf {
        Some(leaf) => check(leaf),
        None => Check::cannot_verify(
            name,
            "as the leaf says",
            "the leaf cannot be read",
            "LEAF_UNREADABLE",
        ),
    }
}

const REPORT_FORMAT: &str = "report_format";
pub(super) const LEAF_FORMAT: &str = "leaf_format";
pub(super) const CERTIFICATE_CHAIN: &str = "certificate_chain";
const CERTIFICATE_DATES: &str = "certificate_dates";
const EMULATED: &str = "emulated";
const PRODUCT: &str = "product";
const SIGNING_KEY: &str = "signing_key";
const REPORT_SIGNATURE: &str = "report_signature";
const LEAF_TCB: &str = "leaf_tcb";
const LEAF_CHIP: &str = "leaf_chip";
const DEBUG: &str = "debug_forbidden";
const GUEST_POLICY_RESERVED: &str = "guest_policy_reserved";
const VMPL_RANGE: &str = "vmpl_range";
const TCB_ORDER: &str = "tcb_order";
const CHIP_KEY_MASK: &str = "chip_key_mask";
const PRODUCT_UNKNOWN: &str = "PRODUCT_UNKNOWN";
const CHAIN_UNVERIFIED: &str = "CHAIN_UNVERIFIED";
