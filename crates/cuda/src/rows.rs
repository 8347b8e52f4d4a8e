//! Operations on rows of activations.

use crate::CudaError;
use crate::cuda::{Buffer, Cuda, Ids};
use crate::kernel::{Grid, Kernel, launch};
use crate::matrix::{Matrix, Stored};
use crate::memory::at;
use crate::source::ROWS;
use bytemuck::{Pod, Zeroable};
use dibit_device::{Activation, Heads, Norm, Output};
use std::ops::Range;

/// Threads of a block that numbers are shared among one by one.
const THREADS: usize = 256;

/// Tensors of one `place_heads` launch, as in rows.cu.
const PLACED: usize = 4;

/// Warps of a block that places heads, each one of them.
const PLACE_WARPS: usize = 2;

/// Numbers of a part of a row whose largest number is looked for, at least, and parts of a row at most.
const PART: usize = 1024;
const MOST_PARTS: usize = 32;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Placed {
    x: u64,
    norm: u64,
    heads: i32,
    padding: i32,
}

fn kernel(cuda: &Cuda, name: &'static str) -> Result<Kernel, CudaError> {
    cuda.gpu.kernel(ROWS, &[], name)
}

/// Compiles the kernels.
pub(crate) fn check(cuda: &Cuda) -> Result<(), CudaError> {
    kernel(cuda, "embed").map(|_| ())
}

/// Threads of a block for a row of so many numbers: the order of a sum depends on it, so the width alone decides.
fn row_threads(width: usize) -> usize {
    width.div_ceil(4).next_multiple_of(32).clamp(32, 512)
}

pub(crate) fn embed(
    c: &Cuda,
    table: &Matrix,
    ids: &Ids,
    count: usize,
    scale: f32,
    out: &mut Buffer,
) -> Result<(), CudaError> {
    let width = table.cols;
    assert!(
        count * width <= out.len && count * size_of::<u32>() <= ids.memory.bytes(),
        "{count} rows of {width} numbers"
    );
    let kernel = kernel(c, "embed")?;
    let grid = Grid::new([count, 1, 1], row_threads(width));
    let (table, stored) = (table.memory.at(0), table.stored.number());
    launch!(c.gpu, kernel, grid, table, stored, ids.memory.at(0), width as i32, scale, at(&out.memory, 0));
    Ok(())
}

pub(crate) fn copy_rows(
    c: &Cuda,
    x: &Buffer,
    rows: &Ids,
    count: usize,
    width: usize,
    out: &mut Buffer,
) -> Result<(), CudaError> {
    assert!(count * width <= out.len, "{count} rows of {width} numbers");
    let kernel = kernel(c, "embed")?;
    let grid = Grid::new([count, 1, 1], row_threads(width));
    let stored = Stored::F32.number();
    launch!(c.gpu, kernel, grid, at(&x.memory, 0), stored, rows.memory.at(0), width as i32, 1f32, at(&out.memory, 0));
    Ok(())
}

/// Where normalised rows go.
pub(crate) struct NormTo {
    /// An address.
    pub out: u64,
    /// As what their numbers are stored.
    pub stored: Stored,
    /// What they are multiplied by.
    pub scale: f32,
    /// Whether they are added to what is there, in f32.
    pub add: bool,
}

/// Normalises rows.
pub(crate) fn norm_into(
    c: &Cuda,
    x: &Buffer,
    rows: Range<usize>,
    width: usize,
    Norm { weight, eps }: Norm<Buffer>,
    NormTo { out, stored, scale, add }: NormTo,
) -> Result<(), CudaError> {
    assert!(rows.end * width <= x.len && width <= weight.len, "rows {rows:?} of {width} numbers");
    let kernel = kernel(c, "rms_norm")?;
    let grid = Grid::new([rows.len(), 1, 1], row_threads(width));
    let x = at(&x.memory, rows.start * width);
    let weight = at(&weight.memory, 0);
    launch!(c.gpu, kernel, grid, x, weight, width as i32, eps, out, stored.number(), scale, i32::from(add));
    Ok(())
}

pub(crate) fn rms_norm(
    c: &Cuda,
    x: &Buffer,
    rows: Range<usize>,
    width: usize,
    norm: Norm<Buffer>,
    out: &mut Buffer,
    output: Output,
) -> Result<(), CudaError> {
    let (Output::Write(first) | Output::Add(first)) = output;
    assert!((first + rows.len()) * width <= out.len, "{} rows of {width} numbers", rows.len());
    let out = at(&out.memory, first * width);
    let to = NormTo { out, stored: Stored::F32, scale: 1.0, add: matches!(output, Output::Add(_)) };
    norm_into(c, x, rows, width, norm, to)
}

pub(crate) fn rms_norm_inplace(
    c: &Cuda,
    x: &mut Buffer,
    rows: usize,
    width: usize,
    weight: &Buffer,
    eps: f32,
) -> Result<(), CudaError> {
    let to = NormTo { out: at(&x.memory, 0), stored: Stored::F32, scale: 1.0, add: false };
    norm_into(c, x, 0..rows, width, Norm { weight, eps }, to)
}

/// Rounds numbers of `x`, times `scale`, to 16 bit.
pub(crate) fn narrow(
    c: &Cuda,
    x: &Buffer,
    numbers: Range<usize>,
    (out, stored, scale): (u64, Stored, f32),
) -> Result<(), CudaError> {
    assert!(numbers.end <= x.len, "{} numbers", numbers.end);
    let count = numbers.len();
    let kernel = kernel(c, "narrow")?;
    let grid = Grid::each(count.div_ceil(4), THREADS);
    launch!(c.gpu, kernel, grid, at(&x.memory, numbers.start), count as i64, out, stored.number(), scale);
    Ok(())
}

pub(crate) fn place_heads<const N: usize>(
    c: &Cuda,
    all: [Heads<Cuda>; N],
    eps: f32,
    head_dim: usize,
    table: &Buffer,
    rows: Range<usize>,
) -> Result<(), CudaError> {
    const { assert!(N <= PLACED) };
    let count = rows.len();
    assert!(rows.end * head_dim <= table.len, "a table of {} rows", rows.end);
    let mut placed = [Placed::zeroed(); PLACED];
    for (to, Heads { x, heads, norm }) in placed.iter_mut().zip(&all) {
        assert!(count * heads * head_dim <= x.len, "{count} rows of {heads} heads");
        let norm = norm.map_or(0, |norm| at(&norm.memory, 0));
        *to = Placed { x: at(&x.memory, 0), norm, heads: *heads as i32, padding: 0 };
    }
    let heads: usize = all.iter().map(|own| own.heads).sum();
    let kernel = kernel(c, "place_heads")?;
    let grid = Grid::new([(count * heads).div_ceil(PLACE_WARPS), 1, 1], 32 * PLACE_WARPS);
    let table = at(&table.memory, rows.start * head_dim);
    launch!(c.gpu, kernel, grid, placed, eps, head_dim as i32, table, count as i32);
    Ok(())
}

pub(crate) fn rope_table(
    c: &Cuda,
    turns: &Buffer,
    half: usize,
    positions: &Ids,
    count: usize,
    out: &mut Buffer,
) -> Result<(), CudaError> {
    assert!(count * 2 * half <= out.len && 2 * half <= turns.len, "{count} rows of {half} angles");
    let kernel = kernel(c, "rope_table")?;
    let (turns, positions) = (at(&turns.memory, 0), positions.memory.at(0));
    let grid = Grid::each(count * half, THREADS);
    launch!(c.gpu, kernel, grid, turns, half as i32, positions, count as i32, at(&out.memory, 0));
    Ok(())
}

pub(crate) fn rope(
    c: &Cuda,
    x: &mut Buffer,
    heads: usize,
    head_dim: usize,
    table: &Buffer,
    rows: Range<usize>,
) -> Result<(), CudaError> {
    place_heads(c, [Heads { x, heads, norm: None }], 0.0, head_dim, table, rows)
}

pub(crate) fn activate(
    c: &Cuda,
    activation: Activation,
    gate: &mut Buffer,
    up: &Buffer,
    len: usize,
) -> Result<(), CudaError> {
    assert!(len <= gate.len && len <= up.len, "{len} numbers");
    let kernel = kernel(c, "activate")?;
    let grid = Grid::each(len.div_ceil(4), THREADS);
    // As in rows.cu.
    let (number, limit) = match activation {
        Activation::Silu => (0i32, 0f32),
        Activation::GeluTanh => (1, 0.0),
        Activation::Gelu => (2, 0.0),
        Activation::Clamped { limit } => (3, limit),
    };
    launch!(c.gpu, kernel, grid, at(&gate.memory, 0), at(&up.memory, 0), len as i64, number, limit);
    Ok(())
}

/// The largest number of a part of a row, and its place; as in rows.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Largest {
    value: f32,
    place: u32,
}

/// The place of a number that stands for a part with others than finite ones.
const NOT_FINITE: u32 = u32::MAX;

pub(crate) fn argmax_rows(c: &Cuda, x: &Buffer, rows: usize, width: usize) -> Result<Vec<Option<u32>>, CudaError> {
    assert!(0 < width && rows * width <= x.len, "{rows} rows of {width} numbers");
    let parts = width.div_ceil(PART).min(MOST_PARTS);
    let kernel = kernel(c, "argmax")?;
    let mut found = vec![Largest::zeroed(); rows * parts];
    let scratch = c.blas.scratch(size_of_val(found.as_slice()))?;
    let memory = scratch.memory();
    let grid = Grid::new([parts, rows, 1], THREADS);
    launch!(c.gpu, kernel, grid, at(&x.memory, 0), width as i32, memory.at(0));
    memory.read(0, bytemuck::cast_slice_mut(&mut found))?;
    let larger = |best: Largest, own: &Largest| if own.value > best.value { *own } else { best };
    let row = |parts: &[Largest]| {
        let finite = parts.iter().all(|own| own.place != NOT_FINITE);
        finite.then(|| parts[1..].iter().fold(parts[0], larger).place)
    };
    Ok(found.chunks_exact(parts).map(row).collect())
}
