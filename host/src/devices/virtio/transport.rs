//! The modern virtio PCI transport (virtio 1.2, section 4.1): one device model behind one PCI function.
//!
//! Every register value comes from the guest. Queue addresses are checked against guest memory when the
//! driver says DRIVER_OK, and again by each access.

mod registers;
mod state;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, GuestRam, Interrupt, VirtioDevice};
use crate::machine::plan::devices::{DeviceChange, DeviceStatus};
use crate::vmm::doorbells::Doorbells;
use crate::vmm::pci::PciFunction;
use crate::vmm::pci::config::{ConfigSpace, Identity};
use crate::vmm::pci::msix::Msix;

pub use state::{TransportStateError, VirtioStateV1};

/// A virtio device as a PCI function. vCPUs reach it through its registers, the device thread through
/// events, the control thread while both are stopped.
pub struct VirtioPci {
    config: Mutex<ConfigSpace>,
    window: usize,
    msix_control: usize,
    msix: Arc<Msix>,
    signals: Arc<Signals>,
    inner: Mutex<Inner>,
    kicks: Vec<EventFd>,
    wake: EventFd,
    ram: GuestRam,
    doorbells: Option<Arc<dyn Doorbells>>,
    /// Where a movable BAR is.
    placed: Mutex<Option<u64>>,
    /// It has been taken out of its slot: wherever the guest still puts its BAR, there are no doorbells any more.
    gone: AtomicBool,
}

/// Where a function sits and what it shares.
pub struct Placement {
    /// Guest physical address of BAR 0.
    pub bar: u32,
    /// Guest memory.
    pub ram: GuestRam,
    /// Wakes the device thread when the driver has changed the device's status.
    pub wake: EventFd,
    /// Whether DMA goes through the platform's rules (confidential guests).
    pub access_platform: bool,
}

impl VirtioPci {
    /// Puts a device model behind a function. `msix` needs a vector for configuration changes and one for
    /// each queue.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        msix: Arc<Msix>,
        place: Placement,
    ) -> std::io::Result<Self> {
        let queues = device.queue_sizes().len();
        let kicks: Vec<EventFd> = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<Result<_, _>>()?;
        let mut config = ConfigSpace::new(identity(device.device_type()));
        config.set_bar(place.bar, registers::BAR_SIZE);
        let (window, msix_control) =
            registers::add_capabilities(&mut config, msix.vectors(), queues)
                .ok_or_else(|| std::io::Error::other("no room for PCI capabilities"))?;
        let platform = if place.access_platform {
            F_ACCESS_PLATFORM
        } else {
            0
        };
        let inner = Inner {
            offered: device.features() | F_VERSION_1 | platform,
            setups: device
                .queue_sizes()
                .iter()
                .map(|size| QueueSetup::new(*size))
                .collect(),
            device,
            status: 0,
            change: Change::None,
            active: false,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            faults: 0,
        };
        Ok(Self {
            config: Mutex::new(config),
            window,
            msix_control,
            signals: Arc::new(Signals::new(Arc::clone(&msix), queues)),
            msix,
            inner: Mutex::new(inner),
            kicks,
            wake: place.wake,
            ram: place.ram,
            doorbells: None,
            placed: Mutex::new(None),
            gone: AtomicBool::new(false),
        })
    }

    /// Makes the place of its BAR the guest's to choose; the doorbells follow it.
    pub fn with_movable_bar(mut self, doorbells: Arc<dyn Doorbells>) -> Self {
        self.config().set_movable_bar(registers::BAR_SIZE);
        self.doorbells = Some(doorbells);
        self
    }

    /// How far into its movable BAR an address is.
    pub fn in_placed_bar(&self, address: u64) -> Option<u64> {
        let placed = *self.placed();
        let offset = address.checked_sub(placed?)?;
        (offset < u64::from(registers::BAR_SIZE)).then_some(offset)
    }

    /// Control thread: the function is out of its slot, and the device thread has let go of it. The device stops, its
    /// doorbells and locks go; its descriptors are closed with the last handle of it.
    pub fn unplug(&self) {
        let mut inner = self.lock();
        inner.change = Change::None;
        if inner.active {
            inner.device.reset();
        }
        inner.power_on();
        if let Err(error) = inner.device.release() {
            // It is closed at once, which ends every lock on it.
            tracing::debug!("device of type {}: {error}", inner.device.device_type());
        }
        drop(inner);
        let config = self.config();
        self.gone.store(true, Ordering::SeqCst);
        self.follow_bar(&config);
    }

    /// An eventfd for each queue: the driver's notifications.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Offset in the BAR where the driver notifies queue `index`.
    pub fn notify_offset(index: usize) -> u64 {
        registers::NOTIFY + index as u64 * u64::from(registers::NOTIFY_MULTIPLIER)
    }

    /// Device thread: carries out what the driver asked by the status register (activation, reset).
    pub fn service(&self) {
        let mut inner = self.lock();
        match std::mem::replace(&mut inner.change, Change::None) {
            Change::None => {}
            Change::Activate => inner.activate(&self.ram, &self.signals),
            Change::Reset => {
                inner.faults += inner.device.faults();
                inner.device.reset();
                inner.power_on();
                self.signals.reset();
            }
        }
    }

    /// Device thread: the driver notified queue `index`.
    pub fn queue_event(&self, index: u16) {
        let mut inner = self.lock();
        if inner.active {
            inner.device.queue_event(index);
        }
    }

    /// Device thread: one of the device's own descriptors is readable.
    pub fn fd_event(&self, token: u32) {
        self.lock().device.fd_event(token);
    }

    /// Device thread: the machine stands; nothing may be under way any more.
    pub fn drain(&self) {
        self.lock().device.drain();
    }

    /// Descriptors to poll now.
    pub fn poll_fds(&self) -> Vec<(std::os::fd::RawFd, u32)> {
        self.lock().device.poll_fds()
    }

    /// Device thread: tells the world that the guest is here now.
    pub fn announce(&self) {
        self.lock().device.announce();
    }

    /// Control thread: changes the device, whose thread may run. What waits in the queues is looked at anew.
    pub fn change(&self, change: &DeviceChange) -> Result<(), String> {
        self.lock().device.change(change)?;
        for kick in &self.kicks {
            // The counter cannot overflow by one write.
            let _ = kick.write(1);
        }
        Ok(())
    }

    /// Who does a disk's requests.
    pub fn disk_service(&self) -> Option<String> {
        self.lock().device.service()
    }

    /// What the device says of itself.
    pub fn device_status(&self) -> DeviceStatus {
        self.lock().device.status()
    }

    /// Control thread: has a disk note which blocks are written; those that hold anything now.
    pub fn track_writes(&self) -> std::io::Result<Vec<u64>> {
        self.lock().device.track_writes()
    }

    /// Control thread: blocks written since the last call.
    pub fn take_written(&self) -> Option<Vec<u64>> {
        self.lock().device.take_written()
    }

    /// Control thread: nobody needs to know any more.
    pub fn forget_writes(&self) {
        self.lock().device.forget_writes();
    }

    /// Control thread: gives up locks before the guest leaves.
    pub fn release(&self) -> std::io::Result<()> {
        self.lock().device.release()
    }

    /// Control thread: another process goes on with the same descriptors.
    pub fn hand_on(&self) -> std::io::Result<()> {
        self.lock().device.hand_on()
    }

    /// Control thread: nobody else goes on after all.
    pub fn kept(&self) {
        self.lock().device.kept();
    }

    /// Control thread: whether the device can be acquired; nothing is served.
    pub fn take_up(&self) -> std::io::Result<()> {
        self.lock().device.take_up()
    }

    /// Control thread: takes locks before the guest runs.
    pub fn acquire(&self) -> std::io::Result<()> {
        self.lock().device.acquire()
    }

    /// How often the guest broke a rule.
    pub fn faults(&self) -> u64 {
        let inner = self.lock();
        inner.faults + inner.device.faults()
    }

    /// After a restore: looks at every queue and raises every interrupt once, since notifications that
    /// were under way did not travel. Superfluous ones are harmless by the specification.
    pub fn rouse(&self) {
        if !self.lock().active {
            return;
        }
        for (index, kick) in self.kicks.iter().enumerate() {
            // The counter cannot overflow by one write.
            let _ = kick.write(1);
            self.signals.queue(index as u16);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn placed(&self) -> MutexGuard<'_, Option<u64>> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest may have moved its BAR.
    fn follow_bar(&self, config: &ConfigSpace) {
        let Some(doorbells) = &self.doorbells else {
            return;
        };
        let there = !self.gone.load(Ordering::SeqCst);
        let (now, mut placed) = (config.placed_bar().filter(|_| there), self.placed());
        if *placed == now {
            return;
        }
        for (index, kick) in self.kicks.iter().enumerate() {
            let at = |base: u64| base + Self::notify_offset(index);
            if let Some(was) = *placed {
                doorbells.remove(kick, at(was));
            }
            if let Some(now) = now {
                doorbells.place(kick, at(now));
            }
        }
        *placed = now;
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        if let Some(bar_offset) = self.window_access(offset, data.len()) {
            self.bar_read(bar_offset, data);
            return;
        }
        self.config().read(offset, data);
        let control = self.msix.control().to_le_bytes();
        for (index, byte) in data.iter_mut().enumerate() {
            if let Some(from) = (offset + index)
                .checked_sub(self.msix_control)
                .and_then(|at| control.get(at))
            {
                *byte = *from;
            }
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        if let Some(bar_offset) = self.window_access(offset, data.len()) {
            self.bar_write(bar_offset, data);
            return;
        }
        {
            let mut config = self.config();
            config.write(offset, data);
            self.follow_bar(&config);
        }
        let mut control = self.msix.control().to_le_bytes();
        let mut touched = false;
        for (index, byte) in data.iter().enumerate() {
            if let Some(to) = (offset + index)
                .checked_sub(self.msix_control)
                .and_then(|at| control.get_mut(at))
            {
                *to = *byte;
                touched = true;
            }
        }
        if touched {
            self.msix.set_control(u16::from_le_bytes(control));
        }
    }
}

/// Interrupts of one function, given to the device model.
struct Signals {
    msix: Arc<Msix>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    generation: AtomicU8,
}

impl Signals {
    fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
        }
    }

    fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.isr.store(0, Ordering::SeqCst);
    }

    /// A vector as the driver may set it: one that exists, or none.
    fn accept(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }
}

impl Interrupt for Signals {
    fn queue(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.msix.trigger(vector.load(Ordering::SeqCst));
        }
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.msix.trigger(self.config_vector.load(Ordering::SeqCst));
    }
}

struct Inner {
    device: Box<dyn VirtioDevice>,
    offered: u64,
    status: u8,
    change: Change,
    active: bool,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    setups: Vec<QueueSetup>,
    faults: u64,
}

/// What the device thread has to do for the driver.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    Activate,
    Reset,
}

#[derive(Clone, Copy)]
struct QueueSetup {
    max: u16,
    size: u16,
    enabled: bool,
    desc: u64,
    avail: u64,
    used: u64,
}

impl QueueSetup {
    fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            enabled: false,
            desc: 0,
            avail: 0,
            used: 0,
        }
    }

    fn state(&self, event_idx_enabled: bool) -> QueueState {
        QueueState {
            max_size: self.max,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled,
            size: self.size,
            ready: self.enabled,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        }
    }
}

impl Inner {
    /// The status register was written. Returns whether the device thread has work.
    fn set_status(&mut self, value: u8, signals: &Signals) -> bool {
        if value == 0 {
            if self.active || self.change == Change::Activate {
                // The register reads non-zero until the device thread is done (section 4.1.4.3.1).
                self.change = Change::Reset;
                return true;
            }
            self.power_on();
            signals.reset();
            return false;
        }
        let mut added = value & !self.status;
        if added & FEATURES_OK != 0 && !self.features_acceptable() {
            added &= !FEATURES_OK;
        }
        if added & DRIVER_OK != 0 && (self.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.status |= added & DRIVER_BITS;
        if added & DRIVER_OK != 0 && !self.active {
            self.change = Change::Activate;
            return true;
        }
        false
    }

    fn features_acceptable(&self) -> bool {
        let must = self.offered & (F_VERSION_1 | F_ACCESS_PLATFORM);
        self.driver_features & !self.offered == 0 && self.driver_features & must == must
    }

    fn activate(&mut self, ram: &GuestRam, signals: &Arc<Signals>) {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let states: Vec<QueueState> = self
            .setups
            .iter()
            .map(|setup| setup.state(event_idx))
            .collect();
        match checked_queues(&states, ram) {
            Some(queues) => self.start(queues, ram, signals),
            None => {
                self.faults += 1;
                self.status |= NEEDS_RESET;
                signals.config();
            }
        }
    }

    fn start(&mut self, queues: Vec<Queue>, ram: &GuestRam, signals: &Arc<Signals>) {
        let interrupt: Arc<dyn Interrupt> = Arc::clone(signals) as Arc<dyn Interrupt>;
        self.device.activate(Activation {
            ram: ram.clone(),
            queues,
            interrupt,
            features: self.driver_features,
        });
        self.active = true;
    }

    fn power_on(&mut self) {
        self.status = 0;
        self.active = false;
        self.change = Change::None;
        self.driver_features = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        for setup in &mut self.setups {
            *setup = QueueSetup::new(setup.max);
        }
    }

    fn selected(&mut self) -> Option<&mut QueueSetup> {
        self.setups.get_mut(usize::from(self.queue_select))
    }
}

/// Queues from their states; nothing if one that is ready does not lie in guest memory.
fn checked_queues(states: &[QueueState], ram: &GuestRam) -> Option<Vec<Queue>> {
    states
        .iter()
        .map(|state| {
            let queue = Queue::try_from(*state).ok()?;
            (!queue.ready() || queue.is_valid(ram)).then_some(queue)
        })
        .collect()
}

fn identity(device_type: u32) -> Identity {
    let class = match device_type {
        TYPE_NET => 0x02_0000,
        TYPE_BLOCK => 0x01_8000,
        _ => 0xff_0000,
    };
    let id = (device_type & 0x3f) as u16;
    Identity {
        vendor: VIRTIO_VENDOR,
        device: 0x1040 + id,
        class,
        revision: 1,
        subsystem: (VIRTIO_VENDOR, 0x40 + id),
    }
}

const VIRTIO_VENDOR: u16 = 0x1af4;
const TYPE_NET: u32 = 1;
const TYPE_BLOCK: u32 = 2;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
const F_ACCESS_PLATFORM: u64 = 1 << 33;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;
const DRIVER_BITS: u8 = 0x8f;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
const NO_VECTOR: u16 = 0xffff;

#[cfg(test)]
pub(crate) mod tests;
