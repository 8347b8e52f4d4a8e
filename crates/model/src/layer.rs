//! A decoder layer.

use crate::fusion::Fusion;
use crate::linear::{Linear, upload};
use crate::mlp::Mlp;
use crate::weights::LinearWeights;
use crate::{LayerWeights, ModelConfig, ModelError, QkNorm, Workspace};
use dibit_cache::{Phase, ValueTransform};
use dibit_device::{Device, Heads, LayerPass, Norm, Output, QueryHeads, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// A decoder layer on a device; copies share its numbers.
pub(crate) struct Layer<D: Device> {
    input_norm: Option<Arc<D::Buffer>>,
    attention_output_norm: Option<Arc<D::Buffer>>,
    q: Linear<D>,
    k: Linear<D>,
    pub v: Linear<D>,
    pub o: Linear<D>,
    q_norm: Option<Arc<D::Buffer>>,
    k_norm: Option<Arc<D::Buffer>>,
    sinks: Option<Arc<D::Buffer>>,
    mlp_norm: Option<Arc<D::Buffer>>,
    mlp_output_norm: Option<Arc<D::Buffer>>,
    mlp: Mlp<D>,
}

/// Rows of a pass, on their way through a layer.
pub(crate) struct Tile<'a, D> {
    pub device: &'a D,
    pub config: &'a ModelConfig,
    pub phase: Phase,
    pub layer: usize,
    /// The tables of RoPE for queries and for keys.
    pub turned: [usize; 2],
    pub rows: Range<usize>,
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
    /// The same for values, transformed where a transform is fused into the projections.
    pub v: &'a [f32],
}

/// Sees what passes through attention.
pub type Observer<'a> = dyn FnMut(Observation) + Send + 'a;

impl<D: Device> Clone for Layer<D> {
    fn clone(&self) -> Self {
        let Layer { q, k, v, o, mlp, .. } = self;
        Layer {
            input_norm: self.input_norm.clone(),
            attention_output_norm: self.attention_output_norm.clone(),
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            o: o.clone(),
            q_norm: self.q_norm.clone(),
            k_norm: self.k_norm.clone(),
            sinks: self.sinks.clone(),
            mlp_norm: self.mlp_norm.clone(),
            mlp_output_norm: self.mlp_output_norm.clone(),
            mlp: mlp.clone(),
        }
    }
}

/// The value and output projections of a layer, with a transform fused into them; `plain` are those without one, where
/// they are on the device already.
pub(crate) fn projections<D: Device>(
    device: &D,
    config: &ModelConfig,
    layer: usize,
    weights: &LayerWeights,
    transform: Option<&ValueTransform>,
    plain: Option<[&Linear<D>; 2]>,
) -> Result<[Linear<D>; 2], ModelError> {
    let both = |[v, o]: [&LinearWeights; 2]| -> Result<_, ModelError> {
        Ok([Linear::new(device, v)?, Linear::new(device, o)?])
    };
    let load = || both([&weights.v, &weights.o]);
    let Some(transform) = transform else { return load() };
    if !weights.takes_fused_values() {
        return Err(ModelError::QuantisedValues { layer });
    }
    let fusion = Fusion::new(config.cache_shape(), transform)?;
    device.scope(|| {
        let fused = fusion.fuse(weights);
        let fused = both([&fused.v, &fused.o])?;
        let loaded = if plain.is_none() { Some(load()?) } else { None };
        let plain = plain.or(loaded.as_ref().map(|own| own.each_ref())).expect("one of the two");
        fusion.self_test(device, layer, plain, fused.each_ref(), weights)?;
        // Pages of a mapped file need not stay.
        [&weights.v, &weights.o].into_iter().for_each(|linear| linear.weight.release());
        Ok(fused)
    })
}

impl<D: Device> Layer<D> {
    pub(crate) fn new(device: &D, weights: &LayerWeights, [v, o]: [Linear<D>; 2]) -> Result<Self, ModelError> {
        let norm = |norm: &Option<Tensor>| norm.as_ref().map(|norm| upload(device, norm)).transpose();
        Ok(Layer {
            input_norm: norm(&weights.input_norm)?,
            attention_output_norm: norm(&weights.attention_output_norm)?,
            q: Linear::new(device, &weights.q)?,
            k: Linear::new(device, &weights.k)?,
            v,
            o,
            q_norm: norm(&weights.q_norm)?,
            k_norm: norm(&weights.k_norm)?,
            sinks: norm(&weights.sinks)?,
            mlp_norm: norm(&weights.mlp_norm)?,
            mlp_output_norm: norm(&weights.mlp_output_norm)?,
            mlp: Mlp::new(device, &weights.mlp)?,
        })
    }

    /// Adds what attention yields to the residual stream.
    pub(crate) fn attention(
        &self,
        tile: &Tile<D>,
        ws: &mut Workspace<D>,
        in_cache: &mut LayerPass<D>,
        observer: Option<&mut Observer>,
    ) -> Result<(), ModelError> {
        let ModelConfig { hidden_size, num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps: eps, .. } =
            *tile.config;
        let (device, spec, rows) = (tile.device, &tile.config.spec, tile.rows.len());
        let residual_eps = spec.residual_eps(eps);
        device.norm_linear(
            tile.phase,
            &ws.hidden,
            tile.rows.clone(),
            hidden_size,
            self.input_norm.as_deref().map(|weight| Norm { weight, eps: residual_eps }),
            &mut ws.normed,
            [self.q.onto(&mut ws.q), self.k.onto(&mut ws.k), self.v.onto(&mut ws.v)],
        );
        let of_heads = spec.qk_norm == QkNorm::Head;
        if !of_heads {
            let both = [(&mut ws.q, num_attention_heads, &self.q_norm), (&mut ws.k, num_key_value_heads, &self.k_norm)];
            for (x, heads, norm) in both {
                if let Some(norm) = norm {
                    device.rms_norm_inplace(x, rows, heads * head_dim, norm, eps);
                }
            }
        }
        let [q_norm, k_norm] = [&self.q_norm, &self.k_norm].map(|norm| norm.as_deref().filter(|_| of_heads));
        let queries = Heads { x: &mut ws.q, heads: num_attention_heads, norm: q_norm };
        let keys = Heads { x: &mut ws.k, heads: num_key_value_heads, norm: k_norm };
        match tile.turned.map(|own| &ws.rope[own]) {
            [of_queries, of_keys] if std::ptr::eq(of_queries, of_keys) => {
                device.place_heads([queries, keys], eps, head_dim, of_keys, tile.rows.clone());
            }
            [of_queries, of_keys] => {
                device.place_heads([queries], eps, head_dim, of_queries, tile.rows.clone());
                device.place_heads([keys], eps, head_dim, of_keys, tile.rows.clone());
            }
        }
        let softcap = spec.attention_logit_softcap;
        let heads = QueryHeads { num: num_attention_heads, softcap, sinks: self.sinks.as_deref() };
        let is_observed = observer.is_some();
        if let Some(observer) = observer {
            let [mut q, mut k, mut v] = [(); 3].map(|()| Vec::new());
            device.download(&ws.q, 0..rows * num_attention_heads * head_dim, &mut q)?;
            device.download(&ws.k, 0..rows * num_key_value_heads * head_dim, &mut k)?;
            device.download(&ws.v, 0..rows * num_key_value_heads * head_dim, &mut v)?;
            observer(Observation { layer: tile.layer, first_row: tile.rows.start, q: &q, k: &k, v: &v });
        }
        let mut staged = in_cache.stage(tile.rows.end, &ws.k, &ws.v)?;
        if is_observed {
            // Later layers are shown only if what this one yields can be relied on.
            staged = staged.checked()?;
        }
        staged.attend(heads, &ws.q, &mut ws.attention)?;
        let Workspace { attention, normed, hidden, .. } = ws;
        tile.add(&self.o, self.attention_output_norm.as_deref(), attention, (normed, hidden));
        Ok(())
    }

    /// Adds what the gated layers yield to the residual stream.
    pub(crate) fn mlp(&self, tile: &Tile<D>, ws: &mut Workspace<D>) {
        let ModelConfig { hidden_size, intermediate_size, rms_norm_eps, ref spec, .. } = *tile.config;
        let (device, phase, rows) = (tile.device, tile.phase, tile.rows.len());
        let (eps, activation) = (spec.residual_eps(rms_norm_eps), spec.activation);
        let norm = self.mlp_norm.as_deref().map(|weight| Norm { weight, eps });
        let Workspace { gate, up, normed, hidden, experts, .. } = ws;
        match (&self.mlp, experts, norm) {
            (Mlp::Gated { gate: own_gate, up: own_up, down }, _, norm) => {
                let to = [own_gate.onto(gate), own_up.onto(up)];
                device.norm_linear(phase, hidden, tile.rows.clone(), hidden_size, norm, normed, to);
                device.activate(activation, gate, up, rows * intermediate_size);
                tile.add(down, self.mlp_output_norm.as_deref(), gate, (normed, hidden));
            }
            (Mlp::Experts(own), Some(space), Some(norm)) => {
                device.rms_norm(hidden, tile.rows.clone(), hidden_size, norm, normed, Output::Write(0));
                own.run(device, phase, (normed, rows), activation, space, (hidden, tile.rows.start, hidden_size));
            }
            (Mlp::Experts(_), ..) => unreachable!("families with mixtures have a norm before them, and their space"),
        }
    }
}

impl<D: Device> Tile<'_, D> {
    /// Adds what a half of a layer yields for these rows to the residual stream, behind a norm where there is one.
    fn add(
        &self,
        linear: &Linear<D>,
        norm: Option<&D::Buffer>,
        x: &D::Buffer,
        (scratch, hidden): (&mut D::Buffer, &mut D::Buffer),
    ) {
        let (device, phase, rows) = (self.device, self.phase, self.rows.len());
        let to = Output::Add(self.rows.start);
        let Some(weight) = norm else { return linear.run(device, phase, x, rows, hidden, to) };
        linear.run(device, phase, x, rows, scratch, Output::Write(0));
        let norm = Norm { weight, eps: self.config.rms_norm_eps };
        device.rms_norm(scratch, 0..rows, self.config.hidden_size, norm, hidden, to);
    }
}
