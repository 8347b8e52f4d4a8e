//! Products of matrices that lie in any order.

use crate::shared_output::Shared;
use dibit_device::Place;
use rayon::prelude::*;

/// Rows and columns of the result that one task computes. Constants: the order of sums must not depend on threads.
const TILE_ROWS: usize = 192;
const TILE_COLUMNS: usize = 256;

/// Checks that a matrix of `rows` rows and `columns` columns lies within `len` numbers.
fn check(place: Place, rows: usize, columns: usize, len: usize) {
    let last = place.offset + (rows - 1) * place.row + (columns - 1) * place.column;
    assert!(last < len, "a matrix of {rows} x {columns} at {place:?} in {len} numbers");
}

/// [`dibit_device::Train::product`].
pub(super) fn product(
    [m, n, k]: [usize; 3],
    scale: f32,
    (a, a_place): (&[f32], Place),
    (b, b_place): (&[f32], Place),
    (out, out_place): (&mut [f32], Place),
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0 && out_place.column == 1 && (out_place.row >= n || m == 1), "rows of a result do not overlap");
    check(a_place, m, k, a.len());
    check(b_place, k, n, b.len());
    check(out_place, m, n, out.len());
    let shared = Shared::new(out);
    let columns = n.div_ceil(TILE_COLUMNS);
    (0..m.div_ceil(TILE_ROWS) * columns).into_par_iter().for_each(|task| {
        let (i, j) = (task / columns * TILE_ROWS, task % columns * TILE_COLUMNS);
        let (rows, width) = (TILE_ROWS.min(m - i), TILE_COLUMNS.min(n - j));
        let first = out_place.offset + i * out_place.row + j;
        // SAFETY: all numbers of the tile lie in the result (checked above), tiles have no number in common, and each
        // is of one task. What lies between the rows of a tile belongs to other tasks, and the product does not touch it.
        unsafe {
            gemm::gemm(
                rows,
                width,
                k,
                shared.at(first),
                1,
                out_place.row as isize,
                add,
                a.as_ptr().add(a_place.offset + i * a_place.row),
                a_place.column as isize,
                a_place.row as isize,
                b.as_ptr().add(b_place.offset + j * b_place.column),
                b_place.column as isize,
                b_place.row as isize,
                1.0,
                scale,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 31 + seed * 17) as f32 * 0.37).sin()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn products_are_those_of_the_definition(
            m in 1usize..400, n in 1usize..300, k in 1usize..70, gap in 0usize..5, turned in 0usize..4, add: bool,
        ) {
            let place = |rows: usize, columns: usize, turn: bool, offset: usize| match turn {
                false => (Place::rows(offset, columns + gap), offset + rows * (columns + gap)),
                true => (Place::rows(offset, rows + gap).transposed(), offset + columns * (rows + gap)),
            };
            let (a_place, a_len) = place(m, k, turned % 2 == 1, 3);
            let (b_place, b_len) = place(k, n, turned / 2 == 1, 0);
            let (a, b) = (noise(a_len, 1), noise(b_len, 2));
            let before = noise(7 + m * (n + gap), 3);
            let mut out = before.clone();
            let out_place = Place::rows(7, n + gap);
            product([m, n, k], 0.5, (&a, a_place), (&b, b_place), (&mut out, out_place), add);
            let at = |place: Place, i: usize, j: usize| place.offset + i * place.row + j * place.column;
            let mut expected: Vec<f64> = before.iter().map(|x| f64::from(*x)).collect();
            for i in 0..m {
                for j in 0..n {
                    let terms = (0..k).map(|l| f64::from(a[at(a_place, i, l)]) * f64::from(b[at(b_place, l, j)]));
                    let sum = 0.5 * terms.sum::<f64>();
                    let place = &mut expected[at(out_place, i, j)];
                    *place = if add { *place + sum } else { sum };
                }
            }
            for (got, expected) in out.iter().zip(expected) {
                prop_assert!((f64::from(*got) - expected).abs() < 1e-4, "{} {}", got, expected);
            }
        }
    }
}
