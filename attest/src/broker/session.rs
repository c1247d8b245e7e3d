//! The sessions of a broker: how many, how long, and why a nonce serves once.
//!
//! An attestation counts only for a session that this process holds in memory, in the state
//! *challenged*, and with exactly that session's nonce. Taking it ends that state before anything
//! in the message is looked at, so a nonce serves once, whatever comes of it. A restart forgets
//! every session, so no nonce of before is known any more.
//!
//! What is left is a nonce that comes *twice*: from a random generator that repeats itself (a
//! restored snapshot of the broker's machine). So a nonce is `epoch ‖ counter ‖ 32 random bytes`:
//! the [`Epoch`] is advanced on disk, and synchronised, before the first nonce of a start is made,
//! and the counter never repeats within one.

use super::evidence::GuestEvidence;
use super::key::WrappingKey;
use super::protocol::Request;
use super::{Limits, Refusal};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom, SystemRandom};
use std::collections::HashMap;
use std::time::Duration;

/// The number of a broker's start; never the same for two starts over one state folder.
///
/// Made only from a number that has been written and synchronised first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epoch(u64);

impl Epoch {
    /// The epoch `number`, which the caller has made durable.
    pub const fn durable(number: u64) -> Self {
        Self(number)
    }
}

/// What the session of an accepted guest keeps.
#[derive(Debug, Clone)]
pub(super) struct Attested {
    pub evidence: GuestEvidence,
    pub report_data: [u8; 64],
    pub key: WrappingKey,
}

/// A challenge that was taken: nobody can take it again.
pub(super) struct Taken {
    pub request: Request,
    pub nonce: String,
}

enum State {
    Challenged { request: Request, nonce: String },
    Judging,
    Attested(Box<Attested>),
}

struct Session {
    state: State,
    ends: Duration,
}

pub(super) struct Sessions {
    open: HashMap<String, Session>,
    epoch: Epoch,
    counter: u64,
    limits: Limits,
    random: SystemRandom,
}

impl Sessions {
    pub fn new(epoch: Epoch, limits: Limits) -> Self {
        Self {
            open: HashMap::new(),
            epoch,
            counter: 0,
            limits,
            random: SystemRandom::new(),
        }
    }

    /// A new session; its name and its nonce.
    pub fn open(&mut self, request: Request, now: Duration) -> Result<(String, String), Refusal> {
        self.forget_ended(now);
        if self.open.len() >= self.limits.sessions {
            return Err(Refusal::TooManySessions);
        }
        let name = hex::encode(self.random_bytes()?);
        let nonce = self.nonce()?;
        let state = State::Challenged {
            request,
            nonce: nonce.clone(),
        };
        let ends = now.saturating_add(self.limits.challenge);
        self.open.insert(name.clone(), Session { state, ends });
        Ok((name, nonce))
    }

    /// Takes the challenge of a session. Whoever comes second is refused.
    pub fn take(&mut self, name: &str, now: Duration) -> Result<Taken, Refusal> {
        let session = self.live(name, now)?;
        match std::mem::replace(&mut session.state, State::Judging) {
            State::Challenged { request, nonce } => Ok(Taken { request, nonce }),
            // What was attested stays attested, to the key it was attested with.
            kept => {
                session.state = kept;
                Err(Refusal::NonceUsed)
            }
        }
    }

    /// Ends the judgement of a session that [`take`](Self::take) began: a guest that was not
    /// accepted has no session any more.
    pub fn judged(&mut self, name: &str, attested: Option<Attested>, now: Duration) {
        match attested {
            Some(attested) => {
                if let Some(session) = self.open.get_mut(name) {
                    session.state = State::Attested(Box::new(attested));
                    session.ends = now.saturating_add(self.limits.attested);
                }
            }
            None => {
                self.open.remove(name);
            }
        }
    }

    /// What an attested session keeps.
    pub fn attested(&mut self, name: &str, now: Duration) -> Result<Attested, Refusal> {
        match &self.live(name, now)?.state {
            State::Attested(attested) => Ok((**attested).clone()),
            _ => Err(Refusal::NotAttested),
        }
    }

    /// How many there are.
    pub fn count(&mut self, now: Duration) -> usize {
        self.forget_ended(now);
        self.open.len()
    }

    fn live(&mut self, name: &str, now: Duration) -> Result<&mut Session, Refusal> {
        if self
            .open
            .get(name)
            .is_some_and(|session| session.ends <= now)
        {
            self.open.remove(name);
            return Err(Refusal::SessionExpired);
        }
        self.open.get_mut(name).ok_or(Refusal::NoSession)
    }

    fn forget_ended(&mut self, now: Duration) {
        self.open.retain(|_, session| session.ends > now);
    }

    fn nonce(&mut self) -> Result<String, Refusal> {
        self.counter = self.counter.checked_add(1).ok_or(Refusal::Internal)?;
        let mut nonce = Vec::with_capacity(48);
        nonce.extend(self.epoch.0.to_be_bytes());
        nonce.extend(self.counter.to_be_bytes());
        nonce.extend(self.random_bytes()?);
        Ok(STANDARD.encode(nonce))
    }

    fn random_bytes(&self) -> Result<[u8; 32], Refusal> {
        let mut bytes = [0; 32];
        self.random
            .fill(&mut bytes)
            .map_err(|_| Refusal::Internal)?;
        Ok(bytes)
    }
}
