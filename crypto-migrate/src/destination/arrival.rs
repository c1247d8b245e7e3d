//! From the first connection's TLS to the first page: the agreement, then the further connections.
//!
//! Not yet believed: that a further connection belongs here, until it has proven that; one that does not changes nothing.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::lane::Lane;
use super::{
    Arrive, DestinationConfig, DestinationError, Received, Receiver, answer_probes, at, on,
};
use crate::channel::Channel;
use crate::crypto::KeyChain;
use crate::guest::{Admission, DestinationGuest, GuestOffer};
use crate::page::Binding;
use crate::progress::{Phase, Progress};
use crate::session::{self, Gate, Granted, JoinError, Membership, SessionFacts, Times};
use crate::tls::Transport;
use crate::transcript::PageTable;
use crate::wire::messages::{Begin, Purpose};

/// A connection whose TLS stands.
pub(super) struct Arrival<'a, T> {
    pub(super) channel: &'a mut Channel<T>,
    pub(super) further: &'a mut Vec<Channel<T>>,
    pub(super) max_streams: u16,
    pub(super) config: &'a DestinationConfig,
    pub(super) started: Instant,
    /// Whether there may be something to remove.
    pub(super) admitted: bool,
}

impl<T: Transport> Arrival<'_, T> {
    pub(super) fn run(
        &mut self,
        arrive: &mut Arrive<'_, T>,
        guest: &mut dyn DestinationGuest,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Received, DestinationError> {
        let (config, started) = (self.config, self.started);
        progress(Progress::new(Phase::Agree, started));
        let deadline = Instant::now() + config.deadlines.agree;
        let mut settled = None;
        let admitted = &mut self.admitted;
        let mut admit = |purpose, offer: &GuestOffer, session: &SessionFacts| {
            guest.agreed(session)?;
            if purpose == Purpose::Settle {
                let settlement = guest.settle(offer, &session.peer)?;
                settled = Some(settlement);
                let evidence = settlement.encode();
                return Ok(Admission { evidence });
            }
            *admitted = true; // even a refusal may have built something
            guest.admit(offer, &session.peer)
        };
        let granted = Granted {
            streams: self.max_streams,
            ticket: config.ticket,
        };
        let owner_key = config.owner_key.as_ref();
        let accepted = session::accept(
            self.channel,
            &config.local,
            owner_key,
            granted,
            deadline,
            &mut admit,
        )
        .map_err(DestinationError::Agree)?;
        if let Some(settlement) = settled {
            return Ok(Received::Settled(settlement));
        }
        let (session, offer) = (accepted.session, accepted.guest);
        if accepted.purpose == Purpose::Assess {
            progress(Progress::new(Phase::Assess, started));
            return answer_probes(self.channel, config).map(|()| Received::Assessed);
        }
        let keys = self.gather(arrive, &session.membership, session.streams)?;
        progress(Progress::new(Phase::Begin, started));
        let deadline = Instant::now() + config.deadlines.agree;
        let begin: Begin = self
            .channel
            .receive_message("Begin", deadline)
            .map_err(on(Phase::Begin))?;
        guest.begin(&begin.start).map_err(at(Phase::Begin))?;
        let further = self.further.iter_mut().zip(keys);
        let further = further.map(|(channel, (keys, binding))| Lane::new(channel, keys, binding));
        let receiver = Receiver {
            table: PageTable::new(&offer.memory)?,
            further: further.collect(),
            first: Lane::new(self.channel, session.page_keys, session.binding),
            peer: session.peer,
            path: session.path,
            offer_hash: session.offer_hash,
            offer,
            config,
            guest,
            progress,
            started,
            round_pages: 0,
            pages: 0,
            zero_pages: 0,
        };
        Ok(Received::Moved(Box::new(receiver.receive()?)))
    }

    /// Waits until every further connection has joined. One that may not join is told so and changes nothing.
    fn gather(
        &mut self,
        arrive: &mut Arrive<'_, T>,
        membership: &Membership,
        streams: u16,
    ) -> Result<Vec<(KeyChain, Binding)>, DestinationError> {
        let deadlines = self.config.deadlines;
        let times = Times {
            connect: deadlines.connect,
            frame: deadlines.frame,
            agree: deadlines.agree,
        };
        let deadline = Instant::now() + deadlines.agree;
        let mut gate = Gate::new(membership, streams);
        while gate.missing() > 0 {
            if self.config.cancel.load(Ordering::Relaxed) {
                return Err(DestinationError::Cancelled);
            }
            self.channel.check_abort().map_err(on(Phase::Agree))?;
            if Instant::now() >= deadline {
                return Err(DestinationError::Join(gate.late()));
            }
            let arrived = arrive(ARRIVAL_WAIT)
                .map_err(|error| DestinationError::Join(JoinError::Dial(error)))?;
            if let Some(transport) = arrived
                && let Err(error) =
                    gate.admit(transport, &self.config.local, times, cancelled(self.config))
            {
                tracing::warn!(code = error.code(), %error, "a further connection was refused");
            }
        }
        let mut keys = Vec::new();
        for joined in gate.open() {
            self.further.push(joined.channel);
            keys.push((joined.page_keys, joined.binding));
        }
        Ok(keys)
    }
}

pub(super) fn cancelled(config: &DestinationConfig) -> Box<dyn Fn() -> bool + Send> {
    let cancel = config.cancel.clone();
    Box::new(move || cancel.load(Ordering::Relaxed))
}

/// How long the first connection is not looked at while the further ones come.
const ARRIVAL_WAIT: Duration = Duration::from_millis(20);
