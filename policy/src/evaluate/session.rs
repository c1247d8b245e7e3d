//! Whether a move may go over the session that two hosts have agreed on: decided at both ends before a page travels.

use super::{Code, Reason, claimed_rule, known_rule, listing};
use crate::action::Action;
use crate::claims::{Inquiry, SessionClaims};
use crate::document::{HostPolicy, Peer};

/// The rules of a session; none for other actions.
pub(super) fn rules(policy: &HostPolicy, inquiry: &Inquiry) -> Vec<Reason> {
    let session = inquiry.session.as_ref();
    let mut reasons = match &inquiry.action {
        Action::MigrateSession { peer_name, .. } => {
            agreed_rules(policy.peer_named(peer_name), session)
        }
        // Who comes, and over whom, is in the action.
        Action::MigrateIn { .. } => Vec::new(),
        _ => return Vec::new(),
    };
    let lists = [
        (
            "migration.suites",
            &policy.migration.suites,
            session.map(|s| &s.suite),
        ),
        (
            "migration.groups",
            &policy.migration.groups,
            session.map(|s| &s.group),
        ),
    ];
    reasons.extend(lists.into_iter().filter_map(|(rule, allowed, found)| {
        let allowed = allowed.as_ref()?;
        Some(claimed_rule(
            rule,
            listing("one of", allowed.iter()),
            found.cloned(),
            found.is_some_and(|found| allowed.contains(found)),
            Code::SessionNotAllowed,
            "update the older of the two hosts, or add it to the list",
        ))
    }));
    reasons.extend(policy.migration.provider.map(|provider| {
        let found = session.map(|session| session.provider.clone());
        claimed_rule(
            "migration.provider",
            provider.as_str().to_owned(),
            found.clone(),
            found.as_deref() == Some(provider.as_str()),
            Code::SessionNotAllowed,
            "build this host with the cargo feature aws-lc, or name the provider that it has",
        )
    }));
    reasons
}

/// The session must be with the peer that was named, and its TLS with whom that peer's path says.
fn agreed_rules(peer: Option<&Peer>, session: Option<&SessionClaims>) -> Vec<Reason> {
    let Some(peer) = peer else {
        // That no such peer is known is a reason already.
        return Vec::new();
    };
    let (same, ended) = match session {
        Some(session) => (
            session.peer == peer.identity,
            session.tls == *peer.tls_identity(),
        ),
        None => (false, false),
    };
    let mut reasons = vec![known_rule(
        session.map_or_else(|| "not known".to_owned(), |s| s.peer.to_string()),
        same,
    )];
    reasons.push(claimed_rule(
        "peer.path",
        format!("TLS terminated by {}", peer.tls_identity()),
        session.map(|session| session.tls.to_string()),
        ended,
        Code::PeerPathMismatch,
        "a relay must be named: path = \"gateway\" and its identity in the [[peer]]",
    ));
    reasons
}
