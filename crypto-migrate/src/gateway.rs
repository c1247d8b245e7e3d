//! A gateway: terminates the TLS of both sides with its own certificate and forwards frames.
//!
//! It holds no key of the session: it sees frame headers, the clear headers of pages, and ciphertext. The
//! hook sees every frame before it goes on; the attack drill is written with it. Not believed: either side;
//! frames are bounded and every wait has a deadline.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use crate::code::Code;
use crate::identity::Local;
use crate::preamble::{PREAMBLE_BYTE, Ticket};
use crate::tls::{self, TlsError, TlsStream, Transport};
use crate::wire::{Frame, HEADER_SIZE, Header, WireError};

/// Which way a frame travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the source to the destination.
    ToDestination,
    /// Back.
    ToSource,
}

/// What becomes of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// These go on in its place (none: it is dropped).
    Forward(Vec<Frame>),
    /// Both connections are cut.
    Cut,
}

impl From<Frame> for Action {
    fn from(frame: Frame) -> Self {
        Action::Forward(vec![frame])
    }
}

/// A gateway that failed.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// One of the TLS connections.
    #[error("{0:?}: {1}")]
    Tls(Direction, #[source] TlsError),
    /// A frame that cannot be read or written.
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl GatewayError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            GatewayError::Tls(_, error) => error.code(),
            GatewayError::Wire(error) => error.code(),
        }
    }
}

/// What passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct GatewayReport {
    /// Frames from the source.
    pub frames_to_destination: u64,
    /// Frames from the destination.
    pub frames_to_source: u64,
    /// Bytes of frames both ways.
    pub bytes: u64,
    /// Whether the hook cut the connections.
    pub cut: bool,
}

/// A gateway's identities and whom it forwards for.
#[derive(Clone, Debug)]
pub struct Gateway {
    /// Who it is to the source's side, and whom it allows there (as direct peers).
    pub towards_source: Local,
    /// Who it is to the destination's side, and whom it allows there.
    pub towards_destination: Local,
    /// TLS handshakes, and the longest silence of both sides together.
    pub timeout: Duration,
}

impl Gateway {
    /// One identity and one allow-list (both hosts) for both sides.
    pub fn new(local: Local, timeout: Duration) -> Self {
        Self {
            towards_source: local.clone(),
            towards_destination: local,
            timeout,
        }
    }

    /// Accepts TLS from the source, connects TLS to the destination, and forwards until one side closes. The preamble of a
    /// further connection goes on as it came.
    pub fn run<A: Transport, B: Transport>(
        &self,
        source: A,
        mut destination: B,
        hook: &mut dyn FnMut(Direction, Frame) -> Action,
    ) -> Result<GatewayReport, GatewayError> {
        let source = Opening::pass(source, &mut destination, self.timeout)
            .map_err(|error| GatewayError::Tls(Direction::ToSource, TlsError::Io(error)))?;
        let mut source = tls::accept(source, &self.towards_source, self.timeout)
            .map_err(|error| GatewayError::Tls(Direction::ToSource, error))?;
        let mut destination = tls::connect(destination, &self.towards_destination, self.timeout)
            .map_err(|error| GatewayError::Tls(Direction::ToDestination, error))?;
        let result = self.forward(&mut source, &mut destination, hook);
        let deadline = Instant::now() + CLOSE_TIME;
        for closed in [source.finish(deadline), destination.finish(deadline)] {
            if let Err(error) = closed {
                tracing::trace!(%error, "closing");
            }
        }
        if !matches!(result, Ok(GatewayReport { cut: true, .. })) {
            // What was forwarded last must not be lost to a reset.
            source.linger(deadline);
            destination.linger(deadline);
        }
        source.close();
        destination.close();
        result
    }

    fn forward<A: Transport, B: Transport>(
        &self,
        source: &mut TlsStream<A>,
        destination: &mut TlsStream<B>,
        hook: &mut dyn FnMut(Direction, Frame) -> Action,
    ) -> Result<GatewayReport, GatewayError> {
        let mut report = GatewayReport::default();
        let mut quiet_since = Instant::now();
        loop {
            let onward = self.pass(
                Direction::ToDestination,
                source,
                destination,
                hook,
                &mut report,
            )?;
            let back = self.pass(Direction::ToSource, destination, source, hook, &mut report)?;
            match (onward, back) {
                (Passed::End, _) | (_, Passed::End) => return Ok(report),
                (Passed::Nothing, Passed::Nothing) if quiet_since.elapsed() > self.timeout => {
                    return Err(GatewayError::Tls(
                        Direction::ToDestination,
                        TlsError::Timeout,
                    ));
                }
                (Passed::Nothing, Passed::Nothing) => std::thread::sleep(IDLE),
                _ => quiet_since = Instant::now(),
            }
        }
    }

    /// Passes at most one frame.
    fn pass<A: Transport, B: Transport>(
        &self,
        direction: Direction,
        from: &mut TlsStream<A>,
        to: &mut TlsStream<B>,
        hook: &mut dyn FnMut(Direction, Frame) -> Action,
        report: &mut GatewayReport,
    ) -> Result<Passed, GatewayError> {
        let failed = |error| GatewayError::Tls(direction, error);
        let deadline = Instant::now() + self.timeout;
        let frame = match from.readable() {
            Ok(false) => return Ok(Passed::Nothing),
            Ok(true) => match read_frame(from, deadline) {
                Ok(frame) => frame,
                Err(GatewayError::Tls(_, TlsError::Truncated)) => return Ok(Passed::End),
                Err(error) => return Err(error),
            },
            Err(TlsError::Truncated) => return Ok(Passed::End),
            Err(error) => return Err(failed(error)),
        };
        report.bytes += (HEADER_SIZE + frame.payload.len()) as u64;
        match direction {
            Direction::ToDestination => report.frames_to_destination += 1,
            Direction::ToSource => report.frames_to_source += 1,
        }
        match hook(direction, frame) {
            Action::Forward(frames) => {
                for frame in frames {
                    to.write_all(&mut frame.encode()?, deadline)
                        .map_err(failed)?;
                }
                Ok(Passed::Frame)
            }
            Action::Cut => {
                report.cut = true;
                Ok(Passed::End)
            }
        }
    }
}

/// A connection whose first byte was looked at.
struct Opening<T> {
    first: Option<u8>,
    io: T,
}

impl<T: Transport> Opening<T> {
    /// Passes a preamble on, if there is one.
    fn pass(mut io: T, to: &mut impl Transport, timeout: Duration) -> io::Result<Self> {
        io.set_read_timeout(Some(timeout))?;
        to.set_write_timeout(Some(timeout))?;
        let mut first = [0];
        io.read_exact(&mut first)?;
        let [byte] = first;
        if byte != PREAMBLE_BYTE {
            let first = Some(byte);
            return Ok(Self { first, io });
        }
        Ticket::read(&mut first.chain(&mut io))?.write(to)?;
        Ok(Self { first: None, io })
    }
}

impl<T: Transport> Read for Opening<T> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match (out.first_mut(), self.first) {
            (Some(place), Some(byte)) => {
                *place = byte;
                self.first = None;
                Ok(1)
            }
            _ => self.io.read(out),
        }
    }
}

impl<T: Transport> Write for Opening<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.io.write(bytes)
    }

    fn write_vectored(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.io.write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.io.flush()
    }
}

impl<T: Transport> Transport for Opening<T> {
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.io.set_read_timeout(timeout)
    }
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.io.set_write_timeout(timeout)
    }
    fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.io.set_nonblocking(nonblocking)
    }
    fn close(&self) -> io::Result<()> {
        self.io.close()
    }
}

/// Reads one frame, bounded by its type's maximum, by the deadline.
pub fn read_frame<T: Transport>(
    tls: &mut TlsStream<T>,
    deadline: Instant,
) -> Result<Frame, GatewayError> {
    let failed = |error| GatewayError::Tls(Direction::ToDestination, error);
    let mut header = [0; HEADER_SIZE];
    tls.read_exact(&mut header, deadline, &|| false)
        .map_err(failed)?;
    let header = Header::parse(&header)?;
    let mut payload = vec![0; usize::try_from(header.length).unwrap_or(0)];
    tls.read_exact(&mut payload, deadline, &|| false)
        .map_err(failed)?;
    let Header {
        kind,
        stream,
        sequence,
        ..
    } = header;
    Ok(Frame {
        kind,
        stream,
        sequence,
        payload,
    })
}

enum Passed {
    Frame,
    Nothing,
    End,
}

const IDLE: Duration = Duration::from_micros(200);
const CLOSE_TIME: Duration = Duration::from_secs(1);
