//! A decoder, and its forward pass.

use crate::layer::{Layer, Observer, Tile, projections};
use crate::spec::Turns;
use crate::{LayerWeights, ModelConfig, ModelError, Weights, Workspace};
use dibit_cache::{Batch, CacheLayout, Phase, Transform, ValueTransform};
use dibit_device::{Arithmetic, Device, KvCache, Norm, Output, OwnedCache, Pass};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

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

/// A decoder on a device.
pub struct Model<D: Device> {
    device: Arc<D>,
    /// Tells it from every other model of the process.
    number: u32,
    config: ModelConfig,
    arithmetic: Arithmetic,
    pub(crate) embed: D::Matrix,
    layers: Vec<Layer<D>>,
    /// For each layer the transform of values that is fused into its projections.
    fused: Vec<Option<ValueTransform>>,
    norm: Arc<D::Buffer>,
    lm_head: D::Matrix,
    /// The ways in which heads are turned.
    turns: Vec<Arc<D::Buffer>>,
    /// For each layer those of queries and of keys.
    turned: Vec<[usize; 2]>,
}

/// A number for a model.
fn number() -> u32 {
    static MODELS: AtomicU32 = AtomicU32::new(0);
    MODELS.fetch_add(1, Ordering::Relaxed)
}

/// Says where values are transformed.
fn tell(config: &ModelConfig, layout: &CacheLayout) {
    let values = layout.transformed_values(config.num_attention_heads).to_string();
    if !values.is_empty() {
        tracing::info!("{}: {values}", layout.scheme_name());
    }
}

/// The ways in which heads of a model are turned, each once, and for each layer those of queries and of keys.
pub(crate) fn turns(config: &ModelConfig) -> (Vec<Turns>, Vec<[usize; 2]>) {
    let mut all: Vec<Turns> = Vec::new();
    let mut place = |own: Turns| match all.iter().position(|other| *other == own) {
        Some(place) => place,
        None => {
            all.push(own);
            all.len() - 1
        }
    };
    let of_layer = |layer| config.spec.turns(&config.rope, layer);
    let turned = (0..config.num_hidden_layers).map(|layer| of_layer(layer).map(&mut place)).collect();
    (all, turned)
}

impl<D: Device> Model<D> {
    /// Puts weights on a device as they are. The model runs with caches that transform values themselves, as layouts do
    /// of which nothing else was said.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub fn new(device: &Arc<D>, config: &ModelConfig, weights: &Weights) -> Result<Self, ModelError> {
        Self::with_fused(device, config, weights, vec![None; weights.layers.len()])
    }

    /// Puts weights on a device for caches of this layout: what it says to be fused into the value and output projections
    /// is, and each layer is checked by a self-test. Of these projections the plain ones do not stay on the device.
    ///
    /// # Errors
    /// [`ModelError::FusionTest`], [`ModelError::QuantisedValues`], [`ModelError::Device`].
    pub fn for_cache(
        device: &Arc<D>,
        config: &ModelConfig,
        weights: &Weights,
        layout: &CacheLayout,
    ) -> Result<Self, ModelError> {
        tell(config, layout);
        Self::with_fused(device, config, weights, layout.fused_values())
    }

    fn with_fused(
        shared: &Arc<D>,
        config: &ModelConfig,
        weights: &Weights,
        fused: Vec<Option<ValueTransform>>,
    ) -> Result<Self, ModelError> {
        let device = &**shared;
        let embed = device.matrix(weights.embed.clone())?;
        let lm_head = match weights.embed.same_numbers(&weights.lm_head) {
            true => embed.clone(),
            false => device.matrix(weights.lm_head.clone())?,
        };
        let layers = weights.layers.iter().zip(&fused).enumerate();
        let (turns, turned) = turns(config);
        let last = weights.norm.to_f32().iter().map(|x| x / config.spec.logits_scaling).collect::<Vec<f32>>();
        let layer = |(index, (own, transform)): (usize, (&LayerWeights, &Option<ValueTransform>))| {
            Layer::new(device, own, projections(device, config, index, own, transform.as_ref(), None)?)
        };
        Ok(Model {
            device: shared.clone(),
            number: number(),
            arithmetic: weights.arithmetic(),
            embed,
            layers: layers.map(layer).collect::<Result<_, _>>()?,
            fused,
            norm: Arc::new(device.upload(&last)?),
            lm_head,
            turns: turns
                .iter()
                .map(|own| Ok(Arc::new(device.upload(&own.numbers())?)))
                .collect::<Result<_, ModelError>>()?,
            turned,
            config: config.clone(),
        })
    }

    /// The same model for caches of another layout. It shares every matrix on the device with this one, but for the value
    /// and output projections of the layers in which something else is fused into them: these it has of its own. `weights`
    /// are those that this model was made of.
    ///
    /// # Errors
    /// Those of [`Model::for_cache`].
    pub fn variant(&self, weights: &Weights, layout: &CacheLayout) -> Result<Self, ModelError> {
        tell(&self.config, layout);
        let device = &*self.device;
        let mut layers = self.layers.clone();
        let fused = layout.fused_values();
        for (index, (layer, transform)) in layers.iter_mut().zip(&fused).enumerate() {
            if self.fused[index] != *transform {
                let plain = self.fused[index].is_none().then_some([&self.layers[index].v, &self.layers[index].o]);
                let own = &weights.layers[index];
                [layer.v, layer.o] = projections(device, &self.config, index, own, transform.as_ref(), plain)?;
            }
        }
        let Model { device, config, arithmetic, embed, norm, lm_head, turns, turned, .. } = self;
        Ok(Model {
            device: device.clone(),
            number: number(),
            arithmetic: *arithmetic,
            config: config.clone(),
            embed: embed.clone(),
            layers,
            fused,
            norm: norm.clone(),
            lm_head: lm_head.clone(),
            turns: turns.clone(),
            turned: turned.clone(),
        })
    }

    /// Whether the model computes values as caches of this layout take them.
    pub fn suits(&self, layout: &CacheLayout) -> bool {
        self.fused == layout.fused_values()
    }

    /// The device that it is on.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// In what it computes: exactly, where any of its matrices is f32.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Runs the new tokens `ids` of a batch through the layers and stores their keys and values.
    /// [`Model::logits`] then reads the rows that are wanted. Cache and workspace are the model's own from then on.
    ///
    /// On an error the sequences of the batch must be cleared or closed: a pass that fails half-way has overwritten
    /// parts of their windows.
    ///
    /// # Errors
    /// [`ModelError::TokenId`], [`ModelError::TooManyRows`], [`ModelError::OtherValues`], [`ModelError::OtherArithmetic`],
    /// [`ModelError::OtherModel`], [`ModelError::Device`].
    ///
    /// # Panics
    /// If the batch does not have one row for each id.
    pub fn forward(
        &self,
        workspace: &mut Workspace<D>,
        cache: &mut KvCache<D>,
        batch: &Batch,
        ids: &[u32],
    ) -> Result<(), ModelError> {
        let own = self.begin(workspace, cache, batch, ids)?;
        own.pass(&*self.device, batch, |pass| self.run_all(workspace, pass, batch, None))
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
        workspace: &mut Workspace<D>,
        cache: &mut KvCache<D>,
        batch: &Batch,
        ids: &[u32],
        observer: &mut Observer,
    ) -> Result<(), ModelError> {
        self.begin(workspace, cache, batch, ids)?;
        // What is shown is not in the device's hands.
        cache.pass_once(&*self.device, batch, |pass| self.run_all(workspace, pass, batch, Some(observer)))
    }

    /// Checks a pass, and tells the device of its tokens.
    fn begin<'c>(
        &self,
        workspace: &mut Workspace<D>,
        cache: &'c mut KvCache<D>,
        batch: &Batch,
        ids: &[u32],
    ) -> Result<OwnedCache<'c, D>, ModelError> {
        assert_eq!(ids.len(), batch.rows(), "one id for each row");
        self.check_ids(ids)?;
        workspace.check_rows(ids.len())?;
        self.check_cache(cache)?;
        check_positions(cache.layout(), batch)?;
        // A model with other buffers is another pass.
        let owner = u64::from(self.number) << 32 | u64::from(workspace.number);
        let own = cache.claim(owner).ok_or(ModelError::OtherModel)?;
        self.device.write_ids(&mut workspace.ids, ids);
        self.device.write_ids(&mut workspace.positions, batch.rotary_positions());
        Ok(own)
    }

    fn run_all(
        &self,
        workspace: &mut Workspace<D>,
        pass: &mut Pass<D>,
        batch: &Batch,
        observer: Option<&mut Observer>,
    ) -> Result<(), ModelError> {
        self.embed_rows(workspace, batch.rows());
        self.run_layers(workspace, pass, batch, 0..self.layers.len(), observer)
    }

    /// Writes the residual stream that enters layer 0.
    pub(crate) fn embed_rows(&self, ws: &mut Workspace<D>, rows: usize) {
        self.device.embed(&self.embed, &ws.ids, rows, self.config.spec.embedding_scale(), &mut ws.hidden);
    }

    /// Refuses ids that are no tokens.
    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), ModelError> {
        let vocab_size = self.config.vocab_size;
        match ids.iter().find(|id| **id as usize >= vocab_size) {
            Some(&id) => Err(ModelError::TokenId { id, vocab_size }),
            None => Ok(()),
        }
    }

    /// Refuses a cache that expects values in another frame than the model writes them in, or computes otherwise.
    pub(crate) fn check_cache(&self, cache: &KvCache<D>) -> Result<(), ModelError> {
        let layout = cache.layout();
        if !self.suits(layout) {
            Err(ModelError::OtherValues { scheme: layout.scheme_name().to_owned() })
        } else if cache.arithmetic() != self.arithmetic {
            Err(ModelError::OtherArithmetic)
        } else {
            Ok(())
        }
    }

    /// Runs the residual stream of a workspace through some layers.
    pub(crate) fn run_layers(
        &self,
        ws: &mut Workspace<D>,
        pass: &mut Pass<D>,
        batch: &Batch,
        layers: Range<usize>,
        mut observer: Option<&mut Observer>,
    ) -> Result<(), ModelError> {
        let (device, rows) = (&*self.device, batch.rows());
        pass.skip_to(layers.start);
        for (turns, table) in self.turns.iter().zip(&mut ws.rope) {
            device.rope_table(turns, self.config.head_dim / 2, &ws.positions, rows, table);
        }
        for (index, layer) in layers.clone().zip(&self.layers[layers]) {
            let mut in_cache = pass.layer(&ws.hidden, self.config.hidden_size)?;
            for first in (0..rows).step_by(ws.tile_rows) {
                let tile = Tile {
                    device,
                    config: &self.config,
                    phase: batch.phase(),
                    layer: index,
                    turned: self.turned[index],
                    rows: first..rows.min(first + ws.tile_rows),
                };
                layer.attention(&tile, ws, &mut in_cache, observer.as_deref_mut())?;
                layer.mlp(&tile, ws);
            }
            in_cache.pack()?;
        }
        Ok(())
    }

    /// Logits of some rows of the last pass: `vocab_size` numbers for each row, in the order of `rows`.
    ///
    /// # Errors
    /// [`ModelError::TooManyRows`].
    pub fn logits(&self, workspace: &mut Workspace<D>, rows: &[usize], out: &mut Vec<f32>) -> Result<(), ModelError> {
        self.project(workspace, rows)?;
        self.device.download(&workspace.logits, 0..rows.len() * self.config.vocab_size, out)?;
        self.config.spec.cap(out);
        Ok(())
    }

    /// The most likely token after each of some rows of the last pass, in their order, the first of equals. Logits stay
    /// on the device; `None` stands for a row of which not all are finite.
    ///
    /// # Errors
    /// [`ModelError::TooManyRows`], [`ModelError::Device`].
    pub fn most_likely(&self, workspace: &mut Workspace<D>, rows: &[usize]) -> Result<Vec<Option<u32>>, ModelError> {
        self.project(workspace, rows)?;
        Ok(self.device.argmax_rows(&workspace.logits, rows.len(), self.config.vocab_size)?)
    }

    /// Logits of some rows of the last pass, into the first rows of the workspace's.
    fn project(&self, workspace: &mut Workspace<D>, rows: &[usize]) -> Result<(), ModelError> {
        let device = &*self.device;
        let (count, max_rows) = (rows.len(), workspace.max_outputs);
        if count > max_rows {
            return Err(ModelError::TooManyRows { rows: count, max_rows });
        }
        let (width, eps) = (self.config.hidden_size, self.config.spec.residual_eps(self.config.rms_norm_eps));
        let ws = workspace;
        let outputs: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        device.write_ids(&mut ws.outputs, &outputs);
        device.scope(|| {
            device.copy_rows(&ws.hidden, &ws.outputs, count, width, &mut ws.selected);
            let norm = Norm { weight: &*self.norm, eps };
            device.rms_norm(&ws.selected, 0..count, width, norm, &mut ws.selected_normed, Output::Write(0));
            device.linear(
                Phase::Decode,
                &ws.selected_normed,
                0..count,
                &self.lm_head,
                None,
                &mut ws.logits,
                Output::Write(0),
            );
        });
        Ok(())
    }
}

/// Keys that are stored before RoPE are turned by their places when they are read.
pub(crate) fn check_positions(layout: &CacheLayout, batch: &Batch) -> Result<(), ModelError> {
    let before_rope = layout.layers.iter().any(|layer| matches!(layer.keys, Transform::PreRope(_)));
    if before_rope && !batch.rotary_positions().iter().copied().eq(batch.positions()) {
        return Err(ModelError::Unsupported {
            what: format!("tokens with positions of their own under the scheme {}", layout.scheme_name()),
            supported: "schemes that store keys as they are after RoPE, all but rotatekv and its kin".into(),
        });
    }
    Ok(())
}
