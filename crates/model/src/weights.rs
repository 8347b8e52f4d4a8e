//! The weights of a model on the host, checked against its configuration.

use crate::mixture::mixture;
use crate::{
    Checkpoint, DecoderSpec, GatedWeights, MlpWeights, ModelConfig, ModelError, ModelFiles, NormPlaces, QkNorm, Sketch,
    unread_tensors,
};
use dibit_cache::{CacheLayout, CalibratedScheme, SchemeError};
use dibit_device::{Arithmetic, Bytes, DType, Tensor};
use std::cell::RefCell;
use std::collections::HashSet;

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightSource {
    /// The checkpoint.
    Checkpoint,
    /// Made up: normal numbers of the configuration's `initializer_range`, for measuring without a download.
    Dummy {
        /// Seed of the numbers.
        seed: u64,
        /// Whether matrices are parts of one pool of numbers, which is little larger than the largest of them. That is
        /// for devices that copy weights into memory of their own: on the host, they would be read from its caches.
        pooled: bool,
    },
}

/// Numbers that the pool of made-up weights holds beside the largest matrix, so that matrices begin at different ones.
const POOL_SLACK: usize = 1 << 20;

/// Rows of an output projection that are widened at a time, where its columns change.
pub(crate) const BLOCK_ROWS: usize = 64;

/// A weight `[out, in]` with its bias `[1, out]`, if any.
#[derive(Clone)]
pub struct LinearWeights {
    /// The matrix.
    pub weight: Tensor,
    /// The bias.
    pub bias: Option<Tensor>,
}

/// The weights of one decoder layer.
#[derive(Clone)]
pub struct LayerWeights {
    /// Norm before attention, `[1, hidden_size]`.
    pub input_norm: Option<Tensor>,
    /// Norm behind attention.
    pub attention_output_norm: Option<Tensor>,
    /// `[num_attention_heads * head_dim, hidden_size]`
    pub q: LinearWeights,
    /// `[num_key_value_heads * head_dim, hidden_size]`
    pub k: LinearWeights,
    /// `[num_key_value_heads * head_dim, hidden_size]`
    pub v: LinearWeights,
    /// `[hidden_size, num_attention_heads * head_dim]`
    pub o: LinearWeights,
    /// Norm of queries: of each head, `[1, head_dim]`, or of all together, `[1, num_attention_heads * head_dim]`.
    pub q_norm: Option<Tensor>,
    /// Norm of keys.
    pub k_norm: Option<Tensor>,
    /// For each query head the logit of a token without a value, `[1, num_attention_heads]`.
    pub sinks: Option<Tensor>,
    /// Norm before the gated layers, `[1, hidden_size]`.
    pub mlp_norm: Option<Tensor>,
    /// Norm behind them.
    pub mlp_output_norm: Option<Tensor>,
    /// The gated layers.
    pub mlp: MlpWeights,
}

/// All weights of a model.
#[derive(Clone)]
pub struct Weights {
    /// `[vocab_size, hidden_size]`
    pub embed: Tensor,
    /// One for each decoder layer.
    pub layers: Vec<LayerWeights>,
    /// Last norm, `[1, hidden_size]`.
    pub norm: Tensor,
    /// `[vocab_size, hidden_size]`; the embedding itself where the two are tied.
    pub lm_head: Tensor,
    /// By what the model is known again, of the weights as the checkpoint has them: before conversions.
    pub sketch: Sketch,
}

impl LayerWeights {
    /// Whether a matrix can be multiplied into the value and output projections: not where they are quantised, for the
    /// product would have to be stored in numbers of more bits, which decoding reads for every token.
    pub fn takes_fused_values(&self) -> bool {
        [&self.v, &self.o].into_iter().all(|linear| linear.weight.block_type().is_none())
    }
}

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const OUTPUT_LAYER: &str = "lm_head.weight";

pub(crate) struct Loader<'a> {
    pub config: &'a ModelConfig,
    source: Source,
    dtype: Option<DType>,
    /// Tensors that were asked for, by the names of the file.
    read: RefCell<HashSet<String>>,
    sketch: RefCell<Sketch>,
}

enum Source {
    Checkpoint(Checkpoint),
    Dummy { seed: u64, pool: Option<Bytes> },
}

impl Weights {
    /// Loads and checks all weights; `dtype` converts them where they have another one.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::OtherNames`], [`ModelError::Shape`], [`ModelError::UnreadTensors`] and
    /// the errors of [`Checkpoint`].
    pub fn load(
        files: &ModelFiles,
        config: &ModelConfig,
        source: WeightSource,
        dtype: Option<DType>,
    ) -> Result<Self, ModelError> {
        let source = match source {
            WeightSource::Checkpoint => Source::Checkpoint(Checkpoint::open(&files.weights)?),
            WeightSource::Dummy { seed, pooled } => {
                let pool = pooled.then(|| pool(config, seed, dtype.or(config.dtype).unwrap_or(DType::Bf16)));
                Source::Dummy { seed, pool }
            }
        };
        let loader = Loader { config, source, dtype, read: RefCell::default(), sketch: RefCell::default() };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embed = loader.matrix(EMBEDDING, vocab, hidden)?;
        let lm_head = if loader.is_tied() { embed.clone() } else { loader.matrix(OUTPUT_LAYER, vocab, hidden)? };
        let mut weights = Weights {
            layers: (0..config.num_hidden_layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?,
            norm: loader.norm("model.norm.weight", hidden)?,
            embed,
            lm_head,
            sketch: Sketch::default(),
        };
        loader.check_unread()?;
        weights.sketch = loader.sketch.into_inner();
        Ok(weights)
    }

    /// A scheme's cache for a model of these weights ([`crate::Model::for_cache`]): transforms of values are fused into the
    /// projections of layers whose weights are numbers, and the cache does those of the others.
    ///
    /// # Errors
    /// As [`ModelConfig::cache_layout`].
    pub fn cache_layout(&self, config: &ModelConfig, scheme: &CalibratedScheme) -> Result<CacheLayout, SchemeError> {
        scheme.layout(&config.cache_model().fusing(|layer| self.layers[layer].takes_fused_values()))
    }

    /// In what a model of them computes: what is asked to be f32 anywhere is exact throughout.
    pub fn arithmetic(&self) -> Arithmetic {
        let is_f32 = |matrix: &Tensor| matrix.block_type().is_none() && matrix.dtype() == DType::F32;
        // Routers are small, and in 32 bit in files whose other matrices are not.
        if self.matrices_but_routers().any(is_f32) { Arithmetic::Exact } else { Arithmetic::Fast }
    }

    /// Bytes that decoding a token reads: the output layer and all linear layers; of an embedding of its own only a row, and of
    /// mixtures only the experts that the token takes.
    pub fn bytes_per_token(&self) -> usize {
        let table = if self.embed.same_numbers(&self.lm_head) { 0 } else { self.embed.num_bytes() };
        let unread: usize = self.layers.iter().map(|layer| layer.mlp.unread_bytes()).sum();
        self.num_bytes() - table - unread
    }

    /// Bytes of the embedding, the output layer and all linear layers; norms and biases are too small to count.
    pub fn num_bytes(&self) -> usize {
        self.matrices().map(Tensor::num_bytes).sum()
    }

    /// How the numbers of matrices are stored, by their share of the bytes: `Q4_K 81 %, Q6_K 19 %`.
    pub fn formats(&self) -> String {
        mixture(self.matrices().map(|matrix| (matrix.format(), matrix.num_bytes())))
    }

    /// The embedding, the output layer where it is another, and all linear layers.
    fn matrices(&self) -> impl Iterator<Item = &Tensor> {
        self.matrices_but_routers().chain(self.layers.iter().filter_map(|layer| layer.mlp.router()))
    }

    fn matrices_but_routers(&self) -> impl Iterator<Item = &Tensor> {
        let linear = self.layers.iter().flat_map(|layer| {
            let LayerWeights { q, k, v, o, mlp, .. } = layer;
            [q, k, v, o].into_iter().map(|linear| &linear.weight).chain(mlp.gated_matrices())
        });
        let head = (!self.embed.same_numbers(&self.lm_head)).then_some(&self.lm_head);
        [&self.embed].into_iter().chain(head).chain(linear)
    }
}

impl Loader<'_> {
    /// Whether the output layer is the embedding. As in transformers 5, it is not where a checkpoint has another one,
    /// whatever the configuration says.
    fn is_tied(&self) -> bool {
        let Source::Checkpoint(checkpoint) = &self.source else { return self.config.tie_word_embeddings };
        if !self.config.tie_word_embeddings || !checkpoint.contains(OUTPUT_LAYER) {
            return self.config.tie_word_embeddings;
        }
        let same = checkpoint.same_bytes(EMBEDDING, OUTPUT_LAYER);
        if same {
            self.read.borrow_mut().insert(checkpoint.file_name(OUTPUT_LAYER));
        } else {
            tracing::warn!(
                "the configuration says tie_word_embeddings, but the checkpoint has an output layer of its own, which is used"
            );
        }
        same
    }

    /// Judges the tensors that nobody asked for.
    fn check_unread(&self) -> Result<(), ModelError> {
        let Source::Checkpoint(checkpoint) = &self.source else { return Ok(()) };
        let read = self.read.borrow();
        unread_tensors::check(checkpoint.names().filter(|name| !read.contains(*name)), self.config)
    }

    fn layer(&self, layer: usize) -> Result<LayerWeights, ModelError> {
        let config = self.config;
        let DecoderSpec { places, norms, qk_norm, .. } = config.spec;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * places.stored;
        let kv = config.num_key_value_heads * places.stored;
        let qkv_bias = if config.architecture.has_qkv_bias() { Some(true) } else { config.attention_bias };
        // Where q, k and v have biases, not every checkpoint has one for o, too.
        let o_bias = config.attention_bias.filter(|has| !has);
        let mlp_bias = config.mlp_bias;
        let prefix = format!("model.layers.{layer}");
        let linear = |name: &str, rows, cols, bias| self.linear(&format!("{prefix}.{name}"), rows, cols, bias);
        let norm = |name: &str, width| self.norm(&format!("{prefix}.{name}.weight"), width);
        let norm_at = |there: bool, name: &str| there.then(|| norm(name, hidden)).transpose();
        let qk = |name: &str, width: usize| {
            let width = match qk_norm {
                QkNorm::None => return Ok(None),
                QkNorm::Head => places.stored,
                QkNorm::Row => width,
            };
            norm(&format!("self_attn.{name}"), width).and_then(|norm| places.turned_vector(norm)).map(Some)
        };
        // Rows of a matrix that holds several.
        let parts = |name: &str, sizes: &[usize]| -> Result<Vec<LinearWeights>, ModelError> {
            let all = linear(name, sizes.iter().sum(), hidden, Some(false))?.weight;
            let mut end = 0;
            let mut part = |rows: &usize| {
                end += rows;
                LinearWeights { weight: all.part_rows(end - rows..end), bias: None }
            };
            Ok(sizes.iter().map(&mut part).collect())
        };
        let joint = config.spec.joint_projections;
        let mut attention = match joint {
            true => parts("self_attn.qkv_proj", &[q, kv, kv])?,
            false => vec![
                linear("self_attn.q_proj", q, hidden, qkv_bias)?,
                linear("self_attn.k_proj", kv, hidden, qkv_bias)?,
                linear("self_attn.v_proj", kv, hidden, qkv_bias)?,
            ],
        }
        .into_iter();
        let mut next = || attention.next().expect("queries, keys and values");
        let (q_proj, k_proj, v_proj) = (next(), next(), next());
        let mlp = match config.spec.experts_of(layer) {
            Some(experts) => MlpWeights::Experts(self.experts(&prefix, experts)?),
            None => {
                let mut halves = match joint {
                    true => parts("mlp.gate_up_proj", &[inner, inner])?,
                    false => vec![
                        linear("mlp.gate_proj", inner, hidden, mlp_bias)?,
                        linear("mlp.up_proj", inner, hidden, mlp_bias)?,
                    ],
                }
                .into_iter();
                let mut next = || halves.next().expect("a gate and another half");
                let (gate, up) = (next(), next());
                MlpWeights::Gated(GatedWeights { gate, up, down: linear("mlp.down_proj", hidden, inner, mlp_bias)? })
            }
        };
        let o_proj = linear("self_attn.o_proj", hidden, q, o_bias)?;
        // Where all norms are, that behind attention has the name that is otherwise the one before the gated layers'.
        let both = norms == NormPlaces::Both;
        let before_mlp = if both { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let turned = |linear: LinearWeights| -> Result<_, ModelError> {
            let bias = linear.bias.map(|bias| places.turned_vector(bias)).transpose()?;
            Ok(LinearWeights { weight: places.turned_rows(linear.weight)?, bias })
        };
        Ok(LayerWeights {
            input_norm: norm_at(norms.before(), "input_layernorm")?,
            attention_output_norm: norm_at(norms.behind(), "post_attention_layernorm")?,
            q: turned(q_proj)?,
            k: turned(k_proj)?,
            v: LinearWeights {
                weight: places.value_rows(v_proj.weight)?,
                bias: v_proj.bias.map(|bias| places.value_vector(bias)).transpose()?,
            },
            o: LinearWeights { weight: places.output_columns(o_proj.weight)?, bias: o_proj.bias },
            q_norm: qk("q_norm", q)?,
            k_norm: qk("k_norm", kv)?,
            sinks: config.spec.attention_sinks.then(|| self.sinks(&prefix)).transpose()?,
            mlp_norm: norm_at(norms.before(), before_mlp)?,
            mlp_output_norm: norm_at(norms.behind(), "post_feedforward_layernorm")?,
            mlp,
        })
    }

    /// A linear layer. Where nothing says whether it has a bias, the checkpoint tells.
    pub fn linear(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        has_bias: Option<bool>,
    ) -> Result<LinearWeights, ModelError> {
        let bias_name = format!("{name}.bias");
        let is_there = || matches!(&self.source, Source::Checkpoint(all) if all.contains(&bias_name));
        let has_bias = has_bias.unwrap_or_else(is_there);
        Ok(LinearWeights {
            weight: self.matrix(&format!("{name}.weight"), rows, cols)?,
            bias: has_bias.then(|| self.matrix(&bias_name, 1, rows)).transpose()?,
        })
    }

    /// Logits of sinks of attention, in 32 bit.
    fn sinks(&self, prefix: &str) -> Result<Tensor, ModelError> {
        self.matrix(&format!("{prefix}.self_attn.sinks"), 1, self.config.num_attention_heads)
    }

    /// A norm, as what it is multiplied by. GGUF files have it so; others without what all weights of norms have in common.
    fn norm(&self, name: &str, width: usize) -> Result<Tensor, ModelError> {
        let Source::Checkpoint(checkpoint) = &self.source else {
            return Ok(Tensor::from_f32(vec![1.0; width], DType::F32, 1, width));
        };
        let offset = self.config.spec.norm_offset;
        if offset == 0.0 || checkpoint.is_gguf() {
            return self.matrix(name, 1, width);
        }
        let numbers = self.read(name, 1, width)?.to_f32().into_iter().map(|x| x + offset).collect();
        let tensor = Tensor::from_f32(numbers, DType::F32, 1, width);
        self.sketch.borrow_mut().add(name, &tensor, DType::F32.name());
        Ok(tensor)
    }

    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        let tensor = self.read(name, rows, cols)?;
        let format = match &self.source {
            Source::Checkpoint(checkpoint) => checkpoint.format(name).unwrap_or_default(),
            Source::Dummy { .. } => tensor.format(),
        };
        self.sketch.borrow_mut().add(name, &tensor, format);
        Ok(self.converted(tensor))
    }

    /// A tensor in the storage type that was asked for.
    pub fn converted(&self, tensor: Tensor) -> Tensor {
        let Some(dtype) = self.dtype else { return tensor };
        let converted = tensor.cast(dtype);
        if !converted.same_numbers(&tensor) {
            tensor.release();
        }
        converted
    }

    /// Whether a checkpoint has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        matches!(&self.source, Source::Checkpoint(checkpoint) if checkpoint.contains(name))
    }

    /// Whether the checkpoint is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        matches!(&self.source, Source::Checkpoint(checkpoint) if checkpoint.is_gguf())
    }

    /// Whether weights are made up.
    pub fn is_dummy(&self) -> bool {
        matches!(self.source, Source::Dummy { .. })
    }

    /// The error for a tensor that is missing.
    pub fn missing(&self, name: &str) -> ModelError {
        let architecture = self.config.architecture.name();
        match &self.source {
            Source::Checkpoint(checkpoint) => checkpoint.missing(name, architecture),
            Source::Dummy { .. } => ModelError::MissingTensor { name: name.to_owned(), architecture },
        }
    }

    /// A tensor of so many bytes, if a checkpoint has one of this name.
    pub fn bytes(&self, name: &str, len: usize) -> Result<Option<Vec<u8>>, ModelError> {
        let Source::Checkpoint(checkpoint) = &self.source else { return Ok(None) };
        let bytes = checkpoint.bytes(name, len)?;
        if bytes.is_some() {
            self.read.borrow_mut().insert(checkpoint.file_name(name));
        }
        Ok(bytes)
    }

    /// Notes a tensor that was made of such bytes.
    pub fn sketch(&self, name: &str, tensor: &Tensor, format: &str) {
        self.sketch.borrow_mut().add(name, tensor, format);
    }

    /// A tensor as the source has it.
    pub fn read(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        Ok(match &self.source {
            Source::Checkpoint(checkpoint) => {
                let tensor = checkpoint.tensor(name, rows, cols)?.ok_or_else(|| self.missing(name))?;
                self.read.borrow_mut().insert(checkpoint.file_name(name));
                tensor
            }
            Source::Dummy { seed, pool } => {
                let dtype = self.dtype.or(self.config.dtype).unwrap_or(DType::Bf16);
                let seed = stream(*seed, name);
                match pool {
                    Some(pool) => part(pool, seed, dtype, rows, cols),
                    None => Tensor::random(seed, self.config.initializer_range, dtype, rows, cols),
                }
            }
        })
    }
}

/// Numbers for all matrices of a made-up model.
fn pool(config: &ModelConfig, seed: u64, dtype: DType) -> Bytes {
    let heads = config.num_attention_heads * config.head_dim;
    let experts = config.spec.experts.as_ref();
    let experts = experts.map_or(0, |own| own.routing.experts.max(2 * own.intermediate_size));
    let rows = [config.vocab_size, 2 * config.intermediate_size, heads + 2 * heads, experts];
    let largest = config.hidden_size * rows.into_iter().max().unwrap_or(0);
    Tensor::random(seed, config.initializer_range, dtype, 1, largest + POOL_SLACK).into_bytes()
}

/// The matrix of a pool that a seed chooses.
fn part(pool: &Bytes, seed: u64, dtype: DType, rows: usize, cols: usize) -> Tensor {
    // Where processors and copies like numbers to begin.
    const ALIGNED: usize = 64;
    let room = POOL_SLACK * dtype.size() / ALIGNED;
    let offset = (seed as usize % room) * ALIGNED;
    Tensor::from_bytes(pool, offset, dtype, rows, cols)
        .expect("the pool holds the largest matrix anywhere in its slack")
}

/// A seed of its own for each tensor (FNV-1a of its name).
fn stream(seed: u64, name: &str) -> u64 {
    name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}
