//! Frames between the runner and the agent inside the lab: one ordered stream over one virtio-serial port.
//!
//! One stream and not a port each for stdout, stderr and status, so that the exit code cannot overtake output. The agent
//! is started by us but runs beside the program under test: lengths and kinds are checked, nothing else is believed.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// What a frame carries; the discriminant is its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Agent → runner: booted, waiting for [`Kind::Run`].
    Ready = 1,
    /// Runner → agent: a [`Run`] as JSON.
    Run = 2,
    /// Agent → runner: the program was started.
    Started = 3,
    /// Agent → runner: bytes of the program's stdout.
    Stdout = 4,
    /// Agent → runner: bytes of the program's stderr.
    Stderr = 5,
    /// Agent → runner: path, relative to the output directory, of a file whose [`Kind::FileData`] follows.
    File = 6,
    /// Agent → runner: the next bytes of the file named last.
    FileData = 7,
    /// Agent → runner: an [`Exit`] as JSON; always the last frame.
    Exit = 8,
}

/// What the agent is asked to run.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Program and arguments.
    pub args: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory, created when missing.
    pub cwd: String,
    /// The host's clock: seconds and nanoseconds since the epoch. The snapshot's own clock stands still.
    pub clock: (i64, i64),
    /// Where each entry `files/<index>` of the payload disk shall appear.
    pub files: Vec<String>,
    /// Whether the kernel's log follows the program's stderr.
    pub kernel_log: bool,
    /// Directory whose files go back to the runner at the end.
    pub out: Option<String>,
}

/// How the program ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Not at all: the agent could not start it.
    NotStarted(String),
}

/// Write one frame.
pub fn send(to: &mut impl Write, kind: Kind, data: &[u8]) -> io::Result<()> {
    let len = u32::try_from(data.len())
        .ok()
        .filter(|len| *len <= MAX_FRAME)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let mut frame = Vec::with_capacity(data.len() + HEADER);
    frame.push(kind as u8);
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(data);
    to.write_all(&frame)
}

/// Read one frame; an end of stream before or inside it is an error.
pub fn receive(from: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut header = [0; HEADER];
    from.read_exact(&mut header)?;
    let [kind, len @ ..] = header;
    let kind = Kind::parse(kind).ok_or_else(|| invalid(format!("unknown frame kind {kind}")))?;
    let len = u32::from_le_bytes(len);
    if len > MAX_FRAME {
        return Err(invalid(format!(
            "a frame of {len} bytes, at most {MAX_FRAME} are allowed"
        )));
    }
    let mut data = vec![0; len as usize];
    from.read_exact(&mut data)?;
    Ok((kind, data))
}

impl Kind {
    fn parse(byte: u8) -> Option<Self> {
        use Kind::{Exit, File, FileData, Ready, Run, Started, Stderr, Stdout};
        [Ready, Run, Started, Stdout, Stderr, File, FileData, Exit]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// The port's name, by which the agent finds its device.
pub const PORT_NAME: &str = "casemate.lab";

const HEADER: usize = 5;
const MAX_FRAME: u32 = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip() {
        let mut wire = Vec::new();
        send(&mut wire, Kind::Stdout, b"hello").unwrap();
        send(&mut wire, Kind::Exit, b"").unwrap();
        let mut wire = wire.as_slice();
        assert_eq!(
            receive(&mut wire).unwrap(),
            (Kind::Stdout, b"hello".to_vec())
        );
        assert_eq!(receive(&mut wire).unwrap(), (Kind::Exit, Vec::new()));
        assert_eq!(
            receive(&mut wire).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn rubbish_is_refused() {
        assert_eq!(
            receive(&mut [9, 0, 0, 0, 0].as_slice()).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert_eq!(
            receive(&mut [4, 255, 255, 255, 255].as_slice())
                .unwrap_err()
                .kind(),
            io::ErrorKind::InvalidData
        );
        assert_eq!(
            receive(&mut [4, 3, 0, 0, 0, 1].as_slice())
                .unwrap_err()
                .kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn frames_over_the_maximum_are_not_sent() {
        assert!(
            send(
                &mut Vec::new(),
                Kind::Stdout,
                &vec![0; MAX_FRAME as usize + 1]
            )
            .is_err()
        );
    }
}
