use dibit_cache::{CacheError, CacheLayout, Mode, Sequence, Usage};
use dibit_model::ModelError;

/// What runs the passes of a model with its cache and its workspace, on whatever device.
pub trait Executor: Send {
    /// The layout of the cache.
    fn layout(&self) -> &CacheLayout;

    /// Begins an empty sequence.
    ///
    /// # Errors
    /// [`CacheError::TooManySequences`].
    fn open(&mut self) -> Result<Sequence, CacheError>;

    /// Empties a sequence, which stays open.
    fn clear(&mut self, sequence: &mut Sequence);

    /// Ends a sequence.
    fn close(&mut self, sequence: Sequence);

    /// What a sequence takes in the cache.
    fn usage(&self, sequence: &Sequence) -> Usage;

    /// One pass of the next tokens of some sequences, which are cached afterwards; rows are in the order of the sequences.
    /// Where blocks are short nothing has happened. A pass that fails empties its sequences, for it has overwritten parts of
    /// their windows.
    ///
    /// # Errors
    /// [`ModelError::Cache`] where blocks are short, and those of [`dibit_model::Model::forward`]. Where one
    /// [`ModelError::wants_replay`], all tokens of these sequences are to be run again from the first one on.
    fn step(&mut self, mode: Mode, rows: &mut [(&mut Sequence, &[u32])]) -> Result<(), ModelError>;

    /// Logits of some rows of the last pass: `vocab_size` numbers for each, in the order of `rows`.
    ///
    /// # Errors
    /// [`ModelError::TooManyRows`].
    fn logits(&mut self, rows: &[usize], out: &mut Vec<f32>) -> Result<(), ModelError>;

    /// The most likely token after each of some rows of the last pass, the first of equals; `None` for a row of which not all
    /// logits are finite.
    ///
    /// # Errors
    /// [`ModelError::TooManyRows`], [`ModelError::Device`].
    fn most_likely(&mut self, rows: &[usize]) -> Result<Vec<Option<u32>>, ModelError>;
}
