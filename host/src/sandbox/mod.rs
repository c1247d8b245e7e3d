//! The cell of each role: jail, Landlock, seccomp; and the proof that it holds.

pub mod report;
