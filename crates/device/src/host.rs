//! What devices that keep their cache elsewhere do on the host all the same.

pub use crate::cpu::{CpuStore, FeatureMaps, Protected, blocks, extras, leaving, missed_keys};
