use super::head::gather;
use super::{LayerSample, StudyShape};
use dibit_quant::Hadamard;
use rayon::prelude::*;
use serde::Serialize;

/// How the numbers of each channel of one KV head spread over the tokens of the text, before any quantisation
/// (figure 2).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadSpread {
    /// Layer, from 0.
    pub layer: usize,
    /// KV head, from 0.
    pub head: usize,
    /// How far the largest key channel stands out: its largest magnitude over the median channel's.
    pub key_outlier: f64,
    /// Keys, `K`.
    pub keys: ChannelSpread,
    /// Keys rotated along channels, `KH`.
    pub rotated_keys: ChannelSpread,
    /// Values, `V`.
    pub values: ChannelSpread,
    /// Values rotated along channels, `VH`.
    pub rotated_values: ChannelSpread,
}

/// Spread of every channel of a head, `[head_dim]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChannelSpread {
    /// One entry for each channel.
    pub channels: Vec<Spread>,
}

/// Spread of one channel over all tokens, in units of the tensor. Percentiles are by nearest rank.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Smallest number.
    pub min: f32,
    /// 5th percentile.
    pub p05: f32,
    /// Median.
    pub median: f32,
    /// 95th percentile.
    pub p95: f32,
    /// Largest number.
    pub max: f32,
}

impl Spread {
    fn of(mut column: Vec<f32>) -> Self {
        column.sort_unstable_by(f32::total_cmp);
        let at = |share: f64| column[((share * column.len() as f64).ceil() as usize).max(1) - 1];
        Spread { min: column[0], p05: at(0.05), median: at(0.5), p95: at(0.95), max: column[column.len() - 1] }
    }
}

/// The spreads of a study: the head with the largest key outliers, then the same head of the first, the middle and
/// the last layer, as far as these are other layers.
pub(super) fn spreads(shape: StudyShape, layers: &[LayerSample], hadamard: &Hadamard) -> Vec<HeadSpread> {
    let heads: Vec<(usize, usize)> =
        (0..layers.len()).flat_map(|layer| (0..shape.num_key_value_heads).map(move |head| (layer, head))).collect();
    let outliers: Vec<f64> = heads.par_iter().map(|&(layer, head)| key_outlier(shape, &layers[layer], head)).collect();
    let worst = (0..heads.len()).max_by(|&a, &b| outliers[a].total_cmp(&outliers[b])).expect("there are heads");
    let (worst, head) = heads[worst];
    let mut chosen = vec![worst];
    for layer in [0, layers.len() / 2, layers.len() - 1] {
        if !chosen.contains(&layer) {
            chosen.push(layer);
        }
    }
    let spread = |layer: usize| {
        let of = |tensor: &[f32], rotated: bool| {
            let mut matrix = gather(tensor, shape.num_key_value_heads, head, shape.head_dim);
            if rotated {
                matrix.chunks_exact_mut(shape.head_dim).for_each(|row| hadamard.apply(row));
            }
            channels(&matrix, shape.head_dim)
        };
        HeadSpread {
            layer,
            head,
            key_outlier: outliers[layer * shape.num_key_value_heads + head],
            keys: of(&layers[layer].k, false),
            rotated_keys: of(&layers[layer].k, true),
            values: of(&layers[layer].v, false),
            rotated_values: of(&layers[layer].v, true),
        }
    };
    chosen.into_iter().map(spread).collect()
}

fn channels(matrix: &[f32], head_dim: usize) -> ChannelSpread {
    let column = |channel: usize| matrix.iter().skip(channel).step_by(head_dim).copied().collect();
    ChannelSpread { channels: (0..head_dim).map(|channel| Spread::of(column(channel))).collect() }
}

/// Largest magnitude of the largest channel over that of the median channel; 0 where that is 0.
fn key_outlier(shape: StudyShape, layer: &LayerSample, head: usize) -> f64 {
    let mut largest = vec![0f32; shape.head_dim];
    let first = head * shape.head_dim;
    for token in layer.k.chunks_exact(shape.num_key_value_heads * shape.head_dim) {
        for (largest, x) in largest.iter_mut().zip(&token[first..]) {
            *largest = largest.max(x.abs());
        }
    }
    largest.sort_unstable_by(f32::total_cmp);
    let median = largest[(shape.head_dim - 1) / 2];
    if median == 0.0 { 0.0 } else { f64::from(largest[shape.head_dim - 1]) / f64::from(median) }
}
