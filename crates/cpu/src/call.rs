//! What attention reads and works with.

use super::adapters;
use super::page::Folding;
use super::page_sinks;
use super::simd::Isa;
use super::store::CpuStore;
use dibit_cache::Span;

/// Shape of the queries.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    /// Query heads.
    pub num: usize,
    /// KV heads.
    pub num_key_value: usize,
    /// Channels of a head.
    pub dim: usize,
}

impl Heads {
    /// Query heads that share a KV head.
    pub(super) fn per_key_value(&self) -> usize {
        self.num / self.num_key_value
    }
}

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    /// `[kv head of the frame][query][head_dim]`, scaled by `1 / sqrt(head_dim)`.
    pub queries: Vec<f32>,
    /// `[query][128]`, logits and then weights.
    pub logits: Vec<f32>,
    pub folding: Folding,
    /// Keys of a page of a frame, `[channel][128]`, turned by the angles within the page.
    pub expanded: Vec<f32>,
    /// Queries as keys in pages see them: turned back by the angle of the page, or in the order of its channels.
    pub turned: Vec<f32>,
    pub row: Vec<f32>,
    /// Protected tokens of the block: token within the block, and slot.
    pub sinks: Vec<(usize, usize)>,
    /// Tokens of the block that its page protects.
    pub page_sinks: Vec<usize>,
    /// Their keys, and then their values.
    pub rows: page_sinks::Rows,
    pub correction: adapters::Buffers,
}

/// What an attention call reads.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub isa: Isa,
    pub store: &'a CpuStore,
    pub layer: usize,
    pub spans: &'a [Span],
    pub heads: Heads,
    /// [`dibit_device::QueryHeads::softcap`].
    pub softcap: Option<f32>,
    /// [`dibit_device::QueryHeads::sinks`].
    pub sinks: Option<&'a [f32]>,
    /// Tokens of a split.
    pub split_tokens: usize,
    /// Whether the pass in flight is seen exactly. Where it is not, its tokens are stored already.
    pub incoming: bool,
}

impl Call<'_> {
    /// The position of the row of a span.
    pub(super) fn position(&self, span: &Span, row: usize) -> usize {
        let before = if self.incoming { span.cached } else { span.cached - span.rows.len() };
        before + row - span.rows.start
    }

    /// The first token that the row of a span sees.
    pub(super) fn first_seen(&self, span: &Span, row: usize) -> usize {
        self.store.layout().layers[self.layer].first_seen(self.position(span, row))
    }

    /// KV heads that are read together.
    pub(super) fn frame(&self) -> usize {
        self.store.layout().layers[self.layer].frame
    }
}
