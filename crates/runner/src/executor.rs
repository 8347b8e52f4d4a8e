use crate::Runner;
use dibit_cache::{CacheError, CacheLayout, Mode, Sequence, Usage};
use dibit_device::Device;
use dibit_model::ModelError;

/// What runs the passes of a model, on whatever device: a [`Runner`] behind an object.
pub trait Executor: Send {
    /// The layout of the cache.
    fn layout(&self) -> &CacheLayout;

    /// [`Runner::open`].
    ///
    /// # Errors
    /// As there.
    fn open(&mut self) -> Result<Sequence, CacheError>;

    /// [`Runner::clear`].
    fn clear(&mut self, sequence: &mut Sequence);

    /// [`Runner::close`].
    fn close(&mut self, sequence: Sequence);

    /// [`Runner::usage`].
    fn usage(&self, sequence: &Sequence) -> Usage;

    /// [`Runner::step`].
    ///
    /// # Errors
    /// As there.
    fn step(&mut self, mode: Mode, rows: &mut [(&mut Sequence, &[u32])]) -> Result<(), ModelError>;

    /// [`crate::Outputs::logits`] of the last pass.
    ///
    /// # Errors
    /// As there.
    fn logits(&mut self, rows: &[usize], out: &mut Vec<f32>) -> Result<(), ModelError>;

    /// [`crate::Outputs::most_likely`] of the last pass.
    ///
    /// # Errors
    /// As there.
    fn most_likely(&mut self, rows: &[usize]) -> Result<Vec<Option<u32>>, ModelError>;
}

impl<D: Device> Executor for Runner<D> {
    fn layout(&self) -> &CacheLayout {
        self.layout()
    }

    fn open(&mut self) -> Result<Sequence, CacheError> {
        self.open()
    }

    fn clear(&mut self, sequence: &mut Sequence) {
        self.clear(sequence);
    }

    fn close(&mut self, sequence: Sequence) {
        self.close(sequence);
    }

    fn usage(&self, sequence: &Sequence) -> Usage {
        self.usage(sequence)
    }

    fn step(&mut self, mode: Mode, rows: &mut [(&mut Sequence, &[u32])]) -> Result<(), ModelError> {
        self.step(mode, rows).map(drop)
    }

    fn logits(&mut self, rows: &[usize], out: &mut Vec<f32>) -> Result<(), ModelError> {
        self.outputs().logits(rows, out)
    }

    fn most_likely(&mut self, rows: &[usize]) -> Result<Vec<Option<u32>>, ModelError> {
        self.outputs().most_likely(rows)
    }
}
