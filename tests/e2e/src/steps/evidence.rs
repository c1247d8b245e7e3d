//! Step 8: the evidence of the whole run, in bundles that an auditor verifies elsewhere, and every way to forge one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;
use serde_json::Value;

use crate::demo::Demo;
use crate::error::{E2eError, OnFile, Result, io};
use crate::forger::{Forger, Forgery};
use crate::owner::text;
use crate::site::Site;
use crate::world::Host;

/// Where the bundles go, and who verifies them besides `casemate`.
#[derive(Clone, Debug)]
pub struct EvidenceFolder {
    /// The folder that bundles are written to.
    pub write: PathBuf,
    /// The same folder, as whoever reads the demo's answer finds it.
    pub found_at: PathBuf,
    /// The independent verifier.
    pub verifier: PathBuf,
}

/// A bundle with what its auditor has besides it.
#[derive(Clone, Debug, Serialize)]
pub struct Bundle {
    /// The host.
    pub host: &'static str,
    /// The bundle, a tar file.
    pub bundle: PathBuf,
    /// The log's public key.
    pub key: PathBuf,
    /// The checkpoint that the auditor kept while the demo ran.
    pub checkpoint: PathBuf,
    /// OSCAL assessment results.
    pub oscal: PathBuf,
    /// The same for people.
    pub report: PathBuf,
}

impl EvidenceFolder {
    /// The bundle of a host, in the folder or as it is found later.
    fn bundle(folder: &Path, host: &'static str) -> Bundle {
        let file = |ending: &str| folder.join(format!("{host}.{ending}"));
        Bundle {
            host,
            bundle: file("tar"),
            key: file("tar.pub"),
            checkpoint: file("tar.note"),
            oscal: file("oscal.json"),
            report: file("html"),
        }
    }
}

/// While the demo is young: an older bundle of each host, for the forger.
pub(crate) fn begin(demo: &Demo) -> Result<()> {
    fs::create_dir_all(&demo.evidence.write).on("create", &demo.evidence.write)?;
    each_site(demo, |demo, site| {
        let old = older(demo, site);
        site.done(&["evidence", "export", &ledger(site)?, "--out", text(&old)?])
            .map(drop)
    })
}

/// When much has happened: the auditor keeps a checkpoint of each log.
pub(crate) fn keep(demo: &Demo) -> Result<()> {
    each_site(demo, |demo, site| {
        let said = site.done(&["evidence", "checkpoint", &ledger(site)?])?;
        let kept = EvidenceFolder::bundle(&demo.evidence.write, site.name()).checkpoint;
        fs::write(&kept, said.stdout).on("write", &kept)
    })
}

pub(crate) fn run(demo: &mut Demo) -> Result<()> {
    for host in [Host::A, Host::B, Host::BGw] {
        hand_over(demo, host)?;
    }
    forgeries(demo)
}

fn each_site(demo: &Demo, mut act: impl FnMut(&Demo, &Site) -> Result<()>) -> Result<()> {
    for host in [Host::A, Host::B, Host::BGw] {
        act(demo, demo.world.site(host)?)?;
    }
    Ok(())
}

/// Exports a host's ledger, and verifies it as an auditor does.
fn hand_over(demo: &mut Demo, host: Host) -> Result<()> {
    let site = demo.world.site(host)?;
    let name = site.name();
    let here = EvidenceFolder::bundle(&demo.evidence.write, name);
    let key = format!("{}.pub", ledger(site)?);
    fs::copy(&key, &here.key).on("copy", Path::new(&key))?;
    let bundle = text(&here.bundle)?;
    let exported: Value = site.ask(&[
        "evidence",
        "export",
        &ledger(site)?,
        "--key",
        text(&here.key)?,
        "--checkpoint",
        text(&here.checkpoint)?,
        "--out",
        bundle,
    ])?;
    let verdicts = verdicts(demo, site, &here.bundle)?;
    let oscal = report(site, &here)?;
    let records = exported.get("records").and_then(Value::as_u64);
    let found = format!(
        "{} records, {}",
        records.unwrap_or_default(),
        verdicts.found
    );
    let whole = verdicts.ours == 0 && verdicts.independent == 0 && records > Some(0);
    demo.table
        .check(8, &format!("{name}: both verifiers accept"), whole, found);
    let there = match oscal {
        Ok(()) => String::new(),
        Err(ref why) => why.clone(),
    };
    demo.table.check(
        8,
        &format!("{name}: valid OSCAL assessment results"),
        oscal.is_ok(),
        there,
    );
    let found_at = EvidenceFolder::bundle(&demo.evidence.found_at, name);
    demo.table.evidence(found_at);
    Ok(())
}

/// Both reports; what is wrong with the OSCAL one by NIST's schema.
fn report(site: &Site, bundle: &Bundle) -> Result<std::result::Result<(), String>> {
    for (format, to) in [("html", &bundle.report), ("oscal", &bundle.oscal)] {
        let arguments = ["evidence", "report", text(&bundle.bundle)?];
        let options = ["--key", text(&bundle.key)?, "--format", format];
        site.done(&[&arguments[..], &options, &["--out", text(to)?]].concat())?;
    }
    let wrong = |error: &dyn std::fmt::Display| E2eError::Answer(format!("OSCAL: {error}"));
    let schema: Value = serde_json::from_str(OSCAL_SCHEMA).map_err(|e| wrong(&e))?;
    let validator = jsonschema::validator_for(&schema).map_err(|e| wrong(&e))?;
    let document = fs::read(&bundle.oscal).on("read", &bundle.oscal)?;
    let document: Value = serde_json::from_slice(&document).map_err(|e| wrong(&e))?;
    Ok(match validator.iter_errors(&document).next() {
        None => Ok(()),
        Some(error) => Err(format!("{}: {error}", error.instance_path())),
    })
}

/// Whoever can write to the bundle of site-a, and to its host, forges; nobody believes it.
fn forgeries(demo: &mut Demo) -> Result<()> {
    let site = &demo.world.site_a;
    let here = EvidenceFolder::bundle(&demo.evidence.write, site.name());
    let folder = demo.world.folder.join("forger");
    fs::create_dir_all(&folder).on("create", &folder)?;
    let forged = folder.join("forged.tar");
    for (from, ending) in [(&here.key, "pub"), (&here.checkpoint, "note")] {
        fs::copy(from, folder.join(format!("forged.tar.{ending}"))).on("copy", from)?;
    }
    let key = site.folder().join("state/ledger.key");
    let forger = Forger {
        bundle: &here.bundle,
        older: &older(demo, site),
        key: &key,
        folder: &folder,
    };
    let mut checks = Vec::new();
    for forgery in Forgery::ALL {
        forger.forge(forgery, &forged)?;
        let verdicts = verdicts(demo, site, &forged)?;
        let refused = verdicts.ours == 1 && verdicts.independent == 1;
        checks.push((forgery.words(), refused, verdicts.found));
    }
    for (words, refused, found) in checks {
        let name = format!("{words}: both verifiers refuse");
        demo.table.check(8, &name, refused, found);
    }
    Ok(())
}

/// The exit statuses of both verifiers.
struct Verdicts {
    ours: i32,
    independent: i32,
    found: String,
}

/// The plain command, which finds key and checkpoint beside the bundle, and the independent verifier, which is told.
fn verdicts(demo: &Demo, site: &Site, bundle: &Path) -> Result<Verdicts> {
    let beside = |ending: &str| PathBuf::from(format!("{}.{ending}", bundle.display()));
    let ours = site.casemate(&["evidence", "verify", text(bundle)?])?;
    let independent = Command::new(&demo.evidence.verifier)
        .args([bundle, &beside("pub"), &beside("note")])
        .output()
        .map_err(io("run the independent verifier"))?;
    let status = independent.status.code().unwrap_or(-1);
    let said = String::from_utf8_lossy(&independent.stderr);
    let found = match ours.status {
        0 => "verified".to_owned(),
        _ => format!("{}; {}", ours.code(), said.trim()),
    };
    Ok(Verdicts {
        ours: ours.status,
        independent: status,
        found,
    })
}

fn ledger(site: &Site) -> Result<String> {
    text(&site.folder().join("state/ledger")).map(str::to_owned)
}

fn older(demo: &Demo, site: &Site) -> PathBuf {
    demo.world.folder.join(format!("{}-older.tar", site.name()))
}

/// NIST's, release 1.2.3.
const OSCAL_SCHEMA: &str =
    include_str!("../../../evidence-verify/schema/oscal_assessment-results_schema.json");
