//! The thread that runs the device models: waits for the driver's notifications, for the devices' own
//! descriptors and for commands, and does one thing at a time.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vmm_sys_util::eventfd::EventFd;

use super::hooks::ThreadKind;
use crate::devices::serial::Console;
use crate::devices::virtio::transport::VirtioPci;
use crate::devices::watchdog::Watchdog;

/// The device thread, seen from the control thread.
pub struct DeviceThread {
    commands: Sender<Command>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts it, stopped. `wake` is the event that every function holds a copy of. Returns when the
    /// thread has confined itself.
    pub fn spawn(
        wake: EventFd,
        functions: Vec<Arc<VirtioPci>>,
        watchdog: Option<Arc<Watchdog>>,
        console: Option<Arc<Console>>,
        confine: fn(ThreadKind) -> Result<(), String>,
    ) -> Result<Self, DeviceThreadError> {
        let runner = Runner::new(wake.try_clone()?, functions, watchdog, console)?;
        let (commands, receiver) = channel();
        let (ready_sender, ready) = channel();
        let thread = Builder::new().name("devices".into()).spawn(move || {
            let confined = confine(ThreadKind::Device);
            let go = confined.is_ok();
            let _ = ready_sender.send(confined);
            if go {
                runner.serve(&receiver);
            }
        })?;
        let confined = ready.recv().map_err(|_| DeviceThreadError::Gone)?;
        let this = Self {
            commands,
            wake,
            thread: Some(thread),
        };
        confined.map_err(DeviceThreadError::Confine)?;
        Ok(this)
    }

    /// Lets the devices work.
    pub fn run(&self) -> Result<(), DeviceThreadError> {
        self.send(Command::Run)
    }

    /// Stops them; returns when what was under way is complete.
    pub fn pause(&self) -> Result<(), DeviceThreadError> {
        let (sender, done) = channel();
        self.send(Command::Pause(sender))?;
        done.recv_timeout(DEADLINE)
            .map_err(|_| DeviceThreadError::Gone)
    }

    /// Announces the guest's addresses, several times with growing intervals.
    pub fn announce(&self) -> Result<(), DeviceThreadError> {
        self.send(Command::Announce)
    }

    /// Takes in a function that was put into a slot; it is number `index` from now on.
    pub fn insert(&self, index: usize, function: Arc<VirtioPci>) -> Result<(), DeviceThreadError> {
        self.send(Command::Insert(index, function))
    }

    /// Lets go of one; returns when what was under way is complete.
    pub fn remove(&self, index: usize) -> Result<(), DeviceThreadError> {
        let (sender, done) = channel();
        self.send(Command::Remove(index, sender))?;
        done.recv_timeout(DEADLINE)
            .map_err(|_| DeviceThreadError::Gone)
    }

    /// The event that wakes it, of which every function has a copy.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    fn send(&self, command: Command) -> Result<(), DeviceThreadError> {
        self.commands
            .send(command)
            .map_err(|_| DeviceThreadError::Gone)?;
        self.wake.write(1)?;
        Ok(())
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        let _ = self.send(Command::Exit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What can go wrong with the device thread.
#[derive(Debug, thiserror::Error)]
pub enum DeviceThreadError {
    /// The kernel refused.
    #[error("device thread: {0}")]
    System(#[from] std::io::Error),
    /// The kernel refused.
    #[error("device thread: {0}")]
    Errno(#[from] Errno),
    /// It could not confine itself, and ended.
    #[error("device thread cannot be confined: {0}")]
    Confine(String),
    /// It is gone or does not answer.
    #[error("device thread does not answer")]
    Gone,
}

enum Command {
    Run,
    Pause(Sender<()>),
    Announce,
    Insert(usize, Arc<VirtioPci>),
    Remove(usize, Sender<()>),
    Exit,
}

struct Runner {
    epoll: Epoll,
    wake: EventFd,
    /// By number; none where a slot is empty.
    functions: Vec<Option<Arc<VirtioPci>>>,
    watchdog: Option<Arc<Watchdog>>,
    console: Option<Arc<Console>>,
    typing: Option<RawFd>,
    polled: Vec<Vec<(RawFd, u32)>>,
    announcements: VecDeque<Instant>,
    running: bool,
}

impl Runner {
    fn new(
        wake: EventFd,
        functions: Vec<Arc<VirtioPci>>,
        watchdog: Option<Arc<Watchdog>>,
        console: Option<Arc<Console>>,
    ) -> Result<Self, DeviceThreadError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut runner = Self {
            epoll,
            wake,
            functions: Vec::with_capacity(functions.len()),
            watchdog,
            console,
            typing: None,
            polled: Vec::new(),
            announcements: VecDeque::new(),
            running: false,
        };
        runner.add(runner.wake.as_raw_fd(), Source::Wake)?;
        for (index, function) in functions.into_iter().enumerate() {
            runner.insert(index, function)?;
        }
        Ok(runner)
    }

    fn insert(&mut self, function: usize, device: Arc<VirtioPci>) -> Result<(), Errno> {
        for (queue, kick) in device.kicks().iter().enumerate() {
            self.add(kick.as_raw_fd(), Source::Queue { function, queue })?;
        }
        if self.functions.len() <= function {
            self.functions.resize(function + 1, None);
            self.polled.resize(function + 1, Vec::new());
        }
        if let Some(place) = self.functions.get_mut(function) {
            *place = Some(device);
        }
        Ok(())
    }

    fn remove(&mut self, function: usize) {
        let Some(device) = self.functions.get_mut(function).and_then(Option::take) else {
            return;
        };
        let polled = self.polled.get_mut(function).map(std::mem::take);
        let kicks = device.kicks().iter().map(AsRawFd::as_raw_fd);
        let others = polled.iter().flatten().map(|(fd, _)| *fd);
        for fd in kicks.chain(others) {
            with_fd(fd, |fd| {
                let _ = self.epoll.delete(fd);
            });
        }
    }

    fn device(&self, function: usize) -> Option<&Arc<VirtioPci>> {
        self.functions.get(function)?.as_ref()
    }

    fn serve(mut self, commands: &Receiver<Command>) {
        let mut events = [EpollEvent::empty(); 32];
        loop {
            if self.obey(commands).is_break() {
                return;
            }
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(e) => {
                    tracing::error!("device thread ends: epoll: {e}");
                    return;
                }
            };
            for event in events.iter().take(count) {
                self.dispatch(Source::from_token(event.data()));
            }
            self.announce_if_due();
            if let Some(watchdog) = &self.watchdog {
                watchdog.look();
            }
        }
    }

    /// Takes commands: all there are while running, one after the other until `Run` while stopped.
    fn obey(&mut self, commands: &Receiver<Command>) -> std::ops::ControlFlow<()> {
        use std::ops::ControlFlow::{Break, Continue};
        loop {
            let command = if self.running {
                match commands.try_recv() {
                    Ok(command) => command,
                    Err(_) => return Continue(()),
                }
            } else {
                match commands.recv() {
                    Ok(command) => command,
                    Err(_) => return Break(()),
                }
            };
            match command {
                Command::Run => self.start(),
                Command::Pause(done) => {
                    self.service_all();
                    self.functions
                        .iter()
                        .flatten()
                        .for_each(|device| device.drain());
                    self.running = false;
                    self.announcements.clear();
                    if let Some(watchdog) = &self.watchdog {
                        watchdog.stand();
                    }
                    let _ = done.send(());
                }
                Command::Announce => {
                    let now = Instant::now();
                    self.announcements = ANNOUNCE_AFTER.iter().map(|after| now + *after).collect();
                }
                Command::Insert(function, device) => {
                    if let Err(e) = self.insert(function, device) {
                        tracing::warn!(function, "notifications of a device are lost: {e}");
                    }
                    if self.running {
                        self.service_all();
                    }
                }
                Command::Remove(function, done) => {
                    self.remove(function);
                    let _ = done.send(());
                }
                Command::Exit => return Break(()),
            }
        }
    }

    fn start(&mut self) {
        self.running = true;
        if let Some(watchdog) = &self.watchdog {
            watchdog.go();
        }
        self.service_all();
        for function in 0..self.functions.len() {
            self.refresh(function);
        }
    }

    fn dispatch(&mut self, source: Source) {
        match source {
            Source::Wake => {
                let _ = self.wake.read();
                self.service_all();
            }
            Source::Queue { function, queue } => {
                let Some(device) = self.device(function) else {
                    return;
                };
                if let Some(kick) = device.kicks().get(queue) {
                    let _ = kick.read();
                }
                // The driver may have said DRIVER_OK and notified since the last look.
                device.service();
                device.queue_event(queue as u16);
                self.refresh(function);
            }
            Source::Console => {
                if let Some(console) = &self.console {
                    console.input_event();
                }
                self.refresh_console();
            }
            Source::Device { function, token } => {
                if let Some(device) = self.device(function) {
                    device.fd_event(token);
                }
                self.refresh(function);
            }
        }
    }

    /// Polls what is typed, while the guest can take it.
    fn refresh_console(&mut self) {
        let wanted = self.console.as_ref().and_then(|console| console.poll_fd());
        if wanted == self.typing {
            return;
        }
        if let Some(fd) = self.typing.take() {
            with_fd(fd, |fd| {
                let _ = self.epoll.delete(fd);
            });
        }
        match wanted.map(|fd| self.add(fd, Source::Console)) {
            Some(Err(e)) => tracing::warn!("what is typed at the console cannot be polled: {e}"),
            _ => self.typing = wanted,
        }
    }

    fn service_all(&mut self) {
        self.refresh_console();
        for function in 0..self.functions.len() {
            if let Some(device) = self.device(function) {
                device.service();
            }
            self.refresh(function);
        }
    }

    /// Polls what the device wants polled now. A descriptor may have been closed and its number used
    /// again, so each is set anew.
    fn refresh(&mut self, function: usize) {
        let (Some(device), Some(polled)) = (self.device(function), self.polled.get(function))
        else {
            return;
        };
        let wanted = device.poll_fds();
        for (fd, _) in polled
            .iter()
            .filter(|(fd, _)| !wanted.iter().any(|(want, _)| want == fd))
        {
            with_fd(*fd, |fd| {
                let _ = self.epoll.delete(fd);
            });
        }
        for (fd, token) in &wanted {
            let source = Source::Device {
                function,
                token: *token,
            };
            let mut event = EpollEvent::new(EpollFlags::EPOLLIN, source.token());
            let result = with_fd(*fd, |fd| match self.epoll.modify(fd, &mut event) {
                Err(Errno::ENOENT) => self.epoll.add(fd, event),
                other => other,
            });
            if let Some(Err(e)) = result {
                tracing::warn!(
                    function,
                    token,
                    "descriptor of a device cannot be polled: {e}"
                );
            }
        }
        if let Some(polled) = self.polled.get_mut(function) {
            *polled = wanted;
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let fed_until = self.watchdog.as_ref().and_then(|watchdog| watchdog.next());
        let Some(next) = self
            .announcements
            .front()
            .copied()
            .into_iter()
            .chain(fed_until)
            .min()
        else {
            return EpollTimeout::NONE;
        };
        let wait = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        EpollTimeout::try_from(wait).unwrap_or(EpollTimeout::NONE)
    }

    fn announce_if_due(&mut self) {
        while self
            .announcements
            .front()
            .is_some_and(|due| *due <= Instant::now())
        {
            self.announcements.pop_front();
            for device in self.functions.iter().flatten() {
                device.announce();
            }
        }
    }

    fn add(&self, fd: RawFd, source: Source) -> Result<(), Errno> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, source.token());
        with_fd(fd, |fd| self.epoll.add(fd, event)).unwrap_or(Err(Errno::EBADF))
    }
}

/// What an epoll event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Wake,
    Queue { function: usize, queue: usize },
    Device { function: usize, token: u32 },
    Console,
}

impl Source {
    fn token(self) -> u64 {
        match self {
            Self::Wake => 0,
            Self::Queue { function, queue } => (1 << 56) | ((function as u64) << 32) | queue as u64,
            Self::Device { function, token } => {
                (2 << 56) | ((function as u64) << 32) | u64::from(token)
            }
            Self::Console => 3 << 56,
        }
    }

    fn from_token(token: u64) -> Self {
        let function = ((token >> 32) & 0xff_ffff) as usize;
        let low = (token & 0xffff_ffff) as u32;
        match token >> 56 {
            1 => Self::Queue {
                function,
                queue: low as usize,
            },
            2 => Self::Device {
                function,
                token: low,
            },
            3 => Self::Console,
            _ => Self::Wake,
        }
    }
}

#[expect(unsafe_code, reason = "devices name their descriptors by number")]
fn with_fd<R>(fd: RawFd, work: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
    if fd < 0 {
        return None;
    }
    // SAFETY: the descriptor is only handed to epoll_ctl, which checks it; should its owner have closed
    // it, the call fails or watches another descriptor of this process, no memory is touched.
    Some(work(unsafe { BorrowedFd::borrow_raw(fd) }))
}

const DEADLINE: Duration = Duration::from_secs(30);
const ANNOUNCE_AFTER: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(350),
    Duration::from_millis(750),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::transport::tests::{Bench, bench};

    /// A running thread with one function whose driver is ready.
    fn started(bench: &mut Bench) -> (DeviceThread, Arc<VirtioPci>) {
        let spare = self::bench();
        let function = Arc::new(std::mem::replace(&mut bench.function, spare.function));
        let wake = bench.wake.try_clone().unwrap();
        let thread =
            DeviceThread::spawn(wake, vec![Arc::clone(&function)], None, None, |_| Ok(())).unwrap();
        thread.run().unwrap();
        (thread, function)
    }

    fn soon(mut condition: impl FnMut() -> bool) -> bool {
        (0..400).any(|_| {
            std::thread::sleep(Duration::from_millis(5));
            condition()
        })
    }

    #[test]
    fn notifications_reach_the_device_while_it_runs_and_wait_while_it_is_paused() {
        let mut bench = bench();
        bench.say_driver_ok();
        let (thread, function) = started(&mut bench);
        function.kicks()[1].write(1).unwrap();
        assert!(soon(|| bench.log.lock().unwrap().events == [1]));
        thread.pause().unwrap();
        function.kicks()[0].write(1).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(bench.log.lock().unwrap().events, [1]);
        thread.run().unwrap();
        assert!(soon(|| bench.log.lock().unwrap().events == [1, 0]));
    }

    #[test]
    fn a_reset_by_the_driver_is_carried_out_and_the_guest_is_announced_five_times() {
        let mut bench = bench();
        bench.say_driver_ok();
        let (thread, function) = started(&mut bench);
        function.bar_write(0x14, &[0]);
        let mut status = [0];
        assert!(soon(|| {
            function.bar_read(0x14, &mut status);
            status == [0]
        }));
        thread.announce().unwrap();
        assert!(soon(|| bench.log.lock().unwrap().announced == 5));
    }

    #[test]
    fn a_thread_that_cannot_be_confined_does_not_start() {
        let bench = bench();
        let wake = bench.wake.try_clone().unwrap();
        let result = DeviceThread::spawn(wake, vec![], None, None, |_| Err("no filter".into()));
        assert!(matches!(result, Err(DeviceThreadError::Confine(_))));
    }

    #[test]
    fn tokens_go_round() {
        for source in [
            Source::Wake,
            Source::Queue {
                function: 3,
                queue: 2,
            },
            Source::Console,
            Source::Device {
                function: 30,
                token: u32::MAX,
            },
        ] {
            assert_eq!(Source::from_token(source.token()), source);
        }
    }
}
