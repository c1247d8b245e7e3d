//! The virtio console (specification section 5.3): one port, with the terminal's size. A program on the host connects to
//! its socket and sees what the guest printed last, then what it prints.
//!
//! Output never makes the guest wait: what a client does not read fast enough is lost to it. A newer client takes the
//! terminal over.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::Queue;

use super::ring::{Active, Chain, RING_FEATURES};
use super::{Activation, Interrupt, RestoreError, VirtioDevice, saved};
use crate::machine::plan::devices::{ConsolePlan, DeviceChange};

/// A console with one port.
pub struct VirtioConsole {
    listener: UnixListener,
    client: Option<UnixStream>,
    size: ConsolePlan,
    recent: VecDeque<u8>,
    active: Option<Active>,
    held: bool,
    /// The guest has no receive buffers: the client is not polled until it offers some.
    starved: bool,
    buffer: Box<[u8]>,
    lost: u64,
}

impl VirtioConsole {
    /// A console whose clients come to `listener`.
    ///
    /// # Errors
    ///
    /// If the socket cannot be made non-blocking.
    pub fn new(listener: UnixListener, size: ConsolePlan) -> io::Result<VirtioConsole> {
        listener.set_nonblocking(true)?;
        Ok(VirtioConsole {
            listener,
            client: None,
            size,
            recent: VecDeque::with_capacity(RECENT),
            active: None,
            held: false,
            starved: false,
            buffer: vec![0; CHUNK].into_boxed_slice(),
            lost: 0,
        })
    }

    /// From the guest to the client, and into what a later client will see first.
    fn transmit(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let ram = active.ram.clone();
        let Some(ring) = active.rings.get_mut(TX) else {
            return;
        };
        loop {
            while let Some(chain) = ring.pop(&ram, CHAIN_MAX) {
                if !chain.broken {
                    print(
                        &chain,
                        &mut self.buffer,
                        &mut self.recent,
                        &mut self.client,
                        &mut self.lost,
                    );
                }
                ring.push(&ram, &chain, 0);
            }
            ring.signal(&ram, active.interrupt.as_ref());
            if !ring.listen(&ram) {
                break;
            }
        }
    }

    /// From the client to the guest, as far as the guest has buffers.
    fn receive(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| self.held) else {
            return;
        };
        let ram = active.ram.clone();
        let Some(ring) = active.rings.get_mut(RX) else {
            return;
        };
        for _ in 0..BURST {
            let Some(client) = &mut self.client else {
                break;
            };
            let Some(chain) = ring.pop(&ram, CHAIN_MAX) else {
                self.starved = !ring.listen(&ram);
                if self.starved {
                    break;
                }
                continue;
            };
            self.starved = false;
            let room = chain.writable.len().min(CHUNK);
            if chain.broken || room == 0 {
                if !chain.broken {
                    ring.fault();
                }
                ring.push(&ram, &chain, 0);
                continue;
            }
            match client.read(self.buffer.get_mut(..room).unwrap_or_default()) {
                Ok(count @ 1..) => {
                    let bytes = self.buffer.get(..count).unwrap_or_default();
                    let written = chain.writable.write_at(0, bytes);
                    ring.push(&ram, &chain, u32::try_from(written).unwrap_or(0));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => ring.unpop(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ring.unpop();
                    break;
                }
                // The client has gone, one way or another.
                Ok(_) | Err(_) => {
                    ring.unpop();
                    self.client = None;
                }
            }
        }
        ring.signal(&ram, active.interrupt.as_ref());
    }

    fn accept(&mut self) {
        let Ok((client, _)) = self.listener.accept() else {
            return;
        };
        if client.set_nonblocking(true).is_err() {
            return;
        }
        let (older, newer) = self.recent.as_slices();
        self.client = Some(client);
        for part in [older, newer] {
            self.lost += send(&mut self.client, part);
        }
        self.receive();
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let [a, b] = self.size.columns.to_le_bytes();
        let [c, d] = self.size.rows.to_le_bytes();
        [a, b, c, d]
    }
}

fn print(
    chain: &Chain<'_>,
    buffer: &mut [u8],
    recent: &mut VecDeque<u8>,
    client: &mut Option<UnixStream>,
    lost: &mut u64,
) {
    let mut done = 0;
    // A guest may offer the same memory over and over in one chain; what is printed of it has an end.
    let end = chain.readable.len().min(REQUEST_MAX);
    while done < end {
        let want = buffer.len().min(end - done);
        let count = chain
            .readable
            .read_at(done, buffer.get_mut(..want).unwrap_or_default());
        if count == 0 {
            return;
        }
        let bytes = buffer.get(..count).unwrap_or_default();
        let surplus = (recent.len() + count)
            .saturating_sub(RECENT)
            .min(recent.len());
        recent.drain(..surplus);
        recent.extend(bytes);
        *lost += send(client, bytes);
        done += count;
    }
}

/// How many bytes the client did not take.
fn send(client: &mut Option<UnixStream>, mut bytes: &[u8]) -> u64 {
    while let Some(stream) = client
        && !bytes.is_empty()
    {
        match stream.write(bytes) {
            Ok(count @ 1..) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes.len() as u64,
            Ok(_) | Err(_) => *client = None,
        }
    }
    0
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        RING_FEATURES | 1 << VIRTIO_CONSOLE_F_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_from(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.active = Some(Active::new(activation));
        self.starved = false;
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn poll_fds(&self) -> Vec<(RawFd, u32)> {
        let mut fds = vec![(self.listener.as_raw_fd(), LISTENER)];
        if self.active.is_some() && self.held && !self.starved {
            fds.extend(self.client.as_ref().map(|c| (c.as_raw_fd(), CLIENT)));
        }
        fds
    }

    fn queue_event(&mut self, index: u16) {
        match usize::from(index) {
            RX => self.receive(),
            TX => self.transmit(),
            _ => {}
        }
    }

    fn fd_event(&mut self, token: u32) {
        match token {
            LISTENER => self.accept(),
            _ => self.receive(),
        }
    }

    fn queues(&self) -> Vec<Queue> {
        self.active.as_ref().map(Active::queues).unwrap_or_default()
    }

    /// Clients and what they saw stay behind; the terminal's size goes along.
    fn save(&self) -> Vec<u8> {
        let state = State {
            columns: self.size.columns,
            rows: self.size.rows,
        };
        saved::encode(STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let State { columns, rows } = saved::decode("console", STATE_VERSION, state)?;
        self.size = ConsolePlan { columns, rows };
        Ok(())
    }

    fn release(&mut self) -> io::Result<()> {
        self.held = false;
        Ok(())
    }

    fn acquire(&mut self) -> io::Result<()> {
        self.held = true;
        self.transmit();
        self.receive();
        Ok(())
    }

    fn faults(&self) -> u64 {
        self.active.as_ref().map_or(0, Active::faults)
    }

    fn change(&mut self, change: &DeviceChange) -> Result<(), String> {
        let DeviceChange::Terminal(size) = change else {
            return Err(super::not_for("console", change));
        };
        self.size = *size;
        if let Some(active) = &self.active {
            let interrupt: &dyn Interrupt = active.interrupt.as_ref();
            interrupt.config();
        }
        Ok(())
    }
}

/// Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    columns: u16,
    rows: u16,
}

// linux/virtio_console.h; the crate of constants lacks it
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;
const STATE_VERSION: u8 = 1;
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];
const CHAIN_MAX: usize = 32;
const CONFIG_LEN: usize = 4;
const LISTENER: u32 = 0;
const CLIENT: u32 = 1;
/// What a new client sees of the past, in bytes.
const RECENT: usize = 64 << 10;
const CHUNK: usize = 4096;
/// Most bytes printed of one request.
const REQUEST_MAX: usize = 64 << 10;
/// Buffers filled before other devices get their turn; the client is polled again for the rest.
const BURST: usize = 64;

#[cfg(test)]
mod tests {
    use super::super::driver::{Buffer, Driver};
    use super::*;

    const DATA: u64 = 0x10_0000;

    struct Rig {
        driver: Driver,
        console: VirtioConsole,
        folder: tempfile::TempDir,
    }

    fn rig() -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("console")).unwrap();
        let driver = Driver::new(2);
        let size = ConsolePlan {
            columns: 80,
            rows: 25,
        };
        let mut console = VirtioConsole::new(listener, size).unwrap();
        console.activate(driver.activation(u64::MAX));
        console.acquire().unwrap();
        Rig {
            driver,
            console,
            folder,
        }
    }

    impl Rig {
        fn connect(&mut self) -> UnixStream {
            let client = UnixStream::connect(self.folder.path().join("console")).unwrap();
            client.set_nonblocking(true).unwrap();
            self.console.fd_event(LISTENER);
            client
        }

        fn print(&mut self, text: &[u8]) {
            self.driver.offer(TX, &[Buffer::read(DATA, text)]);
            self.console.queue_event(TX as u16);
            assert!(self.driver.used(TX).is_some());
        }
    }

    fn heard(client: &mut UnixStream) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        let mut len = 0;
        while let Ok(count @ 1..) = client.read(&mut bytes[len..]) {
            len += count;
        }
        bytes.truncate(len);
        bytes
    }

    #[test]
    fn what_is_printed_is_heard_also_by_who_comes_late() {
        let mut rig = rig();
        rig.print(b"login: ");
        let mut client = rig.connect();
        assert_eq!(heard(&mut client), b"login: ");
        rig.print(b"root\n");
        assert_eq!(heard(&mut client), b"root\n");
        let mut other = rig.connect();
        assert_eq!(heard(&mut other), b"login: root\n");
        rig.print(b"x");
        assert_eq!(heard(&mut other), b"x");
        assert_eq!(heard(&mut client), b"", "the newer client has the terminal");
    }

    #[test]
    fn what_is_typed_reaches_the_guest_when_it_has_room() {
        let mut rig = rig();
        let mut client = rig.connect();
        client.write_all(b"hello").unwrap();
        rig.console.fd_event(CLIENT);
        assert_eq!(rig.console.poll_fds().len(), 1, "no buffers: not polled");
        rig.driver.offer(RX, &[Buffer::write(DATA, 3)]);
        rig.driver.offer(RX, &[Buffer::write(DATA + 64, 16)]);
        rig.console.queue_event(RX as u16);
        assert_eq!(rig.driver.used(RX), Some((0, 3)));
        assert_eq!(rig.driver.used(RX), Some((1, 2)));
        assert_eq!(rig.driver.bytes(DATA, 4), b"hel\0");
        assert_eq!(rig.driver.bytes(DATA + 64, 3), b"lo\0");
        rig.driver.offer(RX, &[Buffer::write(DATA, 3)]);
        rig.console.queue_event(RX as u16);
        assert_eq!(rig.console.poll_fds().len(), 2);
        drop(client);
        rig.console.fd_event(CLIENT);
        assert_eq!(rig.console.poll_fds().len(), 1);
        assert_eq!(rig.driver.used(RX), None, "the buffer waits for the next");
    }

    #[test]
    fn a_guest_that_prints_without_end_neither_waits_nor_fills_memory() {
        let mut rig = rig();
        let mut deaf = rig.connect();
        for _ in 0..200 {
            rig.print(&[b'x'; 4096]);
        }
        assert!(rig.console.lost > 0);
        assert_eq!(rig.console.recent.len(), RECENT);
        assert!(heard(&mut deaf).len() < 200 * 4096);
        rig.print(b"end");
        assert_eq!(heard(&mut deaf), b"end");
        let huge = vec![Buffer::raw(0, 0x30_0000, 0, 0); 31];
        rig.driver.offer(TX, &huge);
        rig.console.queue_event(TX as u16);
        assert_eq!(rig.console.recent.len(), RECENT);
        rig.driver.offer(RX, &[Buffer::read(DATA, b"wrong way")]);
        rig.console.queue_event(RX as u16);
        assert_eq!(rig.console.faults(), 1);
    }

    #[test]
    fn the_terminal_has_a_size_and_keeps_it_in_a_move() {
        let mut rig = rig();
        let size = ConsolePlan {
            columns: 132,
            rows: 50,
        };
        rig.console.change(&DeviceChange::Terminal(size)).unwrap();
        assert_eq!(rig.driver.interrupts.config_changes(), 1);
        let mut config = [0xff; 6];
        rig.console.read_config(0, &mut config);
        assert_eq!(config, [132, 0, 50, 0, 0, 0]);
        assert_eq!(
            rig.console.save(),
            [1, 132, 1, 50],
            "the released format of version 1"
        );
        let mut arrived = self::rig().console;
        arrived.restore(&rig.console.save()).unwrap();
        assert_eq!(arrived.size, size);
        assert!(arrived.restore(&[1, 132, 1]).is_err());
        assert!(rig.console.change(&DeviceChange::Resized).is_err());
    }
}
