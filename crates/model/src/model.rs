//! The forward pass.

use crate::weights::LinearWeights;
use crate::{LayerWeights, ModelConfig, ModelError, Weights, Workspace};
use dibit_device::{Batch, Device, Output, Phase, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// Index of the largest number, the first of equals; 0 where there is none.
pub fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

struct Linear<D: Device> {
    weight: D::Matrix,
    bias: Option<Arc<D::Buffer>>,
}

struct Layer<D: Device> {
    input_norm: Arc<D::Buffer>,
    q: Linear<D>,
    k: Linear<D>,
    v: Linear<D>,
    o: Linear<D>,
    q_norm: Option<Arc<D::Buffer>>,
    k_norm: Option<Arc<D::Buffer>>,
    post_norm: Arc<D::Buffer>,
    gate: Linear<D>,
    up: Linear<D>,
    down: Linear<D>,
}

/// Queries, keys and values of some rows of a pass in one layer, after RoPE.
#[derive(Debug, Clone, Copy)]
pub struct Observation<'a> {
    /// The layer.
    pub layer: usize,
    /// First row in the batch.
    pub first_row: usize,
    /// `[row][num_attention_heads][head_dim]`
    pub q: &'a [f32],
    /// `[row][num_key_value_heads][head_dim]`
    pub k: &'a [f32],
    /// The same for values, rotated where the weights are.
    pub v: &'a [f32],
}

/// Sees what passes through attention.
pub type Observer<'a> = dyn FnMut(Observation) + Send + 'a;

/// A decoder on a device.
pub struct Model<D: Device> {
    config: ModelConfig,
    embed: D::Matrix,
    layers: Vec<Layer<D>>,
    norm: Arc<D::Buffer>,
    lm_head: D::Matrix,
    inv_freq: Vec<f32>,
}

impl<D: Device> Linear<D> {
    fn new(device: &D, weights: &LinearWeights) -> Result<Self, ModelError> {
        let bias = weights.bias.as_ref().map(|bias| upload(device, bias)).transpose()?;
        Ok(Linear { weight: device.matrix(weights.weight.clone())?, bias })
    }

    fn run(&self, device: &D, phase: Phase, x: &D::Buffer, rows: usize, out: &mut D::Buffer, output: Output) {
        device.linear(phase, x, rows, &self.weight, self.bias.as_deref(), out, output);
    }
}

fn upload<D: Device>(device: &D, vector: &Tensor) -> Result<Arc<D::Buffer>, ModelError> {
    Ok(Arc::new(device.upload(&vector.to_f32())?))
}

impl<D: Device> Layer<D> {
    fn new(device: &D, weights: &LayerWeights) -> Result<Self, ModelError> {
        let head_norm = |norm: &Option<Tensor>| norm.as_ref().map(|norm| upload(device, norm)).transpose();
        Ok(Layer {
            input_norm: upload(device, &weights.input_norm)?,
            q: Linear::new(device, &weights.q)?,
            k: Linear::new(device, &weights.k)?,
            v: Linear::new(device, &weights.v)?,
            o: Linear::new(device, &weights.o)?,
            q_norm: head_norm(&weights.q_norm)?,
            k_norm: head_norm(&weights.k_norm)?,
            post_norm: upload(device, &weights.post_norm)?,
            gate: Linear::new(device, &weights.gate)?,
            up: Linear::new(device, &weights.up)?,
            down: Linear::new(device, &weights.down)?,
        })
    }
}

impl<D: Device> Model<D> {
    /// Puts weights on a device as they are.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub fn new(device: &D, config: &ModelConfig, weights: &Weights) -> Result<Self, ModelError> {
        Ok(Model {
            embed: device.matrix(weights.embed.clone())?,
            layers: weights.layers.iter().map(|layer| Layer::new(device, layer)).collect::<Result<_, _>>()?,
            norm: upload(device, &weights.norm)?,
            lm_head: device.matrix(weights.lm_head.clone())?,
            inv_freq: config.rope.inv_freq(config.head_dim),
            config: config.clone(),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Runs the new tokens `ids` of a batch through the layers and stores their keys and values.
    /// [`Model::logits`] then reads the rows that are wanted.
    ///
    /// On an error the sequences of the batch must be cleared or closed: a pass that fails half-way has overwritten
    /// parts of their windows.
    ///
    /// # Errors
    /// [`ModelError::TokenId`], [`ModelError::TooManyRows`], [`ModelError::Device`].
    ///
    /// # Panics
    /// If the batch does not have one row for each id.
    pub fn forward(
        &self,
        device: &D,
        workspace: &mut Workspace<D>,
        store: &mut D::Store,
        batch: &Batch,
        ids: &[u32],
    ) -> Result<(), ModelError> {
        self.pass(device, workspace, store, batch, ids, None)
    }

    /// [`Model::forward`], showing queries, keys and values of every layer and row to `observer`.
    ///
    /// # Errors
    /// Those of [`Model::forward`].
    ///
    /// # Panics
    /// If the batch does not have one row for each id.
    pub fn observe(
        &self,
        device: &D,
        workspace: &mut Workspace<D>,
        store: &mut D::Store,
        batch: &Batch,
        ids: &[u32],
        observer: &mut Observer,
    ) -> Result<(), ModelError> {
        self.pass(device, workspace, store, batch, ids, Some(observer))
    }

    fn pass(
        &self,
        device: &D,
        workspace: &mut Workspace<D>,
        store: &mut D::Store,
        batch: &Batch,
        ids: &[u32],
        mut observer: Option<&mut Observer>,
    ) -> Result<(), ModelError> {
        assert_eq!(ids.len(), batch.rows(), "one id for each row");
        let vocab_size = self.config.vocab_size;
        if let Some(&id) = ids.iter().find(|id| **id as usize >= vocab_size) {
            return Err(ModelError::TokenId { id, vocab_size });
        }
        let (rows, max_rows) = (ids.len(), workspace.max_rows);
        if rows > max_rows {
            return Err(ModelError::TooManyRows { rows, max_rows });
        }
        device.scope(|| {
            let ws = workspace;
            ws.positions.clear();
            ws.positions.extend(batch.positions());
            device.rope_table(&self.inv_freq, &ws.positions, &mut ws.rope);
            device.embed(&self.embed, ids, &mut ws.hidden);
            for (index, layer) in self.layers.iter().enumerate() {
                device.observe(store, index, batch, &ws.hidden, self.config.hidden_size);
                for first in (0..ids.len()).step_by(ws.tile_rows) {
                    let tile = first..ids.len().min(first + ws.tile_rows);
                    self.attention_block(
                        device,
                        ws,
                        store,
                        batch,
                        index,
                        layer,
                        tile.clone(),
                        observer.as_deref_mut(),
                    )?;
                    self.mlp_block(device, batch.phase(), ws, layer, tile);
                }
                device.commit(store, index, batch)?;
            }
            Ok(())
        })
    }

    /// Logits of some rows of the last pass: `vocab_size` numbers for each row, in the order of `rows`.
    ///
    /// # Errors
    /// [`ModelError::TooManyRows`].
    pub fn logits(
        &self,
        device: &D,
        workspace: &mut Workspace<D>,
        rows: &[usize],
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let (count, max_rows) = (rows.len(), workspace.max_outputs);
        if count > max_rows {
            return Err(ModelError::TooManyRows { rows: count, max_rows });
        }
        let (width, eps) = (self.config.hidden_size, self.config.rms_norm_eps);
        let ws = workspace;
        device.scope(|| {
            device.copy_rows(&ws.hidden, rows, width, &mut ws.selected);
            device.rms_norm(&ws.selected, 0..count, width, &self.norm, eps, &mut ws.selected_normed);
            device.linear(
                Phase::Decode,
                &ws.selected_normed,
                count,
                &self.lm_head,
                None,
                &mut ws.logits,
                Output::Write(0),
            );
        });
        device.download(&ws.logits, 0..count * self.config.vocab_size, out);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn attention_block(
        &self,
        device: &D,
        ws: &mut Workspace<D>,
        store: &mut D::Store,
        batch: &Batch,
        index: usize,
        layer: &Layer<D>,
        tile: Range<usize>,
        observer: Option<&mut Observer>,
    ) -> Result<(), ModelError> {
        let ModelConfig { hidden_size, num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps: eps, .. } =
            self.config;
        let rows = tile.len();
        device.rms_norm(&ws.hidden, tile.clone(), hidden_size, &layer.input_norm, eps, &mut ws.normed);
        layer.q.run(device, batch.phase(), &ws.normed, rows, &mut ws.q, Output::Write(0));
        layer.k.run(device, batch.phase(), &ws.normed, rows, &mut ws.k, Output::Write(0));
        layer.v.run(device, batch.phase(), &ws.normed, rows, &mut ws.v, Output::Write(0));
        for (x, norm, heads) in
            [(&mut ws.q, &layer.q_norm, num_attention_heads), (&mut ws.k, &layer.k_norm, num_key_value_heads)]
        {
            if let Some(norm) = norm {
                device.rms_norm_inplace(x, rows * heads, head_dim, norm, eps);
            }
            device.rope(x, heads, head_dim, &ws.rope, tile.clone());
        }
        if let Some(observer) = observer {
            let [mut q, mut k, mut v] = [(); 3].map(|()| Vec::new());
            device.download(&ws.q, 0..rows * num_attention_heads * head_dim, &mut q);
            device.download(&ws.k, 0..rows * num_key_value_heads * head_dim, &mut k);
            device.download(&ws.v, 0..rows * num_key_value_heads * head_dim, &mut v);
            observer(Observation { layer: index, first_row: tile.start, q: &q, k: &k, v: &v });
        }
        device.write_kv(store, index, batch, tile.clone(), &ws.k, &ws.v)?;
        device.attention(store, index, batch, tile.clone(), num_attention_heads, &ws.q, &mut ws.attention)?;
        layer.o.run(device, batch.phase(), &ws.attention, rows, &mut ws.hidden, Output::Add(tile.start));
        Ok(())
    }

    fn mlp_block(&self, device: &D, phase: Phase, ws: &mut Workspace<D>, layer: &Layer<D>, tile: Range<usize>) {
        let ModelConfig { hidden_size, intermediate_size, rms_norm_eps: eps, .. } = self.config;
        let rows = tile.len();
        device.rms_norm(&ws.hidden, tile.clone(), hidden_size, &layer.post_norm, eps, &mut ws.normed);
        layer.gate.run(device, phase, &ws.normed, rows, &mut ws.gate, Output::Write(0));
        layer.up.run(device, phase, &ws.normed, rows, &mut ws.up, Output::Write(0));
        device.silu_mul(&mut ws.gate, &ws.up, rows * intermediate_size);
        layer.down.run(device, phase, &ws.gate, rows, &mut ws.hidden, Output::Add(tile.start));
    }
}
