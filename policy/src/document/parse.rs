//! From the text of a policy to [`HostPolicy`]: what is written, then the checks that look at more than one key.

use std::ops::Range;
use std::path::{Component, PathBuf};

use serde::{Deserialize, Deserializer, de};
use toml::Spanned;

use super::{
    Host, HostPolicy, IncomingDisk, IncomingNet, Limits, Migration, Peer, PeerPath, PolicyError,
    Sandbox, Technologies,
};
use crate::types::{DnsName, Fingerprint, Identity};

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
    host: Host,
    technologies: Technologies,
    #[serde(default)]
    sandbox: Sandbox,
    limits: Limits,
    #[serde(default)]
    migration: Migration,
    #[serde(default)]
    peer: Vec<Spanned<RawPeer>>,
    #[serde(default)]
    incoming_disk: Vec<Spanned<IncomingDisk>>,
    #[serde(default)]
    incoming_net: Vec<Spanned<IncomingNet>>,
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
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawPath {
    Direct,
    Gateway,
}

impl Document {
    fn check(self, file: &str, text: &str) -> Result<HostPolicy, PolicyError> {
        let refuse = |at: Range<usize>, problem: String| Err(invalid(file, text, at, problem));
        let mut peers: Vec<Peer> = Vec::new();
        for raw in self.peer {
            let at = raw.span();
            let peer = match raw.into_inner().check() {
                Ok(peer) => peer,
                Err(problem) => return refuse(at, problem),
            };
            if let Some(other) = peers
                .iter()
                .find(|p| p.name == peer.name || p.identity == peer.identity)
            {
                return refuse(
                    at,
                    format!(
                        "peer `{}` repeats the name or the identity of `{}`",
                        peer.name, other.name
                    ),
                );
            }
            peers.push(peer);
        }
        let mut incoming_disks: Vec<IncomingDisk> = Vec::new();
        for disk in self.incoming_disk {
            if incoming_disks
                .iter()
                .any(|d| d.id == disk.as_ref().id || d.path == disk.as_ref().path)
            {
                let problem = format!(
                    "disk `{}` repeats an id or a path; give each its own",
                    disk.as_ref().id
                );
                return refuse(disk.span(), problem);
            }
            incoming_disks.push(disk.into_inner());
        }
        let mut incoming_nets: Vec<IncomingNet> = Vec::new();
        for net in self.incoming_net {
            if incoming_nets.iter().any(|n| n.id == net.as_ref().id) {
                return refuse(
                    net.span(),
                    format!("network id `{}` is used twice", net.as_ref().id),
                );
            }
            incoming_nets.push(net.into_inner());
        }
        Ok(HostPolicy {
            host: self.host,
            technologies: self.technologies,
            sandbox: self.sandbox,
            limits: self.limits,
            migration: self.migration,
            peers,
            incoming_disks,
            incoming_nets,
            digest: Fingerprint::of(text.as_bytes()),
        })
    }
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
        })
    }
}

/// A short name that is safe in paths, logs and interface names.
pub(super) fn label<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    let good = (1..=64).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if good {
        Ok(text)
    } else {
        Err(de::Error::custom(
            "a name has 1 to 64 letters, digits, `-`, `_` or `.`, and starts with a letter or digit",
        ))
    }
}

/// A path that means the same from every directory.
pub(super) fn absolute_path<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(from)?;
    let climbs = path.components().any(|c| matches!(c, Component::ParentDir));
    if path.is_absolute() && !climbs {
        Ok(path)
    } else {
        Err(de::Error::custom(
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
mod tests {
    use std::path::Path;

    use super::super::MAX_DOCUMENT;
    use super::*;
    use crate::types::Technology;

    const GOOD: &str = r#"[host]
name = "site-a"

[technologies]
allowed = ["none", "sev"]
allow_emulated = true

[sandbox]
landlock_min_abi = 2

[limits]
max_vcpus = 4
max_memory_mib = 2048

[migration]
outgoing = true
incoming = true
downtime_limit_ms = 300
trusted_emulated_roots = ["sha256:1111111111111111111111111111111111111111111111111111111111111111"]

[[peer]]
name = "site-b"
san = "site-b.casemate.test"
spki = "sha256:2222222222222222222222222222222222222222222222222222222222222222"
path = "gateway"
gateway = { san = "gw.casemate.test", spki = "sha256:3333333333333333333333333333333333333333333333333333333333333333" }

[[incoming_disk]]
id = "data"
path = "/var/lib/casemate/data.img"

[[incoming_net]]
id = "net0"
bridge = "br0"
"#;

    fn refused(text: &str) -> (usize, String, String) {
        match HostPolicy::parse("p.toml", text) {
            Err(PolicyError::Invalid {
                file,
                line,
                key,
                problem,
            }) => {
                assert_eq!(file, "p.toml");
                (line, key, problem)
            }
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn a_whole_policy_parses() {
        let policy = HostPolicy::parse("p.toml", GOOD).unwrap();
        assert_eq!(policy.host.name, "site-a");
        assert!(
            policy.technologies.allowed.contains(&Technology::Sev)
                && policy.technologies.allow_emulated
        );
        assert_eq!(policy.migration.downtime_limit_ms.get(), 300);
        let peer = policy.peer_named("site-b").unwrap();
        assert_eq!(policy.peer_with(&peer.identity), Some(peer));
        assert_eq!(peer.tls_identity().san.as_str(), "gw.casemate.test");
        let mut stolen_name = peer.identity.clone();
        stolen_name.spki = peer.tls_identity().spki;
        assert_eq!(policy.peer_with(&stolen_name), None);
        assert_eq!(
            policy.incoming_disk("data").unwrap().path,
            Path::new("/var/lib/casemate/data.img")
        );
        assert_eq!(policy.digest(), Fingerprint::of(GOOD.as_bytes()));
    }

    #[test]
    fn defaults_are_the_closed_ones() {
        let text = "[host]\nname='h'\n[technologies]\nallowed=[]\n[limits]\nmax_vcpus=1\nmax_memory_mib=1\n";
        let policy = HostPolicy::parse("p.toml", text).unwrap();
        assert!(
            !policy.technologies.allow_emulated
                && !policy.migration.outgoing
                && !policy.migration.incoming
        );
        assert_eq!(
            (
                policy.sandbox.landlock_min_abi.get(),
                policy.migration.downtime_limit_ms.get()
            ),
            (1, 500)
        );
    }

    #[test]
    fn errors_name_line_key_and_remedy() {
        let cases = [
            (
                "outgoing = true",
                "outgoign = true",
                16,
                "migration.outgoign",
                "expected one of",
            ),
            (
                "max_vcpus = 4",
                "max_vcpus = 0",
                12,
                "limits.max_vcpus",
                "nonzero",
            ),
            (
                "max_vcpus = 4",
                "max_vcpus = \"4\"",
                12,
                "limits.max_vcpus",
                "expected",
            ),
            (
                "[\"none\", \"sev\"]",
                "[\"none\",\n \"tdx\"]",
                6,
                "technologies.allowed",
                "`sev-snp`",
            ),
            (
                "path = \"/var",
                "path = \"var",
                30,
                "incoming_disk.path",
                "absolute path",
            ),
            (
                "data.img",
                "../x",
                30,
                "incoming_disk.path",
                "absolute path",
            ),
            (
                "sha256:1111",
                "sha256:111",
                19,
                "migration.trusted_emulated_roots",
                "64 lower-case hex",
            ),
            (
                "site-b.casemate.test",
                "*.casemate.test",
                23,
                "peer.san",
                "lower-case labels",
            ),
            (
                "bridge = \"br0\"",
                "bridge = \"a-bridge-with-a-long-name\"",
                34,
                "incoming_net.bridge",
                "15",
            ),
            ("name = \"site-a\"", "", 1, "host", "missing field `name`"),
        ];
        for (from, to, line, key, remedy) in cases {
            let found = refused(&GOOD.replacen(from, to, 1));
            assert_eq!(
                (found.0, found.1.as_str()),
                (line, key),
                "{from} -> {to}: {}",
                found.2
            );
            assert!(found.2.contains(remedy), "{from} -> {to}: {}", found.2);
        }
    }

    #[test]
    fn gateway_is_there_exactly_when_the_path_says_so() {
        let gateway_line = GOOD.lines().find(|l| l.starts_with("gateway")).unwrap();
        let (line, key, problem) = refused(&GOOD.replace(gateway_line, ""));
        assert_eq!((line, key.as_str()), (21, "peer"));
        assert!(problem.contains("add gateway"), "{problem}");
        assert!(
            refused(&GOOD.replace("\"gateway\"", "\"direct\""))
                .2
                .contains("remove `gateway`")
        );
        assert!(
            refused(&GOOD.replace("3333", "2222"))
                .2
                .contains("its own gateway")
        );
    }

    #[test]
    fn repeated_entries_are_refused() {
        let peer = &GOOD[GOOD.find("[[peer]]").unwrap()..GOOD.find("[[incoming_disk]]").unwrap()];
        assert!(
            refused(&format!(
                "{GOOD}{}",
                peer.replace("\"site-b\"", "\"site-c\"")
            ))
            .2
            .contains("repeats")
        );
        assert!(
            refused(&format!("{GOOD}[[incoming_disk]]\nid='data'\npath='/x'\n"))
                .2
                .contains("repeats")
        );
        assert!(
            refused(&format!("{GOOD}[[incoming_net]]\nid='net0'\nbridge='b'\n"))
                .2
                .contains("twice")
        );
    }

    #[test]
    fn missing_and_huge_files_are_refused() {
        let missing = HostPolicy::load(Path::new("/nonexistent/policy.toml"))
            .unwrap_err()
            .to_string();
        assert!(missing.contains("/nonexistent/policy.toml"), "{missing}");
        let huge = "#".repeat(MAX_DOCUMENT as usize + 1);
        assert!(matches!(
            HostPolicy::parse("p", &huge),
            Err(PolicyError::TooLarge { .. })
        ));
    }
}
