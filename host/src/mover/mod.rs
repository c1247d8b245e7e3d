//! Role mover.
