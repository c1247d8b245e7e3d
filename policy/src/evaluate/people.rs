//! Whether this person may ask for this, and whether a second one agreed.

use super::{Code, Reason, short};
use crate::action::ActionKind;
use crate::claims::{Actor, Inquiry};
use crate::document::HostPolicy;
use crate::document::people::{People, Person, Role};

/// Every rule of `[people]` that applies; without that section only that nobody comes by a certificate, and none for a
/// peer's arrival.
pub(super) fn rules(policy: &HostPolicy, inquiry: &Inquiry) -> Vec<Reason> {
    let kind = inquiry.action.kind();
    let mut reasons = asking(policy, &inquiry.actor, kind, Some(&inquiry.object));
    if let Some(people) = policy.people().filter(|people| people.takes_two(kind)) {
        reasons.push(two_rule(people, people.find(&inquiry.actor), inquiry));
    }
    reasons
}

/// Whether somebody may ask for a kind of action at all; on this guest, if it is known which.
pub(super) fn asking(
    policy: &HostPolicy,
    actor: &Actor,
    kind: ActionKind,
    object: Option<&str>,
) -> Vec<Reason> {
    if matches!(kind, ActionKind::MigrateIn | ActionKind::MigrateSession) {
        return Vec::new();
    }
    let Some(people) = policy.people() else {
        return stranger_rule(actor).into_iter().collect();
    };
    let person = people.find(actor);
    // By its schedule a host replicates, and a guest that proves itself asks a broker; all else has a person behind it.
    let by_itself = [
        ActionKind::Replicate,
        ActionKind::Attest,
        ActionKind::ReleaseSecret,
    ];
    let scheduled = *actor == Actor::Host && by_itself.contains(&kind);
    let mut reasons = vec![Reason {
        rule: "person",
        wanted: "a [[person]] of this policy".to_owned(),
        found: match person {
            Some(person) => format!("{}, {actor}", person.name),
            None => actor.to_string(),
        },
        allows: person.is_some() || scheduled,
        code: Code::PersonUnknown,
        remedy: "add a [[person]] with this uid, san or spki",
    }];
    if let Some(person) = person {
        reasons.push(role_rule(person, kind));
        if let Some(guest) = object.filter(|_| kind.of_a_guest()) {
            reasons.push(guest_rule(person, guest));
        }
    }
    reasons
}

/// Without people, the kernel says who may reach the agent's socket; nothing says it of a certificate.
fn stranger_rule(actor: &Actor) -> Option<Reason> {
    matches!(actor, Actor::Certificate { .. }).then(|| Reason {
        rule: "person",
        wanted: "a [[person]] of this policy".to_owned(),
        found: actor.to_string(),
        allows: false,
        code: Code::PersonUnknown,
        remedy: "add a [[person]] with this san and spki",
    })
}

fn role_rule(person: &Person, kind: ActionKind) -> Reason {
    let narrowed = person.role.may(kind) && !person.may(kind);
    Reason {
        rule: if narrowed {
            "person.actions"
        } else {
            "person.role"
        },
        wanted: format!("somebody who may {}", kind.as_str()),
        found: match narrowed {
            true => format!("{}, whose `actions` leave it out", person.role),
            false => person.role.to_string(),
        },
        allows: person.may(kind),
        code: Code::RoleNotAllowed,
        remedy: "ask somebody with that role",
    }
}

fn guest_rule(person: &Person, guest: &str) -> Reason {
    let wanted = match &person.guests {
        None => "any guest".to_owned(),
        Some(all) => super::listing("one of", all.iter()),
    };
    Reason {
        rule: "person.guests",
        wanted,
        found: format!("{:?}", short(guest)),
        allows: person.may_touch(guest),
        code: Code::GuestNotTheirs,
        remedy: "ask somebody who may act on this guest",
    }
}

fn two_rule(people: &People, first: Option<&Person>, inquiry: &Inquiry) -> Reason {
    let kind = inquiry.action.kind();
    let may = |second: &&Person| {
        first.is_some_and(|first| first.name != second.name)
            && second.may(ActionKind::Approve)
            && (second.role == Role::SecurityOfficer || second.may(kind))
            && (!kind.of_a_guest() || second.may_touch(&inquiry.object))
    };
    let mut agreed = inquiry.approvals.iter().filter_map(|a| people.find(a));
    let second = agreed.find(may);
    Reason {
        rule: "people.two_person",
        wanted: "the approval of a second person who may do or approve it".to_owned(),
        found: second.map_or_else(|| "none".to_owned(), |p| format!("{}'s", p.name)),
        allows: second.is_some(),
        code: Code::ApprovalMissing,
        remedy: "have a second person approve this very action",
    }
}
