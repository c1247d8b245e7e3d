//! The keys of devices beyond disks, cards and sockets: limits, random numbers, balloon, console, watchdog, slots.

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

use super::document::Size;
use super::{Reader, SpecError};
use crate::machine::plan::devices::{
    BalloonPlan, ConsolePlan, Limits, MAX_RATE, Rate, RngPlan, SmallDevices, WatchdogAction,
    WatchdogPlan,
};
use crate::machine::plan::{DEFAULT_SLOTS, MAX_SLOTS};

/// Limits; what is not given is not limited.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Limit {
    /// Bytes a second, such as "100 MiB".
    #[schemars(with = "Option<Size>")]
    bytes_per_second: Option<Spanned<String>>,
    /// Bytes that may pass at once after a rest; those of a second by default.
    #[schemars(with = "Option<Size>")]
    bytes_burst: Option<Spanned<String>>,
    /// Requests, or frames, a second.
    #[schemars(with = "Option<u64>")]
    operations_per_second: Option<Spanned<u64>>,
    /// Those that may pass at once after a rest.
    #[schemars(with = "Option<u64>")]
    operations_burst: Option<Spanned<u64>>,
}

/// `[rng]`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Rng {
    /// Random bytes a second; "1 MiB" by default.
    #[schemars(with = "Option<Size>")]
    bytes_per_second: Option<Spanned<String>>,
}

/// `[balloon]`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Balloon {
    /// Whether the guest tells which pages it does not use.
    #[serde(default = "yes")]
    free_page_reporting: bool,
    /// Whether the guest may take pages out again rather than kill a process.
    #[serde(default = "yes")]
    deflate_on_oom: bool,
}

/// `[console]`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Console {
    /// Columns of the terminal; 0 where nobody knows.
    #[serde(default)]
    columns: u16,
    /// Its rows.
    #[serde(default)]
    rows: u16,
}

/// `[watchdog]`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Watchdog {
    /// What happens to a guest that does not feed it.
    #[schemars(with = "WatchdogAction")]
    action: Spanned<String>,
}

/// `[hotplug]`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct HotPlug {
    /// Slots for disks and cards that are attached while the guest runs: 0 to 8, of a plain guest; 4 by default.
    #[schemars(range(max = 8))]
    slots: u8,
}

/// The four tables.
pub(super) struct Small {
    pub(super) rng: Option<Rng>,
    pub(super) balloon: Option<Spanned<Balloon>>,
    pub(super) console: Option<Console>,
    pub(super) watchdog: Option<Watchdog>,
}

impl Reader<'_> {
    pub(super) fn limits(&self, kind: &str, limit: Option<Limit>) -> Result<Limits, SpecError> {
        let Some(limit) = limit else {
            return Ok(Limits::default());
        };
        let key = |name: &str| format!("{kind}.limit.{name}");
        let per_second = self.size(&key("bytes_per_second"), limit.bytes_per_second)?;
        let burst = self.size(&key("bytes_burst"), limit.bytes_burst)?;
        let bytes = self.rate(&key("bytes"), per_second, burst)?;
        let per_second = self.number(&key("operations_per_second"), limit.operations_per_second)?;
        let burst = self.number(&key("operations_burst"), limit.operations_burst)?;
        let operations = self.rate(&key("operations"), per_second, burst)?;
        Ok(Limits { bytes, operations })
    }

    pub(super) fn small(
        &self,
        small: Small,
        confidential: bool,
    ) -> Result<SmallDevices, SpecError> {
        let rng = small.rng.map(|rng| self.rng(rng)).transpose()?;
        if let Some(balloon) = &small.balloon
            && confidential
        {
            let problem = "`balloon` is not for confidential guests: their host cannot take pages back; leave it out";
            return Err(self.at(balloon.span(), problem.to_owned()));
        }
        let balloon = small.balloon.map(|b| b.into_inner()).map(|b| BalloonPlan {
            free_page_reporting: b.free_page_reporting,
            deflate_on_oom: b.deflate_on_oom,
        });
        let console = small.console.map(|c| ConsolePlan {
            columns: c.columns,
            rows: c.rows,
        });
        let watchdog = small.watchdog.map(|w| self.watchdog(&w)).transpose()?;
        Ok(SmallDevices {
            rng,
            balloon,
            console,
            watchdog,
        })
    }

    /// A confidential guest has no slots: what it has is what its owner saw at the launch.
    pub(super) fn slots(
        &self,
        hotplug: Option<Spanned<HotPlug>>,
        plain: bool,
    ) -> Result<u8, SpecError> {
        let Some(hotplug) = hotplug else {
            return Ok(if plain { DEFAULT_SLOTS } else { 0 });
        };
        let slots = hotplug.get_ref().slots;
        let problem = match slots {
            1.. if !plain => {
                "`hotplug.slots` is not for confidential guests, whose devices are those of their launch; leave it out"
                    .to_owned()
            }
            0..=MAX_SLOTS => return Ok(slots),
            _ => format!("`hotplug.slots` is {slots}; want 0 to {MAX_SLOTS}"),
        };
        Err(self.at(hotplug.span(), problem))
    }

    fn rng(&self, rng: Rng) -> Result<RngPlan, SpecError> {
        let given = self.size("rng.bytes_per_second", rng.bytes_per_second)?;
        let per_second = given.map_or(RNG_RATE, |(rate, _)| rate);
        let burst = per_second;
        Ok(RngPlan {
            bytes: Rate { per_second, burst },
        })
    }

    fn watchdog(&self, watchdog: &Watchdog) -> Result<WatchdogPlan, SpecError> {
        let action = match watchdog.action.get_ref().as_str() {
            "stop" => WatchdogAction::Stop,
            "report" => WatchdogAction::Report,
            "pause" => WatchdogAction::Pause,
            other => {
                let problem = format!(
                    "`watchdog.action` is {other:?}; want \"stop\", \"pause\" or \"report\""
                );
                return Err(self.at(watchdog.action.span(), problem));
            }
        };
        Ok(WatchdogPlan { action })
    }

    /// A rate whose burst, unless it is given, is a second's worth.
    fn rate(&self, key: &str, per_second: Given, burst: Given) -> Result<Option<Rate>, SpecError> {
        match (per_second, burst) {
            (None, Some((_, span))) => {
                let problem =
                    format!("`{key}_burst` without `{key}_per_second` limits nothing; give both");
                Err(self.at(span, problem))
            }
            (None, None) => Ok(None),
            (Some((per_second, _)), burst) => Ok(Some(Rate {
                per_second,
                burst: burst.map_or(per_second, |(burst, _)| burst),
            })),
        }
    }

    pub(super) fn size(
        &self,
        key: &str,
        value: Option<Spanned<String>>,
    ) -> Result<Given, SpecError> {
        let Some(value) = value else { return Ok(None) };
        match super::parse_size(value.get_ref()).filter(|n| (1..=MAX_RATE).contains(n)) {
            Some(number) => Ok(Some((number, value.span()))),
            None => {
                let problem = format!(
                    "`{key}` is {:?}; want a size such as \"10 MiB\", at most 1024 GiB",
                    value.get_ref()
                );
                Err(self.at(value.span(), problem))
            }
        }
    }

    pub(super) fn number(
        &self,
        key: &str,
        value: Option<Spanned<u64>>,
    ) -> Result<Given, SpecError> {
        match value {
            Some(value) if !(1..=MAX_RATE).contains(value.get_ref()) => {
                let problem = format!("`{key}` is {}; want 1 to {MAX_RATE}", value.get_ref());
                Err(self.at(value.span(), problem))
            }
            value => Ok(value.map(|value| (*value.get_ref(), value.span()))),
        }
    }
}

/// A number and where it stands, if it does.
pub(super) type Given = Option<(u64, std::ops::Range<usize>)>;

fn yes() -> bool {
    true
}

/// Random bytes a second where the description does not say.
const RNG_RATE: u64 = 1 << 20;
