//! What the owner's policy asks of a report, above the floor.
//!
//! A check whose key the policy does not have is listed as not checked, with what the report says
//! all the same, so that nothing passes in silence.

use super::{Nonce, judge, measurement};
use crate::chain::Leaf;
use crate::product::Product;
use crate::reference::ReferenceValues;
use crate::report::{FirmwareVersion, PlatformBit, Report, ReportVersion, SnpPolicyBit};
use crate::tcb::RawTcb;
use crate::verify::policy::{Hex, Leave, OwnerPolicy, PolicyFile, TcbMinima, TcbMinimum};
use crate::verify::verdict::Check;
use std::fmt::Display;
use std::time::SystemTime;

/// What a report is held against.
pub(super) struct Owner<'a> {
    pub(super) report: &'a Report,
    pub(super) leaf: Option<&'a Leaf>,
    pub(super) product: Option<Product>,
    pub(super) policy: &'a OwnerPolicy,
    pub(super) references: &'a [ReferenceValues],
    pub(super) nonce: Option<&'a Nonce>,
    pub(super) clock: SystemTime,
}

/// The names of the checks here, in order.
pub(super) const NAMES: [&str; 27] = [
    REPORT_DATA,
    measurement::MEASUREMENT,
    VMPL,
    REPORT_VERSION,
    PRODUCT_ALLOWED,
    SIGNING_KEY_ALLOWED,
    CSP_ID,
    CHIP_ID,
    TCB_REPORTED,
    TCB_COMMITTED,
    TCB_CURRENT,
    TCB_LAUNCH,
    FIRMWARE_CURRENT,
    FIRMWARE_COMMITTED,
    PROVISIONAL_FIRMWARE,
    MITIGATIONS_LAUNCH,
    MITIGATIONS_CURRENT,
    GUEST_POLICY_BITS,
    GUEST_POLICY_ABI,
    PLATFORM_BITS,
    MIGRATION_AGENT,
    HOST_DATA,
    FAMILY_ID,
    IMAGE_ID,
    GUEST_SVN,
    ID_KEY,
    AUTHOR_KEY,
];

impl Owner<'_> {
    /// Every check that a policy can ask for.
    pub(super) fn checks(&self) -> Vec<Check> {
        let mut checks = Vec::with_capacity(NAMES.len());
        checks.extend([
            self.report_data(),
            measurement::check(self),
            self.vmpl(),
            self.report_version(),
            self.product_allowed(),
            self.signing_key_allowed(),
            self.csp_id(),
            self.chip_id(),
        ]);
        checks.extend(self.tcbs());
        checks.extend([
            self.firmware_current(),
            self.firmware_committed(),
            self.provisional_firmware(),
            self.mitigations_launch(),
            self.mitigations_current(),
            self.guest_policy_bits(),
            self.guest_policy_abi(),
            self.platform_bits(),
            self.migration_agent(),
        ]);
        checks.extend(self.launch());
        checks
    }

    pub(super) fn rules(&self) -> &PolicyFile {
        self.policy.rules()
    }

    /// All 64 bytes: a tail behind the nonce is as wrong as another nonce.
    fn report_data(&self) -> Check {
        let data = self.report.report_data();
        let found = hex::encode(data);
        match self.nonce {
            Some(nonce) => judge(
                REPORT_DATA,
                data == nonce.padded(),
                &format!("{} (nonce, zeros behind)", hex::encode(nonce.padded())),
                found,
                "REPORT_DATA_MISMATCH",
            ),
            None => Check::not_checked(
                REPORT_DATA,
                "no nonce given",
                format!("{found}; without a nonce an old report looks like a new one"),
            ),
        }
    }

    fn vmpl(&self) -> Check {
        let allowed = self.rules().vmpl.as_deref().unwrap_or(&[0]);
        let level = self.report.vmpl();
        judge(
            VMPL,
            allowed.contains(&level),
            &one_of(allowed),
            level.to_string(),
            "VMPL_NOT_ALLOWED",
        )
    }

    fn report_version(&self) -> Check {
        let least = self.rules().min_report_version.unwrap_or(ReportVersion::V2);
        let version = self.report.version();
        judge(
            REPORT_VERSION,
            version >= least,
            &format!("{least} or later"),
            version.to_string(),
            "REPORT_VERSION_TOO_OLD",
        )
    }

    fn product_allowed(&self) -> Check {
        let found = self.product.map(|product| product.to_string());
        let found = found.unwrap_or_else(|| "not known".to_owned());
        let Some(allowed) = &self.rules().products else {
            return Check::not_checked(PRODUCT_ALLOWED, "any known product", found);
        };
        let holds = self.product.is_some_and(|one| allowed.contains(&one));
        let code = "PRODUCT_NOT_ALLOWED";
        judge(PRODUCT_ALLOWED, holds, &one_of(allowed), found, code)
    }

    fn signing_key_allowed(&self) -> Check {
        let kind = self.report.signing_key();
        let Some(allowed) = &self.rules().signing_keys else {
            let expected = "VCEK or VLEK";
            return Check::not_checked(SIGNING_KEY_ALLOWED, expected, kind.to_string());
        };
        judge(
            SIGNING_KEY_ALLOWED,
            allowed.contains(&kind),
            &one_of(allowed),
            kind.to_string(),
            "SIGNING_KEY_NOT_ALLOWED",
        )
    }

    fn csp_id(&self) -> Check {
        let csp = self.leaf.and_then(|leaf| leaf.csp_id());
        let found = csp.unwrap_or("the leaf names no provider").to_owned();
        let Some(allowed) = &self.rules().csp_ids else {
            return Check::not_checked(CSP_ID, "any provider", found);
        };
        let holds = csp.is_some_and(|csp| allowed.iter().any(|one| one == csp));
        judge(CSP_ID, holds, &one_of(allowed), found, "CSP_ID_NOT_ALLOWED")
    }

    fn chip_id(&self) -> Check {
        let id = Hex(self.report.chip_id());
        let rules = self.rules();
        let hidden = id.0 == [0; 64];
        let found = if hidden {
            "the report hides its chip".to_owned()
        } else {
            id.to_string()
        };
        let refused = rules.masked_chip_id == Some(Leave::Refuse);
        let expected = match &rules.chip_ids {
            Some(allowed) => one_of(allowed),
            None if refused => "a chip that is named".to_owned(),
            None => return Check::not_checked(CHIP_ID, "any chip", found),
        };
        if hidden {
            return Check::rejected(CHIP_ID, &expected, found, "CHIP_ID_MASKED");
        }
        let holds = rules.chip_ids.as_ref().is_none_or(|all| all.contains(&id));
        judge(CHIP_ID, holds, &expected, found, "CHIP_ID_NOT_ALLOWED")
    }

    fn tcbs(&self) -> [Check; 4] {
        type Pick = fn(&TcbMinima) -> Option<TcbMinimum>;
        let report = self.report;
        let all: [(&str, &str, RawTcb, Pick); 4] = [
            (
                TCB_REPORTED,
                "TCB_REPORTED_TOO_OLD",
                report.reported_tcb(),
                |minima| minima.reported,
            ),
            (
                TCB_COMMITTED,
                "TCB_COMMITTED_TOO_OLD",
                report.committed_tcb(),
                |minima| minima.committed,
            ),
            (
                TCB_CURRENT,
                "TCB_CURRENT_TOO_OLD",
                report.current_tcb(),
                |minima| minima.current,
            ),
            (
                TCB_LAUNCH,
                "TCB_LAUNCH_TOO_OLD",
                report.launch_tcb(),
                |minima| minima.launch,
            ),
        ];
        all.map(|(name, code, raw, pick)| self.tcb(name, code, raw, pick))
    }

    fn tcb(
        &self,
        name: &str,
        code: &str,
        raw: RawTcb,
        pick: fn(&TcbMinima) -> Option<TcbMinimum>,
    ) -> Check {
        let Some(product) = self.product else {
            let expected = "levels of a known product";
            return Check::cannot_verify(name, expected, hex::encode(raw.0), "PRODUCT_UNKNOWN");
        };
        let tcb = raw.of(product);
        let rules = self.rules();
        let minima = rules.minima(product);
        // Otherwise the host could choose its hardware so as to have no minimum.
        if minima.is_none() && rules.tcb.values().any(|minima| pick(minima).is_some()) {
            let expected = format!("a product with a minimum; the policy has no [tcb.{product}]");
            return Check::rejected(name, &expected, tcb.to_string(), "TCB_PRODUCT_UNLISTED");
        }
        let Some(minimum) = minima.and_then(pick) else {
            let expected = format!("no minimum given for {product}");
            return Check::not_checked(name, &expected, tcb.to_string());
        };
        let levels = minimum.levels();
        let short = tcb.shortfalls(&levels);
        let mut found = tcb.to_string();
        for part in &short {
            found.push_str(&format!("; {part}"));
        }
        judge(
            name,
            short.is_empty(),
            &format!("at least {levels}"),
            found,
            code,
        )
    }

    fn firmware_current(&self) -> Check {
        let rule = self.rules().firmware.min_current;
        let found = self.report.current_firmware();
        firmware(FIRMWARE_CURRENT, rule, found, "FIRMWARE_CURRENT_TOO_OLD")
    }

    fn firmware_committed(&self) -> Check {
        let rule = self.rules().firmware.min_committed;
        let found = self.report.committed_firmware();
        firmware(
            FIRMWARE_COMMITTED,
            rule,
            found,
            "FIRMWARE_COMMITTED_TOO_OLD",
        )
    }

    /// Firmware that is not committed can be taken back by the host at any moment.
    fn provisional_firmware(&self) -> Check {
        let report = self.report;
        let tcb = report.current_tcb() != report.committed_tcb();
        let firmware = report.current_firmware() != report.committed_firmware();
        let levels = |raw: RawTcb| {
            self.product
                .map_or_else(|| hex::encode(raw.0), |product| raw.of(product).to_string())
        };
        let found = format!(
            "current {}, {}; committed {}, {}",
            report.current_firmware(),
            levels(report.current_tcb()),
            report.committed_firmware(),
            levels(report.committed_tcb())
        );
        if self.rules().provisional_firmware == Leave::Allow {
            let expected = "provisional firmware is allowed";
            return Check::not_checked(PROVISIONAL_FIRMWARE, expected, found);
        }
        judge(
            PROVISIONAL_FIRMWARE,
            !tcb && !firmware,
            "the firmware that runs is the committed one",
            found,
            "PROVISIONAL_FIRMWARE",
        )
    }

    fn mitigations_launch(&self) -> Check {
        let rule = self.rules().mitigations.launch;
        let found = self.report.launch_mitigations();
        mitigations(
            MITIGATIONS_LAUNCH,
            rule,
            found,
            "MITIGATIONS_LAUNCH_MISSING",
        )
    }

    fn mitigations_current(&self) -> Check {
        let rule = self.rules().mitigations.current;
        let found = self.report.current_mitigations();
        mitigations(
            MITIGATIONS_CURRENT,
            rule,
            found,
            "MITIGATIONS_CURRENT_MISSING",
        )
    }

    fn guest_policy_bits(&self) -> Check {
        let rules = &self.rules().guest_policy;
        let policy = self.report.policy();
        let set = |bit: SnpPolicyBit| policy.has(bit);
        bits(
            GUEST_POLICY_BITS,
            &rules.require,
            &rules.forbid,
            set,
            policy.to_string(),
            ["GUEST_POLICY_BIT_MISSING", "GUEST_POLICY_BIT_FORBIDDEN"],
        )
    }

    fn guest_policy_abi(&self) -> Check {
        let (major, minor) = self.report.policy().min_abi();
        let found = format!("{major}.{minor}");
        let Some(least) = self.rules().guest_policy.min_abi else {
            return Check::not_checked(GUEST_POLICY_ABI, "no minimum given", found);
        };
        judge(
            GUEST_POLICY_ABI,
            (major, minor) >= (least.major, least.minor),
            &format!(
                "the guest policy asks for firmware ABI {}.{} or later",
                least.major, least.minor
            ),
            found,
            "GUEST_POLICY_ABI_TOO_LOW",
        )
    }

    fn platform_bits(&self) -> Check {
        let rules = &self.rules().platform;
        let info = self.report.platform_info();
        let set = |bit: PlatformBit| info.has(bit);
        bits(
            PLATFORM_BITS,
            &rules.require,
            &rules.forbid,
            set,
            info.to_string(),
            ["PLATFORM_BIT_MISSING", "PLATFORM_BIT_FORBIDDEN"],
        )
    }

    /// A migration agent may export the guest's memory to wherever it likes.
    fn migration_agent(&self) -> Check {
        let found = if self.report.has_migration_agent() {
            format!("agent {}", hex::encode(self.report.report_id_ma()))
        } else {
            "none".to_owned()
        };
        if self.rules().migration_agent == Leave::Allow {
            let expected = "a migration agent is allowed";
            return Check::not_checked(MIGRATION_AGENT, expected, found);
        }
        judge(
            MIGRATION_AGENT,
            !self.report.has_migration_agent(),
            "no migration agent",
            found,
            "MIGRATION_AGENT_BOUND",
        )
    }

    fn launch(&self) -> [Check; 6] {
        let rules = &self.rules().launch;
        let report = self.report;
        [
            listed(
                HOST_DATA,
                rules.host_data.as_deref(),
                Hex(report.host_data()),
                "HOST_DATA_NOT_ALLOWED",
            ),
            listed(
                FAMILY_ID,
                rules.family_ids.as_deref(),
                Hex(report.family_id()),
                "FAMILY_ID_NOT_ALLOWED",
            ),
            listed(
                IMAGE_ID,
                rules.image_ids.as_deref(),
                Hex(report.image_id()),
                "IMAGE_ID_NOT_ALLOWED",
            ),
            match rules.min_guest_svn {
                Some(least) => judge(
                    GUEST_SVN,
                    report.guest_svn() >= least,
                    &format!("{least} or higher"),
                    report.guest_svn().to_string(),
                    "GUEST_SVN_TOO_LOW",
                ),
                None => Check::not_checked(
                    GUEST_SVN,
                    "no minimum given",
                    report.guest_svn().to_string(),
                ),
            },
            self.id_key(),
            self.author_key(),
        ]
    }

    fn id_key(&self) -> Check {
        let rules = &self.rules().launch;
        let id = Hex(self.report.id_key_digest());
        let missing = id.0 == [0; 48];
        if missing && (rules.require_id_key || rules.id_key_digests.is_some()) {
            return Check::rejected(
                ID_KEY,
                "an ID block, signed by an ID key",
                "the launch had none",
                "ID_KEY_MISSING",
            );
        }
        match &rules.id_key_digests {
            None if rules.require_id_key => {
                Check::accepted(ID_KEY, "an ID block, signed by any ID key", id.to_string())
            }
            allowed => listed(ID_KEY, allowed.as_deref(), id, "ID_KEY_NOT_ALLOWED"),
        }
    }

    fn author_key(&self) -> Check {
        let allowed = self.rules().launch.author_key_digests.as_deref();
        let author = Hex(self.report.author_key_digest());
        if allowed.is_some() && !self.report.has_author_key() {
            return Check::rejected(
                AUTHOR_KEY,
                "an author key behind the ID key",
                "the launch had none",
                "AUTHOR_KEY_MISSING",
            );
        }
        listed(AUTHOR_KEY, allowed, author, "AUTHOR_KEY_NOT_ALLOWED")
    }
}

fn listed<const N: usize>(
    name: &str,
    allowed: Option<&[Hex<N>]>,
    found: Hex<N>,
    code: &str,
) -> Check {
    match allowed {
        Some(allowed) => judge(
            name,
            allowed.contains(&found),
            &one_of(allowed),
            found.to_string(),
            code,
        ),
        None => Check::not_checked(name, "no list given", found.to_string()),
    }
}

fn firmware(
    name: &str,
    rule: Option<FirmwareVersion>,
    found: FirmwareVersion,
    code: &str,
) -> Check {
    let order = |version: FirmwareVersion| (version.major, version.minor, version.build);
    match rule {
        Some(least) => judge(
            name,
            order(found) >= order(least),
            &format!("{least} or later"),
            found.to_string(),
            code,
        ),
        None => Check::not_checked(name, "no minimum given", found.to_string()),
    }
}

fn mitigations(name: &str, rule: Option<u64>, found: Option<u64>, code: &str) -> Check {
    let text = found.map_or_else(
        || "this report version carries none".to_owned(),
        |mask| format!("{mask:#x}"),
    );
    let Some(wanted) = rule else {
        return Check::not_checked(name, "no mask given", text);
    };
    let expected = format!("every bit of {wanted:#x}");
    match found {
        Some(mask) => judge(name, mask & wanted == wanted, &expected, text, code),
        None => Check::rejected(name, &expected, text, "MITIGATIONS_UNREPORTED"),
    }
}

fn bits<B: Copy + Display>(
    name: &str,
    require: &[B],
    forbid: &[B],
    set: impl Fn(B) -> bool,
    found: String,
    [missing, forbidden]: [&str; 2],
) -> Check {
    if require.is_empty() && forbid.is_empty() {
        return Check::not_checked(name, "no bits named", found);
    }
    let expected = format!("set: {}; clear: {}", names(require), names(forbid));
    if let Some(bit) = require.iter().find(|bit| !set(**bit)) {
        return Check::rejected(name, &expected, format!("{found}: {bit} is clear"), missing);
    }
    match forbid.iter().find(|bit| set(**bit)) {
        Some(bit) => Check::rejected(name, &expected, format!("{found}: {bit} is set"), forbidden),
        None => Check::accepted(name, &expected, found),
    }
}

fn names<T: Display>(all: &[T]) -> String {
    if all.is_empty() {
        return "-".to_owned();
    }
    let texts: Vec<_> = all.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

/// A list in words; long ones are cut, the policy has them all.
fn one_of<T: Display>(allowed: &[T]) -> String {
    match allowed {
        [] => "nothing: the policy's list is empty".to_owned(),
        [one] => one.to_string(),
        all if all.len() <= SHOWN => format!("one of {}", names(all)),
        all => format!(
            "one of {} and {} more",
            names(all.get(..SHOWN).unwrap_or_default()),
            all.len() - SHOWN
        ),
    }
}

/// Entries of a list that are shown.
const SHOWN: usize = 4;

const REPORT_DATA: &str = "report_data";
const VMPL: &str = "vmpl";
const REPORT_VERSION: &str = "report_version";
const PRODUCT_ALLOWED: &str = "product_allowed";
const SIGNING_KEY_ALLOWED: &str = "signing_key_allowed";
const CSP_ID: &str = "csp_id";
const CHIP_ID: &str = "chip_id";
const TCB_REPORTED: &str = "tcb_reported";
const TCB_COMMITTED: &str = "tcb_committed";
const TCB_CURRENT: &str = "tcb_current";
const TCB_LAUNCH: &str = "tcb_launch";
const FIRMWARE_CURRENT: &str = "firmware_current";
const FIRMWARE_COMMITTED: &str = "firmware_committed";
const PROVISIONAL_FIRMWARE: &str = "provisional_firmware";
const MITIGATIONS_LAUNCH: &str = "mitigations_launch";
const MITIGATIONS_CURRENT: &str = "mitigations_current";
const GUEST_POLICY_BITS: &str = "guest_policy_bits";
const GUEST_POLICY_ABI: &str = "guest_policy_abi";
const PLATFORM_BITS: &str = "platform_bits";
const MIGRATION_AGENT: &str = "migration_agent";
const HOST_DATA: &str = "host_data";
const FAMILY_ID: &str = "family_id";
const IMAGE_ID: &str = "image_id";
const GUEST_SVN: &str = "guest_svn";
const ID_KEY: &str = "id_key";
const AUTHOR_KEY: &str = "author_key";
