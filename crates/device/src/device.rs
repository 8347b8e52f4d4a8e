use crate::{Dense, KvStorage};

/// A machine that a model runs on: the whole contract of inference.
pub trait Device: Dense + KvStorage {}

impl<D: Dense + KvStorage> Device for D {}
