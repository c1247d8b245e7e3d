//! Faults that the double puts in at a command's turn.

use nix::errno::Errno;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The secure processor answers with this code; the kernel makes EIO of it.
    Firmware(u32),
    /// The kernel refuses before it asks the secure processor (EAGAIN and EINTR too).
    Kernel(Errno),
}

/// The faults to come.
#[derive(Debug, Default)]
pub(crate) struct Script {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    command: String,
    skip: u32,
    times: u32,
    fault: Fault,
}

impl Script {
    /// From the `skip`-th next on, `times` turns of a command fail.
    pub(crate) fn fail(&mut self, command: &str, skip: u32, times: u32, fault: Fault) {
        self.rules.push(Rule {
            command: command.to_owned(),
            skip,
            times,
            fault,
        });
    }

    /// A command's turn as the kernel takes it up.
    pub(crate) fn kernel(&mut self, command: &str) -> Result<(), Errno> {
        let turn = |fault| match fault {
            Fault::Kernel(errno) => Some(errno),
            Fault::Firmware(_) => None,
        };
        self.take(command, turn).map_or(Ok(()), Err)
    }

    /// A command's turn as the firmware takes it up.
    pub(crate) fn firmware(&mut self, command: &str) -> Result<(), u32> {
        let turn = |fault| match fault {
            Fault::Firmware(code) => Some(code),
            Fault::Kernel(_) => None,
        };
        self.take(command, turn).map_or(Ok(()), Err)
    }

    /// Whether every fault has had its turns.
    pub(crate) fn rest(&self) -> Vec<String> {
        let left = self.rules.iter().filter(|rule| rule.times > 0);
        left.map(|rule| format!("{rule:?} has not happened"))
            .collect()
    }

    fn take<T>(&mut self, command: &str, turn: impl Fn(Fault) -> Option<T>) -> Option<T> {
        for rule in &mut self.rules {
            let Some(fault) = turn(rule.fault).filter(|_| rule.command == command) else {
                continue;
            };
            if rule.times == 0 {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                continue;
            }
            rule.times -= 1;
            return Some(fault);
        }
        None
    }
}
