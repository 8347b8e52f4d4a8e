//! Attention over a cache.
//!
//! Three kernels compute the parts of a row's attention. `packed` reads two-bit codes as they lie, for single tokens;
//! `tiles` takes tiles of tokens of nearly any form to tensor cores; `exact` computes in f32 whatever the form. A part is
//! a largest logit, a normaliser and weighted values; one kernel joins them.

mod exact;
mod packed;
mod parts;
mod tiles;

use crate::cuda::{Buffer, Cuda};
use crate::gpu::Gpu;
use crate::kernel::{Grid, launch};
use crate::memory::room;
use crate::store::{CudaStore, Layer, ROWS};
use crate::{CudaError, abi};
use dibit_cache::{CachePlan, Phase};
use dibit_device::{Arithmetic, Attention, DeviceError};
use packed::Packed;
use parts::Parts;
use std::sync::Arc;
use tiles::Tiles;

/// Rows of a block of `correct`, and threads of one of `correct_row`.
const CORRECTED_ROWS: usize = 8;
const ROW_THREADS: usize = 512;

/// The kernels that suit a layer, besides the one that suits all.
struct LayerKernels {
    packed: Option<Packed>,
    tiles: Option<Tiles>,
}

/// The kernels of attention of a cache: those of each layer, once they were asked for.
pub(crate) struct Kernels {
    layers: Vec<Option<Arc<LayerKernels>>>,
}

impl Kernels {
    /// None yet, for a cache of these layers. `most` are the bytes of memory that the threads of a block share.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] where a layer needs more.
    pub(crate) fn new(gpu: &Gpu, layout: &CachePlan, layers: &[Layer], most: usize) -> Result<Self, DeviceError> {
        let needed = layers.iter().map(|layer| exact::shared_bytes(layer, layout.shape.head_dim)).max().unwrap_or(0);
        if needed > most {
            return Err(DeviceError::Unsupported(format!(
                "attention under scheme {} takes {needed} bytes of shared memory, and {} has {most}; take another scheme or \
                 --device cpu",
                layout.scheme_name(),
                gpu.name,
            )));
        }
        Ok(Kernels { layers: layers.iter().map(|_| None).collect() })
    }

    /// Those of a layer, compiled where that has not been done.
    fn layer(
        &mut self,
        gpu: &Gpu,
        layout: &CachePlan,
        index: usize,
        caps: bool,
    ) -> Result<Arc<LayerKernels>, CudaError> {
        if let Some(own) = &self.layers[index] {
            return Ok(own.clone());
        }
        let limits = [("SPAN", layout.layers[index].span.is_some()), ("SOFTCAP", caps)];
        let limits: Vec<_> = limits.into_iter().filter(|(_, on)| *on).map(|(name, _)| (name, 1)).collect();
        let (packed, tiles) = (Packed::new(gpu, layout, index, &limits)?, Tiles::new(gpu, layout, index, &limits)?);
        let own = Arc::new(LayerKernels { packed, tiles });
        self.layers[index] = Some(own.clone());
        Ok(own)
    }
}

/// Which kernel computes the parts of rows.
enum Path<'a> {
    Packed(&'a Packed),
    Tiles(&'a Tiles),
    Exact,
}

/// How attention of passes of a phase is computed, in words.
pub(crate) fn describe(layout: &CachePlan, arithmetic: Arithmetic, phase: Phase) -> String {
    let exact = "f32, pages of any form expanded in shared memory";
    if arithmetic == Arithmetic::Exact {
        return format!("{exact} (the weights are f32)");
    }
    let is_packed = |index: usize| phase == Phase::Decode && Packed::suits(layout, index).is_some();
    let all = 0..layout.layers.len();
    let (channels, of_tile) = (layout.shape.head_dim, tiles::tile_channels(layout.shape.head_dim));
    let tiles = match of_tile > channels {
        true => format!("tensor cores, on tiles in fp16, {of_tile} channels for heads of {channels}"),
        false => "tensor cores, on tiles in fp16".to_owned(),
    };
    let of_layer = |index: usize| {
        if is_packed(index) {
            "tensor cores, on two-bit codes as they lie"
        } else if Tiles::suits(layout, index) {
            &tiles
        } else {
            exact
        }
    };
    let mut paths: Vec<&str> = all.map(of_layer).collect();
    paths.sort_unstable();
    paths.dedup();
    paths.join("; in other layers: ")
}

/// Rows of the spans in place attend.
pub(crate) fn attend(
    c: &Cuda,
    store: &mut CudaStore,
    kernels: &mut Kernels,
    call: Attention<Buffer>,
    q: &Buffer,
    out: &mut Buffer,
) -> Result<(), DeviceError> {
    let gpu = &c.gpu;
    let shape = store.layout.shape;
    let (heads, kv_heads, d) = (call.heads.num, shape.num_key_value_heads, shape.head_dim);
    let (shared, rows, first) = (heads / kv_heads, call.rows.len(), call.rows.start - call.first);
    let (number, width) = (size_of::<f32>(), heads * d);
    assert!((first + rows) * width <= q.len.min(out.len), "queries of rows");
    let (given, out) = (q.memory.at(first * width * number), out.memory.at(first * width * number));
    let mut q = given;
    let own = &store.layers[call.layer];
    let (keys, factors) = (&own.keys, own.factors.queries());
    if !keys.is_none() || factors != 0 {
        let rotation = keys.for_kernels();
        let rotated = room(gpu, &mut store.scratch.queries, "queries", rows * heads * d * number)?;
        let grid = rotation_grid(rows, heads, d);
        let [rows, d, shared] = [rows, d, shared].map(|number| number as i32);
        launch!(gpu, store.kernels.rotate_rows, grid, q, rotated, rotation, factors, rows, d, shared);
        q = rotated;
    }
    let own = if call.arithmetic == Arithmetic::Exact {
        None
    } else {
        Some(kernels.layer(gpu, &store.layout, call.layer, call.heads.softcap.is_some())?)
    };
    let path = match own.as_deref() {
        Some(LayerKernels { packed: Some(packed), .. }) if call.phase == Phase::Decode => Path::Packed(packed),
        Some(LayerKernels { tiles: Some(tiles), .. }) => Path::Tiles(tiles),
        _ => Path::Exact,
    };
    let longest = store.staged.shape.longest;
    let splits = match path {
        // Passes of single rows are recorded, by the shape that is rounded up.
        Path::Packed(_) if store.staged.most_rows == 1 => packed::splits(&store.layout, longest, 1),
        Path::Packed(_) => packed::splits(&store.layout, store.staged.farthest, store.staged.most_rows),
        Path::Tiles(_) => tiles::splits(longest),
        Path::Exact => exact::splits(longest),
    };
    let bytes = rows * heads * splits * (d + 2) * number;
    let partials = room(gpu, &mut store.scratch.partials, "partial results", bytes)?;
    let spans = store.staged.shape.spans;
    let for_kernels = abi::Attention {
        cache: store.cache(call.layer),
        spans: store.staged.spans(store.layout.layers[call.layer].group),
        span_count: spans as i32,
        seen: store.layout.layers[call.layer].span.map_or(i32::MAX, |span| span.min(i32::MAX as usize) as i32),
        tables: store.staged.tables(),
        q,
        heads: heads as i32,
        first_row: call.rows.start as i32,
        row_count: rows as i32,
        incoming: call.incoming.into(),
        splits: splits as i32,
        softcap: call.heads.softcap.unwrap_or(0.0),
        partials,
    };
    let parts = Parts { layer: call.layer, rows: call.rows.clone(), heads, spans, splits, for_kernels };
    match path {
        Path::Packed(packed) => packed.attend(c, store, &parts),
        Path::Tiles(tiles) => tiles.attend(c, store, &parts)?,
        Path::Exact => exact::attend(c, store, &parts),
    }
    let corrections = correct(c, store, &parts, given)?;
    let sinks = match call.heads.sinks {
        Some(sinks) => {
            assert!(heads <= sinks.len, "a sink for each head");
            sinks.memory.at(0)
        }
        None => 0,
    };
    let grid = Grid::new([heads, rows, 1], 128);
    launch!(gpu, store.kernels.join_splits, grid, partials, splits as i32, corrections, sinks, out);
    let own = &store.layers[call.layer];
    let (values, factors) = (&own.values, own.factors.outputs());
    if !values.is_none() || factors != 0 {
        let (rotation, grid) = (values.for_kernels().inverse(), rotation_grid(rows, heads, d));
        let [rows, d, shared] = [rows, d, shared].map(|number| number as i32);
        launch!(gpu, store.kernels.rotate_rows, grid, out, out, rotation, factors, rows, d, shared);
    }
    Ok(())
}

fn rotation_grid(rows: usize, heads: usize, head_dim: usize) -> Grid {
    Grid::new([rows.div_ceil(ROWS), heads, 1], 128).shared(2 * ROWS * head_dim * size_of::<f32>())
}

/// What the linear correction adds to rows of queries; null where there is none.
fn correct(c: &Cuda, store: &mut CudaStore, parts: &Parts, queries: u64) -> Result<u64, DeviceError> {
    let Some(correction) = store.correction(parts.layer) else { return Ok(0) };
    let d = store.layout.shape.head_dim;
    let number = size_of::<f32>();
    let bytes = parts.rows.len() * parts.heads * (d + 1) * number;
    let corrections = room(&c.gpu, &mut store.scratch.corrections, "corrections", bytes)?;
    let (width, d_argument) = (correction.features as usize, d as i32);
    let abi::Attention { spans, span_count, first_row, row_count, heads, .. } = parts.for_kernels;
    if store.staged.most_rows == 1 {
        let grid =
            Grid::new([parts.rows.len(), parts.heads, 1], ROW_THREADS).shared((d + width + ROW_THREADS) * number);
        launch!(
            c.gpu,
            store.kernels.correct_row,
            grid,
            correction,
            spans,
            span_count,
            queries,
            first_row,
            heads,
            d_argument,
            corrections,
        );
        return Ok(corrections);
    }
    let shared_bytes = CORRECTED_ROWS * (d + width) * number;
    let grid = Grid::new([parts.tiles(CORRECTED_ROWS), parts.heads, 1], 128).shared(shared_bytes);
    launch!(
        c.gpu,
        store.kernels.correct,
        grid,
        correction,
        spans,
        span_count,
        queries,
        first_row,
        row_count,
        heads,
        d_argument,
        corrections,
    );
    Ok(corrections)
}
