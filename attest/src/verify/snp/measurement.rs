//! The launch digest: in the policy's list, or in reference values that signers of the policy's
//! choice signed.

use super::owner::Owner;
use crate::measure::guest::GuestDigest;
use crate::measure::snp::SnpLaunchDigest;
use crate::reference::{ReferenceGuest, ReferenceValues};
use crate::verify::policy::Hex;
use crate::verify::verdict::Check;

pub(super) fn check(owner: &Owner<'_>) -> Check {
    let found = Hex(owner.report.measurement());
    let rules = owner.rules();
    let given = owner.references.len();
    if rules.measurements.is_none() && rules.reference_signers.is_none() && given == 0 {
        let expected = "neither measurements nor reference values given";
        return Check::not_checked(MEASUREMENT, expected, found.to_string());
    }
    let counted: Vec<_> = owner
        .references
        .iter()
        .filter(|v| counts(owner, v))
        .collect();
    let expected = format!(
        "one of the policy's {} digests, or of {} reference value files{}",
        rules.measurements.as_ref().map_or(0, Vec::len),
        counted.len(),
        match given - counted.len() {
            0 => String::new(),
            ignored => format!(
                " ({ignored} more do not count: not signed by enough of the policy's \
                 reference_signers, or not in force)"
            ),
        }
    );
    if rules.measurements.iter().flatten().any(|one| *one == found) {
        let found = format!("{found}, which the policy lists");
        return Check::accepted(MEASUREMENT, &expected, found);
    }
    let digest = GuestDigest::Snp(SnpLaunchDigest::new(found.0));
    let mut other_key = None;
    for values in counted {
        for (guest, _) in values.find(digest) {
            if keys_fit(owner, guest) {
                let found = format!("{found}, `{}` of {:?}", guest.name, values.signers());
                return Check::accepted(MEASUREMENT, &expected, found);
            }
            other_key = Some(&guest.name);
        }
    }
    match other_key {
        Some(name) => Check::rejected(
            MEASUREMENT,
            &expected,
            format!("{found}, `{name}`, but with another ID key or author key than it must have"),
            "REFERENCE_KEY_MISMATCH",
        ),
        None => Check::rejected(
            MEASUREMENT,
            &expected,
            found.to_string(),
            "MEASUREMENT_NOT_ALLOWED",
        ),
    }
}

/// Enough of the signers that the policy names, and in force. Reference values that nobody named a
/// signer for never widen a policy.
fn counts(owner: &Owner<'_>, values: &ReferenceValues) -> bool {
    let rules = owner.rules();
    let named = rules.reference_signers.as_deref().unwrap_or_default();
    let signed = values.signers().iter().filter(|key| named.contains(key));
    let document = values.document();
    signed.count() >= rules.reference_threshold()
        && (document.not_before.time()..document.expires.time()).contains(&owner.clock)
}

fn keys_fit(owner: &Owner<'_>, guest: &ReferenceGuest) -> bool {
    let report = owner.report;
    let id = guest.id_key_digest;
    let author = guest.author_key_digest;
    id.is_none_or(|key| *key.as_bytes() == report.id_key_digest())
        && author.is_none_or(|key| {
            report.has_author_key() && *key.as_bytes() == report.author_key_digest()
        })
}

pub(super) const MEASUREMENT: &str = "measurement";
