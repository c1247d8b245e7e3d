//! As much of the QEMU Machine Protocol as saving and restoring a machine needs.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// A negotiated QMP connection.
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Take the greeting and leave negotiation mode.
    pub fn open(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        qmp.line()?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Stop the machine and write its state to a file in which every page has a fixed place.
    pub fn save(&mut self, state: &Path) -> io::Result<()> {
        self.execute("stop", &json!({}))?;
        self.set_mapped_ram()?;
        self.execute("migrate", &json!({ "uri": uri(state) }))?;
        self.migrated()
    }

    /// Load the state [`Self::save`] wrote into a machine started with `-incoming defer`, and let it go on.
    pub fn restore(&mut self, state: &Path) -> io::Result<()> {
        self.set_mapped_ram()?;
        self.execute("migrate-incoming", &json!({ "uri": uri(state) }))?;
        self.migrated()?;
        self.execute("cont", &json!({})).map(drop)
    }

    fn set_mapped_ram(&mut self) -> io::Result<()> {
        let capabilities =
            json!({ "capabilities": [{ "capability": "mapped-ram", "state": true }] });
        self.execute("migrate-set-capabilities", &capabilities)
            .map(drop)
    }

    fn migrated(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let info = self.execute("query-migrate", &json!({}))?;
            match info.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    return Err(io::Error::other(format!("state transfer failed: {info}")));
                }
                _ => thread::sleep(Duration::from_millis(5)),
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Runs a command and returns what it answers; events are passed over.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push('\n');
        self.stream.get_mut().write_all(request.as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(format!("QEMU refused {command}: {error}")));
            }
        }
    }

    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(io::Error::from)
    }
}

fn uri(state: &Path) -> String {
    format!("file:{}", state.display())
}

const PATIENCE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_passed_over_and_errors_told() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"{\"QMP\":{}}\n{\"return\":{}}\n{\"event\":\"STOP\"}\n{\"return\":{\"status\":\"completed\"}}\n").unwrap();
        theirs
            .write_all(b"{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"}}\n")
            .unwrap();
        let mut qmp = Qmp::open(ours).unwrap();
        qmp.migrated().unwrap();
        assert!(
            qmp.execute("migrate", &json!({}))
                .unwrap_err()
                .to_string()
                .contains("GenericError")
        );
    }
}
