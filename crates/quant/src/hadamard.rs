//! Normalised Hadamard rotations of a row vector, `x <- x H`.
//!
//! `H = had(K) (x) Sylvester(n / K) / sqrt(n)` with `K` = 1, 12 or 20. had(12) and had(20) are
//! Paley's first construction over the primes 11 and 19. For `K` = 1 the matrix is symmetric and its
//! own inverse; otherwise the inverse is the transpose.
//!
//! Other multiples of 8 get such matrices as diagonal blocks: as few as can be, and of those the ones whose smallest is
//! largest. An outlier is spread over the channels of its block alone, so a block of order `b` leaves `1 / sqrt(b)` of it,
//! and the range of a group is that of its worst block: 72 is 40 + 32, and neither 64 + 8 nor 9 blocks of 8.
//!
//! All of it is inlined, so that a caller that is compiled for more instructions uses them.

use crate::QuantError;

/// Rows of the outer factors.
const OUTER: [usize; 3] = [1, 12, 20];

/// The unit of orders that are made of blocks.
const UNIT: usize = 8;

/// A normalised Hadamard matrix, or one with such blocks on its diagonal, applied in place without being stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Hadamard {
    order: usize,
    blocks: Vec<Block>,
}

/// A normalised Hadamard matrix.
#[derive(Debug, Clone, PartialEq)]
struct Block {
    order: usize,
    /// Signs of the `outer x outer` factor, row-major; empty where the factor is 1.
    outer_signs: Vec<f32>,
    outer: usize,
}

/// Rows of the outer factor of a Hadamard matrix of this order, where there is one.
fn outer_of(order: usize) -> Option<usize> {
    OUTER.into_iter().find(|k| order.is_multiple_of(*k) && (order / k).is_power_of_two())
}

/// Orders of `count` blocks, falling, whose smallest is largest; none is smaller than `least`.
fn split(order: usize, count: usize, least: usize) -> Option<Vec<usize>> {
    if count == 1 {
        return (order >= least && outer_of(order).is_some()).then(|| vec![order]);
    }
    let mut smallest = (least..=order / count).rev().filter(|own| own.is_multiple_of(UNIT) && outer_of(*own).is_some());
    smallest.find_map(|first| {
        let mut blocks = split(order - first, count - 1, first)?;
        blocks.push(first);
        Some(blocks)
    })
}

impl Hadamard {
    /// The matrix of this order.
    ///
    /// # Errors
    /// [`QuantError::HadamardOrder`] unless the order is 2^k, 12*2^k, 20*2^k or a multiple of 8.
    pub fn new(order: usize) -> Result<Self, QuantError> {
        let orders = match outer_of(order) {
            Some(_) => vec![order],
            None if order > 0 && order.is_multiple_of(UNIT) => {
                (2..=order / UNIT).find_map(|count| split(order, count, UNIT)).expect("blocks of 8 make every multiple")
            }
            None => return Err(QuantError::HadamardOrder(order)),
        };
        Ok(Hadamard { order, blocks: orders.into_iter().filter_map(Block::new).collect() })
    }

    /// Number of rows and columns.
    pub fn order(&self) -> usize {
        self.order
    }

    /// Orders of the blocks on the diagonal, in their order and the largest first: one where a Hadamard matrix of the whole
    /// order is known.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = usize> {
        self.blocks.iter().map(|block| block.order)
    }

    /// Sums and products that rotating a row takes.
    pub fn multiply_adds(&self) -> usize {
        let of_block = |block: &Block| {
            let outer = if block.outer > 1 { block.outer } else { 0 };
            block.order * ((block.order / block.outer).ilog2() as usize + outer + 1)
        };
        self.blocks.iter().map(of_block).sum()
    }

    /// Rotates `row` in place: `row <- row H`.
    ///
    /// # Panics
    /// If `row` is not [`Hadamard::order`] long.
    #[inline(always)]
    pub fn apply(&self, row: &mut [f32]) {
        self.apply_columns(row, 1);
    }

    /// Rotates `row` back in place: `row <- row H^T`, the inverse of [`Hadamard::apply`].
    ///
    /// # Panics
    /// If `row` is not [`Hadamard::order`] long.
    #[inline(always)]
    pub fn apply_inverse(&self, row: &mut [f32]) {
        self.apply_inverse_columns(row, 1);
    }

    /// Rotates every column of a row-major matrix of `columns` columns, `X <- H^T X`: what [`Hadamard::apply`] does to
    /// each column.
    ///
    /// # Panics
    /// If the matrix does not have [`Hadamard::order`] rows.
    #[inline(always)]
    pub fn apply_columns(&self, matrix: &mut [f32], columns: usize) {
        self.rotate(matrix, columns, |signs, i, j, k| signs[i * k + j]);
    }

    /// The inverse of [`Hadamard::apply_columns`], `X <- H X`.
    ///
    /// # Panics
    /// If the matrix does not have [`Hadamard::order`] rows.
    #[inline(always)]
    pub fn apply_inverse_columns(&self, matrix: &mut [f32], columns: usize) {
        self.rotate(matrix, columns, |signs, i, j, k| signs[j * k + i]);
    }

    #[inline(always)]
    fn rotate(&self, matrix: &mut [f32], columns: usize, sign: impl Fn(&[f32], usize, usize, usize) -> f32 + Copy) {
        assert_eq!(matrix.len(), self.order * columns, "rows of a rotation of order {}", self.order);
        let mut rest = matrix;
        for block in &self.blocks {
            let (own, behind) = rest.split_at_mut(block.order * columns);
            block.rotate(own, columns, sign);
            rest = behind;
        }
    }
}

impl Block {
    fn new(order: usize) -> Option<Self> {
        let outer = outer_of(order)?;
        Some(Block { order, outer_signs: if outer == 1 { Vec::new() } else { paley(outer) }, outer })
    }

    #[inline(always)]
    fn rotate(&self, matrix: &mut [f32], columns: usize, sign: impl Fn(&[f32], usize, usize, usize) -> f32) {
        let inner = self.order / self.outer * columns;
        for block in matrix.chunks_exact_mut(inner) {
            sylvester(block, columns);
        }
        if self.outer > 1 {
            let mut column = [0f32; 20];
            for lane in 0..inner {
                for (i, value) in column[..self.outer].iter_mut().enumerate() {
                    *value = matrix[i * inner + lane];
                }
                for j in 0..self.outer {
                    matrix[j * inner + lane] =
                        (0..self.outer).map(|i| column[i] * sign(&self.outer_signs, i, j, self.outer)).sum();
                }
            }
        }
        let norm = 1.0 / (self.order as f32).sqrt();
        for value in matrix {
            *value *= norm;
        }
    }
}

/// Unnormalised fast Walsh-Hadamard transform of every column of a power-of-two number of rows.
#[inline(always)]
fn sylvester(matrix: &mut [f32], columns: usize) {
    let mut half = columns;
    if columns == 1 && matrix.len() >= 16 {
        matrix.as_chunks_mut().0.iter_mut().for_each(sixteen);
        half = 16;
    }
    // Two steps in one pass over the matrix.
    while 4 * half <= matrix.len() {
        for four in matrix.chunks_exact_mut(4 * half) {
            let (low, high) = four.split_at_mut(2 * half);
            let ((a, b), (c, d)) = (low.split_at_mut(half), high.split_at_mut(half));
            for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                let ((e, f), (g, h)) = ((*a + *b, *a - *b), (*c + *d, *c - *d));
                (*a, *b, *c, *d) = (e + g, f + h, e - g, f - h);
            }
        }
        half *= 4;
    }
    if half < matrix.len() {
        for pair in matrix.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
    }
}

/// The transform of 16 numbers, in steps of known length, which become shuffles.
#[inline(always)]
fn sixteen(x: &mut [f32; 16]) {
    for half in [1, 2, 4, 8] {
        let sum = |i: usize| if i & half == 0 { x[i] + x[i | half] } else { x[i & !half] - x[i] };
        *x = std::array::from_fn(sum);
    }
}

/// Paley's first construction: `I + S` for a prime `order - 1` congruent 3 modulo 4.
fn paley(order: usize) -> Vec<f32> {
    let prime = order - 1;
    let mut character = vec![-1.0; prime];
    character[0] = 0.0;
    for i in 1..prime {
        character[i * i % prime] = 1.0;
    }
    let mut signs = vec![0.0; order * order];
    for i in 0..order {
        for j in 0..order {
            signs[i * order + j] = match (i, j) {
                (i, j) if i == j => 1.0,
                (0, _) => 1.0,
                (_, 0) => -1.0,
                (i, j) => character[(j + prime - i) % prime],
            };
        }
    }
    signs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ORDERS: [usize; 16] = [1, 2, 12, 20, 24, 40, 64, 72, 80, 96, 112, 128, 248, 256, 288, 512];

    /// Rows of the matrix.
    fn matrix(order: usize) -> Vec<Vec<f32>> {
        let hadamard = Hadamard::new(order).unwrap();
        let row = |i: usize| {
            let mut row = vec![0.0; order];
            row[i] = 1.0;
            hadamard.apply(&mut row);
            row
        };
        (0..order).map(row).collect()
    }

    #[test]
    fn work_is_counted_by_block() {
        let work = |order: usize| Hadamard::new(order).unwrap().multiply_adds();
        // 40 is 20 * 2, and 72 is 40 + 32.
        assert_eq!([1, 8, 64, 40, 72].map(work), [1, 8 * 4, 64 * 7, 40 * 22, 40 * 22 + 32 * 6]);
    }

    #[test]
    fn rows_are_orthonormal_with_equal_magnitudes_in_a_block() {
        for order in ORDERS.into_iter().chain((8..=256).step_by(8)) {
            let rows = matrix(order);
            let mut start = 0;
            for block in Hadamard::new(order).unwrap().blocks() {
                let (own, magnitude) = (start..start + block, 1.0 / (block as f32).sqrt());
                for row in &rows[own.clone()] {
                    for (j, x) in row.iter().enumerate() {
                        let expected = if own.contains(&j) { magnitude } else { 0.0 };
                        assert!((x.abs() - expected).abs() < 1e-6, "order {order}");
                    }
                }
                start += block;
            }
            assert_eq!(start, order);
            for (i, a) in rows.iter().enumerate() {
                for (j, b) in rows.iter().enumerate() {
                    let dot: f32 = a.iter().zip(b).map(|(x, y)| x * y).sum();
                    assert!((dot - f32::from(i == j)).abs() < 1e-5, "order {order}, rows {i} and {j}");
                }
            }
        }
    }

    #[test]
    fn blocks_are_few_and_the_smallest_is_large() {
        let blocks = |order: usize| Hadamard::new(order).unwrap().blocks().collect::<Vec<_>>();
        for order in [8, 32, 48, 80, 96, 160, 192, 256, 320, 768, 1024] {
            assert_eq!(blocks(order), [order]);
        }
        assert_eq!([72, 88, 112, 120].map(blocks), [[40, 32], [48, 40], [64, 48], [80, 40]]);
        assert_eq!(blocks(248), [128, 80, 40]);
        // Heads that are rotated together.
        assert_eq!(blocks(4 * 72), [160, 128]);
        assert!((8..=256).step_by(8).all(|order| blocks(order).len() <= 3));
        assert!((8..=1024).step_by(8).all(|order| blocks(order).len() <= 4));
    }

    #[test]
    fn power_of_two_orders_are_their_own_inverse() {
        for order in [2, 64, 128, 256] {
            let hadamard = Hadamard::new(order).unwrap();
            let start: Vec<f32> = (0..order).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut row = start.clone();
            hadamard.apply(&mut row);
            hadamard.apply(&mut row);
            assert!(row.iter().zip(&start).all(|(a, b)| (a - b).abs() < 1e-5), "order {order}");
        }
    }

    #[test]
    fn other_orders_are_refused() {
        for order in [0, 3, 7, 28, 76, 257] {
            assert_eq!(Hadamard::new(order), Err(QuantError::HadamardOrder(order)));
        }
    }

    #[test]
    fn columns_are_rotated_as_rows_are() {
        for order in [8, 24, 72, 80] {
            let hadamard = Hadamard::new(order).unwrap();
            let original: Vec<f32> = (0..order * 3).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut matrix = original.clone();
            hadamard.apply_columns(&mut matrix, 3);
            for column in 0..3 {
                let mut row: Vec<f32> = original[column..].iter().step_by(3).copied().collect();
                hadamard.apply(&mut row);
                assert_eq!(matrix[column..].iter().step_by(3).copied().collect::<Vec<_>>(), row, "order {order}");
            }
            hadamard.apply_inverse_columns(&mut matrix, 3);
            assert!(matrix.iter().zip(&original).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }

    proptest! {
        #[test]
        fn inverse_undoes_the_rotation(seed in any::<u32>(), which in 0usize..ORDERS.len()) {
            let order = ORDERS[which];
            let hadamard = Hadamard::new(order).unwrap();
            let start: Vec<f32> = (0..order).map(|i| ((seed as f32 * 1e-4) + i as f32 * 1.7).sin()).collect();
            let mut row = start.clone();
            hadamard.apply(&mut row);
            let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>();
            prop_assert!((norm(&row) - norm(&start)).abs() < 1e-3 * norm(&start).max(1.0));
            hadamard.apply_inverse(&mut row);
            for (a, b) in row.iter().zip(&start) {
                prop_assert!((a - b).abs() < 1e-5);
            }
        }
    }
}
