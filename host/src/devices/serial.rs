//! COM1, a 16550A: the guest's console. Output goes to a file or pipe and never makes the guest wait.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// The console of one machine.
pub struct Console {
    port: Mutex<Serial<Line, NoEvents, Output>>,
    dropped: Arc<AtomicU64>,
}

impl Console {
    /// COM1 with its interrupt line; output goes to `out`, which is made non-blocking.
    pub fn new(line: EventFd, out: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&out, FcntlArg::F_GETFL)?);
        fcntl(&out, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let dropped = Arc::new(AtomicU64::new(0));
        let output = Output {
            file: File::from(out),
            dropped: Arc::clone(&dropped),
        };
        Ok(Self {
            port: Mutex::new(Serial::new(Line(line), output)),
            dropped,
        })
    }

    /// Reads a register; a longer access reads it repeatedly, as string instructions do.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        let mut port = self.lock();
        for byte in data {
            *byte = port.read(offset);
        }
    }

    /// Writes a register.
    pub fn write(&self, offset: u8, data: &[u8]) {
        let mut port = self.lock();
        for byte in data {
            // Output does not fail (see `Output`); a lost interrupt is the line's, and cannot be mended here.
            let _ = port.write(offset, *byte);
        }
    }

    /// Bytes that were dropped because nobody read fast enough.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Registers to be saved.
    pub fn save(&self) -> SerialStateV1 {
        let state = self.lock().state();
        SerialStateV1 {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }

    /// Puts registers back; fails if the receive buffer is longer than the port's.
    pub fn restore(&self, saved: &SerialStateV1) -> Result<(), ConsoleStateError> {
        let [baud_divisor_low, baud_divisor_high] = saved.divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.in_buffer.clone(),
        };
        let mut port = self.lock();
        let line = Line(
            port.interrupt_evt()
                .0
                .try_clone()
                .map_err(|_| ConsoleStateError)?,
        );
        let output = port.writer().try_clone().map_err(|_| ConsoleStateError)?;
        *port =
            Serial::from_state(&state, line, NoEvents, output).map_err(|_| ConsoleStateError)?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Line, NoEvents, Output>> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A state no console of this version was in.
#[derive(Debug, thiserror::Error)]
#[error("state of the serial console is impossible")]
pub struct ConsoleStateError;

/// Registers of COM1, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialStateV1 {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Writes what the reader takes and counts the rest; never an error, never a wait.
struct Output {
    file: File,
    dropped: Arc<AtomicU64>,
}

impl Output {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            dropped: Arc::clone(&self.dropped),
        })
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.file.write(bytes).unwrap_or(0);
        self.dropped
            .fetch_add((bytes.len() - taken) as u64, Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn pair() -> (Console, File) {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        (Console::new(line, writer).unwrap(), File::from(reader))
    }

    #[test]
    fn what_the_guest_writes_comes_out() {
        let (console, mut reader) = pair();
        console.write(0, b"hi");
        drop(console);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hi");
    }

    #[test]
    fn a_slow_reader_costs_bytes_not_time() {
        let (console, _reader) = pair();
        let bytes = vec![b'x'; 100_000];
        console.write(0, &bytes);
        assert!(
            console.dropped() >= 100_000 - 65_536,
            "{}",
            console.dropped()
        );
    }

    #[test]
    fn registers_go_round() {
        let (console, _a) = pair();
        console.write(7, &[0x5a]);
        console.write(1, &[0x02]);
        let saved = console.save();
        let (other, _b) = pair();
        assert_ne!(other.save(), saved);
        other.restore(&saved).unwrap();
        assert_eq!(other.save().scratch, 0x5a);
        let long = SerialStateV1 {
            in_buffer: vec![0; 1000],
            ..saved
        };
        assert!(other.restore(&long).is_err());
    }
}
