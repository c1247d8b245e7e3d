//! The ACPI tables as ACPICA reads them: its compiler takes each apart and puts the DSDT together again, without an
//! error or a warning. Needs `iasl`, below `CASEMATE_JUDGES` (as in `cargo verify`) or in `PATH`; says which it used, or that
//! it found none.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests end where they fail"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use casemate::vmm::boot::acpi::{Slots, tables};

#[test]
fn acpica_reads_every_table_without_a_warning() {
    let Some(iasl) = iasl() else {
        eprintln!("skipped: no iasl here");
        return;
    };
    eprintln!("with {}", iasl.display());
    let slots = Slots { first: 9, count: 8 };
    for (vcpus, generation, slots) in [(1, true, slots), (64, false, Slots::NONE)] {
        let folder = tempfile::tempdir().unwrap();
        let blob = tables(vcpus, generation, slots, BASE);
        for (name, table) in found(&blob) {
            std::fs::write(folder.path().join(format!("{name}.dat")), table).unwrap();
            let said = run(&iasl, folder.path(), &["-d", &format!("{name}.dat")]);
            assert!(
                !said.contains("Invalid") && !said.contains("Error"),
                "{name}: {said}"
            );
            let text = std::fs::read_to_string(folder.path().join(format!("{name}.dsl"))).unwrap();
            assert!(
                !text.contains("Unknown") && !text.contains("Incorrect"),
                "{text}"
            );
        }
        let said = run(&iasl, folder.path(), &["-we", "-vw", "3133", "DSDT.dsl"]);
        assert!(said.contains("0 Errors, 0 Warnings"), "{said}");
        let text = std::fs::read_to_string(folder.path().join("DSDT.dsl")).unwrap();
        for device in ["PCI0", "PWRB", "GED", "COM1"] {
            assert!(text.contains(&format!("Device (\\_SB.{device}")), "{text}");
        }
        assert_eq!(text.contains("VM_Gen_Counter"), generation);
        assert_eq!(
            text.matches("Method (_EJ0, 1").count(),
            usize::from(slots.count)
        );
        assert_eq!(text.contains("_SB.PCI0.SCAN ()"), slots.count > 0, "{text}");
    }
}

/// Name and bytes of the tables, found as an operating system finds them.
fn found(blob: &[u8]) -> Vec<(String, &[u8])> {
    let at = |address: &[u8]| {
        let start = (u64::from_le_bytes(address.try_into().unwrap()) - BASE) as usize;
        let length = u32::from_le_bytes(blob[start + 4..start + 8].try_into().unwrap());
        &blob[start..start + length as usize]
    };
    let xsdt = at(&blob[24..32]);
    let mut tables: Vec<&[u8]> = xsdt[36..].chunks(8).map(at).collect();
    let fadt = tables.iter().find(|table| table.starts_with(b"FACP"));
    tables.push(at(&fadt.unwrap()[140..148]));
    let name = |table: &[u8]| String::from_utf8(table[..4].to_vec()).unwrap();
    tables.iter().map(|table| (name(table), *table)).collect()
}

fn run(iasl: &Path, folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new(iasl)
        .current_dir(folder)
        .args(arguments)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&said).into_owned()
}

fn iasl() -> Option<PathBuf> {
    let judges = std::env::var_os("CASEMATE_JUDGES").map(PathBuf::from);
    let fetched = judges.map(|folder| folder.join("usr/bin/iasl"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&path).map(|folder| folder.join("iasl"));
    let mut all = fetched.into_iter().chain(installed);
    all.find(|path| path.exists())
        .map(|path| std::path::absolute(path).unwrap())
}

const BASE: u64 = 0xe_0000;
