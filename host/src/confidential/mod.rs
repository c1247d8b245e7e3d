//! Role confidential.
