//! Mixtures of experts.

use crate::CudaError;
use crate::cuda::{Buffer, Cuda};
use crate::kernel::{Grid, Kernel, launch};
use crate::linear::weight_macros;
use crate::matrix::{Matrix, Stored};
use crate::memory::{Memory, at};
use crate::source::EXPERTS;
use bytemuck::{Pod, Zeroable};
use dibit_device::{DType, Routing, Tensor};
use std::sync::Arc;

/// As in experts.cu.
const TILE: usize = 8;
const WARPS: usize = 8;

/// Threads of a block where each has a number or a row of its own, and of the one that groups pairs.
const THREADS: usize = 256;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Tile {
    expert: i32,
    first: i32,
    count: i32,
}

/// Matrices of the experts on a GPU.
#[derive(Clone)]
pub struct ExpertStack {
    /// They live as long as their addresses are known.
    _matrices: Arc<Vec<Matrix>>,
    addresses: Arc<Memory>,
    bias: Option<Arc<Memory>>,
    stored: Stored,
    rows: usize,
    cols: usize,
}

/// Which experts the rows of a pass take.
pub struct ChosenExperts {
    pairs: Memory,
    weights: Memory,
    order: Memory,
    tiles: Memory,
    tile_count: Memory,
    /// Pairs that there is room for.
    capacity: usize,
    chosen: usize,
    experts: usize,
    /// Pairs of the pass in flight.
    count: usize,
}

fn kernel(c: &Cuda, stored: Stored, name: &'static str) -> Result<Kernel, CudaError> {
    c.gpu.kernel(EXPERTS, weight_macros(stored), name)
}

/// Tiles of so many pairs, at most.
fn most_tiles(pairs: usize, experts: usize) -> usize {
    pairs.min(pairs / TILE + experts)
}

/// Matrices are stored alike: as the first one is, for kernels take one type.
pub(crate) fn stack(c: &Cuda, matrices: Vec<Tensor>, bias: Option<Tensor>) -> Result<ExpertStack, CudaError> {
    // Quantised numbers are widened to fp16, as those of other matrices are.
    let of = |tensor: &Tensor| if tensor.block_type().is_some() { DType::F16 } else { tensor.dtype() };
    let dtype = matrices.first().map_or(DType::F32, of);
    let put = |tensor: &Tensor| {
        let matrix = Matrix::new(&c.gpu, &tensor.cast(dtype))?;
        tensor.release();
        Ok(matrix)
    };
    let all = matrices.iter().map(put).collect::<Result<Vec<_>, CudaError>>()?;
    let addresses: Vec<u64> = all.iter().map(|matrix| matrix.memory.at(0)).collect();
    let bias = bias.map(|bias| Memory::of(&c.gpu, "weights", &bias.to_f32()).map(Arc::new)).transpose()?;
    let (rows, cols, stored) = all.first().map_or((0, 0, Stored::F32), |own| (own.rows, own.cols, own.stored));
    let addresses = Arc::new(Memory::of(&c.gpu, "weights", &addresses)?);
    Ok(ExpertStack { _matrices: Arc::new(all), addresses, bias, stored, rows, cols })
}

pub(crate) fn chosen(c: &Cuda, routing: Routing, rows: usize) -> Result<ChosenExperts, CudaError> {
    let capacity = rows * routing.chosen;
    let memory = |count: usize, bytes: usize| Memory::new(&c.gpu, "choices of experts", (count * bytes).max(4));
    Ok(ChosenExperts {
        pairs: memory(capacity, size_of::<i32>())?,
        weights: memory(capacity, size_of::<f32>())?,
        order: memory(capacity, size_of::<i32>())?,
        tiles: memory(most_tiles(capacity, routing.experts), size_of::<Tile>())?,
        tile_count: memory(1, size_of::<i32>())?,
        capacity,
        chosen: routing.chosen,
        experts: routing.experts,
        count: 0,
    })
}

pub(crate) fn choose(
    c: &Cuda,
    routing: Routing,
    logits: &Buffer,
    rows: usize,
    out: &mut ChosenExperts,
) -> Result<(), CudaError> {
    let Routing { experts, chosen, normalised } = routing;
    assert!(rows * experts <= logits.len && rows * chosen <= out.capacity, "{rows} rows of {experts} experts");
    assert_eq!((experts, chosen), (out.experts, out.chosen), "experts of the choices");
    out.count = rows * chosen;
    let grid = Grid::new([rows.div_ceil(4), 1, 1], 128);
    let own = kernel(c, Stored::F32, "choose")?;
    let (logits, pairs, weights) = (at(&logits.memory, 0), out.pairs.at(0), out.weights.at(0));
    launch!(
        c.gpu,
        own,
        grid,
        logits,
        rows as i32,
        experts as i32,
        chosen as i32,
        i32::from(normalised),
        pairs,
        weights
    );
    let own = kernel(c, Stored::F32, "group")?;
    let grid = Grid::new([1, 1, 1], THREADS).shared(2 * experts * size_of::<i32>());
    let (order, tiles, tile_count) = (out.order.at(0), out.tiles.at(0), out.tile_count.at(0));
    launch!(c.gpu, own, grid, pairs, out.count as i32, experts as i32, order, tiles, tile_count);
    Ok(())
}

pub(crate) fn expert_linear(
    c: &Cuda,
    x: &Buffer,
    of_pairs: bool,
    chosen: &ChosenExperts,
    stack: &ExpertStack,
    out: &mut Buffer,
) -> Result<(), CudaError> {
    let share = if of_pairs { 1 } else { chosen.chosen };
    let pairs = chosen.count;
    assert!(pairs / share * stack.cols <= x.len && pairs * stack.rows <= out.len, "{pairs} pairs of {}", stack.cols);
    let own = kernel(c, stack.stored, "expert_linear")?;
    let grid = Grid::new([stack.rows.div_ceil(WARPS), most_tiles(pairs, chosen.experts), 1], 32 * WARPS);
    let bias = stack.bias.as_ref().map_or(0, |bias| bias.at(0));
    launch!(
        c.gpu,
        own,
        grid,
        stack.addresses.at(0),
        bias,
        at(&x.memory, 0),
        share as i32,
        stack.cols as i32,
        stack.rows as i32,
        chosen.order.at(0),
        chosen.tiles.at(0),
        chosen.tile_count.at(0),
        at(&out.memory, 0)
    );
    Ok(())
}

pub(crate) fn add_experts(
    c: &Cuda,
    x: &Buffer,
    chosen: &ChosenExperts,
    width: usize,
    out: &mut Buffer,
    first: usize,
) -> Result<(), CudaError> {
    let rows = chosen.count / chosen.chosen;
    assert!(chosen.count * width <= x.len && (first + rows) * width <= out.len, "{rows} rows of {width} numbers");
    let own = kernel(c, Stored::F32, "add_experts")?;
    let grid = Grid::new([rows, 1, 1], THREADS);
    let out = at(&out.memory, first * width);
    launch!(c.gpu, own, grid, at(&x.memory, 0), chosen.weights.at(0), chosen.chosen as i32, width as i32, out);
    Ok(())
}
