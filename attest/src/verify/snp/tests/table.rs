//! The documented table of checks is the code's.

use super::*;
use std::collections::BTreeSet;

/// How many checks each verdict lists.
pub(super) const CHECKS: usize = floor::FLOOR.len() + 1 + owner::NAMES.len();

const HERE: &str = include_str!("../mod.rs");

#[test]
fn every_verdict_lists_every_check_once() {
    let verdict = vector("genoa-v5").verdict(&Against::default());
    let names: BTreeSet<_> = verdict.checks.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names.len(), verdict.checks.len());
    let documented: BTreeSet<_> = rows().into_iter().map(|row| row.0).collect();
    assert_eq!(names, documented);
    assert_eq!(verdict.checks.len(), CHECKS);
}

#[test]
fn the_table_says_what_the_floor_is_and_has_every_code() {
    let floor: BTreeSet<_> = floor::FLOOR.into_iter().collect();
    let mut codes = BTreeSet::new();
    for (name, is_floor, listed) in rows() {
        assert_eq!(is_floor, floor.contains(name), "{name}");
        codes.extend(listed);
    }
    let sources = [
        include_str!("../../floor.rs"),
        include_str!("../certificates.rs"),
        include_str!("../measurement.rs"),
        include_str!("../owner.rs"),
    ];
    let written: BTreeSet<_> = sources.into_iter().flat_map(literals).collect();
    assert_eq!(codes, written);
}

/// Name, floor, codes of each row of the module's documentation.
fn rows() -> Vec<(&'static str, bool, Vec<&'static str>)> {
    let line = |line: &'static str| {
        let mut cells = line.strip_prefix("//! | `")?.split(" | ");
        let name = cells.next()?.trim_end_matches('`');
        let floor = cells.next()? == "yes";
        let codes = cells.next()?.split('`');
        Some((name, floor, codes.filter(|text| is_code(text)).collect()))
    };
    HERE.lines().filter_map(line).collect()
}

/// The string literals of a source file that look like codes.
fn literals(source: &'static str) -> impl Iterator<Item = &'static str> {
    source.split('"').filter(|text| is_code(text))
}

fn is_code(text: &str) -> bool {
    text.len() > 5
        && text.contains('_')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte == b'_')
}
