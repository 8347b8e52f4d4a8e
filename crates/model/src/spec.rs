//! What families of decoders compute differently, as data.

use crate::Rope;
use crate::head_places::HeadPlaces;
use dibit_device::{Activation, Routing};

/// How a decoder computes, beside its sizes.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// What rows of the embedding are multiplied by.
    pub embedding_multiplier: f32,
    /// What attention and the gated activation are multiplied by before they are added to the residual stream.
    pub residual_multiplier: f32,
    /// What logits are divided by.
    pub logits_scaling: f32,
    /// Logits `x` become `cap tanh(x / cap)`.
    pub final_logit_softcap: Option<f32>,
    /// What logits of attention are multiplied by; `1 / sqrt(head_dim)` where nothing is said.
    pub attention_multiplier: Option<f32>,
    /// Logits of attention `x` become `cap tanh(x / cap)`.
    pub attention_logit_softcap: Option<f32>,
    /// Whether each query head has the logit of a token without a value (gpt-oss).
    pub attention_sinks: bool,
    /// For each layer how many tokens a query sees, itself included; none where it is empty.
    pub windows: Vec<Option<usize>>,
    /// How the heads of layers that have such a window turn, where that is otherwise.
    pub window_rope: Option<Rope>,
    /// Layers whose heads are not turned by their positions (NoPE); none where it is empty.
    pub no_rope_layers: Vec<bool>,
    /// Where norms of the residual stream are.
    pub norms: NormPlaces,
    /// What is added to the weights of all norms.
    pub norm_offset: f32,
    /// What norms of queries and keys are taken over.
    pub qk_norm: QkNorm,
    /// The activation of gated layers.
    pub activation: Activation,
    /// The experts of gated layers, where these are mixtures.
    pub experts: Option<ExpertSpec>,
    /// Whether projections of attention lie in one matrix, and those of the gated layers in another.
    pub joint_projections: bool,
    /// Where the channels of heads lie.
    pub(crate) places: HeadPlaces,
}

/// Gated layers that are mixtures of experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertSpec {
    /// How a token's experts are chosen.
    pub routing: Routing,
    /// Width of an expert's gated activation.
    pub intermediate_size: usize,
    /// Layers that are no mixtures.
    pub dense_layers: Vec<bool>,
    /// How they lie in a checkpoint.
    pub(crate) names: ExpertNames,
}

/// How experts lie in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpertNames {
    /// `block_sparse_moe.experts.N.w1`
    Mixtral,
    /// `mlp.experts.N.gate_proj`
    Qwen,
    /// `mlp.experts.gate_up_proj`, of all experts together.
    GptOss,
}

/// Where norms are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlaces {
    /// Before attention and the gated layers (Llama).
    Before,
    /// Behind them, before what they yield is added (OLMo 2).
    Behind,
    /// Both (Gemma).
    Both,
}

/// What norms of queries and keys are taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// There are none.
    None,
    /// Each head.
    Head,
    /// All heads of a token together.
    Row,
}

/// How pairs of channels of a head are turned by a token's position, and scaled: pair `i` of token `t` turns by
/// `t * frequencies[i]` and grows by `magnitudes[i]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Turns {
    pub frequencies: Vec<f32>,
    pub magnitudes: Vec<f32>,
}

impl DecoderSpec {
    /// That of Llama, for heads that lie in a checkpoint like this.
    pub(crate) fn new(places: HeadPlaces) -> Self {
        // Zeros that fill heads up change no logit.
        let padded = places.head_dim() != places.stored;
        DecoderSpec {
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_scaling: 1.0,
            final_logit_softcap: None,
            attention_multiplier: padded.then(|| (places.stored as f32).powf(-0.5)),
            attention_logit_softcap: None,
            attention_sinks: false,
            windows: Vec::new(),
            window_rope: None,
            no_rope_layers: Vec::new(),
            norms: NormPlaces::Before,
            norm_offset: 0.0,
            qk_norm: QkNorm::None,
            activation: Activation::Silu,
            experts: None,
            joint_projections: false,
            places,
        }
    }

    /// The experts of a layer, where it is a mixture.
    pub fn experts_of(&self, layer: usize) -> Option<&ExpertSpec> {
        self.experts.as_ref().filter(|own| own.dense_layers.get(layer) != Some(&true))
    }

    /// Whether the heads of a layer are turned.
    pub fn has_rope(&self, layer: usize) -> bool {
        self.no_rope_layers.get(layer) != Some(&true)
    }

    /// How many tokens a query of a layer sees, itself included; `None` for all before it.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten()
    }

    /// Whether the keys of all `layers` layers are turned, and alike.
    pub(crate) fn turns_alike(&self, layers: usize) -> bool {
        self.window_rope.is_none() && (0..layers).all(|layer| self.has_rope(layer))
    }

    /// Rotary frequencies of all pairs of channels of a head: 0 for those that do not turn.
    pub(crate) fn inv_freq(&self, rope: &Rope) -> Vec<f32> {
        let mut all = rope.inv_freq(self.places.rotary);
        all.resize(self.places.head_dim() / 2, 0.0);
        all
    }

    /// How queries, and keys, of a layer are turned. What scales the logits of attention otherwise than by
    /// `1 / sqrt(head_dim)` is the queries'.
    pub(crate) fn turns(&self, rope: &Rope, layer: usize) -> [Turns; 2] {
        let (pairs, turned) = (self.places.head_dim() / 2, self.places.rotary / 2);
        let rope = self.window_rope.as_ref().filter(|_| self.window(layer).is_some()).unwrap_or(rope);
        let own = match self.has_rope(layer) {
            true => {
                let mut magnitudes = vec![rope.attention_factor(); turned];
                magnitudes.resize(pairs, 1.0);
                Turns { frequencies: self.inv_freq(rope), magnitudes }
            }
            false => Turns { frequencies: vec![0.0; pairs], magnitudes: vec![1.0; pairs] },
        };
        let scale = self.attention_multiplier.map_or(1.0, |own| own * (self.places.head_dim() as f32).sqrt());
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

    /// What becomes of logits.
    pub(crate) fn cap(&self, logits: &mut [f32]) {
        if let Some(cap) = self.final_logit_softcap {
            logits.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
    }
}

impl NormPlaces {
    /// Whether there is a norm before a layer's half.
    pub fn before(self) -> bool {
        self != NormPlaces::Behind
    }

    /// Whether there is one behind it.
    pub fn behind(self) -> bool {
        self != NormPlaces::Before
    }
}

impl Turns {
    /// Frequencies, then magnitudes, as [`dibit_device::Dense::rope_table`] takes them.
    pub(crate) fn numbers(&self) -> Vec<f32> {
        [&self.frequencies[..], &self.magnitudes].concat()
    }
}
