//! What a cache needs to know of a model.

/// Shape of the model's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Decoder layers.
    pub num_layers: usize,
    /// KV heads of a layer.
    pub num_key_value_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

impl CacheShape {
    /// Keys, or values, of one token in a layer, in scalars: `KV heads * head_dim`.
    pub fn row(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Keys and values of one token, in scalars: `2 * layers * KV heads * head_dim`.
    pub fn scalars_per_token(&self) -> usize {
        2 * self.num_layers * self.num_key_value_heads * self.head_dim
    }
}

/// What a cache needs to know of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheModel {
    /// Its shape.
    pub shape: CacheShape,
    /// Rotary frequencies, `head_dim / 2`.
    pub inv_freq: Vec<f32>,
    /// Whether RoPE turns the keys of every layer, and all alike.
    pub turns_alike: bool,
    /// For each layer how many tokens a query sees, itself included; a layer that is not there sees all before it.
    pub spans: Vec<Option<usize>>,
    /// For each layer, whether the transform of values is fused into its projections: its cache takes values as they are
    /// stored, and leaves outputs so. A layer that is not there has none fused.
    pub fuses_values: Vec<bool>,
}

impl CacheModel {
    /// A model whose caches transform values themselves.
    pub fn new(shape: CacheShape, inv_freq: Vec<f32>) -> Self {
        CacheModel { shape, inv_freq, turns_alike: true, spans: Vec::new(), fuses_values: Vec::new() }
    }

    /// A model of this shape with the rotary frequencies of base 10,000.
    pub fn of_shape(shape: CacheShape) -> Self {
        let frequency = |pair: usize| 10_000f32.powf(-2.0 * pair as f32 / shape.head_dim as f32);
        Self::new(shape, (0..shape.head_dim / 2).map(frequency).collect())
    }

    /// The same model, all layers of which see all tokens before them.
    pub fn seeing_all(self) -> Self {
        CacheModel { spans: Vec::new(), ..self }
    }

    /// The same model with the transform of values fused into the projections of these layers.
    pub fn fusing(self, layers: impl Fn(usize) -> bool) -> Self {
        CacheModel { fuses_values: (0..self.shape.num_layers).map(layers).collect(), ..self }
    }
}
