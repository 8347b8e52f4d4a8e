//! What two-bit quantisation does to the keys and values of a model: the data of figures 2 to 5 of the KVLinC paper
//! (arXiv 2510.05373), from tensors observed in a forward pass.
//!
//! Every complete group of 128 tokens is quantised, from the first on; the tokens behind the last complete group stay
//! exact. There is no window of recent tokens and there are no sinks: the figures show what quantisation does, not what a
//! cache that protects tokens costs.

mod attention;
mod correction;
mod head;
mod matrix;
mod spread;
mod variant;

pub use correction::{CorrectionStudy, corrections};
pub use spread::{ChannelSpread, HeadSpread, Spread};
pub use variant::{Axis, Rotation, Variant};

use dibit_quant::{Hadamard, QuantError};
use head::{HeadFigures, VariantFigures};
use rayon::prelude::*;
use serde::Serialize;
use thiserror::Error;
use variant::{PAIRS, VARIANTS};

/// Tokens of a quantisation group along tokens, and the largest group along channels.
const GROUP: usize = 128;

/// Query rows of one head that are looked at, at most.
const QUERY_ROWS: usize = 256;

/// Queries, keys and values of one layer for one text, as attention sees them: after RoPE.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSample {
    /// Queries, `[tokens][num_heads][head_dim]`.
    pub q: Vec<f32>,
    /// Keys, `[tokens][num_key_value_heads][head_dim]`.
    pub k: Vec<f32>,
    /// Values, `[tokens][num_key_value_heads][head_dim]`.
    pub v: Vec<f32>,
}

/// Shape of every [`LayerSample`] of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StudyShape {
    /// Tokens of the text.
    pub tokens: usize,
    /// Query heads.
    pub num_heads: usize,
    /// KV heads; divides `num_heads`.
    pub num_key_value_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

/// What quantisation to two bits does to keys and values, variant by variant and layer by layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Study {
    /// Shape of the observed tensors.
    pub shape: StudyShape,
    /// Layers of the model.
    pub layers: usize,
    /// Bits of a code.
    pub bits: usize,
    /// Tokens that share a scale where quantisation is per channel.
    pub group_tokens: usize,
    /// Channels that share a scale where quantisation is per token.
    pub group_channels: usize,
    /// Tokens that were quantised: the complete groups.
    pub quantized_tokens: usize,
    /// Attention is measured at every so many query positions.
    pub query_stride: usize,
    /// Spread of channels (figure 2): the head with the largest key outliers first, then the same head of the first,
    /// the middle and the last layer, as far as these are other layers.
    pub spreads: Vec<HeadSpread>,
    /// Keys, by axis and placement of the rotation (figures 3 and 4).
    pub keys: Vec<VariantStudy>,
    /// Values, by axis and placement of the rotation (figures 3 and 4).
    pub values: Vec<VariantStudy>,
    /// Keys and values quantised together (figure 5).
    pub pairs: Vec<PairStudy>,
    /// Attention before and after the linear correction (figure 5), for each scheme that has one; [`study`] leaves this
    /// empty, [`corrections`] fills it.
    pub corrections: Vec<CorrectionStudy>,
}

/// Keys, or values, quantised in one way while everything else is exact.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VariantStudy {
    /// Axis and rotation.
    pub variant: Variant,
    /// The paper's notation, such as `Q_C(KH)`.
    pub notation: String,
    /// Relative squared error of the tensor in its own frame, `|X^ - X|^2 / |X|^2`, over the quantised tokens.
    pub tensor_error: ByLayer,
    /// Error of attention. Keys: mean KL divergence of the attention row from the exact one, in nats. Values: relative
    /// squared error of the attention output, with exact attention weights.
    pub attention_error: ByLayer,
    /// Mean quantisation step, in units of the tensor.
    pub scale: ByLayer,
}

/// Keys and values quantised together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PairStudy {
    /// The paper's notation, such as `Q_C(K) + Q_T(VH)`.
    pub notation: String,
    /// Name of the method, where it has one.
    pub method: Option<String>,
    /// Mean KL divergence of the attention row from the exact one, in nats.
    pub attention_error: ByLayer,
    /// Relative squared error of the attention output.
    pub output_error: ByLayer,
}

/// A figure by layer, over all heads of the layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ByLayer {
    /// Arithmetic mean of the layers.
    pub mean: f64,
    /// One number for each layer.
    pub layers: Vec<f64>,
}

impl FromIterator<f64> for ByLayer {
    fn from_iter<I: IntoIterator<Item = f64>>(layers: I) -> Self {
        let layers: Vec<f64> = layers.into_iter().collect();
        ByLayer { mean: layers.iter().sum::<f64>() / layers.len() as f64, layers }
    }
}

/// Why tensors cannot be studied.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum StudyError {
    /// There is no layer.
    #[error("there are no layers to study")]
    Empty,
    /// The text is shorter than a group.
    #[error("the text has {tokens} tokens and a quantisation group needs {GROUP}; give a longer text")]
    TooShort {
        /// Tokens of the text.
        tokens: usize,
    },
    /// A tensor does not have the shape that was said.
    #[error("layer {layer}: queries, keys or values do not have the shape {shape:?}")]
    Shape {
        /// Index of the layer.
        layer: usize,
        /// The shape that was said.
        shape: StudyShape,
    },
    /// A tensor holds NaN or infinity.
    #[error("layer {layer}: queries, keys or values are not finite; the weights are damaged, or need --dtype f32")]
    NotFinite {
        /// Index of the layer.
        layer: usize,
    },
    /// The quantiser or the rotation cannot take the tensor.
    #[error(transparent)]
    Quant(#[from] QuantError),
}

/// Studies the layers of a model, in parallel on the current rayon pool.
///
/// Attention is computed for every head at up to 256 query positions, evenly spaced, so time grows with
/// `layers * num_heads * tokens`.
///
/// # Errors
/// [`StudyError`].
pub fn study(shape: StudyShape, layers: &[LayerSample]) -> Result<Study, StudyError> {
    check(shape, layers)?;
    let hadamard = Hadamard::new(shape.head_dim)?;
    let query_stride = shape.tokens.div_ceil(QUERY_ROWS);
    let figures: Vec<HeadFigures> = (0..layers.len() * shape.num_key_value_heads)
        .into_par_iter()
        .map(|index| {
            let (layer, head) = (index / shape.num_key_value_heads, index % shape.num_key_value_heads);
            HeadFigures::of(shape, &layers[layer], head, query_stride, &hadamard)
        })
        .collect::<Result<_, _>>()?;
    let layer = |heads: &[HeadFigures]| {
        let mut sum = HeadFigures::default();
        heads.iter().for_each(|head| sum += head);
        sum
    };
    let by_layer: Vec<HeadFigures> = figures.chunks(shape.num_key_value_heads).map(layer).collect();
    let variants = |tensor: char, of: fn(&HeadFigures) -> &[VariantFigures; VARIANTS.len()]| {
        let study = |index: usize, variant: Variant| VariantStudy {
            variant,
            notation: variant.notation(tensor),
            tensor_error: by_layer.iter().map(|layer| of(layer)[index].tensor.value()).collect(),
            attention_error: by_layer.iter().map(|layer| of(layer)[index].attention.value()).collect(),
            scale: by_layer.iter().map(|layer| of(layer)[index].scale.value()).collect(),
        };
        VARIANTS.into_iter().enumerate().map(|(index, variant)| study(index, variant)).collect()
    };
    Ok(Study {
        shape,
        layers: layers.len(),
        bits: matrix::BITS.count(),
        group_tokens: GROUP,
        group_channels: GROUP.min(shape.head_dim),
        quantized_tokens: shape.tokens / GROUP * GROUP,
        query_stride,
        spreads: spread::spreads(shape, layers, &hadamard),
        keys: variants('K', |figures| &figures.keys),
        values: variants('V', |figures| &figures.values),
        pairs: PAIRS
            .iter()
            .enumerate()
            .map(|(index, pair)| PairStudy {
                notation: format!("{} + {}", pair.keys.notation('K'), pair.values.notation('V')),
                method: pair.method.map(String::from),
                attention_error: by_layer.iter().map(|layer| layer.pairs[index].attention.value()).collect(),
                output_error: by_layer.iter().map(|layer| layer.pairs[index].output.value()).collect(),
            })
            .collect(),
        corrections: Vec::new(),
    })
}

fn check(shape: StudyShape, layers: &[LayerSample]) -> Result<(), StudyError> {
    let StudyShape { tokens, num_heads, num_key_value_heads, head_dim } = shape;
    if layers.is_empty() {
        return Err(StudyError::Empty);
    }
    if tokens < GROUP {
        return Err(StudyError::TooShort { tokens });
    }
    let grouped = num_key_value_heads > 0 && num_heads > 0 && num_heads.is_multiple_of(num_key_value_heads);
    for (layer, LayerSample { q, k, v }) in layers.iter().enumerate() {
        let cached = tokens * num_key_value_heads * head_dim;
        if !grouped || q.len() != tokens * num_heads * head_dim || k.len() != cached || v.len() != cached {
            return Err(StudyError::Shape { layer, shape });
        }
        if ![q, k, v].into_iter().flatten().all(|x| x.is_finite()) {
            return Err(StudyError::NotFinite { layer });
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
