use crate::Executor;
use dibit_cache::{Batch, CacheError, CacheLayout, CacheManager, Mode, Powers, Sequence, Usage};
use dibit_device::{Device, KvCache};
use dibit_model::{Model, ModelError, Observer, Workspace};
use std::ops::Range;
use std::sync::Arc;

/// What a runner has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Blocks of the cache, all sequences together.
    pub blocks: usize,
    /// Sequences at once.
    pub sequences: usize,
    /// Rows of a pass, all sequences together.
    pub rows: usize,
    /// Rows of a pass whose logits are asked for at once.
    pub outputs: usize,
}

/// A model, its cache and its workspace.
pub struct Runner<D: Device> {
    model: Arc<Model<D>>,
    cache: KvCache<D>,
    workspace: Workspace<D>,
}

impl Capacity {
    /// Room for one sequence of `tokens` tokens that come in one pass, and for the logits of `outputs` of them.
    pub fn of_one(layout: &CacheLayout, tokens: usize, outputs: usize) -> Self {
        Capacity { blocks: layout.blocks(tokens), sequences: 1, rows: tokens, outputs }
    }
}

impl<D: Device> Runner<D> {
    /// A runner of a model with a cache of this layout.
    ///
    /// # Errors
    /// [`ModelError::OtherValues`] for a layout that the model was not made for, [`ModelError::Device`] where memory is
    /// short.
    pub fn new(model: Arc<Model<D>>, layout: CacheLayout, capacity: Capacity) -> Result<Self, ModelError> {
        let Capacity { blocks, sequences, rows, outputs } = capacity;
        if !model.suits(&layout) {
            return Err(ModelError::OtherValues { scheme: layout.scheme_name().to_owned() });
        }
        let cache = KvCache::new(&**model.device(), layout, blocks, sequences, rows, model.arithmetic())?;
        let workspace = Workspace::new(&**model.device(), model.config(), rows, outputs)?;
        Ok(Runner { model, cache, workspace })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model<D>> {
        &self.model
    }

    /// Who holds which block of the cache.
    pub fn manager(&self) -> &CacheManager {
        self.cache.manager()
    }

    /// What the heads of each layer are divided by before they are stored.
    pub fn powers(&self) -> &[Powers] {
        self.cache.powers()
    }

    /// [`Executor::step`] of one sequence, showing queries, keys and values of every layer and row to `observer`.
    ///
    /// # Errors
    /// Those of [`Executor::step`].
    pub fn observe(
        &mut self,
        mode: Mode,
        sequence: &mut Sequence,
        ids: &[u32],
        observer: &mut Observer,
    ) -> Result<(), ModelError> {
        let Runner { model, cache, workspace } = self;
        run(cache, mode, &mut [(sequence, ids)], None, |cache, batch, ids| {
            model.observe(workspace, cache, batch, ids, observer)
        })
    }

    /// [`Executor::step`] of one sequence whose tokens are turned by these positions (RoPE), one for each, which need not be
    /// their places in the sequence.
    ///
    /// # Errors
    /// Those of [`Executor::step`]; [`ModelError::Unsupported`] for schemes that store keys before RoPE.
    ///
    /// # Panics
    /// If there are not as many positions as ids.
    pub fn step_at(
        &mut self,
        mode: Mode,
        sequence: &mut Sequence,
        ids: &[u32],
        positions: &[u32],
    ) -> Result<(), ModelError> {
        assert_eq!(ids.len(), positions.len(), "a position for each token");
        self.step_or_replay(mode, &mut [(sequence, ids)], Some(positions))
    }

    /// Runs tokens; where the cache has learnt to store them and nothing came before them, once more.
    fn step_or_replay(
        &mut self,
        mode: Mode,
        rows: &mut [(&mut Sequence, &[u32])],
        positions: Option<&[u32]>,
    ) -> Result<(), ModelError> {
        let Runner { model, cache, workspace } = self;
        let begin = rows.iter().all(|(sequence, _)| sequence.is_empty());
        let mut once =
            || run(cache, mode, rows, positions, |cache, batch, ids| model.forward(workspace, cache, batch, ids));
        if begin { replaying(once) } else { once() }
    }

    /// Runs the next tokens of a sequence through some layers alone: `residual` is the residual stream that enters the first
    /// of them, `[row][hidden_size]`. Returns what leaves the last one.
    ///
    /// # Errors
    /// Those of [`Executor::step`].
    pub fn resume(
        &mut self,
        sequence: &mut Sequence,
        layers: Range<usize>,
        residual: &[f32],
    ) -> Result<Vec<f32>, ModelError> {
        let begins = sequence.is_empty();
        let mut once = || self.resume_once(sequence, layers.clone(), residual);
        if begins { replaying(once) } else { once() }
    }

    fn resume_once(
        &mut self,
        sequence: &mut Sequence,
        layers: Range<usize>,
        residual: &[f32],
    ) -> Result<Vec<f32>, ModelError> {
        let Runner { model, cache, workspace } = self;
        let rows = residual.len() / model.config().hidden_size;
        cache.reserve(sequence, sequence.len() + rows)?;
        let mut batch = Batch::new(Mode::Chunk);
        batch.push(cache.manager(), sequence, rows);
        if let Err(error) = model.resume(workspace, cache, &batch, layers, residual) {
            cache.clear(sequence);
            return Err(error);
        }
        cache.advance(sequence, rows);
        let mut behind = Vec::new();
        workspace.residual(&**model.device(), rows, &mut behind)?;
        Ok(behind)
    }

    /// The residual stream that enters layer 0 for these tokens, `[row][hidden_size]`.
    ///
    /// # Errors
    /// [`ModelError::TokenId`], [`ModelError::TooManyRows`].
    pub fn embed(&mut self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        self.model.embed(&mut self.workspace, ids)?;
        let mut residual = Vec::new();
        self.workspace.residual(&**self.model.device(), ids.len(), &mut residual)?;
        Ok(residual)
    }
}

impl<D: Device> Executor for Runner<D> {
    fn layout(&self) -> &CacheLayout {
        self.cache.layout()
    }

    fn open(&mut self) -> Result<Sequence, CacheError> {
        self.cache.open()
    }

    fn clear(&mut self, sequence: &mut Sequence) {
        self.cache.clear(sequence);
    }

    fn close(&mut self, sequence: Sequence) {
        self.cache.close(sequence);
    }

    fn usage(&self, sequence: &Sequence) -> Usage {
        self.cache.usage(sequence)
    }

    fn step(&mut self, mode: Mode, rows: &mut [(&mut Sequence, &[u32])]) -> Result<(), ModelError> {
        self.step_or_replay(mode, rows, None)
    }

    fn logits(&mut self, rows: &[usize], out: &mut Vec<f32>) -> Result<(), ModelError> {
        self.model.logits(&mut self.workspace, rows, out)
    }

    fn most_likely(&mut self, rows: &[usize]) -> Result<Vec<Option<u32>>, ModelError> {
        self.model.most_likely(&mut self.workspace, rows)
    }
}

/// Runs passes of sequences that are empty before and behind a failure, again as often as one wants that
/// ([`ModelError::wants_replay`]).
///
/// # Errors
/// Any other of `passes`.
pub fn replaying<T>(mut passes: impl FnMut() -> Result<T, ModelError>) -> Result<T, ModelError> {
    loop {
        match passes() {
            Err(error) if error.wants_replay() => tracing::warn!("{error}"),
            result => return result,
        }
    }
}

fn run<D: Device>(
    cache: &mut KvCache<D>,
    mode: Mode,
    rows: &mut [(&mut Sequence, &[u32])],
    positions: Option<&[u32]>,
    pass: impl FnOnce(&mut KvCache<D>, &Batch, &[u32]) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let mut batch = Batch::new(mode);
    let mut ids = Vec::new();
    for (sequence, new) in rows.iter_mut() {
        cache.reserve(sequence, sequence.len() + new.len())?;
        match positions {
            None => batch.push(cache.manager(), sequence, new.len()),
            Some(own) => {
                batch.push_at(cache.manager(), sequence, own[ids.len()..ids.len() + new.len()].iter().copied())
            }
        }
        ids.extend_from_slice(new);
    }
    let result = pass(cache, &batch, &ids);
    for (sequence, new) in rows {
        match &result {
            Ok(()) => cache.advance(sequence, new.len()),
            Err(_) => cache.clear(sequence),
        }
    }
    result
}
