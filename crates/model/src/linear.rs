//! A linear layer.

use crate::ModelError;
use crate::weights::LinearWeights;
use dibit_cache::Phase;
use dibit_device::{Device, Output, Projection, Tensor};
use std::sync::Arc;

/// A linear layer on a device; copies share its numbers.
pub(crate) struct Linear<D: Device> {
    weight: D::Matrix,
    bias: Option<Arc<D::Buffer>>,
}

impl<D: Device> Clone for Linear<D> {
    fn clone(&self) -> Self {
        Linear { weight: self.weight.clone(), bias: self.bias.clone() }
    }
}

impl<D: Device> Linear<D> {
    pub(crate) fn new(device: &D, weights: &LinearWeights) -> Result<Self, ModelError> {
        let bias = weights.bias.as_ref().map(|bias| upload(device, bias)).transpose()?;
        Ok(Linear { weight: device.matrix(weights.weight.clone())?, bias })
    }

    pub(crate) fn onto<'a>(&'a self, out: &'a mut D::Buffer) -> Projection<'a, D> {
        Projection { weight: &self.weight, bias: self.bias.as_deref(), out }
    }

    pub(crate) fn run(
        &self,
        device: &D,
        phase: Phase,
        x: &D::Buffer,
        rows: usize,
        out: &mut D::Buffer,
        output: Output,
    ) {
        device.linear(phase, x, 0..rows, &self.weight, self.bias.as_deref(), out, output);
    }
}

/// A vector on a device, in f32.
pub(crate) fn upload<D: Device>(device: &D, vector: &Tensor) -> Result<Arc<D::Buffer>, ModelError> {
    Ok(Arc::new(device.upload(&vector.to_f32())?))
}
