//! Parts of a forward pass, for measurements that begin in the middle of a model.

use crate::model::check_positions;
use crate::{Model, ModelError, Workspace};
use dibit_cache::Batch;
use dibit_device::{Device, DeviceError, KvCache};
use std::ops::Range;

impl<D: Device> Model<D> {
    /// Writes the residual stream that enters layer 0 for these tokens.
    ///
    /// # Errors
    /// [`ModelError::TokenId`], [`ModelError::TooManyRows`].
    pub fn embed(&self, workspace: &mut Workspace<D>, ids: &[u32]) -> Result<(), ModelError> {
        let device = &**self.device();
        self.check_ids(ids)?;
        workspace.check_rows(ids.len())?;
        device.write_ids(&mut workspace.ids, ids);
        device.scope(|| self.embed_rows(workspace, ids.len()));
        Ok(())
    }

    /// Runs the rows of a batch through some layers: `residual` is the residual stream that enters the first of them,
    /// `[row][hidden_size]`. [`Workspace::residual`] has what leaves the last one.
    ///
    /// # Errors
    /// [`ModelError::TooManyRows`], [`ModelError::OtherValues`], [`ModelError::OtherArithmetic`], [`ModelError::Device`].
    ///
    /// # Panics
    /// If `residual` does not have the batch's rows, or there are no such layers.
    pub fn resume(
        &self,
        workspace: &mut Workspace<D>,
        cache: &mut KvCache<D>,
        batch: &Batch,
        layers: Range<usize>,
        residual: &[f32],
    ) -> Result<(), ModelError> {
        let (device, rows, width) = (&**self.device(), batch.rows(), self.config().hidden_size);
        assert_eq!(residual.len(), rows * width, "one row of the residual stream for each row of the batch");
        workspace.check_rows(rows)?;
        self.check_cache(cache)?;
        check_positions(cache.layout(), batch)?;
        let all: Vec<u32> = (0..rows as u32).collect();
        device.write_ids(&mut workspace.positions, batch.rotary_positions());
        device.write_ids(&mut workspace.ids, &all);
        let residual = device.upload(residual)?;
        cache.pass_once(device, batch, |pass| {
            device.copy_rows(&residual, &workspace.ids, rows, width, &mut workspace.hidden);
            self.run_layers(workspace, pass, batch, layers, None)
        })
    }
}

impl<D: Device> Workspace<D> {
    /// The residual stream behind the last layer that ran, `[row][hidden_size]`, of the first rows.
    ///
    /// # Errors
    /// Those of [`dibit_device::Memory::download`].
    pub fn residual(&self, device: &D, rows: usize, out: &mut Vec<f32>) -> Result<(), DeviceError> {
        device.download(&self.hidden, 0..rows * self.hidden_size, out)
    }

    pub(crate) fn check_rows(&self, rows: usize) -> Result<(), ModelError> {
        let max_rows = self.max_rows;
        if rows > max_rows { Err(ModelError::TooManyRows { rows, max_rows }) } else { Ok(()) }
    }
}
