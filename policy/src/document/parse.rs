//! From the text of a policy to [`HostPolicy`]: what is written, then the checks that look at more than one key.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Component, PathBuf};

use serde::{Deserialize, Deserializer, de};
use toml::Spanned;

use super::guest::{GuestBook, GuestRules};
use super::people::{People, Person};
use super::{
    Files, FirmwareMinimum, Host, HostPolicy, IncomingDisk, IncomingNet, Limits, Migration, Peer,
    PeerPath, PolicyError, Sandbox, Technologies, Validity,
};
use crate::action::ActionKind;
use crate::types::{DnsName, Fingerprint, Identity, Timestamp};

/// Parses and checks a whole document.
pub(super) fn document(file: &str, text: &str) -> Result<HostPolicy, PolicyError> {
    let document: Document = toml::from_str(text).map_err(|error| {
        let at = error.span().unwrap_or(0..0);
        invalid(file, text, at, error.message().to_owned())
    })?;
    document.check(file, text)
}

/// The file as written, before the checks that look at more than one key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    version: u64,
    not_before: Option<Timestamp>,
    not_after: Option<Spanned<Timestamp>>,
    host: Host,
    technologies: Technologies,
    #[serde(default)]
    sandbox: Sandbox,
    limits: Limits,
    #[serde(default)]
    files: Files,
    #[serde(default)]
    migration: Migration,
    #[serde(default)]
    peer: Vec<Spanned<RawPeer>>,
    #[serde(default)]
    incoming_disk: Vec<Spanned<IncomingDisk>>,
    #[serde(default)]
    incoming_net: Vec<Spanned<IncomingNet>>,
    #[serde(default)]
    firmware: Vec<Spanned<FirmwareMinimum>>,
    guest: Option<Vec<Spanned<GuestRules>>>,
    people: Option<Spanned<RawPeople>>,
    person: Option<Vec<Spanned<Person>>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPeople {
    #[serde(default)]
    two_person: BTreeSet<ActionKind>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPeer {
    #[serde(deserialize_with = "label")]
    name: String,
    san: DnsName,
    spki: Fingerprint,
    path: RawPath,
    gateway: Option<Identity>,
    #[serde(default, deserialize_with = "optional_label")]
    site: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawPath {
    Direct,
    Gateway,
}

impl Document {
    fn check(self, file: &str, text: &str) -> Result<HostPolicy, PolicyError> {
        let refuse = |(at, problem): Refused| invalid(file, text, at, problem);
        let validity = validity(self.not_before, self.not_after).map_err(refuse)?;
        let peers = each(self.peer, RawPeer::check, peer_repeats).map_err(refuse)?;
        let incoming_disks = each(self.incoming_disk, Ok, disk_repeats).map_err(refuse)?;
        let incoming_nets = each(self.incoming_net, Ok, net_repeats).map_err(refuse)?;
        let firmware = each(self.firmware, Ok, firmware_repeats).map_err(refuse)?;
        let names: BTreeSet<&str> = peers.iter().map(|peer| peer.name.as_str()).collect();
        let guests = self.guest.map(|all| {
            let check = |rules: GuestRules| rules.check(&names).map(|()| rules);
            each(all, check, guest_repeats).map(GuestBook::new)
        });
        let guests = guests.transpose().map_err(refuse)?;
        let people = people(self.people, self.person).map_err(refuse)?;
        Ok(HostPolicy {
            version: self.version,
            validity,
            host: self.host,
            technologies: self.technologies,
            sandbox: self.sandbox,
            limits: self.limits,
            files: self.files,
            migration: self.migration,
            peers,
            incoming_disks,
            incoming_nets,
            firmware,
            guests,
            people,
            digest: Fingerprint::of(text.as_bytes()),
        })
    }
}

/// Where a document is wrong, and why.
type Refused = (Range<usize>, String);

/// Checks every section by itself and against those before it.
fn each<R, T>(
    sections: Vec<Spanned<R>>,
    check: impl Fn(R) -> Result<T, String>,
    repeats: impl Fn(&T, &[T]) -> Option<String>,
) -> Result<Vec<T>, Refused> {
    let mut good = Vec::with_capacity(sections.len());
    for section in sections {
        let at = section.span();
        let one = check(section.into_inner()).map_err(|problem| (at.clone(), problem))?;
        if let Some(problem) = repeats(&one, &good) {
            return Err((at, problem));
        }
        good.push(one);
    }
    Ok(good)
}

fn peer_repeats(peer: &Peer, before: &[Peer]) -> Option<String> {
    let other = before
        .iter()
        .find(|p| p.name == peer.name || p.identity == peer.identity)?;
    Some(format!(
        "peer `{}` repeats the name or the identity of `{}`",
        peer.name, other.name
    ))
}

fn disk_repeats(disk: &IncomingDisk, before: &[IncomingDisk]) -> Option<String> {
    let mut before = before.iter();
    before.find(|d| d.id == disk.id || d.path == disk.path)?;
    Some(format!(
        "disk `{}` repeats an id or a path; give each its own",
        disk.id
    ))
}

fn net_repeats(net: &IncomingNet, before: &[IncomingNet]) -> Option<String> {
    before.iter().find(|n| n.id == net.id)?;
    Some(format!("network id `{}` is used twice", net.id))
}

fn firmware_repeats(minimum: &FirmwareMinimum, before: &[FirmwareMinimum]) -> Option<String> {
    let mut before = before.iter();
    before.find(|m| m.technology == minimum.technology)?;
    Some(format!(
        "firmware for {} is described twice; keep the higher one",
        minimum.technology
    ))
}

fn guest_repeats(rules: &GuestRules, before: &[GuestRules]) -> Option<String> {
    let of_owner = before.iter().filter(|other| other.owner == rules.owner);
    let pattern = of_owner.flat_map(|other| rules.names.intersection(&other.names));
    let pattern = pattern.into_iter().next()?;
    Some(format!(
        "`{}` has rules for `{pattern}` already; put them into one [[guest]]",
        rules.owner
    ))
}

fn validity(
    not_before: Option<Timestamp>,
    not_after: Option<Spanned<Timestamp>>,
) -> Result<Validity, Refused> {
    if let (Some(begin), Some(end)) = (not_before, &not_after)
        && *end.as_ref() <= begin
    {
        let problem = format!("the policy ends before it begins, at {begin}; exchange them");
        return Err((end.span(), problem));
    }
    Ok(Validity {
        not_before,
        not_after: not_after.map(Spanned::into_inner),
    })
}

/// `[people]` and `[[person]]`: either of them brings the people section into force.
fn people(
    section: Option<Spanned<RawPeople>>,
    persons: Option<Vec<Spanned<Person>>>,
) -> Result<Option<People>, Refused> {
    if section.is_none() && persons.is_none() {
        return Ok(None);
    }
    let mut good: Vec<Person> = Vec::new();
    for person in persons.into_iter().flatten() {
        let at = person.span();
        let person = person.into_inner();
        person.check(&good).map_err(|problem| (at, problem))?;
        good.push(person);
    }
    let at = section.as_ref().map_or(0..0, Spanned::span);
    let two_person = section.map(|s| s.into_inner().two_person);
    People::new(good, two_person.unwrap_or_default())
        .map(Some)
        .map_err(|problem| (at, problem))
}

impl RawPeer {
    fn check(self) -> Result<Peer, String> {
        let identity = Identity {
            san: self.san,
            spki: self.spki,
        };
        let path = match (self.path, self.gateway) {
            (RawPath::Direct, None) => PeerPath::Direct,
            (RawPath::Direct, Some(_)) => {
                return Err(format!(
                    "peer `{}` has path = \"direct\" and a gateway; remove `gateway` or write path = \"gateway\"",
                    self.name
                ));
            }
            (RawPath::Gateway, None) => {
                return Err(format!(
                    "peer `{}` has path = \"gateway\" but names none; add gateway = {{ san = \"…\", spki = \"sha256:…\" }}",
                    self.name
                ));
            }
            (RawPath::Gateway, Some(gateway)) if gateway.spki == identity.spki => {
                return Err(format!(
                    "peer `{}` is its own gateway; write path = \"direct\"",
                    self.name
                ));
            }
            (RawPath::Gateway, Some(gateway)) => PeerPath::Gateway(gateway),
        };
        Ok(Peer {
            name: self.name,
            identity,
            path,
            site: self.site,
        })
    }
}

/// A short name that is safe in paths, logs and interface names.
pub(super) fn label<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    if is_label(&text) {
        Ok(text)
    } else {
        Err(de::Error::custom(
            "a name has 1 to 64 letters, digits, `-`, `_` or `.`, and starts with a letter or digit",
        ))
    }
}

/// Whether a text is such a name.
pub(super) fn is_label(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// A name that may be left out.
pub(super) fn optional_label<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<String>, D::Error> {
    label(from).map(Some)
}

/// A list of folders that may be left out.
pub(super) fn optional_folders<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<Vec<PathBuf>>, D::Error> {
    let folders = Vec::<PathBuf>::deserialize(from)?;
    let checked = folders.into_iter().map(absolute);
    checked.collect::<Result<_, D::Error>>().map(Some)
}

/// A path that means the same from every directory.
pub(super) fn absolute_path<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    absolute(PathBuf::deserialize(from)?)
}

fn absolute<E: de::Error>(path: PathBuf) -> Result<PathBuf, E> {
    let climbs = path.components().any(|c| matches!(c, Component::ParentDir));
    if path.is_absolute() && !climbs {
        Ok(path)
    } else {
        Err(E::custom(
            "write an absolute path without `..`, such as \"/var/lib/casemate/data.img\"",
        ))
    }
}

/// A name the kernel accepts for a network interface.
pub(super) fn interface<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = label(from)?;
    if text.len() <= 15 {
        Ok(text)
    } else {
        Err(de::Error::custom(
            "an interface name has at most 15 characters",
        ))
    }
}

fn invalid(file: &str, text: &str, at: Range<usize>, problem: String) -> PolicyError {
    let before = text.get(..at.start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    PolicyError::Invalid {
        file: file.to_owned(),
        line,
        key: key_at(text, line),
        problem,
    }
}

/// The key written on a line (or on the nearest line above that opens its value), with its section.
fn key_at(text: &str, line: usize) -> String {
    let mut key = None;
    for written in text
        .lines()
        .take(line)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
    {
        let written = written.trim();
        if let Some(section) = written
            .strip_prefix('[')
            .and_then(|rest| rest.split(']').next())
        {
            let section = section.trim_matches(['[', ']', ' ']);
            return key.map_or_else(|| section.to_owned(), |key| format!("{section}.{key}"));
        }
        if key.is_none() && !written.starts_with('#') {
            key = written
                .split_once('=')
                .map(|(name, _)| name.trim().to_owned());
        }
    }
    key.unwrap_or_else(|| "document".to_owned())
}

#[cfg(test)]
mod tests;
