//! Linear layers.
//!
//! Rows of [`Phase::Decode`], up to [`FEW_ROWS`] of them, go through kernels of our own: a row's result is the same bits
//! whatever rows there are beside it, and activations keep the precision of f32. More rows, and all prompts, are products of
//! cuBLASLt, for which activations are rounded to the type of the weights; a row's result then depends on the others within
//! the rounding of f32 sums.

use crate::CudaError;
use crate::blas::Product;
use crate::cuda::{Buffer, Cuda};
use crate::kernel::{Grid, launch};
use crate::matrix::{Matrix, Stored};
use crate::memory::at;
use crate::rows::{self, NormTo};
use crate::source::LINEAR;
use bytemuck::{Pod, Zeroable};
use dibit_cache::Phase;
use dibit_device::{Norm, Output, Projection};
use std::ops::Range;

/// Rows of a decode batch that are computed alike, whatever their number.
pub(crate) const FEW_ROWS: usize = 16;

/// Matrices of one launch, as in linear.cu.
const PROJECTIONS: usize = 3;

/// Outputs of a tile, as in linear.cu.
const TILE: usize = 16;

/// Where prompts are multiplied in fp16, activations are rounded after they were made smaller by this: fp16 ends at 65504.
const HALF_SCALE: f32 = 1.0 / 16.0;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct To {
    weight: u64,
    bias: u64,
    out: u64,
    outputs: i32,
    first_block: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Few {
    projections: [To; PROJECTIONS],
    x: u64,
    norm: u64,
    eps: f32,
    rows: i32,
    inputs: i32,
    add: i32,
}

/// A matrix on its way to one output.
struct Step<'a> {
    w: &'a Matrix,
    bias: Option<&'a Buffer>,
    /// Address of the first row of the output.
    out: u64,
}

impl<'a> Step<'a> {
    fn new(w: &'a Matrix, bias: Option<&'a Buffer>, out: &Buffer, first: usize, rows: usize) -> Self {
        assert!((first + rows) * w.rows <= out.len, "rows {first} to {} of {} numbers", first + rows, w.rows);
        assert!(bias.is_none_or(|bias| w.rows <= bias.len), "a bias of {} numbers", w.rows);
        Step { w, bias, out: at(&out.memory, first * w.rows) }
    }

    fn bias(&self) -> u64 {
        self.bias.map_or(0, |bias| at(&bias.memory, 0))
    }
}

impl Matrix {
    /// Whether rows are not aligned to 16 bytes, as nothing but the plain kernel can take.
    fn is_odd(&self) -> bool {
        self.stored != Stored::F32 && !self.cols.is_multiple_of(8)
    }
}

/// Whether kernels of our own compute rows of a phase.
fn ours(phase: Phase, rows: usize, w: &Matrix) -> bool {
    w.is_odd() || (phase == Phase::Decode && rows <= FEW_ROWS)
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn linear(
    c: &Cuda,
    phase: Phase,
    x: &Buffer,
    rows: Range<usize>,
    w: &Matrix,
    bias: Option<&Buffer>,
    out: &mut Buffer,
    output: Output,
) -> Result<(), CudaError> {
    assert!(rows.end * w.cols <= x.len, "rows {rows:?} of {} numbers", w.cols);
    let (Output::Write(first) | Output::Add(first)) = output;
    let (add, count) = (matches!(output, Output::Add(_)), rows.len());
    let step = Step::new(w, bias, out, first, count);
    let from = at(&x.memory, rows.start * w.cols);
    if ours(phase, count, w) {
        return few(c, &[step], from, count, None, add);
    }
    if w.stored == Stored::F32 {
        return many(c, &step, from, count, 1.0, add);
    }
    let scratch = c.blas.scratch(count * w.cols * w.stored.bytes())?;
    let (to, scale) = (scratch.memory().at(0), narrowing(w.stored));
    rows::narrow(c, x, rows.start * w.cols..rows.end * w.cols, (to, w.stored, scale))?;
    many(c, &step, to, count, scale, add)
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn norm_linear<const N: usize>(
    c: &Cuda,
    phase: Phase,
    x: &Buffer,
    rows: Range<usize>,
    width: usize,
    norm: Option<Norm<Buffer>>,
    normed: &mut Buffer,
    projections: [Projection<Cuda>; N],
) -> Result<(), CudaError> {
    const { assert!(0 < N && N <= PROJECTIONS) };
    let count = rows.len();
    let weights = norm.as_ref().map_or(width, |norm| norm.weight.len);
    assert!(rows.end * width <= x.len && width <= weights, "rows {rows:?} of {width} numbers");
    let steps = projections.each_ref().map(|own| {
        assert_eq!(own.weight.cols, width, "inputs of a projection");
        Step::new(own.weight, own.bias, own.out, 0, count)
    });
    let first = steps[0].w;
    if ours(phase, count, first) && steps.iter().all(|own| own.w.stored == first.stored) {
        return few(c, &steps, at(&x.memory, rows.start * width), count, norm, false);
    }
    if first.stored == Stored::F32 || steps.iter().any(|own| own.w.stored != first.stored || ours(phase, count, own.w))
    {
        let (x, rows) = match norm {
            None => (x, rows),
            Some(norm) => {
                rows::rms_norm(c, x, rows, width, norm, normed, Output::Write(0))?;
                (&*normed, 0..count)
            }
        };
        for Projection { weight, bias, out } in projections {
            linear(c, phase, x, rows.clone(), weight, bias, out, Output::Write(0))?;
        }
        return Ok(());
    }
    let scratch = c.blas.scratch(count * width * first.stored.bytes())?;
    let (to, scale, stored) = (scratch.memory().at(0), narrowing(first.stored), first.stored);
    match norm {
        None => rows::narrow(c, x, rows.start * width..rows.end * width, (to, stored, scale))?,
        Some(norm) => rows::norm_into(c, x, rows, width, norm, NormTo { out: to, stored, scale, add: false })?,
    }
    steps.iter().try_for_each(|step| many(c, step, to, count, scale, false))
}

/// What activations are multiplied by before they are rounded to a type of 16 bit.
fn narrowing(stored: Stored) -> f32 {
    if stored == Stored::F16 { HALF_SCALE } else { 1.0 }
}

/// A product of activations that are stored as the weights are, times `scale`.
fn many(c: &Cuda, step: &Step, x: u64, rows: usize, scale: f32, add: bool) -> Result<(), CudaError> {
    let Step { w, out, .. } = *step;
    c.blas.multiply(Product { w, x, rows, scale: 1.0 / scale, bias: step.bias(), out, add })
}

/// Products by kernels of our own, of matrices of one type and one number of inputs, in one launch.
fn few(c: &Cuda, steps: &[Step], x: u64, rows: usize, norm: Option<Norm<Buffer>>, add: bool) -> Result<(), CudaError> {
    let w = steps[0].w;
    let outputs: usize = steps.iter().map(|own| own.w.rows).sum();
    let (name, block_outputs, warps) = match (w.stored, rows) {
        (Stored::F32, _) if w.cols.is_multiple_of(4) => ("plain_four", PLAIN_WARPS, PLAIN_WARPS),
        _ if w.stored == Stored::F32 || w.is_odd() => ("plain", PLAIN_WARPS, PLAIN_WARPS),
        // How many blocks of a tile each multiprocessor would have. That does not depend on rows, nor do warps, which
        // decide in which order products are summed.
        _ => match outputs.div_ceil(TILE * c.gpu.limits.multiprocessors as usize) {
            ..=1 => (few_kernel(NARROW, rows, norm.is_some()), TILE, 16),
            2 => (few_kernel(MEDIUM, rows, norm.is_some()), 2 * TILE, 16),
            _ => (few_kernel(WIDE, rows, norm.is_some()), if rows <= 8 { 2 * TILE } else { 4 * TILE }, 4),
        },
    };
    let mut blocks = 0;
    let mut projections = [To { first_block: i32::MAX, ..To::zeroed() }; PROJECTIONS];
    for (to, step) in projections.iter_mut().zip(steps) {
        let outputs = step.w.rows;
        *to = To {
            weight: step.w.memory.at(0),
            bias: step.bias(),
            out: step.out,
            outputs: outputs as i32,
            first_block: blocks as i32,
        };
        blocks += outputs.div_ceil(block_outputs);
    }
    let (norm, eps) = norm.map_or((0, 0.0), |norm| (at(&norm.weight.memory, 0), norm.eps));
    let own = Few { projections, x, norm, eps, rows: rows as i32, inputs: w.cols as i32, add: add.into() };
    let kernel = c.gpu.kernel(LINEAR, weight_macros(w.stored), name)?;
    let blocks = if rows == 0 { 0 } else { blocks };
    launch!(c.gpu, kernel, Grid::new([blocks, 1, 1], 32 * warps), own);
    Ok(())
}

/// Warps of a block of the plain kernels, each with an output.
const PLAIN_WARPS: usize = 8;

/// Names of kernels for up to 4, 8 and 16 rows, without a norm and behind one.
type Names = [[&'static str; 2]; 3];

const NARROW: Names = [["narrow_4", "norm_narrow_4"], ["narrow_8", "norm_narrow_8"], ["narrow_16", "norm_narrow_16"]];
const MEDIUM: Names = [["medium_4", "norm_medium_4"], ["medium_8", "norm_medium_8"], ["medium_16", "norm_medium_16"]];
const WIDE: Names = [["wide_4", "norm_wide_4"], ["wide_8", "norm_wide_8"], ["wide_16", "norm_wide_16"]];

fn few_kernel(names: Names, rows: usize, norm: bool) -> &'static str {
    let tier = usize::from(rows > 4) + usize::from(rows > 8);
    names[tier][usize::from(norm)]
}

pub(crate) fn weight_macros(stored: Stored) -> &'static [(&'static str, i64)] {
    match stored {
        Stored::F32 => &[("WEIGHT", 0)],
        Stored::F16 => &[("WEIGHT", 1)],
        Stored::Bf16 => &[("WEIGHT", 2)],
    }
}
