//! A plan with the numbers that its transforms need.

use crate::shape::CacheModel;
use crate::tables::Tables;
use crate::{CachePlan, CalibratedScheme, Powers, SchemeError, Sees};
use std::ops::Deref;
use std::sync::Arc;

/// The layout of a whole cache: a plan, with the numbers that its transforms need.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheLayout {
    plan: CachePlan,
    tables: Arc<Tables>,
}

impl Deref for CacheLayout {
    type Target = CachePlan;

    fn deref(&self) -> &CachePlan {
        &self.plan
    }
}

impl CacheLayout {
    /// Compiles a scheme and its calibration for a model.
    ///
    /// # Errors
    /// Those of [`CachePlan::new`]; [`SchemeError::Uncalibrated`], [`SchemeError::Calibration`].
    pub fn new(scheme: &CalibratedScheme, model: &CacheModel) -> Result<Self, SchemeError> {
        let plan = scheme.plan(model)?;
        let tables = Arc::new(Tables::new(&plan, model.inv_freq.clone(), scheme.calibration.clone())?);
        Ok(CacheLayout { plan, tables })
    }

    /// The numbers that transforms need.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// What the heads of a layer are divided by before they are stored, as far as a calibration knows.
    pub fn powers(&self, layer: usize) -> Powers {
        let own = self.tables.layer(layer).map_or(Powers::default(), |own| own.powers.clone());
        own.alike_in(self.layers[layer].frame)
    }

    /// The same cache, whose passes see each other's tokens exactly.
    pub fn seen_exactly(mut self) -> Self {
        self.plan.sees = Sees::Exact;
        self
    }
}

impl CalibratedScheme {
    /// Its cache in a model.
    ///
    /// # Errors
    /// Those of [`CacheLayout::new`].
    pub fn layout(&self, model: &CacheModel) -> Result<CacheLayout, SchemeError> {
        CacheLayout::new(self, model)
    }
}
