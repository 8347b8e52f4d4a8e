use crate::{Dense, Experts, KvStorage};

/// A machine that a model runs on: the whole contract of inference.
pub trait Device: Dense + Experts + KvStorage {}

impl<D: Dense + Experts + KvStorage> Device for D {}
