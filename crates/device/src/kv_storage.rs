use crate::{DeviceError, Memory};
use dibit_cache::{Batch, CacheLayout, Phase, Powers, Span};
use std::ops::Range;

/// In what a model computes where a device has a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// As fast as weights of 16 bit or fewer deserve: queries and weights of attention may be rounded to 16 bit.
    #[default]
    Fast,
    /// In 32 bit throughout.
    Exact,
}

/// The query heads of a layer.
#[derive(Debug)]
pub struct QueryHeads<'a, B> {
    /// How many there are.
    pub num: usize,
    /// Logits `x` become `cap tanh(x / cap)`.
    pub softcap: Option<f32>,
    /// For each head the logit of a token that has no value, which takes its share of every query's weights.
    pub sinks: Option<&'a B>,
}

impl<B> QueryHeads<'_, B> {
    /// Heads of nothing but queries.
    pub fn plain(num: usize) -> Self {
        QueryHeads { num, softcap: None, sinks: None }
    }
}

impl<B> Clone for QueryHeads<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for QueryHeads<'_, B> {}

/// Rows that attend.
#[derive(Debug)]
pub struct Attention<'a, B> {
    /// The decoder layer.
    pub layer: usize,
    /// The spans in place ([`KvStorage::place`]).
    pub spans: &'a [Span],
    /// What the pass is.
    pub phase: Phase,
    /// In what it is computed.
    pub arithmetic: Arithmetic,
    /// Rows of the batch that attend.
    pub rows: Range<usize>,
    /// The row with which queries and outputs begin.
    pub first: usize,
    /// Query heads.
    pub heads: QueryHeads<'a, B>,
    /// Whether the rows of the spans are seen as they came; else they are stored already.
    pub incoming: bool,
}

/// The bytes of a cache on a device: pages, window rings, sinks, states, and the keys and values of the pass in flight.
///
/// A device stores and computes. Which tokens are packed, protected or seen is told to it; [`crate::KvCache`] calls these
/// operations in their order.
pub trait KvStorage: Memory {
    /// The bytes.
    type Store: Send;

    /// Storage of `num_blocks` blocks and `num_sequences` sequences, for passes of up to `max_rows` rows. The first tokens
    /// that the layout protects are sinks of every sequence. A CPU takes memory as blocks are first written, a GPU at once.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; [`DeviceError::Unsupported`] for a layout that the device cannot attend to.
    fn new_store(
        &self,
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<Self::Store, DeviceError>;

    /// Says which positions of a sequence, by its slot, a layer protects from now on, in the order of their slots.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn set_sinks(&self, store: &mut Self::Store, layer: usize, slot: u32, positions: &[u32])
    -> Result<(), DeviceError>;

    /// Says what the heads of a layer are divided by before they are stored, from now on; nothing before that. Sequences must be
    /// stored anew.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn set_powers(&self, store: &mut Self::Store, layer: usize, powers: &Powers) -> Result<(), DeviceError>;

    /// Says which spans the operations after it are about, and whether [`KvStorage::append`] will store their rows.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn place(&self, store: &mut Self::Store, spans: &[Span], appends: bool) -> Result<(), DeviceError>;

    /// Keeps the keys and values of rows `rows` of the batch as the pass in flight, which sees them exactly;
    /// fp16 must be able to hold them, for that is what the window stores.
    /// `k` and `v` hold `rows.len()` rows of `num_key_value_heads * head_dim`; keys are post-RoPE.
    ///
    /// # Errors
    /// [`DeviceError::NotFinite`], here or by [`KvStorage::finish`].
    fn stage_kv(
        &self,
        store: &mut Self::Store,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        k: &Self::Buffer,
        v: &Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// Causal attention over packed pages, windows and the pass in flight, as far back as the layout's layer sees. `q` and
    /// `out` hold rows of `heads.num * head_dim`. The output is in the frame of the values that [`KvStorage::stage_kv`] got.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    fn attend(
        &self,
        store: &mut Self::Store,
        attention: Attention<Self::Buffer>,
        q: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// Stores the rows of the spans in place behind the tokens of each sequence, and quantises what leaves the window. The
    /// pages of a span that it fills are one chunk.
    ///
    /// # Errors
    /// [`DeviceError::Quantize`], here or by [`KvStorage::finish`].
    fn append(&self, store: &mut Self::Store, layer: usize, spans: &[Span]) -> Result<(), DeviceError>;

    /// Runs the operations of a pass whose launches depend on nothing but its shape. A device may keep what they did and do
    /// the same again for a later pass of the same shape, without asking: so `work` does nothing but call operations, with
    /// the same buffers each time. It is called again where what it did could not be kept, and has not been done.
    ///
    /// # Errors
    /// Those of the operations.
    fn record<E: From<DeviceError> + Send>(
        &self,
        store: &mut Self::Store,
        work: impl FnMut(&mut Self::Store) -> Result<(), E> + Send,
    ) -> Result<(), E>;

    /// Ends a pass, whether it failed or not.
    ///
    /// # Errors
    /// What its operations found wrong and could not say.
    fn finish(&self, store: &mut Self::Store, batch: &Batch) -> Result<(), DeviceError>;
}
