//! The cache of a model on a device: who holds which block, and the bytes.

use crate::pass::{Pass, raised};
use crate::{Arithmetic, DeviceError, KvStorage};
use dibit_cache::{Batch, CacheError, CacheLayout, CacheManager, Powers, Sequence, Usage};

/// A cache of one model on a device.
pub struct KvCache<D: KvStorage> {
    layout: CacheLayout,
    manager: CacheManager,
    store: D::Store,
    arithmetic: Arithmetic,
    /// What the heads of each layer are divided by before they are stored.
    powers: Vec<Powers>,
    /// Whose passes it runs, once there was one.
    owner: Option<u64>,
}

/// A cache in the hands of its owner.
pub struct OwnedCache<'a, D: KvStorage>(&'a mut KvCache<D>);

impl<D: KvStorage> KvCache<D> {
    /// A cache of `num_blocks` blocks for up to `num_sequences` sequences at once, and passes of up to `max_rows` rows.
    ///
    /// # Errors
    /// Those of [`KvStorage::new_store`].
    pub fn new(
        device: &D,
        layout: CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
        arithmetic: Arithmetic,
    ) -> Result<Self, DeviceError> {
        let mut store = device.new_store(&layout, num_blocks, num_sequences, max_rows)?;
        let manager = CacheManager::new((*layout).clone(), num_blocks, num_sequences);
        let powers: Vec<Powers> = (0..layout.layers.len()).map(|layer| layout.powers(layer)).collect();
        for (layer, own) in powers.iter().enumerate().filter(|(_, own)| !own.is_none()) {
            device.set_powers(&mut store, layer, own)?;
        }
        Ok(KvCache { layout, manager, store, arithmetic, powers, owner: None })
    }

    /// What it was made for.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Blocks and sequences.
    pub fn manager(&self) -> &CacheManager {
        &self.manager
    }

    /// The bytes, to be looked at.
    pub fn store(&self) -> &D::Store {
        &self.store
    }

    /// Begins an empty sequence.
    ///
    /// # Errors
    /// [`CacheError::TooManySequences`].
    pub fn open(&mut self) -> Result<Sequence, CacheError> {
        self.manager.open()
    }

    /// [`CacheManager::classify`].
    ///
    /// # Errors
    /// [`CacheError::Class`].
    pub fn classify(&self, sequence: &mut Sequence, classes: &[u8]) -> Result<(), CacheError> {
        self.manager.classify(sequence, classes)
    }

    /// [`CacheManager::reserve`].
    ///
    /// # Errors
    /// [`CacheError::PoolExhausted`].
    pub fn reserve(&mut self, sequence: &mut Sequence, len: usize) -> Result<(), CacheError> {
        self.manager.reserve(sequence, len)
    }

    /// Records that a pass has stored `tokens` more tokens of a sequence.
    ///
    /// # Panics
    /// If the blocks for so many tokens were not reserved.
    pub fn advance(&mut self, sequence: &mut Sequence, tokens: usize) {
        self.manager.advance(sequence, sequence.len() + tokens);
    }

    /// Empties a sequence, which stays open.
    pub fn clear(&mut self, sequence: &mut Sequence) {
        self.manager.clear(sequence);
    }

    /// Ends a sequence.
    pub fn close(&mut self, sequence: Sequence) {
        self.manager.close(sequence);
    }

    /// What a sequence takes.
    pub fn usage(&self, sequence: &Sequence) -> Usage {
        self.manager.usage(sequence)
    }

    /// What the heads of each layer are divided by before they are stored.
    pub fn powers(&self) -> &[Powers] {
        &self.powers
    }

    /// In what it was made to compute.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// Makes the cache that of an owner, a model with its buffers, for good: passes that a device has recorded name these.
    /// `None` where it belongs to another one.
    pub fn claim(&mut self, owner: u64) -> Option<OwnedCache<'_, D>> {
        (*self.owner.get_or_insert(owner) == owner).then_some(OwnedCache(self))
    }

    /// Runs a pass that is never recorded.
    ///
    /// On an error the sequences of the batch must be cleared or closed: a pass that fails half-way has overwritten parts of
    /// their windows.
    ///
    /// # Errors
    /// Those of `work`, and of the device. [`DeviceError::Overflow`] where a key or value was beyond fp16: all sequences must
    /// then be cleared and run again, else [`DeviceError::Stale`].
    pub fn pass_once<E: From<DeviceError> + Send>(
        &mut self,
        device: &D,
        batch: &Batch,
        work: impl FnOnce(&mut Pass<D>) -> Result<(), E> + Send,
    ) -> Result<(), E> {
        let mut work = Some(work);
        self.run(device, batch, false, |pass| match work.take() {
            Some(work) => work(pass),
            None => Ok(()),
        })
    }

    fn run<E: From<DeviceError> + Send>(
        &mut self,
        device: &D,
        batch: &Batch,
        records: bool,
        mut work: impl FnMut(&mut Pass<D>) -> Result<(), E> + Send,
    ) -> Result<(), E> {
        let KvCache { manager, store, arithmetic, powers, .. } = self;
        let (plan, states) = manager.split_states();
        for span in &batch.spans {
            let own = &mut states[span.slot as usize];
            own.is_stale &= span.cached > 0;
            if own.is_stale {
                return Err(DeviceError::Stale.into());
            }
            own.sinks.begin_pass();
        }
        let mut on = |store: &mut D::Store| {
            let (states, powers) = (&mut *states, &mut powers[..]);
            work(&mut Pass { device, plan, batch, arithmetic: *arithmetic, store, states, powers, next_layer: 0 })
        };
        let placed = match batch.is_stepwise(plan) {
            // Each row is placed when it attends.
            true => Ok(()),
            false => device.place(store, &batch.spans, true),
        };
        let result = placed.map_err(E::from).and_then(|()| match records {
            true => device.record(store, on),
            false => device.scope(|| on(store)),
        });
        let finished = device.finish(store, batch);
        // What a GPU's kernels noted comes before what the host found later.
        finished.map_err(|error| E::from(raised(device, plan, store, states, powers, error)))?;
        result?;
        self.manager.note(batch);
        Ok(())
    }
}

impl<D: KvStorage> OwnedCache<'_, D> {
    /// Runs a pass of the owner. Where it repeats ([`Batch::repeats`]), the device may record `work` and do it again without
    /// asking, as [`KvStorage::record`] says.
    ///
    /// # Errors
    /// As of [`KvCache::pass_once`].
    pub fn pass<E: From<DeviceError> + Send>(
        self,
        device: &D,
        batch: &Batch,
        work: impl FnMut(&mut Pass<D>) -> Result<(), E> + Send,
    ) -> Result<(), E> {
        let records = batch.repeats(self.0.manager.plan());
        self.0.run(device, batch, records, work)
    }
}
