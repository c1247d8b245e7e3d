//! The socket device as the transport sees it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::Queue;

use super::super::ring::{Active, INDIRECT};
use super::super::{Activation, RestoreError, VirtioDevice, read_config_from, saved};
use super::{Arrival, EVENT, PORT_MAX, PORT_MIN, RX, TX, Vsock};

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        // Without any feature of its own the device has stream sockets only. Without EVENT_IDX the driver notifies us of
        // every buffer it returns to the event queue, and so of having seen that its connections are gone.
        INDIRECT
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_from(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.active = Some(Active::new(activation));
        self.starved = false;
        self.settle();
    }

    fn reset(&mut self) {
        self.active = None;
        self.drop_connections();
        // A driver that starts anew has no connections to lose.
        self.arrival = Arrival::Settled;
    }

    fn poll_fds(&self) -> Vec<(RawFd, u32)> {
        match self.active.is_some() && self.held {
            true => vec![(self.epoll.0.as_raw_fd(), 0)],
            false => Vec::new(),
        }
    }

    fn queue_event(&mut self, index: u16) {
        match usize::from(index) {
            RX => self.starved = false,
            TX => self.take_packets(),
            EVENT if self.arrival == Arrival::Told => self.arrival = Arrival::Settled,
            EVENT => self.tell_arrival(),
            _ => {}
        }
        self.settle();
    }

    fn fd_event(&mut self, _token: u32) {
        if self.active.is_some() && self.held {
            self.poll();
            self.settle();
        }
    }

    fn queues(&self) -> Vec<Queue> {
        self.active.as_ref().map(Active::queues).unwrap_or_default()
    }

    fn save(&self) -> Vec<u8> {
        saved::encode(
            STATE_VERSION,
            &State {
                cid: self.cid,
                next_port: self.next_port,
            },
        )
    }

    fn expect_copy(&mut self) {
        self.copy = true;
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let refuse = |reason| RestoreError {
            device: "vsock",
            reason,
        };
        let State { cid, next_port } = saved::decode("vsock", STATE_VERSION, state)?;
        // The driver asks for it anew when it hears that its connections are gone.
        if cid != self.cid && !self.copy {
            return Err(refuse(format!(
                "the guest's context id is {cid}, the one here is {}",
                self.cid
            )));
        }
        if !(PORT_MIN..=PORT_MAX).contains(&next_port) {
            return Err(refuse(format!("port {next_port} is not one of the host's")));
        }
        self.next_port = next_port;
        self.arrival = Arrival::Arrived;
        Ok(())
    }

    fn release(&mut self) -> io::Result<()> {
        // Connections stay: if the move fails, they go on.
        self.held = false;
        Ok(())
    }

    fn acquire(&mut self) -> io::Result<()> {
        self.held = true;
        self.take_packets();
        self.tell_arrival();
        self.settle();
        Ok(())
    }

    fn announce(&mut self) {
        match self.arrival {
            Arrival::Settled => {}
            Arrival::Arrived => {
                self.drop_connections();
                self.arrival = Arrival::Due;
                self.tell_arrival();
            }
            Arrival::Due => self.tell_arrival(),
            // It had its time; clients wait no longer.
            Arrival::Told => self.arrival = Arrival::Settled,
        }
        self.settle();
    }

    fn faults(&self) -> u64 {
        self.active.as_ref().map_or(0, Active::faults)
    }
}

impl Vsock {
    fn drop_connections(&mut self) {
        for (port, connection) in std::mem::take(&mut self.connections) {
            self.retire(port, connection);
        }
        self.replies.clear();
        self.held_back = false;
        self.full = false;
    }
}

/// What goes with the guest. Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    cid: u64,
    /// So that the ports of connections that are gone are not used again soon.
    next_port: u32,
}

const STATE_VERSION: u8 = 1;
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
