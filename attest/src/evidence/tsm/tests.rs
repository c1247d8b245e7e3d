//! Against a folder that behaves like one entry of configfs-tsm as far as files can: its
//! attributes are FIFOs served by a thread, in the order the kernel would be asked. What it
//! cannot imitate is that making an entry fills it.

use super::*;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use tempfile::TempDir;

const V5: &[u8] = include_bytes!("../../../tests/vectors/reports/genoa-v5/report.bin");

/// One act of the kernel's side: what it serves under a name, or that it takes a write.
enum Act {
    Serve(&'static str, Vec<u8>),
    Take(&'static str),
}

use Act::{Serve, Take};

/// One at a time: a process that is just being started holds copies of open FIFOs, and a FIFO
/// that somebody else holds open does not wait for its reader.
static ALONE: Mutex<()> = Mutex::new(());

struct Kernel {
    _alone: MutexGuard<'static, ()>,
    folder: TempDir,
    thread: JoinHandle<Vec<Vec<u8>>>,
}

impl Kernel {
    fn new(acts: Vec<Act>) -> Self {
        let alone = ALONE.lock().unwrap_or_else(|broken| broken.into_inner());
        let folder = tempfile::tempdir().unwrap();
        for act in &acts {
            let (Serve(name, _) | Take(name)) = act;
            let path = folder.path().join(name);
            if !path.exists() {
                let made = Command::new("mkfifo").arg(&path).status().unwrap();
                assert!(made.success());
            }
        }
        let path = folder.path().to_owned();
        let thread = thread::spawn(move || {
            let mut taken = Vec::new();
            for act in acts {
                match act {
                    Serve(name, bytes) => {
                        // A reader may have had enough before the end.
                        let _ = fs::write(path.join(name), bytes);
                    }
                    Take(name) => taken.push(fs::read(path.join(name)).unwrap()),
                }
            }
            taken
        });
        Self {
            _alone: alone,
            folder,
            thread,
        }
    }

    fn ask(self, vmpl: Option<u8>) -> (Result<Evidence, TsmError>, Vec<Vec<u8>>) {
        let result = TsmReports::entry(self.folder.path()).report(&asked(), vmpl);
        let taken = self.thread.join().unwrap();
        (result, taken)
    }
}

/// What the V5 vector carries.
fn asked() -> [u8; 64] {
    V5[0x50..0x90].try_into().unwrap()
}

fn acts(report: &[u8], table: &[u8], after: &str) -> Vec<Act> {
    vec![
        Serve("provider", b"sev_guest\n".to_vec()),
        Serve("generation", b"4\n".to_vec()),
        Take("inblob"),
        Serve("outblob", report.to_vec()),
        Serve("auxblob", table.to_vec()),
        Serve("generation", after.as_bytes().to_vec()),
    ]
}

#[test]
fn a_report_and_its_certificates_come_out() {
    let mut table = vec![0; 48];
    table[..16].copy_from_slice(&[1; 16]);
    table[16..24].copy_from_slice(&[48, 0, 0, 0, 2, 0, 0, 0]);
    table.extend(b"ab");
    let (result, taken) = Kernel::new(acts(V5, &table, "5\n")).ask(None);
    let evidence = result.unwrap();
    assert_eq!(evidence.report, V5);
    assert_eq!(evidence.certificates.len(), 1);
    assert_eq!(evidence.source_format.container, Container::ConfigfsTsm);
    assert_eq!(taken, [asked()]);
}

#[test]
fn a_privilege_level_is_written_first_and_counts() {
    let mut script = acts(V5, b"", "6\n");
    script.insert(2, Take("privlevel"));
    let (result, taken) = Kernel::new(script).ask(Some(2));
    result.unwrap();
    assert_eq!(taken, [b"2".to_vec(), asked().to_vec()]);
}

#[test]
fn another_writer_is_noticed() {
    for after in ["4\n", "6\n", "3\n"] {
        let (result, _) = Kernel::new(acts(V5, b"", after)).ask(None);
        assert!(
            matches!(result, Err(TsmError::Generation { expected: 1, .. })),
            "{after}: {result:?}"
        );
    }
    let (result, _) = Kernel::new(acts(V5, b"", "many\n")).ask(None);
    assert!(matches!(result, Err(TsmError::NotANumber { .. })));
}

#[test]
fn an_answer_to_another_request_is_refused() {
    let mut other = V5.to_vec();
    other[0x8f] ^= 1;
    let (result, _) = Kernel::new(acts(&other, b"", "5\n")).ask(None);
    assert!(matches!(result, Err(TsmError::NotBound)), "{result:?}");
}

#[test]
fn other_lengths_and_tables_are_refused() {
    let (result, _) = Kernel::new(acts(&V5[1..], b"", "5\n")).ask(None);
    assert!(matches!(
        result,
        Err(TsmError::Evidence(EvidenceError::Unknown(1183)))
    ));
    let (result, _) = Kernel::new(acts(V5, b"rubbish", "5\n")).ask(None);
    assert!(matches!(
        result,
        Err(TsmError::Evidence(EvidenceError::Table(_)))
    ));
    let script = vec![
        Serve("provider", b"sev_guest\n".to_vec()),
        Serve("generation", b"0\n".to_vec()),
        Take("inblob"),
        Serve("outblob", [V5, b"+"].concat()),
    ];
    let (result, _) = Kernel::new(script).ask(None);
    assert!(
        matches!(result, Err(TsmError::TooLong { .. })),
        "{result:?}"
    );
}

#[test]
fn another_technology_is_named() {
    let (result, _) = Kernel::new(vec![Serve("provider", b"tdx_guest\n".to_vec())]).ask(None);
    let text = result.unwrap_err().to_string();
    assert!(text.contains("tdx_guest"), "{text}");
}

/// A plain folder is no configfs: the entry made there stays empty, is reported and removed.
#[test]
fn a_place_that_makes_no_attributes_is_left_clean() {
    let base = tempfile::tempdir().unwrap();
    let result = TsmReports::at(base.path()).report(&[0; 64], None);
    assert!(matches!(result, Err(TsmError::File { doing: "read", .. })));
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
}

#[test]
fn where_there_is_none_the_error_says_what_to_do() {
    for reports in [
        TsmReports::at(Path::new("/nowhere/tsm")),
        TsmReports::entry(Path::new("/nowhere/tsm/entry")),
    ] {
        let text = reports.report(&[0; 64], None).unwrap_err().to_string();
        assert!(text.contains("/nowhere/tsm") && text.contains("modprobe sev-guest"));
    }
}
