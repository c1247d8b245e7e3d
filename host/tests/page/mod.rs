//! A page of the documentation, executed: its `sh` blocks in order, with the real programs, in one folder. What stands in
//! a `text` block below must be in what was printed; a `sh background` block runs until the end.
#![allow(
    dead_code,
    reason = "each test program compiles this for itself and uses its part"
)]
#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What a page is executed with, and in.
pub struct Stage {
    /// Its file, from the workspace's root.
    pub page: &'static str,
    /// Where its commands run.
    pub folder: tempfile::TempDir,
    /// Where its programs are.
    pub programs: PathBuf,
    /// Variables of its commands.
    pub environment: Vec<(&'static str, String)>,
    /// Words of the page that are others here: a fixed port.
    pub instead: Vec<(&'static str, String)>,
    background: Vec<Child>,
}

/// How many blocks ran, and the first lines of those that are only shown.
#[derive(Debug, PartialEq, Eq)]
pub struct Told {
    pub executed: usize,
    pub shown: Vec<String>,
}

/// One fenced block.
struct Block {
    line: usize,
    kind: String,
    text: String,
}

impl Stage {
    /// For a page, in a fresh folder, with the program under test.
    pub fn new(page: &'static str) -> Self {
        let casemate = Path::new(env!("CARGO_BIN_EXE_casemate"));
        Self {
            page,
            folder: tempfile::tempdir().unwrap(),
            programs: casemate.parent().unwrap().to_owned(),
            environment: Vec::new(),
            instead: Vec::new(),
            background: Vec::new(),
        }
    }

    /// Executes the page. `ready` says when a program in the background serves.
    pub fn tell(mut self, ready: impl Fn(&Self) -> bool) -> Told {
        let file = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .join(self.page);
        let mut text = fs::read_to_string(file).unwrap();
        for (from, to) in &self.instead {
            text = text.replace(from, to);
        }
        let mut told = Told {
            executed: 0,
            shown: Vec::new(),
        };
        let mut printed = None;
        for block in blocks(&text) {
            match block.kind.as_str() {
                "sh" => {
                    printed = Some(self.run(&block));
                    told.executed += 1;
                }
                "sh background" => {
                    self.start(&block, &ready);
                    told.executed += 1;
                }
                "text" => {
                    let printed: String = printed.take().expect("output stands below its block");
                    self.check(&block, &printed);
                }
                "toml" => told
                    .shown
                    .push(block.text.lines().next().unwrap().to_owned()),
                other => panic!("{}:{}: a `{other}` block is not run", self.page, block.line),
            }
        }
        told
    }

    /// What a block printed, on both outputs; it must succeed.
    fn run(&self, block: &Block) -> String {
        let output = self.command(&block.text).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        let (page, line, status) = (self.page, block.line, output.status);
        assert!(status.success(), "{page}:{line}: {status}\n{text}");
        text
    }

    /// Starts a block and waits until it serves.
    fn start(&mut self, block: &Block, ready: &impl Fn(&Self) -> bool) {
        let text = format!("exec {}", block.text);
        let child = self.command(&text).stdin(Stdio::null()).spawn().unwrap();
        self.background.push(child);
        let end = Instant::now() + PATIENCE;
        while !ready(self) {
            let ended = self.background.last_mut().unwrap().try_wait().unwrap();
            assert_eq!(ended, None, "{}:{}: it ended", self.page, block.line);
            assert!(
                Instant::now() < end,
                "{}:{}: serves not",
                self.page,
                block.line
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn command(&self, script: &str) -> Command {
        let path = std::env::var("PATH").unwrap();
        let mut command = Command::new("bash");
        command
            .args(["-euo", "pipefail", "-c", script])
            .current_dir(self.folder.path())
            .env("PATH", format!("{}:{path}", self.programs.display()))
            .env_remove("CASEMATE_KDS_CACHE")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Each line of the page's output is in what was printed; `…` stands for anything, spaces do not count.
    fn check(&self, block: &Block, printed: &str) {
        for wanted in block.text.lines() {
            let found = printed.lines().any(|line| {
                let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
                let line = words(line);
                let mut rest = line.as_str();
                wanted.split('…').map(words).all(|part| {
                    let at = rest.find(&part);
                    rest = at.map_or("", |at| &rest[at + part.len()..]);
                    at.is_some()
                })
            });
            let (page, line) = (self.page, block.line);
            assert!(found, "{page}:{line}: no line is `{wanted}` in\n{printed}");
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for child in &mut self.background {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The fenced blocks of a page.
fn blocks(page: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (number, line) in page.lines().enumerate() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(kind), None) => {
                open = Some(Block {
                    line: number + 1,
                    kind: kind.to_owned(),
                    text: String::new(),
                });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => block.text += &format!("{line}\n"),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "the last block has no end");
    blocks
}

const PATIENCE: Duration = Duration::from_secs(60);
