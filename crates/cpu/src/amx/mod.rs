//! Linear layers of many rows by AMX, the matrix unit of newer Xeons: bf16 weights as they lie.
//!
//! `out^T = w x^T`: a tile of weights is the left factor, row-major as the checkpoint has it, and activations are laid
//! out as the right one, once for a call. The unit multiplies normal numbers exactly, takes subnormal
//! ones for zero, and sums in f32. An activation is the
//! sum of two bf16 numbers, 16 significant bits (its error is at most 2^-17 of it), so that both products together are
//! what f32 activations would give, but for the order of sums: over `k` in pairs, in steps of 32, in [`Panel::MAX_K`]s.

mod panel;
mod tile;

use super::dot::Shape;
use super::shared_output::{Shared, store};
use super::simd::amx_state;
use dibit_device::Output;
use half::bf16;
use panel::Panel;
use rayon::prelude::*;
use std::cell::Cell;
use tile::NEXT_ROWS;

/// Numbers of `k` in a row of a tile.
pub(super) const STEP: usize = 32;

/// Rows of a tile.
const TILE: usize = 16;

thread_local! {
    static PANEL: Cell<Panel> = Cell::default();
}

/// The first columns of `x w^T + bias`, as many as consist of whole tiles: their number. It is 0 where `k` does not
/// consist of whole steps.
///
/// # Panics
/// If the processor lacks AMX ([`amx_state::is_available`]).
pub(super) fn linear(x: &[f32], w: &[bf16], shape: Shape, bias: Option<&[f32]>, out: &Shared, output: Output) -> usize {
    assert!(amx_state::is_available(), "AMX");
    let Shape { m, n, k } = shape;
    if k == 0 || !k.is_multiple_of(STEP) {
        return 0;
    }
    let columns = n - n % TILE;
    let mut panel = PANEL.take();
    for first in (0..k).step_by(Panel::MAX_K) {
        let own = first..k.min(first + Panel::MAX_K);
        panel.load(x, m, k, own.clone());
        // What earlier parts of `k` gave is added to.
        let (output, bias) = if first == 0 { (output, bias) } else { (Output::Add(0), None) };
        (0..columns.div_ceil(2 * TILE)).into_par_iter().for_each(|task| {
            let column = 2 * TILE * task;
            // A second tile that is not there repeats the first.
            let pair = if column + TILE < columns { [column, column + TILE] } else { [column; 2] };
            let weights = pair.map(|column| &w[column * k + own.start..(column + TILE - 1) * k + own.end]);
            for block in (0..panel.blocks()).step_by(2) {
                // The rows of the next task, which this thread is likely to take.
                let ahead = pair[1] + TILE + block / 2 * NEXT_ROWS % (2 * TILE);
                let next = w.as_ptr().wrapping_add(ahead * k + own.start);
                let blocks = [block, (block + 1).min(panel.blocks() - 1)];
                let activations = blocks.map(|block| panel.block(block));
                let products = tile::multiply(weights, k, next, activations, own.len() / STEP);
                for (i, column) in pair.into_iter().enumerate().take(if pair[0] < pair[1] { 2 } else { 1 }) {
                    for (j, block) in blocks.into_iter().enumerate().take(if blocks[0] < blocks[1] { 2 } else { 1 }) {
                        let tile = &products.0[2 * i + j];
                        for row in block * TILE..m.min(block * TILE + TILE) {
                            let sums: [f32; TILE] = std::array::from_fn(|c| tile[c][row - block * TILE]);
                            // SAFETY: no other task has these columns.
                            let out = unsafe { out.slice(row * n + column, TILE) };
                            store(out, &sums, bias.map(|bias| &bias[column..]), output);
                        }
                    }
                }
            }
        });
    }
    PANEL.set(panel);
    columns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dot::reference;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn products_are_those_of_f32_activations(
            m in 1usize..70,
            n in 1usize..100,
            steps in 1usize..100,
            adds in any::<bool>(),
            has_bias in any::<bool>(),
        ) {
            if !amx_state::is_available() {
                return Ok(());
            }
            let k = steps * STEP;
            let x: Vec<f32> = (0..m * k).map(|i| ((i * i + i) as f32 * 0.71).sin() * 1.3f32.powi(i as i32 % 30)).collect();
            let w: Vec<bf16> = (0..n * k).map(|i| bf16::from_f32((i as f32 * 1.37).cos())).collect();
            let bias: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let shape = Shape { m, n, k };
            let exact = reference(&x, &w, shape, true);
            let mut out = vec![2.0; m * n];
            let output = if adds { Output::Add(0) } else { Output::Write(0) };
            let columns = linear(&x, &w, shape, has_bias.then_some(&bias), &Shared::new(&mut out), output);
            prop_assert_eq!(columns, n / TILE * TILE);
            for (row, (out, exact)) in out.chunks_exact(n).zip(exact.chunks_exact(n)).enumerate() {
                // Both bounds together: rounding activations to 17 bits, and sums in another order.
                let size: f32 = x[row * k..(row + 1) * k].iter().map(|x| x.abs()).sum();
                for column in 0..n {
                    let mut expected = exact[column] + if has_bias { bias[column] } else { 0.0 };
                    expected += if adds { 2.0 } else { 0.0 };
                    let expected = if column < columns { expected } else { 2.0 };
                    prop_assert!((out[column] - expected).abs() <= 2e-5 * size + 1e-5 * expected.abs(),
                        "row {}, column {}: {} is not {}", row, column, out[column], expected);
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_others() {
        if !amx_state::is_available() {
            return;
        }
        let (m, n, k) = (45, 48, 4128);
        let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.71).sin()).collect();
        let w: Vec<bf16> = (0..n * k).map(|i| bf16::from_f32((i as f32 * 1.37).cos())).collect();
        let run = |rows: std::ops::Range<usize>| {
            let mut out = vec![0.0; rows.len() * n];
            let shape = Shape { m: rows.len(), n, k };
            linear(&x[rows.start * k..rows.end * k], &w, shape, None, &Shared::new(&mut out), Output::Write(0));
            out
        };
        let all = run(0..m);
        for rows in [0..1, 17..20, 3..43] {
            assert_eq!(run(rows.clone()), all[rows.start * n..rows.end * n]);
        }
    }
}
