//! The command line's side of the API.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::agent::api::{Answer, Failure, Line, MAX_LINE, Request};

/// Asks an agent; `progress` sees every progress line.
pub fn ask(
    socket: &Path,
    request: &Request,
    progress: &mut dyn FnMut(&serde_json::Value),
) -> Result<Answer, Failure> {
    let mut stream = UnixStream::connect(socket).map_err(|e| {
        let remedy =
            "start it with `casemate agent --config FILE`, or name its socket with --agent";
        Failure::new(
            "AGENT_UNAVAILABLE",
            format!("no agent answers at {}: {e}; {remedy}", socket.display()),
        )
    })?;
    let mut line = serde_json::to_vec(request).map_err(|e| lost(&e))?;
    line.push(b'\n');
    match stream.write_all(&line) {
        // An agent that refuses whoever asks does not read the request; its answer is there all the same.
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => return Err(lost(&e)),
        _ => {}
    }
    let mut reader = BufReader::new(stream);
    loop {
        match next_line(&mut reader)? {
            Line::Progress { event } => progress(&event),
            Line::Answer { answer } => return Ok(*answer),
            Line::Failed(failure) => return Err(failure),
        }
    }
}

fn next_line(reader: &mut impl BufRead) -> Result<Line, Failure> {
    let mut text = String::new();
    let read = reader
        .take(MAX_LINE as u64)
        .read_line(&mut text)
        .map_err(|e| lost(&e))?;
    if read == 0 {
        return Err(Failure::new(
            "AGENT_LOST",
            "the agent closed the connection before it answered; see its log",
        ));
    }
    serde_json::from_str(&text).map_err(|e| lost(&e))
}

fn lost(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        "AGENT_LOST",
        format!("talking to the agent failed: {error}"),
    )
}
