//! One connection of a move, at the source: its frames, its seals, and what it has carried.

use super::SourceError;
use crate::channel::{Channel, ChannelError};
use crate::crypto::KeyChain;
use crate::guest::{Gpn, PageContent};
use crate::page::{Binding, PageSealer};
use crate::progress::Phase;
use crate::tls::Transport;
use crate::transcript::SealLog;
use crate::wire::batch::{BatchBuilder, EntryHeader};
use crate::wire::messages::RoundEnd;

pub(super) struct Lane<'a, T> {
    pub(super) channel: &'a mut Channel<T>,
    pub(super) batch: BatchBuilder,
    pub(super) log: SealLog,
    sealer: PageSealer,
    /// Pages of this round.
    pages: u64,
}

impl<'a, T: Transport> Lane<'a, T> {
    pub(super) fn new(channel: &'a mut Channel<T>, keys: KeyChain, binding: Binding) -> Self {
        Self {
            channel,
            batch: BatchBuilder::new(),
            log: SealLog::default(),
            sealer: PageSealer::new(keys, binding),
            pages: 0,
        }
    }

    /// Seals pages into the batch.
    pub(super) fn seal(
        &mut self,
        round: u32,
        page: Gpn,
        count: u32,
        content: PageContent<'_>,
    ) -> Result<EntryHeader, SourceError> {
        let batch = &mut self.batch;
        let (header, tag) = self.sealer.seal(batch, round, page, count, content)?;
        self.log.add(&header, &tag);
        self.pages += u64::from(count);
        Ok(header)
    }

    /// Sends the batch, if it has any entry.
    pub(super) fn send_batch(&mut self) -> Result<(), ChannelError> {
        self.channel.send_batch(&mut self.batch)
    }

    /// Bytes sent, and waiting in the batch.
    pub(super) fn queued(&self) -> u64 {
        self.batch.payload_length() as u64 + self.channel.bytes()
    }

    /// Says on this stream that the round is over, and how much of it came over it.
    pub(super) fn end_round(&mut self, round: u32, phase: Phase) -> Result<(), ChannelError> {
        let pages = std::mem::take(&mut self.pages);
        self.channel.send(&RoundEnd {
            round,
            pages,
            next_sequence: self.sealer.next_sequence(),
            last: phase == Phase::Final,
        })
    }
}
