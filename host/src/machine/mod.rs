//! A machine from description to plan: the description is what a user wrote, the plan is what a VMM is told.

pub mod cpu;
pub mod plan;
pub mod saved;
pub mod spec;
