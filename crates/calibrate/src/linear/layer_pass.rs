//! One layer of one sequence: the loss of its attention rows, and its gradient in closed form.

use super::adapter::{Adapter, AdapterShape};
use super::start::Seen;
use super::tiles::{Tile, Tiles};
use dibit_cache::{CacheLayout, PAGE_TOKENS};
use dibit_device::{DeviceError, Place, ROW_STATISTICS, RowStatistic, Rows, Train};

/// Queries, keys and values of a sequence in one layer.
#[derive(Default)]
pub(crate) struct Attended {
    /// Sampled queries `[KV head][tile][query head of it][query][head_dim]`.
    pub queries: Vec<f32>,
    /// `[token][KV head][head_dim]`
    pub keys: Vec<f32>,
    /// The same; only where the loss looks at outputs.
    pub values: Vec<f32>,
}

/// What the loss of a layer is made of, sums over rows by query head.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Sums {
    pub cross_entropy: Vec<f64>,
    /// Divergence of the corrected rows from the exact ones.
    pub divergence: Vec<f64>,
    /// The same without a correction.
    pub uncorrected: Vec<f64>,
    /// Squared errors of outputs.
    pub output: Vec<f64>,
    /// Rows of each head.
    pub rows: usize,
}

impl Sums {
    pub(crate) fn new(heads: usize) -> Self {
        let zeros = || vec![0.0; heads];
        Sums { cross_entropy: zeros(), divergence: zeros(), uncorrected: zeros(), output: zeros(), rows: 0 }
    }
}

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Task {
    /// Whether gradients are added to the layer's.
    pub train: bool,
    /// Weight of the output's squared error in the loss.
    pub output_weight: f32,
    /// First keys that the cache holds exactly.
    pub exact: usize,
}

/// What one layer is to be run on.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub layout: &'a CacheLayout,
    pub layer: usize,
    pub attended: &'a Attended,
    pub tiles: &'a Tiles,
}

/// Buffers of a pass over one layer, allocated once for all.
pub(crate) struct LayerPass<D: Train> {
    queries: D::Buffer,
    keys: D::Buffer,
    values: D::Buffer,
    missed: D::Buffer,
    key_features: D::Buffer,
    key_derivatives: D::Buffer,
    query_features: D::Buffer,
    query_derivatives: D::Buffer,
    /// `[rows of a tile][context]`: logits of the exact keys, of what codes miss, and corrections.
    exact_logits: D::Buffer,
    missed_logits: D::Buffer,
    correction: D::Buffer,
    /// Errors of outputs, and their products with values.
    errors: D::Buffer,
    toward: D::Buffer,
    statistics: D::Buffer,
    downloaded: Vec<f32>,
}

impl<D: Train> LayerPass<D> {
    /// Room for sequences of `context` tokens.
    pub(crate) fn new(device: &D, shape: AdapterShape, context: usize, outputs: bool) -> Result<Self, DeviceError> {
        let AdapterShape { heads, kv_heads, head_dim, features } = shape;
        let padded = context.next_multiple_of(PAGE_TOKENS);
        let tile = shape.group() * Tiles::most_rows(shape.group());
        let kv = padded * kv_heads * head_dim;
        let if_outputs = |len: usize| device.buffer(if outputs { len } else { 0 });
        Ok(LayerPass {
            queries: device.buffer(context * heads * head_dim)?,
            keys: device.buffer(kv)?,
            values: if_outputs(kv)?,
            missed: device.buffer(kv)?,
            key_features: device.buffer(padded * features)?,
            key_derivatives: device.buffer(padded * features)?,
            query_features: device.buffer(tile * features)?,
            query_derivatives: device.buffer(tile * features)?,
            exact_logits: device.buffer(tile * context)?,
            missed_logits: device.buffer(tile * context)?,
            correction: device.buffer(tile * context)?,
            errors: if_outputs(tile * head_dim)?,
            toward: if_outputs(tile * context)?,
            statistics: device.buffer(context * heads * ROW_STATISTICS)?,
            downloaded: Vec::new(),
        })
    }

    /// Computes the loss of a layer, adds it to `sums`, and where `task` says so its gradient to that of the adapters.
    pub(crate) fn run(
        &mut self,
        device: &D,
        input: Input,
        adapter: &mut Adapter<D>,
        task: Task,
        sums: &mut Sums,
    ) -> Result<(), DeviceError> {
        let Input { layout, layer, attended, tiles } = input;
        let shape = adapter.shape;
        let Some(last) = tiles.tiles.last() else { return Ok(()) };
        device.write(&mut self.queries, 0, &attended.queries);
        device.write(&mut self.keys, 0, &attended.keys);
        let outputs = task.output_weight > 0.0;
        if outputs {
            device.write(&mut self.values, 0, &attended.values);
        }
        let packed = last.packed.next_multiple_of(PAGE_TOKENS);
        device.missed_keys(layout, layer, &self.keys, packed, &mut self.missed)?;
        for kv_head in 0..shape.kv_heads {
            self.key_features(device, adapter, kv_head, last.packed, task.train);
            for tile in &tiles.tiles {
                self.tile(device, adapter, kv_head, tiles, tile, task);
            }
            if task.train {
                self.key_gradient(device, adapter, kv_head, last.packed);
            }
        }
        self.add_statistics(device, adapter, tiles, task.train, sums)?;
        Ok(())
    }

    /// What a layer shows before training.
    pub(crate) fn look(&mut self, device: &D, input: Input, shape: AdapterShape) -> Result<Seen, DeviceError> {
        let Input { layout, layer, attended, tiles } = input;
        let AdapterShape { heads, kv_heads, head_dim, .. } = shape;
        let packed = tiles.tiles.last().map_or(0, |last| last.packed);
        device.write(&mut self.keys, 0, &attended.keys);
        device.missed_keys(layout, layer, &self.keys, packed.next_multiple_of(PAGE_TOKENS), &mut self.missed)?;
        device.download(&self.missed, 0..packed * kv_heads * head_dim, &mut self.downloaded)?;
        let mut missed = vec![0.0; kv_heads];
        for (index, number) in self.downloaded.iter().enumerate() {
            missed[index / head_dim % kv_heads] += f64::from(*number).powi(2);
        }
        let (mut means, mut squares) = (vec![0.0; heads * head_dim], vec![0.0; heads]);
        let mut queries = attended.queries.chunks_exact(head_dim);
        for kv_head in 0..kv_heads {
            for tile in &tiles.tiles {
                for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
                    for query in queries.by_ref().take(tile.places.len()) {
                        for (mean, x) in means[head * head_dim..].iter_mut().zip(query) {
                            *mean += f64::from(*x);
                            squares[head] += f64::from(*x).powi(2);
                        }
                    }
                }
            }
        }
        let norm = |sum: &f64, count: usize| (sum / count.max(1) as f64).sqrt() as f32;
        let rows = tiles.rows.len();
        Ok(Seen {
            mean_query: means.iter().map(|sum| (sum / rows as f64) as f32).collect(),
            query_norm: squares.iter().map(|sum| norm(sum, rows)).collect(),
            missed_norm: missed.iter().map(|sum| norm(sum, packed)).collect(),
        })
    }

    /// Features of what the codes of all keys miss.
    fn key_features(&mut self, device: &D, adapter: &Adapter<D>, kv_head: usize, packed: usize, train: bool) {
        let AdapterShape { kv_heads, head_dim, features, .. } = adapter.shape;
        let missed = Place::rows(kv_head * head_dim, kv_heads * head_dim);
        device.product(
            [packed, features, head_dim],
            1.0,
            (&self.missed, missed),
            (&adapter.maps, adapter.shape.key_map(kv_head)),
            (&mut self.key_features, Place::rows(0, features)),
            false,
        );
        device.features(&mut self.key_features, 0..packed, features / 2, 1.0);
        if train {
            device.clear(&mut self.key_derivatives, 0..packed * features);
        }
    }

    /// From the derivatives by features of keys to those by their map.
    fn key_gradient(&mut self, device: &D, adapter: &mut Adapter<D>, kv_head: usize, packed: usize) {
        let AdapterShape { kv_heads, head_dim, features, .. } = adapter.shape;
        let derivatives = &mut self.key_derivatives;
        device.features_backward(&self.key_features, derivatives, 0..packed, features / 2, 1.0, None, 0);
        device.product(
            [head_dim, features, packed],
            1.0,
            (&self.missed, Place::rows(kv_head * head_dim, kv_heads * head_dim).transposed()),
            (&self.key_derivatives, Place::rows(0, features)),
            (&mut adapter.gradient, adapter.shape.key_map(kv_head)),
            true,
        );
    }

    /// The rows of one tile.
    fn tile(&mut self, device: &D, adapter: &mut Adapter<D>, kv_head: usize, tiles: &Tiles, tile: &Tile, task: Task) {
        let shape = adapter.shape;
        let AdapterShape { kv_heads, head_dim, features, .. } = shape;
        let queries = tile.places.len();
        let rows = Rows {
            heads: shape.group(),
            visible: &tiles.visible[tile.places.clone()],
            packed: &tiles.packed[tile.places.clone()],
            exact: task.exact,
            stride: tile.visible,
        };
        let count = rows.count();
        let first_row = shape.group() * (kv_head * tiles.rows.len() + tile.places.start);
        let query = Place::rows(first_row * head_dim, head_dim);
        let key = Place::rows(kv_head * head_dim, kv_heads * head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let logits = Place::rows(0, tile.visible);
        let by_feature = Place::rows(0, features);
        // The head of the group and its rows in the tile.
        let by_head = |head: usize| (kv_head * shape.group() + head, head * queries..(head + 1) * queries);
        for (keys, visible, out) in
            [(&self.keys, tile.visible, &mut self.exact_logits), (&self.missed, tile.packed, &mut self.missed_logits)]
        {
            let keys = (keys, key.transposed());
            device.product([count, visible, head_dim], scale, (&self.queries, query), keys, (out, logits), false);
        }
        for head in 0..shape.group() {
            let (map, own) = by_head(head);
            let query = Place { offset: query.offset + own.start * head_dim, ..query };
            let out = (&mut self.query_features, Place::rows(own.start * features, features));
            let maps = (&adapter.maps, shape.query_map(map));
            device.product([queries, features, head_dim], 1.0, (&self.queries, query), maps, out, false);
            device.features(&mut self.query_features, own, features / 2, adapter.gate(map));
        }
        device.product(
            [count, tile.packed, features],
            1.0,
            (&self.query_features, by_feature),
            (&self.key_features, by_feature.transposed()),
            (&mut self.correction, logits),
            false,
        );
        let outputs = task.output_weight > 0.0;
        device.row_loss(
            rows,
            &mut self.exact_logits,
            &mut self.missed_logits,
            &mut self.correction,
            &mut self.statistics,
            first_row,
            outputs,
        );
        if outputs {
            self.add_output_loss(device, rows, key, head_dim, first_row, task.output_weight);
        }
        if !task.train {
            return;
        }
        let derivative = (&self.correction, logits);
        device.product(
            [count, features, tile.packed],
            1.0,
            derivative,
            (&self.key_features, by_feature),
            (&mut self.query_derivatives, by_feature),
            false,
        );
        device.product(
            [tile.packed, features, count],
            1.0,
            (derivative.0, logits.transposed()),
            (&self.query_features, by_feature),
            (&mut self.key_derivatives, by_feature),
            true,
        );
        for head in 0..shape.group() {
            let (map, own) = by_head(head);
            let (first, statistics) = (own.start, Some(&mut self.statistics));
            let (y, dy) = (&self.query_features, &mut self.query_derivatives);
            let (half, gate) = (features / 2, adapter.gate(map));
            device.features_backward(y, dy, own, half, gate, statistics, first_row + first);
            let query = Place { offset: query.offset + first * head_dim, ..query };
            device.product(
                [head_dim, features, queries],
                1.0,
                (&self.queries, query.transposed()),
                (&self.query_derivatives, Place::rows(first * features, features)),
                (&mut adapter.gradient, shape.query_map(map)),
                true,
            );
        }
    }

    /// Adds the squared error of the output to the loss of a tile.
    fn add_output_loss(&mut self, device: &D, rows: Rows, key: Place, head_dim: usize, first_row: usize, weight: f32) {
        let (count, visible) = (rows.count(), rows.stride);
        let (logits, output) = (Place::rows(0, visible), Place::rows(0, head_dim));
        let values = (&self.values, key);
        let errors = (&mut self.errors, output);
        device.product([count, head_dim, visible], 1.0, (&self.exact_logits, logits), values, errors, false);
        let values = (&self.values, key.transposed());
        let toward = (&mut self.toward, logits);
        device.product([count, visible, head_dim], 1.0, (&self.errors, output), values, toward, false);
        device.output_loss(
            rows,
            weight,
            head_dim,
            &self.missed_logits,
            &self.errors,
            &self.toward,
            &mut self.correction,
            &mut self.statistics,
            first_row,
        );
    }

    /// Adds up what the rows found, in their order.
    fn add_statistics(
        &mut self,
        device: &D,
        adapter: &mut Adapter<D>,
        tiles: &Tiles,
        train: bool,
        sums: &mut Sums,
    ) -> Result<(), DeviceError> {
        let shape = adapter.shape;
        let all = shape.heads * tiles.rows.len() * ROW_STATISTICS;
        device.download(&self.statistics, 0..all, &mut self.downloaded)?;
        let mut rows = self.downloaded.chunks_exact(ROW_STATISTICS);
        for kv_head in 0..shape.kv_heads {
            for tile in &tiles.tiles {
                for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
                    let mut gate = 0.0;
                    for row in rows.by_ref().take(tile.places.len()) {
                        let number = |place: RowStatistic| f64::from(row[place as usize]);
                        sums.cross_entropy[head] += number(RowStatistic::CrossEntropy);
                        sums.divergence[head] += number(RowStatistic::Divergence);
                        sums.uncorrected[head] += number(RowStatistic::Uncorrected);
                        sums.output[head] += number(RowStatistic::Output);
                        gate += number(RowStatistic::Gate);
                    }
                    if train {
                        adapter.add_gate_gradient(head, gate);
                    }
                }
            }
        }
        sums.rows += tiles.rows.len();
        Ok(())
    }
}
