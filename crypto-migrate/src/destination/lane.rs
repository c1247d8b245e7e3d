//! One connection of a move, at the destination: its frames, its seals, and what it has carried.

use super::DestinationError;
use crate::channel::Channel;
use crate::crypto::KeyChain;
use crate::page::{Binding, OpenError, Opened, PageOpener};
use crate::tls::Transport;
use crate::transcript::SealLog;
use crate::wire::batch::Entries;
use crate::wire::messages::RoundEnd;

pub(super) struct Lane<'a, T> {
    pub(super) channel: &'a mut Channel<T>,
    pub(super) log: SealLog,
    opener: PageOpener,
    /// Pages of this round.
    pages: u64,
}

impl<'a, T: Transport> Lane<'a, T> {
    pub(super) fn new(channel: &'a mut Channel<T>, keys: KeyChain, binding: Binding) -> Self {
        Self {
            channel,
            log: SealLog::default(),
            opener: PageOpener::new(keys, binding),
            pages: 0,
        }
    }

    /// Opens the next entry of a batch that came over it; `None` after the last.
    pub(super) fn open_next<'p>(
        &mut self,
        entries: &mut Entries<'p>,
    ) -> Result<Option<Opened<'p>>, OpenError> {
        let opened = self.opener.open_next(entries)?;
        if let Some(page) = &opened {
            self.log.add(&page.header, &page.tag);
            self.pages += u64::from(page.header.count);
        }
        Ok(opened)
    }

    /// The round whose pages it accepts.
    pub(super) fn round(&self) -> u32 {
        self.opener.round()
    }

    pub(super) fn next_round(&mut self) {
        self.opener.next_round();
    }

    /// The source says that the round is over on this stream: it must be this one, and all of it must have come.
    pub(super) fn check_end(&mut self, end: RoundEnd) -> Result<(), DestinationError> {
        let (current, received) = (self.round(), std::mem::take(&mut self.pages));
        let RoundEnd { round, pages, .. } = end;
        if round != current {
            return Err(DestinationError::Round {
                got: round,
                current,
            });
        }
        if pages != received || end.next_sequence != self.opener.next_sequence() {
            return Err(DestinationError::Incomplete {
                round,
                named: pages,
                received,
            });
        }
        Ok(())
    }
}
