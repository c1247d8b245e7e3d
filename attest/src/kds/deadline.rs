//! A connection that ends at a set time, whatever comes over it.
//!
//! ureq's own timeouts begin anew with each byte that arrives, at the latest from a second on, so a
//! service that sends a byte a second could hold a caller for hours. This sits between TCP and TLS
//! and counts from the connection on.

use std::time::{Duration, Instant};
use ureq::unversioned::transport::{
    Buffers, ConnectProxyConnector, ConnectionDetails, Connector, NextTimeout, RustlsConnector,
    TcpConnector, Transport, time,
};
use ureq::{Error, Timeout};

/// TCP, through an HTTP proxy where one is set, with TLS where the address asks for it, and never
/// longer than `deadline`.
pub(super) fn connector(deadline: Duration) -> impl Connector {
    ConnectProxyConnector::default()
        .chain(TcpConnector::default())
        .chain(DeadlineConnector(deadline))
        .chain(RustlsConnector::default())
}

#[derive(Debug)]
struct DeadlineConnector(Duration);

#[derive(Debug)]
struct Deadlined<T> {
    inner: T,
    /// `None` where it is beyond what the clock can say.
    end: Option<Instant>,
}

impl<In: Transport> Connector<In> for DeadlineConnector {
    type Out = Deadlined<In>;

    fn connect(
        &self,
        _: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, Error> {
        Ok(chained.map(|inner| Deadlined {
            inner,
            end: Instant::now().checked_add(self.0),
        }))
    }
}

impl<T: Transport> Deadlined<T> {
    /// What is left of `timeout`, or the error once the end has come.
    fn left(&self, timeout: NextTimeout) -> Result<NextTimeout, Error> {
        let Some(end) = self.end else {
            return Ok(timeout);
        };
        match end.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(Error::Timeout(Timeout::Global)),
            left => Ok(NextTimeout {
                after: time::Duration::Exact(left.min(*timeout.after)),
                ..timeout
            }),
        }
    }
}

impl<T: Transport> Transport for Deadlined<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let left = self.left(timeout)?;
        self.inner.transmit_output(amount, left)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let left = self.left(timeout)?;
        self.inner.await_input(left)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }

    fn is_tls(&self) -> bool {
        self.inner.is_tls()
    }
}
