//! A forward pass as the cache sees it, in the one order that it has.

use crate::{Arithmetic, Attention, DeviceError, KvStorage, QueryHeads};
use dibit_cache::{Batch, CachePlan, Phase, Powers, Sees, SequenceState};
use std::ops::Range;

/// A pass in flight. Its layers follow each other.
pub struct Pass<'a, D: KvStorage> {
    pub(crate) device: &'a D,
    pub(crate) plan: &'a CachePlan,
    pub(crate) batch: &'a Batch,
    pub(crate) arithmetic: Arithmetic,
    pub(crate) store: &'a mut D::Store,
    pub(crate) states: &'a mut [SequenceState],
    pub(crate) powers: &'a mut [Powers],
    pub(crate) next_layer: usize,
}

/// A layer of a pass, whose sinks are chosen. Its rows are staged and attend, and then it is packed. Dropped before that, it
/// has stored nothing; of a stepwise batch ([`Batch::is_stepwise`]), whose rows are stored as they attend, no more than these.
#[must_use = "a layer stores its tokens when it is packed"]
pub struct LayerPass<'p, 'a, D: KvStorage> {
    pass: &'p mut Pass<'a, D>,
    layer: usize,
    /// Rows of the batch whose keys and values are there.
    staged: usize,
    /// Those of a stepwise batch that are stored.
    stored: usize,
}

/// Rows whose keys and values are there, and that can attend.
pub struct StagedRows<'l, 'p, 'a, D: KvStorage> {
    layer: &'l mut LayerPass<'p, 'a, D>,
    rows: Range<usize>,
}

impl<'a, D: KvStorage> Pass<'a, D> {
    /// Goes to a layer, the first one of a pass that begins in the middle of a model.
    ///
    /// # Panics
    /// If that layer has been passed.
    pub fn skip_to(&mut self, layer: usize) {
        assert!(layer >= self.next_layer, "layers of a pass follow each other");
        self.next_layer = layer;
    }

    /// The next layer. `hidden` is the residual stream that enters it, a row of `width` numbers for each row of the batch:
    /// schemes that protect tokens for their activations choose them by it.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub fn layer(&mut self, hidden: &D::Buffer, width: usize) -> Result<LayerPass<'_, 'a, D>, DeviceError> {
        let layer = self.next_layer;
        self.next_layer += 1;
        if self.plan.sinks.are_chosen() {
            let mut rows = Vec::new();
            for span in self.batch.spans.iter().filter(|span| span.shows_sinks()) {
                self.device.download(hidden, span.rows.start * width..span.rows.end * width, &mut rows)?;
                let sinks = &mut self.states[span.slot as usize].sinks;
                sinks.choose(self.plan.sinks, layer, span.cached..span.len(), &rows, width);
                self.device.set_sinks(self.store, layer, span.slot, sinks.layer(layer))?;
            }
        }
        Ok(LayerPass { pass: self, layer, staged: 0, stored: 0 })
    }

    /// Attention of the rows that were staged last, in every layer of the model one after the other: what benchmarks time.
    /// Nothing is stored.
    ///
    /// # Errors
    /// Those of the device.
    ///
    /// # Panics
    /// If the batch is stepwise.
    pub fn attend_in_all_layers(
        &mut self,
        heads: QueryHeads<D::Buffer>,
        q: &D::Buffer,
        out: &mut D::Buffer,
    ) -> Result<(), DeviceError> {
        let Pass { device, plan, batch, arithmetic, store, .. } = self;
        assert!(!batch.is_stepwise(plan), "rows of a stepwise batch are stored as they attend");
        let attend = |layer| {
            let rows = 0..batch.rows();
            let (spans, phase, arithmetic) = (&batch.spans[..], batch.phase(), *arithmetic);
            let attention = Attention { layer, spans, phase, arithmetic, rows, first: 0, heads, incoming: true };
            device.attend(store, attention, q, out)
        };
        (0..plan.layers.len()).try_for_each(attend)
    }

    /// The whole next layer of a pass whose keys, values and queries are there already.
    ///
    /// # Errors
    /// Those of its parts.
    pub fn whole_layer(
        &mut self,
        (hidden, width): (&D::Buffer, usize),
        heads: QueryHeads<D::Buffer>,
        [q, k, v]: [&D::Buffer; 3],
        out: &mut D::Buffer,
    ) -> Result<(), DeviceError> {
        let rows = self.batch.rows();
        let mut layer = self.layer(hidden, width)?;
        layer.stage(rows, k, v)?.attend(heads, q, out)?;
        layer.pack()
    }
}

impl<'p, 'a, D: KvStorage> LayerPass<'p, 'a, D> {
    /// Takes keys and values of the next rows of the batch, up to `end`; see [`KvStorage::stage_kv`].
    ///
    /// # Errors
    /// [`DeviceError::NotFinite`], [`DeviceError::Overflow`].
    pub fn stage(
        &mut self,
        end: usize,
        k: &D::Buffer,
        v: &D::Buffer,
    ) -> Result<StagedRows<'_, 'p, 'a, D>, DeviceError> {
        let rows = self.staged..end;
        let Pass { device, plan, batch, store, states, powers, .. } = &mut *self.pass;
        let staged = device.stage_kv(store, self.layer, batch, rows.clone(), k, v);
        staged.map_err(|error| raised(*device, plan, store, states, powers, error))?;
        self.staged = end;
        Ok(StagedRows { layer: self, rows })
    }

    /// Stores the keys and values of all rows, and quantises what leaves the window.
    ///
    /// # Errors
    /// [`DeviceError::Quantize`].
    ///
    /// # Panics
    /// If not all rows of the batch were staged, or not all of a stepwise one have attended.
    pub fn pack(self) -> Result<(), DeviceError> {
        let Pass { device, plan, batch, store, .. } = self.pass;
        let stepwise = batch.is_stepwise(plan);
        assert_eq!(if stepwise { self.stored } else { self.staged }, batch.rows(), "rows that are packed");
        match stepwise {
            true => Ok(()),
            false => device.append(store, self.layer, &batch.spans),
        }
    }
}

impl<D: KvStorage> StagedRows<'_, '_, '_, D> {
    /// The rows, if fp16 holds them: what a device notes and tells when the pass ends, it tells here.
    ///
    /// # Errors
    /// Those of [`LayerPass::stage`].
    pub fn checked(self) -> Result<Self, DeviceError> {
        let Pass { device, plan, batch, store, states, powers, .. } = &mut *self.layer.pass;
        let noted = device.finish(store, batch);
        noted.map_err(|error| raised(*device, plan, store, states, powers, error))?;
        Ok(self)
    }

    /// Causal attention of the rows over packed pages, windows and the pass in flight; see [`KvStorage::attend`]. `q` and
    /// `out` hold these rows. Of a stepwise batch ([`Batch::is_stepwise`]) each row is stored before the next one attends.
    ///
    /// # Errors
    /// Those of the device; of a stepwise batch those of [`LayerPass::pack`].
    ///
    /// # Panics
    /// If rows of a stepwise batch attend twice, or out of their order.
    pub fn attend(
        &mut self,
        heads: QueryHeads<D::Buffer>,
        q: &D::Buffer,
        out: &mut D::Buffer,
    ) -> Result<(), DeviceError> {
        let LayerPass { pass, layer, stored: stored_rows, .. } = &mut *self.layer;
        let Pass { device, plan, batch, arithmetic, store, .. } = &mut **pass;
        let (rows, layer, arithmetic) = (self.rows.clone(), *layer, *arithmetic);
        if rows.is_empty() {
            return Ok(());
        }
        let first = rows.start;
        if !batch.is_stepwise(plan) {
            let (spans, phase) = (&batch.spans[..], batch.phase());
            let attention = Attention { layer, spans, phase, arithmetic, first, rows, heads, incoming: true };
            return device.attend(store, attention, q, out);
        }
        assert_eq!(*stored_rows, rows.start, "rows of a stepwise batch attend once, in their order");
        *stored_rows = rows.end;
        let stored = plan.sees == Sees::Stored;
        for span in &batch.spans {
            let mut step = [span.clone()];
            for row in span.rows.start.max(rows.start)..span.rows.end.min(rows.end) {
                step[0].rows = row..row + 1;
                step[0].cached = span.cached + row - span.rows.start;
                device.place(store, &step, true)?;
                if stored {
                    device.append(store, layer, &step)?;
                    step[0].cached += 1;
                    device.place(store, &step, false)?;
                }
                let one = Attention {
                    layer,
                    spans: &step,
                    phase: Phase::Decode,
                    arithmetic,
                    first,
                    rows: row..row + 1,
                    heads,
                    incoming: !stored,
                };
                device.attend(store, one, q, out)?;
                if !stored {
                    device.append(store, layer, &step)?;
                }
            }
        }
        Ok(())
    }
}

/// Where an error says that a finite number was beyond fp16, divides the keys or values of its head from now on, and says so
/// instead.
pub(crate) fn raised<D: KvStorage>(
    device: &D,
    plan: &CachePlan,
    store: &mut D::Store,
    states: &mut [SequenceState],
    powers: &mut [Powers],
    error: DeviceError,
) -> DeviceError {
    let DeviceError::NotFinite { side, layer, kv_head, token, value } = error else { return error };
    let keys = side == "key";
    // Adapters of a linear correction were trained on keys as they are.
    if value.is_finite() && keys && plan.layers[layer].states.is_some() {
        return DeviceError::Corrected { layer, kv_head, token, value };
    }
    if !value.is_finite() {
        return error;
    }
    let before = powers[layer].exponents(keys).get(kv_head).copied().unwrap_or(0);
    let exponent = powers[layer].raise(keys, kv_head, plan.shape.num_key_value_heads, value);
    if exponent == before {
        return error;
    }
    powers[layer] = std::mem::take(&mut powers[layer]).alike_in(plan.layers[layer].frame);
    if let Err(error) = device.set_powers(store, layer, &powers[layer]) {
        return error;
    }
    states.iter_mut().for_each(|state| state.is_stale = true);
    DeviceError::Overflow { side, layer, kv_head, token, value, exponent }
}
