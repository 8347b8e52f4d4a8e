//! Linear layers: tiles of the result shared among threads.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::dot::{Shape, dot_rows};
use super::element::Element;
use super::shared_output::{Shared, each_tile, store};
use super::simd::Isa;
use dibit_device::Output;

/// `out = x w^T + bias`, or added to `out`.
pub(super) fn linear<E: Element>(
    isa: Isa,
    x: &[f32],
    w: &[E],
    shape: Shape,
    bias: Option<&[f32]>,
    out: &mut [f32],
    output: Output,
) {
    let Shape { m, n, k } = shape;
    let (Output::Write(first) | Output::Add(first)) = output;
    let (x, w) = (&x[..m * k], &w[..n * k]);
    let shared = Shared::new(&mut out[first * n..(first + m) * n]);
    let done = by_tiles(isa, x, w, shape, bias, &shared, output);
    each_tile(m, done..n, |rows, columns| {
        let tile = Shape { m: rows.len(), n: columns.len(), k };
        let (x, w) = (&x[rows.start * k..rows.end * k], &w[columns.start * k..columns.end * k]);
        dot_rows(isa, x, w, tile, &mut |i, j, sum| {
            let column = columns.start + j;
            // SAFETY: tiles do not overlap, and each number of a tile is emitted once.
            let out = unsafe { shared.slice((rows.start + i) * n + column, 1) };
            store(out, &[sum], bias.map(|bias| &bias[column..]), output);
        });
    });
}

/// The columns that the matrix unit computes, where there is one: their number.
#[cfg(target_arch = "x86_64")]
fn by_tiles<E: Element>(
    isa: Isa,
    x: &[f32],
    w: &[E],
    shape: Shape,
    bias: Option<&[f32]>,
    out: &Shared,
    output: Output,
) -> usize {
    match E::as_bf16(w) {
        Some(w) if isa == Isa::Amx => amx::linear(x, w, shape, bias, out, output),
        _ => 0,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn by_tiles<E: Element>(_: Isa, _: &[f32], _: &[E], _: Shape, _: Option<&[f32]>, _: &Shared, _: Output) -> usize {
    0
}
