//! COM1, a 16550A: the guest's console. Output goes to a file or pipe and never makes the guest wait; input comes from a
//! pipe, as fast as the guest takes it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    input: Option<Input>,
}

/// What is typed.
struct Input {
    pipe: File,
    /// Wakes the device thread when there is room again.
    wake: EventFd,
    /// The receiver is full: the pipe is not polled until the guest has read.
    full: AtomicBool,
    /// Nobody will type any more.
    ended: AtomicBool,
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
            input: None,
        })
    }

    /// The same with somebody who types: bytes from `pipe`, which is made non-blocking; `wake` wakes the device thread.
    pub fn with_input(self, pipe: OwnedFd, wake: EventFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&pipe, FcntlArg::F_GETFL)?);
        fcntl(&pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let input = Input {
            pipe: File::from(pipe),
            wake,
            full: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        };
        Ok(Self {
            input: Some(input),
            ..self
        })
    }

    /// The descriptor to poll now, if the guest can take something.
    pub fn poll_fd(&self) -> Option<RawFd> {
        let input = self.input.as_ref()?;
        let waits = input.full.load(Ordering::SeqCst) || input.ended.load(Ordering::SeqCst);
        (!waits).then(|| input.pipe.as_raw_fd())
    }

    /// Device thread: somebody has typed, or has gone.
    pub fn input_event(&self) {
        let Some(input) = &self.input else { return };
        let mut port = self.lock();
        let mut bytes = [0; FIFO];
        let room = port.fifo_capacity().min(FIFO);
        if let Some(space @ [_, ..]) = bytes.get_mut(..room) {
            match (&input.pipe).read(space) {
                Ok(0) => input.ended.store(true, Ordering::SeqCst),
                // A line that is in loop mode takes nothing, as a real one.
                Ok(count) => {
                    let _ = port.enqueue_raw_bytes(space.get(..count).unwrap_or_default());
                }
                Err(_) => {}
            }
        }
        input
            .full
            .store(port.fifo_capacity() == 0, Ordering::SeqCst);
    }

    /// Reads a register; a longer access reads it repeatedly, as string instructions do.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        let mut port = self.lock();
        for byte in data {
            *byte = port.read(offset);
        }
        if let Some(input) = &self.input
            && port.fifo_capacity() > 0
            && input.full.swap(false, Ordering::SeqCst)
        {
            // The counter cannot overflow by one write.
            let _ = input.wake.write(1);
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

/// Bytes of the receiver.
const FIFO: usize = 64;

#[cfg(test)]
mod tests {
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
    fn what_is_typed_comes_in_as_fast_as_it_is_read() {
        let (console, _reader) = pair();
        let (pipe, typist) = nix::unistd::pipe().unwrap();
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        let console = console.with_input(pipe, wake.try_clone().unwrap()).unwrap();
        let mut typist = File::from(typist);
        let typed: Vec<u8> = (0..150).collect();
        typist.write_all(&typed).unwrap();
        let mut read = Vec::new();
        while read.len() < typed.len() {
            assert!(console.poll_fd().is_some());
            console.input_event();
            let full = console.poll_fd().is_none();
            let mut status = [0];
            let begun = read.len();
            loop {
                console.read(5, &mut status);
                if status[0] & 1 == 0 {
                    break;
                }
                let mut byte = [0];
                console.read(0, &mut byte);
                read.push(byte[0]);
            }
            assert_eq!(full, read.len() - begun == FIFO);
            assert_eq!(wake.read().is_ok(), full, "woken when there is room again");
        }
        assert_eq!(read, typed);
        drop(typist);
        console.input_event();
        assert_eq!(console.poll_fd(), None, "nobody types any more");
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
