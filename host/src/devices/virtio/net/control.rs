//! The control queue (specification section 5.1.6.5): how many pairs of queues the driver uses, and no other command.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use super::super::ring::Chain;

/// Where the control queue is among the queues: behind all pairs for a driver that knows of them, else behind the first
/// (section 5.1.2).
pub(super) fn queue(features: u64, pairs: usize) -> Option<usize> {
    let has = |feature: u32| features & 1 << feature != 0;
    let known = if has(VIRTIO_NET_F_MQ) { pairs } else { 1 };
    has(VIRTIO_NET_F_CTRL_VQ).then_some(2 * known)
}

/// How many pairs a command asks for; nothing if it is another command, or asks for what the card has not.
pub(super) fn pairs_wanted(chain: &Chain<'_>, pairs: usize) -> Option<usize> {
    let mut command = [0; 4];
    if chain.broken
        || chain.readable.len() != command.len()
        || chain.readable.read_at(0, &mut command) != command.len()
    {
        return None;
    }
    let [class, order, low, high] = command;
    let set = (u32::from(class), u32::from(order))
        == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
    let wanted = usize::from(u16::from_le_bytes([low, high]));
    (set && (1..=pairs).contains(&wanted)).then_some(wanted)
}

/// Says whether the command was carried out; how many bytes that took.
pub(super) fn answer(chain: &Chain<'_>, done: bool) -> u32 {
    let word = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    if chain.broken {
        return 0;
    }
    chain.writable.write_at(0, &[word as u8]) as u32
}

/// Descriptors of a command: its kind, its argument, the answer, and one to spare.
pub(super) const CHAIN_MAX: usize = 4;
pub(super) const QUEUE_SIZE: u16 = 64;
