//! Holds `THREATS.md` against the tests it names.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

#[test]
fn every_test_that_a_claim_names_is_there() {
    let mut tests = BTreeSet::new();
    for folder in ["src", "tests", "../host", "../tests"] {
        collect(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(folder),
            &mut tests,
        );
    }
    let (_, claims) = DOCUMENT.split_once("## Claims").unwrap();
    let rows: Vec<&str> = claims.lines().filter(|line| line.contains('`')).collect();
    assert!(rows.len() > 30);
    for row in rows {
        let (_, named) = row.trim_end_matches([' ', '|']).rsplit_once('|').unwrap();
        for name in named.split('`').skip(1).step_by(2) {
            assert!(tests.contains(name), "no test or fuzz target `{name}`");
        }
    }
}

/// The functions marked as tests, and the fuzz targets.
fn collect(folder: &Path, tests: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, tests);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let marked = text.split("#[test]").skip(1);
            tests.extend(marked.filter_map(|rest| {
                let (_, name) = rest.split_once("fn ")?;
                Some(name.split_once('(')?.0.to_owned())
            }));
            if path
                .parent()
                .is_some_and(|parent| parent.ends_with("fuzz_targets"))
            {
                tests.extend(
                    path.file_stem()
                        .and_then(|stem| Some(stem.to_str()?.to_owned())),
                );
            }
        }
    }
}

const DOCUMENT: &str = include_str!("../THREATS.md");
