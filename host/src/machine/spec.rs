//! The description of a machine as a user writes it (TOML), parsed once into a type that cannot be wrong.
