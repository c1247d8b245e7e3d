//! Role agent.
