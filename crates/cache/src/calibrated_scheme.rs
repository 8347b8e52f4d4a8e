//! A scheme with what was calibrated for it.

use crate::{Calibration, Scheme, SchemeError};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// A scheme, and what was calibrated for it on the model at hand.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibratedScheme {
    /// The scheme.
    pub scheme: Scheme,
    /// Its calibration, where there is one.
    pub calibration: Option<Arc<Calibration>>,
}

impl From<Scheme> for CalibratedScheme {
    fn from(scheme: Scheme) -> Self {
        CalibratedScheme { scheme, calibration: None }
    }
}

impl Deref for CalibratedScheme {
    type Target = Scheme;

    fn deref(&self) -> &Scheme {
        &self.scheme
    }
}

impl DerefMut for CalibratedScheme {
    fn deref_mut(&mut self) -> &mut Scheme {
        &mut self.scheme
    }
}

impl CalibratedScheme {
    /// [`Scheme::load`], without a calibration.
    ///
    /// # Errors
    /// As there.
    pub fn load(name: &str) -> Result<Self, SchemeError> {
        Ok(Scheme::load(name)?.into())
    }

    /// [`Scheme::parse`], without a calibration.
    ///
    /// # Errors
    /// As there.
    pub fn parse(text: &str, origin: &str) -> Result<Self, SchemeError> {
        Ok(Scheme::parse(text, origin)?.into())
    }

    /// These schemes behind the reference `fp16`, which is there once, whether it is among them or not.
    ///
    /// # Errors
    /// None, unless the reference itself is broken.
    pub fn with_reference(schemes: &[Self]) -> Result<Vec<Self>, SchemeError> {
        let reference = Scheme::load("fp16")?;
        let others = schemes.iter().filter(|own| own.scheme != reference).cloned();
        Ok(std::iter::once(reference.clone().into()).chain(others).collect())
    }

    /// What the scheme asks for and goes without, as a sentence; `None` where nothing is missing.
    pub fn notice(&self) -> Option<String> {
        let trained = self.calibration.iter().flat_map(|own| &own.layers).any(|layer| layer.adapters.is_some());
        (self.linear().is_some() && !trained).then(|| {
            format!(
                "{}: no adapters of the linear correction for this model; running the quantiser without it \
                 (`dibit calibrate --kv {}` trains them)",
                self.name, self.origin
            )
        })
    }
}
