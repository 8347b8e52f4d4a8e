use crate::mlp::{ExpertSpace, expert_width};
use crate::model::turns;
use crate::{ModelConfig, ModelError};
use dibit_device::{Budget, Device};
use std::sync::atomic::{AtomicU32, Ordering};

/// Numbers that a row takes inside a layer.
fn tile_width(config: &ModelConfig) -> usize {
    let heads = config.num_attention_heads + config.num_key_value_heads;
    let experts = config.spec.experts.as_ref().map_or(0, |own| expert_width(own, config.hidden_size));
    config.hidden_size + 2 * heads * config.head_dim + 2 * config.intermediate_size + experts
}

/// Rows that pass through a layer together.
fn tile_rows(config: &ModelConfig, budget: &Budget) -> usize {
    (budget.tile_bytes / size_of::<f32>() / tile_width(config)).clamp(budget.tile_rows.start, budget.tile_rows.end)
}

/// Everything a forward pass writes besides the cache, allocated once.
pub struct Workspace<D: Device> {
    /// Tells it from every other workspace of the process.
    pub(crate) number: u32,
    pub(crate) max_rows: usize,
    pub(crate) tile_rows: usize,
    pub(crate) hidden_size: usize,
    pub(crate) max_outputs: usize,
    /// Residual stream `[max_rows, hidden_size]`.
    pub(crate) hidden: D::Buffer,
    /// Cosines and sines `[max_rows, head_dim]` for each way in which heads are turned.
    pub(crate) rope: Vec<D::Buffer>,
    /// `[tile, hidden_size]`
    pub(crate) normed: D::Buffer,
    /// `[tile, num_attention_heads * head_dim]`
    pub(crate) q: D::Buffer,
    /// `[tile, num_key_value_heads * head_dim]`
    pub(crate) k: D::Buffer,
    /// `[tile, num_key_value_heads * head_dim]`
    pub(crate) v: D::Buffer,
    /// `[tile, num_attention_heads * head_dim]`
    pub(crate) attention: D::Buffer,
    /// `[tile, intermediate_size]`
    pub(crate) gate: D::Buffer,
    /// `[tile, intermediate_size]`
    pub(crate) up: D::Buffer,
    /// What mixtures of experts write, where there are any.
    pub(crate) experts: Option<ExpertSpace<D>>,
    /// Rows whose logits are asked for `[max_outputs, hidden_size]`.
    pub(crate) selected: D::Buffer,
    /// The same after the last norm.
    pub(crate) selected_normed: D::Buffer,
    /// `[max_outputs, vocab_size]`
    pub(crate) logits: D::Buffer,
    /// Token ids `[max_rows]`.
    pub(crate) ids: D::Ids,
    /// Positions `[max_rows]`.
    pub(crate) positions: D::Ids,
    /// Rows whose logits are asked for `[max_outputs]`.
    pub(crate) outputs: D::Ids,
}

impl<D: Device> Workspace<D> {
    /// Buffers for passes of up to `max_rows` rows with logits of up to `max_outputs` of them.
    ///
    /// # Errors
    /// [`ModelError::Device`] where memory is short.
    pub fn new(device: &D, config: &ModelConfig, max_rows: usize, max_outputs: usize) -> Result<Self, ModelError> {
        let tile = max_rows.min(tile_rows(config, &device.budget()));
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        static WORKSPACES: AtomicU32 = AtomicU32::new(0);
        Ok(Workspace {
            number: WORKSPACES.fetch_add(1, Ordering::Relaxed),
            max_rows,
            tile_rows: tile,
            hidden_size: config.hidden_size,
            max_outputs,
            hidden: device.buffer(max_rows * config.hidden_size)?,
            rope: (0..turns(config).0.len())
                .map(|_| device.buffer(max_rows * config.head_dim))
                .collect::<Result<_, _>>()?,
            normed: device.buffer(tile * config.hidden_size)?,
            q: device.buffer(tile * q)?,
            k: device.buffer(tile * kv)?,
            v: device.buffer(tile * kv)?,
            attention: device.buffer(tile * q)?,
            gate: device.buffer(tile * config.intermediate_size)?,
            up: device.buffer(tile * config.intermediate_size)?,
            experts: match &config.spec.experts {
                Some(own) => Some(ExpertSpace::new(device, own, config.hidden_size, tile)?),
                None => None,
            },
            selected: device.buffer(max_outputs * config.hidden_size)?,
            selected_normed: device.buffer(max_outputs * config.hidden_size)?,
            logits: device.buffer(max_outputs * config.vocab_size)?,
            ids: device.ids(max_rows)?,
            positions: device.ids(max_rows)?,
            outputs: device.ids(max_outputs)?,
        })
    }

    /// Rows of the largest pass.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }
}

/// Bytes that a row of a pass takes: its residual stream, its rotary angles and its keys and values of one layer, in
/// flight.
fn pass_row_bytes(config: &ModelConfig) -> usize {
    let kv = 2 * config.num_key_value_heads * config.head_dim;
    (config.hidden_size + turns(config).0.len() * config.head_dim + kv) * size_of::<f32>()
}

/// Bytes that a pass of `rows` rows takes, `outputs` of which yield logits: its rows, the activations inside a layer, and the
/// logits.
pub fn pass_bytes(config: &ModelConfig, rows: usize, outputs: usize, budget: &Budget) -> usize {
    let tile = rows.min(tile_rows(config, budget)) * tile_width(config) * size_of::<f32>();
    let output = (2 * config.hidden_size + config.vocab_size) * size_of::<f32>();
    rows * pass_row_bytes(config) + tile + outputs * output
}
