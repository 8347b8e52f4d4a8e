//! What families of decoders compute differently, as data.

use crate::Rope;

/// How a decoder computes, beside its sizes.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// What rows of the embedding are multiplied by.
    pub embedding_multiplier: f32,
    /// What attention and the gated activation are multiplied by before they are added to the residual stream.
    pub residual_multiplier: f32,
    /// What logits are divided by.
    pub logits_scaling: f32,
    /// What logits of attention are multiplied by; `1 / sqrt(head_dim)` where nothing is said.
    pub attention_multiplier: Option<f32>,
    /// Layers whose heads are not turned by their positions (NoPE); none where it is empty.
    pub no_rope_layers: Vec<bool>,
}

/// How pairs of channels of a head are turned by a token's position, and scaled: pair `i` of token `t` turns by
/// `t * frequencies[i]` and grows by `magnitudes[i]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Turns {
    pub frequencies: Vec<f32>,
    pub magnitudes: Vec<f32>,
}

impl Default for DecoderSpec {
    /// That of Llama.
    fn default() -> Self {
        DecoderSpec {
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_scaling: 1.0,
            attention_multiplier: None,
            no_rope_layers: Vec::new(),
        }
    }
}

impl DecoderSpec {
    /// Whether the heads of a layer are turned.
    pub fn has_rope(&self, layer: usize) -> bool {
        self.no_rope_layers.get(layer) != Some(&true)
    }

    /// How queries, and keys, of a layer are turned. What scales the logits of attention otherwise than by
    /// `1 / sqrt(head_dim)` is the queries'.
    pub(crate) fn turns(&self, rope: &Rope, head_dim: usize, layer: usize) -> [Turns; 2] {
        let own = match self.has_rope(layer) {
            true => {
                Turns { frequencies: rope.inv_freq(head_dim), magnitudes: vec![rope.attention_factor(); head_dim / 2] }
            }
            false => Turns { frequencies: vec![0.0; head_dim / 2], magnitudes: vec![1.0; head_dim / 2] },
        };
        let scale = self.attention_multiplier.map_or(1.0, |own| own * (head_dim as f32).sqrt());
        let queries = Turns { magnitudes: own.magnitudes.iter().map(|own| own * scale).collect(), ..own.clone() };
        [queries, own]
    }

    /// What rows of the embedding are multiplied by in a residual stream that is divided by
    /// [`DecoderSpec::residual_multiplier`]. There, what layers add is added as it is.
    pub(crate) fn embedding_scale(&self) -> f32 {
        self.embedding_multiplier / self.residual_multiplier
    }

    /// What norms of that stream add to the mean square where the model adds `eps`.
    pub(crate) fn residual_eps(&self, eps: f32) -> f32 {
        eps / (self.residual_multiplier * self.residual_multiplier)
    }
}

impl Turns {
    /// Frequencies, then magnitudes, as [`dibit_device::Dense::rope_table`] takes them.
    pub(crate) fn numbers(&self) -> Vec<f32> {
        [&self.frequencies[..], &self.magnitudes].concat()
    }
}
