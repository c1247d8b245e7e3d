//! After a commit that was not answered: the source asks the destination who has the guest, and both act on the answer.
//!
//! The question is an offer with [`Purpose::Settle`](crate::wire::messages::Purpose::Settle), the answer stands in the accept in
//! the place of platform evidence: both are signed over the transcript, so that whoever terminates the TLS can neither give nor
//! change an answer, nor replay one. Nothing else travels.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::guest::{GuestOffer, Refusal};
use crate::progress::{Phase, Progress};
use crate::session::{SessionError, SessionFacts};
use crate::source::{CLOSE_TIME, SourceConfig, SourceError, agree, connect, give_up};
use crate::tls::Transport;
use crate::wire::messages::Purpose;

/// Who has a guest whose commit was not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Settlement {
    /// The destination took it over under the epoch that was committed, whatever became of it since. The source destroys its
    /// copy.
    Held,
    /// The destination does not have it and will not run it by that commit any more. The source runs it on.
    Never,
}

impl Settlement {
    /// As it stands in the accept.
    pub(crate) fn encode(self) -> Vec<u8> {
        vec![match self {
            Self::Held => 1,
            Self::Never => 2,
        }]
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [1] => Some(Self::Held),
            [2] => Some(Self::Never),
            _ => None,
        }
    }
}

/// What a source asks about: `epoch` is the one that it held before the commit.
pub fn question(vm_id: [u8; 16], name: &str, epoch: u64) -> GuestOffer {
    GuestOffer {
        vm_id,
        name: name.to_owned(),
        epoch,
        memory: Vec::new(),
        description: Vec::new(),
    }
}

/// Asks the destination. `agreed` asks local policy about the session. On any error nothing is settled: the guest stays as it
/// is.
pub fn settle<T: Transport>(
    transport: T,
    config: &SourceConfig,
    question: &GuestOffer,
    agreed: &mut dyn FnMut(&SessionFacts) -> Result<(), Refusal>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Settlement, SourceError> {
    let started = Instant::now();
    let mut channel = connect(transport, config, progress, started)?;
    progress(Progress::new(Phase::Agree, started));
    let answer =
        agree(&mut channel, config, question, agreed, Purpose::Settle).and_then(|session| {
            Settlement::decode(&session.evidence).ok_or(SourceError::Agree(SessionError::Offer(
                "answer of the destination",
            )))
        });
    match answer {
        Ok(settlement) => {
            channel.close(CLOSE_TIME);
            Ok(settlement)
        }
        Err(error) => Err(give_up(&mut channel, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Gpn, PageRange};
    use crate::session::check_offer;

    #[test]
    fn an_answer_is_one_of_two_bytes() {
        for settlement in [Settlement::Held, Settlement::Never] {
            assert_eq!(Settlement::decode(&settlement.encode()), Some(settlement));
        }
        for other in [&[][..], &[0], &[3], &[1, 1], b"evidence"] {
            assert_eq!(Settlement::decode(other), None);
        }
    }

    #[test]
    fn a_question_names_no_memory_and_an_offer_does() {
        let asked = question([1; 16], "vault", 4);
        assert!(check_offer(&asked, Purpose::Settle).is_ok());
        assert!(check_offer(&asked, Purpose::Move).is_err());
        let memory = vec![PageRange {
            start: Gpn(0),
            count: 1,
        }];
        let offered = GuestOffer { memory, ..asked };
        assert!(check_offer(&offered, Purpose::Settle).is_err());
        assert!(check_offer(&offered, Purpose::Assess).is_ok());
        let last = question([1; 16], "vault", u64::MAX);
        assert!(check_offer(&last, Purpose::Settle).is_err());
    }
}
